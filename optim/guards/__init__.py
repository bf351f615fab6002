"""Is a step a spike? Decisions on a few numbers of a step, without a trainer: numbers in, a verdict out.

A detector is told what is known of a step before it is made (`Reading`) and answers with a `Verdict`; `learn` then
takes the step into its statistics. Nothing here changes a weight, draws a random number or asks another process: equal
numbers give equal verdicts, on every rank and in every replay. All statistics are Python numbers.

    detector = ZScore()
    for batch in batches:
        loss = model(batch); loss.backward()
        reading = Reading(loss=float(loss), norm=float(clip_grad_norm_(model.parameters(), 1.0)))
        verdict = detector.judge(reading)
        detector.learn(reading, verdict)
        if verdict.spike:
            optimizer.zero_grad()
        optimizer.step()
"""

from thinrank.optim.guards.reading import Detector, Reading, Verdict
from thinrank.optim.guards.rolling import Rolling, SpikeScore, ZScore, is_outlier, mean_and_std
from thinrank.optim.guards.stable import StableRatio, update_ratio, update_ratios
from thinrank.optim.guards.zclip import WAYS, ZClip, zclip_limit

__all__ = [
    "WAYS",
    "Detector",
    "Reading",
    "Rolling",
    "SpikeScore",
    "StableRatio",
    "Verdict",
    "ZClip",
    "ZScore",
    "is_outlier",
    "mean_and_std",
    "update_ratio",
    "update_ratios",
    "zclip_limit",
]
