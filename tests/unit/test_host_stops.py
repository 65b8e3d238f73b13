"""What ran when the host was shut down is remembered over the boots that follow, and over no more."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from nodeservice.daemon.host_stops import HostStops
from nodeservice.journal.memory import MemoryJournal
from nodeservice.testing.failing_journal import FailingJournal

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


async def test_what_ran_is_known_after_the_next_boot() -> None:
    journal = MemoryJournal()
    assert await HostStops(journal, boot_id="1").ended() == {}
    await HostStops(journal, boot_id="1").note(NOW, ["b", "a"])
    assert await HostStops(journal, boot_id="2").ended() == {"a": NOW, "b": NOW}


async def test_a_shutdown_that_was_called_off_ended_nothing() -> None:
    journal = MemoryJournal()
    await HostStops(journal, boot_id="1").note(NOW, ["a"])
    assert await HostStops(journal, boot_id="1").ended() == {}


async def test_of_several_shutdowns_the_first_counts() -> None:
    """Of a worker that never came to look at what the first one had ended: the engine did not come up in between."""
    journal = MemoryJournal()
    await HostStops(journal, boot_id="1").note(NOW, ["a"])
    await HostStops(journal, boot_id="2").note(NOW + timedelta(minutes=5), ["a", "b"])
    assert await HostStops(journal, boot_id="3").ended() == {"a": NOW, "b": NOW + timedelta(minutes=5)}


async def test_old_shutdowns_are_forgotten() -> None:
    journal = MemoryJournal()
    for number in range(50):
        await HostStops(journal, boot_id=str(number)).note(NOW, [f"container-{number}"])
    ended = await HostStops(journal, boot_id="now").ended()
    assert "container-49" in ended
    assert len(ended) < 20


async def test_a_journal_that_cannot_be_written_does_not_hold_up_the_stop() -> None:
    journal = FailingJournal(MemoryJournal())
    journal.fail_next(1)
    await HostStops(journal, boot_id="1").note(NOW, ["a"])
    assert await HostStops(journal, boot_id="2").ended() == {}


def test_the_boot_is_the_kernels() -> None:
    assert HostStops(MemoryJournal())._boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
