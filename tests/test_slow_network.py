"""The slow network: as slow as it says, bytes as they are on the wire, and nothing left of it however it ends."""

import importlib
import math
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # a folder of scripts that import each other by name
slow_network = importlib.import_module("slow_network")
switch = importlib.import_module("slow_network_switch")
slow_network_check = importlib.import_module("slow_network_check")
Link, SlowNetwork, Wires = switch.Link, slow_network.SlowNetwork, switch.Wires

REASON = slow_network.unavailable()
real = pytest.mark.skipif(REASON is not None, reason=str(REASON))
PYTHON = sys.executable


def everything(wires):
    """(when, port, frame) of all that is on its way, in the order of arrival, each taken at its time."""
    found = []
    while (when := wires.next()) is not None:
        found += [(due, port, frame) for due, port, _, frame in wires.arrived(when)]
    return found


def test_a_frame_takes_its_bits_and_the_delay():
    wires = Wires([Link(rate=8, delay=20)] * 2)  # 1 byte a microsecond
    assert all(wires.send(0, 1, 1000, name, now=5.0) for name in (b"a", b"b"))
    assert wires.send(1, 0, 1000, b"back", now=5.0)  # full duplex: not behind the others
    arrivals = everything(wires)
    assert [(port, frame) for _, port, frame in arrivals] == [(1, b"a"), (0, b"back"), (1, b"b")]
    assert [when for when, *_ in arrivals] == pytest.approx([5.021, 5.021, 5.022])


def test_nothing_is_due_before_its_time_and_nothing_is_lost_by_looking():
    wires = Wires([Link(delay=1)] * 2)
    wires.send(0, 1, 1500, b"a", now=0.0)
    assert list(wires.arrived(0.0009)) == []
    assert wires.next() == pytest.approx(0.001)
    assert [frame for *_, frame in wires.arrived(0.0011)] == [b"a"]
    assert wires.next() is None


def test_two_senders_share_the_link_of_one_receiver():
    wires = Wires([Link(rate=8)] * 3)
    for _ in range(5):
        wires.send(0, 2, 1000, b"from 0", now=0.0)
        wires.send(1, 2, 1000, b"from 1", now=0.0)
    arrivals = everything(wires)
    assert len(arrivals) == 10
    assert arrivals[-1][0] == pytest.approx(0.010)
    assert [frame for *_, frame in arrivals[:4]].count(b"from 0") == 2  # in turns


def test_what_finds_the_senders_queue_full_is_dropped():
    wires = Wires([Link(rate=8, queue=10.5)] * 2)
    sent = [wires.send(0, 1, 1000, b"x", now=0.0) for _ in range(20)]
    assert sent == [True] * 11 + [False] * 9  # one on the wire and ten milliseconds behind it
    assert [when for when, *_ in everything(wires)] == pytest.approx([0.001 * (k + 1) for k in range(11)])


def test_what_finds_the_receivers_queue_full_is_dropped():
    """Two senders, each at full pace for 30 ms: the receiver's link takes half, and 5 ms of the rest wait."""
    wires = Wires([Link(rate=8, queue=5.5)] * 3)
    assert all(wires.send(k % 2, 2, 1000, b"x", now=k // 2 / 1000) for k in range(60))
    arrivals = everything(wires)
    kept = [when for when, _, frame in arrivals if frame is not None]
    assert kept == pytest.approx([0.001 * (k + 1) for k in range(35)])
    assert len(arrivals) - len(kept) == 25


def test_loss_is_the_share_that_is_lost():
    wires = Wires([Link(loss=0.1), Link()], seed=1)
    count = 10_000
    lost = count - sum(wires.send(0, 1, 100, b"x", now=float(k)) for k in range(count))
    assert abs(lost / count - 0.1) < 5 * math.sqrt(0.1 * 0.9 / count)
    assert all(wires.send(1, 0, 100, b"x", now=float(k)) for k in range(count))


def frame(payload, segment, kind=1):
    """A burst as a TAP device hands it over: virtio header, Ethernet (14), IP (20), TCP with options (32), payload."""
    tcp = bytearray(32)
    tcp[12] = 8 << 4
    return struct.pack("=BBHHHH", 1, kind, 66, segment, 34, 16) + bytes(14 + 20) + bytes(tcp) + bytes(payload)


@pytest.mark.parametrize(("payload", "segments"), [(1448, 1), (1449, 2), (14480, 10), (14481, 11)])
def test_every_segment_of_a_burst_has_headers_on_the_wire(payload, segments):
    assert switch.wire_bytes(frame(payload, 1448)) == payload + 66 * segments
    assert switch.wire_bytes(frame(1000, 0, kind=0)) == 1066


def test_bursts_are_short_beside_the_wire_and_never_lost_whole():
    assert switch.burst(Link(rate=10)) == 0
    assert switch.burst(Link(rate=100)) == 6250
    assert switch.burst(Link(rate=1000)) == 62500
    assert switch.burst(Link()) == 65536
    assert switch.burst(Link(rate=1000, loss=0.01)) == 0


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"rate": 0}, "rate must be above 0 Mbit/s, got 0: leave it out"),
        ({"delay": -1}, "delay must be at least 0 ms, got -1"),
        ({"loss": 1}, "loss must be at least 0 and below 1, got 1"),
        ({"queue": 0}, "queue must be above 0 ms, got 0"),
    ],
)
def test_a_link_that_cannot_be_is_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Link(**wrong)


def test_one_namespace_is_no_network():
    with pytest.raises(ValueError, match="links must be 2 to 250, one for each namespace, got 1"):
        SlowNetwork([Link()])


def test_who_cannot_have_one_is_told_why(monkeypatch):
    if REASON is None:
        monkeypatch.setattr(slow_network.shutil, "which", lambda name: None)
        assert slow_network.unavailable() == "a slow network needs the command ip: install iproute2"
    with pytest.raises(OSError, match="a slow network needs"):
        SlowNetwork([Link()] * 2).__enter__()


def left(network):
    """What is still there of a network: names of namespaces, the file of its counters."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in network.names if name in listed or Path("/run/netns", name).exists()] + [
        str(file) for file in [network.file] if file.exists()
    ]


def alive(pid):
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@real
def test_it_is_as_slow_as_it_says():
    """15 percent and a millisecond; and no frame arrives early."""
    found = slow_network_check.check(Link(rate=20, delay=20))
    assert found.true, found.table()
    assert found.round_trip >= 40


@real
def test_commands_meet_there_and_nothing_is_left():
    script = (
        "import os, socket, sys\n"
        "rank, other = int(os.environ['RANK']), sys.argv[1]\n"
        "assert os.environ['WORLD_SIZE'] == '2' and os.environ['GLOO_SOCKET_IFNAME'] == 'eth0'\n"
        "if rank == 0:\n"
        "    server = socket.create_server((os.environ['MASTER_ADDR'], 5001)); server.settimeout(20)\n"
        "    open(other, 'w').close()\n"
        "    conversation, _ = server.accept(); total = 0\n"
        "    while data := conversation.recv(1 << 16): total += len(data)\n"
        "    assert total == 1_000_000, total\n"
        "else:\n"
        "    while not os.path.exists(other): pass\n"
        "    socket.create_connection((os.environ['MASTER_ADDR'], 5001), timeout=20).sendall(bytes(1_000_000))\n"
    )
    network = SlowNetwork([Link(rate=100)] * 2)
    meeting = str(network.file) + ".meeting"
    try:
        with network:
            assert network.run([[PYTHON, "-c", script, meeting]] * 2, timeout=40) == [0, 0]
            receiver, sender = network.counters()
    finally:
        Path(meeting).unlink(missing_ok=True)
    wire = 1_000_000 + math.ceil(1_000_000 / 1448) * 66
    assert wire <= sender.sent_bytes <= 1.02 * wire  # a connection's beginning and end besides
    assert sender.sent_bytes == receiver.received_bytes
    assert 0 < receiver.sent_bytes < 0.1 * wire  # acknowledgements
    assert left(network) == []


@real
def test_they_have_no_way_out():
    with SlowNetwork([Link()] * 2) as network:
        code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
        assert network.run([[PYTHON, "-c", f"try:\n  {code}\nexcept OSError: raise SystemExit(7)"]]) == [7]


@real
def test_a_failing_command_ends_the_others_and_leaves_nothing(monkeypatch):
    monkeypatch.setattr(slow_network, "_GRACE", 0.5)
    network = SlowNetwork([Link()] * 2)
    with network:
        begun = time.monotonic()
        codes = network.run([["sh", "-c", "exit 3"], ["sleep", "100"]])
    assert codes == [3, -signal.SIGTERM]
    assert time.monotonic() - begun < 20
    assert left(network) == []


@real
def test_an_error_and_a_late_command_leave_nothing():
    network = SlowNetwork([Link()] * 2)
    with pytest.raises(TimeoutError, match="the commands had not ended after 1 s"), network:
        network.run([["sleep", "100"]] * 2, timeout=1)
    assert left(network) == []


@real
def test_what_a_command_left_running_is_ended(tmp_path):
    network = SlowNetwork([Link()] * 2)
    with network:
        assert network.run([["sh", "-c", f"setsid sleep 100 & echo $! > {tmp_path}/pid"]]) == [0]
        pid = int((tmp_path / "pid").read_text())
        assert alive(pid)
    until(lambda: not alive(pid))
    assert left(network) == []


@real
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_signal_leaves_nothing(number, tmp_path):
    """A killed process can remove nothing: the switch sees its input end, and does."""
    code = f"echo $$ > {tmp_path}/$RANK; exec sleep 100"
    command = [PYTHON, str(BENCHMARKS / "slow_network.py"), "--delay", "1", "--", "sh", "-c", code]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            files = [tmp_path / "0", tmp_path / "1"]
            until(lambda: all(file.exists() and file.read_text().strip() for file in files))
            pids = [int(file.read_text()) for file in files]
            listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
            names = [name for name in listed.split() if name.startswith(f"thinrank-{process.pid}-")]
            assert len(names) == 2
            process.send_signal(number)
            assert process.wait(20) == (-number if number == signal.SIGKILL else 128 + number)
        finally:
            process.kill()
    until(lambda: not any(Path("/run/netns", name).exists() for name in names))
    until(lambda: not any(alive(pid) for pid in pids))


@real
def test_a_switch_that_was_killed_is_noticed_and_leaves_nothing():
    network = SlowNetwork([Link()] * 2)
    with network:
        os.kill(network._switch.pid, signal.SIGKILL)
        with pytest.raises(OSError, match="switch ended while commands ran"):
            network.run([["sleep", "100"]] * 2)
    assert left(network) == []
