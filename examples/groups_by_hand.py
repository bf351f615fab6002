"""Parameter groups as galore-torch takes them, unchanged, and a checkpoint that loads with `weights_only=True`.

python examples/groups_by_hand.py
"""

import io

import torch
from torch import nn

from thinrank.optim import GaLore


def main() -> bool:
    """Trains, saves, loads into a fresh optimizer, and returns whether both go on identically."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def optimizer_for(network: nn.Module) -> GaLore:
        matrices = [p for p in network.parameters() if p.ndim == 2]
        vectors = [p for p in network.parameters() if p.ndim < 2]
        groups = [
            {"params": vectors},
            {"params": matrices, "rank": 8, "update_proj_gap": 10, "scale": 0.25, "proj_type": "std"},
        ]
        return GaLore(groups, lr=0.01)

    def steps(network: nn.Module, optimizer: GaLore, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        for _ in range(count):
            optimizer.zero_grad()
            network(torch.randn(16, 32, generator=generator)).square().mean().backward()
            optimizer.step()

    optimizer = optimizer_for(model)
    steps(model, optimizer, 15)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    other.load_state_dict(saved["model"])
    resumed = optimizer_for(other)
    resumed.load_state_dict(saved["optimizer"])

    steps(model, optimizer, 15)
    steps(other, resumed, 15)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    print("resumed run equals the uninterrupted one, bit for bit:", same)
    return same


if __name__ == "__main__":
    main()
