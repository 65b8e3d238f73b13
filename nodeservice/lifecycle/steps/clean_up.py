"""Removes what an attempt leaves on the host: container, cgroup, work directory. The log stays until it is forgotten."""

from __future__ import annotations

import asyncio

from nodeservice.core import events as ev
from nodeservice.core.model import TaskRecord
from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.steps import prepare
from nodeservice.ports import labels


async def clean_up(context: Context, record: TaskRecord) -> ev.Event:
    if (making := context.creating.get(record.id)) is not None:
        await asyncio.gather(asyncio.shield(making), return_exceptions=True)
        del context.creating[record.id]
    container_id = record.container_id
    if container_id is None:  # one may be there that a crash or an error let nobody hear of
        found = await context.runtime.find(labels.container_name(record.id))
        container_id = found.id if found is not None else None
    if container_id is not None:
        await context.runtime.remove(container_id)
    await prepare.drop(context, record.id)
    await context.cgroups.remove(record.id)
    await context.disk.remove(record.id, work=context.dirs.results(record.id))
    context.gpus.forget(record.id)
    context.images.forget(record.id)
    context.taken_up.discard(record.id)
    if record.collected is None:  # what could not be collected is not thrown away either
        await context.filing.run(lambda: context.dirs.salvage(record.id))
    else:
        await context.filing.run(lambda: context.dirs.remove(record.id))
    return ev.CleanedUp(at=context.clock.now())
