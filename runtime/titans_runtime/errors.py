"""The one exception tree. Every message names the value, the limit and the fix, in one or two lines."""

from __future__ import annotations


class TitansError(Exception):
    """Anything a user can cause. ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class CheckFailed(TitansError):
    """A numeric verification did not hold."""

    exit_code = 1


class UsageError(TitansError):
    """An argument or option that cannot be meant."""

    exit_code = 2


class DataError(TitansError):
    """A bundle, checkpoint, memory file or input that is damaged or does not fit."""

    exit_code = 3


class BundleError(DataError):
    """A bundle that is incomplete, altered, or of an unknown format."""


class StateError(DataError):
    """A memory that is damaged, or belongs to another bundle."""


class ConflictError(TitansError):
    """A memory that someone else has changed since it was read; it is untouched."""

    exit_code = 1


class TokenError(DataError):
    """Token ids that are empty, of the wrong type, or outside the vocabulary."""


class EnvironmentProblem(TitansError):
    """A provider, library or device that this machine does not have."""

    exit_code = 4


class OverloadError(TitansError):
    """A queue that is full; ask again later."""

    exit_code = 4


class NumericsError(TitansError):
    """A value that is not finite; the session is as it was before the call."""

    exit_code = 1
