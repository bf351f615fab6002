"""Weights on the disk, opened without the model that they are of: one matrix in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from thinrank.trainers import checkpoint
from thinrank.trainers.errors import UserError
from thinrank.trainers.reparam import has_factors, load_factors

_PREFIX = "model."
"""Where a training module keeps the model whose weights an export has."""


@dataclass(frozen=True)
class Opened:
    """What was found.

    Attributes:
        path: of the file, or the folder, that the weights are read from.
        source: a state dict, which may read tensors as they are asked for, or a model whose layers are factors.
        run: the run folder of a checkpoint, where there is one.
    """

    path: Path
    source: nn.Module | Mapping[str, Tensor]
    run: Path | None = None


class SafeTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files by name, each read when it is asked for and kept by nobody here.

    Args:
        files: of one model.

    Raises:
        UserError: a file that cannot be read.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files = {name: path for path in files for name in _names(path)}

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        reason = str(error).strip()
        raise UserError(
            f"{path} cannot be read as safetensors ({reason}): export or download the model again"
        ) from error


def open_weights(path: str | Path) -> Opened:
    """The weights that lie at `path`: a checkpoint of this library, a run folder (its newest complete checkpoint, or
    its export where there is none), a safetensors file, or a folder that `save_pretrained` or an export wrote.

    Raises:
        UserError: there is none of these, with what to give instead.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return Opened(place, SafeTensors([place])) if place.suffix == ".safetensors" else _checkpoint(place)
    if not place.is_dir():
        raise UserError(f"{path} does not exist: give a checkpoint, a run folder, or a folder with safetensors files")
    if has_factors(place):
        return Opened(place, load_factors(place))
    if files := _safetensors(place):
        return Opened(place, SafeTensors(files))
    for folder in (place / "checkpoints", place):
        if newest := checkpoint.newest(folder):
            return _checkpoint(newest)
    if (place / "export").is_dir():
        return open_weights(place / "export")
    if any(place.glob("*.bin")):
        raise UserError(
            f"{path} holds weights as pickles (.bin), which may run code: save the model as safetensors, which "
            "save_pretrained does"
        )
    raise UserError(
        f"{path} holds no weights: give a checkpoint, a run folder with one or with an export, or a folder with "
        "safetensors files"
    )


def _safetensors(folder: Path) -> list[Path]:
    """The files of a model in a folder, as its index says where it has one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is no index of safetensors files: export or download the model again") from error
    files = [folder / name for name in sorted(names)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{folder} lacks {missing[0]} of the files that its index names: download the model again")
    return files


def _checkpoint(path: Path) -> Opened:
    content = checkpoint.load(path, mmap=True)
    state = content.get("state_dict")
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} holds no weights (state_dict): give a checkpoint of a training run")
    if all(name.startswith(_PREFIX) for name in state):
        state = {name.removeprefix(_PREFIX): value for name, value in state.items()}
    run = path.parent.parent if path.parent.name == "checkpoints" else None
    return Opened(path, state, run)


def filled_in(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """`model`, laid out on the meta device with layers of factors, with the weights of `state` (in place).

    Sizes that a configuration does not know, such as the rows of an embedding, become those of `state`.

    Raises:
        RuntimeError: layers of factors that are of another shape in `state`.
    """
    for name, module in model.named_modules():
        start = f"{name}." if name else ""
        if hasattr(module, "factors"):
            inside = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            module.load_state_dict(inside, strict=False, assign=True)
            continue
        for key, _ in list(module.named_parameters(recurse=False)):
            if (value := state.get(start + key)) is not None:
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
    return model
