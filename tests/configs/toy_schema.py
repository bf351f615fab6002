"""A small schema with every kind of field, so that the loader is tested apart from what thinrank configures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from thinrank.configs.compose import Schema


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How it changes."""

    kind: Literal["flat", "slope"] = field(default="flat", metadata={"help": "the shape"})
    warmup: int | None = field(default=None, metadata={"help": "steps of warm-up"})

    def __post_init__(self):
        if self.warmup is not None and self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {self.warmup}: use 0 for none")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where it goes."""

    name: str = field(default="try", metadata={"help": "a name"})
    folder: str = field(default="out/${run.name}", metadata={"help": "a folder"})
    prompt: str = field(default="def ", metadata={"help": "a text"})


@dataclass(frozen=True, kw_only=True)
class Plain:
    """The plain method."""

    name: str = field(default="plain", metadata={"help": "method"})
    lr: float = field(default=0.1, metadata={"help": "learning rate"})
    betas: tuple[float, float] = field(default=(0.9, 0.99), metadata={"help": "two decay rates"})


@dataclass(frozen=True, kw_only=True)
class Thin(Plain):
    """The thin method."""

    name: str = field(default="thin", metadata={"help": "method"})
    rank: int | float | None = field(default=0.25, metadata={"help": "directions, or a share"})
    targets: list[str] = field(default_factory=lambda: ["all"], metadata={"help": "patterns"})

    def __post_init__(self):
        if self.rank is not None and self.rank <= 0:
            raise ValueError(f"rank must be at least 1 or a share in (0, 1], got {self.rank}")


@dataclass(frozen=True, kw_only=True)
class Net:
    """The sizes."""

    name: str = field(default="small", metadata={"help": "label"})
    width: int = field(default=8, metadata={"help": "width"})
    extra: dict[str, Any] = field(default_factory=dict, metadata={"help": "more"})


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long."""

    steps: int = field(default=10, metadata={"help": "steps"})
    devices: int | str = field(default="auto", metadata={"help": "how many"})
    log: bool = field(default=True, metadata={"help": "whether to log"})
    clip: float | None = field(default=1.0, metadata={"help": "limit"})
    plan: Plan = field(default_factory=lambda: Plan(warmup=3), metadata={"help": "plan"})


@dataclass(frozen=True, kw_only=True)
class Root:
    """All of it."""

    run: Run
    net: Net
    method: Any
    train: Train

    def __post_init__(self):
        if self.net.width > self.train.steps * 100:
            raise ValueError("net.width must be at most 100 x train.steps: lower it")


FILES = {
    "base.yaml": "net: small\nmethod: plain\ntrain: default\n",
    "net/small.yaml": "",
    "net/large.yaml": "width: 64\nextra: {deep: true}\n",
    "method/thin.yaml": "# tuned\nlr: 2e-2\n",
    "train/default.yaml": "",
    "train/debug.yaml": "steps: 2\nplan:\n  kind: slope\n",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def schema(folder: Path) -> Schema:
    return Schema(
        root=Root,
        groups={"net": Net, "method": {"plain": Plain, "thin": Thin}, "train": Train},
        folder=write(folder, FILES),
        base="base",
    )
