"""Errors, sorted by whose move is next.

Each carries a stable `reason` (upper case, machine-readable), a sentence for a person, and where it helps a `hint` (the
remedy) and the `field` at fault. Adapters translate at their boundary and chain the cause. A task that exits 1 or runs
out of memory is an outcome (`nodeservice.core.model.Verdict`), not an exception.
"""

from __future__ import annotations

from collections.abc import Mapping


class NodeServiceError(Exception):
    """Root of all errors raised on purpose by this package."""

    def __init__(self, message: str, *, reason: str, field: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.field = field
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class RequestError(NodeServiceError):
    """The caller must change the request; the same request never succeeds."""


def invalid_request(field: str, what: str, remedy: str) -> RequestError:
    """INVALID_REQUEST: the sentence begins with the field and goes on with `what`, which shows the value."""
    return RequestError(f"{field} {what}", reason="INVALID_REQUEST", field=field, hint=remedy)


class NamesRefusedError(RequestError):
    """RESULT_NAME_REFUSED: a store that takes the rest can hold no files of these names."""

    def __init__(self, message: str, *, names: Mapping[str, str]) -> None:
        super().__init__(message, reason="RESULT_NAME_REFUSED", field="results")
        self.names = names
        """Stored paths, each with why."""


class CapacityError(NodeServiceError):
    """The request is sound, but not here or not now; elsewhere or later it may succeed."""


class TransientError(NodeServiceError):
    """A part we depend on failed in a way that passes; we retry."""


class NodeFaultError(NodeServiceError):
    """This node cannot do it (engine broken, store refuses us); the master may move the task."""


class InvariantError(NodeServiceError):
    """Our own bug: a state that the design excludes. The message carries the story."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason="INTERNAL")


class ConfigError(NodeServiceError):
    """The operator must change the configuration; the process does not start."""

    def __init__(self, message: str, *, field: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, reason="CONFIG", field=field, hint=hint)
