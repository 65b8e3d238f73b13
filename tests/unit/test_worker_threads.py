"""Threads for what blocks give way to the event loop."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from nodeservice.worker_threads import worker_pool


def policy_in(pool: ThreadPoolExecutor) -> int:
    return pool.submit(os.sched_getscheduler, 0).result(timeout=30)


def test_its_threads_are_batch_jobs_and_nobody_else_is() -> None:
    before = os.sched_getscheduler(0)
    with worker_pool(1, "a-name") as pool:
        assert policy_in(pool) == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == before != os.SCHED_BATCH


def test_where_that_is_forbidden_they_work_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with worker_pool(1, "a-name") as pool:
        assert policy_in(pool) == os.sched_getscheduler(0)
