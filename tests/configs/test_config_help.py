"""The help lists every key with its type, its value and its meaning, for what the command line chooses."""

import pytest
from toy_schema import schema

from thinrank.configs.arguments import parse
from thinrank.configs.help import help_text


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return schema(tmp_path_factory.mktemp("toy"))


def text(toy, *argv, width=100):
    return help_text(toy, parse(argv), usage="toy.py", width=width)


def test_every_key_has_its_type_its_value_and_its_meaning(toy):
    lines = text(toy).splitlines()
    for line, meaning in [
        ("run.prompt: str = 'def '", "a text"),
        ("net.extra: mapping = {}", "more"),
        ("method.betas: list[float, float] = [0.9, 0.99]", "two decay rates"),
        ("train.devices: int | str = auto", "how many"),
        ("train.log: bool = true", "whether to log"),
        ("train.clip: float | null = 1.0", "limit"),
        ("train.plan.kind: flat | slope = flat", "the shape"),
        ("train.plan.warmup: int | null = 3", "steps of warm-up"),
    ]:
        at = lines.index(f"  {line}")
        assert lines[at + 1].strip() == meaning


def test_options_groups_and_choices_are_listed(toy):
    found = text(toy)
    assert found.startswith("usage: toy.py [OPTION]… [GROUP=NAME]… [KEY=VALUE]…\n")
    for option in ("--help, -h", "--cfg", "--dry-run", "--config FILE", "--config-dir DIR"):
        assert f"\n  {option} " in found
    assert "  method            plain*, thin" in found
    assert "  net               large, small*" in found


def test_a_choice_shows_its_keys_alone(toy):
    found = text(toy, "method=thin", "--help")
    assert found.startswith("method=thin: The thin method.\n")
    assert "  method.lr: float = 0.02\n" in found
    assert "  method.rank: int | float | null = 0.25\n      directions, or a share\n" in found
    assert "train." not in found


def test_values_are_those_of_the_command_line(toy):
    assert "  train.steps: int = 77\n" in text(toy, "train.steps=77")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_fit_the_terminal(toy, width):
    assert max(map(len, text(toy, width=width).splitlines())) <= width
