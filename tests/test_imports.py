"""Who may import whom: the contract in `.importlinter`, and what it cannot see."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP = ("optim", "trainers", "configs")


def imported(path):
    """Full names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def python(code, cwd):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_contract_is_kept():
    """In a process of its own: import-linter sets up logging anew, which silences the loggers of all later tests."""
    pytest.importorskip("importlinter", reason="import-linter (extra `dev`) is not installed")
    contract = str(ROOT / ".importlinter")
    call = f"from importlinter import cli; raise SystemExit(cli.lint_imports({contract!r}, no_cache=True))"
    run = python(call, ROOT)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("path", files(*TOP, "launch", "tests", "examples", "benchmarks"), ids=lambda p: p.name)
def test_the_folders_are_imported_as_thinrank(path):
    """`import optim` works from the repository's root alone, and would make a second copy of every class."""
    wrong = [name for name in imported(path) if name.partition(".")[0] in (*TOP, "launch")]
    assert wrong == []


@pytest.mark.parametrize("path", files(*TOP), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_only_launch_imports_the_configuration(path):
    if "configs" not in path.relative_to(ROOT).parts:
        assert not [name for name in imported(path) if name.startswith("thinrank.configs")]


@pytest.mark.parametrize("path", files("optim"), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_the_mathematics_talks_to_ranks_through_its_axis_alone(path):
    place = path.relative_to(ROOT / "optim")
    carries = ("gossip/peers.py", "gossip/exchange.py", "gossip/trained.py")  # schemes know rounds, and not who carries
    if place.parts[0] not in ("axis.py", "exchange") and place.as_posix() not in carries:
        assert not [name for name in imported(path) if name.startswith("torch.distributed")]


@pytest.mark.parametrize("name", TOP)
def test_a_bare_import_of_a_folder_says_what_to_write(name):
    done = python(f"import {name}", ROOT)
    assert done.returncode != 0
    assert f"write `import thinrank.{name}`, not `import {name}`" in done.stderr


def test_optim_loads_torch_and_nothing_of_the_trainers(tmp_path):
    code = """
import sys, thinrank.optim
heavy = ("lightning", "transformers", "tokenizers", "datasets", "omegaconf", "scipy", "pandas", "torchvision")
print([name for name in heavy if name in sys.modules])
"""
    done = python(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_exist_and_are_documented():
    import thinrank.optim

    for name in thinrank.optim.__all__:
        assert getattr(thinrank.optim, name).__doc__ or name.isupper(), name
