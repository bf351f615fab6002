"""AdamW must be torch's, to the bit: the suite's dense rule borrows the trust that people have in it."""

import pytest
import torch
from torch import nn

from thinrank.optim import AdamW

SHAPES = [(5, 7), (300, 9), (7,), (3, 2, 2, 2), (), (1, 1)]


def twins(dtype):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    return ours, [nn.Parameter(p.detach().clone()) for p in ours]


def give(ours, theirs, step, *, without=()):
    """The same gradients to both; none to the parameters at the places `without`."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(a.dtype)
        a.grad = None if i in without else grad
        b.grad = None if i in without else grad.clone()


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch_to_the_bit(dtype, weight_decay):
    ours, theirs = twins(dtype)
    options = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": weight_decay}
    mine, reference = AdamW(ours, **options), torch.optim.AdamW(theirs, **options, fused=True)
    for step in range(12):
        give(ours, theirs, step)
        mine.step()
        reference.step()
        assert same(ours, theirs), step


def test_equals_unfused_torch_up_to_rounding():
    """torch's other kernels round in another order; in float64 nothing of that is left here."""
    ours, theirs = twins(torch.float32)
    mine, reference = AdamW(ours, weight_decay=0.1), torch.optim.AdamW(theirs, weight_decay=0.1, foreach=False)
    for step in range(12):
        give(ours, theirs, step)
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_groups_rates_and_missing_gradients_follow_torch():
    ours, theirs = twins(torch.float32)

    def groups(params):
        return [
            {"params": params[:2], "weight_decay": 0.3},
            {"params": params[2:4], "lr": 1e-2, "betas": (0.5, 0.6)},
            {"params": params[4:], "eps": 1e-3},
        ]

    mine, reference = (
        AdamW(groups(ours), lr=2e-3),
        torch.optim.AdamW(groups(theirs), lr=2e-3, weight_decay=0.0, fused=True),
    )
    for step in range(15):
        give(ours, theirs, step, without={step % 6, (step + 2) % 6} if step % 3 else {0, 1, 2, 3, 4, 5})
        if step == 7:
            for optimizer in (mine, reference):
                optimizer.param_groups[0]["lr"] = 0.5
                optimizer.param_groups[2]["weight_decay"] = 0.2
                optimizer.param_groups[1]["betas"] = (0.7, 0.9)
        mine.step()
        reference.step()
        assert same(ours, theirs), step


def test_state_is_torchs_own():
    """The states are interchangeable, so that a run may move from one to the other."""
    ours, theirs = twins(torch.float32)
    mine, reference = AdamW(ours), torch.optim.AdamW(theirs, weight_decay=0.0, fused=True)
    for step in range(3):
        give(ours, theirs, step)
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert list(mine.state[a]) == list(reference.state[b])
        for key, value in reference.state[b].items():
            assert torch.equal(mine.state[a][key], value)
            assert mine.state[a][key].dtype == value.dtype
    fresh = torch.optim.AdamW(ours, weight_decay=0.0, fused=True)
    fresh.load_state_dict({**reference.state_dict(), "state": mine.state_dict()["state"]})
    for step in range(3, 6):
        give(ours, theirs, step)
        fresh.step()
        reference.step()
    assert same(ours, theirs)


LAYOUTS = {
    "channels last": (lambda: torch.randn(6, 3, 2, 2).contiguous(memory_format=torch.channels_last), None),
    "channels last, plain gradient": (
        lambda: torch.randn(6, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(6, 3, 2, 2),
    ),
    "transposed": (lambda: torch.randn(6, 4).mT, lambda: torch.randn(4, 6)),
    "slice": (lambda: torch.randn(6, 8)[:, :3], lambda: torch.randn(6, 3)),
    "expanded gradient": (lambda: torch.randn(6, 3), lambda: torch.randn(6, 1).expand(6, 3)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_layouts_that_fused_kernels_misread(name):
    """torch's fused kernels compare no strides: a slice, a transpose or an expanded gradient was stepped wrongly, and
    memory beside a slice was overwritten, without a word (`torch.optim.AdamW(fused=True)` still does on a CPU)."""
    make_weight, make_grad = LAYOUTS[name]
    results = []
    for optimizer in (AdamW, lambda params, **options: torch.optim.AdamW(params, foreach=False, **options)):
        torch.manual_seed(0)
        start = make_weight()
        base = start._base if start._base is not None else start
        beside = base.clone()
        weight = nn.Parameter(start)
        stepper = optimizer([weight], lr=0.1, weight_decay=0.1)
        for _ in range(4):
            weight.grad = (make_grad or make_weight)()
            stepper.step()
        results.append(weight.detach().clone())
        if name == "slice":
            assert torch.equal(base[:, 3:], beside[:, 3:])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
