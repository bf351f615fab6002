"""thinrank: distributed, training-time low-rank optimization for large models."""

__version__ = "0.1.0"
