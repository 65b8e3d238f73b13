"""Sets the parts of the lifecycle to work together, and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

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
