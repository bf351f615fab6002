"""Small models with linear layers of every kind, for tests of layers that replace them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, OPTConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.opt.modeling_opt import OPTForCausalLM
from transformers.pytorch_utils import Conv1D

VOCAB = 37
IDS = torch.arange(10)[None] * 5 % VOCAB


class Net(nn.Module):
    """Linear layers that are tall, wide and square, with and without a bias, and one that stores (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = nn.Linear(6, 10)
        self.wide = nn.Linear(10, 5, bias=False)
        self.square = nn.Linear(5, 5)
        self.turned = Conv1D(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.wide(torch.tanh(self.tall(x))))
        return self.turned(torch.tanh(self.square(x)))


LAYERS = ("tall", "wide", "square", "turned")


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    model = Net().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / 2)  # Conv1D begins with tiny weights
    return model


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def llama(kv_heads: int = 4, **more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        initializer_range=0.3,
        **more,
    )
    return _random_biases(LlamaForCausalLM(config))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    return _random_biases(GPT2LMHeadModel(config))


def opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        word_embed_proj_dim=32,
        init_std=0.3,
    )
    return _random_biases(OPTForCausalLM(config))


def _random_biases(model: Any) -> Any:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.copy_(torch.randn_like(p) / 4)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits
