"""Plain torchrun: a line for each machine."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from thinrank.trainers.cluster.agent import agent, log_dir, port_of
from thinrank.trainers.cluster.config import SubmitConfig, TorchrunJob


def lines(config: SubmitConfig, words: Sequence[str]) -> list[str]:
    """The command for each machine, to be started in the repository's root there."""
    job = config.job
    assert isinstance(job, TorchrunJob)
    identity, hosts = job.id or config.run.name, job.hosts or ["localhost"]
    variables = [f"{name}={shlex.quote(value)}" for name, value in job.variables.items()]
    nodes = f"{job.min_nodes}:{job.nodes}" if job.elastic else str(job.nodes)
    return [
        " ".join(
            [
                *variables,
                *agent(
                    job,
                    words,
                    nodes=nodes,
                    endpoint=f"{shlex.quote(hosts[0])}:{port_of(identity)}",
                    identity=shlex.quote(identity),
                    is_host=str(int(node == 0)),
                    logs=shlex.quote(f"{log_dir(config)}/node-{node}"),
                    address=shlex.quote(host),
                ),
            ]
        )
        for node, host in enumerate(hosts)
    ]


def text(config: SubmitConfig, words: Sequence[str]) -> str:
    """The lines, each under the name of its machine."""
    job = config.job
    assert isinstance(job, TorchrunJob)
    hosts = job.hosts or ["localhost"]
    return "\n".join(f"# on {host}\n{line}" for host, line in zip(hosts, lines(config, words), strict=True)) + "\n"
