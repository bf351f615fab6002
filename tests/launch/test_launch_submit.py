"""launch/submit.py: what it makes, what it refuses, and that the scripts do what they say, with stand-ins for the
cluster's own commands, which are not here."""

import itertools
import os
import shlex
import subprocess
import sys
import time

import pytest
import yaml
from submitting import ROOT, submit_script

from thinrank.configs.load import load
from thinrank.configs.schema import PRETRAIN
from thinrank.trainers.cluster.config import JobConfig, KubernetesJob, SlurmJob, TorchrunJob

K8S = ("job=k8s", "job.image=thinrank:latest", "job.claim=runs", "run.dir=/runs/pretrain")


def checked(script):
    """Bash finds nothing wrong with the syntax."""
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return script


def pod_script(text):
    service, job = yaml.safe_load_all(text)
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    shell, option, script = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert (shell, option) == ("bash", "-c")
    return checked(script)


def trained_with(script):
    """The words after launch/pretrain.py in the one place where a script has it."""
    _, found = script.split("launch/pretrain.py")
    lexer = shlex.shlex(found, posix=True, punctuation_chars="&\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " ", True, ""
    return list(itertools.takewhile(lambda word: word.strip("&\n"), lexer))


# The committed examples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slurm.sbatch", "k8s.yaml"])
def test_the_committed_example_is_what_its_first_line_makes(capsys, name):
    text = (ROOT / "launch" / name).read_text()
    command = next(line for line in text.splitlines() if line.startswith("# python "))
    python, script, *words = shlex.split(command.removeprefix("# "))
    assert (python, script, words[0]) == ("python", "launch/submit.py", "--dry-run")
    assert submit_script(capsys, *words) == (0, text)


def test_the_committed_slurm_script_is_good_bash():
    checked((ROOT / "launch" / "slurm.sbatch").read_text())


def test_the_committed_manifest_holds_a_service_and_an_indexed_job():
    text = (ROOT / "launch" / "k8s.yaml").read_text()
    service, job = yaml.safe_load_all(text)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    name = job["metadata"]["name"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert service["spec"]["clusterIP"] == "None"
    assert service["metadata"]["name"] == pod["subdomain"] == name
    assert service["spec"]["selector"] == {"job-name": name}
    assert f"--rdzv-endpoint {name}-0.{name}:{service['spec']['ports'][0]['port']} " in pod_script(text)
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy needs it
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][:2]}
    assert codes == {"FailJob": [2, 3, 76], "Ignore": [75]}


# One configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [("job=slurm",), K8S, ("job=torchrun", "job.hosts=[a, b]")],
    ids=["slurm", "k8s", "torchrun"],
)
def test_the_ranks_get_the_configuration_that_was_checked(capsys, kind):
    words = ["optimizer=galore", "optimizer.rank=8", "trainer.sample_prompt=it's $HOME", "model=9m"]
    code, text = submit_script(capsys, "--dry-run", *kind, "job.nodes=2", *words)
    assert code == 0
    script = pod_script(text) if kind is K8S else checked(text)
    if kind[0] == "job=torchrun":
        script = script.splitlines()[1]
    got = trained_with(script)
    given = [word for word in kind if word.startswith("run.")]
    assert got == ["run.preflight.enabled=true", *given, *words]
    assert load(PRETRAIN, got).config.trainer.sample_prompt == "it's $HOME"


def test_preflight_can_be_left_out(capsys):
    _, text = submit_script(capsys, "--dry-run", "run.preflight.enabled=false")
    assert trained_with(text) == ["run.preflight.enabled=false"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["optimizer.rnk=3"], "error: unknown key optimizer.rnk: did you mean optimizer.rank?"),
        (["job.nodse=2"], "error: unknown key job.nodse: did you mean job.nodes?"),
        (["job=slum"], "error: unknown choice job=slum: did you mean slurm?"),
        (["job.nodes=3"], "error: on 3 nodes, trainer.batch_size must be a multiple of the 24 processes, got 16"),
        (["job.nodes=2", "job.min_nodes=1", "job.gpus_per_node=5", "trainer.batch_size=10"], ""),
        (
            ["job.nodes=3", "job.min_nodes=1", "job.gpus_per_node=4"],
            "error: on 3 nodes, trainer.batch_size must be a multiple of the 12 processes",
        ),
        (["job=k8s"], "error: job.image must be given: add job.image=…"),
        (
            ["job=k8s", "job.image=x", "job.claim=y"],
            "error: run.dir must lie below job.mount (/runs)",
        ),
        (["job=torchrun", "job.nodes=2"], "error: job.hosts must name the 2 machines of nodes=2, got 0"),
        (["job.image=x"], "error: unknown key job.image: image belongs to job=k8s, and job=slurm is chosen"),
        (["job.time=5:00"], "error: job.time must be longer than the notice of 300 s that a save needs, got 5:00"),
        (["trainer.devices=4"], "error: on 1 node, trainer.devices must be what torchrun started, 8, got 4"),
    ],
)
def test_mistakes_are_found_before_the_queue(capsys, words, sentence):
    code, said = submit_script(capsys, "--dry-run", *words)
    if not sentence:
        assert code == 0
        return
    assert code == 2
    assert said.startswith(sentence)
    assert said.count("\n") == 1


def test_a_file_for_the_ranks_may_not_hold_the_job(capsys, tmp_path):
    (tmp_path / "x.yaml").write_text("optimizer: galore\njob:\n  nodes: 2\n")
    code, said = submit_script(capsys, "--dry-run", f"--config={tmp_path}/x.yaml")
    assert code == 2
    assert said.startswith(f"error: {tmp_path}/x.yaml, line 2: the ranks read this file too, and know no job: ")
    (tmp_path / "x.yaml").write_text("optimizer: galore\n")
    (tmp_path / "job.yaml").write_text("name: slurm\nnodes: 2\npartition: large\n")
    code, text = submit_script(capsys, "--dry-run", f"--config={tmp_path}/x.yaml", f"job={tmp_path}/job.yaml")
    assert code == 0
    assert "#SBATCH --partition=large\n" in text
    assert trained_with(text) == [f"--config={tmp_path}/x.yaml", "run.preflight.enabled=true"]


def test_help_and_cfg(capsys):
    code, text = submit_script(capsys, "--help", "job=k8s", "job.image=x", "job.claim=y")
    assert code == 0
    assert "  job.shared_memory: str = 8Gi" in text
    code, text = submit_script(capsys, "--cfg")
    assert yaml.safe_load(text)["job"]["name"] == "slurm"


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ((), "sbatch is not installed here: submit from a login node"),
        (K8S, "kubectl is not installed here: submit where"),
    ],
)
def test_without_the_clusters_command_a_sentence_says_so(capsys, monkeypatch, tmp_path, kind, command):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, said = submit_script(capsys, *kind)
    assert code == 2
    assert said.startswith(f"error: {command}")


@pytest.mark.parametrize(
    ("kind", "command", "arguments"), [((), "sbatch", ""), (K8S, "kubectl", "apply -f -")], ids=["slurm", "k8s"]
)
def test_the_clusters_command_gets_what_dry_run_shows(capsys, monkeypatch, tmp_path, kind, command, arguments):
    fake = tmp_path / command
    fake.write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/arguments\n/bin/cat > {tmp_path}/text\necho job 7\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit_script(capsys, *kind) == (0, "job 7\n")
    _, shown = submit_script(capsys, "--dry-run", *kind)
    assert (tmp_path / "text").read_text() == shown.rstrip("\n") + "\n"
    assert (tmp_path / "arguments").read_text().strip() == arguments
    fake.write_text("#!/bin/bash\n/bin/cat > /dev/null\necho 'no such partition' >&2\nexit 1\n")
    code, said = submit_script(capsys, *kind)
    assert code == 2
    assert "refused the job (no such partition): look at its text with --dry-run" in said


def test_torchrun_lines_are_printed_and_meet_at_the_first_host(capsys):
    code, text = submit_script(capsys, "job=torchrun", "job.nodes=2", "job.hosts=[alpha, beta]", "job.env={A: b c}")
    assert code == 0
    name, first, other, second = checked(text).splitlines()
    assert (name, other) == ("# on alpha", "# on beta")
    for line, host, is_host in ((first, "alpha", 1), (second, "beta", 0)):
        words = shlex.split(line)
        assert words[:2] == ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "A=b c"]
        options = dict(itertools.pairwise(words))
        assert options["--rdzv-endpoint"].startswith("alpha:2")
        assert options["--local-addr"] == host
        assert options["--rdzv-conf"].startswith(f"is_host={is_host},")
        assert options["--shutdown-timeout"] == "270"
    assert first.split("--rdzv-endpoint ")[1].split()[0] == second.split("--rdzv-endpoint ")[1].split()[0]


def test_a_newline_in_a_word_stays_in_its_word(capsys):
    """The command that made a script stands in its first comment; nothing may get out of there."""
    words = ["trainer.sample_prompt=a\ntouch /tmp/out\n", "run.name=x\n#SBATCH -A y"]
    code, text = submit_script(capsys, "--dry-run", *words)
    assert code == 0
    head, _ = checked(text).split("set -euo")  # sbatch reads options until the first command
    assert all(line.startswith("#") for line in head.splitlines())
    assert not [line for line in head.splitlines() if line.startswith("#SBATCH -A")]
    assert trained_with(text)[1] == "trainer.sample_prompt=a\ntouch /tmp/out\n"


# The scripts at work -------------------------------------------------------------------------------------------------


class Cluster:
    """Runs generated scripts with stand-ins for scontrol, srun and torchrun. The verdict is the real one.

    What torchrun's stand-in does is a shell line; it has the node's environment and arguments.
    """

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys
        (folder / "bin").mkdir()
        (folder / "run").mkdir()
        self._command(
            "scontrol",
            f'if [ "$1" = show ]; then printf "alpha\\nbeta\\n"; else echo "$@" >> {folder}/scontrol; fi',
        )
        self._command(
            "srun",
            'while [ "$1" != bash ]; do shift; done; code=0\n'
            'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || code=$?; done; exit $code',
        )
        self._command(
            "python",
            f'if [ "$2" = torch.distributed.run ]; then echo "$@" >> {folder}/agents; . {folder}/ranks\n'
            f'else exec {sys.executable} "$@"; fi',
        )
        self.environment = {
            **os.environ,
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "src"),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "a-list",
            "SLURM_NNODES": "2",
            "SLURM_CPUS_PER_TASK": "8",
        }

    def _command(self, name, text):
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def start(self, script, ranks, **variables):
        (self.folder / "ranks").write_text(ranks)
        (self.folder / "script").write_text(script)
        return subprocess.Popen(
            ["bash", f"{self.folder}/script"],
            cwd=self.folder,
            env={**self.environment, **variables},
            stderr=subprocess.PIPE,
            text=True,
        )

    def slurm(self, ranks, *words, **variables):
        """Exit code of the batch script, whether it asked for another start, and what it said."""
        _, text = submit_script(self.capsys, "--dry-run", "job.nodes=2", f"run.dir={self.folder}/run", *words)
        process = self.start(text, ranks, **variables)
        said = process.communicate(timeout=60)[1]
        asked = self.folder / "scontrol"
        requeued = asked.read_text().split() == ["requeue", "123456"] if asked.exists() else False
        asked.unlink(missing_ok=True)
        return process.returncode, requeued, said


@pytest.fixture
def cluster(tmp_path, capsys):
    return Cluster(tmp_path, capsys)


def status(state, step, marker=None, code=1):
    """A shell line by which the ranks leave this behind, and torchrun's exit code."""
    lines = [f"""echo '{{"state": "{state}", "step": {step}, "exit_code": {code}}}' > $RUN/status.json"""]
    if marker is not None:
        lines.append(f"echo {marker} > $RUN/preempted")
    return "; ".join([*lines, "exit 1"])


def test_slurm_queues_a_preempted_job_again_and_no_other(cluster):
    assert cluster.slurm(status("preempted", 5, marker=5, code=75))[:2] == (75, True)
    # the marker is still there, but the run has not begun: a typo must not go round for ever
    assert cluster.slurm("exit 1")[:2] == (1, False)
    assert cluster.slurm(status("failed", 5, code=3))[:2] == (3, False)
    assert cluster.slurm(status("failed", 5, code=76))[:2] == (76, False)
    assert cluster.slurm(status("preempted", 9, marker=9, code=75))[:2] == (75, True)
    assert cluster.slurm("rm $RUN/preempted; " + status("finished", 20, code=0))[:2] == (0, False)


def test_slurm_gives_up_after_so_many_times(cluster):
    words = ["job.max_requeues=2"]
    assert cluster.slurm(status("preempted", 5, marker=5), *words, SLURM_RESTART_COUNT="1")[:2] == (75, True)
    code, requeued, said = cluster.slurm(status("preempted", 6, marker=6), *words, SLURM_RESTART_COUNT="2")
    assert (code, requeued) == (75, False)
    assert "queued again 2 times already (job.max_requeues)" in said


def test_slurm_starts_an_agent_on_each_node_that_meet_at_the_first(cluster, tmp_path):
    cluster.slurm("exit 0", SLURM_RESTART_COUNT="3")
    first, second = (shlex.split(line) for line in (tmp_path / "agents").read_text().splitlines())
    for node, words in enumerate((first, second)):
        options = dict(itertools.pairwise(words))
        assert options["--rdzv-endpoint"] == "alpha:23456"
        assert options["--rdzv-id"] == "123456.3"
        assert options["--rdzv-conf"].startswith(f"is_host={1 - node},")
        assert options["--log-dir"] == f"{tmp_path}/run/logs/node-{node}"
        assert options["--nnodes"] == "2"


def test_an_elastic_slurm_job_outlives_a_node(capsys):
    _, text = submit_script(capsys, "--dry-run", "job.nodes=2", "job.min_nodes=1")
    assert "#SBATCH --no-kill\n" in checked(text)
    assert '--nnodes "1:$SLURM_NNODES"' in text
    assert "--no-kill --kill-on-bad-exit=0" in text


def test_an_elastic_kubernetes_job_has_ended_with_the_pod_of_the_rendezvous(capsys):
    for words, policy in ((), None), (("job.min_nodes=1",), {"rules": [{"succeededIndexes": "0"}]}):
        _, text = submit_script(capsys, "--dry-run", *K8S, "job.nodes=2", *words)
        _, job = yaml.safe_load_all(text)
        assert job["spec"].get("successPolicy") == policy


@pytest.mark.parametrize(
    "kind", [("job=slurm",), K8S, ("job=torchrun", "job.hosts=[a, b]")], ids=lambda words: words[0]
)
def test_how_long_an_elastic_job_waits_for_more_nodes(capsys, kind):
    for words, seconds in (((), "30"), (("job.last_call_seconds=120",), "120")):
        _, text = submit_script(capsys, "--dry-run", *kind, "job.nodes=2", "job.min_nodes=1", *words)
        assert f",last_call_timeout={seconds} " in text
    _, text = submit_script(capsys, "--dry-run", *kind, "job.nodes=2")
    assert "last_call" not in text


def test_a_pod_hands_the_signal_on_waits_for_the_save_and_says_75(cluster, tmp_path, capsys):
    _, text = submit_script(capsys, "--dry-run", *K8S[:3], "job.mount=/", "job.nodes=2", f"run.dir={tmp_path}/run")
    saves = (
        f"save() {{ sleep 0.5; {status('preempted', 5, marker=5)}; }}; RUN={tmp_path}/run; trap save TERM\n"
        f"touch {tmp_path}/ready; while true; do sleep 0.05; done"
    )
    pod = cluster.start(pod_script(text), saves, JOB_COMPLETION_INDEX="1", POD_IP="10.0.0.7")
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert pod.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pod.terminate()
    said = pod.communicate(timeout=30)[1]
    assert pod.returncode == 75, said
    assert "preempted after a save" in said
    words = shlex.split((tmp_path / "agents").read_text())
    options = dict(itertools.pairwise(words))
    assert options["--local-addr"] == "10.0.0.7"
    assert options["--rdzv-conf"].startswith("is_host=0,")


@pytest.mark.parametrize(("ranks", "code"), [("exit 1", 1), ("exit 0", 0), (status("failed", 3, code=3), 3)])
def test_a_pod_ends_with_the_runs_own_code(cluster, tmp_path, capsys, ranks, code):
    _, text = submit_script(capsys, "--dry-run", *K8S[:3], "job.mount=/", f"run.dir={tmp_path}/run")
    pod = cluster.start(pod_script(text), ranks, JOB_COMPLETION_INDEX="0", POD_IP="10.0.0.7", RUN=f"{tmp_path}/run")
    pod.communicate(timeout=30)
    assert pod.returncode == code


# The settings --------------------------------------------------------------------------------------------------------


def test_every_grace_is_longer_than_what_it_has_to_hold():
    job = JobConfig(save_seconds=100)
    assert job.save_seconds < job.shutdown_seconds < job.notice_seconds


@pytest.mark.parametrize(
    ("time_limit", "seconds"),
    [("90", 5400), ("10:30", 630), ("24:00:00", 86400), ("2-12", 216000), ("1-00:30", 88200), ("1-0:0:10", 0)],
)
def test_slurms_ways_to_write_a_time(time_limit, seconds):
    if not seconds:
        with pytest.raises(ValueError, match="time must be a Slurm time"):
            SlurmJob(time=time_limit)
        return
    assert SlurmJob(time=time_limit).seconds == seconds


@pytest.mark.parametrize(
    ("kind", "values", "sentence"),
    [
        (JobConfig, {"nodes": 0}, "nodes must be at least 1, got 0"),
        (JobConfig, {"min_nodes": 2}, r"min_nodes must be between 1 and nodes \(1\), got 2"),
        (JobConfig, {"gpus_per_node": 2, "processes_per_node": 3}, "processes_per_node must be at most the 2 GPUs"),
        (JobConfig, {"processes_per_node": 0}, "processes_per_node must be at least 1, got 0"),
        (JobConfig, {"max_restarts": -1}, "max_restarts must be at least 0, got -1"),
        (JobConfig, {"save_seconds": 0}, "save_seconds must be at least 1 second, got 0"),
        (JobConfig, {"last_call_seconds": 0}, "last_call_seconds must be at least 1 second, got 0"),
        (JobConfig, {"tee": "yes"}, "tee must be 0 to 3, or RANK:STREAMS"),
        (JobConfig, {"env": {"A B": "c"}}, "env must name variables"),
        (JobConfig, {"python": ""}, "python must name an interpreter"),
        (SlurmJob, {"time": "a day"}, "time must be a Slurm time"),
        (SlurmJob, {"options": ["mem=0"]}, "options must be those of sbatch"),
        (SlurmJob, {"partition": "a\n#SBATCH -A b"}, "partition must be one line"),
        (SlurmJob, {"cpus_per_process": 0}, "cpus_per_process must be at least 1"),
        (KubernetesJob, {"image": "", "claim": "x"}, "image must not be empty"),
        (KubernetesJob, {"image": "x", "claim": "y", "mount": "runs"}, "mount must be a full path"),
        (KubernetesJob, {"image": "x", "claim": "y", "id": "My_Job"}, "id must be at most 52 small letters"),
        (KubernetesJob, {"image": "x", "claim": "y", "max_failures": -1}, "max_failures must be at least 0"),
        (TorchrunJob, {"nodes": 2, "hosts": ["a"]}, "hosts must name the 2 machines"),
    ],
)
def test_settings_are_checked(kind, values, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        kind(**values)
