"""Weights in pieces on several ranks: N ranks that each hold rows of them equal one process."""

import warnings

import pytest
import torch.distributed as dist
from cases import CONFIGS
from test_replicated import PLAIN, alone, apart, bound, mine, run, seeded_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from thinrank.optim import build


def fsdp(mesh=None):
    # torch warns of layers whose output is a view, as that of a Linear is; nothing here writes into one
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model = seeded_model(all_alike=True)  # FSDP2 waits for ever where ranks do not use the same weights
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    fully_shard(model.up, mesh=mesh)
    fully_shard(model.down, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wide(name):
    """As far as rounding may take a run; moments of 8 bits, too, may fall to the next code."""
    return 2e-2 if getattr(CONFIGS[name], "state_bits", 32) == 8 else bound(name)


def whole(model):
    return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}


def by_rows(configs, parts=1, **options):
    found = {}
    for name, config in configs.items():
        model = fsdp()
        optimizer = build(model, config)
        run(model, optimizer, mine(parts), **options)
        found[name] = whole(model)
    return found


@pytest.mark.parametrize(("ranks_", "configs"), [(1, PLAIN), (2, CONFIGS), (4, PLAIN)], ids=["1", "2", "4"])
def test_rows_on_ranks_are_whole_weights_in_one_process(ranks, ranks_, configs):
    answers = ranks(ranks_).run(by_rows, configs, timeout=240)
    for name, config in configs.items():
        expected = alone(config, ranks_, all_alike=True)
        for found in answers:
            assert apart(found[name], expected) <= wide(name), name
