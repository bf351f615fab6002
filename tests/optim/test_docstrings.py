"""`help(…)` of a configuration says what it is, from where, and whose its defaults are."""

import ast
import importlib
import inspect
import re
from typing import Any

import pytest

from thinrank.optim import METHODS, MethodConfig

OBVIOUS = {"name"}
"""Fields whose default is nobody's choice."""
VALUE = r"\b(\w+)=(\([^)]*\)|\[[^\]]*\]|[\w.+-]*\w)"
SOMEBODY = r"\b(paper|author|authors|GaLore|Adam|Muon|Fira|torch)\b"


def family(cls: type) -> list[type]:
    return [cls, *(each for child in cls.__subclasses__() for each in family(child))]


FAMILY = sorted(
    {cls for cls in family(MethodConfig) if cls.__module__.startswith("thinrank.")}, key=lambda c: c.__name__
)


def defaults_of(cls: type) -> str:
    """The paragraph of its own docstring that begins so, as one line."""
    found = [part for part in (cls.__dict__["__doc__"] or "").split("\n\n") if part.strip().startswith("Defaults")]
    assert len(found) == 1, f"{cls.__name__} needs one paragraph 'Defaults: …' that says whose they are"
    return " ".join(found[0].split())


def read(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


@pytest.mark.parametrize("cls", FAMILY, ids=lambda cls: cls.__name__)
def test_a_configuration_says_whose_its_defaults_are(cls: Any):
    """And says them as they are, every one that is its own among them."""
    text = defaults_of(cls)
    assert re.search(r"\bours\b", text)
    assert cls.__name__ == "MatrixConfig" or re.search(SOMEBODY, text)
    values = {key: read(value) for key, value in re.findall(VALUE, text)}
    real = vars(cls())
    assert values == {key: real[key] for key in values}
    assert set(inspect.get_annotations(cls)) & set(real) - OBVIOUS <= set(values)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_in_a_sentence_what_it_is_and_where_its_equations_are(name):
    cls = METHODS[name]
    text = inspect.getdoc(cls) or ""
    what, *_, where = text.split("\n\n")
    assert re.search(r"arXiv \d{4}\.\d{5}|kellerjordan|no single paper's", what)
    assert where == f"Equations and shapes: `{cls.__module__}`."
    assert "←" in (importlib.import_module(cls.__module__).__doc__ or "")
