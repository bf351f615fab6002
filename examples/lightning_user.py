"""The module and the data in one's own Lightning Trainer, without the launcher.

python examples/lightning_user.py            # a minute: the standard library's text, the 2M model, 30 steps
"""

import sys

import lightning.pytorch as pl

from thinrank.optim import DCTAdamWConfig
from thinrank.trainers import CausalLM, ModelConfig, PySourceConfig, TextData


def main(steps: int = 30, model: ModelConfig | None = None, data: PySourceConfig | None = None) -> float:
    """Trains for `steps` and returns the bits per byte of the held-out text."""
    text = TextData(data or PySourceConfig(validation_tokens=8192), batch_size=8)
    module = CausalLM(model or ModelConfig(), optimizer=DCTAdamWConfig(rank=0.25, lr=2e-3, embedding_lr=5e-3))
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        use_distributed_sampler=False, val_check_interval=steps, check_val_every_n_epoch=None, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=text)
    return float(trainer.callback_metrics["val/bits_per_byte"])


if __name__ == "__main__":
    print(f"{main(int(sys.argv[1]) if len(sys.argv) > 1 else 30):.3f} bits per byte")
