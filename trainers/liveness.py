"""Signs of life: who is lost is named, and the others stop in time.

A process that is killed, or whose machine is gone, says nothing. Who waits for it in a collective waits until the
process group's timeout, half an hour by default, and then learns an address at best. So every rank counts in the store
in which the ranks met, once a second and from a thread of its own, and looks at what the others have counted.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from thinrank.trainers.errors import RankLost

INTERVAL = 1.0
"""Seconds between two signs of life, and at most a twentieth of the timeout."""

WINDOW = 64
"""How many ranks a rank looks at: those that follow it, around the corner. A machine's ranks are fewer."""

AFTER_ERROR = 4
"""Looks without a sign of life after which a rank is to blame for a collective that has failed already."""

GRACE = 10.0
"""Seconds that the main thread has to leave by itself before its process is ended, as it may wait for ever."""

_sequence = itertools.count()  # ranks come to every `heartbeat` in the same order


@contextmanager
def heartbeat(timeout: float | None = 60.0, *, lost: Callable[[RankLost], None] | None = None) -> Iterator[None]:
    """Ends this process, with the name of the rank that is to blame, where another rank is lost.

    For the processes of torchrun, or others with `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`, once
    `torch.distributed` is initialised; does nothing in a process alone. All ranks enter and leave together::

        with heartbeat(60):
            train()

    A collective that fails because a rank is gone raises `RankLost` here, within seconds. One that goes on waiting does
    not come back; then the sentence goes to standard error, and the process ends with exit code 77 after `timeout` and
    some seconds. A rank that leaves by an error of its own is named with it. A debugger, a long step or a long save are
    no reason, for the thread goes on counting; a process that is stopped as a whole for longer than `timeout` is.

    Args:
        timeout: seconds without a sign of life after which a rank counts as lost; None: nobody looks.
        lost: told before the process ends without an exception; may write files, and must not communicate.

    Raises:
        RankLost: as above.
        ValueError: `timeout` is not above 0.
    """
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be above 0 seconds, got {timeout}: use None for no signs of life")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if timeout is None or size == 1 or "MASTER_PORT" not in os.environ:
        yield
        return
    watch = _Watch(int(os.environ["RANK"]), size, timeout, lost or (lambda error: None))
    try:
        yield
    except Exception as error:
        found = watch.explain(error)
        watch.leave(error=str(found) if found else f"{type(error).__name__}: {error}", lost=found is not None)
        if found is not None and found is not error:
            raise found from error
        raise
    except BaseException:  # Ctrl-C and the like, which the launcher hands to all
        watch.leave(done=True)
        raise
    watch.leave(done=True)


class Attendance:
    """What the looks at other ranks' signs of life say about them.

    A paused process does not mistake its own pause for theirs, since looks are counted and not seconds.

    Args:
        ranks: who is looked at.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self._signs: dict[int, Mapping[str, Any]] = {rank: {} for rank in ranks}
        self._still = dict.fromkeys(ranks, 0)

    def look(self, signs: Mapping[int, Mapping[str, Any]]) -> None:
        """Takes what each rank last wrote: `count` and `place`, or how it left: `done`, or `error` and `lost`."""
        for rank, sign in signs.items():
            self._still[rank] = self._still[rank] + 1 if sign == self._signs[rank] else 0
            self._signs[rank] = sign

    def verdict(self, looks: int, because: str = "") -> str | None:
        """One sentence on who is to blame, if anybody is.

        Args:
            looks: without a sign of life, after which a rank counts as lost.
            because: how long that is, in words.
        """
        for sign in self._signs.values():  # who has come to a verdict has seen more
            if sign.get("lost"):
                return sign["error"]
        for rank, sign in self._signs.items():
            if "error" in sign:
                return f"rank {rank} on {sign['place']} has ended with {sign['error'].rstrip('.')}: see its output"
        alive = [rank for rank, sign in self._signs.items() if sign and not sign.get("done")]
        longest = max((self._still[rank] for rank in alive), default=0)
        if longest < looks:
            return None
        # Ranks of one machine are lost together, though the last signs of some came a look later
        gone = [rank for rank in alive if self._still[rank] >= longest - 1]
        names = " and ".join(f"rank {rank} on {self._signs[rank]['place']}" for rank in gone)
        were = "was killed, or its machine is" if len(gone) == 1 else "were killed, or their machine is"
        return f"{names} gave no sign of life{because} and {were} gone: start again to go on from the last checkpoint"


class _Watch:
    """The thread that shows and looks, and what it found."""

    def __init__(self, rank: int, size: int, timeout: float, lost: Callable[[RankLost], None]) -> None:
        self.timeout, self.interval, self._lost = timeout, min(INTERVAL, timeout / 20), lost
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own, which no thread of torch's holds while this one wants it
        server = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"thinrank/heartbeat/{attempt}/{next(_sequence)}", server)
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._keeper = f"{'the first torchrun' if by_agent else 'rank 0'}, which keeps the store at {host}:{port},"
        self._keeps_store = rank == 0 and not by_agent
        self._last = rank == size - 1
        self._rank, self._place = rank, f"{socket.gethostname()} (process {os.getpid()})"
        others = [(rank + step) % size for step in range(1, min(size, WINDOW + 1))]
        self._keys = {other: str(other) for other in others}
        self._attendance, self._count, self._unanswered = Attendance(others), 0, 0
        self._mutex, self._leaving = threading.Lock(), threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="thinrank heartbeat", daemon=True)
        self._thread.start()

    def explain(self, error: Exception) -> RankLost | None:
        """Who is to blame for an error of this rank's, if a message that failed is what it says; waits to find out."""
        if isinstance(error, RankLost):
            return error
        if not _is_of_communication(error):
            return None
        for _ in range(2 * AFTER_ERROR):
            if (sentence := self._verdict(AFTER_ERROR)) is not None:
                return self._error(sentence)
            time.sleep(self.interval)
        return None

    def leave(self, **how: Any) -> None:
        """Says how this rank leaves, and stops looking."""
        self._leaving.set()
        self._thread.join(self.timeout)
        with self._mutex:
            self._write(how)
        if "error" in how and self._keeps_store:
            time.sleep(2 * self.interval)  # the others read it there

    def _run(self) -> None:
        looks = round(self.timeout / self.interval)
        while not self._leaving.wait(self.interval):
            self._beat()
            sentence = self._verdict(looks, f" for {self.timeout:g} s")
            if sentence is not None and not self._leaving.wait(GRACE):
                self._end(self._error(sentence))

    def _beat(self) -> None:
        """Shows a sign of life and looks for the others'."""
        with self._mutex:
            self._count += 1
            if not self._write({"count": self._count}):
                return
            try:
                # A value that is not there yet would be waited for
                if self._store.check(list(self._keys.values())):
                    values = self._store.multi_get(list(self._keys.values()))
                    self._attendance.look(dict(zip(self._keys, map(json.loads, values), strict=True)))
            except RuntimeError:
                self._unanswered += 1

    def _write(self, sign: Mapping[str, Any]) -> bool:
        try:
            self._store.set(str(self._rank), json.dumps({**sign, "place": self._place}))
        except RuntimeError:  # torch's errors of the network are such
            self._unanswered += 1
            return False
        self._unanswered = 0
        return True

    def _verdict(self, looks: int, because: str = "") -> str | None:
        with self._mutex:
            if self._unanswered >= looks:
                return (
                    f"{self._keeper} does not answer{because} and was killed, or its machine is gone: start again to "
                    "go on from the last checkpoint"
                )
            return self._attendance.verdict(looks, because)

    def _error(self, sentence: str) -> RankLost:
        with self._mutex:
            try:
                first = self._store.add("verdicts", 1) == 1
            except RuntimeError:  # rank 0 may be gone with the store; the last rank is as far from it as can be
                first = self._last
            return RankLost(sentence, recorder=first)

    def _end(self, error: RankLost) -> None:
        with self._mutex:
            self._write({"error": str(error), "lost": True})
        try:
            self._lost(error)
            print(f"error on rank {self._rank}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(RankLost.EXIT_CODE)


def _is_of_communication(error: Exception) -> bool:
    """Whether a collective failed: torch has errors of its own for NCCL and stores; gloo's are known by their text."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))
