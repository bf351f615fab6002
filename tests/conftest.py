"""What every test relies on: no network, no writes outside temporary folders, one thread, and a pool of ranks."""

import atexit
import os
import shutil
import tempfile

# Everything here is read by libraries while they are imported, so it is set before any of them is.
_CACHE = tempfile.mkdtemp(prefix="thinrank-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = _CACHE  # thinrank's and Hugging Face's caches live below it
for _variable in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "TRANSFORMERS_CACHE"):
    os.environ.pop(_variable, None)  # they would win over XDG_CACHE_HOME
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["PYTHONFAULTHANDLER"] = "1"  # for the processes that tests start; pytest has its own in this one
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# A suite that runs inside a batch job or under torchrun must not take that job's ranks for its own.
for _variable in list(os.environ):
    if _variable.startswith(("SLURM_", "TORCHELASTIC_")) or _variable in {
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }:
        del os.environ[_variable]

import pytest  # noqa: E402  (the environment comes first, see above)
from ranks import Pools  # noqa: E402


@pytest.fixture(scope="session")
def ranks():
    """Gloo ranks for a test: ``ranks(2).run(function, *args)`` gives the list of what every rank returned.

    The function runs once on every rank of an initialised process group. It must be importable (defined at the top
    of a test file). A pool of each size is started once and kept; see `ranks.Pool`.
    """
    pools = Pools()
    yield pools
    pools.close()


def pytest_collection_modifyitems(items):
    """Skip tests marked ``gpu`` where there is no CUDA device."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
