"""The table of methods and strategies in the documentation is what the code decides, and names tests that exist."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from thinrank.optim import METHODS, route
from thinrank.optim.divided import Divided
from thinrank.optim.lowrank.remainder import leaves_remainder
from thinrank.optim.messages import whole_messages_because
from thinrank.optim.rule import remembers

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "many-processes.md"
SETTINGS = {
    "galore": [{}, {"svd": "power"}],
    "galore_plus": [{}, {"density": 0.0, "cross_heads": []}],
    "fira": [{}, {"svd": "power"}],
    "subspace_adamw": [{}, {"residual": "off"}],
    "dct_adamw": [
        {},
        {"error_feedback": "full", "update_proj_gap": 50},
        {"error_feedback": "off", "update_proj_gap": 50},
    ],
    "ldadam": [{}, {"svd": "power"}],
}
"""Of a method, those under which it is stepped in another way."""

BACK = {"told": "direction", "whole": "weight"}
PIECES = {"rows": "by rows", "delta": "owner", "piece": "each its part"}


def lines():
    """One for each method and setting, for a matrix of 1024 × 256 on two ranks that each have half of its rows."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(256, 1024, bias=False))
    for name, method in METHODS.items():
        for settings in SETTINGS.get(name, [{}]):
            config = method(**settings)
            optimizer, rule = route(model, config).stand_in, config.matrix_rule()
            assert optimizer is not None
            less = rule is not None and not remembers(rule) and whole_messages_because(rule) is None
            sends = "coordinates" if less else "gradients"
            replicas = "factors" if remembers(rule) else sends
            signs = ", or coordinates and signs" if leaves_remainder(rule) else ""
            owned = Divided.owned(optimizer, 2).members[0].place.way
            goes = "each its part" if owned == "piece" else f"{sends} → {BACK[owned]}"
            pieces = PIECES[Divided.pieces(optimizer, 2).members[0].place.way]
            shown = " ".join(f"`{key}={str(value).replace(' ', '')}`" for key, value in settings.items())
            yield f"| `{name}`{' ' if shown else ''}{shown} | {replicas}{signs} | {goes} | {pieces} |"


def test_the_table_says_what_the_code_decides():
    wanted = list(lines())
    found = [line for line in PAGE.read_text().splitlines() if re.match(r"\| `\w+`.* \| .* \| .* \| .* \|$", line)]
    found = [line for line in found if line.split("`")[1] in METHODS]
    assert found == wanted, "\n".join(wanted)


@pytest.mark.parametrize("page", ["many-processes.md", "what-works-where.md"])
def test_tests_that_the_page_names_exist(page):
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?", (ROOT / "docs" / page).read_text())
    assert any(test for _, test in named)
    for file, test in named:
        assert (ROOT / file).is_file(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(), test


def test_what_works_where_has_no_empty_cell_and_no_claim_without_a_test():
    text = (ROOT / "docs" / "what-works-where.md").read_text()
    notes = re.findall(r"^\[\^(\w+)\]: (.*)$", text, re.MULTILINE)
    titles, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"
    )
    assert all(f"`thinrank_{name}`" in " ".join(titles) for name in ("ddp", "owned", "fsdp2", "zero1"))
    assert len(rows) >= 20
    for feature, *cells in rows:
        assert len(cells) == len(titles) - 1, feature
        for title, cell in zip(titles[1:], cells, strict=True):
            said = re.match(r"(yes|no|whole|not shown yet|not shown)\b(?: \([^()]+\))?(?:\[\^\w+\])*$", cell)
            assert said, (feature, title, cell)
            assert said[1] != "yes" or "[^" in cell, (feature, title)
            assert said[1] != "no" or "(" in cell, (feature, title)
    assert len({name for name, _ in notes}) == len(notes)
    assert {name for name, _ in notes} == set(re.findall(r"\[\^(\w+)\](?!:)", text))
    for name, note in notes:
        assert re.search(r"`tests/[\w/]+\.py::test_\w+`", note), name
