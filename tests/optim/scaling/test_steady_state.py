"""Fits against laws that are known, and AdamW's balance against its formulas."""

import math

import pytest
import torch

from thinrank.optim import AdamW
from thinrank.optim.scaling import (
    PowerLines,
    angular_update,
    coupled_decay,
    decay_clock,
    decay_exponent,
    drift,
    ema_timescale,
    equilibrium_rms,
    fit_wd_exponent,
    gain_slope,
    independent_decay,
    instant_update_rms,
    noise_top_sigma,
    power_slope,
    sigma_slope,
    spectral_bound,
)

WIDTHS = [64, 128, 256, 512]


def settled(width, lr, decay, gradient, steps=None, betas=(0.9, 0.95)):
    """A square weight after AdamW has come to its balance, from zero."""
    weight = torch.nn.Parameter(torch.zeros(width, width))
    optimizer = AdamW([weight], lr=lr, weight_decay=decay, betas=betas)
    for _ in range(steps or round(4 / (lr * decay))):
        weight.grad = gradient(width)
        optimizer.step()
    return weight.detach()


def noise(seed):
    draw = torch.Generator().manual_seed(seed)
    return lambda width: torch.randn(width, width, generator=draw)


def skewed(seed, samples=8):
    """Outer products of inputs and errors whose covariances have eigenvalues 1/k, in bases that Adam does not see."""
    draw = torch.Generator().manual_seed(seed)
    bases = {}

    def gradient(width):
        if width not in bases:
            scale = torch.arange(1, width + 1, dtype=torch.float32) ** -0.5
            turns = (torch.linalg.qr(torch.randn(width, width, generator=draw))[0] for _ in range(2))
            bases[width] = [scale[:, None] * turn for turn in turns]
        left, right = (torch.randn(samples, width, generator=draw) @ basis for basis in bases[width])
        return left.T @ right / samples

    return gradient


# --- fits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.5, 0.75, 1.0])
def test_an_exact_law_is_found(p):
    eta, lam = [1e-3 * 64 / d for d in WIDTHS], [0.1 * (d / 64) ** 0.3 for d in WIDTHS]
    sigma = [2.5 * math.sqrt(a / b) * d**p for d, a, b in zip(WIDTHS, eta, lam, strict=True)]
    found = fit_wd_exponent(WIDTHS, sigma, eta, lam)
    assert found.p == pytest.approx(p, abs=1e-9)
    assert found.exponent == pytest.approx(2 * p - 1, abs=1e-9)
    assert found.r2 == pytest.approx(1.0)
    assert found.error < 1e-9


def test_the_standard_error_covers_noise():
    draw = torch.Generator().manual_seed(3)
    misses = 0
    for _ in range(50):
        wobble = (0.05 * torch.randn(12, generator=draw)).tolist()
        widths = WIDTHS * 3
        sigma = [d**0.75 * math.exp(w) for d, w in zip(widths, wobble, strict=True)]
        found = fit_wd_exponent(widths, sigma, 1.0, 1.0)
        misses += abs(found.p - 0.75) > 2 * found.error
    assert misses <= 8  # a 2-sigma interval with ten degrees of freedom misses 7 % of the time


def test_the_general_law():
    """2p − a: √d for p = ¾, d for p = 1, none for p = ½, and another one for another rule of the rate."""
    assert [decay_exponent(p) for p in (0.5, 0.75, 1.0)] == [0.0, 0.5, 1.0]
    assert decay_exponent(0.75, lr_width_exp=0.5) == 1.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([64, 128], [1.0, 2.0], 1.0, 1.0), "needs at least 3 widths, got 2"),
        (([64, 128, 128], [1.0, 2.0, 2.0], 1.0, 1.0), "got 2"),
        (([64, 128, 256], [1.0, 2.0, 3.0], 1.0, 0.0), "without decay there is no balance"),
        (([64, 128, 256], [1.0, 2.0, 3.0], [1.0], 1.0), "eta must be one number or 3"),
        (([64, 128, 256], [1.0, math.nan, 3.0], 1.0, 1.0), "finite values above 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        fit_wd_exponent(*arguments)


def test_slopes_pass_or_warn_with_the_corrected_exponent():
    kept = sigma_slope(WIDTHS, [3.0, 3.1, 2.9, 3.0], 0.5)
    assert (kept.verdict, kept.passes) == ("PASS", True)
    grows = sigma_slope(WIDTHS, [d**0.25 for d in WIDTHS], 0.5)
    assert grows.verdict == "WARN"
    assert grows.corrected == pytest.approx(1.0)  # σ ∝ λ^(−½): the decay must grow by twice that
    assert gain_slope(WIDTHS, [d**-0.5 for d in WIDTHS]).verdict == "WARN"
    assert power_slope([1, 2], [1, 4]).error == math.inf


# --- balance ----------------------------------------------------------------------------------------------------------


def test_noise_settles_where_the_formula_says():
    """RMS 0.067 and σ_top 1.02, 1.48, 2.11 at 64, 128, 256: measured once elsewhere; 2√d rms by formula."""
    for width, sigma in ((64, 1.02), (128, 1.48), (256, 2.11)):
        weight = settled(width, 1e-2, 1.0, noise(width), steps=500)
        rms = float(weight.square().mean().sqrt())
        assert rms == pytest.approx(0.067, rel=0.05)
        assert rms == pytest.approx(equilibrium_rms(1e-2, 1.0), rel=0.1)
        top = float(torch.linalg.matrix_norm(weight, 2))
        assert top == pytest.approx(sigma, rel=0.07)
        assert top == pytest.approx(noise_top_sigma(width, width, rms), rel=0.07)


def test_sigma_follows_the_root_of_rate_over_decay():
    """The same over rates and decays, with gradients of a falling spectrum; and the drift check says so."""
    pairs = [(1e-2, 1.0), (2e-2, 2.0), (1e-2, 2.0), (2e-2, 1.0)]
    tops = [float(torch.linalg.matrix_norm(settled(128, lr, decay, skewed(5)), 2)) for lr, decay in pairs]
    units = [top / math.sqrt(lr / decay) for top, (lr, decay) in zip(tops, pairs, strict=True)]
    mean = sum(units) / len(units)
    assert all(abs(unit / mean - 1) < 0.12 for unit in units), units
    found = drift([lr for lr, _ in pairs], [decay for _, decay in pairs], tops)
    assert found.slope.value == pytest.approx(0.5, abs=0.15)
    assert not found.dominated


def test_a_gradient_that_persists_is_seen_as_drift():
    """σ → ‖Ū‖/λ, whatever the rate is."""
    pairs = [(5e-3, 1.0), (1e-2, 1.0), (2e-2, 1.0)]
    fixed = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    tops = [float(torch.linalg.matrix_norm(settled(32, lr, d, lambda width: fixed), 2)) for lr, d in pairs]
    assert drift([lr for lr, _ in pairs], [decay for _, decay in pairs], tops).dominated
    assert max(tops) <= spectral_bound(1.0, float(torch.linalg.matrix_norm(fixed.sign(), 2))) * 1.01


def test_the_exponent_of_updates_in_few_directions_is_twice_that_of_noise():
    """Why √d is a default, and no law: p is ½ for noise, and 1 where a fixed number of directions has all the energy.

    The largest singular value of the latter goes up and down for as long as training lasts, hence means of three.
    """

    def few(seed):
        draw, sides = torch.Generator().manual_seed(seed), {}

        def gradient(width):
            if width not in sides:
                sides[width] = [torch.randn(8, width, generator=draw) for _ in range(2)]
            left, right = sides[width]
            return left.T @ torch.randn(8, 8, generator=draw) @ right

        return gradient

    widths = [32, 64, 128]
    found = {}
    for name, kind in (("noise", noise), ("few", few)):
        tops = [
            sum(float(torch.linalg.matrix_norm(settled(d, 2e-2, 1.0, kind(1000 * i + d)), 2)) for i in range(3)) / 3
            for d in widths
        ]
        found[name] = fit_wd_exponent(widths, tops, 2e-2, 1.0).p
    assert found["noise"] == pytest.approx(0.5, abs=0.06)
    assert found["few"] == pytest.approx(1.0, abs=0.2)


def test_rotation_and_the_size_of_a_step():
    """Measured on noise in balance, for β₁ = 0.9: 0.229 η an entry, and that over the weight's RMS as an angle."""
    lr, decay = 1e-2, 1.0
    draw = noise(7)
    weight = torch.nn.Parameter(settled(96, lr, decay, draw, betas=(0.9, 0.95)))
    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=decay, betas=(0.9, 0.95))
    before = weight.detach().clone()
    for _ in range(60):
        before = weight.detach().clone()
        weight.grad = draw(96)
        optimizer.step()
    change = weight.detach() - before * (1 - lr * decay)
    assert float(change.square().mean().sqrt()) == pytest.approx(instant_update_rms(lr, 0.9), rel=0.08)
    cosine = float((before * weight.detach()).sum() / before.norm() / weight.detach().norm())
    assert math.acos(cosine) == pytest.approx(angular_update(lr, decay, 0.9), rel=0.12)


# --- time scales and the meanings of decay ----------------------------------------------------------------------------


def test_clock_timescale_and_conversion():
    assert decay_clock([0.1, 0.2, 0.3], 0.5) == pytest.approx(0.3)
    assert decay_clock([0.1, 0.2], [1.0, 2.0]) == pytest.approx(0.5)
    # half a million tokens a step over 100 billion: 16 667 steps of 200 000
    assert ema_timescale(0.5e6, 6e-4, 0.1, 100e9) == pytest.approx(1 / 12, rel=1e-6)
    assert coupled_decay(independent_decay(0.1, 3e-3), 3e-3) == pytest.approx(0.1)
    # an independent decay that stays, with rates ∝ 1/d, is a coupled one ∝ d
    assert coupled_decay(1e-4, 1e-3 / 4) == pytest.approx(4 * coupled_decay(1e-4, 1e-3))


def test_power_lines():
    """λ grows as the batch and is the inverse of the time scale; the multiplier says the same from a base."""
    lines = PowerLines()
    base = {"batch_tokens": 1e5, "lr": 1e-3, "tokens": 2e10, "parameters": 1e9}
    lam = lines.best_decay(**base)
    assert ema_timescale(1e5, 1e-3, lam, 2e10) == pytest.approx(lines.best_timescale(2e10, 1e9))
    assert lines.best_decay(**{**base, "batch_tokens": 2e5}) == pytest.approx(2 * lam)
    more = lines.best_decay(**{**base, "tokens": 8e10, "batch_tokens": 2e5})
    assert more == pytest.approx(lam * lines.decay_multiplier(batch=2, tokens=4, tokens_per_parameter=4))
    assert lines.critical_batch(1e10) > lines.best_batch(1e10)
    with pytest.raises(ValueError, match="timescale_exp"):
        PowerLines(timescale_exp=0.5)
