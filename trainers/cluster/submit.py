"""From a configuration to a job: its text, and the cluster's own command that takes it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from thinrank.trainers.cluster import kubernetes, slurm, torchrun
from thinrank.trainers.cluster.config import KubernetesJob, SlurmJob, SubmitConfig
from thinrank.trainers.errors import UserError


def render(config: SubmitConfig, words: Sequence[str], *, made_by: str) -> str:
    """The batch script, the manifest, or the lines.

    Args:
        config: the run and its job.
        words: what follows launch/pretrain.py on the machines.
        made_by: the command that makes the same again, for the head of the text.
    """
    head = " ".join(made_by.split())  # a comment ends with its line
    if isinstance(config.job, SlurmJob):
        return slurm.script(config, words, made_by=head)
    if isinstance(config.job, KubernetesJob):
        return kubernetes.manifest(config, words, made_by=head)
    return torchrun.text(config, words)


def submit(config: SubmitConfig, text: str) -> str:
    """Hands what `render` made to the cluster; torchrun lines are only returned.

    Returns:
        What the cluster answered.

    Raises:
        UserError: its command is not installed, or refused the job.
    """
    if isinstance(config.job, SlurmJob):
        return _hand_to(["sbatch"], text, "from a login node of the cluster")
    if isinstance(config.job, KubernetesJob):
        return _hand_to(["kubectl", "apply", "-f", "-"], text, "where the cluster can be reached")
    return text


def _hand_to(command: list[str], text: str, where: str) -> str:
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{command[0]} is not installed here: submit {where}, or keep the text of --dry-run and hand it over there"
        )
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"{' '.join(command)} refused the job ({said}): look at its text with --dry-run")
    return done.stdout
