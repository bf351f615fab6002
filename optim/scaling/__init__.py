"""Rules of scale: what learning rate, decay, initial weights and forward factors become where a model grows."""

from thinrank.optim.scaling.classes import Member, ParameterClass, classify
from thinrank.optim.scaling.config import PRESETS, ScalingConfig
from thinrank.optim.scaling.coordinates import CoordinateCheck, coordinate_check
from thinrank.optim.scaling.equilibrium import (
    PowerLines,
    angular_update,
    coupled_decay,
    decay_clock,
    ema_timescale,
    equilibrium_rms,
    independent_decay,
    instant_update_rms,
    noise_top_sigma,
    spectral_bound,
)
from thinrank.optim.scaling.fit import (
    DecayFit,
    Drift,
    Match,
    Slope,
    decay_exponent,
    drift,
    fit_wd_exponent,
    gain_slope,
    power_slope,
    sigma_slope,
)
from thinrank.optim.scaling.gains import Gains, matrix_kind, measure_gains, top_sigma
from thinrank.optim.scaling.rule import Scaling, multipliers, scale_init, scaling_of

__all__ = [
    "PRESETS",
    "CoordinateCheck",
    "DecayFit",
    "Drift",
    "Gains",
    "Match",
    "Member",
    "ParameterClass",
    "PowerLines",
    "Scaling",
    "ScalingConfig",
    "Slope",
    "angular_update",
    "classify",
    "coordinate_check",
    "coupled_decay",
    "decay_clock",
    "decay_exponent",
    "drift",
    "ema_timescale",
    "equilibrium_rms",
    "fit_wd_exponent",
    "gain_slope",
    "independent_decay",
    "instant_update_rms",
    "matrix_kind",
    "measure_gains",
    "multipliers",
    "noise_top_sigma",
    "power_slope",
    "scale_init",
    "scaling_of",
    "sigma_slope",
    "spectral_bound",
    "top_sigma",
]
