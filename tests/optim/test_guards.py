"""The detectors of spikes against the papers' rules, as plain loops over the whole series."""

import math
import random
from typing import Any

import pytest
import torch
from reference.guards import outliers, stable_ratios, zclip
from torch import nn

from thinrank.optim import GaLoreConfig, SubspaceAdamWConfig, build
from thinrank.optim.guards import (
    Reading,
    Rolling,
    SpikeScore,
    StableRatio,
    Verdict,
    ZClip,
    ZScore,
    is_outlier,
    mean_and_std,
    update_ratio,
    update_ratios,
    zclip_limit,
)


def series(count, spikes=(), seed=0):
    """A falling curve with noise, and spikes in it."""
    draw = random.Random(seed)
    return [2.0 + 1.0 / (1 + i / 50) + draw.gauss(0, 0.1) + (4.0 if i in spikes else 0.0) for i in range(count)]


def walked(detector, losses, norms):
    found = []
    for loss, norm in zip(losses, norms, strict=True):
        reading = Reading(loss=loss, norm=norm)
        verdict = detector.judge(reading)
        detector.learn(reading, verdict)
        found.append(verdict)
    return found


def test_mean_and_deviation_are_exact_and_know_no_order():
    assert mean_and_std([1.0, 2.0, 3.0, 4.0]) == (2.5, math.sqrt(5 / 3))
    values = [1e16, 1.0, -1e16, 3.0]
    assert mean_and_std(values) == mean_and_std(values[::-1])
    assert mean_and_std(values)[0] == 1.0  # a running sum would have lost the 1
    assert is_outlier(8.6, [1.0, 2.0, 3.0], 6.0)
    assert not is_outlier(8.0, [1.0, 2.0, 3.0], 6.0)  # exactly six
    assert not is_outlier(-100.0, [1.0, 2.0, 3.0], 6.0)


class TestZScore:
    def test_it_is_the_rule_of_the_paper_on_loss_or_norm(self):
        losses, norms = series(400, (60, 150, 151, 300)), series(400, (200, 300), seed=1)
        found = walked(ZScore(), losses, norms)
        either = [a or b for a, b in zip(outliers(losses), outliers(norms), strict=True)]
        assert [verdict.spike for verdict in found] == either
        assert [i for i, spike in enumerate(either) if spike] == [150, 151, 200, 300]  # 60: less than half a window

    def test_the_reason_names_what_stood_out(self):
        found = walked(ZScore(), series(200, (150,)), series(200, (150, 180), seed=1))
        assert (found[150].reason or "").startswith("the loss, ")
        assert " and the gradient norm, " in (found[150].reason or "")
        assert (found[180].reason or "").startswith("the gradient norm, ")
        assert found[180].limit is None

    def test_half_a_window_comes_first_and_judging_changes_nothing(self):
        detector = ZScore(window=8)
        for i in range(4):
            verdict = detector.judge(Reading(loss=1e9, norm=1e9))
            assert verdict == Verdict()
            detector.learn(Reading(loss=float(i), norm=float(i)), verdict)
        before = detector.state_dict()
        assert detector.judge(Reading(loss=1e9, norm=0.0)).spike
        assert detector.state_dict() == before

    def test_a_state_goes_on_as_if_it_had_not_been_saved(self):
        losses, norms = series(300, (250,)), series(300, (280,), seed=1)
        whole = walked(ZScore(), losses, norms)
        first, second = ZScore(), ZScore()
        walked(first, losses[:200], norms[:200])
        second.load_state_dict(first.state_dict())
        assert walked(second, losses[200:], norms[200:]) == whole[200:]

    def test_bad_settings(self):
        bad: list[tuple[dict[str, Any], str]] = [
            ({"window": 3}, "window must be"),
            ({"threshold": 0.0}, "threshold must be"),
        ]
        for settings, sentence in bad:
            with pytest.raises(ValueError, match=sentence):
                ZScore(**settings)


class TestZClip:
    @pytest.mark.parametrize("way", ["adaptive", "mean", "percentile"])
    def test_it_is_the_rule_of_the_paper(self, way):
        norms = series(300, (10, 90, 91, 200), seed=2)
        detector = ZClip(way=way)
        found = walked(detector, norms, norms)
        kept, mean, var = zclip(norms, way=way)
        for norm, verdict, expected in zip(norms, found, kept, strict=True):
            assert (norm if verdict.limit is None else verdict.limit) == pytest.approx(expected, rel=1e-12)
            assert verdict.spike == (expected < norm)
        assert (detector.mean, detector.var) == (pytest.approx(mean, rel=1e-12), pytest.approx(var, rel=1e-12))
        assert found[90].spike
        assert not found[10].spike  # warm-up

    def test_limits_in_closed_form(self):
        """μ = 1, s = 0.1: at z = 5 the adaptive limit is μ + 2.5² s / 5, and further out it comes closer to μ."""
        s = 0.1 - 1e-6  # so that s + 1e-6 is 0.1
        assert zclip_limit(1.5, 1.0, s * s, 2.5) == pytest.approx(1.0 + 6.25 * s / 5)
        assert zclip_limit(1.5, 1.0, s * s, 2.5, "mean") == 1.0
        assert zclip_limit(1.5, 1.0, s * s, 2.5, "percentile") == pytest.approx(1.0 + 2.5 * s)
        far, near = zclip_limit(9.0, 1.0, s * s, 2.5), zclip_limit(2.0, 1.0, s * s, 2.5)
        assert far is not None
        assert near is not None
        assert 1.0 < far < near
        for way in ("adaptive", "mean", "percentile"):
            assert zclip_limit(1.2, 1.0, s * s, 2.5, way) is None

    def test_a_limit_above_all_is_no_spike_and_not_in_the_statistics(self):
        norms = series(100, seed=3)
        capped, plain = ZClip(max_norm=0.5), ZClip()
        found = walked(capped, norms, norms)
        walked(plain, norms, norms)
        assert {verdict.limit for norm, verdict in zip(norms, found, strict=True) if norm > 0.5} == {0.5}
        assert capped.state_dict() == plain.state_dict()

    def test_a_state_goes_on_as_if_it_had_not_been_saved(self):
        norms = series(120, (60,), seed=4)
        whole = walked(ZClip(), norms, norms)
        for cut in (10, 50):
            first, second = ZClip(), ZClip()
            walked(first, norms[:cut], norms[:cut])
            second.load_state_dict(first.state_dict())
            assert walked(second, norms[cut:], norms[cut:]) == whole[cut:]

    def test_bad_settings(self):
        bad: list[dict[str, Any]] = [
            {"threshold": -1.0},
            {"decay": 1.0},
            {"warmup": 1},
            {"way": "median"},
            {"max_norm": 0.0},
        ]
        for settings in bad:
            with pytest.raises(ValueError, match=f"^{next(iter(settings))} must"):
                ZClip(**settings)


class TestSpikeScore:
    def test_it_counts_the_outliers_of_the_series(self):
        values = series(500, (150, 300, 301, 450))
        score, expected = SpikeScore(), outliers(values)
        assert [score.add(value) for value in values] == expected
        assert (score.total, score.score) == (sum(expected), sum(expected) / 500)
        assert score.rate == score.score
        again = SpikeScore()
        again.load_state_dict(score.state_dict())
        assert again.add(99.0)
        assert (again.total, again.seen) == (sum(expected) + 1, 501)

    def test_the_rate_forgets_and_the_score_does_not(self, monkeypatch):
        monkeypatch.setattr("thinrank.optim.guards.rolling.RATE_STEPS", 100)
        score = SpikeScore(window=16)
        for value in series(300, (50,)):
            score.add(value)
        assert (score.rate, score.score) == (0.0, 1 / 300)

    def test_a_new_one_is_zero(self):
        assert (SpikeScore().score, SpikeScore().rate) == (0.0, 0.0)

    def test_a_window_holds_no_more_than_its_values(self):
        rolling = Rolling(window=4)
        for value in range(10):
            rolling.add(float(value))
        assert rolling.values == [6.0, 7.0, 8.0, 9.0]


class TestStableRatio:
    @pytest.mark.parametrize("beta2", [0.9, 0.95, 0.999])
    def test_it_is_the_papers_ratio(self, beta2):
        draw = torch.Generator().manual_seed(0)
        grads = [torch.randn(6, 5, generator=draw) * (20.0 if t == 7 else 1.0) for t in range(10)]
        moment, found = torch.zeros(6, 5), []
        for t, grad in enumerate(grads):
            found.append(float(update_ratio(grad, moment, float(t), beta2=beta2)))
            moment = beta2 * moment + (1 - beta2) * grad.square()
        assert found == pytest.approx(stable_ratios(grads, beta2), rel=1e-5)
        assert found[0] == pytest.approx(1.0, rel=1e-6)
        for t, ratio in enumerate(found, 1):
            assert ratio <= math.sqrt((1 - beta2**t) / (1 - beta2)) * (1 + 1e-5)
        assert max(found) == found[7]

    def test_a_gradient_below_eps_is_no_spike(self):
        assert float(update_ratio(torch.full((4,), 1e-9), torch.zeros(4), 5.0, beta2=0.999)) < 1e-2

    def test_it_reads_torchs_moments_and_what_a_low_rank_state_has_of_them(self):
        """Embedding and vectors, which AdamW steps, are seen; a matrix in a basis is not, whatever shape its state."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(200, 32), nn.Linear(32, 32), nn.LayerNorm(32))
        tokens = torch.randint(0, 200, (4, 7))
        optimizers = {
            "torch": torch.optim.AdamW(model.parameters(), lr=0.0),
            "galore": build(model, GaLoreConfig(rank=32, lr=0.0)),  # its moments have the matrix's own shape
        }
        seen = {}
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = 1e-9
            for scale in (1.0, 1.0, 50.0):
                optimizer.zero_grad()
                (model(tokens).square().mean() * scale).backward()
                seen[name] = {key: float(value) for key, value in update_ratios(optimizer).items()}
                optimizer.step()
        assert len(seen["torch"]) == 5
        assert set(seen["galore"]) == {"0.weight", "1.bias", "2.weight", "2.bias"}
        assert seen["galore"]["2.weight"] > 1.7  # √3 is the most that there is in the third step

    def test_eight_bit_codes_give_what_their_values_would(self):
        torch.manual_seed(0)
        found = []
        for bits in (32, 8):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Embedding(300, 32), nn.Linear(32, 8))
            optimizer = build(model, SubspaceAdamWConfig(rank=4, lr=1e-9, state_bits=bits))
            for scale in (1.0, 1.0, 9.0):
                optimizer.zero_grad()
                (model(torch.arange(300)).square().mean() * scale).backward()
                ratios = update_ratios(optimizer)
                optimizer.step()
            found.append(float(ratios["0.weight"]))
            assert ("exp_avg_sq_codes" in optimizer.state[next(model.parameters())]) == (bits == 8)
        assert found[1] == pytest.approx(found[0], rel=0.05)  # 8 bits: a level is within 2 % or so of a value

    def test_the_worst_tensor_decides_and_is_named(self):
        reading = Reading(loss=1.0, norm=1.0, ratios={"a": 1.2, "b": 2.4, "c": 2.3})
        assert "of b is 2.40 times" in (StableRatio().judge(reading).reason or "")
        assert not StableRatio(2.5).judge(reading).spike
        assert not StableRatio().judge(Reading(loss=9.0, norm=9.0)).spike
        with pytest.raises(ValueError, match="threshold must be above 1"):
            StableRatio(1.0)
