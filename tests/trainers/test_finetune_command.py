"""The fine-tuning command: what it prints, how it refuses, and that a refusal leaves nothing."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from tiny_finetune import write_all

from thinrank.configs.load import load
from thinrank.configs.schema import FINETUNE
from thinrank.trainers import finetune as runs

SCRIPT = Path(__file__).parents[2] / "launch" / "finetune.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("launch"))


@pytest.fixture
def call(base, tmp_path, monkeypatch, capsys):
    """Runs `main` in a folder with a model and a corpus: exit code, standard output, standard error."""
    spec = importlib.util.spec_from_file_location("launch_finetune", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch/finetune.py"])

    def call(*argv):
        code = script.main(["model.path=model", "data=files", "data.train=[corpus/*.txt]", *argv])
        return code, *capsys.readouterr()

    return call


def test_dry_run_shows_what_is_trained_and_writes_nothing(call, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = call("--dry-run", "adapter=lora", "adapter.rank=4", "adapter.targets=[attention]")
    assert code == 0
    factors = 2 * 4 * 4 * (16 + 16)  # layers × matrices × rank × (rows + columns)
    assert f"of which {factors:,} are trained" in out
    assert f"{2 * 4 * factors + 16 * 4:,} " in out  # two float32 moments, and a counter for each factor
    assert "frozen, not stepped: 21 tensors" in out
    assert out.rstrip().endswith(
        "python launch/finetune.py model.path=model data=files 'data.train=[corpus/*.txt]' "
        "adapter=lora adapter.rank=4 'adapter.targets=[attention]'"
    )
    code, out, err = call("--dry-run", "adapter=lora", "optimizer=mfac", "optimizer.space=whole")
    assert (code, err) == (0, "")
    assert "matrix     mfac                  28" in out
    code, out, err = call("--dry-run", "optimizer=galore", "optimizer.rank=4")
    assert (code, err) == (0, "")
    assert "matrix     galore                14" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_cfg_reads_back_and_carries_the_models_own_tokenizer(call, tmp_path):
    code, out, err = call("--cfg", "adapter=lora", "trainer.max_steps=7")
    assert (code, err) == (0, "")
    tree = yaml.safe_load(out)
    assert tree["data"]["tokenizer"] == tree["model"]["path"] == "model"
    assert (tree["run"]["dir"], tree["trainer"]["max_steps"], tree["adapter"]["name"]) == ("runs/finetune", 7, "lora")
    (tmp_path / "x.yaml").write_text(out)
    assert load(FINETUNE, ["--config", str(tmp_path / "x.yaml")]).tree == tree


def test_a_run_from_the_command_line(call, tmp_path):
    small = ["trainer.max_steps=2", "trainer.sample_tokens=0", "trainer.tensorboard=false", "data.sequence_length=16"]
    code, out, _ = call("optimizer=galore", "optimizer.rank=4", "data.cache_dir=cache", *small)
    assert code == 0
    assert "(before the first step" in out
    assert (tmp_path / "runs" / "finetune" / "export" / "config.json").is_file()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["model.path=nowhere"], "error: model.path must be a folder that save_pretrained wrote, got 'nowhere'"),
        (["model.path=bare"], "error: model.path bare holds no tokenizer (none of tokenizer.json, "),
        (["model.path=broken"], "error: the model in model.path 'broken' cannot be loaded: "),
        (["model.path=strange"], "error: model.path 'strange' holds no model that transformers knows: "),
        (["adapter=lora", "optimizer=galore"], "error: optimizer=galore would project gradients of LoRA's factors"),
        (["adapter=lora", "optimizer=ldadam"], "error: optimizer=ldadam would project gradients of LoRA's factors"),
        (["--dry-run", "adapter=lora", "optimizer=dion2"], "error: optimizer=dion2 would project gradients of LoRA's"),
        (["adapter=lora", "adapter.targets=[zzz]"], "error: adapter.targets: 'zzz' matches no matrix of the model"),
        (["adapter=lora", "adapter.targets=['(']"], "error: adapter.targets: '(' is not a regular expression"),
        (["adapter=lora", "adapter.rank=0"], "error: adapter.rank must be a whole number of at least 1, got 0"),
        (["adapter=lorra"], "error: unknown choice adapter=lorra: did you mean lora?"),
        (["adapter.rank=4"], "error: unknown key adapter.rank: rank belongs to adapter=lora, and adapter=none is"),
        (["optimizer=galore", "optimizer.targets=[zzz]"], "error: optimizer.targets: 'zzz' matches no matrix"),
        (["data.tokenizer=bytes"], "error: data.tokenizer must be the model's own, model, got 'bytes'"),
        (["data.sequence_length=2048"], "error: data.sequence_length must be at most the 1024 tokens that the model"),
        (["data.train=[none/*.txt]"], "error: data.train pattern 'none/*.txt' matches no file"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_two_and_nothing_is_written(call, tmp_path, argv, sentence):
    for name in ("bare", "broken", "strange"):
        shutil.copytree("model", name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no tensors")
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "strange"}')
    before = sorted(path for path in tmp_path.rglob("*"))
    code, _, err = call(*argv)
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert errors[0].startswith(sentence)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_mistake_costs_no_data(call, monkeypatch):
    """What can be seen in the command line is refused before the corpus is read."""
    monkeypatch.setattr(runs, "finetune", None)
    assert call("adapter=lora", "optimizer=galore")[0] == 2
