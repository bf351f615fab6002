"""AdamW (Loshchilov & Hutter 2019): the dense rule, for vectors, embeddings, heads, and as the method to beat.

    m ← β1 m + (1−β1) g ;  v ← β2 v + (1−β2) g²
    w ← (1−η λ) w − η (m/(1−β1ᵗ)) / (sqrt(v/(1−β2ᵗ)) + ε)

The arithmetic is torch's own (`inner/elementwise.py`), so that it equals `torch.optim.AdamW(fused=True)`
to the bit and torch's other kernels up to rounding. Ours is only a learning rate for each role.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from thinrank.optim.methods.config import MethodConfig


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(MethodConfig):
    """torch's AdamW on every parameter, with a learning rate for each role."""

    name: str = field(default="adamw", metadata={"help": "method (chosen by `optimizer=…`)"})
