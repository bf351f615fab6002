"""Bytes on the wire and bytes held, by hand: a matrix of 24 × 10, an embedding of 7 × 10 and a vector of 24."""

import pytest
import torch
from torch import nn

from thinrank.configs.schema import STRATEGIES
from thinrank.optim import AdamWConfig, FiraConfig, GaLoreConfig, GaLorePlusConfig, route
from thinrank.trainers.errors import UserError
from thinrank.trainers.plan.held import Around
from thinrank.trainers.plan.owners import Zero, in_a_row
from thinrank.trainers.plan.strategies import Alone, Averaged, Replicas, is_planned, strategy_of
from thinrank.trainers.plan.wire import Traffic, Transfer, averaged_images, steady
from thinrank.trainers.strategies import ReplicatedConfig, StrategyConfig

MATRIX, TABLE, VECTOR = 24 * 10, 7 * 10, 24
ALL = MATRIX + TABLE + VECTOR
GALORE = GaLoreConfig(rank=3, svd="power", update_proj_gap=5)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 10)
        self.layer = nn.Linear(10, 24)


def rows(config, dtype=torch.float32):
    with torch.device("meta"):
        return route(Tiny().to(dtype), config).rows


def kinds(traffic, when):
    return {each.kind: getattr(each, when) for each in traffic.transfers}


def test_coordinates_travel_between_renewals_and_gradients_in_them():
    traffic = averaged_images(rows(GALORE))
    rest = 4 * (TABLE + VECTOR)
    usual = {"coordinates": 4 * 24 * 3, "norms": 4 * MATRIX}  # a sketch of so few entries is all of them
    assert kinds(traffic, "between") == {"renewals": 0, **usual, "dense": rest, "present": 12}
    assert kinds(traffic, "renewal") == {
        "renewals": 4 * MATRIX,
        **dict.fromkeys(usual, 0),
        "dense": rest,
        "present": 12,
    }
    assert traffic.payload("averaged") == pytest.approx(rest + 12 + 4 * MATRIX + 4 * 4 * 24 * 3 / 5)
    assert traffic.leaving("between", 4) == pytest.approx(2 * 3 / 4 * traffic.payload("between"))
    assert traffic.leaving("between", 1) == 0


def test_what_some_processes_pass_round_leaves_as_often_as_these_are_many():
    own = (steady("dense", 30), steady("dense", 50))
    every = Transfer(kind="dense", between=40, renewal=40, averaged=40.0, ranks=own * 4, among=4)
    assert [every.leaving("between", 8, rank) for rank in (0, 1, None)] == [45, 75, 60]


def test_messages_in_another_type_and_weights_of_16_bits():
    """Coordinates are float32 unless told otherwise; a gradient is as wide as its weight."""
    half = rows(GALORE, torch.bfloat16)
    assert averaged_images(half).payload("between") == 4 * (24 * 3 + MATRIX) + 2 * (TABLE + VECTOR) + 12
    assert averaged_images(half, dtype=torch.bfloat16).payload("between") == 2 * (24 * 3 + MATRIX + TABLE + VECTOR + 3)
    assert averaged_images(rows(GALORE), messages="full").payload("between") == 4 * ALL + 12
    rounded = kinds(averaged_images(rows(GALORE), embeddings="rows_bfloat16"), "between")
    assert rounded == kinds(averaged_images(rows(GALORE)), "between") | {"dense": 2 * TABLE + 4 * VECTOR}


@pytest.mark.parametrize(("messages", "to_a_byte"), [("signs", 3), ("majority", 5)])
def test_what_a_subspace_misses_travels_in_signs(messages, to_a_byte):
    """On four processes, whose counts from 0 to 4 are three to a byte, and signs and ties five."""
    traffic = averaged_images(rows(FiraConfig(rank=3, svd="power", update_proj_gap=5)), messages=messages, world=4)
    found = kinds(traffic, "between")
    assert found == {
        "renewals": 0,
        "signs": MATRIX // 8,
        "votes": MATRIX // to_a_byte,
        "coordinates": 4 * 24 * 3,
        "sizes": 4 * 24 * 4,
        "dense": 4 * (TABLE + VECTOR),
        "present": 12,
    }
    once = found["signs"] + found["votes"] + found["sizes"]
    assert traffic.leaving("between", 4) == 3 / 4 * (2 * traffic.payload("between") - once)
    assert kinds(traffic, "renewal")["renewals"] == 4 * MATRIX
    linear = averaged_images(rows(GALORE), messages=messages, world=4)
    assert linear == averaged_images(rows(GALORE))


def test_entries_travel_with_coordinates_and_a_search_is_counted_in_steps():
    config = GaLorePlusConfig(rank=3, density=0.1, warmup=4, update_proj_gap=5, cross_heads=[])
    found = rows(config)
    assert kinds(averaged_images(found), "between")["entries"] == 4 * 24
    assert max(row.searches for row in found) == 4


@pytest.mark.parametrize(
    "config", [FiraConfig(rank=3, svd="power"), GaLoreConfig(rank=3, update_proj_gap=1), AdamWConfig()], ids=str
)
def test_methods_that_need_gradients_send_them_in_every_step(config):
    traffic = averaged_images(rows(config))
    assert traffic.payload("between") == traffic.payload("renewal") == traffic.payload("averaged") == 4 * ALL + 12


def test_both_sides_of_a_matrix_and_the_longer_one():
    assert kinds(averaged_images(rows(GaLoreConfig(rank=3, proj_type="full"))), "between")["coordinates"] == 4 * 9
    other = averaged_images(rows(GaLoreConfig(rank=3, proj_type="reverse_std")))
    assert kinds(other, "between")["coordinates"] == 4 * 10 * 3


def test_what_a_process_holds():
    found = rows(GALORE)
    state = 4 * (2 * 24 * 3 + 10 * 3) + 4 + 4 * 2 * (TABLE + VECTOR) + 2 * 4
    alone = Alone().held(found, 100, 1)
    assert (alone.weights, alone.gradients, alone.arriving) == (100 + 4 * ALL, 4 * ALL, 4 * ALL)
    assert (alone.state, alone.bases, alone.buffers) == (state, 4 * 10 * 3, 0)
    assert Averaged().held(found, 0, 2).buffers == 4 * ALL
    replicas = Replicas().held(found, 0, 2)
    assert replicas.gradients == 4 * (24 * 3 + TABLE + VECTOR)
    assert (replicas.arriving, replicas.state, replicas.buffers) == (4 * ALL + 4 * 24 * 3, state, 4 * ALL)
    half = Replicas(dtype=torch.bfloat16).held(found, 0, 2)
    assert half.buffers == 2 * ALL
    assert half.arriving == 2 * ALL + replicas.gradients + 4 * MATRIX


def test_gradients_taken_in_backward():
    found = rows(GALORE)
    assert Alone().held(found, 0, 1, "project").gradients == 4 * (24 * 3 + TABLE + VECTOR)
    assert Alone().held(found, 0, 1, "step").gradients == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_divides_state_then_gradients_then_weights(stage):
    """Per process of 4: its share, and what a ring sends (ZeRO, §7: stage 3 costs one and a half times DDP)."""
    world = 4
    with torch.device("meta"):
        routing = route(Tiny(), AdamWConfig())
    plan = Zero.of(Around(routing=routing), world, stage=stage)
    held = plan.held(routing.rows, 0, world)
    share = -(-MATRIX // 4) + -(-TABLE // 4) + -(-VECTOR // 4)  # ZeRO-3 cuts each by itself, the others a group
    assert held.state == pytest.approx(8 * ALL / 4, rel=0.1)
    assert held.masters == (4 * share if stage == 3 else pytest.approx(ALL, rel=0.1))
    assert held.gradients == (4 * ALL if stage == 1 else held.masters)
    assert held.weights == (4 * ALL if stage < 3 else held.masters)
    traffic, ddp = plan.sent(routing.rows, world), Averaged().sent(routing.rows, world).leaving("averaged", world)
    assert traffic.by_framework(world) == pytest.approx(ddp * (1.5 if stage == 3 else 1))
    # a number each says which parameters had a gradient, and one each the norm of a group
    norms = (8 if stage == 3 else 4) * len(routing.groups)
    assert kinds(traffic, "averaged") == {"present": 4 * 3, "norms": norms}


def test_tensors_that_lie_in_a_row_are_cut_wherever_that_is():
    assert in_a_row([7, 5, 1], 2) == [[(0, 7), (0, 0)], [(0, 1), (1, 5)], [(0, 0), (0, 1)]]


def test_a_transfer_leaves_by_its_passes():
    traffic = Traffic((steady("sums", 100), steady("parts", 40, 1)))
    assert traffic.payload("renewal") == 140
    assert traffic.leaving("renewal", 5) == pytest.approx(0.8 * (200 + 40))


def test_every_strategy_that_can_be_configured_has_a_plan():
    assert {name for name, config in STRATEGIES.items() if not is_planned(config(name=name))} == set()


def test_auto_is_one_process_or_ddp_and_an_unknown_one_is_told():
    assert strategy_of(StrategyConfig(), 1) == Alone()
    assert strategy_of(StrategyConfig(), 2) == Averaged()
    assert strategy_of(ReplicatedConfig(dtype="bfloat16", messages="full"), 2) == Replicas("full", torch.bfloat16)
    config = StrategyConfig()
    object.__setattr__(config, "name", "mine")
    with pytest.raises(UserError, match=r"no plan for strategy=mine yet: choose one of auto, ddp, thinrank_ddp, "):
        strategy_of(config, 2)
