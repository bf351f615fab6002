"""The guard against spikes in trainings of a second: seen, skipped, clipped, stopped, on all ranks together."""

import copy
import logging
import math
import os
import warnings
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from tiny_training import (
    PoolEnvironment,
    TinyData,
    lightning_warnings,
    rows,
    sgd,
    tiny_model,
    tiny_module,
    tiny_trainer,
)
from torch.distributed.tensor import DTensor

from thinrank.optim import AdamWConfig, GaLoreConfig
from thinrank.trainers import FSDP2Strategy, GossipStrategy, OwnedStrategy, ReplicatedStrategy, ZeroStrategy
from thinrank.trainers.callbacks.guard import NonFiniteGuard
from thinrank.trainers.callbacks.metrics import TrainingMetrics
from thinrank.trainers.callbacks.spikes import SpikeGuard
from thinrank.trainers.errors import GuardStop, UserError
from thinrank.trainers.module import CausalLM
from thinrank.trainers.schedule import ScheduleConfig

pytestmark = lightning_warnings

WINDOW = 8
GALORE = GaLoreConfig(rank=4, update_proj_gap=3, lr=0.01)


class Spiky(CausalLM):
    """One batch's loss is many times what it should be, on one rank or on all."""

    at, rank, times = 9, None, 1000.0

    def training_step(self, batch, batch_idx):
        found = super().training_step(batch, batch_idx)
        bad = batch_idx // self.trainer.accumulate_grad_batches + 1 == self.at
        if bad and self.rank in (None, self.trainer.global_rank):
            found["loss"] = found["loss"] * self.times
        return found


class Clean(Spiky):
    at = 0


class Watch(pl.Callback):
    """Weights and optimizer state after every step."""

    def __init__(self) -> None:
        self.taken: list[Any] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step > len(self.taken):
            states = trainer.optimizers[0].state_dict()["state"]
            self.taken.append(copy.deepcopy({"weights": dict(pl_module.state_dict()), "optimizer": states}))


class Recorder(Logger):
    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> int:
        return 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[Any, dict[str, float]] = {}

    def log_hyperparams(self, *args, **kwargs) -> None:
        """Nothing."""

    def log_metrics(self, metrics, step=None) -> None:
        self.logged.setdefault(step, {}).update(metrics)


def fit(
    kind: type[CausalLM] = Spiky,
    steps: int = 12,
    callbacks: Any = (),
    optimizer: Any = GALORE,
    clip_norm: float | None = 1.0,
    **changes: Any,
):
    module: Any = kind(tiny_model(), optimizer, clip_norm=clip_norm, schedule=ScheduleConfig(kind="constant"))
    accumulate = changes.get("accumulate_grad_batches", 1)
    data = TinyData(rows(4 * (steps + 4) * accumulate))
    trainer = tiny_trainer(steps, callbacks=list(callbacks), **changes)
    trainer.fit(module, data)
    return module, trainer


def equal(first, second) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def guard(detector="zscore", action="skip", **settings):
    usual: dict[str, Any] = {"window": WINDOW} if detector == "zscore" else {"warmup": 5}
    return SpikeGuard(detector, action, **{**usual, **settings})


def distance(one, other):
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


class TestSkip:
    @pytest.mark.parametrize("optimizer", [GALORE, AdamWConfig(lr=0.01)], ids=["galore", "adamw"])
    def test_a_spike_moves_weights_without_the_guard_and_nothing_with_it(self, optimizer):
        """Step counters and renewal counters, which are in the state, included; step 10 would be GaLore's renewal."""
        found = {}
        for name, callbacks in (("without", []), ("with", [here := guard()])):
            watch = Watch()
            fit(callbacks=[*callbacks, watch], optimizer=optimizer, clip_norm=None)
            found[name] = watch.taken
        assert (here.spikes, here.skipped, here.consecutive) == (1, 1, 0)
        assert equal(found["with"][7], found["without"][7])
        assert not equal(found["without"][8], found["without"][7])
        assert equal(found["with"][8], found["with"][7])
        assert not equal(found["with"][9], found["with"][8])

    def test_a_spike_spoils_the_loss_without_the_guard(self):
        """Plain SGD, where a gradient a thousand times too large is a step a thousand times too long."""
        losses = {}
        for name, kind, callbacks in (("clean", Clean, []), ("without", Spiky, []), ("with", Spiky, [guard()])):
            plain = {"optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1), "clip_norm": None}
            module, trainer = fit(kind, callbacks=callbacks, limit_val_batches=1.0, **plain)
            trainer.validate(module, TinyData(rows(8)), verbose=False)
            losses[name] = float(trainer.callback_metrics["val/loss"])
        assert losses["without"] > losses["clean"] + 0.05
        assert losses["with"] == pytest.approx(losses["clean"], abs=0.02)

    def test_the_loss_of_a_step_is_that_of_all_its_micro_batches(self, caplog):
        here = guard()
        with caplog.at_level(logging.WARNING):
            fit(callbacks=[here], accumulate_grad_batches=2, clip_norm=None)
        assert here.spikes == 1
        (message,) = [record.message for record in caplog.records if "spike" in record.message]
        assert message.startswith("step 9 is a spike, and skipped: the loss, ")
        assert "standard deviations above the mean of the last 8 steps" in message

    def test_a_loss_scaler_is_not_seen(self):
        class Less(Spiky):
            times = 20.0  # so that half precision does not overflow

        plain, scaled = guard(), guard()
        fit(Less, callbacks=[plain])
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
        fit(Less, callbacks=[scaled], plugins=[plugin])
        assert scaled.spikes == plain.spikes == 1
        one, other = (each.state_dict()["statistics"] for each in (plain, scaled))
        assert other["losses"] == pytest.approx(one["losses"], rel=2e-2)  # float16 autocast
        assert other["norms"] == pytest.approx(one["norms"], rel=5e-2)

    def test_steps_that_are_not_finite_are_skipped_as_ever_and_no_spikes(self, caplog):
        class Broken(Spiky):
            times = math.nan

        here = guard()
        with caplog.at_level(logging.WARNING):
            fit(Broken, callbacks=[here])
        assert (here.spikes, here.skipped) == (0, 1)
        assert "step 9 skipped: the gradient norm is nan (1 skipped so far, 1 in a row)" in caplog.text
        assert all(map(math.isfinite, here.state_dict()["statistics"]["losses"]))
        with pytest.raises(GuardStop, match="not finite 1 times in a row"):
            fit(Broken, callbacks=[guard(limit=1)])


class TestLooking:
    def test_a_clean_run_is_the_same_bit_for_bit(self):
        plain, looked = Watch(), Watch()
        torch.manual_seed(0)
        fit(Clean, callbacks=[plain])
        drawn = torch.get_rng_state()
        for detector in ("zscore", "zclip", "stable"):
            looked = Watch()
            here = SpikeGuard(detector, "warn", threshold=100.0)
            torch.manual_seed(0)
            fit(Clean, callbacks=[here, looked], optimizer=GALORE)
            assert torch.equal(torch.get_rng_state(), drawn)
            assert len(looked.taken) == len(plain.taken) == 12
            assert all(map(equal, looked.taken, plain.taken))
            assert (here.spikes, here.skipped) == (0, 0)

    def test_a_warning_changes_nothing_either_and_is_logged(self, caplog):
        plain, looked, here, seen = Watch(), Watch(), guard(action="warn"), Recorder()
        fit(callbacks=[plain])
        with caplog.at_level(logging.WARNING):
            fit(callbacks=[here, looked], logger=seen, log_every_n_steps=4)
        assert all(map(equal, looked.taken, plain.taken))
        assert (here.spikes, here.skipped, here.facts()) == (1, 0, {"skipped_steps": 0, "spikes": 1})
        assert "step 9 is a spike, and made all the same" in caplog.text
        assert sorted(step for step, values in seen.logged.items() if "guard/spikes" in values) == [4, 8, 9, 12]
        assert seen.logged[8]["guard/spike_score/loss"] == 0
        assert seen.logged[9]["guard/spike_score/loss"] == 1 / 9
        assert seen.logged[12]["guard/spike_rate/grad_norm"] == pytest.approx(1 / 12)

    def test_stable_names_the_tensor(self, caplog):
        here = SpikeGuard("stable", "skip")
        with caplog.at_level(logging.WARNING):
            fit(callbacks=[here], optimizer=AdamWConfig(lr=0.01), clip_norm=None)
        assert here.skipped == 1
        assert "step 9 is a spike, and skipped: the gradient of model." in caplog.text


class TestClip:
    def test_gradients_come_down_to_the_detectors_limit(self):
        """SGD of rate 1: a step's length is the norm that was let through."""
        here, watch, seen = guard("zclip", "clip"), Watch(), Recorder()
        recorded = []

        class Kept(pl.Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
                recorded.append(copy.deepcopy(here.detector))

        metrics = TrainingMetrics(every=1)
        fit(callbacks=[metrics, Kept(), here, watch], optimizer=sgd, clip_norm=None, logger=seen)
        assert (here.spikes, here.clipped, here.skipped) == (1, 1, 0)
        norms = [seen.logged[step]["grad_norm"] for step in range(1, 13)]
        mean, std = recorded[8].mean, math.sqrt(recorded[8].var)
        expected = mean + 2.5**2 * std / ((norms[8] - mean) / (std + 1e-6))
        assert expected < norms[8] / 100
        moved = distance(watch.taken[8]["weights"], watch.taken[7]["weights"])
        assert moved == pytest.approx(expected, rel=1e-4)
        assert distance(watch.taken[9]["weights"], watch.taken[8]["weights"]) == pytest.approx(norms[9], rel=1e-4)

    @pytest.mark.parametrize("clip_norm", [1e-3, None])
    def test_the_modules_own_limit_is_above_it(self, clip_norm):
        watch = Watch()
        fit(callbacks=[guard("zclip", "clip"), watch], optimizer=sgd, clip_norm=clip_norm)
        moved = [distance(b["weights"], a["weights"]) for a, b in zip(watch.taken, watch.taken[1:], strict=False)]
        if clip_norm is not None:
            assert moved == pytest.approx([clip_norm] * 11, rel=1e-3)
        else:
            assert max(moved) > 0.1

    def test_a_module_that_knows_no_limits_is_clipped_all_the_same(self):
        """And thinrank's own optimizer, and what no optimizer of thinrank has, by one factor."""

        class Own(pl.LightningModule):
            def __init__(self, optimizer):
                super().__init__()
                self.model, self.made = tiny_model(), optimizer

            def training_step(self, batch, batch_idx):
                loss = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
                return loss * (1000.0 if batch_idx == 8 else 1.0)

            def on_before_zero_grad(self, optimizer):
                norms.append(
                    float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))
                )

            def configure_optimizers(self):
                return self.made(self.model)

        from thinrank.optim import build

        for optimizer in (sgd, lambda model: build(model, GALORE)):
            norms: list[float] = []
            here = guard("zclip", "clip", max_norm=0.5)
            tiny_trainer(12, callbacks=[here]).fit(Own(optimizer), TinyData(rows(64)).train_dataloader())
            assert here.clipped == 1
            assert max(norms) == pytest.approx(0.5, rel=1e-4)


class TestStop:
    def test_it_stops_with_the_weights_of_the_step_before(self):
        watch, module = Watch(), Spiky(tiny_model(), GALORE)
        trainer = tiny_trainer(12, callbacks=[guard(action="stop"), watch])
        with pytest.raises(GuardStop, match=r"stopped before step 9: the loss, .*; lower optimizer.lr"):
            trainer.fit(module, TinyData(rows(64)))
        assert equal(dict(module.state_dict()), watch.taken[-1]["weights"])
        assert len(watch.taken) == 8


class TestState:
    def test_it_may_take_the_place_of_the_plain_guard_and_of_another_detector(self):
        plain, here, other = NonFiniteGuard(), guard(), guard("zclip", "clip")
        plain.skipped = 3
        assert plain.state_key == here.state_key
        here.load_state_dict(plain.state_dict())
        assert (here.skipped, here.spikes) == (3, 0)
        here.detector.losses.add(1.0)
        here.spikes = 2
        other.load_state_dict(here.state_dict())
        assert (other.skipped, other.spikes, other.detector.first) == (3, 2, [])
        plain.load_state_dict(here.state_dict())
        assert plain.skipped == 3

    def test_the_same_run_again_decides_the_same(self):
        def once():
            here = guard()
            module, _ = fit(callbacks=[here])
            return {"state": here.state_dict(), "weights": dict(module.state_dict())}

        assert equal(once(), once())


class OneRank(Spiky):
    rank = 1


STRATEGIES: dict[str, Any] = {
    "ddp": DDPStrategy,
    "thinrank_ddp": ReplicatedStrategy,
    "thinrank_owned": OwnedStrategy,
    "thinrank_fsdp2": FSDP2Strategy,
    "thinrank_gossip": partial(GossipStrategy, scheme="dpsgd", compressor="float32"),
    "thinrank_zero2": partial(ZeroStrategy, 2),
}


class Saving(pl.Callback):
    """A checkpoint after step 10, and what a guard makes of it on each rank."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 10:
            trainer.save_checkpoint(self.path)
            saved = torch.load(self.path, weights_only=True)
            again = SpikeGuard(detector="zscore", window=WINDOW)
            again.on_load_checkpoint(trainer, pl_module, saved)
            self.loaded = saved["callbacks"][again.state_key]
            (here,) = [each for each in trainer.callbacks if isinstance(each, SpikeGuard)]
            assert {**self.loaded, "ranks": None} == {**here.state_dict(), "ranks": None}


def on_two_ranks(name: str, folder: str) -> Any:
    """For both actions, the guard's state and the weights after a run in which rank 1 has a bad batch."""
    warnings.simplefilter("default")  # the marks of the test do not reach the ranks
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed compiles a function of Muon's: half a minute of imports
    found = {}
    for detector, action in (("zscore", "skip"), ("zclip", "clip")):
        here, options = guard(detector, action), {"process_group_backend": "gloo"}
        if name == "thinrank_fsdp2":
            more = {"strategy": STRATEGIES[name](**options), "plugins": [PoolEnvironment()]}
        else:
            more = {"strategy": STRATEGIES[name](cluster_environment=PoolEnvironment(), **options)}
        trainer = tiny_trainer(11, devices=2, callbacks=[here, Saving(f"{folder}/{name} {action}")], **more)
        module = OneRank(tiny_model(), GALORE, clip_norm=None, schedule=ScheduleConfig(kind="constant"))
        trainer.fit(module, TinyData(rows(64), rank=torch.distributed.get_rank(), world=2))
        whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in module.named_parameters()}
        found[action] = here.state_dict(), {n: p.detach().clone() for n, p in whole.items()}
    return found


@pytest.fixture(scope="module")
def by_ddp(ranks, tmp_path_factory):
    return ranks(2).run(on_two_ranks, "ddp", str(tmp_path_factory.mktemp("ddp")), timeout=250)


@pytest.mark.timeout(300)  # the first imports Lightning on every rank, and one of them DeepSpeed
@pytest.mark.parametrize("name", STRATEGIES)
def test_ranks_decide_together_by_the_same_numbers(ranks, tmp_path, by_ddp, name):
    """The bad batch is one rank's, whose loss is hidden in the mean of both; under gossip it is that rank's business.

    Where norms are sketches (thinrank_ddp, thinrank_owned) a limit is one as well.
    """
    one, two = by_ddp if name == "ddp" else ranks(2).run(on_two_ranks, name, str(tmp_path), timeout=250)
    like = {action: weights for action, (_, weights) in by_ddp[0].items()}
    effect = distance(like["clip"], like["skip"])
    for action in ("skip", "clip"):
        (state, weights), (other, those) = one[action], two[action]
        if name == "thinrank_gossip":
            assert (state["spikes"], other["spikes"]) == (0, 1)
            assert (state["skipped"], other["skipped"]) == (0, int(action == "skip"))
            continue
        assert state == other
        assert equal(weights, those)
        assert state["spikes"] == 1
        assert (state["skipped"], state["clipped"]) == {"skip": (1, 0), "clip": (0, 1)}[action]
        assert distance(weights, like[action]) < effect / 100, (action, effect)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"detector": "zscores"}, "detector must be one of nonfinite, zscore"),
            ({"action": "hope"}, "action must be one of skip, clip"),
            ({"detector": "nonfinite"}, "is NonFiniteGuard: use that"),
            ({"detector": "nonfinite", "action": "stop"}, "action=stop needs a detector"),
            ({"action": "clip"}, "needs a norm to clip to, and detector=zscore"),
            ({"detector": "stable", "action": "clip"}, "needs a norm to clip to, and detector=stable"),
            ({"action": "rollback"}, "goes back in a run folder: use launch/pretrain.py"),
            ({"threshold": -1.0}, "threshold must be above 0"),
            ({"window": 2}, "window must be at least 4"),
            ({"max_norm": 1.0}, "is for action=clip"),
            ({"limit": 0}, "limit must be at least 1"),
        ],
    )
    def test_at_construction(self, settings, sentence):
        with pytest.raises(ValueError, match=sentence):
            SpikeGuard(**settings)

    def test_when_training_starts(self):
        with pytest.raises(RuntimeError, match="more than one stateful callback"):
            tiny_trainer(2, callbacks=[guard(), NonFiniteGuard()])
        with pytest.raises(UserError, match="clipping is set twice"):
            fit(callbacks=[guard("zclip", "clip")], clip_norm=None, gradient_clip_val=0.5)
        module = tiny_module(optimizer=GALORE, in_backward="step")
        with pytest.raises(UserError, match="has stepped each weight before anybody can look"):
            tiny_trainer(2, callbacks=[guard()]).fit(module, TinyData(rows(16)))
        fit(Clean, callbacks=[guard()], clip_norm=None, gradient_clip_val=0.5)  # which skipping does not mind
