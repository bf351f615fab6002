"""The real schema: every key is explained, every shipped file loads, what is printed can be read back."""

import pytest
import yaml

from thinrank.configs.arguments import parse
from thinrank.configs.errors import ConfigError
from thinrank.configs.fields import default, hints, in_words, leaves, section
from thinrank.configs.help import help_text, meaning
from thinrank.configs.load import load, resolve
from thinrank.configs.reader import read, write
from thinrank.configs.schema import FINETUNE, FOLDER, PRETRAIN
from thinrank.optim.methods import METHODS
from thinrank.trainers.models import PRESETS

NEEDED = {"data=files": ["data.train=[corpus/*.txt]"]}  # what a choice cannot run without
SCHEMAS = {"pretrain": PRETRAIN, "finetune": FINETUNE}
CHOICES = [
    (schema, f"{group}={name}")
    for schema in SCHEMAS.values()
    for group in schema.groups
    for name in schema.choices(group)
]
IDS = [f"{schema.base}-{choice}" for schema, choice in CHOICES]


def classes():
    """Every dataclass of the schemas with the key that it stands under."""
    for schema in SCHEMAS.values():
        for name, hint in hints(schema.root).items():
            for one in schema.classes(name).values() or [schema.groups.get(name, hint)]:
                cls = section(one)
                assert cls is not None, f"{name} is no dataclass"
                yield name, cls


KEYS = sorted(
    {(f"{cls.__name__}.{field}", cls, field) for root, top in classes() for _, cls, field in leaves(top, root)}, key=str
)


@pytest.mark.parametrize(("cls", "field"), [(cls, field) for _, cls, field in KEYS], ids=[name for name, _, _ in KEYS])
def test_every_field_has_a_meaning_and_a_type_in_words(cls, field):
    text = meaning(cls, field)
    assert text, f"{cls.__name__}.{field} needs field(default=…, metadata={{'help': '…'}})"
    assert "\n" not in text
    assert len(text) <= 140, "one line"
    assert not in_words(hints(cls)[field]).startswith(("typing.", "<"))


def test_every_class_says_what_it_is():
    for _, cls in classes():
        assert cls.__doc__
        assert not cls.__doc__.startswith(f"{cls.__name__}("), f"{cls.__name__} needs a docstring of its own"


@pytest.mark.parametrize(("schema", "choice"), CHOICES, ids=IDS)
def test_the_help_of_every_choice_lists_its_keys(schema, choice):
    group = choice.partition("=")[0]
    text = help_text(schema, parse([choice]), usage="launch/pretrain.py", width=100)
    found = {line.strip().partition(":")[0] for line in text.splitlines() if line.startswith(f"  {group}.")}
    cls = resolve(schema, [choice]).sections[group]
    assert found == {key for key, _, _ in leaves(cls, f"{group}.")}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_the_whole_help_lists_every_key_of_the_default_choices(schema):
    text = help_text(schema, parse([]), usage="launch/pretrain.py", width=100)
    for name, hint in resolve(schema, []).sections.items():
        cls = section(hint)
        assert cls is not None
        for key, _, _ in leaves(cls, f"{name}."):
            assert f"\n  {key}: " in text


@pytest.mark.parametrize(("schema", "choice"), CHOICES, ids=IDS)
def test_every_shipped_choice_loads_and_reads_back(schema, choice, tmp_path):
    group, _, name = choice.partition("=")
    loaded = load(schema, [choice, *NEEDED.get(choice, [])])
    path = schema.choices(group)[name]
    recipe = None if path is None else read(path).values.get("name")  # a recipe says whose settings it has
    assert loaded.names[group] == (recipe or name)
    (tmp_path / "x.yaml").write_text(write(loaded.tree))
    again = load(schema, ["--config", str(tmp_path / "x.yaml")])
    assert again.tree == loaded.tree
    assert again.config == loaded.config


def test_a_tree_written_by_another_yaml_library_reads_back(tmp_path):
    loaded = load(PRETRAIN, ["trainer.max_time=1:30:00", "optimizer.eps=1e-12", "run.dir=${run.name}/x"])
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(loaded.tree))
    assert load(PRETRAIN, ["--config", str(tmp_path / "x.yaml")]).tree == loaded.tree


def test_every_yaml_file_belongs_to_a_group_and_every_choice_has_one():
    chosen = {
        schema.base: {choice.replace("=", "/") for each, choice in CHOICES if each is schema}
        for schema in SCHEMAS.values()
    }
    shipped = {path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.yaml")}
    assert shipped == chosen["pretrain"]
    own = {
        path.relative_to(FOLDER / "finetune").with_suffix("").as_posix() for path in FOLDER.glob("finetune/*/*.yaml")
    }
    assert own <= chosen["finetune"] <= own | shipped
    for schema in SCHEMAS.values():
        assert set(read(FOLDER / f"{schema.base}.yaml").values) >= set(schema.groups)


def test_yaml_files_hold_only_what_differs_from_the_dataclass():
    for schema, choice in CHOICES:
        group, _, name = choice.partition("=")
        if group == "model":
            continue  # a model's sizes are written in full
        resolved = resolve(schema, [choice])
        path = schema.choices(group)[name]
        assert path is not None
        for key in read(path).values.keys() - {"name"}:
            assert resolved.tree[group][key] != default(resolved.sections[group], key), (
                f"{choice}: {key} is the default"
            )


def test_models_are_the_presets():
    assert {name: load(PRETRAIN, [f"model={name}"]).config.model for name in PRESETS} == PRESETS


def test_recipes_are_the_published_ones():
    """By name; what they do not say is the method's default, which is the authors', too."""
    big = load(PRETRAIN, ["optimizer=galore_7b"]).config.optimizer
    assert type(big) is METHODS["galore"]
    assert (big.rank, big.lr, big.scale, big.update_proj_gap, big.state_bits) == (1024, 5e-3, 0.25, 500, 8)
    fira = load(PRETRAIN, ["optimizer=fira_1b"]).config.optimizer
    assert (fira.rank, fira.lr, fira.scale, fira.update_proj_gap) == (512, 0.01, 0.0625, 200)


def test_methods_are_those_of_the_optimizers():
    for name, cls in METHODS.items():
        assert type(load(PRETRAIN, [f"optimizer={name}"]).config.optimizer) is cls


def test_the_configuration_carries_what_the_command_line_says():
    argv = [
        "optimizer=galore",
        "optimizer.rank=64",
        "trainer.schedule.kind=linear",
        "data.sequence_length=128",
        "run.dir=/x/y",
    ]
    config = load(PRETRAIN, argv).config
    assert (config.optimizer.rank, config.trainer.schedule.kind) == (64, "linear")
    assert (config.data.sequence_length, config.run.dir) == (128, "/x/y")
    assert load(PRETRAIN, ["strategy=ddp"]).config.strategy.name == "ddp"


def test_coordinates_alone_are_refused_where_a_method_needs_more():
    with pytest.raises(ConfigError, match=r"optimizer=subspace_adamw with .* needs whole gradients, because .*: use"):
        load(PRETRAIN, ["trainer.in_backward=project"])
    load(PRETRAIN, ["trainer.in_backward=project", "optimizer=galore"])
    load(PRETRAIN, ["trainer.in_backward=project", "optimizer=adamw"])
    load(PRETRAIN, ["trainer.in_backward=step"])
