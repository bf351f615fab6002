"""Matrices of one column, of one row and of one entry, and all directions that there are, against the equations.

Elsewhere the equations are compared at ranks below the short side; here it is what a method makes of its limits.
"""

from typing import Any

import pytest
import torch
from cases import moved, stepped
from laws import decaying, seeded
from reference.apollo import apollo
from reference.auon import auon
from reference.dct_adamw import dct_adamw
from reference.dion import dct, dion, dion2, trion
from reference.fira import fira
from reference.galore import galore
from reference.galore_plus import galore_plus
from reference.ldadam import ldadam
from reference.mfac import projected as mfac
from reference.muon import muon
from reference.subspace_adamw import subspace_adamw
from torch import nn

from thinrank.optim import METHODS as REGISTERED
from thinrank.optim import (
    MFAC,
    Apollo,
    ApolloMini,
    AuON,
    DCTAdamW,
    Dion,
    Dion2,
    Fira,
    GaLore,
    GaLorePlus,
    LDAdam,
    Muon,
    SubspaceAdamW,
    Trion,
)
from thinrank.optim.linalg.orthogonal import JORDAN
from thinrank.optim.linalg.woodbury import ROUNDING

STEPS = 20
SHAPES = {"one column": (7, 1), "one row": (1, 7), "one": (1, 1), "tall": (9, 5), "wide": (5, 9), "square": (6, 6)}
ADAM: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}
MOMENTUM: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}
GAP = {"update_proj_gap": 6}
MINI = {"per": "tensor", "scale": 128.0}
TRIPLES = JORDAN.triples


def of_dion(start, grads, rank):
    weight = nn.Parameter(start.clone())
    optimizer = Dion([weight], rank=rank, **MOMENTUM)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()  # nothing but the first right factor comes of it
    weight.data.copy_(start)
    right = optimizer.state[weight]["basis"].clone()
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight, dion(start, grads, right, **MOMENTUM)[0]


def of_auon(start, grads, rank):
    weight, _ = stepped(AuON, start, grads, newton_schulz_steps=3, **MOMENTUM)
    return weight, auon(start, grads, triples=TRIPLES[:3], **MOMENTUM)[0]


def projected(cls, equations, *, ours=None, theirs=None, **same):
    """What makes the two ends of a method that renews every six steps."""

    def ends(start, grads, rank):
        weight, _ = stepped(cls, start, grads, rank=rank, **GAP, **ADAM, **same, **(ours or {}))
        end = equations(start, grads, rank=rank, gap=6, **ADAM, **same, **(theirs or {}))
        return weight, end[0] if isinstance(end, tuple) else end

    return ends


METHODS = {
    "galore": projected(GaLore, galore, scale=0.5),
    "fira": projected(Fira, fira, scale=0.5),
    "apollo": projected(Apollo, apollo, scale=4.0, ours={"proj": "svd"}),
    "apollo_mini": projected(ApolloMini, apollo, theirs=MINI | {"project": lambda epoch, short: torch.eye(short)}),
    "apollo_mini, its one direction": lambda start, grads, rank: (
        projected(ApolloMini, apollo, ours={"proj": "svd"}, theirs=MINI)(start, grads, 1)
    ),
    "auon": lambda start, grads, rank: (stepped(AuON, start, grads, **MOMENTUM)[0], auon(start, grads, **MOMENTUM)[0]),
    "auon, hybrid": of_auon,
    "mfac": projected(MFAC, mfac, window=8, damping=0.01, theirs={"rounding": ROUNDING}),
    "mfac, adam": projected(MFAC, mfac, window=8, damping=0.01, finish="adam", theirs={"rounding": ROUNDING}),
    "dct_adamw": projected(DCTAdamW, dct_adamw, transport="rotate", ours={"column_age": False}),
    "subspace_adamw": projected(SubspaceAdamW, subspace_adamw, residual="off"),
    "galore_plus": projected(GaLorePlus, galore_plus, scale=0.5, density=0.0, warmup=0),
    "ldadam": lambda start, grads, rank: (
        stepped(LDAdam, start, grads, rank=rank, negative_variance="absolute", **ADAM)[0],
        ldadam(start, grads, rank=rank, absolute=True, **ADAM)[0],
    ),
    "muon": lambda start, grads, rank: (
        stepped(Muon, start, grads, **MOMENTUM)[0], muon(start, grads, triples=TRIPLES, **MOMENTUM)
    ),
    "dion": of_dion,
    "trion": lambda start, grads, rank: (
        stepped(Trion, start, grads, rank=rank, **MOMENTUM)[0],
        trion(start, grads, rank=rank, atoms=dct(min(start.shape)), triples=TRIPLES, **MOMENTUM)[0],
    ),
    "dion2": lambda start, grads, rank: (
        stepped(Dion2, start, grads, rank=rank, **MOMENTUM)[0],
        dion2(start, grads, count=rank, triples=TRIPLES, **MOMENTUM)[0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_equations_in_float64(shape, name):
    start, grads = seeded(*shape), [decaying(*shape, ratio=0.6, seed=i + 1) * (1 + i % 4) for i in range(STEPS)]
    weight, expected = METHODS[name](start, grads, min(shape))
    rounding = STEPS * 2.0**-24 * float(expected.norm())  # of the weight, in every step
    assert moved(weight, expected) <= 1e-5 * moved(start, expected) + rounding


def test_no_method_is_missing():
    entrywise = {"adamw"}  # knows of no shape
    assert {name.partition(",")[0] for name in METHODS} == set(REGISTERED) - entrywise
