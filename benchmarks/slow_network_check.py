"""Whether a slow network is as slow as it says: round trip and goodput of TCP between two of its namespaces.

    python benchmarks/slow_network.py --check --rate 10 --delay 50

The file is also what runs in the namespaces: one end answers and sends, the other one asks, receives and measures.
"""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from slow_network import SlowNetwork, lateness
from slow_network_switch import MTU, Link, address

TOLERANCE = 0.15
_SLACK = 1.0  # ms: what TCP and two processes take on a round trip of their own
_PORT = 5001
_TRIPS = 20
_SETTLE, _MEASURE = 1.0, 3.0  # seconds: before the goodput is measured, besides ten round trips, and of measuring
# Of a segment on the wire, Ethernet's header (14 bytes), IP's (20) and TCP's with timestamps (32) carry nothing.
_PAYLOAD = (MTU - 20 - 32) / (MTU + 14)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was measured on a link."""

    link: Link
    round_trip: float  # ms, median
    goodput: float  # Mbit/s of payload
    late: float  # ms, mean
    prompt: bool

    @property
    def expected_round_trip(self) -> float:
        """Milliseconds: two ways and the bits of two small frames."""
        return 2 * self.link.delay + (2 * 67 * 8e-3 / self.link.rate if self.link.rate else 0.0)

    @property
    def expected_goodput(self) -> float | None:
        """Mbit/s; None where only this machine is the limit, or how TCP takes losses."""
        return self.link.rate * _PAYLOAD if self.link.rate and not self.link.loss else None

    @property
    def true(self) -> bool:
        """Whether both are within the tolerance of what the link says."""
        trip, goodput = self.expected_round_trip, self.expected_goodput
        near = trip * (1 - 1e-3) <= self.round_trip <= trip * (1 + TOLERANCE) + _SLACK
        return near and (goodput is None or abs(self.goodput / goodput - 1) <= TOLERANCE)

    def table(self) -> str:
        expected = self.expected_goodput
        goodput = "(no bound)" if expected is None else f"{expected:.2f}"
        place = "before all other processes" if self.prompt else "among the other processes"
        return "\n".join(
            [
                "| | expected | measured |",
                "| --- | ---: | ---: |",
                f"| round trip, ms (median of {_TRIPS}) | {self.expected_round_trip:.2f} | {self.round_trip:.2f} |",
                f"| TCP goodput, Mbit/s | {goodput} | {self.goodput:.2f} |",
                "",
                f"The switch ran {place} and handed frames over {self.late:.2f} ms late on average. "
                f"{'Within' if self.true else 'NOT within'} {TOLERANCE:.0%} of the settings.",
            ]
        )


def check(link: Link) -> Found:
    """Measures a link.

    Raises:
        OSError: there can be no slow network here, or the measuring failed.
    """
    with tempfile.TemporaryDirectory(prefix="thinrank-check-") as folder, SlowNetwork([link] * 2) as network:
        out = Path(folder, "found.json")
        settle = _SETTLE + 20 * link.delay / 1e3
        commands = [
            [sys.executable, __file__, "answer", str(settle + _MEASURE)],
            [sys.executable, __file__, "ask", str(settle), str(out)],
        ]
        codes = network.run(commands, timeout=60 + 100 * link.delay / 1e3)
        if any(codes):
            raise OSError(f"measuring the slow network failed: its two ends ended with {codes}")
        trip, goodput = json.loads(out.read_text())
        late = lateness(network.counters())
        return Found(link=link, round_trip=trip, goodput=goodput, late=late, prompt=network.prompt)


def answer(seconds: float) -> None:
    """One end: echoes on the first connection, then sends on a second one for some seconds."""
    with socket.create_server((address(0), _PORT)) as server:
        server.settimeout(60)
        echo, _ = server.accept()
        with echo:
            echo.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while byte := echo.recv(1):
                echo.sendall(byte)
        bulk, _ = server.accept()
        with bulk:
            data, end = bytes(1 << 18), time.monotonic() + seconds
            try:
                while time.monotonic() < end:
                    bulk.sendall(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the other end has measured enough


def ask(settle: float, out: Path) -> None:
    """The other end, which measures both."""
    connection = _connected()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(_TRIPS):
            start = time.perf_counter()
            connection.sendall(b"?")
            connection.recv(1)
            trips.append(time.perf_counter() - start)
    with _connected() as bulk:
        buffer, received, begun, last = bytearray(1 << 20), 0, 0.0, 0.0
        start = time.perf_counter()
        while (size := bulk.recv_into(buffer)) and last < start + settle + _MEASURE:
            last = time.perf_counter()
            if begun:
                received += size
            elif last > start + settle:
                begun = last
    out.write_text(json.dumps([1e3 * statistics.median(trips), received * 8e-6 / (last - begun)]))


def _connected() -> socket.socket:
    """A connection to the other end, which may not have started yet."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((address(0), _PORT), timeout=30)
        time.sleep(0.05)
    raise TimeoutError("the other end did not start within 30 s")


if __name__ == "__main__":
    if sys.argv[1] == "answer":
        answer(float(sys.argv[2]))
    else:
        ask(float(sys.argv[2]), Path(sys.argv[3]))
