"""Pre-train a language model.

    python launch/pretrain.py
    torchrun --standalone --nproc-per-node 2 launch/pretrain.py optimizer=galore trainer.max_steps=20

``--help`` lists the keys. Exit codes: 0 finished, 2 a configuration or circumstance that the user can change,
3 a machine that is not as it should be, 75 preempted after a good save, 76 stopped by a guard, 77 another rank is
lost; anything else is a crash, with a traceback. Under torchrun, which turns all of them into 1, the run folder's
status.json has the code.
"""

from typing import Any

from thinrank.configs.command import command, end_with


def main(argv: list[str]) -> int:
    return command(argv, usage="launch/pretrain.py", schema="PRETRAIN", start=start)


def start(loaded: Any) -> dict[str, Any]:
    from thinrank.trainers.pretrain import pretrain

    return pretrain(loaded.config, resolved=loaded.tree)


if __name__ == "__main__":
    end_with(main)
