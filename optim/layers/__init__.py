"""Layers whose weights are made of factors: conversion, upkeep between steps, and back to dense weights."""

from thinrank.optim.layers.base import Layer, NotMergeable, ReparamConfig
from thinrank.optim.layers.convert import Conversion, convert, layers, merge, penalty, warmth
from thinrank.optim.layers.lorentz import LorentzLinear
from thinrank.optim.layers.loro import LORO
from thinrank.optim.layers.lost import LOST
from thinrank.optim.layers.lowrank import CoLA, LowRank
from thinrank.optim.layers.maestro import Maestro, shrink
from thinrank.optim.layers.relora import ReLoRA
from thinrank.optim.layers.sltrain import SLTrain
from thinrank.optim.layers.sst import SST
from thinrank.optim.layers.upkeep import Upkeep
from thinrank.optim.layers.welore import WeLore

REPARAMS: dict[str, type[ReparamConfig]] = {
    "none": ReparamConfig,
    "sst": SST,
    "lost": LOST,
    "lowrank": LowRank,
    "cola": CoLA,
    "sltrain": SLTrain,
    "loro": LORO,
    "relora": ReLoRA,
    "maestro": Maestro,
    "welore": WeLore,
}
"""The configuration of each kind of layers by name."""

__all__ = [
    "LORO",
    "LOST",
    "REPARAMS",
    "SST",
    "CoLA",
    "Conversion",
    "Layer",
    "LorentzLinear",
    "LowRank",
    "Maestro",
    "NotMergeable",
    "ReLoRA",
    "ReparamConfig",
    "SLTrain",
    "Upkeep",
    "WeLore",
    "convert",
    "layers",
    "merge",
    "penalty",
    "shrink",
    "warmth",
]
