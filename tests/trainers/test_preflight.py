"""The look at the machines by real ranks: healthy, wrong, slow, silent, with other software, data or folders."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_pretrain import config, write_corpus

from thinrank.trainers.errors import PreflightError
from thinrank.trainers.preflight import check, measure
from thinrank.trainers.preflight.blame import Place
from thinrank.trainers.preflight.config import PreflightConfig
from thinrank.trainers.preflight.facts import Facts
from thinrank.trainers.preflight.judge import judge_facts, judge_links, judge_products, judge_run, judge_sums
from thinrank.trainers.pretrain import pretrain
from thinrank.trainers.strategies import World

QUIET = PreflightConfig(megabytes=0.2, slow_factor=50.0)  # ranks of a test share a processor


def world():
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank=rank, size=size, local_rank=rank, local_size=size)


def looked(folder, config=QUIET, change=None):
    """What `check_machines` says on this rank, after `change` has spoilt something on some rank."""
    kept = {name: getattr(measure, name) for name in ("_pattern", "_swap", "product", "reduction")}
    collect = check.collect
    try:
        if change is not None:
            change()
        return check.check_machines(world(), config, Path(folder), cuda=False)
    except PreflightError as error:
        return str(error)
    finally:
        for name, function in kept.items():
            setattr(measure, name, function)
        check.collect = collect


def host():
    import socket

    return socket.gethostname()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_healthy_ranks_pass_and_nothing_is_left(ranks, tmp_path, size):
    said = ranks(size).run(looked, str(tmp_path))
    assert len(set(said)) == 1
    if size > 1:
        assert said[0].startswith(f"{size} ranks on {host()}; all-reduce of 0.2 MB in ")
        assert "slowest link" in said[0]
    assert list(tmp_path.iterdir()) == []


def sends_wrongly():
    if dist.get_rank() == 2:
        pattern = measure._pattern
        measure._pattern = lambda places, rank: pattern(places, rank) + (places == 7) * (rank == 2)


def test_a_rank_that_sends_one_wrong_value_is_named_on_all_ranks(ranks, tmp_path):
    """Rank 2 also finds its own wrong value right, which must not acquit it."""
    said = ranks(4).run(looked, str(tmp_path), QUIET, sends_wrongly)
    assert said == [said[0]] * 4
    assert said[0].startswith(f"values that pass rank 2 on {host()} arrive wrong: leave that machine out")


def computes_wrongly():
    if dist.get_rank() == 1:
        measure.product = lambda device: (0.001, 1)


def test_a_rank_that_computes_wrongly_is_named(ranks, tmp_path):
    said = ranks(3).run(looked, str(tmp_path), QUIET, computes_wrongly)
    assert set(said) == {said[0]}
    assert said[0].startswith(f"rank 1 on {host()} computes wrong products: ")


def computes_slowly():
    if dist.get_rank() == 0:
        product = measure.product
        measure.product = lambda device: (product(device)[0] * 1000, 0)


def test_a_rank_that_computes_slowly_is_named(ranks, tmp_path):
    said = ranks(2).run(looked, str(tmp_path), QUIET, computes_slowly)
    assert set(said) == {said[0]}
    assert said[0].startswith(f"rank 0 on {host()} takes ")
    assert "raise run.preflight.slow_factor (50)" in said[0]


def sends_slowly():
    if dist.get_rank() == 3:
        swap = measure._swap

        def slow(sent, got, peer):
            time.sleep(0.25)
            swap(sent, got, peer)

        measure._swap = slow


def test_a_rank_that_sends_slowly_is_named(ranks, tmp_path):
    """Its partners wait for it, one after the other; the links among themselves acquit them."""
    config = PreflightConfig(megabytes=0.2, slow_factor=12.0)
    said = ranks(4).run(looked, str(tmp_path), config, sends_slowly)
    assert set(said) == {said[0]}
    assert said[0].startswith(f"rank 3 on {host()} is slow: ")
    assert "less than 1/12 of the faster links" in said[0]


def sums_wrongly():
    if dist.get_rank() == 1:
        reduction = measure.reduction
        measure.reduction = lambda *arguments: (reduction(*arguments)[0], 3)


def test_a_wrong_sum_without_a_wrong_message_names_who_got_it(ranks, tmp_path):
    said = ranks(3).run(looked, str(tmp_path), QUIET, sums_wrongly)
    assert set(said) == {said[0]}
    assert said[0].startswith(f"an all-reduce gives wrong sums on rank 1 on {host()} though single messages arrive")


def test_a_silent_rank_is_named(ranks, tmp_path):
    config = PreflightConfig(megabytes=0.2, timeout=1.5)
    try:
        said = ranks(2).run(silent, str(tmp_path), config)
    finally:
        ranks(2).close()  # its gloo group has seen a timeout
    assert said[0].startswith(
        f"before an all-reduce, not all ranks answered within 1.5 s (rank 1 on {host()}): look at"
    )


def silent(folder, config):
    """Rank 1 does not come to the barrier before the all-reduce."""
    if dist.get_rank() == 1:
        wait = check._Group.wait

        def late(self, what):
            if what == "an all-reduce":
                time.sleep(3)
                raise PreflightError("woke up")
            wait(self, what)

        check._Group.wait = late
        try:
            return looked(folder, config)
        finally:
            check._Group.wait = wait
    return looked(folder, config)


def sees_another_folder(folder):
    return looked(folder if dist.get_rank() != 1 else f"{folder}/elsewhere")


def test_a_rank_with_another_run_folder_is_named(ranks, tmp_path):
    said = ranks(2).run(sees_another_folder, str(tmp_path))
    assert f"rank 1 on {host()} does not find in the run folder" in said[0]
    assert said[0].endswith("set run.dir to a folder that all machines share")


def has_other_torch():
    if dist.get_rank() == 2:
        collect = check.collect
        check.collect = lambda *a, **k: dataclasses.replace(collect(*a, **k), torch="2.99.0")


def test_a_rank_with_another_torch_is_named(ranks, tmp_path):
    said = ranks(3).run(looked, str(tmp_path), QUIET, has_other_torch)
    assert set(said) == {
        f"rank 2 on {host()} has torch 2.99.0, the others have {torch.__version__}: "
        "install the same environment on every machine"
    }


def compared(manifests, needed):
    try:
        check.check_run(world(), QUIET, manifests[dist.get_rank()], needed[dist.get_rank()], cuda=False)
    except PreflightError as error:
        return str(error)
    return ""


def test_data_and_memory_are_compared(ranks):
    assert ranks(3).run(compared, ["a" * 20] * 3, [1000] * 3) == [""] * 3
    said = ranks(3).run(compared, ["a" * 20, "a" * 20, "b" * 20], [1000] * 3)
    where = f"{'b' * 12} on rank 2 on {host()}, {'a' * 12} on rank 0 on {host()}"
    assert set(said) == {
        f"rank 2 on {host()} has other data (manifests {where}): copy the same files to every machine, or put them "
        "where all see them"
    }
    said = ranks(3).run(compared, ["a"] * 3, [1000, 2**60, 1000])
    assert set(said) == {said[0]}
    assert said[0].startswith(f"rank 1 on {host()} has ")
    assert "need 1073741824.00 GiB" in said[0]


def test_a_run_that_fails_it_says_so_in_its_folder_and_may_start_later(tmp_path, monkeypatch):
    """Under torchrun the exit code is lost, so the folder has it, although no training began."""
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus")
    settings = config(tmp_path, "run", run={"preflight": PreflightConfig(enabled=True)}, sample_tokens=0, max_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(check, "free_memory", lambda **_: 0)
        with pytest.raises(PreflightError, match=r"has 0\.00 GiB of memory free, and weights"):
            pretrain(settings)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert status["error"].startswith("PreflightError: rank 0 on ")
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert pretrain(settings)["run"]["state"] == "finished"


# The sentences, without ranks -----------------------------------------------------------------------------------------

PLACES = [Place(rank=rank, host="alpha" if rank < 2 else "beta") for rank in range(4)]
FACTS = Facts(
    host="alpha",
    python="3.12.1",
    torch="2.13.0",
    cuda="",
    thinrank="0.1",
    commit="abc",
    device="H100, 80 GiB",
    devices=8,
    local_size=2,
    sees_folder=True,
)


@pytest.mark.parametrize(
    ("rank", "change", "sentence"),
    [
        (
            3,
            {"commit": "abc with changes"},
            "rank 3 on beta has the code of commit abc with changes, the others have abc:",
        ),
        (
            1,
            {"devices": 7},
            "rank 1 on alpha has a number of GPUs of 7, the others have 8: ask for machines of one kind",
        ),
        (2, {"device": "H100, 40 GiB"}, "rank 2 on beta has a device H100, 40 GiB, the others have H100, 80 GiB:"),
        (0, {"python": "3.11.9"}, "rank 0 on alpha has Python 3.11.9, the others have 3.12.1:"),
        (2, {"sees_folder": False}, "rank 2 on beta does not find in the run folder runs/x what rank 0 on alpha has"),
    ],
)
def test_facts_are_judged(rank, change, sentence):
    facts = [dataclasses.replace(FACTS, **change) if other == rank else FACTS for other in range(4)]
    judge_facts([FACTS] * 4, PLACES, Path("runs/x"))
    with pytest.raises(PreflightError) as caught:
        judge_facts(facts, PLACES, Path("runs/x"))
    assert str(caught.value).startswith(sentence)


def test_two_halves_of_a_job_are_both_named():
    facts = [FACTS, FACTS, *[dataclasses.replace(FACTS, torch="2.12.0")] * 2]
    with pytest.raises(
        PreflightError, match=r"rank 0 on alpha has torch 2\.13\.0 and rank 2 on beta 2\.12\.0: install"
    ):
        judge_facts(facts, PLACES, Path("runs/x"))


def test_several_slow_ranks_are_counted():
    with pytest.raises(PreflightError, match=r"^rank 3 on beta \(and 1 more: 2\) takes 9.0 times as long"):
        judge_products([(1.0, 0), (1.0, 0), (8.0, 0), (9.0, 0), (1.0, 0)], [*PLACES, PLACES[0]], 4.0)


def test_a_floor_is_told_with_its_key():
    config = PreflightConfig(min_bandwidth=10.0)
    seen = [{(0, 2): (9.0, 0)}, {(1, 3): (12.0, 0)}, {(0, 2): (8.0, 0)}, {(1, 3): (12.0, 0)}]
    with pytest.raises(PreflightError) as caught:
        judge_links(seen, PLACES, config)
    assert str(caught.value).startswith(
        "the link between rank 0 on alpha and rank 2 on beta is slow: rank 0 on alpha and rank 2 on beta exchange 8 "
        "GB/s, run.preflight.min_bandwidth asks for 10: "
    )
    assert judge_links(seen, PLACES, PreflightConfig(min_bandwidth=8.0)) == {(0, 2): 8.0, (1, 3): 12.0}


def test_wrong_messages_on_a_link_are_told():
    with pytest.raises(
        PreflightError, match="messages that pass the link between rank 0 on alpha and rank 2 on beta arriv"
    ):
        judge_links([{(0, 2): (9.0, 1)}, {}, {(0, 2): (9.0, 0)}, {}], PLACES, PreflightConfig())


def test_sums_wrong_everywhere_blame_nobody():
    with pytest.raises(PreflightError, match="wrong sums on all ranks though"):
        judge_sums([1, 1, 1, 1], [[0] * 4] * 4, PLACES)


def test_two_kinds_of_data_are_told():
    with pytest.raises(
        PreflightError, match=r"^the ranks have different data \(manifests a on rank 0 on alpha, b on rank 1"
    ):
        judge_run(PLACES[:2], ["a", "b"], [(1, 0), (1, 0)])


def test_the_product_is_checked(monkeypatch):
    seconds, wrong = measure.product(torch.device("cpu"))
    assert seconds > 0
    assert wrong == 0

    class Broken(torch.Tensor):
        def __matmul__(self, other):
            found = torch.Tensor.__matmul__(self, other)
            if found.dim() == 2:
                found[5, 6] += 1
            return found

    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *a, **k: arange(*a, **k).as_subclass(Broken))
    assert measure.product(torch.device("cpu"))[1] == 1


def test_torchs_words_for_a_silent_rank_become_ours():
    """A change of torch's message would show in `test_a_silent_rank_is_named`."""
    assert check.late("[Rank 0]: Ranks 1, 3 failed to pass monitoredBarrier in 2000 ms", PLACES) == (
        "rank 1 on alpha, rank 3 on beta"
    )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"min_bandwidth": -1.0}, "min_bandwidth must be at least 0 GB/s, got -1.0"),
        ({"slow_factor": 1.0}, "slow_factor must be above 1, got 1.0"),
        ({"megabytes": 0.0}, "megabytes must be above 0, got 0.0"),
        ({"timeout": 0.0}, "timeout must be above 0, got 0.0"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(values, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        PreflightConfig(**values)
