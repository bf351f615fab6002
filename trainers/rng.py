"""The state of every random number generator of this process, as values that a checkpoint can hold."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """The states of Python's, numpy's, torch's CPU generator and, where CUDA was used, of all its generators.

    Returns:
        A dict of tuples, numbers and tensors, loadable with ``weights_only=True``.
    """
    # the legacy generator of numpy is the one that other libraries draw from
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    words = torch.from_numpy(np.array(keys, dtype=np.int64))
    state = {
        "python": random.getstate(),
        "numpy": (str(name), words, int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` returned. CUDA's part is used where as many devices are visible as then."""
    random.setstate(_tuples(state["python"]))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    cuda = state.get("cuda")
    if cuda is not None and torch.cuda.is_available() and torch.cuda.device_count() == len(cuda):
        torch.cuda.set_rng_state_all([item.cpu() for item in cuda])


def seed_all(*parts: int) -> None:
    """Seeds all generators of the process from a few integers, such as ``(seed, rank)``; near ones do not correlate."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little")
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002
    torch.manual_seed(value % 2**63)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
