"""What every launch script does with its command line: look, or run; for what is wrong, a sentence and an exit code."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from thinrank.configs.arguments import parse
from thinrank.configs.errors import ConfigError
from thinrank.trainers.errors import GuardStop, PreflightError, RankLost, UserError
from thinrank.versions import UnsupportedVersion

FINISHED, REFUSED, UNFIT, PREEMPTED, STOPPED = 0, 2, 3, 75, 76
RANK = os.environ.get("RANK", "0")


def command(argv: list[str], *, usage: str, schema: str, start: Callable[[Any], dict[str, Any]]) -> int:
    """Do what the command line asks for and return the exit code.

    Args:
        argv: the words after the script's name.
        usage: the script as the help writes it.
        schema: name of the schema in `thinrank.configs.schema`.
        start: trains as a `Loaded` configuration says, and returns the report.
    """
    # Each import stands where it is first needed: a mistyped option is told before seconds go into torch and Lightning.
    try:
        arguments = parse(argv)
        from thinrank.configs import schema as schemas

        chosen = getattr(schemas, schema)
        if arguments.action == "help":
            from thinrank.configs.help import help_text

            return say(help_text(chosen, arguments, usage=usage))
        from thinrank.configs.load import load

        loaded = load(chosen, arguments)
        if arguments.action == "cfg":
            from thinrank.configs.reader import write

            return say(write(loaded.tree).rstrip())
        if arguments.action == "dry-run":
            from thinrank.configs.dry_run import dry_run

            return say(dry_run(loaded, arguments, script=sys.argv[0]))
        code = start(loaded)["run"]["exit_code"]
        if code == PREEMPTED:
            tell_torchrun("preempted after a good save: start the same command again to go on")
        return code
    except GuardStop as error:
        return refuse(error, STOPPED)
    except PreflightError as error:
        return refuse(error, UNFIT)
    except RankLost as error:
        return refuse(error, RankLost.EXIT_CODE)
    except (ConfigError, UserError, UnsupportedVersion) as error:
        return refuse(error)


def say(text: str) -> int:
    """Print what was asked for, once for all ranks."""
    if RANK == "0":
        print(text)
    return FINISHED


def refuse(error: Exception, code: int = REFUSED) -> int:
    """Say what is wrong on standard error; what every rank finds alike, on rank 0 alone."""
    if RANK == "0" or not isinstance(error, (ConfigError, PreflightError)):
        print(f"error{f' on rank {RANK}' if RANK != '0' else ''}: {error}", file=sys.stderr)
    tell_torchrun(str(error))
    return code


def tell_torchrun(sentence: str) -> None:
    """Put a sentence into torchrun's closing summary, in the place of a traceback."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": sentence, "extraInfo": {"py_callstack": sentence, "timestamp": str(int(time.time()))}}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": message}, file)


def end_with(main: Callable[[list[str]], int]) -> None:
    """Run a script's `main` and end the process with its exit code."""
    run: Callable[[list[str]], int | None] = main
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        run = record(main)  # the first failing rank's traceback becomes part of torchrun's summary
    sys.exit(run(sys.argv[1:]))
