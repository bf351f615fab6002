"""A Slurm batch script: one agent a node, a signal before the time limit, and the job queued again by the verdict."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from thinrank.trainers.cluster.agent import FIRST_PORT, PORTS, agent, continued, log_dir, verdict
from thinrank.trainers.cluster.config import SlurmJob, SubmitConfig

_SCRIPT = """\
#!/bin/bash
# {made_by}
{options}
set -euo pipefail
{setup}
# The first node holds the rendezvous; another start of the job is another one, which leftovers cannot join.
mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export RUN={run} LOGS={logs} HEAD=${{HOSTS[0]}}
export PORT=$(({first} + SLURM_JOB_ID % {ports})) RENDEZVOUS=$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}

agent() {{ # on every node; exec, so that the signals reach torchrun
    exec {agent}
}}
export -f agent

before=$({verdict} "$RUN")
code=0
srun {srun} bash -c agent || code=$?

# Exit codes of ranks do not come through torchrun: the run folder says how it stands (75: go on).
ended=0
{verdict} "$RUN" --since "$before" --code "$code" || ended=$?
if [ "$ended" -eq 75 ]; then
    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_requeues} ]; then
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "queued again {max_requeues} times already (job.max_requeues): submit the job anew to go on" >&2
    fi
fi
exit "$ended"
"""


def script(config: SubmitConfig, words: Sequence[str], *, made_by: str) -> str:
    """The batch script.

    Args:
        config: the run and its job.
        words: what follows launch/pretrain.py.
        made_by: a line for its head.
    """
    job = config.job
    assert isinstance(job, SlurmJob)
    command = agent(
        job,
        words,
        nodes=f'"{job.min_nodes}:$SLURM_NNODES"' if job.elastic else '"$SLURM_NNODES"',
        endpoint='"$HEAD:$PORT"',
        identity='"$RENDEZVOUS"',
        is_host="$((SLURM_NODEID == 0))",
        logs='"$LOGS/node-$SLURM_NODEID"',
    )
    setup = [*job.setup, *(f"export {name}={shlex.quote(value)}" for name, value in job.variables.items())]
    # Without a node, an elastic job goes on; any other ends at once, rather than wait for it.
    loss = "--no-kill --kill-on-bad-exit=0 --wait=0" if job.elastic else "--kill-on-bad-exit=1"
    return _SCRIPT.format(
        made_by=made_by,
        options="\n".join(f"#SBATCH {option}" for option in _options(config, job)),
        setup="".join(f"{line}\n" for line in setup),
        run=shlex.quote(config.run.dir),
        logs=shlex.quote(log_dir(config)),
        first=FIRST_PORT,
        ports=PORTS,
        agent=continued(command, " " * 8),
        verdict=verdict(job),
        # Slurm 22.05 and later do not hand the cores of the job on to its steps
        srun=f'--cpus-per-task="$SLURM_CPUS_PER_TASK" {loss}',
        max_requeues=job.max_requeues,
    )


def _options(config: SubmitConfig, job: SlurmJob) -> list[str]:
    options = [
        f"--job-name={''.join(c if c.isalnum() or c in '-_.' else '-' for c in config.run.name)}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={job.cpus_per_process * job.processes}",
        f"--time={job.time}",
        # without "B:", so that the steps get it and not this script
        f"--signal=USR1@{job.notice_seconds}",
        "--requeue",
        "--open-mode=append",
        "--wait-all-nodes=1",
    ]
    if job.gpus_per_node:
        options.insert(3, f"--gpus-per-node={job.gpus_per_node}")
    if job.exclusive:
        options.append("--exclusive")
    if job.elastic:
        options.append("--no-kill")
    given = {name: getattr(job, name) for name in ("partition", "account", "qos")}
    return [*options, *(f"--{name}={value}" for name, value in given.items() if value), *job.options]
