"""Bad values are refused at construction, in a sentence that names the field and the rule."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from thinrank.optim import OPTIMIZERS, AdamWConfig, DCTAdamWConfig, GaLore, GaLoreConfig, SubspaceAdamWConfig, build

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
    (GaLoreConfig, {"scale": math.inf}, r"scale must be a number"),
    (GaLoreConfig, {"proj_type": "rigth"}, r"proj_type must be one of .*did you mean 'right'"),
    (GaLoreConfig, {"svd": "exakt"}, r"svd must be one of .*did you mean 'exact'"),
    (GaLoreConfig, {"proj_type": "full", "svd": "power"}, r"proj_type='full' needs svd='exact'"),
    (GaLoreConfig, {"projection_dtype": "fp16"}, r"projection_dtype must be one of float32, bfloat16"),
    (DCTAdamWConfig, {"basis": "dctt"}, r"basis must be one of .*did you mean 'dct'"),
    (DCTAdamWConfig, {"norm": "l3"}, r"norm must be one of l1, l2"),
    (DCTAdamWConfig, {"error_feedback": "4bit"}, r"error_feedback must be one of off, full, 8bit"),
    (DCTAdamWConfig, {"engine": "fft", "basis": "hadamard"}, r"engine='fft' computes the DCT alone"),
    (SubspaceAdamWConfig, {"residual": "ful"}, r"residual must be one of .*did you mean 'full'"),
    (SubspaceAdamWConfig, {"residual_limit": 0.5}, r"residual_limit must be a number at least 1"),
    (SubspaceAdamWConfig, {"transport": "rotat"}, r"transport must be one of .*did you mean 'rotate'"),
]


@pytest.mark.parametrize(("config", "values", "sentence"), BAD, ids=lambda x: str(x)[:40])
def test_configurations_refuse(config: type, values: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        config(**values)


@pytest.mark.parametrize(
    ("config", "values", "sentence"),
    [row for row in BAD if "embedding_lr" not in row[1]],
    ids=lambda x: str(x)[:40],
)
def test_classes_refuse_the_same_by_name(config: type, values: dict[str, Any], sentence: str):
    cls: Any = OPTIMIZERS[config]
    arguments = {"rank": 4} | values if config is GaLoreConfig else values
    with pytest.raises(ValueError, match=f"{cls.__name__}: .*{sentence}"):
        cls([nn.Parameter(torch.ones(8, 8))], **arguments)


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
