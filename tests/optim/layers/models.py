"""Small models of every kind of linear layer, and training runs that a test can afford."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from thinrank.optim import AdamWConfig, build
from thinrank.optim import layers as converted
from thinrank.optim.layers import Upkeep

VOCABULARY = 40


def language_model(kind: str = "llama", seed: int = 0, **settings: Any) -> Any:
    """A tiny causal language model of `transformers`: llama (GQA), tied, gpt2 (Conv1D), opt (biases)."""
    import transformers

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
    llama = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=24, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **settings,
        )  # fmt: skip
    elif kind == "opt":
        config = transformers.OPTConfig(
            **sizes, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=24,
            dropout=0.0, **settings,
        )  # fmt: skip
    else:
        config = transformers.LlamaConfig(
            **sizes, **llama, num_key_value_heads=2, tie_word_embeddings=kind == "tied", **settings
        )
    return transformers.AutoModelForCausalLM.from_config(config)


class Mlp(nn.Module):
    """Wide, tall and square linear layers, with and without bias, for float64."""

    up: Any
    square: Any
    down: Any
    last: Any

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.square = nn.Linear(6, 10), nn.Linear(10, 10, bias=False)
        self.down, self.last = nn.Linear(10, 6), nn.Linear(6, 6, bias=False)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.down(torch.tanh(self.square(torch.tanh(self.up(x))))))


def layers(model: nn.Module) -> dict[str, Any]:
    """The converted layers of a model by name."""
    return dict(converted.layers(model))


def batch(step: int, rows: int = 8, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.sin(2 * x.flip(-1)).to(dtype)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x, y = batch(step, dtype=next(model.parameters()).dtype)
    return F.mse_loss(model(x), y)


def train(model: nn.Module, optimizer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def prepared(model: nn.Module, config: Any = None, seed: int = 0) -> tuple[Any, Upkeep]:
    optimizer = build(model, config or AdamWConfig(lr=1e-2))
    return optimizer, Upkeep(model, optimizer, seed=seed)
