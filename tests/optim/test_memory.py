"""Bytes of state: predicted on the meta device, measured, and by a formula written down here, all three equal."""

import gc

import pytest
import torch
from cases import CONFIGS, copies, make, run, small
from laws import seeded
from torch import nn

from thinrank.optim import METHODS, build, route
from thinrank.optim.linalg import fixed
from thinrank.optim.lowrank import subspace

LONG, SHORT, R = 24, 10, 3
BLOCK = 256  # of the 8-bit error's scales, along the rows

FORMULAS = {
    # two moments and torch's step count (a float32 scalar)
    "adamw": 4 * (2 * LONG * SHORT) + 4,
    # moments of (long, r) and a basis of (short, r)
    "galore": 4 * (2 * LONG * R + SHORT * R) + 4,
    "galore/power": 4 * (2 * LONG * R + SHORT * R) + 4,
    # r × r moments and a basis for each side
    "galore/full": 4 * (2 * R * R + SHORT * R + LONG * R) + 4,
    # a basis in the type of its products
    "galore/bfloat16": 4 * (2 * LONG * R) + 2 * SHORT * R + 4,
    # the other side is kept: moments of (short, r), a basis of (long, r)
    "galore/reverse": 4 * (2 * SHORT * R + LONG * R) + 4,
    # r int32 columns and r float32 ages in the place of a basis
    "dct_adamw": 4 * (2 * LONG * R + R + R) + 4,
    "dct_adamw/bfloat16": 4 * (2 * LONG * R + R + R) + 4,
    "dct_adamw/hadamard": 4 * (2 * LONG * R + R + R) + 4,
    "dct_adamw/identity": 4 * (2 * LONG * R + R + R) + 4,
    "dct_adamw/fft": 4 * (2 * LONG * R + R) + 4,
    "dct_adamw/feedback": 4 * (2 * LONG * R + R + R + LONG * SHORT) + 4,
    "dct_adamw/residual": 4 * (2 * LONG * R + R + R + 1) + 4,
    "dct_adamw/sign": 4 * (2 * LONG * R + R + R + 1) + 4,
    # a byte an entry and a float32 scale for every 256 entries of a row
    "dct_adamw/8bit": 4 * (2 * LONG * R + R + R) + LONG * SHORT + 4 * LONG * -(-SHORT // BLOCK) + 4,
    # basis, moments and error, like a dense Adam once the rank is high
    "ldadam": 4 * (2 * LONG * R + SHORT * R + LONG * SHORT) + 4,
    "ldadam/bfloat16": 4 * (2 * LONG * R + SHORT * R + LONG * SHORT) + 4,
    "ldadam/8bit": 4 * (2 * LONG * R + SHORT * R) + LONG * SHORT + 4 * LONG * -(-SHORT // BLOCK) + 4,
    "ldadam/4bit": 4 * (2 * LONG * R + SHORT * R) + LONG * -(-SHORT // 2) + 4 * LONG * -(-SHORT // 64) + 4,
    "ldadam/off": 4 * (2 * LONG * R + SHORT * R) + 4,
    # one moment (or Adam's two), a basis, and a window of projections with their norms
    "mfac": 4 * (LONG * R + SHORT * R + 32 * (LONG * R + 1)) + 4,
    "mfac/adam": 4 * (2 * LONG * R + SHORT * R + 4 * (LONG * R + 1)) + 4,
    "mfac/whole": 4 * (LONG * SHORT + 4 * (LONG * SHORT + 1)) + 4,
    # half a byte an entry and a float32 scale for every 64 entries of a row
    "dct_adamw/4bit": 4 * (2 * LONG * R + R + R) + LONG * -(-SHORT // 2) + 4 * LONG * -(-SHORT // 64) + 4,
    # a full momentum, and r columns of (short,) or r integers
    "dion": 4 * (LONG * SHORT + SHORT * R) + 4,
    "dion/qr": 4 * (LONG * SHORT + SHORT * R) + 4,
    "dion/orth": 4 * (LONG * SHORT + SHORT * R) + 4,
    "dion/bfloat16": 4 * (LONG * SHORT + SHORT * R) + 4,
    "trion": 4 * (LONG * SHORT + R) + 4,
    "trion/random": 4 * (LONG * SHORT + R) + 4,
    "trion/bfloat16": 4 * (LONG * SHORT + R) + 4,
    "dion2": 4 * (LONG * SHORT + R) + 4,
    # the residual's last norm
    "subspace_adamw": 4 * (2 * LONG * R + SHORT * R + 1) + 4,
    "subspace_adamw/bfloat16": 4 * (2 * LONG * R + 1) + 2 * SHORT * R + 4,
    "subspace_adamw/stagger": 4 * (2 * LONG * R + SHORT * R + 1) + 4,
    # a matrix's own gap, and when it last renewed
    "subspace_adamw/lazy": 4 * (2 * LONG * R + SHORT * R + 1 + 2) + 4,
    "subspace_adamw/sign": 4 * (2 * LONG * R + SHORT * R + 1) + 4,
    # GaLore's state and the residual's last norm
    "fira": 4 * (2 * LONG * R + SHORT * R + 1) + 4,
    "fira/power": 4 * (2 * LONG * R + SHORT * R + 1) + 4,
    # no basis: it comes from a seed. The update's last norm, except without a limiter
    "apollo": 4 * (2 * LONG * R + 1) + 4,
    "apollo_mini": 4 * (2 * LONG * R + 1) + 4,
    "apollo_mini/one": 4 * (2 * LONG) + 4,
    "apollo/svd": 4 * (2 * LONG * R + SHORT * R + 1) + 4,
    # as GaLore, and for each of the entries (rounded up) an int32 place and two moments
    "galore_plus": 4 * (2 * LONG * R + SHORT * R + 3 * 3) + 4,
    "galore_plus/dense": 4 * (2 * LONG * R + SHORT * R + 3 * LONG * SHORT) + 4,
    "galore_plus/warmup": 4 * (2 * LONG * R + SHORT * R + 3 * 48) + 4,
    # an age an entry and one a column
    "galore_plus/reselect": 4 * (2 * LONG * R + SHORT * R + R + 4 * 48) + 4,
    "galore_plus/lazy": 4 * (2 * LONG * R + SHORT * R + 4 * 48 + 2) + 4,
    "galore_plus/no_entries": 4 * (2 * LONG * R + SHORT * R) + 4,
    # two codes an entry and two float32 scales for every 256 entries of a row
    "galore/8bit": 2 * (LONG * R + 4 * LONG * -(-R // BLOCK)) + 4 * SHORT * R + 4,
    "dct_adamw/8bit moments": 2 * (LONG * R + 4 * LONG * -(-R // BLOCK)) + 4 * (R + R) + 4,
    "subspace_adamw/8bit": 2 * (LONG * R + 4 * LONG * -(-R // BLOCK)) + 4 * (SHORT * R + 1) + 4,
    # less than 4096 entries keep float32
    "adamw/8bit": 4 * (2 * LONG * SHORT) + 4,
    # float32 weights have no master and nothing to round
    "adamw/master": 4 * (2 * LONG * SHORT) + 4,
    "galore/stochastic": 4 * (2 * LONG * R + SHORT * R) + 4,
    "subspace_adamw/master": 2 * (LONG * R + 4 * LONG * -(-R // BLOCK)) + 4 * (SHORT * R + 1) + 4,
    "subspace_adamw/off": 4 * (2 * LONG * R + SHORT * R) + 4,
    # one moment of the matrix
    **dict.fromkeys(("muon", "muon/you", "muon/polar_express", "muon/bfloat16"), 4 * LONG * SHORT + 4),
    # a code an entry and a float32 scale for every 256 entries of a row
    **dict.fromkeys(("muon/8bit", "muon/8bit mean", "auon/8bit"), LONG * SHORT + 4 * LONG * -(-SHORT // BLOCK) + 4),
    # codes are for AdamW's moments, and for Adam's in M-FAC's place of the momentum
    "dion/8bit": 4 * (LONG * SHORT + SHORT * R) + 4,
    "trion/8bit": 4 * (LONG * SHORT + R) + 4,
    "mfac/8bit": 4 * (LONG * R + SHORT * R + 32 * (LONG * R + 1)) + 4,
    "mfac/adam 8bit": 2 * (LONG * R + 4 * LONG * -(-R // BLOCK)) + 4 * (SHORT * R + 4 * (LONG * R + 1)) + 4,
    **dict.fromkeys(("auon", "auon/code", "auon/hybrid", "auon/hybrid code"), 4 * LONG * SHORT + 4),
}


class OneMatrix(nn.Module):
    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(LONG, SHORT, bias=False) if wide else nn.Linear(SHORT, LONG, bias=False)


def test_every_case_has_a_formula():
    assert set(METHODS) <= set(FORMULAS)
    assert set(FORMULAS) <= set(CONFIGS)


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("name", FORMULAS)
def test_predicted_measured_and_counted_by_hand_are_equal(name, wide):
    with torch.device("meta"):
        ghost = OneMatrix(wide)
    routing = route(ghost, CONFIGS[name])
    assert routing.state_bytes() == FORMULAS[name]
    assert [row.state_bytes for row in routing.rows] == [FORMULAS[name]]
    params = [nn.Parameter(seeded(*((SHORT, LONG) if wide else (LONG, SHORT))))]
    optimizer = make(CONFIGS[name], params)
    assert optimizer.state_bytes() == FORMULAS[name]
    run(optimizer, params, 0, 4)
    assert optimizer.state_bytes() == FORMULAS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_prediction_holds_for_a_model_in_bfloat16(name):
    """Everything that is not projected keeps torch's moments in the weights' dtype."""
    model = nn.ModuleDict({"table": nn.Embedding(30, 8), "layer": nn.Linear(8, 20), "norm": nn.LayerNorm(20)})
    model.to(torch.bfloat16)
    predicted = route(model, CONFIGS[name]).state_bytes()
    optimizer = build(model, CONFIGS[name])
    assert predicted == optimizer.state_bytes()
    if name in ("adamw", "adamw/8bit"):
        assert predicted == sum(2 * 2 * p.numel() + 4 for p in model.parameters())


TABLE = (40, 130)  # 5200 entries: enough for codes
TABLE_SCALES = -(-40 * 130 // BLOCK)
BF16_TABLE = {
    # moments of an embedding in bfloat16: torch's in bfloat16, codes, or float32 where the weight has another way
    (32, "nearest"): 2 * 2 * 5200,
    (8, "nearest"): 2 * (5200 + 4 * TABLE_SCALES),
    (32, "stochastic"): 2 * 4 * 5200,
    (8, "stochastic"): 2 * (5200 + 4 * TABLE_SCALES),
    (32, "master"): 3 * 4 * 5200,
    (8, "master"): 2 * (5200 + 4 * TABLE_SCALES) + 4 * 5200,
}


@pytest.mark.parametrize(("bits", "way"), BF16_TABLE, ids=str)
def test_bytes_of_codes_and_masters_in_bfloat16(bits, way):
    """An embedding and a matrix of rank 300, whose rows have two blocks."""
    long, short, rank = 400, 320, 300
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(*TABLE), nn.Linear(short, long, bias=False)).to(torch.bfloat16)
    config = small("galore", rank=rank, state_bits=bits, half_weights=way)
    moments = {32: 2 * 4 * long * rank, 8: 2 * (long * rank + 4 * long * 2)}[bits]
    master = 4 * long * short if way == "master" else 0
    by_name = {row.name: row.state_bytes for row in route(model, config).rows}
    assert by_name == {
        "0.weight": BF16_TABLE[bits, way] + 4,
        "1.weight": moments + master + 4 * short * rank + 4,
    }
    optimizer = build(model.to_empty(device="cpu"), config)
    assert optimizer.state_bytes() == sum(by_name.values())


def test_rows_for_which_codes_do_not_pay_keep_float32():
    """One column: a code and a scale are 5 bytes, a number 4. Two: 6 against 8."""
    for rank, expected in ((1, 2 * 4 * 20), (2, 2 * (2 * 20 + 4 * 20))):
        params = [nn.Parameter(seeded(20, 7))]
        optimizer = make(small("galore", rank=rank, state_bits=8), params)
        assert optimizer.state_bytes() == expected + 4 * 7 * rank + 4


def test_predicting_allocates_nothing_and_leaves_the_model_alone():
    """A model far larger than this machine can be routed on the meta device."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(2**17, 2**17, bias=False) for _ in range(4)))
    routing = route(model, small("galore", rank=1024))
    assert routing.elements() == 4 * 2**34
    assert routing.state_bytes() == 4 * (4 * (2 * 2**17 * 1024 + 2**17 * 1024) + 4)


@pytest.mark.parametrize("name", METHODS)
def test_no_tensor_outlives_a_step(name):
    """Everything that an optimizer keeps between steps is in `state`: what else is reachable from it is no tensor.

    Two small ones aside, of a number for each matrix, and gone once they are read: overlaps of renewals, and on a GPU
    counts of those that were skipped.
    """
    params = [nn.Parameter(seeded(64, 48, seed=i)) for i in range(2)]
    optimizer = make(small(name), copies(params))
    own = optimizer.param_groups[0]["params"]
    run(optimizer, own, 0, 3)
    for p in own:
        p.grad = None
    state = {t.untyped_storage().data_ptr() for s in optimizer.state.values() for t in s.values()}
    weights = {p.untyped_storage().data_ptr() for p in own}
    found, seen = [], set()

    def walk(value):
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.untyped_storage().data_ptr() not in state | weights:
                found.append(tuple(value.shape))
        elif isinstance(value, dict):
            for key, each in value.items():
                walk(key)
                walk(each)
        elif isinstance(value, (list, tuple, set)):
            for each in value:
                walk(each)
        elif type(value).__module__.startswith("thinrank"):
            for slot in (*getattr(value, "__slots__", ()), *getattr(value, "__dict__", {})):
                walk(getattr(value, slot))

    walk(optimizer.__dict__)
    assert found == []


REMEMBERED = (subspace._matrix, subspace._kept_gaussians, fixed._makhoul)
"""What the process keeps beside all optimizers: functions of sizes, dtypes, devices and seeds alone."""
SIDE, WIDTH = 48, 3  # the short side of the matrices below, and their rank
REMEMBERED_BYTES = {
    "dct_adamw": 4 * SIDE * SIDE,  # the DCT matrix
    "dct_adamw/bfloat16": 2 * SIDE * SIDE,
    "dct_adamw/hadamard": 4 * SIDE * SIDE,
    # the samples' order and the twiddle factors, and the atoms to go back by
    "dct_adamw/fft": 8 * SIDE + 8 * (SIDE // 2 + 1) + 4 * SIDE * SIDE,
    "dct_adamw/identity": 0,
    "trion": 4 * SIDE * SIDE,
    "dion2": 0,
    # a period's projection, and the one before it
    "apollo": 2 * 4 * SIDE * WIDTH,
    "apollo_mini": 2 * 4 * SIDE * WIDTH,
}


def forget():
    for function in REMEMBERED:
        function.cache_clear()


def alive():
    """Bytes of every tensor that is not a view of another, by where its numbers lie."""
    gc.collect()
    # not the stand-ins that torch's compiler has left behind, which have no numbers
    found = [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}


@pytest.mark.parametrize("name", [*METHODS, *(name for name in REMEMBERED_BYTES if name not in METHODS)])
def test_what_the_process_remembers_is_known_and_is_not_state(name, monkeypatch):
    """No tensor is left beside weights and state but those said here, and to forget them changes no step."""
    monkeypatch.setattr(subspace, "pays", lambda: True)  # the choice of engine is the processor's
    ends, left = [], 0
    for forgetful in (False, True):
        forget()
        before = {} if forgetful else alive()
        params = [nn.Parameter(seeded(64, SIDE, seed=i)) for i in range(2)]
        optimizer = make(CONFIGS[name], params)
        for step in range(8):
            if forgetful:
                forget()
            for i, p in enumerate(params):
                p.grad = seeded(64, SIDE, seed=10 * step + i)
            optimizer.measure = step == 7  # which reads the overlaps of renewals
            optimizer.step()
        for p in params:
            p.grad = None
        own = [*params, *(t for s in optimizer.state.values() for t in s.values())]
        known = before.keys() | {t.untyped_storage().data_ptr() for t in own}
        ends.append([t.detach().clone() for t in own])
        known |= {t.untyped_storage().data_ptr() for t in ends[-1]}
        if not forgetful:
            left = sum(size for place, size in alive().items() if place not in known)
    forget()
    assert left == REMEMBERED_BYTES.get(name, 0)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
