"""A pool of gloo ranks on this machine, kept between tests, for code that must give the same on N ranks as on one.

    results = ranks(4).run(function, 1, 2)      # [what rank 0 returned, …, what rank 3 returned]

Ranks are forked from a clean server process that has imported torch once: they start in a fraction of a second and
inherit no thread and no lock of the test process. They meet through a file, so no port is needed. A job that fails,
hangs or kills a rank ends the pool's own processes, and the next job starts them afresh.
"""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_START = 60.0  # seconds for all ranks to import torch and to meet
_DRAIN = 1.0  # seconds that the other ranks have to answer after one has failed: their errors are worth showing


class RankError(RuntimeError):
    """A rank raised or died; the message holds every failing rank's traceback."""


class RankTimeout(RankError):
    """A job did not end in time; the message holds the stack of every rank that was still at work."""


class Pool:
    """`size` processes in one gloo process group.

    Args:
        size: the world size.
        timeout: seconds a job may take unless `run` is told otherwise.
    """

    def __init__(self, size: int, timeout: float = 60.0):
        self.size = size
        self.timeout = timeout
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._folder: Path | None = None

    def run(self, function: Callable, *args: Any, timeout: float | None = None, **kwargs: Any) -> list[Any]:
        """Call ``function(*args, **kwargs)`` on every rank at once and return the results in the order of the ranks.

        Args:
            function: defined at the top of a module, so that the ranks can import it.
            timeout: seconds until the job is given up; the pool's own by default.

        Raises:
            RankTimeout: with every working rank's stack, if a rank has not answered in time.
            RankError: with the tracebacks, if a rank raised or died.
            TypeError: if the function or an argument cannot be sent.
        """
        timeout = self.timeout if timeout is None else timeout
        try:
            job = pickle.dumps((function, args, kwargs))
        except (AttributeError, pickle.PicklingError) as error:
            raise TypeError(f"a job is sent by name: define it at the top of a file ({error})") from error
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((list(sys.path), timeout, job))
        answers = self._collect(time.monotonic() + timeout + _DRAIN)
        failures = [f"rank {rank}: {answers[rank][1]}" for rank in sorted(answers) if answers[rank][0] != "result"]
        late = [rank for rank in range(self.size) if rank not in answers]
        if not failures and not late:
            return [answers[rank][1] for rank in range(self.size)]
        stacks = [f"rank {rank} was at:\n{self._stack(rank)}" for rank in late] if not failures else []
        self.close()  # a collective may be half done: nothing of this group can be trusted any more
        if failures:
            raise RankError("\n".join(failures))
        raise RankTimeout("\n".join([f"ranks {late} had not answered after {timeout:g} s", *stacks]))

    def close(self) -> None:
        """End this pool's processes, and no others; the next `run` starts new ones."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.nn"])
        self._folder = Path(tempfile.mkdtemp(prefix="thinrank-ranks-"))
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.size, str(self._folder)), name=f"rank-{rank}", daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        # Only now may a job's time begin: starting the server and meeting in the file are not part of it.
        answers = self._collect(time.monotonic() + _START)
        if [answer for _, answer in sorted(answers.items())] != [("result", rank) for rank in range(self.size)]:
            self.close()
            raise RankError(f"the ranks did not meet within {_START:g} s: {answers}")

    def _collect(self, deadline: float) -> dict[int, tuple[str, Any]]:
        """What each rank sent until the deadline: ("result", value), ("error", traceback) or ("death", sentence)."""
        answers: dict[int, tuple[str, Any]] = {}
        while len(answers) < self.size and (left := deadline - time.monotonic()) > 0:
            waiting = {self._pipes[rank]: rank for rank in range(self.size) if rank not in answers}
            ready: list[Any] = multiprocessing.connection.wait(list(waiting), timeout=left)
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(_DRAIN)
                    answers[rank] = ("death", f"ended by itself with exit code {self._processes[rank].exitcode}")
                if answers[rank][0] != "result":
                    deadline = min(deadline, time.monotonic() + _DRAIN)
        return answers

    def _stack(self, rank: int) -> str:
        assert self._folder is not None
        path = self._folder / f"stack-{rank}"
        return path.read_text() if path.exists() else "(it never started the job)"


class Pools:
    """One `Pool` per world size, made when it is first asked for."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}

    def __call__(self, size: int) -> Pool:
        return self._pools.setdefault(size, Pool(size))

    def close(self) -> None:
        """End the processes of all pools."""
        for pool in self._pools.values():
            pool.close()


def _serve(pipe: Any, rank: int, size: int, folder: str) -> None:
    """The life of one rank: join the group, then do jobs until the pipe closes."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(minutes=5),  # frees a rank whose test process was killed in the middle of a job
    )
    pipe.send(("result", rank))
    with open(f"{folder}/stack-{rank}", "w") as stack:
        while True:
            try:
                path, timeout, job = pipe.recv()
            except (EOFError, ConnectionResetError):
                os._exit(0)  # the pool closed; destroying the group would wait for ranks that may be gone already
            faulthandler.dump_traceback_later(timeout, file=stack)
            try:
                sys.path[:] = path
                function, args, kwargs = pickle.loads(job)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    answer = ("result", function(*args, **kwargs))
                pipe.send(answer)
            except BaseException:  # whatever a job raises is the test's to judge, SystemExit included
                pipe.send(("error", traceback.format_exc()))
            finally:
                faulthandler.cancel_dump_traceback_later()
