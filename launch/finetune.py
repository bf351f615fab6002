"""Fine-tune a language model from a folder in the Hugging Face layout, whole or with LoRA.

    python launch/finetune.py
    python launch/finetune.py adapter=lora optimizer.lr=1e-2
    torchrun --standalone --nproc-per-node 2 launch/finetune.py model.path=runs/pretrain/export optimizer=galore

``--help`` lists the keys; exit codes are those of launch/pretrain.py.
"""

from typing import Any

from thinrank.configs.command import command, end_with


def main(argv: list[str]) -> int:
    return command(argv, usage="launch/finetune.py", schema="FINETUNE", start=start)


def start(loaded: Any) -> dict[str, Any]:
    from thinrank.trainers.finetune import finetune

    return finetune(loaded.config, resolved=loaded.tree)


if __name__ == "__main__":
    end_with(main)
