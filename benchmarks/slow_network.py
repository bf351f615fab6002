"""A slow network on one machine: commands run as if on several, between which bits take their time.

    python benchmarks/slow_network.py --ranks 4 --rate 100 --delay 20 -- python launch/pretrain.py trainer.max_steps=20
    python benchmarks/slow_network.py --check --rate 10 --delay 50       # is it as slow as it says?

Every command runs in a network namespace of its own, whose only way to the others is a link of that rate (Mbit/s) and
one-way delay (ms); files are shared. The commands get what torchrun would tell them (RANK, WORLD_SIZE, MASTER_ADDR, …)
and GLOO_SOCKET_IFNAME. At the end everything is removed, also after an error, a signal or a kill. Network namespaces
are for root only; docs/slow-network.md says how it works and how true it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from slow_network_switch import Counters, Link, address, namespaces, read_counters, remove, start

_GRACE = 5.0  # seconds that the other commands have after one has failed, and each after being asked to end
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}


def unavailable() -> str | None:
    """Why this machine or user cannot have a slow network, in one sentence; None if it can."""
    if not Path("/proc/self/status").exists():
        return "a slow network needs Linux: it is made of network namespaces and TAP devices"
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    held = int(status["CapEff"], 16)
    lacking = [name for name, bit in _CAPABILITIES.items() if not held >> bit & 1]
    if lacking:
        return f"a slow network needs root with {' and '.join(lacking)}: run it as root, in a privileged container"
    if not Path("/dev/net/tun").exists():
        return "a slow network needs /dev/net/tun: load the module tun, or give the container this device"
    if shutil.which("ip") is None:
        return "a slow network needs the command ip: install iproute2"
    return None


class SlowNetwork:
    """Network namespaces, one for each link, between which frames travel at the links' pace.

    Example:
        >>> with SlowNetwork([Link(rate=100, delay=20)] * 4) as network:
        ...     codes = network.run([[sys.executable, "rank.py"]] * 4, timeout=60)
        ...     sent = network.counters()[0].sent_bytes

    Args:
        links: what lies between each namespace and the others.

    Raises:
        OSError: from `with`: `unavailable()`, or what the system refused.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        if not 2 <= len(links) <= 250:
            raise ValueError(f"links must be 2 to 250, one for each namespace, got {len(links)}: add or leave out some")
        self.links = list(links)
        prefix = f"thinrank-{os.getpid()}-{secrets.token_hex(2)}"
        self.names = namespaces(prefix, len(links))
        self.file = Path(tempfile.gettempdir(), f"{prefix}.counters")
        """Where `read_counters` finds the counters, in the commands too."""
        self.prompt: bool = False
        """Whether the switch comes before all other processes; not if this one was started by `nice`."""
        self._prefix = prefix
        self._switch: subprocess.Popen[str] | None = None

    def __enter__(self) -> SlowNetwork:
        reason = unavailable()
        if reason is not None:
            raise OSError(reason)
        self._switch = start(self._prefix, self.links, self.file)
        try:
            assert self._switch.stdout is not None
            line = self._switch.stdout.readline()
            answer: dict[str, Any] = json.loads(line) if line else {"error": "its switch ended before it was there"}
            if "error" in answer:
                raise OSError(f"a slow network cannot be had here: {answer['error']}")
            self.prompt = answer["prompt"]
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what still runs in the namespaces and removes them.

        Raises:
            OSError: if one is still there.
        """
        if self._switch is None:
            return
        switch, self._switch = self._switch, None
        switch.communicate()  # closes its input, upon which it removes everything and ends
        remove(self.names)  # only what a switch that was killed has left
        self.file.unlink(missing_ok=True)

    def counters(self) -> list[Counters]:
        """What each port has seen so far."""
        return [read_counters(self.file, port) for port in range(len(self.links))]

    def environment(self, rank: int) -> dict[str, str]:
        """What torchrun would tell a rank, and which device gloo is to take."""
        size = str(len(self.links))
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "GROUP_RANK": "0",
            "MASTER_ADDR": address(0),
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": "eth0",
        }

    def run(
        self,
        commands: Sequence[Sequence[str]],
        *,
        environment: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> list[int]:
        """Runs a command in each namespace, all at once, and waits for them; after a failure the others are ended.

        Args:
            commands: one for each namespace, or for the first ones.
            environment: variables besides those of this process and of `environment(rank)`.
            timeout: seconds until all are ended.

        Returns:
            Exit codes in the order of the commands, negative for a signal.

        Raises:
            TimeoutError: if they were ended because of the time.
            OSError: if the switch has gone.
        """
        switch = self._switch
        if switch is None:
            raise RuntimeError("call run() within `with SlowNetwork(…)`: there is no network before and after")
        processes: list[subprocess.Popen[bytes]] = []
        deadline = None if timeout is None else time.monotonic() + timeout
        failed_at = None
        try:
            for rank, (name, command) in enumerate(zip(self.names, commands, strict=False)):
                own = {**os.environ, **self.environment(rank), **(environment or {})}
                processes.append(subprocess.Popen(["ip", "netns", "exec", name, *command], env=own))
            while any(process.poll() is None for process in processes):
                now = time.monotonic()
                if switch.poll() is not None:
                    raise OSError("the slow network's switch ended while commands ran: see what it wrote above")
                if deadline is not None and now > deadline:
                    raise TimeoutError(f"the commands had not ended after {timeout:g} s")
                if failed_at is None and any(process.returncode for process in processes):
                    failed_at = now
                if failed_at is not None and now > failed_at + _GRACE:
                    break
                time.sleep(0.02)
        finally:
            _end(processes)
        return [process.returncode for process in processes]


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Asks the processes to end, then kills them."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def exit_on_sigterm() -> None:
    """Lets SIGTERM end this process as an exception would, so that its commands are asked to end first."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def summary(counters: Sequence[Counters]) -> str:
    lines = [
        "| rank | sent, bytes | received, bytes | frames or bursts sent | dropped | handed over late by, ms (mean) |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {rank} | {c.sent_bytes:,} | {c.received_bytes:,} | {c.sent_frames:,} | {c.dropped_frames:,} | "
        f"{lateness([c]):.2f} |"
        for rank, c in enumerate(counters)
    ]
    return "\n".join(lines)


def lateness(counters: Sequence[Counters]) -> float:
    """Milliseconds after its time at which the switch handed a frame over, on average over all ports."""
    return sum(c.late_microseconds for c in counters) / 1e3 / max(1, sum(c.received_frames for c in counters))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="namespaces (default 2)")
    parser.add_argument("--rate", type=float, default=None, metavar="MBIT", help="Mbit/s both ways (default no limit)")
    parser.add_argument("--delay", type=float, default=0.0, metavar="MS", help="milliseconds one way (default 0)")
    parser.add_argument("--loss", type=float, default=0.0, metavar="SHARE", help="share of frames lost (default 0)")
    parser.add_argument("--queue", type=float, default=200.0, metavar="MS", help="traffic that may wait (default 200)")
    parser.add_argument("--timeout", type=float, default=None, metavar="S", help="seconds that the command may take")
    parser.add_argument("--check", action="store_true", help="measure round trip and goodput, and compare; no command")
    parser.add_argument("command", nargs="*", help="what runs in every namespace, after --")
    args = parser.parse_args()
    if args.check == bool(args.command):
        parser.error("name a command after --, or --check, one of the two")
    exit_on_sigterm()
    try:
        link = Link(rate=args.rate, delay=args.delay, loss=args.loss, queue=args.queue)
        if args.check:
            from slow_network_check import check

            found = check(link)
            print(found.table())
            raise SystemExit(0 if found.true else 1)
        with SlowNetwork([link] * args.ranks) as network:
            codes = network.run([args.command] * args.ranks, timeout=args.timeout)
            print(summary(network.counters()), file=sys.stderr)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    raise SystemExit(next((code if code > 0 else 128 - code for code in codes if code), 0))


if __name__ == "__main__":
    main()
