"""On processes: a rank that is killed is named by those who wait for it, and its messages may be damaged or late."""

import os
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist
from dying_ranks import TIMEOUT, lives
from torch import nn

from thinrank.optim.gossip.exchange import Gossip
from thinrank.optim.gossip.message import HEADER_BYTES
from thinrank.optim.gossip.rounds import PeerLost, Swap

SIZE, SAVED = 40, 4


class Point(nn.Module):
    """Weights that go to a rank's own target, and all together to the mean of targets."""

    def __init__(self, rank):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(SIZE))
        self.target = torch.randn(SIZE, generator=torch.Generator().manual_seed(rank))

    def forward(self):
        return (self.x - self.target).square().sum() / 2


def begun(rank, **options):
    model = Point(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, Gossip(model, optimizer, **options)


def step(model, optimizer, exchange):
    optimizer.zero_grad()
    model().backward()
    optimizer.step()
    exchange.step()


# --- a rank that is killed --------------------------------------------------------------------------------------------


def until_killed(rank, folder, victim, when, options):
    """Saves the average once, and its own weights when another is lost."""
    model, optimizer, exchange = begun(rank, **options)
    try:
        for at in range(40):
            if (rank, at) == (victim, when):
                torch.save(time.monotonic(), f"{folder}/killed")
                os.kill(os.getpid(), signal.SIGKILL)
            step(model, optimizer, exchange)
            if at == SAVED:
                mean = exchange.average()
                torch.save(mean, f"{folder}/mean-{rank}")
    finally:
        torch.save({"model": model.state_dict(), "exchange": exchange.state_dict()}, f"{folder}/own-{rank}")
    return {}


def gone_on(rank, folder, kept, survivors, steps):
    """With fewer ranks, from the average or from what one of them had."""
    model, optimizer, exchange = begun(rank, scheme="choco", check_every=5)
    refused = None
    if kept == "mean":
        model.load_state_dict(torch.load(f"{folder}/mean-{survivors[0]}"))
    else:
        own = torch.load(f"{folder}/own-{survivors[rank]}")
        try:
            exchange.load_state_dict(own["exchange"])
        except ValueError as error:
            refused = str(error)
        model.load_state_dict(own["model"])
    exchange.restart()
    first = exchange.average()["x"].clone()
    for _ in range(steps):
        step(model, optimizer, exchange)
    return {"first": first, "last": exchange.average()["x"], "apart": exchange.consensus(), "refused": refused}


CASES = {
    "choco on a ring of 4": (4, {"scheme": "choco", "check_every": 3}),
    "dcd on a ring of 3": (3, {"scheme": "dcd", "overlap": False}),
    "dpsgd on a star of 4": (4, {"scheme": "dpsgd", "topology": "star"}),
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", CASES)
def test_a_killed_rank_is_named_and_others_go_on(tmp_path, name):
    """Its neighbours end in time with its number, the others because of those; then fewer ranks resume."""
    n, options = CASES[name]
    chance = random.Random(name)
    victim, when = chance.randrange(n), chance.randrange(SAVED + 2, 30)
    codes, answers = lives(until_killed, n, tmp_path / "run", victim, when, options)
    assert codes == [-signal.SIGKILL if rank == victim else 0 for rank in range(n)]
    killed = torch.load(tmp_path / "run" / "killed")
    near = set(range(n)) - {victim}
    if n == 4:
        near = {(victim - 1) % n, (victim + 1) % n} if "ring" in name else near if victim == 0 else {0}
    for rank, answer in enumerate(answers):
        if rank == victim:
            assert answer is None
            continue
        assert answer["at"] - killed < TIMEOUT + 5
        assert answer["lost"], answer  # a neighbour of it, or one that has ended because of it
        assert victim in answer["lost"] or rank not in near, answer
        assert f"rank {rank} could not exchange messages with rank" in answer["said"]
        assert "go on from the last checkpoint" in answer["said"]

    survivors = [rank for rank in range(n) if rank != victim]
    for kept in ("mean", "own"):
        again = tmp_path / kept
        again.mkdir()
        for path in [*(tmp_path / "run").glob("mean-*"), *(tmp_path / "run").glob("own-*")]:
            (again / path.name).write_bytes(path.read_bytes())
        codes, answers = lives(gone_on, n - 1, again, kept, survivors, 40)
        assert codes == [0] * (n - 1)
        best = torch.stack([Point(rank).target for rank in range(n - 1)]).mean(0)
        for answer in answers:
            assert "last" in answer, answer
            # CHOCO's mean goes as SGD on all data does
            wanted = best + 0.9**40 * (answer["first"] - best)
            torch.testing.assert_close(answer["last"], wanted, rtol=1e-4, atol=1e-5)
            assert answer["apart"] < 0.5
        for rank in survivors:
            file = torch.load(tmp_path / "run" / (f"mean-{survivors[0]}" if kept == "mean" else f"own-{survivors[0]}"))
            begin = file["x"] if kept == "mean" else file["model"]["x"]
            torch.testing.assert_close(answers[0]["first"], begin, rtol=1e-5, atol=1e-6)
            assert begin.norm() > 0.1, rank
        if kept == "own":
            assert all("another exchange" in answer["refused"] for answer in answers)


def with_a_closed_link(ends):
    """Between two ranks; what rank 0 to 2 have exchanged or whom they have lost."""
    rank, (irecv, isend) = dist.get_rank(), (dist.irecv, dist.isend)

    def closed(call, other):
        def tried(*args, **kwargs):
            if {rank, kwargs[other]} == ends:
                raise RuntimeError("Connection closed by peer [127.0.0.1]:1")
            return call(*args, **kwargs)

        return tried

    model, optimizer, exchange = begun(rank, scheme="dpsgd", overlap=False)
    dist.irecv, dist.isend = closed(irecv, "group_src"), closed(isend, "group_dst")
    try:
        step(model, optimizer, exchange)
    except PeerLost as error:
        return error.ranks, str(error)
    finally:
        dist.irecv, dist.isend = irecv, isend
    return (), ""


@pytest.mark.timeout(60)
def test_a_link_that_is_closed_already_stops_no_other_message(ranks):
    """Rank 1 gets what 0 and 2 have sent it, though these two cannot reach each other."""
    (lost0, said), (lost1, _), (lost2, _) = ranks(3).run(with_a_closed_link, {0, 2})
    assert (lost0, lost1, lost2) == ((2,), (), (0,))
    assert "rank 0 could not exchange messages with rank 2 (Connection closed by peer" in said


def frozen(rank, folder, victim):
    """Silent, its connections open, until the time is over."""
    model, optimizer, exchange = begun(rank)
    for at in range(5):
        if (rank, at) == (victim, 3):
            time.sleep(60)
        step(model, optimizer, exchange)
    return {}


# --- messages and time ------------------------------------------------------------------------------------------------


def damaging(peers, hits):
    """Flips bits of messages on their way: {(round, target): bits}."""
    post, count = peers.post, iter(range(10**6))

    def damaged(ask):
        at = next(count)
        if isinstance(ask, Swap):
            sends = {j: message.clone() for j, message in ask.sends.items()}
            for (when, j), bits in hits.items():
                for bit in bits if when == at else ():
                    sends[j][bit // 8] ^= 1 << (bit % 8)
            ask = Swap(sends=sends, expects=ask.expects, weights=ask.weights)
        return post(ask)

    peers.post = damaged


def with_hits(rank, folder, by_rank, options, steps=12, slow=None, nan=None):
    model, optimizer, exchange = begun(rank, **options)
    damaging(exchange.peers, by_rank.get(rank, {}))
    for at in range(steps):
        if rank == slow:
            time.sleep(0.05)
        if (rank, at) == nan:
            model.target[3] = float("nan")
        step(model, optimizer, exchange)
        model.target = Point(rank).target
    exchange.finish()
    counts = {name: n for name, n in exchange.scheme.tally.counts.items() if n}
    return {
        "x": model.x.detach().clone(),
        "counts": counts,
        "skipped": exchange.scheme.tally.skipped,
        "copies": {j: copy.clone() for j, copy in getattr(exchange.scheme, "copies", {}).items()},
        "egress": exchange.wire.egress,
    }


def on_ranks(by_rank, options, kwargs):
    return with_hits(dist.get_rank(), None, by_rank, options, **kwargs)


def copies_differ(answers):
    return [
        (i, j)
        for i, a in enumerate(answers)
        for j, copy in a["copies"].items()
        if not torch.equal(copy, answers[j]["copies"][j])
    ]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "overlap"), [("dcd", True), ("choco", False), ("choco", True), ("ecd", True)])
def test_a_damaged_message_is_counted_and_made_good(ranks, name, overlap):
    """Checks come with exchanges 4 and 9, whose rounds are 4 to 6 and 11 to 13; ranks stay in step all the time."""
    options = {"scheme": name, "overlap": overlap, "check_every": 5}
    usual = ranks(4).run(on_ranks, {}, options, {})
    assert copies_differ(usual) == []
    message = {(2, 2): [77]}
    question = {(5, 1): [8 * HEADER_BYTES + 100]}
    fingerprint, copy = {(4, 2): [150]}, {(6, 2): [1000]}
    for hits, steps, corrupt, repaired, wrong in (
        ({1: message}, 4, {2: 1}, {}, [(2, 1)]),
        ({1: message}, 5, {2: 1}, {2: 1}, []),
        ({1: message, 2: question}, 5, {2: 1, 1: 1}, {2: 1}, []),
        ({1: fingerprint}, 5, {2: 1}, {2: 1}, []),
        ({1: message | copy}, 9, {2: 2}, {}, [(2, 1)]),
        ({1: message | copy}, 12, {2: 2}, {2: 1}, []),
    ):
        answers = ranks(4).run(on_ranks, hits, options, {"steps": steps})
        for rank, answer in enumerate(answers):
            assert answer["counts"].get("corrupt", 0) == corrupt.get(rank, 0), (hits, answer["counts"])
            assert answer["counts"].get("repaired", 0) == repaired.get(rank, 0), (hits, answer["counts"])
        assert copies_differ(answers) == wrong
        if steps == 12:
            sent = [a["egress"] - b["egress"] for a, b in zip(answers, usual, strict=True)]
            assert sent == [0, 2 * (HEADER_BYTES + 4 * SIZE), 0, 0]  # two copies, the first in vain


@pytest.mark.timeout(120)
def test_a_question_that_nobody_can_read_ends_both_ranks(tmp_path):
    """Neither may wait for the other for ever."""
    hits = {2: {(5, 1): [100, 8 * HEADER_BYTES + 100, 16 * HEADER_BYTES + 100]}}
    codes, answers = lives(with_hits, 3, tmp_path, hits, {"scheme": "dcd", "check_every": 5})
    assert codes == [0] * 3
    assert answers[1]["lost"] == (2,)
    assert "rank 1 cannot read whether rank 2 waits for a copy" in answers[1]["said"]
    assert all("lost" in answer for answer in answers)


@pytest.mark.timeout(120)
def test_who_is_silent_is_named_when_the_time_is_over(tmp_path):
    codes, answers = lives(frozen, 3, tmp_path, 1, seconds=10, timeout=3)
    assert codes == [0, None, 0]
    assert all(1 in answers[rank]["lost"] for rank in (0, 2))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("scheme", ["dpsgd", "dcd", "choco"])
def test_a_slow_rank_makes_others_wait_and_a_nan_costs_one_step(ranks, scheme):
    options = {"scheme": scheme, "check_every": 5}
    usual = ranks(4).run(on_ranks, {}, options, {})
    slow = ranks(4).run(on_ranks, {}, options, {"slow": 2})
    for a, b in zip(usual, slow, strict=True):
        assert torch.equal(a["x"], b["x"])
    bad = ranks(4).run(on_ranks, {}, options, {"nan": (1, 6), "steps": 12})
    assert [answer["skipped"] for answer in bad] == [0, 1, 0, 0]
    assert all(bool(answer["x"].isfinite().all()) for answer in bad)
    assert copies_differ(bad) == []
    assert not any(answer["counts"].get("repaired") for answer in bad)
