"""The plain loop on several processes, which exchange coordinates instead of gradients.

`torchrun --standalone --nproc-per-node 2 examples/replicas.py`
"""

import gc

import torch
import torch.distributed as dist
from torch import nn

from thinrank.optim import GaLoreConfig, build, replicate


def train() -> tuple[float, float]:
    """Fits a small network to a fixed random one; returns the last loss, and how much of DDP's bytes was sent."""
    torch.manual_seed(0)  # the same teacher everywhere; the model is made equal by `replicate`
    teacher = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    torch.manual_seed(1 + dist.get_rank())  # other data everywhere

    optimizer = build(model, GaLoreConfig(lr=0.02, scale=1.0, rank=0.25, update_proj_gap=50, svd="power"))
    replicate(model, optimizer)  # no DistributedDataParallel

    steps, loss = 200, torch.zeros(())
    for step in range(steps):
        x = torch.randn(128, 64)
        loss = nn.functional.mse_loss(model(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 and dist.get_rank() == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}")
    assert optimizer.wire is not None
    gradients = 4 * steps * sum(p.numel() for p in model.parameters())
    share = optimizer.wire.total() / gradients
    if dist.get_rank() == 0:
        print(f"sent {optimizer.wire.total():,} bytes of payload, {share:.2f} of what gradients would have been")
    return loss.item(), share


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train()
    gc.collect()  # what model and optimizer hold of the connection goes before it
    dist.barrier()
    dist.destroy_process_group()
