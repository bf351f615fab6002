"""State leaves and comes back: plain, distributed, into a fresh process, and never halfway."""

import copy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import CONFIGS, copies, equal, give, make, projects, run, small, snapshot, unchanged, weights
from laws import seeded
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from thinrank.optim import AdamW, DCTAdamW, build
from thinrank.optim.linalg.quantise import expand8

pytestmark = pytest.mark.filterwarnings("ignore:rank 3 is above the 1 directions")
every = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

RESUME = """
import sys, warnings
import torch
sys.path.insert(0, sys.argv[1])
from cases import CONFIGS, make, run, weights

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="rank 3 is above")
saved = torch.load(sys.argv[2], weights_only=True)
ends = {}
for name, config in CONFIGS.items():
    params = weights()
    with torch.no_grad():
        for p, value in zip(params, saved[name]["weights"], strict=True):
            p.copy_(value)
    optimizer = make(config, params)
    optimizer.load_state_dict(saved[name]["optimizer"])
    run(optimizer, params, 5, 11)
    ends[name] = [p.detach() for p in params]
torch.save(ends, sys.argv[3])
"""


def test_every_method_resumes_to_the_bit_in_a_fresh_process(tmp_path):
    """In the middle between two renewals, so that basis, moments, error and counts all matter; one process for all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the child: sums in another order would not be equal to the bit
    try:
        saved, ends = {}, {}
        for name, config in CONFIGS.items():
            params = weights()
            optimizer = make(config, params)
            run(optimizer, params, 0, 5)
            saved[name] = {"weights": [p.detach().clone() for p in params]}
            saved[name]["optimizer"] = copy.deepcopy(optimizer.state_dict())
            run(optimizer, params, 5, 11)
            ends[name] = params
    finally:
        torch.set_num_threads(threads)
    torch.save(saved, tmp_path / "saved.pt")
    arguments = [str(Path(__file__).parent), str(tmp_path / "saved.pt"), str(tmp_path / "ends.pt")]
    done = subprocess.run(
        [sys.executable, "-c", RESUME, *arguments], check=False, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    for name, found in torch.load(tmp_path / "ends.pt", weights_only=True).items():
        assert equal(ends[name], found), name


FIRST = ("exp_avg", "exp_avg_codes", "momentum", "momentum_codes")
"""Keys of a first moment, of which a parameter has one."""


@every
def test_state_exists_whole_from_construction_on(config):
    """The same keys, shapes and dtypes before the first step as after many."""

    def layout(optimizer, params):
        return [{k: (tuple(v.shape), v.dtype) for k, v in optimizer.state[p].items()} for p in params]

    params = weights()
    optimizer = make(config, params)
    before = layout(optimizer, params)
    run(optimizer, params, 0, 5)
    assert layout(optimizer, params) == before
    assert all("step" in each and set(FIRST) & each.keys() for each in before)


class Net(nn.Module):
    """A few matrices of two sizes, a vector, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 8)
        self.layers = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Linear(8, 12))
        self.norm = nn.LayerNorm(12)

    def forward(self, x):
        return self.norm(self.layers(self.table(x)))


def train(model, optimizer, first, stop):
    for step in range(first, stop):
        optimizer.zero_grad()
        tokens = torch.randint(11, (16,), generator=torch.Generator().manual_seed(step))
        model(tokens).square().sum(-1).log().mean().add(model(tokens)[:, 0].mean()).backward()
        optimizer.step()


# one process on purpose; torch says so
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@every
def test_distributed_checkpoint_round_trip(config, flat, tmp_path):
    """torch's own functions, without a process group: by name, optionally flattened, through files."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = Net()
    optimizer = build(model, config)
    train(model, optimizer, 0, 4)
    saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(saved, checkpoint_id=tmp_path / "checkpoint", no_dist=True)

    other = Net()
    fresh = build(other, config)
    found = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, fresh, options=options)}
    dcp.load(found, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    other.load_state_dict(found["model"])
    set_optimizer_state_dict(other, fresh, found["optimizer"], options=options)
    train(model, optimizer, 4, 8)
    train(other, fresh, 4, 8)
    assert equal(list(model.parameters()), list(other.parameters()))


@every
def test_loading_is_by_copy_and_by_keyword(config):
    params = weights()
    optimizer = make(config, params)
    run(optimizer, params, 0, 4)
    saved = optimizer.state_dict()
    others = copies(params)
    twin = make(config, others, lr=0.9)
    twin.load_state_dict(state_dict=saved)
    assert twin.param_groups[0]["lr"] == config.lr
    run(optimizer, params, 4, 8)
    run(twin, others, 4, 8)
    assert equal(params, others)


REFUSED = {
    "another method": (small("galore"), small("dct_adamw")),
    "dense instead of low-rank": (small("adamw"), small("galore")),
    "low-rank instead of dense": (small("galore"), small("adamw")),
    "another rank": (small("galore", rank=2), small("galore")),
    "another feedback": (small("dct_adamw"), small("dct_adamw", error_feedback="full")),
    "another side": (small("galore", proj_type="reverse_std"), small("galore")),
}


@pytest.mark.parametrize(("theirs", "ours"), REFUSED.values(), ids=REFUSED)
def test_a_state_of_another_kind_is_refused_and_nothing_changes(theirs, ours):
    shapes = [(8, 5), (6, 9), (4,)]
    saved_params = [nn.Parameter(seeded(*shape)) for shape in shapes]
    other = make(theirs, saved_params)
    run(other, saved_params, 0, 3)
    params = [nn.Parameter(seeded(*shape)) for shape in shapes]
    optimizer = make(ours, params, weight_decay=0.123)
    run(optimizer, params, 0, 2)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match="build the optimizer with the configuration that it was saved with") as caught:
        optimizer.load_state_dict(other.state_dict())
    assert "\n" not in str(caught.value)
    assert unchanged(before, optimizer, params)
    assert optimizer.param_groups[0]["weight_decay"] == 0.123


def test_other_groups_and_other_shapes_are_refused():
    params = [nn.Parameter(seeded(8, 5)), nn.Parameter(seeded(6, 9))]
    optimizer = DCTAdamW(params, rank=2)
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="has other parameter groups than DCTAdamW here"):
        DCTAdamW([{"params": params[:1]}, {"params": params[1:]}], rank=2).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"state of 0\.1 is"):
        DCTAdamW([nn.Parameter(seeded(8, 5)), nn.Parameter(seeded(6, 8))], rank=2).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"state of 0\.0 is \{\}"):
        DCTAdamW(params, rank=2).load_state_dict({**saved, "state": {}})


def test_adamw_takes_torchs_state():
    ours, theirs = [nn.Parameter(seeded(5, 4))], [nn.Parameter(seeded(5, 4))]
    reference = torch.optim.AdamW(theirs, fused=True)
    for step in range(3):
        theirs[0].grad = seeded(5, 4, seed=step + 1)
        reference.step()
    optimizer = AdamW(ours)
    optimizer.load_state_dict(reference.state_dict())
    with torch.no_grad():
        ours[0].copy_(theirs[0])
    for step in range(3, 6):
        give(ours, step)
        give(theirs, step)
        optimizer.step()
        reference.step()
    assert equal(ours, theirs)


# --- others who hold the state ----------------------------------------------------------------------------------------


def new_dictionaries(optimizer):
    for p, state in optimizer.state.items():
        optimizer.state[p] = {key: value.clone() for key, value in state.items()}


def new_tensors(optimizer):
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone()


def new_step_counts(optimizer):
    for state in optimizer.state.values():
        state["step"] = state["step"].clone()


@pytest.mark.parametrize("replace", [new_dictionaries, new_tensors, new_step_counts])
@every
def test_state_replaced_from_outside_is_the_state(config, replace):
    """Frameworks that move states put new tensors in place of ours; a stack of the old ones would go on alone."""
    params, others = weights(), weights()
    optimizer, twin = make(config, params), make(config, others)
    for first in (0, 3, 5):
        run(optimizer, params, first, first + 2)
        run(twin, others, first, first + 2)
        replace(optimizer)
    assert equal(params, others)
    for p, q in zip(params, others, strict=True):
        assert all(torch.equal(value, twin.state[q][key]) for key, value in optimizer.state[p].items())


def first_moment(state):
    """The first moment, and which of two kinds it is: a mean of gradients or what Muon and its kin call momentum."""
    key = next(key for key in FIRST if key in state)
    name = key.removesuffix("_codes")
    return (state[key] if key == name else expand8(state[key], state[f"{name}_scale"])), name


@every
def test_what_is_written_into_the_state_counts(config):
    """State tensors are live, also while they are stacked: zeroing the moments is a way to restart."""
    params = weights()
    optimizer = make(config, params)
    run(optimizer, params, 0, 2)
    for state in optimizer.state.values():
        next(state[key] for key in FIRST if key in state).zero_()
    run(optimizer, params, 2, 3)
    others = weights()
    mean = 0.0 if projects(config) else config.group().get("momentum", 0.0)  # Dion's and Trion's momentum is a sum
    decay = {"exp_avg": config.betas[0], "momentum": mean}
    free: dict[str, Any] = {"betas": (0.0, config.betas[1])} | ({"momentum": 0.0} if mean else {})
    without = make(config, others, **free)  # whose first moment is what entered it last
    run(without, others, 0, 3)
    for p, q in zip(params, others, strict=True):
        grad, (m, key), (free_m, _) = p.grad, first_moment(optimizer.state[p]), first_moment(without.state[q])
        assert grad is not None
        entered = max(float(grad.norm()), float(free_m.norm()))
        # an error enters with the gradient; a code of 8 bits is up to twice a small number
        coded = f"{key}_codes" in optimizer.state[p]
        room = 3.0 if any("error" in key for key in optimizer.state[p]) else 1.2 if coded else 1.01
        assert float(m.norm()) <= (1 - decay[key]) * entered * room


def test_lightnings_move_to_a_device_is_survived():
    to_device = pytest.importorskip("lightning.fabric.utilities.optimizer")._optimizer_to_device
    params, others = weights(), weights()
    optimizer, twin = DCTAdamW(params, rank=1), DCTAdamW(others, rank=1)
    for first in (0, 2, 4):
        run(optimizer, params, first, first + 2)
        run(twin, others, first, first + 2)
        to_device(optimizer, torch.device("cpu"))
    assert equal(params, others)
    assert all(isinstance(state, Mapping) for state in optimizer.state.values())
