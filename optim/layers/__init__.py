"""Layers whose weights are made of factors: conversion, upkeep between steps, and back to dense weights."""

from thinrank.optim.layers.base import Layer, NotMergeable, ReparamConfig
from thinrank.optim.layers.clover import CLOVER
from thinrank.optim.layers.convert import Conversion, convert, layers, merge, penalty, warmth
from thinrank.optim.layers.lorentz import LorentzLinear
from thinrank.optim.layers.loro import LORO
from thinrank.optim.layers.lost import LOST
from thinrank.optim.layers.lowrank import CoLA, LowRank
from thinrank.optim.layers.maestro import Maestro, shrink
from thinrank.optim.layers.qr_lora import QRLoRA
from thinrank.optim.layers.relora import ReLoRA
from thinrank.optim.layers.sltrain import SLTrain
from thinrank.optim.layers.sorsa import SORSA
from thinrank.optim.layers.spectral_adapter import SpectralAdapter
from thinrank.optim.layers.sst import SST
from thinrank.optim.layers.svfit import SVFit
from thinrank.optim.layers.svft import SVFT
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
    "sorsa": SORSA,
    "svfit": SVFit,
    "svft": SVFT,
    "spectral_adapter": SpectralAdapter,
    "qr_lora": QRLoRA,
    "clover": CLOVER,
}
"""The configuration of each kind of layers by name."""

__all__ = [
    "CLOVER",
    "LORO",
    "LOST",
    "REPARAMS",
    "SORSA",
    "SST",
    "SVFT",
    "CoLA",
    "Conversion",
    "Layer",
    "LorentzLinear",
    "LowRank",
    "Maestro",
    "NotMergeable",
    "QRLoRA",
    "ReLoRA",
    "ReparamConfig",
    "SLTrain",
    "SVFit",
    "SpectralAdapter",
    "Upkeep",
    "WeLore",
    "convert",
    "layers",
    "merge",
    "penalty",
    "shrink",
    "warmth",
]
