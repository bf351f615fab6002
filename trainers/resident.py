"""How much memory a process has had, as the kernel counts it: to stand beside a plan where no GPU's allocator does."""

from __future__ import annotations

from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Resident:
    """The most resident memory (RSS) of this process above what it had when this was made.

    Beside tensors it has what libraries load and keep meanwhile, the allocator's gaps, and pages of files that are
    mapped, so that it is more than the bytes of tensors, by 100 MiB and more; and it is less where memory that was free
    before, but the process's own, is used again.

    Linux alone says it. Where the kernel does not let a process forget its peak (clear_refs), a peak from before hides
    a smaller one since, and `peak` is None.
    """

    def __init__(self) -> None:
        self._before = _field("VmRSS")
        forgotten = _forget_peak()
        self._earlier = None if forgotten else _field("VmHWM")

    def peak(self) -> int | None:
        """Bytes; None where nobody knows."""
        now = _field("VmHWM")
        if now is None or self._before is None or (self._earlier is not None and now <= self._earlier):
            return None
        return max(now - self._before, 0)


def _field(name: str) -> int | None:
    """Bytes of a line of /proc/self/status; None where there is none."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(found[0]) if found else None


def _forget_peak() -> bool:
    """Begins the kernel's VmHWM anew; False where it does not let us."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True
