"""Ranks by one threshold on all spectra, found by halving an interval, float64. (Jaiswal et al. 2024.)

The threshold and its search are the paper's; the budget, bounds, rounding and hysteresis are ours.
"""


def halved(enough):
    """Thresholds nearly alike from -1 to 2, of which the first is not `enough` and the second is, as all above it."""
    low, high = -1.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return low, high


def kept(spectra, reduction):
    """How many values of each spectrum stay where as many as a share `reduction` of all allows go."""
    scaled = [
        [(s - min(each)) / (max(each) - min(each)) if max(each) > min(each) else 1.0 for s in each] for each in spectra
    ]
    values = [s for each in scaled for s in each]
    threshold, _ = halved(lambda k: sum(s < k for s in values) > reduction * len(values) + 1e-9)
    return [sum(s >= threshold for s in each) for each in scaled]


def welore(spectra, sides, budget, *, step=1, most=None, held=None, share=0.25):
    """Ranks in multiples of `step`, at least that, as many as `Σ r (m + n) ≤ budget` allows.

    `spectra`: all singular values, a list for each matrix; `sides`: its (m, n). `most`: no rank is above it. `held`:
    the ranks before, which stay where they would change by no more than `share`, if all that is within the budget.
    """
    scaled = [[s / max(each) if max(each) > 0 else s for s in each] for each in spectra]

    def ranks(threshold):
        counts = [sum(s >= threshold for s in each) for each in scaled]
        rounded = [step * int(count / step + 0.5) for count in counts]
        ends = [len(each) if most is None else min(most, len(each)) for each in scaled]
        return [min(max(r, step), end) for r, end in zip(rounded, ends, strict=True)]

    def fits(ranks):
        return sum(r * (m + n) for r, (m, n) in zip(ranks, sides, strict=True)) <= budget

    new = ranks(halved(lambda k: fits(ranks(k)))[1])
    if held is None:
        return new
    steady = [was if abs(now - was) <= share * was else now for was, now in zip(held, new, strict=True)]
    return steady if fits(steady) else new
