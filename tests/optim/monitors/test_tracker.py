"""The triples that are followed against exact ones, whole and in pieces."""

import math
from typing import Any

import pytest
import torch

from thinrank.optim.monitors.tracker import Piece, SpectrumTracker


def spiked(out, width, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(out, len(values), generator=generator))[0]
    right = torch.linalg.qr(torch.randn(width, len(values), generator=generator))[0]
    return left @ torch.diag(torch.tensor(values)) @ right.T, left, right


@pytest.mark.parametrize(("out", "width"), [(40, 24), (24, 40), (16, 16)])
def test_the_first_reading_finds_the_first_triple(out, width):
    weight, left, right = spiked(out, width, [5.0, 3.0, 1.0, 0.5])
    tracker = SpectrumTracker({"w": (out, width)})
    triple = tracker.update({"w": Piece.whole(weight)})["w"]
    assert triple.sigma.tolist() == pytest.approx([5.0, 3.0], rel=1e-5)
    assert abs(float(triple.right @ right[:, 0])) == pytest.approx(1, abs=1e-5)
    assert abs(float(triple.left @ left[:, 0])) == pytest.approx(1, abs=1e-5)
    assert float(triple.stable_rank) == pytest.approx((25 + 9 + 1 + 0.25) / 25, rel=1e-5)
    assert float(triple.gap) == pytest.approx(5 / 3, rel=1e-5)
    assert float(triple.residual) < 1e-4


def test_the_left_vector_belongs_to_the_right_one():
    weight, _left, _ = spiked(12, 20, [2.0, 1.0])
    triple = SpectrumTracker({"w": (12, 20)}).update({"w": Piece.whole(weight)})["w"]
    assert float(triple.left @ weight @ triple.right) == pytest.approx(2.0, rel=1e-5)


def test_a_weight_that_moves_is_followed_by_few_iterations():
    """A walk of 0.2 % a step, read in every tenth step, as a weight in training: σ1 / σ2 is about 1.2."""
    generator = torch.Generator().manual_seed(1)
    weight, _, _ = spiked(64, 48, [6.0, 5.0, 3.0])
    tracker = SpectrumTracker({"w": (64, 48)})
    cosines = []
    for step in range(200):
        move = torch.randn(64, 48, generator=generator)
        weight = weight + 0.002 * weight.norm() * move / move.norm()
        if step % 10 == 0:
            triple = tracker.update({"w": Piece.whole(weight)})["w"]
            _, sigma, right = torch.linalg.svd(weight)
            cosines.append(abs(float(triple.right @ right[0])))
            assert float(triple.sigma[0]) == pytest.approx(float(sigma[0]), rel=1e-3)
    assert min(cosines) > 0.99


class Ranks:
    """Runs one tracker for each rank in threads that meet wherever an axis adds up."""

    def __init__(self, ranks):
        import threading

        self.barrier, self.ranks = threading.Barrier(ranks, timeout=20), ranks
        self.held: list[Any] = [None] * ranks
        self.messages = 0

    def axis(self, rank) -> Any:
        outer = self

        class Meeting:
            whole = False

            def sum(self, x):
                outer.held[rank] = x
                outer.barrier.wait()
                total = torch.stack(outer.held).sum(0)
                outer.barrier.wait()
                if rank == 0:
                    outer.messages += 1
                return total

        return Meeting()

    def run(self, work):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(self.ranks) as pool:
            return list(pool.map(work, range(self.ranks)))


@pytest.mark.parametrize("cuts", [(0, 240, 480), (0, 7, 480), (0, 31, 39, 480), (0, 480, 480), (0, 100, 101, 102, 480)])
def test_pieces_anywhere_are_the_whole(cuts):
    """Rows, ranges that begin and end within a row, within the same row, and ranks with nothing."""
    out, width = 24, 20
    weight, _, _ = spiked(out, width, [4.0, 2.5, 1.0], seed=3)
    gradient = torch.randn(out, width, generator=torch.Generator().manual_seed(4))
    whole = SpectrumTracker({"w": (out, width)})
    expected = whole.update({"w": Piece.whole(weight)})["w"]
    drive = whole.drive({"w": Piece.whole(gradient)})["w"]
    ranks = Ranks(len(cuts) - 1)

    def work(rank):
        start, stop = cuts[rank], cuts[rank + 1]
        tracker, axis = SpectrumTracker({"w": (out, width)}), ranks.axis(rank)
        piece = Piece(weight.reshape(-1)[start:stop], (out, width), start)
        found = tracker.update({"w": piece}, axis)["w"]
        grad = Piece(gradient.reshape(-1)[start:stop], (out, width), start)
        return found, tracker.drive({"w": grad}, axis)["w"]

    for found, driven in ranks.run(work):
        torch.testing.assert_close(found.right, expected.right, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.sigma, expected.sigma, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.stable_rank, expected.stable_rank, rtol=1e-5, atol=0)
        torch.testing.assert_close(driven, drive, rtol=1e-3, atol=1e-4)


def test_all_matrices_travel_in_one_message():
    """Two for each iteration, one for the energies, however many matrices there are."""
    shapes = {f"w{i}": (6 + i, 5) for i in range(7)}
    weights = {name: spiked(*shape, [3.0, 1.0], seed=i)[0] for i, (name, shape) in enumerate(shapes.items())}
    ranks = Ranks(2)
    trackers = [SpectrumTracker(shapes), SpectrumTracker(shapes)]

    def work(rank):
        half = {name: w.numel() // 2 for name, w in weights.items()}
        pieces = {
            name: Piece(
                w.reshape(-1)[half[name] :] if rank else w.reshape(-1)[: half[name]], shapes[name], rank * half[name]
            )
            for name, w in weights.items()
        }
        return trackers[rank].update(pieces, ranks.axis(rank))

    ranks.run(work)
    first = ranks.messages
    ranks.messages = 0
    ranks.run(work)
    assert (first, ranks.messages) == (2 * 30 + 1, 2 * 3 + 1)


def test_what_has_no_first_direction_is_read_without_harm():
    shapes = {"zero": (6, 4), "row": (1, 5), "column": (5, 1), "one": (1, 1), "rank1": (6, 4)}
    row = torch.tensor([[3.0, 0.0, 4.0, 0.0, 0.0]])
    weights = {
        "zero": torch.zeros(6, 4),
        "row": row,
        "column": row.T.contiguous(),
        "one": torch.tensor([[-2.0]]),
        "rank1": torch.outer(torch.ones(6), torch.ones(4)),
    }
    found = SpectrumTracker(shapes).update({name: Piece.whole(w) for name, w in weights.items()})
    assert {name: pytest.approx(float(t.sigma[0]), rel=1e-5) for name, t in found.items()} == {
        "zero": 0, "row": 5, "column": 5, "one": 2, "rank1": math.sqrt(24),
    }  # fmt: skip
    assert all(float(t.sigma[1]) < 1e-4 for t in found.values())
    assert float(found["zero"].stable_rank) == 0
    assert float(found["rank1"].stable_rank) == pytest.approx(1, rel=1e-5)


def test_after_a_weight_that_is_not_finite_it_begins_anew():
    weight, _, _ = spiked(10, 8, [3.0, 1.0])
    tracker = SpectrumTracker({"w": (10, 8), "x": (10, 8)})
    broken = weight.clone()
    broken[2, 3] = math.nan
    found = tracker.update({"w": Piece.whole(broken), "x": Piece.whole(weight)})
    assert math.isnan(float(found["w"].sigma[0]))
    assert float(found["x"].sigma[0]) == pytest.approx(3, rel=1e-5)
    assert "w" not in tracker.state_dict()["right"]
    assert float(tracker.update({"w": Piece.whole(weight)})["w"].sigma[0]) == pytest.approx(3, rel=1e-5)


def test_a_state_goes_on_to_the_bit():
    weights = [spiked(20, 12, [3.0, 2.8, 1.0], seed=seed)[0] for seed in range(3)]
    one = SpectrumTracker({"w": (20, 12)})
    for weight in weights[:2]:
        one.update({"w": Piece.whole(weight)})
    other = SpectrumTracker({"w": (20, 12)})
    other.load_state_dict(one.state_dict())
    a, b = (tracker.update({"w": Piece.whole(weights[2])})["w"] for tracker in (one, other))
    assert torch.equal(a.right, b.right)
    assert torch.equal(a.sigma, b.sigma)


def test_sixteen_bit_weights_are_read_in_float32_also_within_autocast():
    weight = spiked(32, 24, [3.0, 1.0])[0].bfloat16()
    exact = torch.linalg.svdvals(weight.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        triple = SpectrumTracker({"w": (32, 24)}).update({"w": Piece.whole(weight)})["w"]
    assert triple.sigma.dtype == torch.float32
    assert float(triple.sigma[0]) == pytest.approx(float(exact[0]), rel=1e-5)


def test_other_shapes_and_names_are_refused():
    tracker = SpectrumTracker({"w": (4, 3)})
    with pytest.raises(ValueError, match="w is \\(3, 4\\)"):
        tracker.update({"w": Piece.whole(torch.zeros(3, 4))})
    with pytest.raises(ValueError, match="made for None"):
        tracker.update({"v": Piece.whole(torch.zeros(3, 4))})
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        SpectrumTracker({}, iterations=0)
