"""A plan for people: lines of a terminal, one plan by itself or several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from thinrank.trainers.plan.footprint import Footprint

ESTIMATE = "≈"
"""Marks what is an estimate: libraries' workspaces and the allocator's gaps are in none of the figures."""


def mib(size: float) -> str:
    """Bytes in MiB."""
    return f"{size / 2**20:,.1f}"


def page(plan: Footprint) -> str:
    """One plan: memory of each process, and the wire."""
    held, done = plan.held, plan.work
    rows = [
        ("weights", mib(held.weights)),
        ("gradients, as the step finds them", mib(held.gradients)),
        ("optimizer state", mib(held.state)),
        ("  of which bases", mib(held.bases)),
        ("buffers of the exchange", mib(held.buffers)),
    ]
    if held.masters:
        rows.insert(1, ("float32 masters", mib(held.masters)))
    if held.brought:
        rows.append(("whole gradients and updates in a step", mib(held.brought)))
    if done is not None:
        rows += [
            ("for a step, between renewals", mib(done.between)),
            ("for a step that renews", mib(done.renewal)),
            ("for a step that is logged", mib(done.logged)),
            (f"{ESTIMATE} activations", mib(done.activations)),
            (f"{ESTIMATE} forward and backward, with gradients", mib(done.passes - held.spared)),
            (f"{ESTIMATE} peak", mib(plan.peak or 0)),
        ]
    lines = [_aligned([("memory of each process", "MiB"), *rows])]
    if plan.untraced:
        lines.append(f"what a step needs for a while is not known, since it could not be traced: {plan.untraced}")
    if plan.traffic.transfers:
        wire: list[Sequence[str]] = [("on the wire, a step", "MiB of payload", "leave a process")]
        for label, when in _whens(plan):
            wire.append((label, mib(plan.traffic.payload(when)), mib(plan.traffic.leaving(when, plan.world))))
        if plan.traffic.is_unlike:
            most = [plan.traffic.fullest(when, plan.world) for _, when in _whens(plan)]
            own = ["leave the one that sends most", *map(mib, most)]
            wire = [(*row, cell) for row, cell in zip(wire, own, strict=True)]
        lines += ["", _aligned(wire)]
    else:
        lines += ["", "on the wire: nothing" + (" for the optimizer" if plan.traffic.framework else "")]
    if plan.traffic.framework:
        own = [(each.kind, mib(each.leaving("averaged", plan.world))) for each in plan.traffic.framework]
        lines += ["", _aligned([("of the framework itself, a step", "MiB leave a process"), *own])]
    if plan.searches > 1:
        lines.append(f"the first {plan.searches} steps are as one that renews")
    return "\n".join(lines)


def comparison(plans: Mapping[str, Footprint]) -> str:
    """Several plans, a line for each."""
    heads = ["MiB of each process", "weights", "gradients", "state", "bases", "buffers", "step"]
    heads += [f"{ESTIMATE} passes", f"{ESTIMATE} peak", "sent", "renewal", "averaged"]
    rows: list[Sequence[str]] = [heads]
    for name, plan in plans.items():
        held, done, sent = plan.held, plan.work, plan.traffic
        sizes = [mib(each) for each in (held.weights, held.gradients, held.state, held.bases, held.buffers)]
        passes = 0 if done is None else done.passes - held.spared
        while_ = ["?"] * 3 if done is None else [mib(each) for each in (done.step, passes, plan.peak or 0)]
        rows.append([name, *sizes, *while_, *(mib(sent.payload(when)) for when in ("between", "renewal", "averaged"))])
    lines = [_aligned(rows)]
    lines += [
        f"{name}: a step's needs are not known ({plan.untraced})" for name, plan in plans.items() if plan.untraced
    ]
    several = next((plan for plan in plans.values() if plan.world > 1), None)
    if several is not None:
        share = 2 * (several.world - 1) / several.world
        lines.append(f"sent: payload of a step between renewals, in one, and in the mean; {share:.2f} times it leaves")
        apart = [name for name, plan in plans.items() if plan.traffic.is_unlike]
        if apart:
            lines.append(f"where state is shared out, the mean over processes, all of which leaves: {', '.join(apart)}")
        for name, plan in plans.items():
            among = sorted({each.among for each in plan.traffic.transfers if each.ranks and each.among})
            lines += [f"{name}: of what {n} replicas exchange, {2 * (n - 1) / n:.2f} times leaves" for n in among]
            if plan.traffic.framework:
                lines.append(f"{name}: beside it the framework sends {mib(plan.traffic.by_framework(plan.world))}")
    return "\n".join(lines)


def _whens(plan: Footprint) -> list[tuple[str, str]]:
    if plan.gap == 1:
        return [("in every step", "between")]
    return [
        ("between renewals", "between"),
        ("in a renewal", "renewal"),
        (f"in the mean of {plan.gap:,} steps", "averaged"),
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
