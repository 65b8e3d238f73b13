"""The short form of `make soak`: a cluster whose parts are killed and frozen at random loses nothing and leaves nothing."""

from __future__ import annotations

import pytest

from tests.integration.docker_daemon import require_docker_daemon
from tests.integration.minio_server import require_minio
from tests.integration.soak import soak

pytestmark = [pytest.mark.engine, pytest.mark.minio, pytest.mark.crash, pytest.mark.timeout(600)]


async def test_a_cluster_under_fire_ends_every_task_once_and_leaves_nothing() -> None:
    require_docker_daemon()
    story = await soak(require_minio(), seed=1, task_count=40)
    assert story.broken == []
    assert sum(story.ends.values()) == 40
    assert sum(story.faults.values()) > 0
