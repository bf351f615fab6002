"""The switch of a slow network: network namespaces, a TAP device in each, and frames that travel at a link's pace.

`slow_network.py` starts this file as a process of its own, which makes the namespaces, forwards frames between them and
removes them at its end. It ends when its standard input closes: so they are removed, and whatever still runs in them is
ended, however the process that asked for them ended, `kill -9` included.

A frame leaves a port when the frames before it have left (`rate`), arrives `delay` later and enters the other port
when those before it have entered. Frames of TCP come from the kernel in bursts of half a millisecond of the wire at
most (segmentation offload), with which one Python process carries several links of 1 Gbit/s; what is counted and timed
is their size on the wire, every segment with its headers. Ethernet's preamble, checksum and gap (24 bytes a frame) are
not counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import heapq
import itertools
import json
import mmap
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

MTU = 1500
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_CHECKSUM, _TSO4 = 0x01, 0x02
_VNET = struct.Struct("=BBHHHH")  # struct virtio_net_hdr: flags, kind, header, segment, start and place of the checksum
_BURST = 0.5e-3  # seconds of the wire: what a frame may be ahead of or behind its segments


@dataclass(frozen=True, kw_only=True)
class Link:
    """What lies between a port and the others: the same both ways, full duplex.

    Attributes:
        rate: Mbit/s (10^6) of Ethernet frames; None for no limit.
        delay: milliseconds from this port to any other, besides the time that the bits take.
        loss: share of this port's frames that are lost, at random. Frames are then never longer than the MTU, which
            costs the switch time: from some 100 Mbit/s on its lateness tells whether it keeps up.
        queue: milliseconds of traffic that may wait for the wire in either direction; what comes then is dropped.
    """

    rate: float | None = None
    delay: float = 0.0
    loss: float = 0.0
    queue: float = 200.0

    def __post_init__(self) -> None:
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"rate must be above 0 Mbit/s, got {self.rate}: leave it out for no limit")
        if self.delay < 0:
            raise ValueError(f"delay must be at least 0 ms, got {self.delay}: no frame arrives before it was sent")
        if not 0 <= self.loss < 1:
            raise ValueError(f"loss must be at least 0 and below 1, got {self.loss}: it is a share of the frames")
        if self.queue <= 0:
            raise ValueError(f"queue must be above 0 ms, got {self.queue}: every frame waits for its own bits")


class Counters(NamedTuple):
    """What a port has seen since the switch started; bytes are those on the wire, headers and repetitions included."""

    sent_frames: int = 0
    sent_bytes: int = 0
    received_frames: int = 0
    received_bytes: int = 0
    dropped_frames: int = 0
    """Of those sent, not received: the queue was full, or `loss`."""
    late_microseconds: int = 0
    """Sum over the received frames of how long after its time the switch, a process like others, handed one over."""


def read_counters(path: Path, port: int) -> Counters:
    """The counters of one port now, from the file that the switch keeps, in any process."""
    size = 8 * len(Counters._fields)
    with path.open("rb") as file:
        file.seek(port * size)
        return Counters(*struct.unpack(f"={len(Counters._fields)}Q", file.read(size)))


def wire_bytes(frame: bytes) -> int:
    """Bytes on the wire of what a TAP device hands over, a `virtio_net_hdr` and a frame or a burst of segments.

    A burst has its headers once; on the wire every segment has them.
    """
    _, kind, _, segment, start, _ = _VNET.unpack_from(frame)
    length = len(frame) - _VNET.size
    if not kind:
        return length
    headers = start + 4 * (frame[_VNET.size + start + 12] >> 4)  # the checksum's start is where TCP's header begins
    payload = length - headers
    return payload + headers * -(-payload // segment)


class Wires:
    """The arithmetic of the links, in a time of the caller's: when a frame that is sent at one port reaches another."""

    def __init__(self, links: Sequence[Link], seed: int = 0) -> None:
        # Mbit/s to seconds a byte, milliseconds to seconds
        self._pace = [8e-6 / link.rate if link.rate else 0.0 for link in links]
        self._delay = [link.delay / 1e3 for link in links]
        self._queue = [link.queue / 1e3 for link in links]
        self._loss = [link.loss for link in links]
        self._up = [0.0] * len(links)  # when the last frame so far will have left, and below: have entered, a port
        self._down = [0.0] * len(links)
        self._waiting: list[tuple[float, int, int, int, bool, bytes]] = []
        self._order = itertools.count()
        self._random = random.Random(seed)

    def send(self, source: int, target: int, size: int, frame: bytes, now: float) -> bool:
        """Puts a frame of `size` bytes on the wire; False if it is dropped."""
        start = max(now, self._up[source])
        if start - now > self._queue[source]:
            return False
        self._up[source] = left = start + size * self._pace[source]
        if self._loss[source] and self._random.random() < self._loss[source]:
            return False
        due = left + self._delay[source]
        heapq.heappush(self._waiting, (due, next(self._order), target, size, False, frame))
        return True

    def arrived(self, now: float) -> Iterator[tuple[float, int, int, bytes | None]]:
        """(when, port, size, frame) of everything that is due; None in the place of a frame that is dropped."""
        waiting = self._waiting
        while waiting and waiting[0][0] <= now:
            due, order, target, size, entered, frame = heapq.heappop(waiting)
            if not entered:
                # Bits enter as they come, so only a link that others have filled keeps a frame waiting.
                enters = max(due, self._down[target] + size * self._pace[target])
                if enters - due > self._queue[target]:
                    yield due, target, size, None
                    continue
                self._down[target] = enters
                if enters > now:
                    heapq.heappush(waiting, (enters, order, target, size, True, frame))
                    continue
                due = enters
            yield due, target, size, frame

    def next(self) -> float | None:
        """When the next frame is due; None if nothing is on its way."""
        return self._waiting[0][0] if self._waiting else None


def address(port: int) -> str:
    """The IPv4 address of a port."""
    return f"10.78.0.{port + 1}"


def hardware(port: int) -> str:
    return f"02:00:00:00:00:{port + 1:02x}"


def namespaces(prefix: str, ports: int) -> list[str]:
    return [f"{prefix}-{port}" for port in range(ports)]


def ip(*arguments: str, lines: Sequence[str] = ()) -> str:
    """Runs the command `ip`, with `lines` for its standard input.

    Raises:
        OSError: with the command's own words, if it fails.
    """
    run = subprocess.run(["ip", *arguments], input="\n".join(lines), capture_output=True, text=True, check=False)
    if run.returncode:
        raise OSError(f"ip {' '.join(arguments)} failed: {run.stderr.strip() or run.returncode}")
    return run.stdout


def remove(names: Sequence[str]) -> None:
    """Ends what runs in the namespaces and removes them, by these names alone; one that does not exist is passed over.

    Raises:
        OSError: if one is still there.
    """
    failures = []
    for name in names:
        if not Path("/run/netns", name).exists():
            continue
        try:
            for _ in range(100):  # a process may start another while it is ended
                pids = [int(pid) for pid in ip("netns", "pids", name).split()]
                if not pids:
                    break
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):  # it ended by itself in the meantime
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.02)
            ip("netns", "del", name)
        except OSError as error:
            failures.append(str(error))
    if failures:
        raise OSError("; ".join(failures))


def burst(link: Link) -> int:
    """Bytes of a burst of segments; 0 for single frames."""
    if link.loss:
        return 0  # a lost burst would be forty lost frames
    if link.rate is None:
        return 65536
    size = min(65536, int(link.rate * 1e6 / 8 * _BURST))
    return size if size >= 2 * MTU else 0


def enter(name: str) -> None:
    """Moves this thread into a network namespace."""
    library = ctypes.CDLL(None, use_errno=True)
    with open(name, "rb") as space:
        if library.setns(space.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")


def tap(burst: int) -> int:
    """Opens a TAP device `eth0` in this thread's namespace, not blocking."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    fcntl.ioctl(device, _TUNSETOFFLOAD, _CHECKSUM | _TSO4 if burst else 0)
    return device


def adjust(link: Link) -> None:
    """Settings of TCP in this thread's namespace: windows that fill the link.

    Which algorithm shares the link is the machine's: Linux lets no other namespace than the first choose freely.
    """
    settings = Path("/proc/sys/net")
    if (ipv6 := settings / "ipv6/conf/all/disable_ipv6").exists():
        ipv6.write_text("1")  # its announcements would be counted
    tcp = settings / "ipv4"
    if link.rate is not None:
        flight = int(link.rate * 1e6 / 8 * (2 * link.delay + link.queue) / 1e3)
        for name in ("tcp_rmem", "tcp_wmem"):
            least, usual, most = map(int, (tcp / name).read_text().split())
            (tcp / name).write_text(f"{least} {usual} {max(most, 6 * flight)}")


def connect(names: Sequence[str], links: Sequence[Link]) -> list[int]:
    """Makes the namespaces and their devices; one descriptor for each."""
    home = f"/proc/{os.getpid()}/ns/net"
    devices = []
    with open(home, "rb") as space:
        for port, (name, link) in enumerate(zip(names, links, strict=True)):
            ip("netns", "add", name)
            enter(f"/run/netns/{name}")
            devices.append(tap(burst(link)))
            adjust(link)
            enter(f"/proc/self/fd/{space.fileno()}")
            others = [other for other in range(len(names)) if other != port]
            lines = [f"link set dev eth0 address {hardware(port)} mtu {MTU}"]
            if burst(link):
                lines.append(f"link set dev eth0 gso_max_size {burst(link)}")
            lines += ["link set dev lo up", f"addr add {address(port)}/24 dev eth0", "link set dev eth0 up"]
            # No question who has an address: on a long way nobody asks, and the answer would come a round trip later.
            lines += [f"neigh add {address(o)} lladdr {hardware(o)} dev eth0 nud permanent" for o in others]
            ip("-n", name, "-batch", "-", lines=lines)
    return devices


def forward(devices: Sequence[int], links: Sequence[Link], counters: Any, until: int) -> None:
    """Carries frames from device to device until the descriptor `until` is at its end.

    Args:
        counters: unsigned integers of 64 bits, `Counters` of each port one after the other.
    """
    wires, width, clock = Wires(links), len(Counters._fields), time.monotonic
    port_of = {device: port for port, device in enumerate(devices)}
    watched = [*devices, until]
    sent_frames, sent_bytes, received_frames, received_bytes, dropped, late = range(width)
    while True:
        now = clock()
        for due, port, size, frame in wires.arrived(now):
            place = port * width
            if frame is None:
                counters[place + dropped] += 1
                continue
            os.write(devices[port], frame)
            counters[place + received_frames] += 1
            counters[place + received_bytes] += size
            counters[place + late] += int((clock() - due) * 1e6)
        soon = wires.next()
        ready, _, _ = select.select(watched, [], [], None if soon is None else max(0.0, soon - clock()))
        for device in ready:
            if device == until:
                if not os.read(until, 4096):
                    return
                continue
            port = port_of[device]
            place = port * width
            for _ in range(32):  # then the others, and what is due
                try:
                    frame = os.read(device, 70000)
                except BlockingIOError:
                    break
                target = frame[_VNET.size + 5] - 1  # the last byte of the hardware address it is for
                if not 0 <= target < len(devices) or target == port or frame[_VNET.size] & 1:
                    continue  # to all, or to nobody here
                size = wire_bytes(frame)
                counters[place + sent_frames] += 1
                counters[place + sent_bytes] += size
                if not wires.send(port, target, size, frame, clock()):
                    counters[place + dropped] += 1


def prompt() -> bool:
    """Puts this process before all ordinary ones, for a wire does not wait for a processor; not one started by `nice`.

    Returns:
        Whether it is.
    """
    if os.nice(0) > 0:
        return False
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        return False
    return True


def main() -> None:
    """Makes what the argument (JSON: prefix, links, counters) describes, writes a line when it is there, serves."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    asked = json.loads(sys.argv[1])
    links = [Link(**link) for link in asked["links"]]
    names, path = namespaces(asked["prefix"], len(links)), Path(asked["counters"])
    gc.disable()  # nothing here makes cycles, and a collection would be a delay
    try:
        path.write_bytes(bytes(8 * len(Counters._fields) * len(links)))
        devices = connect(names, links)
        with (
            path.open("r+b") as file,
            mmap.mmap(file.fileno(), 0) as memory,
            memoryview(memory) as octets,
            octets.cast("Q") as counters,
        ):
            print(json.dumps({"prompt": prompt()}), flush=True)
            forward(devices, links, counters, sys.stdin.fileno())
    except OSError as error:
        print(json.dumps({"error": str(error)}), flush=True)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        path.unlink(missing_ok=True)
        remove(names)


def start(prefix: str, links: Sequence[Link], counters: Path) -> subprocess.Popen[str]:
    """Starts the process, in a session of its own so that Ctrl-C of a terminal does not reach it first."""
    asked = {"prefix": prefix, "links": [asdict(link) for link in links], "counters": str(counters)}
    return subprocess.Popen(
        [sys.executable, "-I", __file__, json.dumps(asked)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


if __name__ == "__main__":
    main()
