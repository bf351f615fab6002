"""Replicas that share out state and work: N ranks, each of which steps its matrices, equal one process."""

import pytest
import torch
import torch.distributed as dist
from cases import CONFIGS
from test_replicated import PLAIN, alone, apart, bound, mine, run, seeded_model

from thinrank.optim import build
from thinrank.optim.owned import own


def wide(name):
    """As far as rounding may take a run; moments of 8 bits, too, may fall to the next code."""
    return 2e-2 if getattr(CONFIGS[name], "state_bits", 32) == 8 else bound(name)


def owned(configs, parts=1, dtype=torch.float32, how=None, **options):
    found = {}
    for name, config in configs.items():
        model = seeded_model(dist.get_rank()).to(dtype)
        optimizer = build(model, config)
        own(model, optimizer, **{"check_every": 10, "even_from": 64, **(how or {})})
        found[name] = run(model, optimizer, mine(parts), **options)
    return found


@pytest.mark.parametrize(("ranks_", "configs"), [(1, PLAIN), (2, CONFIGS), (4, PLAIN)], ids=["1", "2", "4"])
def test_owners_that_tell_their_updates_are_one_process(ranks, ranks_, configs):
    answers = ranks(ranks_).run(owned, configs, timeout=240)
    for name, config in configs.items():
        expected = alone(config, ranks_)
        for found in answers:
            assert apart(found[name], expected) <= wide(name), name
        for found in answers[1:]:
            assert all(torch.equal(value, answers[0][name][key]) for key, value in found[name].items()), name
