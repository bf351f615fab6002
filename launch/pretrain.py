"""Pre-train a language model.

    python launch/pretrain.py
    torchrun --standalone --nproc-per-node 2 launch/pretrain.py optimizer=galore trainer.max_steps=20

``--help`` lists the keys. Exit codes: 0 finished, 2 a configuration or circumstance that the user can change,
75 preempted after a good save, 76 stopped by a guard; anything else is a crash, with a traceback. Under torchrun, which
turns all of them into 1, the run folder's status.json has the code.
"""

import json
import os
import sys
import time

from thinrank.configs.arguments import parse
from thinrank.configs.errors import ConfigError
from thinrank.trainers.errors import GuardStop, UserError

FINISHED, REFUSED, PREEMPTED, STOPPED = 0, 2, 75, 76
RANK = os.environ.get("RANK", "0")


def main(argv: list[str]) -> int:
    # Each import stands where it is first needed: a mistyped option is told before seconds go into torch and Lightning.
    try:
        arguments = parse(argv)
        from thinrank.configs.schema import PRETRAIN

        if arguments.action == "help":
            from thinrank.configs.help import help_text

            return say(help_text(PRETRAIN, arguments, usage="launch/pretrain.py"))
        from thinrank.configs.load import load

        loaded = load(PRETRAIN, arguments)
        if arguments.action == "cfg":
            from thinrank.configs.reader import write

            return say(write(loaded.tree).rstrip())
        if arguments.action == "dry-run":
            from thinrank.configs.dry_run import dry_run

            return say(dry_run(loaded, arguments, script=sys.argv[0]))
        from thinrank.trainers.pretrain import pretrain

        code = pretrain(loaded.config, resolved=loaded.tree)["run"]["exit_code"]
        if code == PREEMPTED:
            tell_torchrun("preempted after a good save: start the same command again to go on")
        return code
    except GuardStop as error:
        return refuse(error, STOPPED)
    except (ConfigError, UserError) as error:
        return refuse(error)


def say(text: str) -> int:
    """Print what was asked for, once for all ranks."""
    if RANK == "0":
        print(text)
    return FINISHED


def refuse(error: Exception, code: int = REFUSED) -> int:
    """Say what is wrong on standard error; what every rank finds in its configuration, on rank 0 alone."""
    if RANK == "0" or not isinstance(error, ConfigError):
        print(f"error{f' on rank {RANK}' if RANK != '0' else ''}: {error}", file=sys.stderr)
    tell_torchrun(str(error))
    return code


def tell_torchrun(sentence: str) -> None:
    """Put a sentence into torchrun's closing summary, in the place of a traceback."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": sentence, "extraInfo": {"py_callstack": sentence, "timestamp": str(int(time.time()))}}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": message}, file)


if __name__ == "__main__":
    run = main
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        run = record(main)  # the first failing rank's traceback becomes part of torchrun's summary
    sys.exit(run(sys.argv[1:]))
