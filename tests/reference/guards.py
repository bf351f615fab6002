"""The rules for spikes over a whole series at once, plain loops on float64; slow on purpose.

OLMo's skip-step and spike score (Team OLMo 2024), ZClip (Kumar et al. 2025, algorithm 1), StableAdamW's RMS_t (Wortsman
et al. 2023, algorithm 2).
"""

import torch


def outliers(series, window=128, sigma=6.0):
    """For each value, whether it is more than `sigma` deviations above those before it."""
    found = []
    for i, value in enumerate(series):
        before = torch.tensor(series[max(0, i - window) : i], dtype=torch.float64)
        if len(before) < max(2, window // 2):
            found.append(False)
        else:
            std, mean = torch.std_mean(before)
            found.append(bool(value - mean > sigma * std))
    return found


def zclip(norms, threshold=2.5, decay=0.97, warmup=25, way="adaptive"):
    """For each norm, what it is clipped to (its own value where it is not), with mean and variance after it."""
    kept, mean, var = [], 0.0, 0.0
    for i, g in enumerate(norms):
        if i < warmup:
            kept.append(g)
            if i == warmup - 1:
                first = torch.tensor(norms[:warmup], dtype=torch.float64)
                mean, var = float(first.mean()), float(first.var(correction=0))
            continue
        s = var**0.5
        z = (g - mean) / (s + 1e-6)
        top = mean + threshold * s
        if way == "percentile":
            new = min(g, top)
        elif z > threshold:
            new = mean if way == "mean" else mean + threshold * threshold * s / z
        else:
            new = g
        kept.append(new)
        seen = min(g, new)
        mean = decay * mean + (1 - decay) * seen
        var = decay * var + (1 - decay) * (seen - mean) ** 2
    return kept, mean, var


def stable_ratios(grads, beta2, eps=1e-6):
    """RMS_t of a tensor for each of its gradients, with the paper's debiased decay β̂ₜ = β₂ (1 - β₂ᵗ⁻¹) / (1 - β₂ᵗ)."""
    v, found = torch.zeros_like(grads[0], dtype=torch.float64), []
    for t, g in enumerate(grads, 1):
        g = g.double()
        debiased = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
        v = debiased * v + (1 - debiased) * g * g
        found.append(float((g * g / v.clamp(min=eps * eps)).mean().sqrt()))
    return found
