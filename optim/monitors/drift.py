"""How far the shape of a spectrum has moved: distances between spectra scaled to a sum of one.

The normalised spectrum p = σ / Σσ settles early in training and marks the slow phase (arXiv 2605.26489, which names the
phenomenon; the two distances are ours to choose). They see the shape alone: not the size of the matrix, and not where
its directions point; a matrix turned at random has drifted by nothing (`intruders` sees that).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def l1_drift(s: Tensor, earlier: Tensor) -> Tensor:
    """Σ|p − p′|, from 0 to 2, of singular values (..., m) and (..., m′) by falling size; the shorter gets zeros."""
    p, q = _shares(s, earlier)
    return (p - q).abs().sum(-1)


def jensen_shannon_drift(s: Tensor, earlier: Tensor) -> Tensor:
    """Jensen and Shannon's divergence of p and p′ in bits, from 0 to 1; its root is a distance."""
    p, q = _shares(s, earlier)
    entropy = torch.special.entr
    divergence = entropy((p + q) / 2).sum(-1) - (entropy(p).sum(-1) + entropy(q).sum(-1)) / 2
    return (divergence / math.log(2)).clamp(0.0, 1.0)


def _shares(s: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
    """Both normalised, of one length; no numbers for a spectrum of zeros."""
    length = max(s.shape[-1], earlier.shape[-1])
    both = []
    for values in (s, earlier):
        x = values.detach().double().sort(-1, descending=True).values
        x = torch.nn.functional.pad(x, (0, length - x.shape[-1]))
        both.append(x / x.sum(-1, keepdim=True))
    return both[0], both[1]
