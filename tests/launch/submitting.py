"""launch/submit.py called in this process."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def submit_script(capsys, *words):
    """Exit code and what was printed, on standard output or else on standard error."""
    spec = importlib.util.spec_from_file_location("launch_submit", ROOT / "launch" / "submit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    capsys.readouterr()
    code = module.main(list(words))
    out, err = capsys.readouterr()
    return code, out or err
