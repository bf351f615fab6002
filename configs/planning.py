"""``launch/plan.py``: what a configuration, or each of several, will hold and send, told before it runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from thinrank.configs.arguments import Arguments, parse
from thinrank.configs.errors import ConfigError

USAGE = """python launch/plan.py [key=value …] [--world N] [--compare group=NAME,NAME … [key=value,value …]] [--json]

Bytes that each process will hold and send, before anything runs; the keys are those of launch/pretrain.py.

  --world N     plan for N processes (default: as launched, or as trainer.devices says)
  --compare …   plan every combination of the values behind it, up to the next option; a key that a method of the
                comparison has not is left out for it
  --json        the numbers as JSON, in bytes
  --config FILE, --config-dir FOLDER, --help as in launch/pretrain.py
"""

_COMMA = re.compile(r",(?![^\[{]*[\]}])")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for."""

    arguments: Arguments
    """The words that hold for every plan."""
    compared: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Key and values, for each key that is compared."""
    world: int | None = None
    json: bool = False
    help: bool = False


def request(argv: Sequence[str]) -> Request:
    """Split the command line.

    Raises:
        ConfigError: with the remedy.
    """
    rest: list[str] = []
    compared: dict[str, tuple[str, ...]] = {}
    world: int | None = None
    as_json = asked = False
    words = list(argv)
    while words:
        option, equals, value = words.pop(0).partition("=")
        if option in ("--json", "--help", "-h"):
            as_json, asked = as_json or option == "--json", asked or option != "--json"
        elif option == "--world":
            world = _world(value if equals else words.pop(0) if words else "")
        elif option == "--compare":
            if equals:
                raise ConfigError(f"--compare takes words of their own: write --compare {value}")
            first = len(compared)
            while words and not words[0].startswith("-"):
                key, _, values = words.pop(0).partition("=")
                if not key or not values:
                    raise ConfigError(f"cannot compare {key!r}: write --compare key=value,value")
                compared[key] = tuple(part.strip() for part in _COMMA.split(values))
            if len(compared) == first:
                raise ConfigError("--compare has nothing to compare: write --compare optimizer=adamw,galore")
        elif option in ("--config", "--config-dir") and not equals and words:
            rest += [option, words.pop(0)]
        elif option in ("--cfg", "--dry-run"):
            raise ConfigError(f"{option} belongs to launch/pretrain.py: leave it out here")
        else:
            rest.append(option + equals + value)
    return Request(arguments=parse(rest), compared=tuple(compared.items()), world=world, json=as_json, help=asked)


def _world(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--world must be at least 1 process, got {text!r}: write --world 8")
    return int(text)


def combinations(asked: Request, schema: Any) -> dict[str, Arguments]:
    """The arguments of every plan, by what is compared in it; one without a name where nothing is.

    Raises:
        ConfigError: a choice that is not there, or a key that no method of the comparison has.
    """
    from thinrank.configs.compose import compose
    from thinrank.configs.fields import hints

    keys = [key for key, _ in asked.compared]
    found: dict[str, Arguments] = {}
    used: set[str] = set()
    for values in itertools.product(*(values for _, values in asked.compared)):
        words = [word for word in asked.arguments.words if word[0] not in keys] + list(zip(keys, values, strict=True))
        classes = compose(schema, dataclasses.replace(asked.arguments, words=tuple(_choices(words, schema)))).classes
        kept = []
        for key, value in words:
            group, _, rest = key.partition(".")
            if rest and group in keys and schema.classes(group) and rest.partition(".")[0] not in hints(classes[group]):
                continue
            used.add(key)
            kept.append((key, value))
        found[" ".join(values)] = dataclasses.replace(asked.arguments, words=tuple(kept))
    for key in [key for key, _ in asked.arguments.words if key not in used and key not in keys]:
        group, _, name = key.partition(".")
        chosen = ", ".join(dict(asked.compared)[group])
        raise ConfigError(f"none of {group}={chosen} has a key {name}: leave {key} out")
    return found


def _choices(words: Sequence[tuple[str, str]], schema: Any) -> list[tuple[str, str]]:
    return [word for word in words if schema.own_key(word[0]) in schema.groups or word[0].endswith(".name")]


def answer(asked: Request) -> str:
    """The plan, or the comparison, as it is printed.

    Raises:
        ConfigError, UserError: with the remedy.
    """
    from thinrank.configs.dry_run import counted, laid_out, planned_world
    from thinrank.configs.load import load
    from thinrank.configs.schema import PRETRAIN
    from thinrank.trainers.plan.page import comparison, page
    from thinrank.trainers.plan.precision import AUTO, fitting
    from thinrank.trainers.strategies.world import World

    plans: dict[str, Any] = {}
    traced: dict[str, Any] = {}
    title = ""
    for name, arguments in combinations(asked, PRETRAIN).items():
        config = (loaded := load(PRETRAIN, arguments)).config
        if config.trainer.precision == AUTO:  # of the machines that will run it, rather than of the one that plans
            config = config.computing_in(fitting(cuda=False) if config.trainer.accelerator == "cpu" else "bf16-mixed")
        world = World(size=asked.world, local_size=asked.world) if asked.world else planned_world(config)
        found = laid_out(config, world)
        same = repr((config.model, config.optimizer, config.trainer, config.data, world))  # whatever the strategy is
        plans[name] = plan = found.plan(traced.get(same))
        traced[same] = plan.work
        title = title or (
            f"model {config.model.name}, {sum(p.numel() for p in found.model.parameters()):,} parameters, "
            f"{counted(world.size, 'process', 'es')}, {config.trainer.precision}, "
            f"{config.trainer.batch_size:,} sequences of {config.data.sequence_length:,} tokens a step"
        )
        if not asked.compared:
            title += f", optimizer {loaded.names['optimizer']}, strategy {loaded.names['strategy']}"
    if asked.json:
        facts = {name: plan.plain() for name, plan in plans.items()}
        return json.dumps(facts if asked.compared else facts[""], indent=2)
    return f"{title}\n\n{comparison(plans) if asked.compared else page(plans[''])}"
