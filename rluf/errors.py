"""Errors that a user can cause or fix. Each message says what failed, with which value, and what to do."""

from __future__ import annotations

import errno

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
"""System error numbers of a full disk and of an exceeded quota."""


class RlufError(Exception):
    """Base of every error that a command reports as one message and a non-zero exit code."""

    exit_code: int = 1


class SettingsError(RlufError):
    """A setting is unknown, of the wrong type, or incompatible with another one."""

    exit_code = 2


class DataError(RlufError):
    """A log, prompt file or label file is missing, empty, or has too many invalid rows."""

    exit_code = 3


class ModelError(RlufError):
    """A model folder or hub id cannot be found, read or converted."""

    exit_code = 4


class ResourceError(RlufError):
    """The machine or cluster lacks the requested CPUs, GPUs, memory, disk or ports."""

    exit_code = 5


class DeadlineError(RlufError):
    """A call exceeded its deadline. The message names the actor or phase that the run waited for."""

    exit_code = 6


class WeightSyncError(RlufError):
    """The engines' weights do not match the learner's after a weight sync."""

    exit_code = 7


class ActorError(RlufError):
    """An actor died or failed with an internal error. The message names its role and index."""

    exit_code = 8


class ActorLostError(ActorError):
    """A process of the run is gone (killed, out of memory, node lost) and may be restarted.

    `actor_name` is the actor, such as "rollout 0"; it is empty when only an object was lost.
    """

    def __init__(self, message: str, actor_name: str = "") -> None:
        """`message` as for every RlufError."""
        super().__init__(message)
        self.actor_name = actor_name

    def __reduce__(self) -> tuple[type[ActorLostError], tuple[str, str]]:
        """Pickle `actor_name` too: Ray sends the error from an actor to the driver, and Exception drops attributes."""
        return type(self), (str(self), self.actor_name)


class RewardHackingError(RlufError):
    """Reward hacking was detected during training; the run must roll back or stop.

    `rollback_step` is the last step without an alarm to roll back to; None stops the run.
    """

    exit_code = 9

    def __init__(self, message: str, rollback_step: int | None = None) -> None:
        """`message` as for every RlufError."""
        super().__init__(message)
        self.rollback_step = rollback_step


class TerminatedError(RlufError):
    """The run was asked to stop (SIGTERM, `ray job stop`). The message names the saved checkpoint."""

    exit_code = 143
