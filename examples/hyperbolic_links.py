"""Link prediction on a random tree, in flat and in hyperbolic space, with dense weights and with factors of them.

`python examples/hyperbolic_links.py --out benchmarks/results/hyperbolic-links.md`: a minute and a half on one core.

A tree grows at random; every node has its parent's features, weakened, and noise. Of its edges 85 % are trained on and
are the graph that the network sees, 5 % choose the learning rate and the moment to stop, and 10 % are the test, each
part against as many pairs at random that are no edges. The network has two layers, x ↦ mean over neighbours of
(M x + b), and gives p(edge) = 1 / (exp((d² − ρ) / t) + 1) by the distance d (Fermi–Dirac; ρ and t are trained). In
hyperbolic space the layers are `LorentzLinear`, means are centroids, d is geodesic; in flat space layers are
`nn.Linear` with a tanh after the first. The same line converts both.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thinrank.optim import AdamWConfig, build
from thinrank.optim.layers import SST, LorentzLinear, LowRank, ReLoRA, ReparamConfig, Upkeep, convert, warmth
from thinrank.optim.linalg.lorentz import centroid, distance2, from_tangent

SPACES = ("flat", "hyperbolic")
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
RANK, FEATURES, WIDTH, OUT = 4, 32, 32, 8
METHODS: dict[str, ReparamConfig] = {
    "dense": ReparamConfig(),
    "SST": SST(rank=RANK, every=25, warmup=3),  # a round of 8 iterations is 200 steps
    "factors": LowRank(rank=RANK),
    "LoRA": ReLoRA(rank=RANK, alpha=float(RANK), every=None, warmup=0),
}


@dataclass
class Links:
    """A tree with features, and its edges in three parts, each with as many pairs that are none.

    Attributes:
        features: (nodes, features).
        mean: (nodes, nodes), sparse: rows average over a node and its neighbours by edges that are trained on.
        edges, none: (pairs, 2) for each of `train`, `val` and `test`.
    """

    features: Tensor
    mean: Tensor
    edges: dict[str, Tensor]
    none: dict[str, Tensor]


def grow(nodes: int, seed: int) -> Links:
    """A random tree: each node's parent is drawn from those before it that have fewer than four children."""
    generator = torch.Generator().manual_seed(seed)
    parent, children = [0] * nodes, [0] * nodes
    free, features = [0], [torch.randn(FEATURES, generator=generator)]
    for node in range(1, nodes):
        at = int(torch.randint(len(free), (), generator=generator))
        up = parent[node] = free[at]
        children[up] += 1
        if children[up] == 4:
            free[at] = free[-1]
            free.pop()
        free.append(node)
        features.append(0.8 * features[up] + 0.6 * torch.randn(FEATURES, generator=generator))
    edges = torch.tensor([(parent[node], node) for node in range(1, nodes)])
    edges = edges[torch.randperm(len(edges), generator=generator)]
    held = int(0.05 * len(edges)), int(0.1 * len(edges))
    parts: dict[str, Tensor] = dict(
        zip(("val", "test", "train"), edges.split([*held, len(edges) - sum(held)]), strict=True)
    )
    taken = set(map(tuple, edges.tolist())) | {(b, a) for a, b in edges.tolist()}

    def strangers(count: int) -> Tensor:
        found: list[tuple[int, ...]] = []
        while len(found) < count:
            drawn = torch.randint(nodes, (count, 2), generator=generator).tolist()
            found += [(a, b) for a, b in drawn if a != b and (a, b) not in taken]
        return torch.tensor(found[:count])

    none = {part: strangers(len(pairs)) for part, pairs in parts.items()}
    rows, columns = torch.cat([parts["train"], parts["train"].flip(1), torch.arange(nodes)[:, None].expand(-1, 2)]).T
    share = 1 / torch.bincount(rows, minlength=nodes)[rows]
    mean = torch.sparse_coo_tensor(torch.stack([rows, columns]), share, (nodes, nodes), check_invariants=True)
    return Links(torch.stack(features), mean.coalesce(), parts, none)


class Encoder(nn.Module):
    """Two layers over the graph, and the decoder's ρ and t."""

    def __init__(self, space: str) -> None:
        super().__init__()
        self.space = space
        layer: Callable[[int, int], nn.Module] = LorentzLinear if space == "hyperbolic" else nn.Linear
        self.one, self.two = layer(FEATURES, WIDTH), layer(WIDTH, OUT)
        self.radius, self.log_heat = nn.Parameter(torch.full((1,), 2.0)), nn.Parameter(torch.zeros(1))

    def forward(self, links: Links) -> Tensor:
        """Where the nodes are, (nodes, 8), or in hyperbolic space (nodes, 9)."""
        if self.space == "flat":
            hidden = torch.tanh(links.mean @ self.one(links.features))
            return links.mean @ self.two(hidden)
        x = from_tangent(links.features / FEATURES**0.5)
        return centroid(links.mean, self.two(centroid(links.mean, self.one(x))))

    def logits(self, where: Tensor, pairs: Tensor) -> Tensor:
        """Of p(edge) for pairs of nodes (pairs, 2): (pairs,)."""
        a, b = where[pairs[:, 0]], where[pairs[:, 1]]
        d2 = (a - b).square().sum(-1) if self.space == "flat" else distance2(a, b)
        return (self.radius - d2) / self.log_heat.exp()


def auc(positive: Tensor, negative: Tensor) -> float:
    """How often a positive's score is above a negative's; ties count half."""
    above = positive[:, None] - negative[None, :]
    return float((above > 0).float().mean() + 0.5 * (above == 0).float().mean())


def train(
    links: Links, space: str, config: ReparamConfig, lr: float, steps: int, seed: int
) -> tuple[float, float, int]:
    """Returns the AUC of validation at its best, that of the test then, and how many numbers were trained."""
    torch.manual_seed(seed)
    model = Encoder(space)
    if config.name != "none":
        convert(model, config, seed=seed)
    optimizer = build(model, AdamWConfig(lr=lr))
    upkeep = Upkeep(model, optimizer, seed=seed)
    factor = warmth(model) or (lambda step: 1.0)
    pairs = torch.cat([links.edges["train"], links.none["train"]])
    labels = torch.cat([torch.ones(len(pairs) // 2), torch.zeros(len(pairs) // 2)])
    best = (0.0, 0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * factor(step)
        loss = F.binary_cross_entropy_with_logits(model.logits(model(links), pairs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 10 == 0:
            with torch.no_grad():
                where = model(links)
                val, test = (
                    auc(model.logits(where, links.edges[part]), model.logits(where, links.none[part]))
                    for part in ("val", "test")
                )
            best = max(best, (val, test), key=lambda pair: pair[0])
    upkeep.detach()
    return *best, sum(p.numel() for p in model.parameters() if p.requires_grad)


def compare(
    nodes: int = 1200, steps: int = 200, seeds: Sequence[int] = (0, 1, 2), rates: Sequence[float] = RATES
) -> list[str]:
    """The table's lines: each method in each space at the rate that is best in validation over the seeds."""
    trees = {seed: grow(nodes, seed) for seed in seeds}
    lines = [
        "| space | weights | trained | rate | validation AUC | test AUC | each seed |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for space in SPACES:
        for name, config in METHODS.items():
            tried = {lr: [train(trees[seed], space, config, lr, steps, seed) for seed in seeds] for lr in rates}
            lr = max(rates, key=lambda lr: sum(run[0] for run in tried[lr]))
            runs = tried[lr]
            val, test = (sum(run[i] for run in runs) / len(runs) for i in (0, 1))
            each = " ".join(f"{run[1]:.3f}" for run in runs)
            lines.append(f"| {space} | {name} | {runs[0][2]:,} | {lr:g} | {val:.3f} | {test:.3f} | {each} |")
            print(lines[-1], flush=True)
    return lines


def processor() -> str:
    """What the machine says of itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{found[0] if found else platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the table")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    lines = compare(chosen.nodes, chosen.steps, range(chosen.seeds))
    facts = [
        "# Links of a tree, in flat and in hyperbolic space\n",
        f"`python examples/hyperbolic_links.py --nodes {chosen.nodes} --steps {chosen.steps} --seeds {chosen.seeds}`\n",
        f"- processor: {processor()}, 1 thread used; {time.process_time() - begun:.0f} s of it in all",
        f"- python {platform.python_version()}, torch {torch.__version__}",
        f"- {chosen.nodes} nodes, rank {RANK} of layers {FEATURES} → {WIDTH} → {OUT}, rates tried {RATES}\n",
    ]
    if chosen.out is not None:
        chosen.out.write_text("\n".join([*facts, *lines, ""]))


if __name__ == "__main__":
    main()
