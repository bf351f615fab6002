"""The look at a model's spectra: an export, a run folder, factors, comparisons, pictures, mistakes in a sentence."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from thinrank.optim.layers import LowRank, convert
from thinrank.optim.monitors import spectral_report
from thinrank.trainers import checkpoint
from thinrank.trainers.export import export
from thinrank.trainers.inspecting import plots
from thinrank.trainers.inspecting.stored import SafeTensors, open_weights
from thinrank.trainers.reparam import export_factors

LAUNCH = Path(__file__).parents[2] / "launch"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load_script():
    spec = importlib.util.spec_from_file_location("launch_spectra", LAUNCH / "spectra.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs the script's `main` in an empty folder: exit code, standard output, standard error."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*argv):
        code = load_script().main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return call


def tiny(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=70,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    model = LlamaForCausalLM(config)
    torch.set_rng_state(state)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An export, one with another layer, one whose layers are factors, and a run with a checkpoint."""
    base = tmp_path_factory.mktemp("models")
    model = tiny()
    export(model, None, base / "export")
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    checkpoint.save({"state_dict": state}, base / "run" / "checkpoints" / checkpoint.checkpoint_name(3))
    (base / "run" / "checkpoints" / checkpoint.checkpoint_name(5)).write_bytes(b"cut off")
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight += 3 * torch.outer(torch.linspace(-1, 1, 80), torch.ones(64)) / 64**0.5
    export(model, None, base / "changed")
    convert(model, LowRank(rank=4))
    export_factors(model, None, base / "factors")
    return base


def lines_of(out):
    """The words of the table's lines by the first of them."""
    return {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}


def rows_of(model):
    return {row["name"]: row for row in spectral_report(model)}


def test_a_table_of_an_export(call, folders, tmp_path):
    code, out, err = call(folders / "export")
    assert (code, err) == (0, "")
    lines = lines_of(out)
    names = [f"model.layers.{i}.{'mlp' if name[0] in 'gud' else 'self_attn'}.{name}" for i in (0, 1) for name in LINEAR]
    assert {*names, "model.embed_tokens", "median"} <= set(lines)
    assert "lm_head" not in lines  # tied
    rows = rows_of(tiny())
    assert lines[names[0]][4] == f"({rows[names[0]]['alpha']:.3g})"  # of noise, so in brackets
    for name in names:
        assert float(lines[name][7]) == pytest.approx(rows[name]["stable_rank"], rel=0.01)
        assert float(lines[name][6]) == pytest.approx(rows[name]["farms_alpha"], rel=0.01)
    assert list((tmp_path / "here").iterdir()) == []


def test_a_run_folder_is_its_newest_complete_checkpoint(call, folders):
    with pytest.warns(UserWarning, match="truncated or was not written by this library and is skipped"):
        code, out, err = call(folders / "run", "--metrics", "stable_rank,kappa_q", "--layers", "mlp")
    assert (code, err) == (0, "")
    assert "step-00000003.ckpt" in out.splitlines()[0]
    _, of_export, _ = call(folders / "export", "--metrics=stable_rank,kappa_q", "--layers=mlp")
    mine, theirs = (
        {key: line for key, line in lines_of(text).items() if key.startswith(("model.", "median"))}
        for text in (out, of_export)
    )
    assert mine == theirs
    assert len(mine) == 7


def test_a_report_with_pictures(call, folders, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib (extra `study`) is not installed")
    monkeypatch.setattr(plots, "PER_PAGE", 2)
    words = ("--compare", folders / "export", "--out", tmp_path / "report", "--layers", "1.mlp")
    code, _, err = call(folders / "changed", *words)
    assert (code, err) == (0, "")
    names = {path.name for path in (tmp_path / "report").iterdir()}
    pictures = {"spectra-01.png", "spectra-02.png", "alpha.png", "rank.png", "compared.png"}
    assert names == {"report.md", "spectra.json", *pictures}
    for name in pictures:
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report" / "report.md").read_text()
    assert all(f"]({name})" in page for name in pictures)
    assert "| model.layers.1.mlp.up_proj | 64 × 80 |" in page
    found = json.loads((tmp_path / "report" / "spectra.json").read_text())
    rows = {row["name"]: row for row in found["layers"]}
    changed = rows.pop("model.layers.1.mlp.up_proj")
    assert changed["intruders"] >= 1
    assert changed["drift_js"] > 0
    assert all(row["intruders"] == 0 and row["relative_change"] == 0 for row in rows.values())
    assert len(changed["singular_values"]) == 64
    assert changed["singular_values"][0] == pytest.approx(changed["sv_max"], rel=1e-5)


def test_without_matplotlib_a_sentence_says_so(call, folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, _ = call(folders / "export", "--out", tmp_path / "report", "--metrics", "stable_rank")
    assert code == 0
    assert out.rstrip().endswith(plots.INSTALL)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.md", "spectra.json"}
    assert plots.INSTALL in (tmp_path / "report" / "report.md").read_text()


def test_factors_are_measured_by_their_product(call, folders):
    code, out, err = call(folders / "export", "--metrics", "alpha", "--layers", "0.mlp.up")
    assert (code, err) == (0, "")
    assert out.splitlines()[3].split()[4].startswith("(")
    code, out, err = call(folders / "factors", "--metrics", "matrix_rank,alpha", "--layers", "mlp")
    assert (code, err) == (0, "")
    assert out.count("rank 4 of 64; no alpha: 4 eigenvalues, fewer than 50") == 6
    lines = lines_of(out)
    assert [line[4] for name, line in lines.items() if name.startswith("model.")] == ["4"] * 6
    code, out, _ = call(folders / "factors", "--compare", folders / "export", "--metrics", "intruders,relative_change")
    assert code == 0
    assert "model.layers.0.mlp.up_proj" in lines_of(out)


def test_tensors_are_read_one_at_a_time(folders):
    source = open_weights(folders / "export").source
    assert isinstance(source, SafeTensors)
    assert "model.embed_tokens.weight" in source
    assert len(source) == 1 + 2 * 9 + 1
    alone: Any = open_weights(folders / "export" / "model.safetensors").source
    assert set(alone) == set(source)


def test_shards_are_one_model(call, folders, tmp_path):
    source: Any = open_weights(folders / "export").source
    state: dict[str, torch.Tensor] = dict(source)
    names = sorted(state)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, some in parts.items():
        save_file({name: state[name] for name in some}, tmp_path / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    code, out, _ = call(tmp_path, "--metrics", "stable_rank")
    assert code == 0
    assert len([name for name in lines_of(out) if name.startswith("model.")]) == 15
    (tmp_path / "b.safetensors").unlink()
    code, _, err = call(tmp_path)
    assert code == 2
    assert "lacks b.safetensors of the files that its index names" in err


def test_a_run_of_factors_is_built_by_its_configuration(call, tmp_path):
    """SST's six tensors make one weight; in a state dict nobody knows that."""
    import yaml

    from thinrank.configs.arguments import Arguments
    from thinrank.configs.load import load
    from thinrank.configs.schema import PRETRAIN
    from thinrank.trainers.jobs import Pretraining

    words = {
        "model.hidden_size": "16",
        "model.intermediate_size": "32",
        "model.num_hidden_layers": "1",
        "model.num_attention_heads": "2",
        "data": "files",
        "data.train": "[x.txt]",
        "data.tokenizer": "bytes",
        "reparam": "sst",
        "reparam.rank": "4",
    }
    loaded = load(PRETRAIN, Arguments(words=tuple(words.items())))
    job = Pretraining(loaded.config)
    model = job.build(257)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    run = tmp_path / "run"
    checkpoint.save({"state_dict": state}, run / "checkpoints" / checkpoint.checkpoint_name(1))
    (run / "config.yaml").write_text(yaml.safe_dump(loaded.tree))
    code, out, err = call(run, "--metrics", "effective_rank", "--layers", "layers")
    assert (code, err) == (0, "")
    lines = {name: line for name, line in lines_of(out).items() if name.startswith("model.")}
    assert len(lines) == 7
    expected = rows_of(model)
    for name, line in lines.items():
        assert float(line[4]) == pytest.approx(expected[name]["effective_rank"], rel=0.01)
    frozen = {name: value for name, value in state.items() if "up_proj.V_rest" not in name}
    checkpoint.save({"state_dict": frozen}, run / "checkpoints" / checkpoint.checkpoint_name(2))
    code, out, _ = call(run, "--metrics", "effective_rank", "--layers", "layers")
    assert code == 0
    assert "no values of V_rest" in out
    assert "weights without values are frozen ones" in out
    (run / "config.yaml").write_text("model: {name: 2m}\nnonsense: 1\n")
    code, out, _ = call(run, "--metrics", "effective_rank", "--layers", "layers")
    assert code == 0
    assert "measured as they lie in the file" in out
    assert "model.layers.0.mlp.up_proj.U_rest" in lines_of(out)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "one model is looked at, got none"),
        (["a", "b"], "one model is looked at, got a and b"),
        (["nowhere"], "nowhere does not exist: give a checkpoint, a run folder"),
        (["EXPORT", "--metric", "alpha"], "unknown option --metric: did you mean --metrics?"),
        (["EXPORT", "--out"], "--out needs a value"),
        (["EXPORT", "--metrics", "stable_rnk"], "unknown metric stable_rnk: did you mean stable_rank?"),
        (["EXPORT", "--metrics", "intruders"], "the metric intruders compares two models: add --compare OTHER"),
        (["EXPORT", "--layers", "("], "--layers must be a regular expression, got '('"),
        (["EXPORT", "--layers", "conv"], "no weight has a name that contains 'conv': choose of such as model."),
        (["EXPORT", "--out", "FILE"], "--out must be a folder, and "),
        (["EMPTY"], "holds no weights: give a checkpoint, a run folder"),
        (["PICKLE"], "holds weights as pickles (.bin), which may run code"),
        (["FILE"], "is truncated or was not written by this library"),
        (["BROKEN"], "cannot be read as safetensors"),
        (["VECTORS"], "there is no weight of two dimensions in it"),
        (["EXPORT", "--compare", "OTHER"], "the two models have no weight of one name"),
    ],
)
def test_mistakes_are_a_sentence(call, folders, tmp_path, words, sentence):
    places = {"EXPORT": folders / "export", "FILE": tmp_path / "file"}
    places |= {name: tmp_path / name.lower() for name in ("EMPTY", "PICKLE", "BROKEN", "VECTORS", "OTHER")}
    for name, path in places.items():
        if name in ("EMPTY", "PICKLE", "BROKEN", "VECTORS", "OTHER"):
            path.mkdir()
    (tmp_path / "file").write_text("no checkpoint")
    (tmp_path / "pickle" / "pytorch_model.bin").write_text("")
    (tmp_path / "broken" / "model.safetensors").write_text("nothing")
    save_file({"bias": torch.ones(3)}, tmp_path / "vectors" / "model.safetensors")
    save_file({"other.weight": torch.ones(3, 3)}, tmp_path / "other" / "model.safetensors")
    code, out, err = call(*(places.get(word, word) for word in words))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_help_and_the_list_of_columns(call):
    code, out, _ = call("--help")
    assert code == 0
    assert "--compare OTHER" in out
    code, out, _ = call("anything", "--metrics", "help")
    assert code == 0
    assert "farms_alpha" in out
    assert "intruders" in out


def test_no_script_has_the_name_of_a_module_of_python():
    """The folder of a script is where Python looks first: an `inspect.py` there would be everyone's `inspect`."""
    assert not {path.stem for path in LAUNCH.glob("*.py")} & set(sys.stdlib_module_names)
