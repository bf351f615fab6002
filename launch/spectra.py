"""Look at a trained model's weights: power laws, ranks, conditions and noise of their singular values, as a table.

    python launch/spectra.py runs/pretrain --out spectra
    python launch/spectra.py runs/finetune/export --compare runs/pretrain/export --layers mlp --metrics
    intruders,drift_js

Nothing is trained, and nothing written without ``--out``; ``--help`` says what there is. Exit codes: 0, or 2 and a
sentence.
"""

from thinrank.configs.command import end_with, refuse, say
from thinrank.configs.errors import ConfigError
from thinrank.trainers.errors import UserError


def main(argv: list[str]) -> int:
    from thinrank.configs.inspecting import USAGE, answer, request

    try:
        asked = request(argv)
        return say(USAGE.rstrip() if asked.help else answer(asked))
    except (ConfigError, UserError) as error:
        return refuse(error)


if __name__ == "__main__":
    end_with(main)
