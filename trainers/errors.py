"""The errors that a user can fix: one sentence each, which names the remedy.

The launcher prints such a sentence alone, without a traceback, and ends with a code of its own.
"""


class UserError(Exception):
    """A mistake or a circumstance that the user can change.

    The message is one sentence that says what is wrong, with the value, and what to do about it.
    """


class GuardStop(UserError):
    """Training was stopped on purpose by a guard, on all ranks together, with the weights of the last good step."""


class RollBack(Exception):
    """A guard asks to go back before a spike, on all ranks together; whoever runs the training does it.

    Args:
        step: the optimizer step that was about to be made.
        reason: why it is a spike, as the end of a sentence.
    """

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"step {step} is a spike: {reason}")
        self.step, self.reason = step, reason


class PreflightError(UserError):
    """The look at all machines before training has found one that is not as it should be."""


class RankLost(UserError):
    """Another process of the run is gone, or has ended with an error, and this one cannot go on without it.

    Args:
        sentence: who, and what to do.
        recorder: whether this rank, of those that are left, is the one to write it down.
    """

    EXIT_CODE = 77

    def __init__(self, sentence: str, *, recorder: bool = False) -> None:
        super().__init__(sentence)
        self.recorder = recorder
