"""One low-rank optimizer in a plain torch loop; runs in a few seconds: `python examples/own_loop.py`."""

import torch
from torch import nn

from thinrank.optim import SubspaceAdamWConfig, build, route


def main() -> tuple[float, float]:
    """Fits a small network to a fixed random one; returns the first and the last loss."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 32))
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 32))

    config = SubspaceAdamWConfig(lr=3e-3, rank=0.25, update_proj_gap=50)
    print(route(model, config).table())
    optimizer = build(model, config)

    losses = []
    for step in range(200):
        x = torch.randn(256, 64)
        loss = nn.functional.mse_loss(model(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step:3d}  loss {losses[-1]:.4f}")
    print(f"optimizer state: {optimizer.state_bytes():,} bytes")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
