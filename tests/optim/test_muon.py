"""Muon against torch's, against its equations in float64, on several ranks, and in a subspace."""

import pytest
import torch
import torch.distributed as dist
from cases import moved
from laws import decaying, seeded
from reference.muon import muon
from torch import nn

from thinrank.optim import Muon, MuonConfig, build
from thinrank.optim.axis import WHOLE, Axis
from thinrank.optim.inner.auon import AuON
from thinrank.optim.inner.base import Whole
from thinrank.optim.inner.polar import Polar
from thinrank.optim.linalg.orthogonal import POLAR_EXPRESS, SETS, SHAPE_SCALES, YOU
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.lowrank.subspace import FixedColumns, PowerIteration
from thinrank.optim.rule import Step

STEPS = 12
SHAPES = {"tall": (14, 9), "very tall": (30, 7), "wide": (8, 15), "square": (10, 10)}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
LOOK = pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])


def train(cls, start, grads, **options):
    """The weights after every step on `grads`."""
    weight = nn.Parameter(start.clone())
    optimizer = cls([weight], **options)
    path = []
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
        path.append(weight.detach().clone())
    return path


def both(shape, nesterov, adjust, dtype, **options):
    start, grads = seeded(*shape), [seeded(*shape, seed=i + 1) for i in range(STEPS)]
    common = {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.9, "nesterov": nesterov, **options}
    theirs = train(torch.optim.Muon, start, grads, adjust_lr_fn=adjust, **common)
    return start, train(Muon, start, grads, adjust_lr=adjust, ns_dtype=dtype, **common), theirs


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@LOOK
@each_shape
def test_is_torchs_muon_step_by_step(shape, nesterov, adjust, monkeypatch):
    """With torch's products, which are bfloat16 and nothing else, made float32: equal up to that."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # a copy, for torch goes on in place
    start, own, theirs = both(shape, nesterov, adjust, "float32")
    for a, b in zip(own, theirs, strict=True):
        assert moved(a, b) <= 1e-4 * moved(start, b)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@LOOK
@each_shape
def test_is_torchs_muon_in_bfloat16(shape, nesterov, adjust):
    """As torch ships it: eight bits, rounded in other places, through five iterations that do not converge."""
    start, own, theirs = both(shape, nesterov, adjust, "bfloat16")
    for a, b in zip(own, theirs, strict=True):
        assert moved(a, b) <= 0.03 * moved(start, b)


@pytest.mark.parametrize("adjust", SHAPE_SCALES)
@LOOK
@each_shape
def test_equals_the_equations_in_float64(shape, nesterov, adjust):
    start, grads = seeded(*shape), [seeded(*shape, seed=i + 1) for i in range(STEPS)]
    options = {"lr": 0.02, "nesterov": nesterov, "adjust_lr": adjust, "weight_decay": 0.3}
    own = train(Muon, start, grads, **options)
    assert moved(own[-1], muon(start, grads, triples=SETS["jordan"].triples, **options)) <= 1e-4 * moved(start, own[-1])


@pytest.mark.parametrize("name", SETS)
def test_every_orthogonalizer_equals_the_equations(name):
    start, grads = seeded(14, 9), [seeded(14, 9, seed=i + 1) for i in range(STEPS)]
    own = train(Muon, start, grads, orthogonalizer=name)
    few = SETS[name]
    expected = muon(start, grads, lr=0.02, triples=few.triples, safety=few.safety)
    assert moved(own[-1], expected) <= 1e-4 * moved(start, expected)


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (24, 5)], ids=["convolution", "four blocks"])
def test_a_scale_is_that_of_the_matrix_as_it_is_seen(shape):
    """A convolution is (out, in·kh·kw); a fused weight of 24 rows in four blocks is four matrices of six."""
    start, grads = seeded(*shape), [seeded(*shape, seed=i + 1) for i in range(3)]
    blocks = 4 if len(shape) == 2 else 1
    weight = nn.Parameter(start.clone())
    optimizer = Muon([{"params": [weight], "blocks": blocks}], adjust_lr="spectral")
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    cut = [x.flatten(1).chunk(blocks) for x in (start, *grads)]
    expected = torch.cat(
        [
            muon(first, rest, lr=0.02, triples=SETS["jordan"].triples, adjust_lr="spectral")
            for first, *rest in zip(*cut, strict=True)
        ]
    )
    assert moved(weight.flatten(1), expected) <= 1e-4 * moved(start.flatten(1), expected)


def test_the_gradients_size_does_not_matter():
    """torch's shrinks below a norm of 1e-7: with a loss scaled down, or a layer of small gradients, it stands still."""
    start, grads = seeded(14, 9), [seeded(14, 9, seed=i + 1) for i in range(3)]
    paths = [train(Muon, start, [size * g for g in grads])[-1] for size in (1.0, 1e-12, 1e12)]
    for path in paths[1:]:
        assert moved(path, paths[0]) <= 1e-4 * moved(start, paths[0])


def test_everything_else_is_adamw():
    parts = {"table": nn.Embedding(12, 8), "layer": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "head": nn.Linear(8, 12)}
    model = nn.ModuleDict(parts)
    optimizer = build(model, MuonConfig())
    stepped = {
        (group["role"], group["lr"], "momentum" in optimizer.state[p])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert stepped == {
        ("embedding", 3e-3, False), ("vector", 3e-3, False), ("head", 3e-3, False), ("matrix", 0.02, True),
    }  # fmt: skip
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


# --- in a subspace ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subspace", [FixedColumns(rank=3), PowerIteration(rank=3, every=2)], ids=["columns", "power"])
def test_in_a_subspace_the_update_is_orthonormal_of_its_rank(subspace):
    rule = LowRank(subspace=subspace, inner=Polar(coefficients=POLAR_EXPRESS))
    state = rule.init((2, 14, 9), torch.device("cpu"))
    assert state["momentum"].shape == (2, 14, 3)
    for t in range(4):
        grad = torch.stack([decaying(14, 9, seed=2 * t), decaying(14, 9, seed=2 * t + 1)])
        update = rule.update(grad, state, Step(count=[t, t], keys=[5, 6])).materialise()
        values = torch.linalg.svdvals(update)
        assert 0.84 < float(values[:, :3].min()) <= float(values[:, :3].max()) < 1.15
        assert float(values[:, 3:].max()) < 1e-5


# --- several ranks ----------------------------------------------------------------------------------------------------

LONG, SHORT = 11, 8
SPLITS = {"uneven": (7, 4), "narrower than it is wide": (9, 2), "empty": (11, 0)}
RULES = {
    "muon": Whole(inner=Polar(shape="original")),
    "muon, match": Whole(inner=Polar(shape="match_rms_adamw", nesterov=False, coefficients=YOU)),
    "muon, spectral": Whole(inner=Polar(shape="spectral", coefficients=POLAR_EXPRESS)),
    "muon, columns": LowRank(subspace=FixedColumns(rank=3), inner=Polar()),
    "auon": Whole(inner=AuON()),
    "auon, code": Whole(inner=AuON(normalise=False, momentum=0.5)),
    "auon, hybrid": Whole(inner=AuON(steps=1)),
}


def gradients(data=0):
    return [torch.stack([seeded(LONG, SHORT, seed=1000 * data + 10 * t + b) for b in range(2)]) for t in range(4)]


def updates(rule, grads, state, axis=WHOLE, transposed=False):
    found = []
    for count, grad in enumerate(grads):
        step = Step(count=[count, count], keys=[5, 6], seed=3, axis=axis, transposed=transposed)
        found.append(rule.update(grad, state, step).materialise())
    return torch.stack(found)


def sharded(name, split, transposed):
    rank = dist.get_rank()
    mine = slice(sum(split[:rank]), sum(split[: rank + 1]))
    state = RULES[name].init((2, LONG, SHORT), torch.device("cpu"))
    state = {key: value[:, mine] if value.shape[1] == LONG else value for key, value in state.items()}
    return updates(
        RULES[name], [g[:, mine] for g in gradients()], state, Axis(rows=dist.group.WORLD), transposed=transposed
    )


@pytest.mark.parametrize("transposed", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("name", RULES)
def test_sharded_rows_equal_the_whole_matrix(ranks, name, split, transposed):
    """Norms, Gram matrices and the shape's scale are those of the whole matrix, though nobody has it."""
    state = RULES[name].init((2, LONG, SHORT), torch.device("cpu"))
    expected = updates(RULES[name], gradients(), state, transposed=transposed)
    together = torch.cat(ranks(2).run(sharded, name, split, transposed), -2)
    torch.testing.assert_close(together, expected, rtol=1e-3, atol=1e-4)
