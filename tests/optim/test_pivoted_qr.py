"""QR with column pivoting: the laws, and scipy's."""

from typing import Any

import pytest
import scipy.linalg
import torch
from laws import decaying, seeded

from thinrank.optim.linalg.pivoted import pivoted_qr


def scipys(x) -> Any:
    return scipy.linalg.qr(x.numpy(), mode="economic", pivoting=True)


@pytest.mark.parametrize("shape", [(7, 7), (12, 5), (5, 12), (1, 4), (4, 1)])
def test_it_is_scipys(shape):
    x = seeded(*shape, dtype=torch.float64)
    q, r, order = pivoted_qr(x)
    k = min(shape)
    theirs_q, theirs_r, theirs_order = scipys(x)
    assert order.tolist() == theirs_order[:k].tolist()
    signs = torch.tensor(theirs_r).diagonal().sign()
    torch.testing.assert_close(q, torch.tensor(theirs_q) * signs)
    torch.testing.assert_close(r[:, torch.tensor(theirs_order)], torch.tensor(theirs_r) * signs[:, None])


@pytest.mark.parametrize("ratio", [0.9, 0.1, 1e-3])
def test_it_is_a_qr_however_steeply_the_values_fall(ratio):
    x = decaying(9, 6, ratio=ratio, dtype=torch.float64)
    q, r, order = pivoted_qr(x)
    eye = torch.eye(6, dtype=torch.float64)
    kept = r[:, order].diagonal() > 0
    torch.testing.assert_close((q.mT @ q)[kept][:, kept], eye[kept][:, kept], rtol=0, atol=1e-13)
    torch.testing.assert_close(q @ r, x, rtol=0, atol=1e-14)
    triangle = r[:, order]
    assert torch.equal(triangle, triangle.triu())
    assert bool((triangle.diagonal()[1:] <= triangle.diagonal()[:-1] * (1 + 1e-12)).all())
    theirs = scipys(x)[2]
    assert order[kept].tolist() == theirs[: int(kept.sum())].tolist()


def test_where_the_rank_ends_zeros_follow():
    x = seeded(8, 2, dtype=torch.float64) @ seeded(2, 6, seed=1, dtype=torch.float64)
    q, r, order = pivoted_qr(x)
    assert sorted(order.tolist()) == sorted(set(order.tolist()))
    assert not q[:, 2:].any()
    assert not r[2:].any()
    torch.testing.assert_close(q @ r, x)
    q, r, order = pivoted_qr(torch.zeros(3, 4))
    assert not q.any()
    assert not r.any()
    assert order.tolist() == [0, 1, 2]


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="entries that are not finite"):
        pivoted_qr(torch.tensor([[1.0, float("nan")]]))
