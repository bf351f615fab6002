"""Matrices that no number of ranks divides, of which some ranks have nothing: N ranks train as one process does."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cases import CONFIGS
from test_replicated import apart, bound, mine, run, shares
from test_sharded import whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from thinrank.optim import build
from thinrank.optim.exchange.shards import length

UNEVEN = {
    "galore/power": replace(CONFIGS["galore/power"], rank=1),
    "dion": replace(CONFIGS["dion"], rank=1),
    "muon": CONFIGS["muon"],
}
"""By rows at renewals, by rows in every step, by owners; each steps embeddings, head and vectors element by element.
Rank 1, so that a matrix of two columns has a subspace, too."""


class Uneven(nn.Module):
    """Layers from some of the features to some of them, each with a way around it, so that no gradient is singular."""

    all_alike = True

    def __init__(self, sides=((6, 9), (9, 7), (3, 7), (2, 3), (3, 2), (6, 1), (1, 5))):
        super().__init__()
        self.embed, self.place = nn.Embedding(13, 9), nn.Embedding(5, 9)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in sides)
        self.gain = nn.Parameter(torch.ones(1))
        self.lm_head = nn.Linear(9, 13, bias=False)

    def forward(self, tokens, seldom=False):
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[-1]))
        for layer in self.layers:
            y = torch.tanh(layer(x[..., : layer.in_features]))
            x = x + self.gain * nn.functional.pad(y, (0, 9 - y.shape[-1]))
        return self.lm_head(x)


def uneven(**options):
    torch.manual_seed(7)
    return Uneven(**options)


def ways(optimizer):
    """How parameters are stepped whose pieces are of different lengths, and how those of which a rank has nothing."""
    cut = [(place.way, [length(span) for span in place.spans]) for place in optimizer._cut.values()]
    return {way for way, sizes in cut if len(set(sizes)) > 1}, {way for way, sizes in cut if not all(sizes)}


def under_fsdp2(configs):
    # torch warns of layers whose output is a view, as that of a Linear is; nothing here writes into one
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for name, config in configs.items():
        model = uneven()
        fully_shard(model, mesh=mesh)
        optimizer = build(model, config)
        run(model, optimizer, mine())
        found[name] = whole(model), ways(optimizer)
    return found


def under_zero3(configs):
    from test_zero import engine
    from test_zero import run as run_zero

    found = {}
    for name, config in configs.items():
        zero, optimizer = engine(config, 3, model=uneven())
        cut = ways(optimizer)
        found[name] = run_zero(zero), cut
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize("ranks_", [2, 4])
@pytest.mark.parametrize("train", [under_fsdp2, under_zero3], ids=["fsdp2", "zero3"])
def test_pieces_of_different_lengths_train_as_whole_weights(ranks, train, ranks_):
    """Twenty steps, seven renewals."""
    if train is under_zero3:
        pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    names = ("galore/power", "muon") if train is under_zero3 else UNEVEN  # whose passes take their time
    configs = {name: UNEVEN[name] for name in names}
    found = ranks(ranks_).run(train, configs, timeout=220)[0]
    for name, config in configs.items():
        model = uneven()
        expected = run(model, build(model, config), shares(ranks_))
        assert apart(found[name][0], expected) <= bound(name), name
    different, nothing = (set().union(*(found[name][1][i] for name in configs)) for i in (0, 1))
    assert {"rows", "delta", "piece"} <= different
    assert ({"rows", "delta", "piece"} if ranks_ == 4 else {"piece"}) <= nothing


ALIKE = {"sides": ((4, 8),) * 3}
"""Three matrices of eight rows, one after the other: four ranks cut them after row 6, row 4 and row 2."""


def under_zero1(configs):
    from test_zero import engine
    from test_zero import run as run_zero

    found = {}
    for name, config in configs.items():
        zero, optimizer = engine(config, 1, model=uneven(**ALIKE))
        cut = [place.spans for place in optimizer._cut.values() if place.way == "rows"]
        found[name] = run_zero(zero), cut
    return found


@pytest.mark.timeout(240)
def test_equal_matrices_that_are_cut_at_different_rows(ranks):
    """They were to be stepped together, and the pieces of a rank did not fit on each other."""
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    configs = {name: UNEVEN[name] for name in ("galore/power", "dion")}
    found = ranks(4).run(under_zero1, configs, timeout=220)[0]
    for name, config in configs.items():
        model = uneven(**ALIKE)
        expected = run(model, build(model, config), shares(4))
        assert apart(found[name][0], expected) <= bound(name), name
        rows = [[length(span) // 4 for span in spans] for spans in found[name][1]]
        assert rows == [[6, 2, 0, 0], [0, 4, 4, 0], [0, 0, 2, 6]]
