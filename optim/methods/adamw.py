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
    """torch's AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) on every parameter, with a rate for each role.

    Defaults: lr=0.001, betas=(0.9, 0.999) and eps=1e-08 are the paper's on Adam (Kingma & Ba 2015) and torch's;
    weight_decay=0.0 is ours (torch's is 0.01).

    Equations and shapes: `thinrank.optim.methods.adamw`.
    """

    name: str = field(default="adamw", metadata={"help": "method (chosen by `optimizer=…`)"})
