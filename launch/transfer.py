"""Train small models of several widths under rules of scale, and say what they mean for a wider one.

    python launch/transfer.py --widths 64,128,256 --target 1024 --lr 1e-3,2e-3,4e-3 --decay 0.05,0.1,0.2

``--help`` says what there is, docs/scaling.md what it means. Exit codes: 0, or 2 and a sentence.
"""

from thinrank.configs.command import end_with, refuse, say
from thinrank.configs.errors import ConfigError
from thinrank.trainers.errors import UserError


def main(argv: list[str]) -> int:
    from thinrank.configs.transfer import USAGE, answer, request

    try:
        asked = request(argv)
        return say(USAGE.rstrip() if asked.help else answer(asked, argv))
    except (ConfigError, UserError) as error:
        return refuse(error)


if __name__ == "__main__":
    end_with(main)
