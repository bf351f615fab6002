"""What a cluster has to be told about a job."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from thinrank.trainers.errors import UserError
from thinrank.trainers.pretrain import Plan, PretrainConfig
from thinrank.trainers.strategies import World

_SLURM_TIME = re.compile(r"(\d+-)?\d+(:\d\d){1,2}|\d+-\d+|\d+")
_TEE = re.compile(r"[0-3]|\d+:[0-3](,\d+:[0-3])*")
_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """How many machines and processes a job has, what it survives, and how long its save may take.

    Every node runs one torchrun agent, every agent `processes` ranks.
    """

    nodes: int = field(default=1, metadata={"help": "machines"})
    min_nodes: int | None = field(
        default=None,
        metadata={"help": "fewest machines to go on with after a loss (elastic); null: all of them"},
    )
    gpus_per_node: int = field(default=8, metadata={"help": "GPUs of a machine, each with one process; 0: CPUs alone"})
    processes_per_node: int | None = field(
        default=None, metadata={"help": "processes of a machine; null: one for each GPU, or one where there is none"}
    )
    max_restarts: int = field(
        default=3, metadata={"help": "times that all ranks are started again within the job after one has failed"}
    )
    save_seconds: int = field(
        default=240,
        metadata={"help": "what a step and a save take together at most; all notice and grace times follow from it"},
    )
    join_seconds: int = field(default=900, metadata={"help": "seconds for all machines to meet"})
    last_call_seconds: int = field(
        default=30,
        metadata={"help": "elastic: how long min_nodes machines wait for more, at the start and after each loss"},
    )
    log_dir: str | None = field(
        default=None, metadata={"help": "folder of every rank's output; null: logs in the run folder"}
    )
    tee: str = field(
        default="0:3",
        metadata={"help": "which local ranks also speak on the console (torchrun --tee); 0:3 is the first, 3 is all"},
    )
    python: str = field(default="python", metadata={"help": "the interpreter on the machines"})
    env: dict[str, str] = field(
        default_factory=dict, metadata={"help": "environment variables of the ranks, as {NCCL_SOCKET_IFNAME: eth0}"}
    )

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("max_restarts", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}: give a larger number")
        for name in ("save_seconds", "join_seconds", "last_call_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 second, got {getattr(self, name)}: leave it out")
        if self.min_nodes is not None and not 1 <= self.min_nodes <= self.nodes:
            raise ValueError(
                f"min_nodes must be between 1 and nodes ({self.nodes}), got {self.min_nodes}: use null for all of them"
            )
        if self.processes_per_node is not None and self.processes_per_node < 1:
            raise ValueError(
                f"processes_per_node must be at least 1, got {self.processes_per_node}: use null for one on each GPU"
            )
        if self.gpus_per_node and self.processes > self.gpus_per_node:
            raise ValueError(
                f"processes_per_node must be at most the {self.gpus_per_node} GPUs of a node, got {self.processes}: "
                "lower it, or set gpus_per_node=0 for CPUs alone"
            )
        if not _TEE.fullmatch(self.tee):
            raise ValueError(f"tee must be 0 to 3, or RANK:STREAMS as in 0:3, got {self.tee!r}: leave it out")
        for name in self.env:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"env must name variables by letters, digits and _, got {name!r}: rename it")
        if not self.python:
            raise ValueError("python must name an interpreter, got '': leave it out for python")

    @property
    def processes(self) -> int:
        """Processes of a machine."""
        return self.processes_per_node or max(self.gpus_per_node, 1)

    @property
    def variables(self) -> dict[str, str]:
        """The environment of the agents.

        By default (torch 2.13) the ranks of all restarts meet in one store, where a new rank may read the address of
        one that is gone before its successor has written its own, and then waits in vain. A store for each start has
        no past.
        """
        return {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **self.env}

    @property
    def elastic(self) -> bool:
        """Whether the job may go on with fewer machines."""
        return self.min_nodes is not None and self.min_nodes < self.nodes

    @property
    def shutdown_seconds(self) -> int:
        """How long torchrun waits after a signal before it kills the ranks: longer than their save takes."""
        return self.save_seconds + 30

    @property
    def notice_seconds(self) -> int:
        """How long before the end the signal has to come: longer than torchrun waits."""
        return self.save_seconds + 60


@dataclass(frozen=True, kw_only=True)
class SlurmJob(JobConfig):
    """A Slurm batch job: one task, the agent, on each node."""

    time: str = field(default="24:00:00", metadata={"help": "time limit, as Slurm writes it: 24:00:00, 2-00:00:00, 90"})
    partition: str | None = field(default=None, metadata={"help": "partition; null: the cluster's default"})
    account: str | None = field(default=None, metadata={"help": "account to charge"})
    qos: str | None = field(default=None, metadata={"help": "quality of service"})
    cpus_per_process: int = field(default=4, metadata={"help": "processor cores of each process"})
    exclusive: bool = field(default=True, metadata={"help": "whole nodes, shared with no other job"})
    max_requeues: int = field(default=100, metadata={"help": "times that the job is queued again after a preemption"})
    options: list[str] = field(default_factory=list, metadata={"help": "further sbatch options, as [--mem=0]"})
    setup: list[str] = field(
        default_factory=list, metadata={"help": "shell lines before everything else, as [module load cuda]"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _SLURM_TIME.fullmatch(self.time):
            raise ValueError(f"time must be a Slurm time such as 24:00:00, 2-00:00:00 or 90, got {self.time!r}")
        if self.seconds <= self.notice_seconds:
            raise ValueError(
                f"time must be longer than the notice of {self.notice_seconds} s that a save needs, got {self.time}: "
                "raise it or lower save_seconds"
            )
        if self.cpus_per_process < 1 or self.max_requeues < 0:
            raise ValueError(
                f"cpus_per_process must be at least 1 and max_requeues at least 0, got {self.cpus_per_process} and "
                f"{self.max_requeues}: leave them out"
            )
        for option in self.options:
            if not option.startswith("-"):
                raise ValueError(f"options must be those of sbatch, as --mem=0, got {option!r}: begin it with --")
        for name in ("options", "setup", "partition", "account", "qos"):
            if "\n" in "".join(getattr(self, name) or ""):
                raise ValueError(f"{name} must be one line, or lines in a list, got a line break: take it out")

    @property
    def seconds(self) -> int:
        """The time limit. Slurm reads 90 as minutes, 5:00 as minutes and seconds, 2-12 as days and hours."""
        days, _, clock = self.time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        if days:
            hours, minutes, seconds = (*parts, 0, 0)[:3]
        elif len(parts) == 3:
            hours, minutes, seconds = parts
        else:
            hours, (minutes, seconds) = 0, (*parts, 0)[:2]
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass(frozen=True, kw_only=True)
class KubernetesJob(JobConfig):
    """An Indexed Job with a headless service, by whose names the pods find each other."""

    image: str = field(metadata={"help": "container image that holds this repository, installed"})
    claim: str = field(metadata={"help": "persistent volume claim, writable from all pods, that holds the run folder"})
    mount: str = field(default="/runs", metadata={"help": "where the claim appears; run.dir has to lie below it"})
    workdir: str = field(default="/workspace/thinrank", metadata={"help": "this repository in the image"})
    id: str | None = field(
        default=None, metadata={"help": "name of the job; null: the run's name and a digest of its folder"}
    )
    namespace: str | None = field(default=None, metadata={"help": "namespace; null: the context's"})
    cpus: int | None = field(default=None, metadata={"help": "processor cores of a pod; null: 4 for each process"})
    memory: str = field(default="64Gi", metadata={"help": "memory of a pod"})
    shared_memory: str = field(default="8Gi", metadata={"help": "size of /dev/shm, through which local ranks talk"})
    gpu_resource: str = field(default="nvidia.com/gpu", metadata={"help": "how the cluster calls a GPU"})
    max_failures: int = field(
        default=6, metadata={"help": "failed pods after which the job fails; preempted and evicted ones do not count"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image", "claim"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty: name the cluster's own")
        for name in ("mount", "workdir"):
            if not getattr(self, name).startswith("/"):
                raise ValueError(
                    f"{name} must be a full path in the container, got {getattr(self, name)!r}: begin it with /"
                )
        if self.id is not None and not _DNS_LABEL.fullmatch(self.id):
            raise ValueError(
                f"id must be at most 52 small letters, digits and dashes, got {self.id!r}: use null for a derived one"
            )
        if self.max_failures < 0:
            raise ValueError(f"max_failures must be at least 0, got {self.max_failures}: leave it out")


@dataclass(frozen=True, kw_only=True)
class TorchrunJob(JobConfig):
    """Machines that one can log in to: a line to start on each of them."""

    hosts: list[str] = field(
        default_factory=list,
        metadata={"help": "a name or address for each machine, by which the others reach it; the first is the head"},
    )
    id: str | None = field(
        default=None, metadata={"help": "name of the rendezvous, from which its port follows; null: run.name"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.hosts) != self.nodes and (self.hosts or self.nodes > 1):
            raise ValueError(
                f"hosts must name the {self.nodes} machines of nodes={self.nodes}, got {len(self.hosts)}: "
                "write hosts=[a, b]"
            )


@dataclass(frozen=True, kw_only=True)
class SubmitConfig(PretrainConfig):
    """A pre-training run and the job that runs it."""

    job: JobConfig = field(default_factory=JobConfig, metadata={"help": "the job on the cluster"})

    def __post_init__(self) -> None:
        super().__post_init__()
        mount = getattr(self.job, "mount", None)
        if mount is not None and not f"{self.run.dir}/".startswith(f"{mount.rstrip('/')}/"):
            raise ValueError(
                f"run.dir must lie below job.mount ({mount}), got {self.run.dir}: what is written elsewhere is lost "
                f"with the pod; set run.dir={mount.rstrip('/')}/{self.run.name}"
            )

    def check(self) -> None:
        """Refuses a batch that the processes cannot share, with every number of machines that the job may have.

        Raises:
            UserError: with the key to change.
        """
        job = self.job
        for nodes in range(job.min_nodes or job.nodes, job.nodes + 1):
            world = World(size=nodes * job.processes, local_size=job.processes)
            try:
                Plan.of(_training(self), world)
            except UserError as error:
                raise UserError(f"on {nodes} node{'s' if nodes > 1 else ''}, {error}") from error


def _training(config: Any) -> Any:
    # Any: to a checker this file is also trainers/cluster/config.py, with a PretrainConfig of its own
    return config
