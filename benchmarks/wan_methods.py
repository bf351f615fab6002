"""What `wan.py` measures: how several ranks train one model, and what each gives to the network.

A method is a name in `METHODS` and a function of a plain model, a process group and a learning rate that gives a
`Training`. The model has the same weights on every rank, and nothing else has been done to it: the baselines here wrap
it with torch's DistributedDataParallel, and a method that communicates in its optimizer's step, or after it, takes it
as it is. `ROUTES` says how what a method sends travels, for the cost model.
"""

# No deferred annotations here: DDP reads those of a hook as objects.
import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from gossip_clocks import timed
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from thinrank.optim import GaLoreConfig, build, replicate
from thinrank.optim.gossip import cost
from thinrank.optim.gossip.exchange import Gossip
from thinrank.optim.gossip.schemes import SCHEMES

Batch = Mapping[str, Any]
"""`input_ids` and `labels`, int64 (rows, length), labels already shifted."""
Step = Callable[[Batch], Tensor]


@dataclass(frozen=True, kw_only=True)
class Training:
    """A model in training on this rank.

    Attributes:
        step: one optimizer step on this rank's batch, in which the ranks meet; gives the batch's loss before it.
        payload: bytes of all tensors that this rank has had summed over the ranks so far, as they travel; a ring
            all-reduce sends 2(n−1)/n times as many. None if the method cannot tell.
        together: whether all ranks have the same weights after a step, or after `settle`.
        egress: bytes that have left this rank so far, where it counts these instead.
        own: seconds that this rank has spent on its side of exchanges so far, without waiting.
        finish: waits for what is under way.
        settle: ends the training, with the same weights on all ranks.
    """

    step: Step
    payload: Callable[[], int] | None = None
    together: bool = True
    egress: Callable[[], float] | None = None
    own: Callable[[], float] = lambda: 0.0
    finish: Callable[[], None] = lambda: None
    settle: Callable[[], None] = lambda: None


Method = Callable[[nn.Module, dist.ProcessGroup, float], Training]
Hook = Callable[[DistributedDataParallel, dist.ProcessGroup], Callable[[], int] | None]

# torch 2.13 renamed the argument, and warns of the old name.
_NEW, _OLD = "forward_sync_buffers", "broadcast_buffers"
_BUFFERS: dict[str, Any] = {
    _NEW if _NEW in inspect.signature(DistributedDataParallel).parameters else _OLD: False,
}


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """One optimizer step on a batch: backward of `model`, which may be wrapped, then the step of its optimizer."""

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def ddp(register: Hook | None, width: int = 4, together: bool = True, one_bucket: bool = False) -> Method:
    """AdamW under DistributedDataParallel.

    Args:
        register: puts a communication hook on the wrapped model, and may say how to count its payload; None for torch's
            own all-reduce.
        width: bytes of a gradient's number as it travels, where nothing else counts.
        together: as in `Training`.
        one_bucket: the hook sums more than once for a bucket. Gloo calls a hook's continuations from its own threads,
            so with several buckets the ranks would sum in different orders: they hang, or mix up their tensors.
    """

    def make(model: nn.Module, group: dist.ProcessGroup, lr: float) -> Training:
        numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        # The weights are equal already, and a Llama's buffers are constants: sending them with every forward would
        # add a round trip for nothing.
        wrapped = DistributedDataParallel(
            model,
            process_group=group,
            init_sync=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=4 * numbers // 2**20 + 1 if one_bucket else None,
            **_BUFFERS,
        )
        counted = None if register is None else register(wrapped, group)
        step = step_of(wrapped, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True))
        steps = 0

        def count(batch: Batch) -> Tensor:
            nonlocal steps
            steps += 1
            return step(batch)

        return Training(step=count, payload=counted or (lambda: steps * numbers * width), together=together)

    return make


def bf16(wrapped: DistributedDataParallel, group: dist.ProcessGroup) -> None:
    def hook(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        return default_hooks.bf16_compress_hook(group, bucket)

    # By its own name DDP refuses it without NCCL; gloo sums bfloat16 as well.
    wrapped.register_comm_hook(group, hook)


def noop(wrapped: DistributedDataParallel, group: dist.ProcessGroup) -> None:
    wrapped.register_comm_hook(None, debugging_hooks.noop_hook)


def powersgd(rank: int) -> Hook:
    """PowerSGD (Vogels et al. 2019, arXiv:1905.13727) as torch has it, from the third step on, the first it can."""

    def register(wrapped: DistributedDataParallel, group: dist.ProcessGroup) -> Callable[[], int]:
        state = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=rank, start_powerSGD_iter=2)
        whole = 0

        def hook(state: powerSGD_hook.PowerSGDState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            nonlocal whole
            if state.iter < state.start_powerSGD_iter:  # sent as it is, which the state does not count
                whole += bucket.buffer().numel()
            return powerSGD_hook.powerSGD_hook(state, bucket)

        wrapped.register_comm_hook(state, hook)
        return lambda: 4 * (whole + state.total_numel_after_compression)

    return register


def thinrank(rank: float, targets: list[str], dtype: torch.dtype | None, norms: bool = False) -> Method:
    """GaLore by subspace iteration on replicas that exchange coordinates; the model is not wrapped.

    A renewal every 200 steps is not among those that are timed. Nobody clips, here or under DDP, so that no norms
    travel.

    Args:
        rank: share of a matrix's short side.
        targets: what is projected; everything else is AdamW's, and its gradients travel.
        dtype: of the messages.
        norms: travel beside coordinates, as who clips by them needs it.
    """

    def make(model: nn.Module, group: dist.ProcessGroup, lr: float) -> Training:
        config = GaLoreConfig(rank=rank, svd="power", lr=4 * lr, embedding_lr=lr, weight_decay=0.0, targets=targets)
        optimizer = build(model, config)
        replicate(model, optimizer, group, dtype=dtype, norms=norms)
        wire = optimizer.wire
        assert wire is not None
        return Training(step=step_of(model, optimizer), payload=wire.total)

    return make


INTERVAL = 5  # steps between two exchanges of DiLoCo here, few so that a short measurement has some


def gossip(scheme: str, compressor: str | None = None, interval: int = 1, **options: Any) -> Method:
    """AdamW on each rank by itself, which exchanges weights with the others on a ring, behind the next step where the
    scheme allows it."""

    def make(model: nn.Module, group: dist.ProcessGroup, lr: float) -> Training:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
        exchange = Gossip(
            model, optimizer, scheme=scheme, compressor=compressor, interval=interval, group=group, **options
        )
        alone, own = step_of(model, optimizer), exchange.scheme.step
        spent: list[float] = []
        exchange.scheme.step = lambda weights, update: timed(own(weights, update), spent, time.perf_counter)

        def step(batch: Batch) -> Tensor:
            value = alone(batch)
            exchange.step()
            return value

        return Training(
            step=step,
            egress=lambda: exchange.wire.egress,
            own=lambda: sum(spent),
            finish=exchange.finish,
            settle=exchange.settle,
        )

    return make


@dataclass(frozen=True, kw_only=True)
class Route:
    """How what a method sends travels.

    Attributes:
        among: `ring`, around which all ranks reduce it; `neighbours`, each of two; or `pieces`, one from each rank to
            each other, there and back.
        collectives: one after the other.
        behind: the share of a step's computation behind which it does.
        interval: steps between two exchanges.
    """

    among: str
    collectives: int = 1
    behind: float = 0.0
    interval: int = 1

    def seconds(self, ranks: int, sent: float, network: cost.Network, *, compute: float, own: float = 0.0) -> float:
        """Of a step, by the cost model.

        Args:
            sent: bytes that leave a rank in a step.
            compute: seconds of a step without any exchange.
            own: seconds in a step of a rank's side of the exchange.
        """
        hops = cost.ring_messages(ranks) * self.collectives if self.among == "ring" else 2
        latency = network.latency * (1 if self.among == "neighbours" else hops)
        exchange = latency + self.interval * sent / network.bandwidth
        more = cost.step_seconds(compute, exchange, self.behind) - compute
        return compute + own + more / self.interval


BACKWARD = 2 / 3  # the share of a step's computation that is behind a gradient's first bucket
GRADIENTS, BEHIND = Route(among="ring", behind=BACKWARD), Route(among="neighbours", behind=1.0)
GOSSIP: dict[str, tuple[str, Method, Route, str]] = {
    "allreduce-8": (
        "allreduce",
        gossip("allreduce", "uniform8"),
        Route(among="pieces"),
        "all-reduce of AdamW's updates in 8 bits, pieces compressed twice",
    ),
    "dpsgd": ("dpsgd", gossip("dpsgd"), BEHIND, "D-PSGD on a ring, weights in float32"),
    "dcd-8": ("dcd", gossip("dcd", "uniform8"), BEHIND, "DCD-PSGD on a ring, 8 bits"),
    "ecd-8": ("ecd", gossip("ecd", "uniform8"), BEHIND, "ECD-PSGD on a ring, 8 bits"),
    "choco-4": ("choco", gossip("choco", "uniform4"), Route(among="neighbours"), "CHOCO-SGD on a ring, 4 bits"),
    "choco-4-with": (
        "choco",
        gossip("choco", "uniform4", order="with"),
        BEHIND,
        "the same, stepping by the copies it has",
    ),
    "powergossip-4": ("powergossip", gossip("powergossip", rank=4), BEHIND, "PowerGossip of rank 4 on a ring"),
    "diloco": (
        "diloco",
        gossip("diloco", interval=INTERVAL),
        Route(among="ring", interval=INTERVAL),
        f"DiLoCo, {INTERVAL} steps of AdamW between two means of the weights",
    ),
}
"""By name: the scheme, whose lack leaves the method out; the method; its route; and what it is."""
GOSSIP = {name: row for name, row in GOSSIP.items() if row[0] in SCHEMES}

LINEAR, EVERYTHING = ["all-linear"], ["all-linear", r".*embed_tokens.*", r"lm_head.*"]

NOOP = "noop"
METHODS: dict[str, Method] = {
    NOOP: ddp(noop, width=0, together=False),
    "ddp": ddp(None),
    "ddp-bf16": ddp(bf16, width=2),
    "powersgd-1": ddp(powersgd(1), one_bucket=True),
    "powersgd-2": ddp(powersgd(2), one_bucket=True),
    "powersgd-4": ddp(powersgd(4), one_bucket=True),
    "thinrank": thinrank(0.25, LINEAR, None),
    "thinrank-bf16": thinrank(0.25, LINEAR, torch.bfloat16),
    "thinrank-all-bf16": thinrank(0.25, EVERYTHING, torch.bfloat16),
    "thinrank-all-8-bf16": thinrank(0.125, EVERYTHING, torch.bfloat16),
    "thinrank-all-16-bf16": thinrank(0.0625, EVERYTHING, torch.bfloat16),
    "thinrank-all-16-bf16-norms": thinrank(0.0625, EVERYTHING, torch.bfloat16, norms=True),
    **{name: method for name, (_, method, _, _) in GOSSIP.items()},
}
ROUTES: dict[str, Route] = {
    **{name: GRADIENTS for name in METHODS if name.startswith(("ddp", "thinrank"))},
    **{name: Route(among="ring", collectives=3) for name in METHODS if name.startswith("powersgd")},
    **{name: route for name, (_, _, route, _) in GOSSIP.items()},
}
ABOUT = {
    NOOP: "no exchange: what a step takes at least (its ranks drift apart)",
    "ddp": "DDP, float32",
    "ddp-bf16": "DDP, torch's bf16 hook",
    "powersgd-1": "torch's PowerSGD hook, rank 1, in one bucket",
    "powersgd-2": "torch's PowerSGD hook, rank 2, in one bucket",
    "powersgd-4": "torch's PowerSGD hook, rank 4, in one bucket",
    "thinrank": "thinrank_ddp, GaLore of rank 1/4, float32; embeddings and head travel as gradients",
    "thinrank-bf16": "thinrank_ddp, GaLore of rank 1/4, bfloat16; embeddings and head travel as gradients",
    "thinrank-all-bf16": "thinrank_ddp, GaLore of rank 1/4, bfloat16; embeddings and head projected, too",
    "thinrank-all-8-bf16": "as thinrank-all-bf16, rank 1/8",
    "thinrank-all-16-bf16": "as thinrank-all-bf16, rank 1/16",
    "thinrank-all-16-bf16-norms": "the same, with the norms of gradients, for who clips",
    **{name: about for name, (_, _, _, about) in GOSSIP.items()},
}
