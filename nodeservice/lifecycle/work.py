"""Sets the parts of the lifecycle to work together, and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from nodeservice.lifecycle.context import Context
from nodeservice.lifecycle.disconnect_keeper import DisconnectKeeper
from nodeservice.lifecycle.driver import Driver
from nodeservice.lifecycle.host_keeper import HostKeeper
from nodeservice.lifecycle.janitor import Janitor
from nodeservice.lifecycle.recovery import Decode, recover
from nodeservice.lifecycle.runner import Runner
from nodeservice.lifecycle.store_keeper import StoreKeeper
from nodeservice.lifecycle.timekeeper import Timekeeper
from nodeservice.ports import Journal

T = TypeVar("T")


@contextlib.asynccontextmanager
async def at_work(
    context: Context, driver: Driver, decode: Decode, journal: Journal
) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Drive attempts while the block lasts, beginning with those that the journal and the engine hold.

    Gives the tasks that do it: one that ends has failed. Containers that run at the end of the block run on.
    """
    runner = Runner(context, driver)
    driver.connect(runner.start)
    driver.knows_all.clear()
    context.taken_up.update(record.id for record in driver.live())
    timekeeper = Timekeeper(driver, context.clock, context.cgroups)
    host_keeper = HostKeeper(context, driver)
    await host_keeper.apply_share()
    await context.images.open()
    store_keeper = StoreKeeper(context, driver)
    tasks = [
        asyncio.create_task(driver.run(), name="driver"),
        asyncio.create_task(recover(context, driver, decode), name="recovery"),
        asyncio.create_task(host_keeper.run(), name="host keeper"),
        asyncio.create_task(store_keeper.run(), name="store keeper"),
        asyncio.create_task(DisconnectKeeper(context, driver, journal).run(), name="disconnect keeper"),
        asyncio.create_task(Janitor(context, driver).run(), name="janitor"),
        asyncio.create_task(context.gpus.run(driver, on_change=context.on_capacity_change), name="GPU keeper"),
    ]
    timekeeper.open()
    try:
        await store_keeper.has_looked()
        yield tasks
    finally:
        await runner.settle_reports()
        context.bundles.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await timekeeper.close()
        await runner.close()
        context.collecting.close()
        context.filing.close()


async def while_all_work(parts: Sequence[asyncio.Task[None]], work: Coroutine[None, None, T]) -> T:
    """The result of `work`. Raises the error of a part of the node that failed meanwhile: nothing would move any more."""
    task = asyncio.create_task(work)
    waiting: set[asyncio.Task[Any]] = {task, *parts}
    try:
        while not task.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for part in done - {task}:
                part.result()
        return task.result()
    finally:
        task.cancel()
