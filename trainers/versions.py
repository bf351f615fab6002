"""What strategies and whole runs ask of the versions that they stand on, before anything begins."""

from __future__ import annotations

import os
import warnings

import torch

from thinrank.trainers.errors import UserError
from thinrank.versions import is_newer, requirement, untested


def require(name: str, version: str) -> None:
    """Refuses a version that has not been tested, older or newer, of a package whose insides are used.

    Raises:
        UserError: what has been tested, and how to get it.
    """
    if (sentence := untested(name, version)) is not None:
        raise UserError(sentence)


def require_lightning() -> None:
    """Lightning's, whose hooks strategies and runs take the place of."""
    import lightning

    require("Lightning", lightning.__version__)


def warn_of_newer_torch(user: str) -> None:
    """Once for all ranks, where `user` reads how torch lays weights out: what it does not find raises, so that a newer
    torch may be tried. Optimizers by themselves have no need of this."""
    if is_newer("torch", torch.__version__) and os.environ.get("RANK", "0") == "0":
        warnings.warn(
            f"torch {torch.__version__} is newer than what {user} has been tested with: compare the losses of a few "
            f"steps with those of one process, or pip install '{requirement('torch')}'",
            stacklevel=2,
        )
