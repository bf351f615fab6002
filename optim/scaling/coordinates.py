"""The coordinate check: do activations keep their size as the width grows, over the first steps of training?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thinrank.optim.scaling.fit import Slope, power_slope


@dataclass(frozen=True)
class CoordinateCheck:
    """Mean |activation| of every module, at several widths, over some steps.

    Attributes:
        widths: in the order of the readings.
        readings: name of a module → for each step, a value for each width. The first step is that of the initial
            weights; a module's name is the empty text for the whole model.
    """

    widths: tuple[int, ...]
    readings: dict[str, list[list[float]]]

    def slopes(self, step: int = -1) -> dict[str, Slope]:
        """The exponent of the width in each module's activations at one step; those whose output is 0 are left out."""
        return {
            name: power_slope(self.widths, rows[step]) for name, rows in self.readings.items() if min(rows[step]) > 0
        }

    def growing(self, tolerance: float = 0.2, step: int = -1) -> dict[str, float]:
        """Modules whose activations grow faster than width^tolerance, with their exponents, the worst first.

        The first step's output and attention logits may shrink with the width, and do so in µP: shrinking is no alarm.
        """
        found = {name: slope.value for name, slope in self.slopes(step).items() if slope.value > tolerance}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def table(self) -> str:
        """One line for each module: the last step's values, and the exponents at the first and the last step."""
        lines = [
            f"{'module':<40} " + " ".join(f"{f'd={width}':>10}" for width in self.widths) + f" {'first':>7} {'last':>7}"
        ]
        first, last = self.slopes(0), self.slopes(-1)
        for name, rows in self.readings.items():
            cells = " ".join(f"{value:>10.4g}" for value in rows[-1])
            ends = [f"{found[name].value:>7.2f}" if name in found else f"{'–':>7}" for found in (first, last)]
            lines.append(f"{name or '(model)':<40} {cells} {' '.join(ends)}")
        return "\n".join(lines)


def coordinate_check(
    build: Callable[[int], tuple[nn.Module, Callable[[], Any]]], widths: Sequence[int], *, steps: int = 4
) -> CoordinateCheck:
    """Mean |activation| per module over the first `steps` steps, at every width (Yang et al. 2022, arXiv:2203.03466).

    Take a rate that is larger than the intended one, and the same data at every width: what is wrong shows sooner.
    Flat is right. It sees what happens in the first steps alone: not what weight decay does later, and not whether
    the rate is good.

    Args:
        build: width → the model, and a function that does one step of training with it (forward, backward, step), whose
            forwards are read.
        widths: at least two, of one kind of model: modules have the same names at all of them.
        steps: of training; the last reading is before the last update.

    Raises:
        ValueError: for fewer than two widths, fewer than one step, and modules that are not everywhere.
    """
    if len(set(widths)) < 2:
        raise ValueError(f"a coordinate check needs at least two widths, got {list(widths)}: give another one")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}: four show most of it")
    columns: list[dict[str, list[float]]] = []
    for width in widths:
        model, step = build(width)
        columns.append(_read(model, step, steps))
    names = columns[0].keys()
    for width, column in zip(widths, columns, strict=True):
        odd = sorted(names ^ column.keys())
        if odd:
            raise ValueError(f"the module {odd[0]!r} is not at every width ({width}): build all models of equal depth")
    readings = {name: [[column[name][s] for column in columns] for s in range(steps)] for name in names}
    return CoordinateCheck(tuple(widths), readings)


def _read(model: nn.Module, step: Callable[[], Any], steps: int) -> dict[str, list[float]]:
    seen: dict[str, list[Tensor]] = {}
    rows: list[dict[str, Tensor]] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            first = _tensor(output)
            if first is not None and first.is_floating_point():
                seen.setdefault(name, []).append(first.detach().float().abs().mean())

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        for _ in range(steps):
            seen.clear()
            step()
            rows.append({name: torch.stack(values).mean() for name, values in seen.items()})
    finally:
        for handle in handles:
            handle.remove()
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def _tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        return next((each for each in output if isinstance(each, Tensor)), None)
    return getattr(output, "logits", getattr(output, "last_hidden_state", None))
