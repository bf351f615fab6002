"""A Kubernetes Indexed Job: a pod for each node, a headless service by whose names they meet."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from thinrank.trainers.cluster.agent import agent, continued, log_dir, port_of, verdict
from thinrank.trainers.cluster.config import KubernetesJob, SubmitConfig

_POD = """\
set -uo pipefail
RUN={run}
before=$({verdict} "$RUN")
{agent} &
agent=$!
# The shell is the container's first process: it has to hand the signal on, and to wait until torchrun has ended.
trap 'kill -TERM "$agent"' TERM
while true; do
    code=0
    wait "$agent" || code=$?
    kill -0 "$agent" 2>/dev/null || break
done
exec {verdict} "$RUN" --since "$before" --code "$code"
"""


class _Dumper(yaml.SafeDumper):
    pass


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def job_name(config: SubmitConfig) -> str:
    """A name that is a host name too: the run's name and, since two runs may share it, a digest of its folder."""
    job = config.job
    assert isinstance(job, KubernetesJob)
    if job.id is not None:
        return job.id
    plain = re.sub(r"[^a-z0-9]+", "-", config.run.name.lower()).strip("-")
    # a digit in front is no host name to every tool
    start = plain if plain[:1].isalpha() else f"run-{plain}"
    return f"{start[:44].strip('-')}-{hashlib.sha256(config.run.dir.encode()).hexdigest()[:6]}"


def manifest(config: SubmitConfig, words: Sequence[str], *, made_by: str) -> str:
    """The manifest: service and job, as two YAML documents.

    Args:
        config: the run and its job.
        words: what follows launch/pretrain.py.
        made_by: a line for its head.
    """
    job = config.job
    assert isinstance(job, KubernetesJob)
    documents = [_service(config, job), _job(config, job, words)]
    body = "---\n".join(yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120) for document in documents)
    return f"# {made_by}\n{body}"


def _metadata(config: SubmitConfig, job: KubernetesJob) -> dict[str, Any]:
    name = job_name(config)
    place = {} if job.namespace is None else {"namespace": job.namespace}
    return {"name": name, **place, "labels": {"app.kubernetes.io/name": "thinrank", "app.kubernetes.io/instance": name}}


def _service(config: SubmitConfig, job: KubernetesJob) -> dict[str, Any]:
    name = job_name(config)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(config, job),
        "spec": {
            "clusterIP": "None",
            # the ranks have to meet before any pod counts as ready
            "publishNotReadyAddresses": True,
            "selector": {"job-name": name},
            "ports": [{"name": "rendezvous", "port": port_of(name)}],
        },
    }


def _job(config: SubmitConfig, job: KubernetesJob, words: Sequence[str]) -> dict[str, Any]:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(config, job),
        "spec": {
            "completionMode": "Indexed",
            "completions": job.nodes,
            "parallelism": job.nodes,
            "backoffLimit": job.max_failures,
            # A pod that takes the place of a lost one may come when the run has finished, and then meets nobody: where
            # the pod of the rendezvous has ended well, all have.
            **({"successPolicy": {"rules": [{"succeededIndexes": "0"}]}} if job.elastic else {}),
            "podFailurePolicy": {
                "rules": [
                    # another pod would fail alike: configuration, preflight, guard
                    {
                        "action": "FailJob",
                        "onExitCodes": {"containerName": "ranks", "operator": "In", "values": [2, 3, 76]},
                    },
                    # saved, to go on in another pod
                    {"action": "Ignore", "onExitCodes": {"containerName": "ranks", "operator": "In", "values": [75]}},
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": {
                "metadata": {"labels": {"app.kubernetes.io/instance": job_name(config)}},
                "spec": _pod(config, job, words),
            },
        },
    }


def _pod(config: SubmitConfig, job: KubernetesJob, words: Sequence[str]) -> dict[str, Any]:
    name = job_name(config)
    command = agent(
        job,
        words,
        nodes=f"{job.min_nodes}:{job.nodes}" if job.elastic else str(job.nodes),
        endpoint=f"{name}-0.{name}:{port_of(name)}",
        identity=name,
        is_host="$((JOB_COMPLETION_INDEX == 0))",
        logs=f"{shlex.quote(log_dir(config))}/node-$JOB_COMPLETION_INDEX",
        address='"$POD_IP"',
    )
    amounts: dict[str, Any] = {"cpu": str(job.cpus or 4 * job.processes), "memory": job.memory}
    if job.gpus_per_node:
        amounts[job.gpu_resource] = str(job.gpus_per_node)
    return {
        "subdomain": name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.notice_seconds,
        "containers": [
            {
                "name": "ranks",
                "image": job.image,
                "workingDir": job.workdir,
                "command": [
                    "bash",
                    "-c",
                    _POD.format(run=shlex.quote(config.run.dir), verdict=verdict(job), agent=continued(command)),
                ],
                "env": [
                    {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                    *({"name": key, "value": value} for key, value in job.variables.items()),
                ],
                # requests equal to limits: the last to be evicted where memory runs out
                "resources": {"requests": amounts, "limits": dict(amounts)},
                "volumeMounts": [
                    {"name": "runs", "mountPath": job.mount},
                    {"name": "shared-memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": job.claim}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": job.shared_memory}},
        ],
    }
