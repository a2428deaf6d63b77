"""The errors a user can cause or mend. Each says what went wrong, with which value, and what to do."""

from __future__ import annotations


class RlufError(Exception):
    """Base of every error that a command shows as one clear message and a non-zero exit code."""

    exit_code: int = 1


class SettingsError(RlufError):
    """A setting is unknown, of the wrong type, or incompatible with another one."""

    exit_code = 2


class DataError(RlufError):
    """A log, prompt file or label file is missing, empty, or has too many bad rows."""

    exit_code = 3


class ModelError(RlufError):
    """A model folder or hub id cannot be found, read or converted."""

    exit_code = 4


class ResourceError(RlufError):
    """The machine or cluster lacks CPUs, GPUs, memory, disk or ports for what was asked."""

    exit_code = 5


class StallError(RlufError):
    """A wait ran past its deadline. The message names whom the run was waiting for."""

    exit_code = 6


class SyncError(RlufError):
    """The engines' weights do not match the learner's after a publish."""

    exit_code = 7


class ActorError(RlufError):
    """An actor died or failed with an error that is not the user's. The message names its role and index."""

    exit_code = 8


class LostError(ActorError):
    """A process of the run has gone (killed, out of memory, node lost) and may be started again.

    `who` names the actor, such as "rollout 0"; it is empty where only an object was lost.
    """

    def __init__(self, message: str, who: str = "") -> None:
        """`message` as for every error of the house."""
        super().__init__(message)
        self.who = who

    def __reduce__(self) -> tuple[type[LostError], tuple[str, str]]:
        """Keep `who` on the way from an actor to the driver."""
        return type(self), (str(self), self.who)


class AlarmError(RlufError):
    """Reward hacking, found while training, asks for going back or for an end.

    `back_to` is the last step that was clean, where going back is asked for; None asks for an end.
    """

    exit_code = 9

    def __init__(self, message: str, back_to: int | None = None) -> None:
        """`message` as for every error of the house."""
        super().__init__(message)
        self.back_to = back_to


class TerminatedError(RlufError):
    """The run was asked to end (SIGTERM, `ray job stop`). The message says which checkpoint was kept."""

    exit_code = 143
