"""A step traced without memory allocates what the same step does with it, to the byte where the code is the same."""

import contextlib
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

from thinrank.optim import METHODS, build
from thinrank.optim import optimizer as stepping
from thinrank.trainers.loss import chunked as chunks
from thinrank.trainers.loss.head import head_loss, head_of
from thinrank.trainers.models import ModelConfig, build_model
from thinrank.trainers.plan.live import Live
from thinrank.trainers.plan.trace import work

SMALL = ModelConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
GPT2 = ModelConfig(
    architecture="gpt2", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    extra={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
)  # fmt: skip
WIDE = ModelConfig(hidden_size=768, intermediate_size=776, num_hidden_layers=1, num_attention_heads=8)
"""Matrices of more entries than those for whose batches a CPU has code of its own."""


def method(name, **more):
    """The method with a rank, and 200 steps between renewals, where it has them."""
    known = {field.name for field in fields(METHODS[name])}
    return replace(METHODS[name](), **{key: value for key, value in more.items() if key in known})


def alive(model, optimizer):
    state = (value for own in optimizer.state.values() for value in own.values())
    grads = (p.grad for p in model.parameters() if p.grad is not None)
    return Live([*model.parameters(), *model.buffers(), *state, *grads], device="cpu")


def test_live_counts_what_is_alive_and_its_most():
    held = torch.zeros(8)
    with Live([held], device="cpu") as live:
        assert live.now == 32
        a = held + 1
        b = a.view(2, 4)[0]  # a view is no storage
        assert live.now == 64
        del a
        assert live.now == 64  # the view holds it
        del b
        held.add_(1)
        assert (live.now, live.peak) == (32, 64)
        live.restart()
        assert live.peak == 32


def test_live_answers_what_is_read_without_values():
    x = torch.zeros(3, device="meta")
    with Live([x], number=7.0):
        assert bool(x.isfinite().all()) is True
        assert float(x.sum()) == 7.0
        assert x.tolist() == [7.0] * 3
        assert x.to(torch.int32).tolist() == [0] * 3
        assert x.cpu().device.type == "cpu"


@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config", [SMALL, replace(SMALL, num_key_value_heads=2), GPT2], ids=["llama", "shared", "gpt2"]
)
def test_forward_and_backward(config, cast):
    found = work(build_model(config, 200, seed=0, meta=True), method("adamw"), sequences=3, length=32, cast=cast)
    model = build_model(config, 200, seed=0)
    ids = torch.zeros(3, 32, dtype=torch.int64)
    live = Live([*model.parameters(), *model.buffers()], device="cpu")
    held = live.now
    with live:
        with torch.autocast("cpu", dtype=cast) if cast else contextlib.nullcontext():
            logits = model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, -2), ids.flatten(), reduction="sum") / ids.numel()
            del logits
        kept = live.now - held
        loss.backward()
    assert found.activations == pytest.approx(kept, rel=0.02)
    assert found.passes == pytest.approx(live.peak - held, rel=0.02)


EXACT = ("adamw", "galore", "fira", "subspace_adamw", "ldadam", "apollo", "mfac", "dion")
"""Methods without code for CPUs alone. DCT-AdamW and Trion have an FFT there, GaLore+ another choice of entries, Muon
another precision."""


@pytest.mark.parametrize("power", [False, True], ids=["exact", "power"])
@pytest.mark.parametrize("name", EXACT)
def test_what_a_step_allocates(name, power, monkeypatch):
    monkeypatch.setattr(stepping, "CPU_BATCH_BYTES", stepping.BATCH_BYTES)  # as on a GPU
    config = method(name, rank=48, svd="power" if power else "exact")
    found = work(build_model(WIDE, 2000, seed=0, meta=True), config, sequences=1, length=8)
    model = build_model(WIDE, 2000, seed=0)
    optimizer = build(model, config)
    peaks = []
    for step in range(4):
        for index, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + index))
        if step == 2:
            for own in optimizer.state.values():
                own["step"].zero_()  # once more a renewal, with states that are stacked already
        optimizer.measure = step == 0
        live = alive(model, optimizer)
        before = live.now
        with live:
            optimizer.step()
        peaks.append(live.peak - before)
    assert found.logged == pytest.approx(peaks[0], rel=1e-3)
    assert found.between == pytest.approx(peaks[1], rel=0.02)
    assert found.renewal == pytest.approx(peaks[2], rel=1e-3)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_traced(name, bits):
    found = work(
        build_model(SMALL, 200, seed=0, meta=True), method(name, rank=8, state_bits=bits), sequences=1, length=8
    )
    assert 0 < found.activations < found.passes
    assert found.step >= found.logged > 0


def test_gradients_taken_in_backward_are_not_there_together():
    model = build_model(replace(SMALL, num_hidden_layers=6), 200, seed=0, meta=True)
    sizes = {
        mode: work(model, method("galore", rank=8), sequences=1, length=8, in_backward=mode).passes
        for mode in ("off", "project", "step")
    }
    gradients = 4 * sum(p.numel() for p in model.parameters())
    assert sizes["off"] > gradients
    assert sizes["step"] < sizes["project"] < sizes["off"]
    assert sizes["step"] < gradients


def test_gradients_of_a_micro_batch_before_are_there_in_the_next():
    model = build_model(SMALL, 200, seed=0, meta=True)
    one, more = (work(model, method("adamw"), sequences=1, length=64, accumulate=count).passes for count in (1, 4))
    assert one < more <= one + 4 * sum(p.numel() for p in model.parameters())


def test_tracing_leaves_the_process_and_the_model_as_they_were():
    model = build_model(SMALL, 200, seed=0, meta=True)
    work(model, method("galore", rank=8), sequences=1, length=8, in_backward="step")
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    real = build_model(SMALL, 200, seed=0)
    assert real(input_ids=torch.zeros(1, 4, dtype=torch.int64)).logits.isfinite().all()


@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
def test_a_loss_without_logits_is_planned_as_it_runs(cast, monkeypatch):
    """A few tokens' logits in the place of all, counted as they are allocated on a GPU, of whose product in 16 bits a
    CPU has only the shape."""
    config = replace(SMALL, num_hidden_layers=1)
    traced = {
        name: work(
            build_model(config, 4000, seed=0, meta=True),
            method("adamw"),
            sequences=8,
            length=32,
            cast=cast,
            cross_entropy=name,
        )
        for name in ("dense", "chunked")
    }
    if cast is not None:
        monkeypatch.setattr(chunks, "_product", lambda a, b, high: torch.zeros(len(a), b.shape[1], dtype=high))
    model = build_model(config, 4000, seed=0)
    ids = torch.zeros(8, 32, dtype=torch.int64)
    live = Live([*model.parameters(), *model.buffers()], device="cpu")
    held = live.now
    with live:
        with torch.autocast("cpu", dtype=cast) if cast else contextlib.nullcontext():
            loss, _ = head_loss(model, head_of(model), ids, ids, backend="chunked", lower=cast, statistics=False)
            loss = loss / ids.numel()
        loss.backward()
    assert traced["chunked"].passes == pytest.approx(live.peak - held, rel=0.02)
    saved = traced["dense"].passes - traced["chunked"].passes
    logits = 8 * 32 * 4000 * 4
    assert saved > logits
