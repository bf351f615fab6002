"""Processes that may be killed: each a rank of its own group of gloo, of which what it said last is kept."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # an optimizer's first step imports it, in every process that has not inherited it
import torch.distributed as dist

from thinrank.optim.gossip.rounds import PeerLost

TIMEOUT = 20.0  # seconds that a rank waits for another


def lives(function, n, folder, *args, seconds=60.0, timeout=TIMEOUT) -> tuple[list[Any], list[Any]]:
    """`function(rank, folder, *args)` in `n` processes of a new group, ended after so many seconds if need be.

    Returns each rank's exit code, negative for a signal, None for one that had to be ended; and its answer: a dict of
    what it returned, or of how it lost another (`lost`, `said`), and of the time (`at`); None of one that was killed.
    """
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    children = [_forked(function, rank, n, folder, args, timeout) for rank in range(n)]
    codes = dict.fromkeys(children)
    deadline = time.monotonic() + seconds
    while None in codes.values() and time.monotonic() < deadline:
        for child in [child for child, code in codes.items() if code is None]:
            found, status = os.waitpid(child, os.WNOHANG)
            codes[child] = os.waitstatus_to_exitcode(status) if found else None
        time.sleep(0.02)
    for child in [child for child, code in codes.items() if code is None]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    found = [folder / f"answer-{rank}" for rank in range(n)]
    return list(codes.values()), [torch.load(path) if path.exists() else None for path in found]


def _forked(function, rank, n, folder, args, timeout):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _life(function, rank, n, folder, args, datetime.timedelta(seconds=timeout))
            status = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(status)  # to destroy the group would be to wait for ranks that are gone
    return child


def _life(function, rank, n, folder, args, timeout):
    warnings.simplefilter("error")
    store = dist.FileStore(f"{folder}/store", n)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timeout)
    try:
        answer = function(rank, folder, *args)
        dist.barrier()  # who ends early closes connections that others still use
    except PeerLost as error:
        answer = {"lost": error.ranks, "said": str(error)}
    torch.save(answer | {"at": time.monotonic()}, f"{folder}/answer-{rank}")
