"""Runs that go on with fewer ranks, and under one strategy after the other, through the one file of a checkpoint."""

import os
import warnings

import pytest
from tiny_training import PoolEnvironment, TinyData, rows, tiny_model, tiny_module, tiny_trainer

from thinrank.optim import DionConfig, GaLoreConfig
from thinrank.trainers import checkpoint as ckpt
from thinrank.trainers.callbacks.checkpointing import Checkpointing
from thinrank.trainers.schedule import ScheduleConfig

PART, BATCH = 3, 8
"""Steps of a part of a run; rows of a step."""

METHODS = {
    # with Adam's usual eps a gradient that is rounding alone would be a step of full size
    "galore": GaLoreConfig(rank=4, svd="power", update_proj_gap=4, lr=0.01, eps=1e-3),
    "dion": DionConfig(rank=4),
}
CHAINS = {
    "ddp": [("thinrank_ddp", 4), ("thinrank_ddp", 2), ("thinrank_ddp", 1)],
    "zero2": [("thinrank_zero2", 4), ("thinrank_zero2", 2), ("thinrank_zero2", 1)],
    "zero3": [("thinrank_zero3", 4), ("thinrank_zero3", 2), ("thinrank_zero3", 1)],
    "across": [
        ("ddp", 2),
        ("thinrank_ddp", 4),
        ("thinrank_fsdp2", 4),
        ("thinrank_zero2", 2),
        ("thinrank_owned", 2),
        ("auto", 0),
    ],
}
"""Strategies, and how many ranks; 0 is this process."""
STEPS = PART * max(map(len, CHAINS.values()))


def strategy_of(name):
    from lightning.pytorch.strategies import DDPStrategy

    from thinrank.trainers import FSDP2Strategy, ReplicatedStrategy
    from thinrank.trainers.strategies.replicated import OwnedStrategy

    if name == "auto":
        return name
    if name.startswith("thinrank_zero"):
        from thinrank.trainers.strategies.zero import ZeroStrategy

        found = ZeroStrategy(int(name[-1]), bucket=2**12, process_group_backend="gloo")
    else:
        classes = {"ddp": DDPStrategy, "thinrank_ddp": ReplicatedStrategy, "thinrank_owned": OwnedStrategy}
        found = (classes | {"thinrank_fsdp2": FSDP2Strategy})[name](process_group_backend="gloo")
    found.cluster_environment = PoolEnvironment()
    return found


def goes_on(folder, method, strategy, steps, rank=0, world=1):
    """The part of a run in `folder` that is `steps`; where it ended, and on how many ranks."""
    module = tiny_module(
        model=tiny_model(seed=steps.start),  # whose weights those of the checkpoint have to replace
        optimizer=METHODS[method],
        schedule=ScheduleConfig(kind="linear"),
        total_steps=STEPS,
    )
    tokens = rows(BATCH * STEPS)[BATCH * steps.start : BATCH * steps.stop]
    trainer = tiny_trainer(
        steps.stop,
        strategy=strategy_of(strategy),
        devices=world,
        enable_checkpointing=True,
        callbacks=[Checkpointing(folder, len(steps))],
        plugins=[ckpt.AtomicCheckpointIO()],
    )
    data = TinyData(tokens, batch_size=BATCH, rank=rank, world=world)
    trainer.fit(
        module, data, ckpt_path=folder / ckpt.checkpoint_name(steps.start) if steps.start else None, weights_only=True
    )
    return trainer.global_step, trainer.world_size


def on_a_rank(folder, method, strategy, steps):
    import torch.distributed as dist

    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # how DeepSpeed calls torch: not ours to repair
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.* is deprecated", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed compiles a function of Muon's: half a minute of imports
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    warnings.filterwarnings("ignore", message="the checkpoint of step .* goes on with", category=UserWarning)
    return goes_on(folder, method, strategy, steps, dist.get_rank(), dist.get_world_size())


@pytest.mark.timeout(240)
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:the checkpoint of step .* goes on with:UserWarning")
@pytest.mark.parametrize(
    ("chain", "method"),
    [("ddp", "dion"), ("zero2", "dion"), ("zero3", "galore"), ("across", "galore"), ("across", "dion")],
)
def test_a_run_is_carried_on(ranks, tmp_path, chain, method):
    """As far as rounding may take it, it ends where a process ends that did all steps and never stopped."""
    from test_fsdp2_strategy import apart  # which imports what ranks need not have

    parts = CHAINS[chain]
    if any("zero" in strategy for strategy, _ in parts):
        pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    for i, (strategy, count) in enumerate(parts):
        steps = range(i * PART, (i + 1) * PART)
        arguments = (tmp_path / "moves", method, strategy, steps)
        ended = ranks(count).run(on_a_rank, *arguments, timeout=200) if count else [goes_on(*arguments)]
        assert ended == [(steps.stop, max(count, 1))] * max(count, 1)
    goes_on(tmp_path / "stays", method, "auto", range(PART * len(parts)))
    last = ckpt.checkpoint_name(PART * len(parts))
    found, expected = (ckpt.load(tmp_path / name / last)["state_dict"] for name in ("moves", "stays"))
    assert apart(found, expected) <= 2e-6
