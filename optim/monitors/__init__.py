"""Measures of weights, activations and updates: pure functions of tensors that change nothing they are given."""

from thinrank.optim.monitors.alignment import Alignment, AlignmentAlarm, Verdict
from thinrank.optim.monitors.bulk import (
    Bulk,
    bulk,
    correlation_trap,
    fitted_bulk,
    kurtosis,
    marchenko_pastur_quantile,
)
from thinrank.optim.monitors.drift import jensen_shannon_drift, l1_drift
from thinrank.optim.monitors.erg import erg_count
from thinrank.optim.monitors.farms import farms_alpha, farms_tail, pooled_eigenvalues
from thinrank.optim.monitors.intruders import Intruders, intruder_dimensions, intruders, left_vectors, new_directions
from thinrank.optim.monitors.report import ReportConfig, spectral_report
from thinrank.optim.monitors.spectrum import eigenvalues, product_singular_values, singular_values
from thinrank.optim.monitors.summaries import (
    condition,
    condition_quantile,
    effective_rank,
    entropy_rank,
    log_volume,
    nuclear_norm,
    select_by_condition,
    stable_rank,
)
from thinrank.optim.monitors.tail import (
    PowerLaw,
    Tail,
    alpha_weighted,
    hill,
    hill_alpha,
    log_alpha_norm,
    power_law,
)
from thinrank.optim.monitors.tracker import Piece, SpectrumTracker, Triple

__all__ = [
    "Alignment",
    "AlignmentAlarm",
    "Bulk",
    "Intruders",
    "Piece",
    "PowerLaw",
    "ReportConfig",
    "SpectrumTracker",
    "Tail",
    "Triple",
    "Verdict",
    "alpha_weighted",
    "bulk",
    "condition",
    "condition_quantile",
    "correlation_trap",
    "effective_rank",
    "eigenvalues",
    "entropy_rank",
    "erg_count",
    "farms_alpha",
    "farms_tail",
    "fitted_bulk",
    "hill",
    "hill_alpha",
    "intruder_dimensions",
    "intruders",
    "jensen_shannon_drift",
    "kurtosis",
    "l1_drift",
    "left_vectors",
    "log_alpha_norm",
    "log_volume",
    "marchenko_pastur_quantile",
    "new_directions",
    "nuclear_norm",
    "pooled_eigenvalues",
    "power_law",
    "product_singular_values",
    "select_by_condition",
    "singular_values",
    "spectral_report",
    "stable_rank",
]
