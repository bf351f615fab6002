"""What only a GPU can show. The same rows run on the CPU in `tests/optim`; here the device is another."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from thinrank.optim import METHODS, AdamWConfig, FiraConfig, MethodConfig, SubspaceAdamWConfig, build, own, replicate
from thinrank.trainers.loss.linear import linear_cross_entropy

pytestmark = pytest.mark.gpu
ALL = [pytest.param(config(), id=name) for name, config in METHODS.items()]


def network(device: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 160), nn.Tanh(), nn.Linear(160, 64), nn.Tanh(), nn.Linear(64, 64))
    return model.to(device)


def batches(steps: int, device: str) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(32, 96, generator=generator).to(device)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, device: str) -> None:
    for x in batches(steps, device):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("config", ALL)
def test_state_lives_beside_the_weights(config: MethodConfig):
    optimizer = build(network("cuda"), config)
    for state in optimizer.state.values():
        assert all(value.is_cuda for key, value in state.items() if key != "step")
        assert not state["step"].is_cuda  # read by the host in every step


@pytest.mark.parametrize("config", ALL)
def test_agrees_with_the_cpu(config: MethodConfig):
    """Ten steps; the basis may differ in rounding, so the weights agree to 1e-3 of how far they moved."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    start = [p.detach().clone() for p in network("cpu").parameters()]
    results = []
    for device in ("cpu", "cuda"):
        model = network(device)
        train(model, build(model, config), 10, device)
        results.append([p.detach().cpu() for p in model.parameters()])
    for origin, cpu, cuda in zip(start, *results, strict=True):
        assert (cpu - cuda).norm() <= 1e-3 * (cpu - origin).norm() + 1e-6


@pytest.mark.parametrize("config", ALL)
def test_multipliers_agree_with_the_cpu_and_wait_for_nothing(config: MethodConfig):
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    start = [p.detach().clone() for p in network("cpu").parameters()]
    results = []
    for device in ("cpu", "cuda"):
        model = network(device)
        optimizer = build(model, config)
        optimizer.set_multipliers({"0.weight": (2.0, 3.0), "2.weight": (0.3, 1.0), "4.weight": (1.4, 0.5)})
        train(model, optimizer, 2, device)
        optimizer.zero_grad()
        model(next(batches(1, device))).square().mean().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([p.detach().cpu() for p in model.parameters()])
    for origin, cpu, cuda in zip(start, *results, strict=True):
        assert (cpu - cuda).norm() <= 1e-3 * (cpu - origin).norm() + 1e-6


@pytest.mark.parametrize("config", ALL)
def test_a_step_between_renewals_never_waits_for_the_device(config: MethodConfig):
    model = network("cuda")
    optimizer = build(model, config)
    train(model, optimizer, 2, "cuda")
    model(torch.randn(32, 96, device="cuda")).square().mean().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("config", ALL)
def test_resumes_on_the_gpu(config: MethodConfig):
    straight = network("cuda")
    optimizer = build(straight, config)
    train(straight, optimizer, 4, "cuda")
    resumed = network("cuda")
    resumed.load_state_dict(straight.state_dict())
    other = build(resumed, config)
    other.load_state_dict(optimizer.state_dict())
    train(straight, optimizer, 3, "cuda")
    train(resumed, other, 3, "cuda")
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_low_rank_state_saves_the_memory_it_promises():
    """Allocated bytes of the state beside the formula, on a matrix large enough for the allocator not to matter."""
    sizes = {}
    for name, config in (("dense", AdamWConfig()), ("low", SubspaceAdamWConfig(rank=0.25))):
        model = nn.Linear(2048, 4096, bias=False, device="cuda")
        before = torch.cuda.memory_allocated()
        optimizer = build(model, config)
        sizes[name] = torch.cuda.memory_allocated() - before
        assert sizes[name] == pytest.approx(optimizer.state_bytes(), rel=0.02)
    assert sizes["low"] < 0.35 * sizes["dense"]


def replicas(model):
    return model, lambda optimizer: replicate(model, optimizer, check_every=5)


def owners(model):
    return model, lambda optimizer: own(model, optimizer, check_every=5, even_from=64)


def rows(model):
    return fully_shard(model, mesh=init_device_mesh("cuda", (1,))), lambda optimizer: None


@pytest.mark.parametrize("how", [replicas, owners, rows])
@pytest.mark.parametrize("config", ALL)
def test_one_rank_among_none_is_one_process(config: MethodConfig, how, tmp_path: Path):
    """Messages by NCCL, which this process sends to itself alone: they must change nothing but rounding."""
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        alone, other = network("cuda"), network("cuda")
        start = [p.detach().clone() for p in alone.parameters()]
        train(alone, build(alone, config), 10, "cuda")
        model, join = how(other)
        optimizer = build(model, config)
        join(optimizer)
        train(model, optimizer, 10, "cuda")
        found = [p.full_tensor() if how is rows else p for p in model.parameters()]
        for one, two, before in zip(alone.parameters(), found, start, strict=True):
            assert float((one - two).detach().norm()) <= 1e-3 * float((one - before).detach().norm())
        assert optimizer.full_state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    finally:
        dist.destroy_process_group()


@pytest.mark.timeout(600)
@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="the extra `deepspeed` is not installed")
def test_one_rank_under_zero_is_one_process(tmp_path: Path):
    """In a process of its own: DeepSpeed takes one accelerator for the life of a process, and in this one the CPU."""
    program, out = Path(__file__).parent / "zero_on_one_rank.py", tmp_path / "apart.json"
    done = subprocess.run(
        [sys.executable, str(program), "cuda", str(out)],
        env={**os.environ, "DS_ACCELERATOR": "cuda"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    found = json.loads(out.read_text())
    assert len(found) == 3 * len(METHODS)
    assert {name: apart for name, apart in found.items() if not apart <= 1e-3} == {}


@pytest.mark.parametrize("messages", ["signs", "majority"])
def test_signs_by_nccl_are_those_by_gloo(messages: str, tmp_path: Path):
    """Of one rank; rounding may turn the sign of an entry that is nearly zero."""
    found = {}
    for device, backend in (("cpu", "gloo"), ("cuda", "nccl")):
        store = dist.FileStore(str(tmp_path / backend), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            model = network(device)
            start = [p.detach().clone() for p in model.parameters()]
            optimizer = build(model, FiraConfig(rank=0.25, svd="power", update_proj_gap=5))
            replicate(model, optimizer, messages=messages, check_every=5)
            train(model, optimizer, 10, device)
            found[device] = [(a - b).detach().cpu() for a, b in zip(model.parameters(), start, strict=True)]
            assert optimizer.wire is not None
            assert optimizer.wire.payload["signs"] > 0
        finally:
            dist.destroy_process_group()
    for one, two in zip(found["cpu"], found["cuda"], strict=True):
        assert float((one - two).norm()) <= 0.05 * float(one.norm())


@pytest.mark.parametrize("backend", ["chunked", "auto"])
def test_a_loss_without_logits_is_that_of_logits(backend: str):
    """bfloat16 products, summed up in float32, beside exact ones of the same numbers."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 64, generator=draw).bfloat16().cuda().requires_grad_()
    weight = torch.randn(1000, 64, generator=draw).bfloat16().cuda().requires_grad_()
    labels = torch.randint(1000, (256,), generator=draw).cuda()
    loss, _ = linear_cross_entropy(hidden, weight, labels, backend=backend)
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    expected = nn.functional.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum")
    assert torch.allclose(loss.double(), expected, rtol=1e-4)
    grads = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, exact)
    for mine, theirs in zip(*grads, strict=True):
        assert (mine.double() - theirs).norm() < 8 * torch.finfo(torch.bfloat16).eps * theirs.norm()
