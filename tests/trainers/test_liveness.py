"""A rank that is killed, stopped or fails is named by the others, who end in time, and the run goes on."""

import contextlib
import os
import random
import signal
import socket
import time
import traceback
import warnings

import pytest
import torch.distributed as dist
from tiny_pretrain import METHOD, config, signalled_at, write_corpus
from tiny_run import forked, read

from thinrank.trainers import (
    FSDP2Config,
    GossipConfig,
    OwnedConfig,
    RankLost,
    ReplicatedConfig,
    StrategyConfig,
    ZeroConfig,
    heartbeat,
)
from thinrank.trainers.liveness import Attendance
from thinrank.trainers.pretrain import pretrain

SIZE, VICTIM = 3, 1
PLACES = {rank: f"host-{rank} (process {rank})" for rank in range(4)}
SOON = 25.0  # seconds on a busy machine; waiting for a collective would take half an hour


def signs(counts, **more):
    return {rank: {"count": count, "place": PLACES[rank]} for rank, count in counts.items()} | more


def looked(*looks):
    attendance = Attendance([1, 2, 3])
    for look in looks:
        attendance.look(look)
    return attendance


def test_who_counts_is_alive():
    assert looked(*(signs({1: n, 2: n, 3: n}) for n in range(9))).verdict(2) is None


def test_who_stops_counting_is_named_after_so_many_looks():
    attendance = looked(*(signs({1: n, 2: min(n, 3), 3: n}) for n in range(7)))
    assert attendance.verdict(4) is None
    attendance.look(signs({1: 7, 2: 3, 3: 7}))
    sentence = attendance.verdict(4, " for 4 s")
    assert sentence is not None
    assert sentence.startswith("rank 2 on host-2 (process 2) gave no sign of life for 4 s and was killed")


def test_ranks_that_went_together_are_named_together_and_a_late_one_is_not():
    attendance = looked(*(signs({1: min(n, 3), 2: min(n, 4), 3: min(n, 6)}) for n in range(9)))
    sentence = attendance.verdict(4)
    assert sentence is not None
    assert "rank 1 on host-1 (process 1) and rank 2 on host-2 (process 2) gave" in sentence
    assert "rank 3" not in sentence


def test_who_has_finished_or_never_began_is_not_missed():
    done = {2: {"done": True, "place": PLACES[2]}, 3: {}}
    assert looked(*(signs({1: n}) | done for n in range(20))).verdict(4) is None


def test_who_ended_with_an_error_is_named_with_it():
    failed = {2: {"error": "ValueError: no such row.", "lost": False, "place": PLACES[2]}}
    sentence = looked(signs({1: 0, 3: 0}) | failed).verdict(4)
    assert sentence == "rank 2 on host-2 (process 2) has ended with ValueError: no such row: see its output"


def test_a_verdict_of_others_is_taken_over():
    """Who raised because of a lost rank is not to blame itself."""
    said = {1: {"error": "rank 2 was killed", "lost": True, "place": PLACES[1]}}
    failed = {3: {"error": "RuntimeError: gloo", "lost": False, "place": PLACES[3]}}
    assert looked(failed | signs({2: 5}) | said).verdict(4) == "rank 2 was killed"


def test_the_timeout_is_checked():
    with pytest.raises(ValueError, match="timeout must be above 0 seconds, got 0: use None"), heartbeat(0):
        pass
    with pytest.raises(ValueError, match="heartbeat_timeout must be above 0 seconds, got -1: use null"):
        StrategyConfig(heartbeat_timeout=-1)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def started(function, size=SIZE):
    """`function(rank)` in `size` processes that torchrun might have started; their process ids."""
    port = free_port()

    def rank_of(rank):
        def life():
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
            warnings.simplefilter("ignore")  # of Lightning's and torch's about each other
            try:
                function(rank)
            except RankLost as error:
                print(f"error on rank {rank}: {error}", flush=True)
                os._exit(RankLost.EXIT_CODE)
            except BaseException:
                traceback.print_exc()
                raise

        return life

    return [forked(rank_of(rank)) for rank in range(size)]


def ended(children, seconds, waits=()):
    """Exit codes, negative for signals, of those that have ended in time; the rest is killed and None, at once where
    only ranks of `waits` are left."""
    codes, deadline = dict.fromkeys(children), time.monotonic() + seconds
    patient = {children[rank] for rank in waits}
    while any(code is None for child, code in codes.items() if child not in patient) and time.monotonic() < deadline:
        for child in [child for child, code in codes.items() if code is None]:
            found, status = os.waitpid(child, os.WNOHANG)
            codes[child] = os.waitstatus_to_exitcode(status) if found else None
        time.sleep(0.02)
    for child in [child for child, code in codes.items() if code is None]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return list(codes.values())


def meeting(rank):
    dist.init_process_group("gloo")
    dist.barrier()


def stopped(rank):
    """One rank is silent, its connections open: who waits for it does not come back by itself."""
    meeting(rank)
    with heartbeat(2):
        if rank == VICTIM:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()


def failing(rank):
    meeting(rank)
    with heartbeat(30):
        if rank == VICTIM:
            raise ValueError("no such row")
        dist.barrier()


def test_a_silent_rank_ends_those_who_wait_for_it(capfd, monkeypatch):
    monkeypatch.setattr("thinrank.trainers.liveness.GRACE", 0.5)
    assert ended(started(stopped), SOON, waits=[VICTIM]) == [RankLost.EXIT_CODE, None, RankLost.EXIT_CODE]
    said = capfd.readouterr().err
    for rank in (0, 2):
        assert f"error on rank {rank}: rank 1 on {socket.gethostname()}" in said
    assert said.count("gave no sign of life for 2 s") == 2


def test_a_rank_that_fails_is_named_with_its_error(capfd):
    assert ended(started(failing), SOON) == [RankLost.EXIT_CODE, 1, RankLost.EXIT_CODE]
    said = capfd.readouterr().out
    assert said.count("has ended with ValueError: no such row: see its output") == 2


STRATEGIES = {
    "ddp": StrategyConfig(),
    "thinrank_ddp": ReplicatedConfig(),
    "thinrank_owned": OwnedConfig(),
    "thinrank_fsdp2": FSDP2Config(),
    "thinrank_zero2": ZeroConfig(),
    "thinrank_gossip": GossipConfig(),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_killed_rank_is_named_and_the_run_goes_on(tmp_path, capfd, monkeypatch, name):
    """Whatever the strategy and whichever step: the others end, nothing is lost but the steps since the last save."""
    monkeypatch.setattr("thinrank.trainers.liveness.INTERVAL", 0.5)
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus")
    step, victim = random.Random(name).randrange(4, 8), random.Random(name).randrange(1, SIZE)
    settings = {"max_steps": 8, "batch_size": 6, "checkpoint_every": 3, "validate_every": 0, "optimizer": METHOD}

    def train(kill):
        def life(rank):
            if kill:
                signalled_at(step, victim, signal.SIGKILL, batch=6)
            pretrain(config(tmp_path, "run", strategy=STRATEGIES[name], **settings))

        return life

    codes = ended(started(train(kill=True)), 60)
    wanted = [RankLost.EXIT_CODE] * SIZE
    wanted[victim] = -signal.SIGKILL
    assert codes == wanted
    said = capfd.readouterr()
    assert (said.out + said.err).count(f": rank {victim} on {socket.gethostname()}") == SIZE - 1
    status = read(tmp_path / "run" / "status.json")
    assert status["state"] == "failed"
    assert status["exit_code"] == RankLost.EXIT_CODE
    assert f"rank {victim} on" in status["error"]
    assert status["step"] == 3 * ((step - 1) // 3) or status["step"] == 3 * (step // 3)
    assert ended(started(train(kill=False)), 60) == [0] * SIZE
    assert read(tmp_path / "run" / "report.json")["run"]["resumed_from"] == status["step"]
