"""What layers, their weights and their inputs look like while a model trains, read now and then without changing it.

In one's own loop::

    spectra = Spectra(model, optimizer)
    for step, batch in enumerate(data, 1):
        if step % 50 == 0:
            spectra.begin()
        loss(model, batch).backward()
        if spectra.reading:
            spectra.look_at_gradients()
            print(spectra.end()["model.layers.0.self_attn.q_proj"])
        optimizer.step()

Nothing is left on the model between `begin` and `end`'s readings, and no random number is drawn.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thinrank.optim.monitors.alignment import BINS, Alignment, counts
from thinrank.optim.monitors.drift import jensen_shannon_drift
from thinrank.optim.monitors.farms import farms_alpha
from thinrank.optim.monitors.representation import (
    diffusion_entropy,
    leading_share,
    matrix_entropy,
    matrix_nuclear_norm,
    participation_ratio,
    reference_bandwidth,
    vendi_score,
)
from thinrank.optim.monitors.spectrum import eigenvalues, singular_values
from thinrank.optim.monitors.summaries import condition_quantile, effective_rank
from thinrank.optim.monitors.tail import hill_alpha
from thinrank.optim.monitors.tracker import Piece, SpectrumTracker, exact
from thinrank.optim.watched import Watched, Weights, linear_layers

METRICS: dict[str, str] = {
    "sign_diversity": "of the inputs' alignments with v1: 2 min(f+, 1 - f+), 0 when all lie on one side",
    "alignment_mean": "mean alignment with v1 in standard deviations of inputs without a direction, without its sign",
    "alignment_size": "mean absolute alignment, 0.80 for inputs without a direction",
    "sigma": "σ1 of the weight",
    "sigma_gap": "σ1 / σ2: near 1 there is no v1",
    "stable_rank": "‖W‖_F² / σ1²",
    "weight_rms": "root mean square of the weight's entries",
    "drive": "u1ᵀ G v1: negative, plain gradient descent would let σ1 grow",
    "gain": "rms of the outputs in parts of the inputs' rms",
    "input_max": "largest magnitude among the inputs",
    "participation": "participation ratio of up to 256 inputs: directions that they fill",
    "leading_share": "σ1(X) / ‖X‖_F of up to 256 inputs X: 1 when all point one way",
    "matrix_entropy": "of up to 256 inputs, centred, of length one: 1 where directions are used alike, 0 where few are",
    "nuclear_norm": "the Matrix Nuclear-Norm of the same: it hardly sees what it is meant to, for comparisons",
    "vendi_score": "how many different ones there are among up to 256 inputs",
    "diffusion_entropy": "bits of clumps that up to 256 inputs form, at the scale that the first reading found",
    "update_rms": "root mean square of the step's change of an entry",
    "update_ratio": "‖ΔW‖ / ‖W‖ of the step",
    "representation_change": "‖ΔW X‖ / ‖W X‖ of the step, for up to 256 inputs X",
    "hill_alpha": "power-law exponent of the weight's eigenvalues, Hill's of the larger half",
    "farms_alpha": "the same of pooled square windows, which does not depend on the weight's shape (FARMS)",
    "effective_rank": "exp of the entropy of σ / Σσ",
    "condition": "σ1 / σ_⌈0.95 m⌉",
    "spectrum_drift": "Jensen and Shannon's divergence of σ / Σσ from the reading before, in bits",
}
"""What is read of each layer, by name."""

CHEAP = ("sign_diversity", "alignment_mean", "sigma", "sigma_gap", "stable_rank", "weight_rms", "drive", "gain")
"""What is read unless one asks for something else."""

OF_UPDATES = ("update_rms", "update_ratio", "representation_change")
"""What compares weights before and after a step, and keeps a copy of them from `look_at_gradients` to `end`."""

OF_INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "participation": participation_ratio,
    "leading_share": leading_share,
    "matrix_entropy": matrix_entropy,
    "nuclear_norm": matrix_nuclear_norm,
    "vendi_score": vendi_score,
}
"""What is taken from a sample of the inputs, by functions of (tokens, features), besides `diffusion_entropy`."""

SAMPLED = len(OF_INPUTS) + 3
"""Numbers that a sample adds: those of `OF_INPUTS`; diffusion's entropy, or its bandwidth while none is known; how many
samples these are of, and those."""

OF_SPECTRA = ("hill_alpha", "farms_alpha", "effective_rank", "condition", "spectrum_drift")
"""What needs all singular values of a weight, and with them a weight that is whole here."""

SAMPLE = 256
"""Tokens of which what is costly is taken."""

LEAST = 50
"""Eigenvalues below which a power law is not looked for."""

Reduce = Callable[[Tensor, str], Tensor]
"""The "sum" or "max" of a tensor over the ranks that see other data."""


def check_metrics(metrics: Sequence[str]) -> None:
    """Refuses a name that is none of `METRICS`, naming the nearest.

    Raises:
        ValueError: for one.
    """
    for name in metrics:
        if name not in METRICS:
            near = difflib.get_close_matches(str(name), METRICS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"metrics: {name!r} is none of {', '.join(METRICS)}{hint}")


@dataclass
class Layer:
    """What was read of a layer.

    Attributes:
        values: by metric; one that could not be read is missing.
        alignment: of its inputs, or None.
    """

    values: dict[str, float] = field(default_factory=dict)
    alignment: Alignment | None = None

    def __getitem__(self, metric: str) -> float:
        return self.values[metric]


class Spectra:
    """Reads the linear layers of a model.

    A reading begins before a forward and ends after it: the weights' first singular triples are followed from where the
    last reading left them (`monitors.tracker`), then every layer's inputs in the next forward are looked at, once for
    each layer, so that what activation checkpointing computes again is not counted again. With
    `look_at_gradients`, between backward and the step, come what needs gradients; where `OF_UPDATES` are wanted, `end`
    comes after the step.

    Under DDP each rank looks at its own data, and `end(reduce)` adds up. Where weights lie in pieces (FSDP2, ZeRO-3)
    all ranks begin together, and vectors travel, never a weight. Layers made of factors are watched by the weight that
    they amount to. With a compiled model, hooks that come and go make it compile again: watch a model that is not.

    Args:
        model: that is trained.
        optimizer: its optimizer; one of thinrank knows where ZeRO-3 keeps weights.
        metrics: of `METRICS`.
        layers, exclude: which layers, as in `watched.linear_layers`.

    Attributes:
        layers: that are watched, by name.
        left_out: why some layers have no values of their weight, by name.
        reading: between `begin` and `end`.

    Raises:
        ValueError: for an unknown metric, or a layer that is none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        metrics: Sequence[str] = CHEAP,
        layers: Sequence[str] = ("all-linear",),
        exclude: Sequence[str] = (),
    ) -> None:
        check_metrics(metrics)
        self.metrics = tuple(metrics)
        self.layers = linear_layers(model, layers, exclude)
        self._weights = Weights(self.layers, optimizer)
        self.left_out = self._weights.left_out
        self.tracker = SpectrumTracker(self._weights.shapes())
        self.reading = False
        self._hooks: list[Any] = []
        self._sums: dict[str, Tensor] = {}
        self._most: dict[str, Tensor] = {}
        self._drive: dict[str, Tensor] = {}
        self._samples: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._whole: dict[str, dict[str, Tensor]] = {}
        self._spectrum: dict[str, Tensor] = {}  # of the last reading
        self._bandwidths: dict[str, float] = {}  # of the first reading that had one, and the same on all ranks

    def _any(self, *names: str) -> bool:
        return any(name in self.metrics for name in names)

    @property
    def _needs_inputs(self) -> bool:
        aligned = ("sign_diversity", "alignment_mean", "alignment_size")
        return self._any(*aligned, *OF_INPUTS, "diffusion_entropy", "gain", "input_max", "representation_change")

    def begin(self) -> None:
        """Reads the weights, and has the next forward looked at. All ranks call it where weights lie in pieces."""
        self.cancel()
        self.reading = True
        self._forget()
        pieces = self._weights.pieces()
        self.tracker.update(pieces, self._weights.axis)
        if self._any(*OF_SPECTRA) and self._weights.axis.whole:
            self._whole = {name: self._of_spectrum(name, piece.entries) for name, piece in pieces.items()}
        if self._needs_inputs:
            for layer in self.layers.values():
                self._hooks.append(layer.module.register_forward_hook(self._hook(layer)))

    def cancel(self) -> None:
        """Forgets a reading that was begun, and takes every hook away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.reading = [], False

    def _hook(self, layer: Watched) -> Callable[..., None]:
        @torch.no_grad()
        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if layer.name in self._sums or not args or not isinstance(args[0], Tensor):
                return
            self._look(layer, args[0].detach(), output)

        return look

    def _look(self, layer: Watched, inputs: Tensor, output: Any) -> None:
        triple = self.tracker.triples.get(layer.name)
        wanted = self._any("sign_diversity", "alignment_mean", "alignment_size") and triple is not None
        if wanted:
            assert triple is not None
            aligned = counts(inputs, triple.left if layer.turned else triple.right)
        else:
            aligned = torch.zeros(4 + BINS, dtype=torch.float64, device=inputs.device)
        squares = [_mean_square(inputs), _mean_square(output) if isinstance(output, Tensor) else inputs.new_zeros(())]
        self._sums[layer.name] = torch.cat([aligned, torch.stack(squares).double(), self._sampled(layer.name, inputs)])
        if "representation_change" in self.metrics:
            self._samples[layer.name] = _sample(inputs).float()
        self._most[layer.name] = inputs.abs().amax().float() if inputs.numel() else inputs.new_zeros(()).float()

    def _sampled(self, name: str, inputs: Tensor) -> Tensor:
        """What a sample of the inputs says, `SAMPLED` numbers; zeros, and of no sample, where it says nothing."""
        found = torch.zeros(SAMPLED, dtype=torch.float64, device=inputs.device)
        if not self._any(*OF_INPUTS, "diffusion_entropy"):
            return found
        rows = _sample(inputs)
        if not rows.numel() or rows.shape[-1] < 2 or not bool(rows.isfinite().all()):
            return found  # one feature has one direction; numbers that are none have no eigenvalues
        with exact(inputs.device):
            for place, (metric, function) in enumerate(OF_INPUTS.items()):
                if metric in self.metrics:
                    found[place] = function(rows)
            found[-2] = 1
            if "diffusion_entropy" in self.metrics:
                try:
                    scale = self._bandwidths.get(name)
                    found[-3] = reference_bandwidth(rows) if scale is None else diffusion_entropy(rows, scale)
                    found[-1] = 1
                except ValueError:  # all rows alike: the next reading may find a scale
                    pass
        return found

    @torch.no_grad()
    def _of_spectrum(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """What all singular values say; nothing of a weight with entries that are not finite."""
        if not weight.numel() or not bool(weight.isfinite().all()):
            return {}
        with exact(weight.device):
            values = singular_values(weight)
            found = {"effective_rank": effective_rank(values), "condition": condition_quantile(values)}
            if len(values) >= LEAST:
                found["hill_alpha"] = hill_alpha(eigenvalues(values))
                if "farms_alpha" in self.metrics:
                    found["farms_alpha"] = farms_alpha(weight)
        if name in self._spectrum:
            found["spectrum_drift"] = jensen_shannon_drift(values, self._spectrum[name].to(values.device))
        self._spectrum[name] = values
        return found

    @torch.no_grad()
    def look_at_gradients(self) -> None:
        """Between backward and the step: reads what gradients say. Where backward, replicas or DeepSpeed have taken the
        gradients, there is nothing to see. All ranks call it where weights lie in pieces."""
        if self.reading and "drive" in self.metrics:
            gradients = self._weights.gradients()
            self._drive = self.tracker.drive(gradients, self._weights.axis)
        if self.reading and self._any(*OF_UPDATES):
            self._before = {name: piece.entries.clone() for name, piece in self._weights.pieces().items()}

    def end(self, reduce: Reduce | None = None) -> dict[str, Layer]:
        """What was read, by layer; the host waits for the device here.

        Args:
            reduce: adds up over the ranks that see other data, all of which then call it; None: these inputs alone.
        """
        names = [name for name in self.layers if name in self._sums]
        self.cancel()
        found: dict[str, Layer] = {name: Layer() for name in self.layers}
        if names:
            sums = torch.stack([self._sums[name] for name in names])
            most = torch.stack([self._most[name] for name in names])
            if reduce is not None:
                sums, most = reduce(sums, "sum"), reduce(most, "max")
            for name, row, peak in zip(names, sums.cpu(), most.tolist(), strict=True):
                self._inputs(found[name], self.layers[name], row, peak)
        self._of_weights(found)
        for name, own in self._whole.items():
            found[name].values |= dict(zip(own, _listed(list(own.values())), strict=True))
        for name, value in zip(self._drive, _listed(list(self._drive.values())), strict=True):
            found[name].values["drive"] = value
        if self._before:
            self._of_updates(found)
        for layer in found.values():
            layer.values = {name: layer.values[name] for name in self.metrics if name in layer.values}
        self._forget()
        return found

    def _forget(self) -> None:
        self._sums, self._most, self._drive, self._samples, self._before, self._whole = {}, {}, {}, {}, {}, {}

    @torch.no_grad()
    def _of_updates(self, found: Mapping[str, Layer]) -> None:
        axis, now = self._weights.axis, self._weights.pieces()
        changes = {
            name: Piece(now[name].entries.float() - before.float(), now[name].shape, now[name].start)
            for name, before in self._before.items()
        }
        energies = axis.sum(torch.stack([change.energy() for change in changes.values()])).tolist()
        with exact(next(iter(now.values())).entries.device):
            for (name, change), energy in zip(changes.items(), energies, strict=True):
                rows, width = change.shape
                before = float(self.tracker.triples[name].energy)
                found[name].values["update_rms"] = math.sqrt(energy / (rows * width)) if rows * width else math.nan
                found[name].values["update_ratio"] = math.sqrt(energy / before) if before > 0 else math.nan
                if name in self._samples and axis.whole:
                    was = Piece(self._before[name], change.shape)
                    moved, stood = (self._apply(name, piece) for piece in (change, was))
                    found[name].values["representation_change"] = moved / stood if stood > 0 else math.nan

    def _apply(self, name: str, piece: Piece) -> float:
        """‖W X‖ of the sample."""
        columns = self._samples[name].mT
        product = piece.turned_times(columns) if self.layers[name].turned else piece.times(columns)
        return float(product.norm())

    def _inputs(self, layer: Layer, watched: Watched, row: Tensor, peak: float) -> None:
        aligned, (before, after, *sampled) = row[: 4 + BINS], row[4 + BINS :].tolist()
        if aligned[0] > 0:
            layer.alignment = Alignment.of(aligned, watched.inputs)
            layer.values["sign_diversity"] = layer.alignment.sign_diversity
            layer.values["alignment_mean"] = abs(layer.alignment.mean)
            layer.values["alignment_size"] = layer.alignment.magnitude
        layer.values["gain"] = math.sqrt(after / before) if before > 0 else math.nan
        layer.values["input_max"] = peak
        *shares, clumps, samples, clumped = sampled
        if samples:
            layer.values |= {name: share / samples for name, share in zip(OF_INPUTS, shares, strict=True)}
        if clumped and watched.name in self._bandwidths:
            layer.values["diffusion_entropy"] = clumps / clumped
        elif clumped:
            self._bandwidths[watched.name] = clumps / clumped

    def _of_weights(self, found: dict[str, Layer]) -> None:
        names = [name for name in self.tracker.triples if name in found]
        if not names:
            return
        triples = [self.tracker.triples[name] for name in names]
        columns = torch.stack(
            [torch.stack([t.sigma[0], t.gap, t.stable_rank, t.energy]).double() for t in triples]
        ).tolist()
        for name, (sigma, gap, rank, energy) in zip(names, columns, strict=True):
            rows, width = self.layers[name].shape
            found[name].values |= {
                "sigma": sigma,
                "sigma_gap": gap,
                "stable_rank": rank,
                "weight_rms": math.sqrt(energy / (rows * width)) if energy >= 0 else math.nan,
            }

    def state_dict(self) -> dict[str, Any]:
        """Where the singular vectors are, and the last singular values, as CPU tensors; the scales of diffusion."""
        return {
            **self.tracker.state_dict(),
            "spectrum": {name: s.cpu() for name, s in self._spectrum.items()},
            "bandwidths": dict(self._bandwidths),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self.tracker.load_state_dict(state)
        self._spectrum = dict(state.get("spectrum", {}))
        self._bandwidths = dict(state.get("bandwidths", {}))


def _mean_square(x: Tensor) -> Tensor:
    return x.detach().float().square().mean() if x.numel() else x.new_zeros((), dtype=torch.float32)


def _sample(inputs: Tensor) -> Tensor:
    """Up to `SAMPLE` tokens, evenly taken."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    return rows[:: max(1, len(rows) // SAMPLE)][:SAMPLE]


def _listed(values: Sequence[Tensor]) -> list[float]:
    return torch.stack([value.double() for value in values]).tolist() if values else []
