"""Tell what a run will hold and send, before it runs: bytes of memory of each process, bytes on the wire of a step.

    python launch/plan.py model=1b optimizer=galore optimizer.rank=128 strategy=thinrank_ddp --world 8
    python launch/plan.py model=1b --world 8 --compare optimizer=adamw,galore,galore_plus strategy=ddp,thinrank_ddp

Nothing is allocated and nothing written; ``--help`` says what there is. Exit codes: 0, or 2 and a sentence.
"""

from thinrank.configs.command import end_with, refuse, say
from thinrank.configs.errors import ConfigError
from thinrank.trainers.errors import UserError


def main(argv: list[str]) -> int:
    from thinrank.configs.planning import USAGE, answer, request

    try:
        asked = request(argv)
        return say(USAGE.rstrip() if asked.help else answer(asked))
    except (ConfigError, UserError) as error:
        return refuse(error)


if __name__ == "__main__":
    end_with(main)
