"""Where DeepSpeed's ZeRO keeps weights and gradients: everything that is known of its insides is in this file.

ZeRO-1 and ZeRO-2 lay the parameters of a group one after the other into a flat buffer and cut it into equal partitions,
one for each rank, wherever that is in a matrix. ZeRO-3 cuts every parameter by itself into equal partitions, the last
of them padded. Either hands an optimizer one flat float32 tensor for each group (or sub-group) and calls its `step`
once for each; the gradient in it is averaged over ranks and micro-batches, divided by the loss scale and clipped.

Only the layout is read, from the objects that an engine has made; DeepSpeed itself is not imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thinrank.optim.exchange.replicas import Group
from thinrank.optim.exchange.shards import Carrier, Parcel
from thinrank.optim.exchange.wire import Wire
from thinrank.versions import requirement, untested

_NEEDS = {
    "1 or 2": (
        "round_robin_bit16_groups", "single_partition_of_fp32_groups", "partition_size",
        "averaged_gradients", "params_in_partition", "parallel_partitioned_bit16_groups",
    ),
    "3": (
        "fp16_groups", "fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat", "averaged_gradients",
        "grad_partitions_flat_buffer",
    ),
}  # fmt: skip
_NEEDS_BOTH = ("dp_process_group", "loss_scale", "get_grad_norm_direct")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where this rank's piece of a parameter lies.

    Attributes:
        flat: number of the flat tensor that DeepSpeed steps.
        start: of the piece in it.
        spans: every rank's piece, as ranges of the flattened parameter.
    """

    flat: int
    start: int
    spans: tuple[tuple[int, int], ...]


class ZeroShards:
    """The pieces of an optimizer's parameters under ZeRO-1, ZeRO-2 or ZeRO-3.

    Args:
        engine: what `deepspeed.initialize` returned, for a model with these parameters.
        params: name and parameter of all that the optimizer steps, in an order that is the same on all ranks.

    Attributes:
        group: the ranks that the pieces lie on.
        replicas: None, since no two ranks hold the same piece.
        stage: "1 or 2", or "3".
        wire: what this rank has sent for the pieces, but for what DeepSpeed sends by itself.

    Raises:
        ValueError: for a DeepSpeed, or settings of it, that this cannot read or that would train something else.
    """

    replicas: Group | None = None

    def __init__(self, engine: Any, params: Iterable[tuple[str, Tensor]]) -> None:
        self._engine, self._zero, self.wire = engine, engine.optimizer, Wire()
        self._names = {param: name for name, param in params}
        self.stage = _stage(self._zero)
        _refuse_settings(self._zero)
        self.group: Group | None = self._zero.dp_process_group
        self._ranks, self._rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self._flats: list[Tensor] = (
            self._zero.fp32_partitioned_groups_flat if self.stage == "3" else self._zero.single_partition_of_fp32_groups
        )
        self._members: list[list[Tensor]] = (
            self._zero.fp16_groups if self.stage == "3" else self._zero.round_robin_bit16_groups
        )
        self._places = self._read_partitions() if self.stage == "3" else self._read_buffers()
        for param, name in self._names.items():
            if not torch.Size(self.shape(param)).numel():
                self._places[param] = _Place(0, 0, ((0, 0),) * self._ranks)  # ZeRO leaves them out
            elif param not in self._places:
                raise ValueError(
                    f"DeepSpeed does not train {name}, which the optimizer was given: leave frozen parameters out of "
                    "the optimizer, and give deepspeed.initialize all that it has"
                )
        self._begun_at = self._agreed_at = -1
        self._had: set[Tensor] = set()
        self._hooks = [param.register_post_accumulate_grad_hook(self._note) for param in self._names]

    # --- layout -------------------------------------------------------------------------------------------------------

    def __contains__(self, param: Tensor) -> bool:
        return param in self._places

    def shape(self, param: Tensor) -> tuple[int, ...]:
        """Of the whole weight."""
        return tuple(getattr(param, "ds_shape", param.shape))

    def spans(self, param: Tensor) -> Sequence[tuple[int, int]]:
        """Each rank's piece as a range (start, stop) of the entries, row by row; (0, 0) is nothing."""
        return self._places[param].spans

    def weight(self, param: Tensor) -> Tensor:
        """This rank's piece of the float32 master: a view, for writing in place."""
        place = self._places[param]
        return self._cut(self._flats[place.flat].detach(), place)

    def gradient(self, param: Tensor) -> Tensor | None:
        """This rank's piece of the gradient by which DeepSpeed steps; None where nobody had one in this step, and for
        what DeepSpeed is not stepping just now.

        The first call in a step is collective: one message says which parameters had a gradient; the others have
        zeros in ZeRO's slices.

        Raises:
            RuntimeError: outside of DeepSpeed's step, when it holds no gradients.
        """
        place = self._places[param]
        grad = self._flats[place.flat].grad
        if grad is None:
            if any(flat.grad is not None for flat in self._flats):
                return None
            raise RuntimeError(
                "DeepSpeed has gradients in its own step alone: clip by gradient_clipping in its configuration, and "
                "ask ZeroFront.gradient_norm for the norm"
            )
        self._agree()
        return self._cut(grad, place) if param in self._had else None

    def _cut(self, flat: Tensor, place: _Place) -> Tensor:
        start, stop = place.spans[self._rank]
        return flat.narrow(0, place.start, stop - start)

    def _read_buffers(self) -> dict[Tensor, _Place]:
        """ZeRO-1 and ZeRO-2: a group is one buffer, cut at multiples of its partition size."""
        places: dict[Tensor, _Place] = {}
        zero = self._zero
        # offsets are there since parameters may be padded (later than 0.19.0); before, they follow each other
        known = getattr(zero, "round_robin_bit16_offsets", None)
        for flat, members in enumerate(self._members):
            sizes = [param.numel() for param in members]
            offsets = known[flat] if known is not None else [sum(sizes[:i]) for i in range(len(sizes))]
            size = int(zero.partition_size[flat])
            self._expect(flat, size)
            for param, offset in zip(members, offsets, strict=True):
                stop = offset + param.numel()
                cuts = ((max(offset, r * size), min(stop, (r + 1) * size)) for r in range(self._ranks))
                spans = tuple((low - offset, high - offset) if low < high else (0, 0) for low, high in cuts)
                places[param] = _Place(flat, min(max(0, offset - self._rank * size), size), spans)
        return places

    def _read_partitions(self) -> dict[Tensor, _Place]:
        """ZeRO-3: a parameter is cut at multiples of its own partition size; a sub-group's pieces follow each other."""
        places: dict[Tensor, _Place] = {}
        for flat, members in enumerate(self._members):
            start = 0
            for member in members:
                param: Any = member
                size, whole = int(param.partition_numel()), int(param.ds_numel)
                cuts = ((min(r * size, whole), min((r + 1) * size, whole)) for r in range(self._ranks))
                places[param] = _Place(flat, start, tuple(cut if cut[0] < cut[1] else (0, 0) for cut in cuts))
                start += size
            self._expect(flat, start)
        return places

    def _expect(self, flat: int, size: int) -> None:
        if self._flats[flat].numel() != size:
            raise ValueError(
                f"DeepSpeed {_version(self._zero)} keeps {self._flats[flat].numel()} entries where its layout says "
                f"{size}: pip install '{requirement('DeepSpeed')}'"
            )

    # --- DeepSpeed's steps --------------------------------------------------------------------------------------------

    def behind(self, flat: Tensor) -> list[Tensor]:
        """The parameters of a flat tensor that DeepSpeed has given to `step`."""
        index = next((i for i, own in enumerate(self._flats) if own is flat), None)
        if index is None:
            raise RuntimeError("DeepSpeed steps a tensor that it had not when the optimizer was bound: bind it again")
        return self._members[index]

    def is_last(self, flat: Tensor) -> bool:
        """Whether DeepSpeed's step ends with this flat tensor."""
        return self._flats[-1] is flat

    def finish(self) -> None:
        """To be called when DeepSpeed has stepped all: forgets gradients that ZeRO-3 would take for the next step's.

        It writes a gradient over the one before and so keeps that of a parameter which has none in the next step; it
        would count in the norm, by which all others are clipped.
        """
        if self.stage == "3":
            self._zero.grad_partitions_flat_buffer.zero_()

    def discard(self) -> None:
        """Makes zeros of the gradients that DeepSpeed is about to step by."""
        self.finish()
        for grads in self._zero.averaged_gradients.values() if self.stage != "3" else ():
            for grad in grads or ():
                grad.zero_()

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Norm of all gradients before clipping (scalar), as DeepSpeed's step will find it; infinite where one is no
        number. Collective; between the last backward of a step and the step."""
        members = self._members if self.stage == "3" else self._zero.params_in_partition
        found: list[Tensor] = []
        for i, own in enumerate(members):
            norm = torch.as_tensor(self._zero.get_grad_norm_direct(self._zero.averaged_gradients[i], own))
            self.wire.note([("norms", norm.element_size())], self._ranks)  # which DeepSpeed sums up over the ranks
            found.append(norm.float().reshape(()))
        norms = torch.stack(found)
        invalid = (~norms.isfinite() | (norms < 0)).any()  # DeepSpeed says -1 where the norm is no number
        return torch.where(invalid, torch.inf, torch.linalg.vector_norm(norms) / float(self._zero.loss_scale))

    # --- who had a gradient -------------------------------------------------------------------------------------------

    def _note(self, param: Tensor) -> None:
        if self._begun_at != self._engine.global_steps:  # also after a step that DeepSpeed has skipped
            self._begun_at = self._engine.global_steps
            self._had.clear()
        self._had.add(param)

    def _agree(self) -> None:
        if self._agreed_at == self._engine.global_steps:
            return
        self._agreed_at = self._engine.global_steps
        if self._begun_at != self._agreed_at:
            self._had.clear()
        had = torch.tensor([param in self._had for param in self._names], device=self._flats[0].device).int()
        dist.all_reduce(had, op=dist.ReduceOp.MAX, group=self.group)
        self.wire.note([("present", had.numel() * had.element_size())], self._ranks)
        self._had = {param for param, some in zip(self._names, had.tolist(), strict=True) if some}

    # --- whole weights ------------------------------------------------------------------------------------------------

    def whole(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """The float32 masters of `params`, whole, on the first rank of the group; None on the others. Collective."""
        return self._carrier().bring([self._parcel(param) for param in params])

    def everywhere(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The same on every rank. Collective."""
        found = self._carrier().spread([self._parcel(param) for param in params])
        return [each.view(self.shape(param)) for param, each in zip(params, found, strict=True)]

    def set_(self, param: Tensor, whole: Tensor) -> None:
        """Puts this rank's piece of a whole weight into the float32 master."""
        start, stop = self._places[param].spans[self._rank]
        self.weight(param).copy_(whole.reshape(-1)[start:stop])

    def publish(self) -> None:
        """Carries what was written into the masters to the weights that compute; within a step, since DeepSpeed does so
        group by group and sends them to the other ranks at the end."""
        for i, flat in enumerate(self._flats):
            low = self._zero.fp16_partitioned_groups_flat[i] if self.stage == "3" else self._bit16(i)
            if low is not flat:
                low.data.copy_(flat.data)

    def _bit16(self, group: int) -> Tensor:
        return self._zero.parallel_partitioned_bit16_groups[group][self._rank]

    def _carrier(self) -> Carrier:
        return Carrier(self.group, self.wire.rare, self._flats[0].device)

    def _parcel(self, param: Tensor) -> Parcel:
        piece = self.weight(param)
        return Parcel(0, self.spans(param), piece.dtype, "weights", piece=piece)

    def remove(self) -> None:
        """Takes the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def partitioned(param: Tensor) -> bool:
    """Whether ZeRO-3 has taken the entries of `param` away (`deepspeed.zero.Init`)."""
    return hasattr(param, "ds_shape") and param.numel() == 0 and bool(param.ds_numel)


def _stage(zero: Any) -> str:
    kind = type(zero).__name__
    version = _version(zero)
    found = next(
        (stage for name, stage in (("_Stage3", "3"), ("DeepSpeedZeroOptimizer", "1 or 2")) if name in kind), None
    )
    if kind == "BF16_Optimizer":
        raise ValueError(
            "ZeRO-1 with bfloat16 weights and data_types.grad_accum_dtype=fp32 has a layout of its own: leave "
            "grad_accum_dtype out, or use stage 2"
        )
    if found is None:
        raise ValueError(
            f"DeepSpeed has made a {kind}, which shards nothing that could be read: set zero_optimization.stage to 1, "
            "2 or 3"
        )
    if version is not None and (sentence := untested("DeepSpeed", version)) is not None:
        raise ValueError(sentence)
    missing = [name for name in (*_NEEDS[found], *_NEEDS_BOTH) if not hasattr(zero, name)]
    if missing:
        raise ValueError(
            f"DeepSpeed {version} has no {missing[0]} in its {kind}, by which its layout is read: pip install "
            f"'{requirement('DeepSpeed')}'"
        )
    return found


_REFUSED: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "optimizer offload": (
        lambda zero: getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False),
        "the optimizer's state would be on another device than what it steps: leave offload_optimizer, of old "
        "cpu_offload, out",
    ),
    "parameter offload": (
        lambda zero: getattr(zero, "params_in_nvme_and_cpu", False) or getattr(zero, "offload_param", False),
        "weights have been tried on the accelerator alone: leave offload_param, of old cpu_offload_param, out",
    ),
    "experts": (
        lambda zero: getattr(zero, "has_moe_layers", False) or _several_groups(zero),
        "pieces would lie on different groups of ranks: train models without mixture of experts",
    ),
    "float16": (
        lambda zero: getattr(zero, "dtype", None) is torch.float16,
        "its loss scaler has not been tried with matrices: use bfloat16",
    ),
    "ZenFlow": (lambda zero: getattr(zero, "zenflow", False), "it steps behind the optimizer's back: leave it out"),
    "torch_autocast in float16": (
        lambda zero: getattr(zero, "torch_autocast_gradscaler", None) is not None,
        "its loss scaler would unscale gradients that are unscaled: use bfloat16",
    ),
    "model parallelism": (
        lambda zero: getattr(zero, "model_parallel_group", None) is not None,
        "a matrix would be what one rank has of it: leave mpu out",
    ),
}
"""What cannot be right, by name: when it is on, and why with the remedy."""


def _several_groups(zero: Any) -> bool:
    groups = getattr(zero, "sub_group_process_groups", None) or getattr(zero, "real_dp_process_group", None) or []
    return len({tuple(dist.get_process_group_ranks(group)) for group in groups}) > 1


def _refuse_settings(zero: Any) -> None:
    for name, (is_on, _) in _REFUSED.items():
        if is_on(zero):
            raise _refusal(name)


def _refusal(name: str) -> ValueError:
    return ValueError(f"ZeRO with {name} is not supported, because {_REFUSED[name][1]}")


_OFFLOAD = {
    "optimizer offload": ("offload_optimizer", "cpu_offload"),
    "parameter offload": ("offload_param", "cpu_offload_param"),
}
"""By what keys of `zero_optimization` DeepSpeed is asked for it, today and of old."""


def refuse_offload(config: Mapping[str, Any]) -> None:
    """Refuses offload by the configuration, before DeepSpeed does, whose remedy (`zero_force_ds_cpu_optimizer`) would
    lead to the refusal of the engine that it has made.

    Args:
        config: DeepSpeed's; a device of "none" is no offload.

    Raises:
        ValueError: it asks for offload of the optimizer or of parameters.
    """
    section = config.get("zero_optimization", {})
    for name, keys in _OFFLOAD.items():
        for key in keys:
            value = section.get(key)
            device = value.get("device", "none") if isinstance(value, Mapping) else value
            if device not in (None, False, "none"):
                raise _refusal(name)


def _version(zero: Any) -> str | None:
    return getattr(sys.modules.get(type(zero).__module__.partition(".")[0]), "__version__", None)
