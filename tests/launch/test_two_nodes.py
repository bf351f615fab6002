"""Two torchrun agents on the loopback as two nodes, started by the lines that launch/submit.py prints."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import run_words, write_corpus
from submitting import ROOT, submit_script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # half a minute on an idle machine


def words(base, port_name):
    return [
        "job=torchrun",
        "job.nodes=2",
        "job.gpus_per_node=0",
        "job.hosts=[127.0.0.1, 127.0.0.1]",
        f"job.id={port_name}-{os.getpid()}",  # its port, too: two suites may run on one machine
        "job.save_seconds=30",
        "job.join_seconds=300",
        "job.env={GLOO_SOCKET_IFNAME: lo}",
        f"job.python={sys.executable}",
        "run.preflight.slow_factor=100",  # two ranks and a suite share the processor here
        *run_words(base, "run"),
        "trainer.max_steps=160",
        "trainer.checkpoint_every=20",
    ]


class Nodes:
    """The agents of one start of the job."""

    def __init__(self, lines, log):
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        self.log = log
        self.agents = []
        for number, line in enumerate(lines):
            with open(f"{log}-{number}.log", "w") as file:
                # exec: the agent itself gets the signals, as it does from srun
                self.agents.append(
                    subprocess.Popen(
                        ["env", "bash", "-c", f"exec env {line}"],
                        cwd=ROOT,
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def worker(self, node):
        """The process id of a node's rank; None before it has started."""
        agent = self.agents[node].pid
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        for child in map(int, children):
            if b"launch/pretrain.py" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
        return None

    def wait_for(self, condition, seconds=240):
        """Waits until `condition` holds, which it must before an agent ends."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [agent.poll() for agent in self.agents]
            assert ended == [None, None], self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def codes(self, seconds=240):
        return [agent.wait(timeout=seconds) for agent in self.agents]

    def said(self):
        return "\n".join(Path(f"{self.log}-{number}.log").read_text()[-3000:] for number in (0, 1))

    def kill(self, node):
        """What the loss of a machine leaves of a node: no agent, and no rank."""
        worker = self.worker(node)
        self.agents[node].kill()
        self.agents[node].wait()
        if worker is not None:
            os.kill(worker, signal.SIGKILL)

    def end(self):
        for node, agent in enumerate(self.agents):
            if agent.poll() is None:
                self.kill(node)


@pytest.fixture
def start(tmp_path):
    started = []

    def start(lines):
        started.append(Nodes(lines, tmp_path / f"agents-{len(started)}"))
        return started[-1]

    yield start
    for nodes in started:
        nodes.end()


def verdict(folder, *more):
    call = [sys.executable, "-m", "thinrank.trainers.cluster.verdict", str(folder), *more]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, (done.stdout + done.stderr).strip()


@pytest.fixture
def job(tmp_path, capsys):
    """Writes a corpus; ``job(*words)`` gives the lines of a job with further words, one for each node."""
    write_corpus(tmp_path)

    def lines(*more):
        code, text = submit_script(capsys, *words(tmp_path, tmp_path.name), *more)
        assert code == 0, text
        found = [line for line in text.splitlines() if not line.startswith("#")]
        assert len(found) == 2
        return found

    return lines


def step(run):
    """The last step that the run has told of."""
    status = run / "status.json"
    return json.loads(status.read_text()).get("step", 0) if status.exists() else 0


def history(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def test_a_preempted_job_goes_on_and_survives_the_death_of_a_rank(tmp_path, start, job):
    """What a batch script sees of it are the marker and the verdicts 75 and 0; the dead rank costs a restart."""
    lines, run = job(), tmp_path / "run"

    # preempted: every agent gets the signal, as from Slurm's --signal=USR1@…
    _, before = verdict(run)
    nodes = start(lines)
    nodes.wait_for(lambda: step(run) >= 20)
    for agent in nodes.agents:
        agent.send_signal(signal.SIGUSR1)
    assert nodes.codes() == [1, 1], nodes.said()  # torchrun lets no exit code through
    marker = json.loads((run / "preempted").read_text())
    assert marker["signal"] == "SIGUSR1"
    assert 20 <= marker["step"] < 160
    assert json.loads((run / "status.json").read_text())["exit_code"] == 75
    assert verdict(run, "--since", before, "--code", "1") == (
        75,
        f"{run}: preempted after a save at step {marker['step']}: start again to go on",
    )

    # the same lines again, and a rank dies
    _, before = verdict(run)
    nodes = start(lines)
    nodes.wait_for(lambda: step(run) >= marker["step"] + 20)
    killed = nodes.worker(1)
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    assert nodes.codes() == [0, 0], nodes.said()
    events = history(run)
    first, second, third = [line["step"] for line in events if line["event"] == "start"]
    assert (first, second) == (0, marker["step"])
    assert second + 20 <= third < 160
    assert events[-1]["state"] == "finished"
    assert not (run / "preempted").exists()
    assert verdict(run, "--since", before) == (0, f"{run}: finished at step 160")

    # Outputs of every rank lie in the run folder, with what the look at the machines found. Rank 0's of the killed
    # start may be overwritten: an agent that only sees another one restart writes into the same folder again.
    for folder in run.glob("logs/node-*"):
        assert len(list(folder.glob("*/attempt_*/0/stderr.log"))) >= 2
    said = [path.read_text() for path in run.glob("logs/node-*/**/stdout.log")]
    assert sum(text.startswith("preflight   2 ranks on ") for text in said) >= 2


def test_an_elastic_job_goes_on_without_a_node(tmp_path, start, job):
    """The second machine is gone, with its agent and its rank. The first one's rank dies of the broken connection; its
    agent waits until the other has missed its heartbeats (15 s), and starts again from the newest checkpoint, alone."""
    lines, run = job("job.min_nodes=1", "job.last_call_seconds=1"), tmp_path / "run"
    assert all("--nnodes 1:2 " in line for line in lines)
    nodes = start(lines)
    nodes.wait_for(lambda: step(run) >= 20)
    nodes.kill(1)
    assert nodes.codes() == [0, -signal.SIGKILL], nodes.said()
    events = history(run)
    (first, both), (second, alone) = [(line["step"], line["world"]) for line in events if line["event"] == "start"]
    assert (first, both, alone) == (0, 2, 1)
    assert 20 <= second < 160
    assert events[-1]["state"] == "finished"
    assert verdict(run)[0] == 0
