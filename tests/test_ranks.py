"""The pool of ranks itself: it must give right values, tell what went wrong where, and leave nothing behind."""

import os
import signal
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import Pool, RankError, RankTimeout


def summed(offset):
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return dist.get_rank(), dist.get_world_size(), value.item(), torch.get_num_threads()


def process_id():
    return os.getpid()


def rank_one_raises():
    if dist.get_rank() == 1:
        raise ValueError("the second rank does not like this")
    dist.barrier()


def all_raise():
    raise KeyError(f"from {dist.get_rank()}")


def rank_one_hangs():
    if dist.get_rank() == 1:
        while True:
            time.sleep(0.01)
    dist.barrier()


def rank_one_dies():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def warns():
    warnings.warn("careless", stacklevel=1)


def trains():
    torch.manual_seed(0)
    weight = torch.zeros(3, requires_grad=True)
    ((weight - dist.get_rank()) ** 2).sum().backward()
    assert weight.grad is not None
    dist.all_reduce(weight.grad, op=dist.ReduceOp.SUM)
    return weight.grad.tolist()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:  # a process that nobody has waited for yet is dead all the same
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_reduce_sums_over_the_ranks(ranks, size):
    total = sum(range(size)) + 10.0 * size
    assert ranks(size).run(summed, 10) == [(rank, size, total, 1) for rank in range(size)]


def test_ranks_are_kept_between_jobs_and_are_not_this_process(ranks):
    first = ranks(2).run(process_id)
    assert first == ranks(2).run(process_id)
    assert len({*first, os.getpid()}) == 3


def test_backward_works_in_the_ranks_after_it_ran_here(ranks):
    torch.ones(3, requires_grad=True).sum().backward()
    assert ranks(2).run(trains) == [[-2.0] * 3] * 2


def test_exception_on_one_rank_is_shown_and_the_next_job_runs(ranks):
    with pytest.raises(RankError, match=r"(?s)rank 1: Traceback.*ValueError: the second rank") as caught:
        ranks(2).run(rank_one_raises)
    assert "rank_one_raises" in str(caught.value)
    assert [answer[2] for answer in ranks(2).run(summed, 0)] == [1.0, 1.0]


def test_exceptions_on_all_ranks_are_all_shown(ranks):
    with pytest.raises(RankError, match=r"(?s)KeyError: 'from 0'.*KeyError: 'from 1'"):
        ranks(2).run(all_raise)


def test_a_warning_in_a_rank_is_an_error(ranks):
    with pytest.raises(RankError, match="UserWarning: careless"):
        ranks(2).run(warns)


def test_timeout_shows_every_stack_and_the_next_job_runs(ranks):
    ranks(2).run(summed, 0)  # so that the time below is not spent on importing this file and on meeting
    started = time.monotonic()
    with pytest.raises(RankTimeout, match=r"ranks \[0, 1\] had not answered after 1.5 s") as caught:
        ranks(2).run(rank_one_hangs, timeout=1.5)
    assert time.monotonic() - started < 15
    rank_zero, rank_one = str(caught.value).split("rank 1 was at:")
    assert "barrier" in rank_zero
    assert "in rank_one_hangs" in rank_one
    assert [answer[2] for answer in ranks(2).run(summed, 0)] == [1.0, 1.0]


def test_death_of_a_rank_is_told_and_the_next_job_runs(ranks):
    with pytest.raises(RankError, match="rank 1: ended by itself with exit code -9"):
        ranks(2).run(rank_one_dies)
    assert [answer[2] for answer in ranks(2).run(summed, 0)] == [1.0, 1.0]


def test_a_function_without_a_name_is_refused(ranks):
    with pytest.raises(TypeError, match="at the top of a file"):
        ranks(2).run(lambda: None)


def test_close_ends_the_pools_processes_and_leaves_no_folder():
    pool = Pool(2)
    pids = pool.run(process_id)
    folder = pool._folder
    assert folder is not None
    assert folder.exists()
    pool.close()
    assert not any(alive(pid) for pid in pids)
    assert not folder.exists()
