"""Makes what a container needs around it, its cgroup and its directories, while its image is being looked for."""

from __future__ import annotations

import asyncio

from nodeservice.core.model import AttemptId, TaskRecord
from nodeservice.lifecycle.context import Context


def begin(context: Context, record: TaskRecord) -> None:
    """How it went is told to who asks for it by `finish`."""
    if record.id not in context.preparing:
        work = _prepare(context, record)
        context.preparing[record.id] = asyncio.create_task(work, name=f"prepare {record.id}")


async def finish(context: Context, record: TaskRecord) -> str | None:
    """What `begin` began, or else all of it now: the parent cgroup for the engine. Raises as `TaskCgroups.prepare` does."""
    begun = context.preparing.pop(record.id, None)
    return await (_prepare(context, record) if begun is None else begun)


async def drop(context: Context, id_: AttemptId) -> None:
    """Returns when nothing that was begun can come any more."""
    begun = context.preparing.pop(id_, None)
    if begun is not None:
        await asyncio.gather(begun, return_exceptions=True)


async def _prepare(context: Context, record: TaskRecord) -> str | None:
    directories = context.filing.begin(lambda: context.dirs.prepare(record.id))
    try:
        cgroup_parent = await context.cgroups.prepare(record.spec, record.lease.cpu_ids)
    finally:
        # Nothing of it may come later, nor take the place of what went wrong.
        (failed,) = await asyncio.gather(directories, return_exceptions=True)
    if failed is not None:
        raise failed
    return cgroup_parent
