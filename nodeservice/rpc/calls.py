"""Tells a call that was cut off below us from a task of ours that was cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from nodeservice.errors import TransientError

T = TypeVar("T")


async def answered(call: Awaitable[T], *, name: str) -> T:
    """The answer. Raises TransientError (MASTER_UNREACHABLE) where the channel was closed under the call.

    grpc.aio tells that with a CancelledError, which would end the waiting task as if it had been cancelled itself.
    """
    try:
        return await call
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise TransientError(f"{name}: the connection was closed meanwhile", reason="MASTER_UNREACHABLE") from error
