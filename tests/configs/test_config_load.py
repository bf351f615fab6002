"""Composition: the order of the layers, the types, and one sentence for each mistake."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from toy_schema import Net, Plain, Plan, Root, Run, Thin, Train, schema, write

from thinrank.configs.errors import ConfigError
from thinrank.configs.load import load
from thinrank.configs.reader import read, word
from thinrank.configs.reader import write as to_yaml


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return schema(tmp_path_factory.mktemp("toy"))


def refused(toy, *argv):
    with pytest.raises(ConfigError) as caught:
        load(toy, argv)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# Order of the layers -------------------------------------------------------------------------------------------------


def test_defaults_come_from_the_dataclasses(toy):
    assert load(toy, []).config == Root(
        run=Run(folder="out/try"), net=Net(), method=Plain(), train=Train(plan=Plan(warmup=3))
    )


def test_a_choice_brings_its_dataclass_and_its_yaml(toy):
    loaded = load(toy, ["method=thin", "net=large"])
    assert loaded.config.method == Thin(lr=0.02)
    assert loaded.config.net == Net(name="large", width=64, extra={"deep": True})
    assert (loaded.names["method"], loaded.sections["method"]) == ("thin", Thin)


def test_a_key_wins_over_the_choice_wherever_it_stands(toy):
    for argv in (["method.lr=3", "method=thin"], ["method=thin", "method.lr=3"]):
        assert load(toy, argv).config.method == Thin(lr=3.0)


def test_the_right_most_of_two_keys_and_of_two_choices_wins(toy):
    assert load(toy, ["train.steps=5", "train.steps=6"]).config.train.steps == 6
    assert load(toy, ["method=thin", "method=plain"]).config.method == Plain()


def test_files_win_over_choices_and_words_over_files(toy, tmp_path):
    write(tmp_path, {"a.yaml": "method: thin\ntrain: {steps: 3, clip: 5}\n", "b.yaml": "train: {steps: 4}\n"})
    files = ["--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}"]
    config = load(toy, files).config
    assert (config.method, config.train.steps, config.train.clip) == (Thin(lr=0.02), 4, 5.0)
    assert load(toy, [*files, "train.steps=9"]).config.train.steps == 9
    assert load(toy, ["train.steps=9", *files]).config.train.steps == 9


def test_a_file_may_choose_with_name_and_overlay(toy, tmp_path):
    write(tmp_path, {"a.yaml": "method: {name: thin, rank: 4}\n", "b.yaml": "method: {name: thin, lr: 1}\n"})
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    assert load(toy, files).config.method == Thin(rank=4, lr=1.0)


def test_a_later_choice_replaces_the_group_that_an_earlier_layer_filled(toy, tmp_path):
    write(tmp_path, {"a.yaml": "method: {name: thin, rank: 4}\ntrain: {clip: 5}\n"})
    config = load(toy, ["--config", str(tmp_path / "a.yaml"), "method=plain", "train=debug"]).config
    assert config.method == Plain()
    assert config.train == Train(steps=2, plan=Plan(kind="slope", warmup=3))


def test_name_as_a_key_chooses_too(toy):
    assert load(toy, ["method.name=thin"]).config.method == Thin(lr=0.02)
    assert load(toy, ["method={name: thin, rank: 2}"]).config.method == Thin(lr=0.02, rank=2)
    assert load(toy, ["net.name=large"]).config.net.width == 64
    assert load(toy, ["net.name=mine"]).config.net == Net(name="mine")


def test_a_users_folder_is_searched_first(toy, tmp_path):
    write(tmp_path, {"net/large.yaml": "width: 32\n", "method/mine.yaml": "name: thin\nrank: 7\n"})
    folder = ["--config-dir", str(tmp_path)]
    assert load(toy, [*folder, "net=large"]).config.net.width == 32
    assert load(toy, [*folder, "method=mine"]).config.method == Thin(rank=7)
    assert load(toy, [*folder, "net=small"]).config.net == Net()


def test_a_users_file_is_a_choice(toy, tmp_path):
    write(tmp_path, {"huge.yaml": "width: 128\n", "mine.yaml": "name: thin\nrank: 7\n"})
    assert load(toy, [f"net={tmp_path / 'huge.yaml'}"]).config.net == Net(name="huge", width=128)
    assert load(toy, [f"method={tmp_path / 'mine.yaml'}"]).config.method == Thin(rank=7)


def test_mappings_are_merged_and_lists_are_replaced(toy):
    config = load(
        toy, ["net=large", "net.extra.more=1", "net.extra={less: [x]}", "method=thin", "method.targets=[a, b]"]
    )
    assert config.config.net.extra == {"deep": True, "more": 1, "less": ["x"]}
    assert config.config.method.targets == ["a", "b"]


def test_a_section_can_be_given_whole_and_keeps_its_other_values(toy):
    assert load(toy, ["train.plan={kind: slope}"]).config.train.plan == Plan(kind="slope", warmup=3)
    assert load(toy, ["train.plan.kind=slope"]).config.train.plan == Plan(kind="slope", warmup=3)


def test_interpolation_reads_other_keys_and_keeps_their_type(toy, monkeypatch):
    monkeypatch.setenv("TOY", "deep")
    argv = ["run.name=x", "net.width=${train.steps}", "run.prompt=${oc.env:TOY} ${run.folder}", "train.steps=12"]
    loaded = load(toy, argv)
    assert (loaded.config.run, loaded.config.net.width) == (Run(name="x", folder="out/x", prompt="deep out/x"), 12)
    assert loaded.tree["run"]["folder"] == "out/x"


# Types ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "path", "value"),
    [
        ("method.rank=64", "method.rank", 64),
        ("method.rank=0.5", "method.rank", 0.5),
        ("method.rank=1.0", "method.rank", 1.0),
        ("method.rank=null", "method.rank", None),
        ("method.lr=1e-3", "method.lr", 0.001),
        ("method.lr=1", "method.lr", 1.0),
        ("method.betas=[0.8, 1]", "method.betas", (0.8, 1.0)),
        ("train.steps=1e3", "train.steps", 1000),
        ("train.steps=1_000", "train.steps", 1000),
        ("train.devices=2", "train.devices", 2),
        ("train.devices=cpu", "train.devices", "cpu"),
        ("train.log=false", "train.log", False),
        ("train.clip=null", "train.clip", None),
        ("train.plan.warmup=0", "train.plan.warmup", 0),
        ("run.name=1", "run.name", "1"),
        ("run.name=no", "run.name", "no"),
        ("run.name=", "run.name", ""),
        ("run.prompt= def f(x): [", "run.prompt", " def f(x): ["),
        ("run.prompt=note: this", "run.prompt", "note: this"),
        ("run.prompt='a\\n'", "run.prompt", "a\\n"),
        ('run.prompt="a\\n"', "run.prompt", "a\n"),
        ("run.prompt=a=b", "run.prompt", "a=b"),
    ],
)
def test_words_become_the_type_of_the_field(toy, argument, path, value):
    found = load(toy, ["method=thin", argument]).config
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@given(st.one_of(st.floats(allow_nan=False), st.integers(), st.booleans(), st.none(), st.text(), st.lists(st.text())))
def test_yaml_text_reads_back_as_the_same_value(value):
    assume("${" not in repr(value))  # written as \\${, which is for interpolation to undo
    text = to_yaml({"key": value})
    back = word(text)["key"]
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(
    "text", ["1e-3", "00:30:00", "no", "1_0", "null", "~", ".inf", "nan", "0x1", "", "- a", "\x85"]
)
def test_text_that_looks_like_something_else_survives(text):
    assert word(to_yaml({"key": text})) == {"key": text}


def test_the_resolved_tree_loads_to_the_same(toy, tmp_path):
    literal = r"run.prompt=\${run.name} \\\${ ${run.name}"
    argv = [literal, "method=thin", "method.rank=3", "net=large", "train=debug", "run.name=1e-3", "train.clip=1e-5"]
    first = load(toy, argv)
    (tmp_path / "x.yaml").write_text(to_yaml(first.tree))
    again = load(toy, ["--config", str(tmp_path / "x.yaml")])
    assert first.config.run.prompt == r"${run.name} \${ 1e-3"
    assert again.tree == first.tree
    assert again.config == first.config
    assert next(iter(first.tree["method"])) == "name"


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["method.rnk=3", "method=thin"], "unknown key method.rnk: did you mean method.rank?"),
        (["rank=3", "method=thin"], "unknown key rank: did you mean method.rank?"),
        (["warmup=3"], "unknown key warmup: did you mean train.plan.warmup?"),
        (["train.plan.knd=flat"], "unknown key train.plan.knd: did you mean train.plan.kind?"),
        (["trian.steps=3"], "unknown key trian: did you mean train?"),
        (["train.zzz=3"], "unknown key train.zzz: see --help for all keys"),
        (["method.rank=3"], "unknown key method.rank: rank belongs to method=thin, and method=plain is chosen"),
        (
            ["method=thn"],
            "unknown choice method=thn: did you mean thin? The choices are plain, thin or a path to a YAML",
        ),
        (["method=zzz"], "unknown choice method=zzz: choose one of plain, thin or a path to a YAML file"),
        (["method="], "unknown choice method=: choose one of plain, thin or a path to a YAML file"),
        (["method=absent.yaml"], "the configuration file absent.yaml does not exist: check the path"),
        (["--config", "absent.yaml"], "the configuration file absent.yaml does not exist: check the path"),
        (["--config-dir", "absent"], "the folder absent given with --config-dir does not exist: check the path"),
        (["--config"], "--config needs a path: write --config PATH"),
        (["--cofg", "x"], "unknown option --cofg: did you mean --cfg?"),
        (["--method.lr=1"], "unknown option --method.lr=1: keys take no dashes, write method.lr=1"),
        (["-x"], "unknown option -x: see --help"),
        (["galore"], "cannot read 'galore': write key=value, or see --help for the keys and the options"),
        (["=1"], "cannot read '=1': write key=value, or see --help for the keys and the options"),
        (["method.lr=fast"], "method.lr must be a number, got 'fast'"),
        (["method.lr="], "method.lr must be a number, got null"),
        (["method=thin", "method.rank=x"], "method.rank must be a whole number or a number or null, got 'x'"),
        (["method.betas=[1]"], "method.betas must be a list of 2 (a number, a number), as [a, b], got [1]"),
        (["method=thin", "method.targets=a"], "method.targets must be a list (each text), as [a, b], got 'a'"),
        (["train.steps=1.5"], "train.steps must be a whole number, got 1.5"),
        (["train.steps=true"], "train.steps must be a whole number, got true"),
        (["train.log=yes"], "train.log must be true or false, got 'yes'"),
        (["train.plan.kind=hill"], "train.plan.kind must be one of flat, slope, got 'hill'"),
        (["train.plan=flat"], "train.plan has keys of its own, so it cannot be flat: write train.plan.kind=…"),
        (["train=null"], "unknown choice train=null: choose one of debug, default or a path to a YAML file"),
        (["net.extra=3"], "net.extra must be a mapping, as {key: value}, got 3"),
        (["train.plan.warmup=-1"], "train.plan.warmup must be at least 0, got -1: use 0 for none"),
        (["method=thin", "method.rank=0"], "method.rank must be at least 1 or a share in (0, 1], got 0"),
        (["net.width=9000"], "net.width must be at most 100 x train.steps: lower it"),
        (["run.name=${run.nme}"], "run.name cannot be resolved: "),
        (["run.name=${"], "cannot be resolved: "),
        (["run.name=${run.folder}"], "cannot be resolved: "),
    ],
)
def test_a_mistake_gets_one_sentence(toy, argv, sentence):
    assert sentence in refused(toy, *argv)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train:\n  stps: 3\n", "line 2: unknown key train.stps: did you mean train.steps?"),
        ("train:\n  steps: many\n", "line 2: train.steps must be a whole number, got 'many'"),
        ("run:\n  name: 3\n", "line 2: run.name must be text, got 3"),
        ("method: galore\n", "line 1: unknown choice method=galore"),
        ("method:\n  rank: 1\n  name: thn\n", "line 3: unknown choice method=thn: did you mean thin?"),
        ("method: null\n", "line 1: method has keys of its own, so it cannot be None: choose by name, method=NAME"),
        ("train:\n  steps: 3\n  steps: 4\n", "line 3 gives train.steps a second time: keep one of the two"),
        ("train:\n  steps: [\n", "line 3 is not valid YAML: "),
        ("train: {steps: 1\nrun: x", "line 2 is not valid YAML: "),
        ("- a\n", "must hold keys and values (`key: value`), it holds list"),
        ("text", "must hold keys and values (`key: value`), it holds str"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_and_the_line(toy, tmp_path, text, sentence):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    found = refused(toy, "--config", str(path))
    assert found.startswith(str(path))
    assert sentence in found


def test_a_word_is_not_blamed_on_a_file(toy, tmp_path):
    (tmp_path / "mine.yaml").write_text("train:\n  steps: 3\n")
    assert refused(toy, "--config", str(tmp_path / "mine.yaml"), "train.steps=x").startswith("train.steps must be")


def test_a_file_that_is_no_text_is_refused(toy, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    assert re.search("mine.yaml cannot be read as text: ", refused(toy, "--config", str(tmp_path / "mine.yaml")))
    assert re.search("cannot be read as text: ", refused(toy, "--config", str(tmp_path)))


def test_a_file_for_a_group_of_several_classes_says_which(toy, tmp_path):
    (tmp_path / "mine.yaml").write_text("rank: 3\n")
    found = refused(toy, f"method={tmp_path / 'mine.yaml'}")
    assert "does not say what it configures: add a line `name: …` with one of plain, thin" in found


def test_an_empty_file_changes_nothing(toy, tmp_path):
    (tmp_path / "mine.yaml").write_text("# nothing yet\n")
    assert load(toy, ["--config", str(tmp_path / "mine.yaml")]).config == load(toy, []).config
    assert read(tmp_path / "mine.yaml").values == {}
