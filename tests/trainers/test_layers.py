"""Models of factors in whole runs: what they leave, how they go on, what they export, and under which strategies."""

import json
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import tiny_finetune
import tiny_layers
import torch
from test_fsdp2_strategy import apart, weights
from test_pretrain import final, same
from tiny_pretrain import config, losses, signalled_at
from tiny_training import TinyData, lightning_warnings, rows, tiny_model, tiny_module, tiny_trainer
from transformers import AutoModelForCausalLM

from thinrank.configs.errors import ConfigError
from thinrank.configs.load import load
from thinrank.configs.schema import FINETUNE, PRETRAIN
from thinrank.optim import AdamWConfig, GaLoreConfig
from thinrank.optim.layers import LOST, SST, CoLA, LowRank, QRLoRA, ReLoRA, WeLore, convert, layers
from thinrank.optim.layers.lowrank import LowRankLinear
from thinrank.trainers.callbacks.layers import LayerUpkeep
from thinrank.trainers.errors import UserError
from thinrank.trainers.finetune import finetune
from thinrank.trainers.models import load_model
from thinrank.trainers.pretrain import pretrain
from thinrank.trainers.reparam import FACTORS, LAYOUT, export_merged, load_factors

pytestmark = lightning_warnings
COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    tiny_finetune.write_all(folder)
    return folder


SSTS = SST(rank=4, every=4, iterations=2, warmup=2)


def test_a_run_of_factors_leaves_what_it_promises(base, capsys):
    result = pretrain(config(base, "sst", reparam=SSTS, optimizer=AdamWConfig(lr=0.01), export=True, max_steps=9))
    said = capsys.readouterr().out
    sizes = result["model"]["reparam"]
    assert sizes["layers"] == 14
    assert result["model"]["parameters"] == sizes["parameters_after"] > sizes["parameters_before"]
    assert result["model"]["trained_parameters"] == sizes["trained_after"] < sizes["trained_before"]
    assert result["optimizer_state"]["predicted_bytes"] == result["optimizer_state"]["measured_bytes"]
    assert result["optimizer_state"]["adamw_bytes"] > 8 * sizes["trained_before"]
    assert {row["role"] for row in result["routing"]} == {"matrix", "coefficient", "embedding", "head", "vector"}
    for text in (said, (base / "sst" / "report.md").read_text()):
        assert "layer                        out × in   rank layers" in text
    exported = AutoModelForCausalLM.from_pretrained(base / "sst" / "export")
    assert sum(p.numel() for p in exported.parameters()) == sizes["parameters_before"]
    rates = losses(base / "sst", "opt/effective_lr/matrix/adamw")
    assert rates[5] < rates[4]  # half of it, after others were drawn at step 4
    planned, measured = result["plan"]["planned"], result["plan"]["measured"]
    assert measured["weights_bytes"] == planned["weights_bytes"]
    assert measured["gradients_bytes"] == planned["gradients_bytes"]


@pytest.mark.parametrize("at", [3, 5])
@pytest.mark.parametrize("layer", [SSTS, ReLoRA(rank=4, every=4, warmup=2)], ids=lambda layer: layer.name)
def test_a_run_that_was_cut_within_an_iteration_goes_on_to_the_bit(base, at, layer):
    name = f"{layer.name} {at}"
    settings = {"reparam": layer, "optimizer": AdamWConfig(lr=0.01), "max_steps": 9, "checkpoint_every": 20}
    pretrain(config(base, f"{name} whole", **settings))
    undo = signalled_at(at, rank=0)
    first = pretrain(config(base, f"{name} parts", **settings))
    undo()
    second = pretrain(config(base, f"{name} parts", **settings))
    assert (first["run"]["state"], second["run"]["resumed_from"]) == ("preempted", at)
    same(final(base / f"{name} parts"), final(base / f"{name} whole"))


@pytest.mark.parametrize("layer", [CoLA(), LOST(rank=4)], ids=lambda layer: layer.name)
def test_what_cannot_be_merged_is_exported_as_factors_with_a_loader(base, layer):
    pretrain(config(base, layer.name, reparam=layer, optimizer=AdamWConfig(lr=0.01), export=True))
    folder = base / layer.name / "export"
    assert {FACTORS, LAYOUT, "config.json"} <= {path.name for path in folder.iterdir()}
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(folder)
    trained = {k.removeprefix("model."): v for k, v in weights(base / layer.name).items()}
    for model in (load_factors(folder), load_model(str(folder), 1, key="model.path")):
        same(dict(model.state_dict()), trained)
        assert len(layers(model)) == 14
    report = finetune(
        tiny_finetune.config(base, f"{layer.name} tuned", model={"path": str(folder)}, optimizer=AdamWConfig(lr=0.01))
    )
    assert report["metrics"]["test/loss"] != report["metrics"]["before/loss"]
    assert (base / f"{layer.name} tuned" / "export" / FACTORS).is_file()


def test_layers_that_are_converted_already_and_folders_without_factors(base, tmp_path):
    model = load_model(str(base / "model"), 1, key="model.path")
    convert(model, CoLA(rank=4))
    folder = export_merged(model, None, tmp_path / "factors")
    with pytest.raises(UserError, match=r"reparam.*converted already"):
        pretrain(config(base, "twice", reparam=LowRank(rank=4), model={"pretrained": str(folder)}))
    with pytest.raises(UserError, match="holds no factors"):
        load_factors(tmp_path)
    layout = json.loads((folder / LAYOUT).read_text())
    layout["config"]["rank"] = 5
    (folder / LAYOUT).write_text(json.dumps(layout))
    with pytest.raises(UserError, match=r"does not fit the factors beside it: .*convert the model with the rank"):
        load_factors(folder)


def test_a_trained_model_is_tuned_as_factors(base):
    result = finetune(tiny_finetune.config(base, "tuned", optimizer=AdamWConfig(lr=0.01), reparam=SSTS))
    dense = finetune(tiny_finetune.config(base, "tuned dense", optimizer=AdamWConfig(lr=0.01)))
    assert result["metrics"]["before/loss"] == pytest.approx(dense["metrics"]["before/loss"], rel=1e-4)
    AutoModelForCausalLM.from_pretrained(base / "tuned" / "export")


@pytest.mark.parametrize("layer", [WeLore(cutoff=1.0), QRLoRA()], ids=lambda layer: layer.name)
def test_shapes_that_come_from_weights_are_planned_as_they_are(base, layer):
    result = finetune(tiny_finetune.config(base, layer.name, optimizer=AdamWConfig(lr=0.01), reparam=layer))
    assert result["run"]["state"] == "finished"
    planned, measured = result["plan"]["planned"], result["plan"]["measured"]
    assert measured["weights_bytes"] == planned["weights_bytes"]
    assert measured["state_bytes"] == planned["state_bytes"]


# --- the way in -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["model.reparam=sst", "model.reparam.rank=7"],
        ["reparam=sst", "reparam.rank=7"],
        ["model.reparam.rank=7", "model=9m", "model.reparam=sst"],
        ["reparam={name: sst, rank: 7}"],
    ],
)
def test_layers_are_chosen_with_the_model_or_by_themselves(words):
    found = load(PRETRAIN, words).config.reparam
    assert (type(found), found.rank) == (SST, 7)


def test_layers_are_chosen_in_a_file(tmp_path):
    (tmp_path / "job.yaml").write_text("model:\n  num_hidden_layers: 3\n  reparam: {name: lost, delta: 0.1}\n")
    loaded = load(PRETRAIN, ["--config", str(tmp_path / "job.yaml")])
    assert loaded.config.reparam == LOST(delta=0.1)
    assert loaded.config.model.num_hidden_layers == 3
    (tmp_path / "wrong.yaml").write_text("model:\n  reparam: sst\nreparam: {delta: 0.1}\n")
    with pytest.raises(ConfigError, match=r"model\.reparam and reparam are one and the same: write one of them"):
        load(PRETRAIN, ["--config", str(tmp_path / "wrong.yaml")])


@pytest.mark.parametrize(
    ("schema", "words", "sentence"),
    [
        (PRETRAIN, ["model.reparam=sts"], "did you mean sst"),
        (PRETRAIN, ["model.reparam=sst", "model.reparam.delta=1"], "delta belongs to reparam="),
        (
            PRETRAIN,
            ["model.reparam=lost", "reparam.delta=2"],
            "reparam.delta must be a number at least 0 and at most 1",
        ),
        (PRETRAIN, ["model.reparam=sst", "trainer.in_backward=step"], "use trainer.in_backward=off"),
        (FINETUNE, ["model.reparam=sst", "adapter=lora"], "leave one of them at none"),
        (PRETRAIN, ["model.reparam=maestro", "strategy=thinrank_zero3"], "use strategy=thinrank_zero2 or"),
        (FINETUNE, ["model.reparam=sorsa", "strategy=thinrank_zero3"], "use strategy=thinrank_zero2 or"),
    ],
)
def test_configurations_that_cannot_work_are_refused(schema, words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load(schema, words)


def test_a_rank_above_a_layers_side_is_refused_before_the_run(base):
    with pytest.raises(UserError, match=r"reparam\.rank 17 is above the shorter side of model\.layers\.0"):
        pretrain(config(base, "too wide", reparam=LowRank(rank=17)))
    assert not (base / "too wide" / "checkpoints").exists()


def test_a_low_rank_method_steps_factors_too(base):
    result = pretrain(config(base, "both", reparam=SSTS, optimizer=GaLoreConfig(rank=2, update_proj_gap=3)))
    assert {row["rule"] for row in result["routing"] if row["role"] == "matrix"} == {"galore"}
    assert {row["rule"] for row in result["routing"] if row["role"] == "coefficient"} == {"adamw"}


def test_modules_of_ones_own_have_a_callback():
    from thinrank.optim.layers import Upkeep

    class Own(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
            convert(self.net, SST(rank=2, every=2, warmup=0))

        def training_step(self, batch, batch_idx):
            x = torch.nn.functional.one_hot(batch["input_ids"] % 8, 8).float()
            return (self.net(x) - x.roll(1, -1)).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Own()
    trainer = tiny_trainer(max_steps=5, callbacks=[LayerUpkeep(seed=3)])
    trainer.fit(module, TinyData(rows(24)).train_dataloader())
    other = Own()
    optimizer = other.configure_optimizers()
    Upkeep(other, optimizer, seed=3)
    batches = iter(TinyData(rows(24)).train_dataloader())
    for _ in range(5):
        optimizer.zero_grad()
        other.training_step(next(batches), 0).backward()
        optimizer.step()
    same(dict(module.state_dict()), dict(other.state_dict()))
    assert int(module.state_dict()["net.0.clock"]) == 5


def test_a_penalty_joins_the_loss():
    class Heavy(LowRankLinear):
        def penalty(self):
            return self.A.square().sum()

    model = _lowrank()
    for layer in layers(model).values():
        layer.__class__ = Heavy
    module = tiny_module(model=model)
    batch = next(iter(TinyData(rows(4)).train_dataloader()))
    module.log = lambda *args, **options: None
    module._trainer = tiny_trainer(1)
    found = module.training_step(batch, 0)
    factors = [p.detach() for name, p in model.named_parameters() if name.endswith(".A")]
    expected = sum(float(a.square().sum()) for a in factors)
    assert float(found["loss"].detach() - found["nats"] / found["labels"]) == pytest.approx(expected, rel=1e-4)


def _lowrank():
    model = tiny_model()
    convert(model, LowRank(rank=4))
    return model


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(base):
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    done = subprocess.run(
        [*COMMAND, tiny_layers.__file__, str(base)], capture_output=True, text=True, timeout=280, cwd=base
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    pretrain(config(base, "alone", export=True, **tiny_layers.RUN))
    return base


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_layers.STRATEGIES)
def test_two_ranks_are_one_process(many, name):
    """Exported, so dense weights: singular vectors may come in another order or sign."""
    found, expected = (
        dict(AutoModelForCausalLM.from_pretrained(many / run / "export").state_dict()) for run in (name, "alone")
    )
    assert apart(found, expected) <= 2e-4
    for step, value in losses(many / "alone").items():
        assert losses(many / name)[step] == pytest.approx(value, rel=1e-4), step


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_preempted_run_in_pieces_goes_on_to_the_bit(many):
    reports = json.loads((many / "result.json").read_text())
    assert (reports["first"]["state"], reports["second"]["resumed_from"]) == ("preempted", 7)
    same(final(many / "parts"), final(many / "thinrank_fsdp2"))
