"""Gradients taken inside of backward give the steps that gradients kept until `step` give, and do not pile up."""

import pytest
import torch
from cases import CONFIGS, LOW_RANK, copies, equal, small
from laws import seeded
from torch import nn

from thinrank.optim import build
from thinrank.optim.lowrank.rule import LowRank

every = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def linear(config):
    rule = config.matrix_rule()
    return isinstance(rule, LowRank) and rule.linear


LINEAR = {name: config for name, config in LOW_RANK.items() if linear(config)}
NEEDS_ALL = {name: config for name, config in LOW_RANK.items() if not linear(config)}


class Net(nn.Module):
    """Four equal matrices, a wide one, a convolution, an embedding with a tied head, biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.up = nn.Linear(8, 20)
        self.down = nn.Linear(20, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, tokens):
        x = self.table(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        x = x + self.down(torch.tanh(self.up(x)))
        x = x + self.conv(x.mT).mT
        return x @ self.table.weight.T


def loss(model, number, rows=slice(None)):
    tokens = torch.randint(11, (6, 5), generator=torch.Generator().manual_seed(number))[rows]
    logits = model(tokens)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def trained(config, mode, steps=7, micro=1, **options):
    model = Net()
    optimizer = build(model, config)
    optimizer.in_backward(mode, **options)
    for number in range(steps):
        optimizer.zero_grad()
        for part in range(micro):
            optimizer.accumulating = part < micro - 1
            (loss(model, number, slice(part, None, micro)) / micro).backward()
        optimizer.step()
    return list(model.parameters()), optimizer


def close(found, expected, config=None):
    """The same but for rounding, since matrices are stepped one by one instead of in batches; where an error is kept in
    codes, that may move an entry to the next code, hundreds of times farther.
    """
    atol = 2e-5
    if config is not None and str(getattr(config, "error_feedback", "off")).endswith("bit"):
        atol = 1e-2 * config.lr
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=atol)


@pytest.mark.parametrize("config", LINEAR.values(), ids=LINEAR)
def test_projecting_in_backward_is_the_same_step(config):
    close(trained(config, "project")[0], trained(config, "off")[0], config)


@every
def test_stepping_in_backward_is_the_same_step(config):
    found, optimizer = trained(config, "step")
    close(found, trained(config, "off")[0], config)
    assert {float(optimizer.state[p]["step"]) for p in found} == {7.0}


def test_accumulation_adds_up_in_the_subspace():
    """Exactly, between renewals: projection is linear. (A renewal sees the first part alone.)"""
    config = small("galore", update_proj_gap=100, svd="power")
    ends = []
    for mode in ("off", "project"):
        model = Net()
        optimizer = build(model, config)
        loss(model, 0).backward()
        optimizer.step()  # the first renewal, from one whole gradient
        optimizer.in_backward(mode)
        for number in range(1, 6):
            optimizer.zero_grad()
            for part in range(3):
                (loss(model, number, slice(part, None, 3)) / 3).backward()
            optimizer.step()
        ends.append(list(model.parameters()))
    close(*ends)


def test_accumulation_and_stepping_wait_for_the_last_part():
    config = small("subspace_adamw")
    close(trained(config, "step", micro=3)[0], trained(config, "off", micro=3)[0])


@pytest.mark.parametrize(("mode", "most"), [("off", 20), ("project", 1), ("step", 1)])
def test_gradients_of_matrices_do_not_pile_up(mode, most):
    model = Net()
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and "table" not in name]
    optimizer = build(model, small("galore"))
    optimizer.in_backward(mode)
    alive = []
    for p in model.parameters():
        p.register_hook(lambda _: alive.append(sum(q.grad is not None for q in matrices)))
    for number in range(2):
        loss(model, number).backward()
    assert len(alive) == 2 * len(list(model.parameters()))
    assert max(alive) <= most
    assert mode != "off" or max(alive) == len(matrices)
    assert (model.table.weight.grad is None) == (mode == "step")


def test_clipping_at_full_rank_is_torchs():
    """There the coordinates have the gradient's norm, so both clip alike."""
    config = small("galore", rank=1.0, svd="power", update_proj_gap=100)
    ends = []
    for mode in ("off", "project"):
        model = Net()
        optimizer = build(model, config)
        optimizer.in_backward(mode)
        norms = []
        for number in range(4):
            optimizer.zero_grad()
            loss(model, number).backward()
            if mode == "off":
                norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
            else:
                norms.append(float(optimizer.clip_grad_norm_(0.05)))
            optimizer.step()
        ends.append((list(model.parameters()), norms))
    close(ends[0][0], ends[1][0])
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-4)
    assert min(ends[0][1]) > 0.05


def test_clipping_scales_coordinates_and_gradients_together():
    model = Net()
    optimizer = build(model, small("galore"))
    optimizer.in_backward("project")
    loss(model, 0).backward()
    before = optimizer.clip_grad_norm_(1e-3)
    assert float(before) > 1e-3
    assert float(optimizer.gradient_norm()) == pytest.approx(1e-3, rel=2e-3)


def test_clipping_in_step_is_by_parameter():
    """Against the norm of each gradient by itself, before it enters the moments."""
    config = small("adamw", betas=(0.0, 0.9), eps=1e3, weight_decay=0.0, lr=1.0)  # nearly plain descent
    before = copies(list(Net().parameters()))
    moved, _ = trained(config, "step", steps=1, max_norm=1e-3)
    free, _ = trained(config, "step", steps=1)
    for start, clipped, whole in zip(before, moved, free, strict=True):
        length = float((whole - start).detach().norm()) * 1e3
        assert float((clipped - start).detach().norm()) * 1e3 == pytest.approx(min(length, 1e-3), rel=2e-2, abs=2e-5)


def test_zero_grad_forgets_what_was_kept():
    model = Net()
    optimizer = build(model, small("galore"))
    optimizer.in_backward("project")
    loss(model, 0).backward()
    optimizer.zero_grad()
    before = copies(list(model.parameters()))
    optimizer.step()
    assert equal(before, list(model.parameters()))


def test_off_again_and_through_a_checkpoint():
    """Loading a state keeps the mode; `off` removes every hook."""
    model = Net()
    optimizer = build(model, small("galore"))
    optimizer.in_backward("project")
    optimizer.load_state_dict(optimizer.state_dict())
    loss(model, 0).backward()
    assert model.up.weight.grad is None
    optimizer.in_backward("off")
    loss(model, 0).backward()
    assert model.up.weight.grad is not None


def test_a_closure_and_a_gradient_given_by_hand():
    model, twin = Net(), Net()
    config = small("galore")
    optimizer, plain = build(model, config), build(twin, config)
    optimizer.in_backward("project")

    def closure():
        optimizer.zero_grad()
        value = loss(model, 3)
        value.backward()
        model.up.weight.grad = seeded(20, 8)  # instead of what backward found, which has become an image
        return value

    optimizer.step(closure)
    loss(twin, 3).backward()
    assert twin.up.weight.grad is not None
    twin.up.weight.grad += seeded(20, 8)
    plain.step()
    # the renewal of that weight saw the first part of its gradient; everything else is equal
    others = [n for n, _ in model.named_parameters() if n != "up.weight"]
    close([model.get_parameter(n) for n in others], [twin.get_parameter(n) for n in others])
    assert not torch.equal(model.up.weight, Net().up.weight)


@pytest.mark.parametrize("config", NEEDS_ALL.values(), ids=NEEDS_ALL)
def test_methods_that_need_whole_gradients_say_so(config):
    optimizer = build(Net(), config)
    with pytest.raises(ValueError, match=r"needs whole gradients, with the settings of group .*: use mode 'step'"):
        optimizer.in_backward("project")


def test_bad_modes():
    optimizer = build(Net(), small("galore"))
    with pytest.raises(ValueError, match="mode must be one of off, project, step, got 'steps'"):
        optimizer.in_backward("steps")
    with pytest.raises(ValueError, match="max_norm=1 is for mode 'step', got 'project'"):
        optimizer.in_backward("project", max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm must be a number above 0"):
        optimizer.in_backward("step", max_norm=0.0)


def test_a_gradient_that_is_not_finite_is_dropped_where_nobody_could_undo_its_step():
    model = Net()
    optimizer = build(model, small("galore"))
    optimizer.in_backward("step")
    model.up.weight.register_hook(lambda grad: grad * float("nan"))
    before = model.up.weight.detach().clone()
    loss(model, 0).backward()
    assert torch.equal(model.up.weight, before)
    assert float(optimizer.state[model.up.weight]["step"]) == 0
    assert float(optimizer.state[model.down.weight]["step"]) == 1
    assert optimizer.dropped_gradients == 1
