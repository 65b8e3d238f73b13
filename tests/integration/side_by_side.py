"""Runs the cases of a module a few at a time, ahead of the tests that look at them: most of their time is waiting."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


@contextlib.contextmanager
def side_by_side(
    request: pytest.FixtureRequest, run: Callable[[Any], Coroutine[Any, Any, T]], *, at_a_time: int
) -> Iterator[dict[Hashable, Future[T]]]:
    """By the parameter `case` of each test of the module that was chosen, each in a thread with a loop of its own."""
    cases = [
        item.callspec.params["case"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module and "case" in item.fixturenames
    ]
    with ThreadPoolExecutor(at_a_time, thread_name_prefix="case") as pool:
        try:
            yield {case: pool.submit(lambda case=case: asyncio.run(run(case))) for case in cases}  # type: ignore[misc]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
