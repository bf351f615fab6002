"""The words and the corpus of a run of a few seconds."""

import random


def write_corpus(base):
    """A few small text files in `base/corpus`."""
    draw = random.Random(0)
    (base / "corpus").mkdir()
    for name in "abcdefgh":
        text = " ".join(draw.choice(["def", "return", "self", "in"]) for _ in range(600))
        (base / "corpus" / f"{name}.txt").write_text(text)


def run_words(base, name):
    """What launch/pretrain.py is given for a run in `base/name` on the corpus there."""
    return [
        f"run.dir={base}/{name}",
        "model.hidden_size=16",
        "model.intermediate_size=32",
        "model.num_hidden_layers=1",
        "model.num_attention_heads=2",
        "data=files",
        f"data.train=[{base}/corpus/*.txt]",
        "data.validation_fraction=0.3",
        f"data.cache_dir={base}/cache",
        "data.tokenizer=bytes",
        "data.sequence_length=16",
        "data.validation_tokens=64",
        "data.final_validation_tokens=64",
        "optimizer=galore",
        "optimizer.rank=4",
        "trainer=debug",
        "trainer.validate_every=0",
        "trainer.batch_size=4",
        "trainer.precision=32-true",
        "trainer.accelerator=cpu",
        "trainer.tensorboard=false",
        "trainer.export=false",
        "trainer.sample_tokens=0",
    ]
