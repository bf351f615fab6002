"""What DeepSpeed's ZeRO is not combined with, what is not known of it, and what is asked of it at the wrong time."""

import copy
import os
import sys
import types

import pytest
import torch
from cases import CONFIGS
from test_replicated import seeded_model
from test_zero import engine

from thinrank.optim import build

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")


OFFLOAD = {
    "offload_optimizer": {"device": "cpu"},
    "offload_param": {"device": "cpu"},
    "cpu_offload": True,
    "cpu_offload_param": True,
}
"""With DeepSpeed's defaults, under which it refuses an optimizer that is not its own, with a remedy of its own."""


def misuse():
    said = {}

    def note(name, function):
        try:
            function()
        except Exception as error:
            said[name] = str(error)

    config = CONFIGS["galore/power"]
    note("stage 0", lambda: engine(config, 0))
    for key, value in OFFLOAD.items():
        note(key, lambda asked={"stage": 3, key: value}: engine(config, 3, zero_optimization=asked))
    note("bf16", lambda: engine(config, 1, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}))

    none = {"offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}}
    zero, optimizer = engine(config, 2, zero_optimization={"stage": 2, **none})
    note("norm", optimizer.gradient_norm)
    note("saved", zero.front.state_dict)
    note("loaded", lambda: zero.front.load_state_dict({}))
    note("names", lambda: zero.load_weights({"other": torch.ones(1)}))
    zero.release()
    return said


def test_misuse_is_answered_with_the_remedy(ranks):
    wanted = {
        "stage 0": "set zero_optimization.stage to 1, 2 or 3",
        **{key: key for key in OFFLOAD},
        "bf16": "use stage 2",
        "norm": "clip by gradient_clipping",
        "saved": "save optimizer.full_state_dict()",
        "loaded": "optimizer.load_state_dict",
        "names": "missing ['down.weight'",
    }
    for said in ranks(2).run(misuse):
        assert said.keys() == wanted.keys()
        assert all(sentence in said[name] for name, sentence in wanted.items()), said
        assert all("offload is not supported, because" in said[key] for key in OFFLOAD), said


def unbound():
    from thinrank.optim.zero import ZeroFront

    model = seeded_model()
    front = ZeroFront(build(model, CONFIGS["galore/power"]))
    before = copy.deepcopy(model.state_dict())
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    front.step()
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.up.weight.grad = torch.ones_like(model.up.weight)
    return front, same


def test_before_it_is_bound_nothing_is_stepped():
    front, same = unbound()
    assert same
    with pytest.raises(RuntimeError, match=r"call bind\(engine\)"):
        front.step()
    with pytest.raises(RuntimeError, match="not bound to an engine"):
        front.gradient_norm()


@pytest.mark.parametrize(
    ("version", "sentence"), [("0.99.0", "has not been tested"), ("0.19.8", "has no fp16_groups in its")]
)
def test_what_cannot_be_read_is_refused(monkeypatch, version, sentence):
    from thinrank.optim.exchange.zero import ZeroShards

    monkeypatch.setitem(sys.modules, "otherspeed", types.SimpleNamespace(__version__=version))
    kind = type("DeepSpeedZeroOptimizer_Stage3", (), {"__module__": "otherspeed.runtime"})
    with pytest.raises(ValueError, match=sentence):
        ZeroShards(types.SimpleNamespace(optimizer=kind()), [])


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"dtype": torch.float16}, "use bfloat16"),
        ({"offload_param": True}, "leave offload_param, of old cpu_offload_param, out"),
        ({"cpu_offload": True}, "leave offload_optimizer, of old cpu_offload, out"),
        ({"has_moe_layers": True}, "without mixture of experts"),
        ({"zenflow": True}, "leave it out"),
        ({"model_parallel_group": 1}, "leave mpu out"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_tried_here_are_refused(settings, remedy):
    from thinrank.optim.exchange.zero import _refuse_settings

    with pytest.raises(ValueError, match=remedy):
        _refuse_settings(types.SimpleNamespace(**settings))


def test_a_lock_of_a_killed_compilation_is_found(tmp_path, monkeypatch):
    from thinrank.trainers import UserError, zero

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    zero._refuse_stale_lock()  # somebody may be compiling
    os.utime(lock, (0, 0))
    with pytest.raises(UserError, match="delete it"):
        zero._refuse_stale_lock()
