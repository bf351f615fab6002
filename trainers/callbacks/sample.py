"""Text from a model, to look at: the same for the same weights, prompt and seed, whatever was drawn before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def sample_text(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    seed: int,
    *,
    temperature: float = 0.8,
) -> str:
    """Continue a prompt token by token.

    The draw uses a generator of its own on the CPU, so that neither the global random state nor the device matters to
    it. Each token costs a whole forward pass over at most `max_position_embeddings` tokens, which is fine for a sample.

    Args:
        model: a causal language model; its mode (train or eval) is restored afterwards.
        tokenizer: of `transformers`, or anything with `encode(text, add_special_tokens=False)`, `decode(ids)`,
            `eos_token_id`.
        prompt: text to continue; an empty one starts from the end-of-text token, as documents do in training.
        max_new_tokens: at most so many tokens; an end-of-text token ends the text earlier.
        seed: of the draw.
        temperature: the logits are divided by it; 0 takes the most likely token.

    Returns:
        The prompt and what follows, without the end-of-text token.

    Raises:
        ValueError: a negative temperature or length, or an empty prompt for a tokenizer without an end-of-text token.
    """
    if temperature < 0 or max_new_tokens < 0:
        raise ValueError(
            f"temperature and max_new_tokens must be at least 0, got {temperature} and {max_new_tokens}: "
            f"use 0 for greedy decoding or no new tokens"
        )
    end = tokenizer.eos_token_id
    ids = list(tokenizer.encode(prompt, add_special_tokens=False))
    start = len(ids)
    if not ids:
        if end is None:
            raise ValueError("prompt must not be empty for a tokenizer without an end-of-text token: give some text")
        ids, start = [end], 1
    device = next(model.parameters()).device
    window = getattr(model.config, "max_position_embeddings", None) or len(ids) + max_new_tokens
    generator = torch.Generator(device="cpu").manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            seen = torch.tensor([ids[-window:]], device=device)
            logits = model(input_ids=seen, use_cache=False).logits[0, -1].float().cpu()
            token = int(_draw(logits, temperature, generator))
            if token == end:
                break
            ids.append(token)
    finally:
        model.train(was_training)
    return prompt + tokenizer.decode(ids[start:])


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """One token id from logits (V,)."""
    if temperature == 0:
        return logits.argmax()
    return torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
