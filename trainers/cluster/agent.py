"""The torchrun agent that every node of a job starts, whatever started the node."""

from __future__ import annotations

import shlex
import zlib
from collections.abc import Sequence

from thinrank.trainers.cluster.config import JobConfig, SubmitConfig

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What the agent hands on to its ranks; of any other signal it dies, and leaves them behind."""
FIRST_PORT, PORTS = 20000, 10000
"""Where rendezvous ports lie: below those that Linux hands out by itself (32768 and up)."""


def port_of(identity: str) -> int:
    """The rendezvous port of a job, so that two jobs on one machine hardly ever meet."""
    return FIRST_PORT + zlib.crc32(identity.encode()) % PORTS


def log_dir(config: SubmitConfig) -> str:
    """Folder of the ranks' outputs."""
    return config.job.log_dir or f"{config.run.dir.rstrip('/')}/logs"


def agent(
    job: JobConfig,
    words: Sequence[str],
    *,
    nodes: str,
    endpoint: str,
    identity: str,
    is_host: str,
    logs: str,
    address: str | None = None,
) -> list[str]:
    """The command line of a node, in parts that each fit a line.

    Everything but `words` is shell text: already quoted, and it may hold variables.

    Args:
        job: how many processes, and how long they may take to end.
        words: what follows launch/pretrain.py.
        nodes: machines, or ``MIN:MAX``.
        endpoint: host and port of the rendezvous.
        identity: its name; agents with another one do not meet.
        is_host: 1 on the node that holds the rendezvous, else 0. Left to itself, torchrun guesses by host names.
        logs: folder of this node's logs.
        address: how the other nodes reach this one; None for its host name.
    """
    reach = [f"--local-addr {address}"] if address else []
    # read_timeout is also how long a node waits for the one that holds the rendezvous
    meeting = f"is_host={is_host},join_timeout={job.join_seconds},read_timeout={job.join_seconds}"
    if job.elastic:
        meeting += f",last_call_timeout={job.last_call_seconds}"
    return [
        f"{shlex.quote(job.python)} -m torch.distributed.run",
        f"--nnodes {nodes} --nproc-per-node {job.processes} --max-restarts {job.max_restarts}",
        f"--rdzv-backend c10d --rdzv-endpoint {endpoint} --rdzv-id {identity}",
        f"--rdzv-conf {meeting}",
        *reach,
        f"--signals-to-handle {SIGNALS} --shutdown-timeout {job.shutdown_seconds}",
        f"--log-dir {logs} --redirects 3 --tee {job.tee}",
        shlex.join(["launch/pretrain.py", *words]),
    ]


def continued(parts: Sequence[str], indent: str = "    ") -> str:
    """Parts of one command, a line each."""
    return f" \\\n{indent}".join(parts)


def verdict(job: JobConfig) -> str:
    """The command that notes how a run folder stands, and later judges how a job has ended."""
    return f"{shlex.quote(job.python)} -m thinrank.trainers.cluster.verdict"
