"""What a job on a cluster is told, taken apart: the job itself, and the words that its ranks get."""

from __future__ import annotations

import shlex

from thinrank.configs.arguments import Arguments
from thinrank.configs.errors import ConfigError
from thinrank.configs.load import Loaded
from thinrank.configs.reader import read


def training_words(loaded: Loaded, arguments: Arguments) -> list[str]:
    """The arguments of launch/pretrain.py on the machines: those given here, without the job's.

    Raises:
        ConfigError: a file for ``--config`` says something of the job, which launch/pretrain.py would not understand.
    """
    for file in arguments.files:
        document = read(file)
        if "job" in document.values:
            raise ConfigError(
                f"{document.places['job']}: the ranks read this file too, and know no job: move its keys to a file of "
                "their own, with a line `name: slurm`, and choose that by job=FILE.yaml"
            )
    words = [f"--config={file}" for file in arguments.files]
    words += [f"--config-dir={folder}" for folder in arguments.folders]
    if loaded.config.run.preflight.enabled:
        words.append("run.preflight.enabled=true")  # the default here, and not there
    words += [f"{key}={value}" for key, value in arguments.words if not _of_job(key)]
    return words


def command_line(arguments: Arguments, script: str) -> str:
    """The command that prints the same job again."""
    words = [f"--config={file}" for file in arguments.files]
    words += [f"--config-dir={folder}" for folder in arguments.folders]
    words += [f"{key}={value}" for key, value in arguments.words]
    return shlex.join(["python", script, "--dry-run", *words])


def _of_job(key: str) -> bool:
    return key.partition(".")[0] == "job"
