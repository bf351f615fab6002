"""Small models of any width: a block-wise network with all classes of parameters, and data for it."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from thinrank.optim import METHODS, LowRankConfig, MethodConfig, RankedConfig

VOCABULARY, TOKENS = 24, 12


class Block(nn.Module):
    """Two norms with a branch behind each; `hidden_act` inside the second."""

    def __init__(self, width, inner):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(width)
        self.mixer = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)

    def forward(self, h):
        h = h + self.mixer(self.mixer_norm(h).cumsum(1) / TOKENS)
        return h + self.down_proj(F.relu(self.up_proj(self.mlp_norm(h))))


class Net(nn.Module):
    """Embedding, blocks, norm, head; logits are divided by `divide`, as a rule of scale may ask for."""

    def __init__(self, width, depth=2, divide=1.0, seed=0, std=0.05):
        super().__init__()
        self.divide = divide
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(width, 2 * width) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        draw = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if not p.is_meta and p.ndim == 2:  # one scale for all, as `transformers` draws them
                values = torch.randn(p.shape, generator=draw)
                p.data.copy_(values if name.startswith("embed") else std * values)
            elif name.endswith("bias") and not p.is_meta:
                nn.init.zeros_(p)

    def forward(self, ids):
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
        return self.lm_head(self.norm(h)) / self.divide


def batch(step=0):
    draw = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(VOCABULARY, (4, TOKENS + 1), generator=draw)
    ids[:, 1::2] = (ids[:, 0:-1:2] * 5 + 3) % VOCABULARY  # something to learn
    return ids


def loss_of(model, step=0):
    ids = batch(step)
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(model, optimizer, steps):
    """Losses before each of so many steps."""
    losses = []
    for step in range(steps):
        loss = loss_of(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def small(name) -> MethodConfig:
    """The configuration of a method with rank 3 and gap 3 where it has any."""
    values: Any = {"rank": 3} if issubclass(METHODS[name], RankedConfig) else {}
    values |= {"update_proj_gap": 3} if issubclass(METHODS[name], LowRankConfig) else {}
    return METHODS[name](lr=0.02, weight_decay=0.01, **values)
