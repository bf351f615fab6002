"""SORSA's penalty on factors that lie in pieces."""

import torch
from torch import nn

from thinrank.optim.layers.sorsa import skewness


def factor() -> torch.Tensor:
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def in_pieces() -> tuple[float, torch.Tensor]:
    """Value and whole gradient, with the rows of the factor cut among the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    piece = nn.Parameter(distribute_tensor(factor(), mesh, [Shard(0)]))
    value = skewness(piece)
    value.backward()
    assert piece.grad is not None
    return value.item(), piece.grad.full_tensor()  # pyright: ignore


def test_value_and_gradient_are_those_of_the_whole_factor(ranks):
    whole = factor().requires_grad_()
    value = skewness(whole)
    value.backward()
    for found, grad in ranks(2).run(in_pieces):
        assert found == value.item()
        torch.testing.assert_close(grad, whole.grad)
