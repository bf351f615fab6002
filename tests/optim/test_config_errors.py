"""Bad values are refused at construction, in a sentence that names the field and the rule."""

import math
from dataclasses import MISSING, fields
from typing import Any

import pytest
import torch
from torch import nn

from thinrank.optim import (
    METHODS,
    OPTIMIZERS,
    AdamWConfig,
    ApolloConfig,
    ApolloMiniConfig,
    AuONConfig,
    DCTAdamWConfig,
    Dion2Config,
    DionConfig,
    FiraConfig,
    GaLore,
    GaLoreConfig,
    GaLorePlusConfig,
    LDAdamConfig,
    MFACConfig,
    MuonConfig,
    SubspaceAdamWConfig,
    TrionConfig,
    build,
)
from thinrank.optim.optimizers import RankedGroups

BAD: list[tuple[type, dict[str, Any], str]] = [
    (AdamWConfig, {"lr": -1.0}, r"lr must be a number at least 0, got -1"),
    (AdamWConfig, {"lr": math.nan}, r"lr must be a number at least 0, got nan"),
    (AdamWConfig, {"lr": "1e-3"}, r"lr must be a number at least 0, got '1e-3'"),
    (AdamWConfig, {"embedding_lr": -1.0}, r"embedding_lr must be a number at least 0"),
    (AdamWConfig, {"betas": (0.9, 1.0)}, r"betas must be below 1"),
    (AdamWConfig, {"betas": (-0.1, 0.9)}, r"betas must be a number at least 0"),
    (AdamWConfig, {"betas": (0.9,)}, r"betas must be two numbers"),
    (AdamWConfig, {"eps": -1e-8}, r"eps must be a number at least 0"),
    (AdamWConfig, {"weight_decay": math.inf}, r"weight_decay must be a number at least 0"),
    (AdamWConfig, {"state_bits": 16}, r"state_bits must be 32 or 8, got 16"),
    (AdamWConfig, {"half_weights": "masters"}, r"half_weights must be one of .*did you mean 'master'"),
    (GaLoreConfig, {"state_bits": "8"}, r"state_bits must be 32 or 8, got '8'"),
    (GaLoreConfig, {"rank": 0}, r"rank must be at least 1 .* or a fraction .*, got 0"),
    (GaLoreConfig, {"rank": -4}, r"rank must be at least 1 .*, got -4"),
    (GaLoreConfig, {"rank": 1.5}, r"rank must be at least 1 .*, got 1\.5"),
    (GaLoreConfig, {"rank": "8"}, r"rank must be at least 1 .*, got '8'"),
    (GaLoreConfig, {"rank": math.nan}, r"rank must be at least 1 .*, got nan"),
    (GaLoreConfig, {"rank": True}, r"rank must be at least 1 .*, got True"),
    (GaLoreConfig, {"update_proj_gap": 0}, r"update_proj_gap must be at least 1 step, got 0"),
    (GaLoreConfig, {"update_proj_gap": 2.5}, r"update_proj_gap must be at least 1 step, got 2\.5"),
    (GaLoreConfig, {"update_proj_gap": True}, r"update_proj_gap must be at least 1 step, got True"),
    (GaLoreConfig, {"scale": math.inf}, r"scale must be a number"),
    (GaLoreConfig, {"proj_type": "rigth"}, r"proj_type must be one of .*did you mean 'right'"),
    (GaLoreConfig, {"svd": "exakt"}, r"svd must be one of .*did you mean 'exact'"),
    (GaLoreConfig, {"proj_type": "full", "svd": "power"}, r"proj_type='full' needs svd='exact'"),
    (GaLoreConfig, {"projection_dtype": "fp16"}, r"projection_dtype must be one of float32, bfloat16"),
    (DCTAdamWConfig, {"basis": "dctt"}, r"basis must be one of .*did you mean 'dct'"),
    (DCTAdamWConfig, {"norm": "l3"}, r"norm must be one of l1, l2"),
    (DCTAdamWConfig, {"error_feedback": "2bit"}, r"error_feedback must be one of off, full, 8bit, 4bit"),
    (DCTAdamWConfig, {"engine": "fft", "basis": "hadamard"}, r"engine='fft' computes the DCT alone"),
    (
        DCTAdamWConfig,
        {"residual": "sign", "error_feedback": "full"},
        r"error_feedback='full' keeps for later what resid",
    ),
    (LDAdamConfig, {"rank": 0}, r"rank must be at least 1 .* or a fraction .*, got 0"),
    (LDAdamConfig, {"rho": 1.5}, r"rho must be a number at least 0 and at most 1, got 1\.5"),
    (LDAdamConfig, {"error_feedback": "ful"}, r"error_feedback must be one of .*did you mean 'full'"),
    (LDAdamConfig, {"svd": "exakt"}, r"svd must be one of .*did you mean 'exact'"),
    (LDAdamConfig, {"negative_variance": "abs"}, r"negative_variance must be one of zero, absolute"),
    (MFACConfig, {"window": 0}, r"window must be at least 1 gradient, got 0"),
    (MFACConfig, {"window": 2.5}, r"window must be at least 1 gradient, got 2\.5"),
    (MFACConfig, {"damping": 0.0}, r"damping must be a number above 0, got 0\.0"),
    (MFACConfig, {"finish": "momentun"}, r"finish must be one of .*did you mean 'momentum'"),
    (MFACConfig, {"space": "hole"}, r"space must be one of .*did you mean 'whole'"),
    (FiraConfig, {"proj_type": "full"}, r"proj_type='full' leaves no rows .*: choose std, left or right"),
    (FiraConfig, {"transport": "rotat"}, r"transport must be one of .*did you mean 'rotate'"),
    (FiraConfig, {"residual_limit": 0.99}, r"residual_limit must be a number at least 1"),
    (ApolloConfig, {"proj": "randon"}, r"proj must be one of random, svd, .*did you mean 'random'"),
    (ApolloConfig, {"proj_type": "full"}, r"proj_type must be one of std, reverse_std, left, right, got 'full'"),
    (ApolloConfig, {"scale_type": "chanel"}, r"scale_type must be one of .*did you mean 'channel'"),
    (ApolloConfig, {"scale": -1.0}, r"scale must be a number at least 0"),
    (ApolloConfig, {"update_limit": 0.5}, r"update_limit must be a number at least 1"),
    (ApolloConfig, {"disable_nl": 1}, r"disable_nl must be true or false, got 1"),
    (ApolloConfig, {"scale_front": "yes"}, r"scale_front must be true or false, got 'yes'"),
    (ApolloConfig, {"stagger": True}, r"stagger spreads factorisations, got proj='random'.*: use stagger=False"),
    (ApolloConfig, {"lazy_overlap": 0.4}, r"lazy_overlap=0\.4 compares subspaces, got proj='random'.*: leave it out"),
    (GaLoreConfig, {"lazy_overlap": 0.0}, r"lazy_overlap must be a number above 0 and at most 1, got 0\.0"),
    (GaLoreConfig, {"lazy_overlap": 1.5}, r"lazy_overlap must be a number above 0 and at most 1, got 1\.5"),
    (ApolloMiniConfig, {"rank": 0}, r"rank must be at least 1 .*, got 0"),
    (SubspaceAdamWConfig, {"residual": "ful"}, r"residual must be one of .*did you mean 'full'"),
    (SubspaceAdamWConfig, {"residual_limit": 0.5}, r"residual_limit must be a number at least 1"),
    (SubspaceAdamWConfig, {"transport": "rotat"}, r"transport must be one of .*did you mean 'rotate'"),
    (GaLorePlusConfig, {"density": 1.5}, r"density must be a number at least 0 and at most 1, got 1\.5"),
    (GaLorePlusConfig, {"density": -0.1}, r"density must be a number at least 0"),
    (GaLorePlusConfig, {"warmup": -1}, r"warmup must be a whole number of at least 0 steps, got -1"),
    (GaLorePlusConfig, {"warmup": 2.5}, r"warmup must be a whole number of at least 0 steps, got 2\.5"),
    (GaLorePlusConfig, {"reselect": "renewel"}, r"reselect must be one of never, renewal.*did you mean 'renewal'"),
    (GaLorePlusConfig, {"heads": 0, "proj_type": "right"}, r"heads must be at least 1"),
    (GaLorePlusConfig, {"heads": 4}, r"heads need proj_type='right'.*got 'std'"),
    (GaLorePlusConfig, {"head_select": "max"}, r"head_select must be one of max_norm, random, round_robin"),
    (GaLorePlusConfig, {"proj_type": "full"}, r"proj_type must be one of std, reverse_std, left, right, got 'full'"),
    (GaLorePlusConfig, {"svd": "powr"}, r"svd must be one of .*did you mean 'power'"),
    (GaLorePlusConfig, {"convention": "torch"}, r"convention must be one of adamw, galore"),
    (GaLorePlusConfig, {"cross_heads": ["q", "w"]}, r"cross_heads must be one of q, k, v, o, got 'w'"),
    (GaLorePlusConfig, {"cross_heads": "qk"}, r"cross_heads must be a list of q, k, v, o, got 'qk'"),
    (MuonConfig, {"momentum": 1.0}, r"momentum must be below 1, got 1"),
    (MuonConfig, {"momentum": -0.1}, r"momentum must be a number at least 0"),
    (MuonConfig, {"nesterov": 1}, r"nesterov must be true or false, got 1"),
    (MuonConfig, {"orthogonalizer": "jordon"}, r"orthogonalizer must be one of .*did you mean 'jordan'"),
    (MuonConfig, {"ns_dtype": "float16"}, r"ns_dtype must be one of auto, float32, bfloat16, got 'float16'"),
    (MuonConfig, {"adjust_lr": "match_rms"}, r"adjust_lr must be one of .*did you mean 'match_rms_adamw'"),
    (AuONConfig, {"newton_schulz_steps": 6}, r"newton_schulz_steps must be a whole number from 0 to 5, got 6"),
    (AuONConfig, {"newton_schulz_steps": True}, r"newton_schulz_steps must be a whole number .*, got True"),
    (AuONConfig, {"normalize_update": "paper"}, r"normalize_update must be true or false, got 'paper'"),
    (AuONConfig, {"gamma": 31.0}, r"gamma must be a number at least 0 and at most 30, got 31"),
    (AuONConfig, {"momentum": "0.9"}, r"momentum must be a number at least 0"),
    (DionConfig, {"rank": 0}, r"rank must be at least 1 .* or a fraction .*, got 0"),
    (DionConfig, {"momentum": 1.0}, r"momentum must be below 1, got 1\.0"),
    (DionConfig, {"momentum": -0.5}, r"momentum must be a number at least 0, got -0\.5"),
    (DionConfig, {"orthogonalizer": "cholesky"}, r"orthogonalizer must be one of .*did you mean 'cholesky_qr'"),
    (DionConfig, {"right_factor": "colnorm"}, r"right_factor must be one of .*did you mean 'column_norm'"),
    (DionConfig, {"adjust_lr": "spektral"}, r"adjust_lr must be one of .*did you mean 'spectral'"),
    (TrionConfig, {"momentum": 1.0}, r"momentum must be below 1, got 1\.0"),
    (TrionConfig, {"basis": "dctt"}, r"basis must be one of .*did you mean 'dct'"),
    (TrionConfig, {"norm": "l3"}, r"norm must be one of l1, l2"),
    (TrionConfig, {"engine": "fft", "basis": "identity"}, r"engine='fft' computes the DCT alone"),
    (TrionConfig, {"orthogonalizer": "jordon"}, r"orthogonalizer must be one of .*did you mean 'jordan'"),
    (Dion2Config, {"engine": "fft"}, r"engine='fft' computes the DCT alone, got basis='identity'"),
    (Dion2Config, {"adjust_lr": "kimi"}, r"adjust_lr must be one of original, spectral, match_rms_adamw, none"),
]


@pytest.mark.parametrize(("config", "values", "sentence"), BAD, ids=lambda x: str(x)[:40])
def test_configurations_refuse(config: type, values: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        config(**values)


@pytest.mark.parametrize(
    ("config", "values", "sentence"),
    [row for row in BAD if not {"embedding_lr", "cross_heads"} & set(row[1])],
    ids=lambda x: str(x)[:40],
)
def test_classes_refuse_the_same_by_name(config: type, values: dict[str, Any], sentence: str):
    cls: Any = OPTIMIZERS[config]
    arguments = {"rank": 4} | values if issubclass(cls, RankedGroups) else values
    with pytest.raises(ValueError, match=f"{cls.__name__}: .*{sentence}"):
        cls([nn.Parameter(torch.ones(8, 8))], **arguments)


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_defaults_of_a_method_with_two_bases_are_those_of_the_first(cls: type):
    """A dataclass takes its fields' defaults from its bases in another way than a class takes its attributes: where a
    base that changes a default is named after one that does not, the two disagree."""
    for each in fields(cls):
        if each.default is not MISSING:
            assert getattr(cls, each.name) == each.default, each.name


def test_galore_without_any_rank_is_not_silently_adam():
    with pytest.raises(ValueError, match=r"GaLore: no parameter group has a rank"):
        GaLore([nn.Parameter(torch.ones(8, 8))], lr=0.01)


def test_a_rank_above_the_short_side_is_clamped_with_one_warning():
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False))
    with pytest.warns(UserWarning, match=r"rank 64 is above the 8 directions that 0\.weight has") as caught:
        optimizer = build(model, GaLoreConfig(rank=64))
    assert len(caught) == 1
    assert optimizer.state[model.get_parameter("0.weight")]["basis"].shape == (8, 8)


def test_a_full_rank_fraction_is_no_reason_to_warn(recwarn: pytest.WarningsRecorder):
    build(nn.Sequential(nn.Linear(8, 16, bias=False)), GaLoreConfig(rank=1.0))
    assert not recwarn.list
