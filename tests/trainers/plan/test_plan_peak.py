"""The planned peak of a process beside the most bytes alive in three steps of a real one, exchange included."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from thinrank.optim import METHODS, build, replicate, route
from thinrank.optim import optimizer as stepping
from thinrank.optim.exchange import sums
from thinrank.trainers.models import ModelConfig, build_model
from thinrank.trainers.plan.live import Live
from thinrank.trainers.plan.strategies import Alone, Averaged, Replicas
from thinrank.trainers.plan.trace import work

MODEL = ModelConfig(hidden_size=768, intermediate_size=776, num_hidden_layers=2, num_attention_heads=8)
"""Matrices of more entries than those for whose batches a CPU has code of its own."""
METHOD = {
    "adamw": METHODS["adamw"](),
    "galore": replace(METHODS["galore"](), rank=48, svd="power"),
    "fira": replace(METHODS["fira"](), rank=48, svd="power"),
}
STRATEGY = {
    "alone": Alone(),
    "ddp": Averaged(),
    "replicas": Replicas(),
    "bfloat16": Replicas(dtype=torch.bfloat16),
}


def most(method, strategy, batch):
    """Bytes alive at one time in three steps of this rank, the first of which is logged and renews."""
    before = stepping.CPU_BATCH_BYTES, sums.DIRECT_BYTES
    stepping.CPU_BATCH_BYTES, sums.DIRECT_BYTES = stepping.BATCH_BYTES, 0  # as on a GPU
    try:
        model = build_model(MODEL, 2000, seed=0)
        optimizer = build(model, METHOD[method])
        ids, net = torch.zeros(batch, dtype=torch.int64), model
        state = [value for own in optimizer.state.values() for value in own.values()]
        live = Live([*model.parameters(), *model.buffers(), *state], device="cpu")
        del state
        with live:
            if isinstance(STRATEGY[strategy], Replicas):
                replicate(model, optimizer, check_every=None, dtype=STRATEGY[strategy].dtype)
            elif strategy == "ddp":
                net = torch.nn.parallel.DistributedDataParallel(model)
            live.restart()
            for step in range(3):
                optimizer.measure = step == 0
                logits = net(input_ids=ids, use_cache=False).logits
                loss = F.cross_entropy(logits.float().flatten(0, -2), ids.flatten(), reduction="sum") / ids.numel()
                del logits
                loss.backward()
                del loss
                optimizer.step()
                optimizer.zero_grad()
        return live.peak
    finally:
        stepping.CPU_BATCH_BYTES, sums.DIRECT_BYTES = before


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("batch", [(1, 8), (4, 160)], ids=["step", "passes"])
@pytest.mark.parametrize(
    ("method", "strategy"),
    [*(("galore", strategy) for strategy in STRATEGY), ("adamw", "alone"), ("adamw", "ddp"), ("fira", "replicas")],
)
def test_the_peak_of_a_real_step(ranks, method, strategy, batch):
    meta = build_model(MODEL, 2000, seed=0, meta=True)
    found = work(meta, METHOD[method], sequences=batch[0], length=batch[1])
    planned = STRATEGY[strategy].held(route(meta, METHOD[method]).rows, 0, 2, "off").peak(found)
    measured = most(method, strategy, batch) if strategy == "alone" else ranks(2).run(most, method, strategy, batch)[0]
    assert planned == pytest.approx(measured, rel=0.005 if strategy in ("alone", "ddp") else 0.1)
