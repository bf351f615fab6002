"""The real schema: every key is explained, every shipped file loads, what is printed can be read back."""

from typing import Any

import pytest
import yaml

from thinrank.configs.arguments import parse
from thinrank.configs.compose import Schema
from thinrank.configs.errors import ConfigError
from thinrank.configs.fields import default, hints, in_words, leaves, section
from thinrank.configs.help import help_text, meaning
from thinrank.configs.load import load, resolve
from thinrank.configs.reader import read, write
from thinrank.configs.schema import FINETUNE, FOLDER, PRETRAIN
from thinrank.optim.layers import REPARAMS
from thinrank.optim.methods import METHODS
from thinrank.optim.scaling import PRESETS as RULES
from thinrank.optim.scaling import ScalingConfig
from thinrank.trainers.models import PRESETS

NEEDED = {"data=files": ["data.train=[corpus/*.txt]"]}  # what a choice cannot run without
NEEDED |= {f"reparam={name}": ["model.pretrained=export"] for name, cls in REPARAMS.items() if not cls.PRETRAINS}
NEEDED |= {f"scaling={name}": ["scaling.base_width=64", "scaling.base_depth=2"] for name in RULES if name != "none"}
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
    needed = [] if schema is FINETUNE and choice.startswith("reparam=") else NEEDED.get(choice, [])
    loaded = load(schema, [choice, *needed])
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


GALORE = {"name": "galore", "lr": 0.01, "scale": 0.25, "update_proj_gap": 200, "eps": 1e-6, "state_bits": 32}
FIRA = {**GALORE, "name": "fira", "transport": "keep", "residual_limit": 1.01, "svd": "exact", "sign_feedback": "off"}
APOLLO = {**GALORE, "name": "apollo", "scale": 1.0, "proj": "random", "scale_type": "channel", "disable_nl": False}
MINI = {**APOLLO, "name": "apollo_mini", "lr": 0.02, "rank": 1, "scale": 128.0, "scale_type": "tensor"}
LDADAM = {"name": "ldadam", "lr": 1e-3, "rho": 0.908, "betas": (0.908, 0.99), "eps": 1e-8, "error_feedback": "full"}
RECIPES = {
    "galore_60m": ({**GALORE, "rank": 128}, ("60m", 10_000, None)),
    "galore_130m": ({**GALORE, "rank": 256}, ("130m", 20_000, None)),
    "galore_350m": ({**GALORE, "rank": 256}, ("350m", 60_000, None)),
    "galore_1b": ({**GALORE, "rank": 512}, ("1b", 100_000, None)),
    "galore_7b": (
        {**GALORE, "lr": 5e-3, "rank": 1024, "update_proj_gap": 500, "state_bits": 8, "eps": 1e-8},
        ("7b", 150_000, 1.0),
    ),
    "fira_60m": ({**FIRA, "rank": 128}, ("60m", 10_000, None)),
    "fira_1b": ({**FIRA, "rank": 512, "scale": 0.0625}, ("1b", 100_000, None)),
    "apollo_60m": ({**APOLLO, "rank": 128}, ("60m", 10_000, None)),
    "apollo_130m": ({**APOLLO, "rank": 192}, ("130m", 20_000, None)),
    "apollo_350m": ({**APOLLO, "rank": 256}, ("350m", 60_000, None)),
    "apollo_1b": ({**APOLLO, "rank": 512}, ("1b", 100_000, None)),
    "apollo_mini_60m": (MINI, ("60m", 10_000, None)),
    "apollo_mini_130m": (MINI, ("130m", 20_000, None)),
    "apollo_mini_350m": (MINI, ("350m", 60_000, None)),
    "apollo_mini_1b": (MINI, ("1b", 100_000, None)),
    "ldadam_350m": ({**LDADAM, "rank": 8}, ("350m", 55_000, None)),
}
"""Of every file of a published recipe: what it amounts to, and model, steps and clipping norm that complete it."""
MUON = {"lr": 1e-3, "embedding_lr": None, "weight_decay": 0.1, "adjust_lr": "match_rms_adamw"}
DION = {"lr": 0.02, "weight_decay": 0.01, "momentum": 0.95, "rank": 0.5}
TRION = {"lr": 0.01, "weight_decay": 0.01, "momentum": 0.95, "rank": 256, "basis": "dct", "norm": "l1"}
GLUE = {"lr": 3e-5, "rank": 4, "scale": 4.0, "update_proj_gap": 500, "weight_decay": 0.0}
TRION_RUN = {"data.sequence_length": 512, "trainer.batch_size": 512, "trainer.max_steps": 26_700}
DION_RUN = {"data.sequence_length": 1024, "trainer.batch_size": 1024, "trainer.max_steps": 3000}
IN_PART: dict[str, tuple[Schema, dict[str, Any], dict[str, Any]]] = {
    "muon_moonlight": (PRETRAIN, {**MUON, "name": "muon", "momentum": 0.95, "nesterov": True}, {}),
    "dion_160m": (
        PRETRAIN,
        {**DION, "name": "dion"},
        {**DION_RUN, "trainer.schedule.decay_fraction": 0.2, "trainer.schedule.warmup_steps": 0},
    ),
    "trion_350m": (PRETRAIN, {**TRION, "name": "trion"}, {**TRION_RUN, "model.hidden_size": 1024}),
    "galore_glue": (FINETUNE, {**GLUE, "name": "galore"}, {"trainer.batch_size": 16}),
}
"""Of recipes of which a part is not known, or cannot be had here, the same, by keys."""

REST = "# The rest of the recipe: "


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_ones(name):
    """Whether a value stands in the file or is the method's default; the rest as the file's comment says it."""
    expected, (model, steps, clip) = RECIPES[name]
    expected = {"betas": (0.9, 0.999), "weight_decay": 0.0, "rank_allocation": "uniform", **expected}
    path = PRETRAIN.choices("optimizer")[name]
    assert path is not None
    rest = next(line for line in path.read_text().splitlines() if line.startswith(REST)).removeprefix(REST).split()
    config = load(PRETRAIN, [f"optimizer={name}", *rest]).config
    assert {key: getattr(config.optimizer, key) for key in expected} == expected
    trainer, schedule = config.trainer, config.trainer.schedule
    assert config.model == PRESETS[model]
    assert (trainer.max_steps, trainer.batch_size, trainer.clip_norm) == (steps, 512, clip)
    # these are the defaults of the other groups
    assert config.data.sequence_length == 256
    assert (schedule.kind, schedule.min_lr_fraction) == ("cosine", 0.1)
    assert (schedule.warmup_steps, schedule.warmup_fraction) == (None, 0.1)


def test_every_published_recipe_is_in_the_table():
    sized = {name for name in PRETRAIN.choices("optimizer") if name.rpartition("_")[2] in PRESETS}
    assert set(RECIPES) <= sized <= {*RECIPES, *IN_PART}


@pytest.mark.parametrize("name", IN_PART)
def test_recipes_that_are_known_in_part_are_that(name):
    schema, expected, known = IN_PART[name]
    path = schema.choices("optimizer")[name]
    assert path is not None
    lines = [line.removeprefix(REST) for line in path.read_text().splitlines() if line.startswith(REST)]
    loaded = load(schema, [f"optimizer={name}", *(word for line in lines for word in line.split())])
    assert {key: getattr(loaded.config.optimizer, key) for key in expected} == expected
    for key, value in known.items():
        found: Any = loaded.tree
        for part in key.split("."):
            found = found[part]
        assert found == value, key


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


def test_the_rules_of_scale_are_those_of_their_files():
    assert set(PRETRAIN.choices("scaling")) == set(RULES)
    for name, values in RULES.items():
        loaded = load(PRETRAIN, [f"scaling={name}", *NEEDED.get(f"scaling={name}", [])]).config.scaling
        base: dict[str, Any] = {} if name == "none" else {"base_width": 64, "base_depth": 2}
        assert loaded == ScalingConfig(**values, **base)
