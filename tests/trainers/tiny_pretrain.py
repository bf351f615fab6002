"""Whole pre-training runs of a few seconds; under torchrun also a program that two ranks execute."""

import json
import os
import random
import signal
import sys
from pathlib import Path

from thinrank.optim import DCTAdamWConfig, GaLoreConfig, MethodConfig
from thinrank.optim.layers import ReparamConfig
from thinrank.trainers.data import FilesConfig, TextData
from thinrank.trainers.models import ModelConfig
from thinrank.trainers.pretrain import PretrainConfig, TrainerConfig, pretrain
from thinrank.trainers.run import RunConfig
from thinrank.trainers.strategies import StrategyConfig

METHOD = GaLoreConfig(rank=4, update_proj_gap=7, lr=0.01)


def leave():
    """Ends a rank of a program of many runs once all have written what they found, without taking groups down.

    The groups of a dozen runs are threads of gloo's, which now and then abort a process that ends in the usual way.
    """
    import torch.distributed as dist

    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def write_corpus(folder):
    """A few small text files with something to learn in them."""
    draw = random.Random(0)
    words = ["def", "return", "self", "value", "for", "in", "range", "(", ")", ":", "\n"]
    for index in range(12):
        text = " ".join(draw.choice(words) for _ in range(400))
        (folder / f"{index}.txt").write_text(text)


def config(
    base,
    name,
    *,
    optimizer: MethodConfig = METHOD,
    strategy=None,
    reparam=None,
    run=None,
    model=None,
    data=None,
    **trainer,
):
    """A run in `base/name` on the corpus `base/corpus`; further arguments are the trainer's."""
    base = Path(base)
    settings = {
        "max_steps": 6,
        "batch_size": 4,
        "precision": "32-true",
        "accelerator": "cpu",
        "validate_every": 4,
        "checkpoint_every": 3,
        "log_every": 1,
        "sample_tokens": 4,
        "export": False,
        **trainer,
    }
    return PretrainConfig(
        run=RunConfig(dir=str(base / name), **(run or {})),
        model=ModelConfig(
            **{
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "extra": {"attention_dropout": 0.1},  # so that the random state matters
                **(model or {}),
            }
        ),
        data=FilesConfig(
            **{
                "train": [str(base / "corpus" / "*.txt")],
                "validation_fraction": 0.3,
                "tokenizer": "bytes",
                "sequence_length": 16,
                "validation_tokens": 256,
                "final_validation_tokens": 512,
                "cache_dir": str(base / "cache"),
                **(data or {}),
            }
        ),
        optimizer=optimizer,
        strategy=strategy or StrategyConfig(),
        reparam=reparam or ReparamConfig(),
        trainer=TrainerConfig(**settings),
    )


def signalled_at(step, rank, number=signal.SIGTERM, batch=4):
    """From here on, rank `rank` sends itself a signal when it has finished step `step`."""
    advance = TextData.advance

    def advance_and_signal(self, position):
        advance(self, position)
        if position == step * batch and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), number)

    def undo():
        TextData.advance = advance

    TextData.advance = advance_and_signal
    return undo


def losses(folder, tag="train/loss"):
    """The training losses, or the values of another tag, in a run's TensorBoard events, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(folder) / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def main(base):
    """On two ranks: a whole run, the same without dropout, and the first once more, preempted by rank 1 and resumed."""
    import torch.distributed as dist

    dist.init_process_group("gloo")  # once, for all runs of this program
    length = {"max_steps": 12, "checkpoint_every": 5}
    optimizer = DCTAdamWConfig(rank=4)
    pretrain(config(base, "whole", optimizer=optimizer, **length))
    pretrain(config(base, "plain", model={"extra": {}}, max_steps=20, batch_size=8))
    undo = signalled_at(7, rank=1)
    first = pretrain(config(base, "parts", optimizer=optimizer, **length))
    undo()
    second = pretrain(config(base, "parts", optimizer=optimizer, **length))
    if dist.get_rank() == 0:
        (Path(base) / "result.json").write_text(json.dumps([first["run"], second["run"]]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
