"""Runs on ranks beside their plans: what each holds, and every byte on the wire, kind by kind and step by step."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from thinrank.optim import (
    AdamWConfig,
    DCTAdamWConfig,
    FiraConfig,
    GaLoreConfig,
    GaLorePlusConfig,
    LDAdamConfig,
    MuonConfig,
    build,
    route,
)
from thinrank.trainers.plan.held import Around
from thinrank.trainers.plan.owners import Owners, Pieces
from thinrank.trainers.plan.strategies import Islands

STEPS, EVEN_FROM = 6, 600
OWNED = {"owned": "auto", "owned, whole gradients": "full"}
"""Their messages."""
GALORE = GaLoreConfig(rank=3, svd="power", update_proj_gap=4)
CONFIGS = {
    "adamw": AdamWConfig(),
    "adamw/8bit": AdamWConfig(state_bits=8),
    "galore": GALORE,
    "galore/8bit": GaLoreConfig(rank=3, svd="power", update_proj_gap=4, state_bits=8),
    "galore/full": GaLoreConfig(rank=3, proj_type="full", update_proj_gap=4),
    "galore_plus": GaLorePlusConfig(rank=3, density=0.1, warmup=2, update_proj_gap=4, cross_heads=[]),
    "fira": FiraConfig(rank=3, svd="power", update_proj_gap=4),
    "ldadam": LDAdamConfig(rank=3),
    "muon": MuonConfig(),
    "dct_adamw": DCTAdamWConfig(rank=3, update_proj_gap=4),
    "dct_adamw/always": DCTAdamWConfig(rank=3),
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(12, 41)
        self.down = nn.Linear(41, 12)
        self.square = nn.Linear(12, 12, bias=False)

    def forward(self, x):
        return x + self.square(self.down(torch.tanh(self.up(x))))


class Tiny(nn.Module):
    """An embedding that is cut into pieces and one that is not, two blocks with matrices of rows that nobody divides,
    and a head of that kind."""

    def __init__(self):
        super().__init__()
        self.table, self.small = nn.Embedding(60, 12), nn.Embedding(7, 12)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(12)
        self.out = nn.Linear(12, 5)

    def forward(self, x):
        found = self.table(x) + self.small(x % 7)
        for layer in self.layers:
            found = layer(found)
        return self.out(self.norm(found))


def tiny(dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        return Tiny().to(dtype)


def planned(config, world, strategy, dtype=torch.float32):
    routing = route(tiny(dtype, "meta"), config)
    around = Around(routing=routing)
    if strategy in OWNED:
        return routing.rows, Owners.of(around, world, messages=OWNED[strategy], even_from=EVEN_FROM)
    if strategy == "islands":
        return routing.rows, Islands.of_rows(around, world, replicas=2, averages=False)
    return routing.rows, Pieces.of_rows(around, world)


def when(rows, step):
    turning = [row for row in rows if row.gap > 1]
    if step < max((row.searches for row in turning if row.sends_image), default=1):
        return "first"
    return "renewal" if step % max((row.gap for row in turning), default=1) == 0 else "between"


def ran(configs, strategy, dtype=torch.float32):
    """By name: bytes of weights, gradients and state, and, of each step, the payload by kind and what has left."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    found = {}
    for name, config in configs.items():
        model, meshes = tiny(dtype), None
        if strategy not in OWNED:
            shape = (2, dist.get_world_size() // 2) if strategy == "islands" else (1, dist.get_world_size())
            meshes = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
            mesh = meshes["shards"]
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = build(model, config)
        if strategy in OWNED:
            optimizer.own(messages=OWNED[strategy], even_from=EVEN_FROM, check_every=None)
        if strategy == "islands" and meshes is not None:
            optimizer.replicate(meshes["replicas"].get_group(), check_every=None)
        steps, before, left = [], {}, 0.0
        held = 0
        for step in range(STEPS):
            data = torch.randint(60, (4, 5), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            model(data).float().square().mean().backward()
            optimizer.gradient_norm()
            if step == STEPS - 1 or strategy == "islands":  # whose gradients are there, whole, at renewals
                held = max(held, optimizer.gradient_bytes())
            wire = optimizer.wire
            assert wire is not None
            optimizer.step()
            optimizer.zero_grad()
            kinds = {kind: size - before.get(kind, 0) for kind, size in wire.payload.items()}
            steps.append((kinds, wire.egress - left))
            before, left = dict(wire.payload), wire.egress
        local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
        weights = sum(p.numel() * p.element_size() for p in local)
        found[name] = (weights, held, optimizer.state_bytes()), steps
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("world", "strategy"),
    [(2, "owned"), (2, "owned, whole gradients"), (2, "fsdp2"), (4, "owned"), (4, "fsdp2"), (4, "islands")],
)
def test_what_ranks_hold_and_send_is_what_was_planned(ranks, world, strategy):
    """To the byte, on every rank, in steps that choose, in the first ones and in all others."""
    answers = ranks(world).run(ran, CONFIGS, strategy, timeout=200)
    for name, config in CONFIGS.items():
        rows, plan = planned(config, world, strategy)
        traffic = plan.sent(rows, world)
        for rank, answer in enumerate(answers):
            held, steps = answer[name]
            own = plan.rank(rows, 0, rank % plan.divided.ranks)
            assert (own.weights, own.gradients, own.state) == held, (name, rank)
            for step, (kinds, left) in enumerate(steps):
                now = when(rows, step)
                expected = {}
                for each in traffic.transfers:
                    mine = each.ranks[rank] if each.ranks else each
                    expected[each.kind] = expected.get(each.kind, 0) + mine.size(now)
                assert {k: v for k, v in kinds.items() if v} == {k: v for k, v in expected.items() if v}, (name, step)
                assert left == pytest.approx(traffic.leaving(now, world, rank)), (name, step)
        most = plan.held(rows, 0, world)
        for figure, name_of in enumerate(("weights", "gradients", "state")):
            assert getattr(most, name_of) == max(answer[name][0][figure] for answer in answers)
