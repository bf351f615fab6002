"""The command itself: what it prints, how it ends, and that looking writes nothing."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from thinrank.configs import command
from thinrank.configs.load import load
from thinrank.configs.schema import PRETRAIN
from thinrank.trainers import pretrain as runs
from thinrank.trainers.errors import GuardStop, PreflightError, UserError

SCRIPT = Path(__file__).parents[2] / "launch" / "pretrain.py"


def execute(folder, *argv, launcher=(sys.executable,)):
    return subprocess.run(
        [*launcher, str(SCRIPT), *argv], cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("launch_pretrain", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(script, tmp_path, monkeypatch, capsys):
    """Runs `main` in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch/pretrain.py"])

    def call(*argv):
        code = script.main(list(argv))
        return code, *capsys.readouterr()

    return call


# Looking -------------------------------------------------------------------------------------------------------------


def test_dry_run_of_galore_on_130m(tmp_path):
    done = execute(
        tmp_path, "--dry-run", "model=130m", "data.vocab_size=32000", "optimizer=galore", "optimizer.rank=256"
    )
    assert (done.returncode, done.stderr) == (0, "")
    weights = 32000 * 768 * 2 + 12 * (4 * 768**2 + 3 * 768 * 2048) + 25 * 768
    assert f"model 130m (llama), vocabulary 32,000: {weights:,} parameters" in done.stdout
    # Per layer: four square matrices and three of 768 x 2048, each with two float32 moments of (long side, 256),
    # and a basis of (768, 256); beside them some counters for each tensor.
    moments = 12 * (4 * 768 + 3 * 2048) * 256 * 2 * 4
    bases = 12 * 7 * 768 * 256 * 4
    line = next(line for line in done.stdout.splitlines() if line.startswith("matrix") and "galore" in line)
    assert 0 <= int(line.split()[4].replace(",", "")) - moments - bases <= 84 * 64
    dense = 2 * 4 * weights / 2**20
    assert f"of AdamW's {dense:,.1f} MiB" in done.stdout
    assert "16 sequences of 256 tokens are 4,096 tokens (1 process × 1 micro-batch × 16 sequences)" in done.stdout
    command = "launch/pretrain.py model=130m data.vocab_size=32000 optimizer=galore optimizer.rank=256"
    assert done.stdout.rstrip().endswith(command)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["run.name=a b"], "  python launch/pretrain.py 'run.name=a b'"),
        (
            ["trainer.devices=4", "trainer.log_every=1"],
            "  torchrun --standalone --nproc-per-node 4 launch/pretrain.py trainer.devices=4 trainer.log_every=1",
        ),
        (
            ["trainer.devices=2", "trainer.num_nodes=2"],
            "  torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 2 "
            "launch/pretrain.py trainer.devices=2 trainer.num_nodes=2",
        ),
    ],
)
def test_the_launch_line_starts_what_was_planned(call, argv, line):
    code, out, err = call("--dry-run", "trainer.accelerator=cpu", *argv)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].replace("trainer.accelerator=cpu ", "") == line


def test_dry_run_takes_files_tokenizers_and_token_budgets(call, tmp_path):
    (tmp_path / "x.yaml").write_text("data: {tokenizer: bytes}\ntrainer: {max_steps: null, max_tokens: 10_000}\n")
    code, out, err = call("--dry-run", "--config", "x.yaml")
    assert (code, err) == (0, "")
    assert "vocabulary 257" in out
    assert "the run: 3 steps, 12,288 tokens" in out
    assert out.rstrip().endswith("launch/pretrain.py --config=x.yaml")


def test_cfg_prints_the_tree_that_config_reads(call, tmp_path):
    argv = ["optimizer=galore", "trainer.max_steps=7", "run.name=x"]
    code, out, err = call("--cfg", *argv)
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["trainer"]["max_steps"] == 7
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.yaml").write_text(out)
    assert load(PRETRAIN, ["--config", str(tmp_path / "x.yaml")]).tree == load(PRETRAIN, argv).tree


def test_help_is_printed(call, tmp_path):
    code, out, err = call("--help", "optimizer=galore")
    assert (code, err) == (0, "")
    assert "  optimizer.update_proj_gap: int = " in out
    assert list(tmp_path.iterdir()) == []


def test_only_rank_zero_prints(call, monkeypatch):
    monkeypatch.setattr(command, "RANK", "1")
    assert call("--cfg") == (0, "", "")
    assert call("optimizer.rnk=3") == (2, "", "")


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--hlep"], "error: unknown option --hlep: did you mean --help?\n"),
        (["optimizer.rnk=3"], "error: unknown key optimizer.rnk: did you mean optimizer.rank?\n"),
        (["model.hidden_size=0"], "error: model.hidden_size must be an integer of at least 1, got 0"),
        (["data.sequence_length=2048"], "error: data.sequence_length must be at most model.max_position_embeddings"),
        (["data=files"], "error: data.train must name at least one glob pattern, got none"),
        (["--dry-run", "optimizer=galore", "optimizer.targets=[zzz]"], "error: optimizer.targets: 'zzz' matches no"),
        (["--dry-run", "model.architecture=lama"], "error: model.architecture 'lama' is no causal language model"),
        (["--dry-run", "trainer.devices=3"], "error: trainer.batch_size must be a multiple of the 3 processes, got 16"),
        (["trainer.batch_size=5", "trainer.micro_batch_size=2"], "error: trainer.micro_batch_size must divide the 5"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_two_and_nothing_is_written(call, tmp_path, argv, sentence):
    code, out, err = call(*argv)
    assert (code, out) == (2, "")
    assert err.startswith(sentence)
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_option_is_told_before_anything_heavy_is_imported(tmp_path):
    done = execute(tmp_path, "--hlep", launcher=(sys.executable, "-X", "importtime"))
    assert done.returncode == 2
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "thinrank.configs.arguments" in imported
    assert not imported & {"torch", "omegaconf", "lightning"}


def test_looking_imports_neither_lightning_nor_transformers(tmp_path):
    done = execute(tmp_path, "--cfg", launcher=(sys.executable, "-X", "importtime"))
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch" in imported  # the optimizers' configurations stand beside their classes
    assert not imported & {"lightning", "lightning.pytorch", "transformers", "datasets"}


# Endings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ({"run": {"exit_code": 0}}, 0, ""),
        ({"run": {"exit_code": 75}}, 75, ""),
        (UserError("set run.dir to a folder that can be written"), 2, "error: set run.dir to a folder that can be"),
        (GuardStop("lower trainer.clip_norm"), 76, "error: lower trainer.clip_norm"),
        (PreflightError("rank 1 on b is slow"), 3, "error: rank 1 on b is slow"),
    ],
)
def test_how_training_ended_is_the_exit_code(call, monkeypatch, ending, code, said):
    def pretrain(config, *, resolved):
        assert resolved["trainer"]["max_steps"] == config.trainer.max_steps == 3
        if isinstance(ending, Exception):
            raise ending
        return ending

    monkeypatch.setattr(runs, "pretrain", pretrain)
    found, out, err = call("trainer.max_steps=3")
    assert (found, out) == (code, "")
    assert err.startswith(said)


def test_a_crash_keeps_its_traceback(call, monkeypatch):
    def pretrain(config, *, resolved):
        raise ZeroDivisionError

    monkeypatch.setattr(runs, "pretrain", pretrain)
    with pytest.raises(ZeroDivisionError):
        call()


def test_under_torchrun_the_sentence_is_in_the_summary(tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = execute(tmp_path, "--hlep", launcher=torchrun)
    assert done.returncode == 1
    # Rank 1 may be the first to end, and torchrun then ends rank 0 before it has spoken.
    assert done.stderr.count("error: unknown option --hlep: did you mean --help?") <= 1
    assert "traceback : unknown option --hlep: did you mean --help?" in done.stderr
    assert f'File "{SCRIPT}"' not in done.stderr
    assert list(tmp_path.iterdir()) == []
