"""The baselines that run the very same container without the service: the engine's API, and its command line."""

from __future__ import annotations

import queue
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import docker

from benchmarks.rig.service import DISK_BYTES, GRACE_SECONDS, IMAGE, MEMORY_BYTES, PIDS_LIMIT, engine_client
from nodeservice.ports import ContainerSpec, Mount, labels
from nodeservice.runtime import docker_calls
from nodeservice.runtime.docker_spec import create_body
from nodeservice.runtime.endpoint import resolve_endpoint

CALL_SECONDS = 300
"""An engine that hangs ends the measurement, not only that of the one container."""
_RECORD = "x" * 2_000
"""As long as the record that the service puts into a label."""


class BareEngine:
    """Runs containers that are described exactly as the service describes them, but for the cgroup above them."""

    def __init__(self, node_id: str, results: Path) -> None:
        self.node_id = node_id
        results.mkdir(exist_ok=True)
        results.chmod(0o777)
        with engine_client() as client:
            self._profile = docker_calls.profile(client, resolve_endpoint(None), lacks_init=False)
            image = str(client.inspect_image(IMAGE)["Id"])
        self._numbers = count()
        self._local = threading.local()
        self._clients: list[docker.APIClient] = []
        self._spec = ContainerSpec(
            name="", image=image, argv=None, shell="", env=(("NODESERVICE_TASK_ID", "x"), ("NODESERVICE_ATTEMPT", "1")),
            labels={labels.TASK_ID: "x", labels.ATTEMPT: "1", labels.SPEC: "f", labels.RECORD: _RECORD}, cpu_milli=100,
            memory_bytes=MEMORY_BYTES, pids_limit=PIDS_LIMIT, gpu_uuids=(), log_max_bytes=DISK_BYTES,
            mounts=(Mount(source=results, target="/results"), Mount(source=results, target="/output")),
            grace_seconds=GRACE_SECONDS,
        )  # fmt: skip

    def close(self) -> None:
        for client in self._clients:
            client.close()

    @property
    def client(self) -> docker.APIClient:
        """One for each thread, kept open."""
        client = getattr(self._local, "client", None)
        if client is None:
            client = docker.APIClient(resolve_endpoint(None).url, version="auto", timeout=CALL_SECONDS)
            client.trust_env = False
            self._local.client = client
            self._clients.append(client)
        return client

    def body(self, command: str, cpu_milli: int) -> tuple[str, dict[str, Any]]:
        """A new name, and the body of the create call."""
        name = f"{self.node_id}.{next(self._numbers)}"
        spec = replace(self._spec, name=name, shell=command, cpu_milli=cpu_milli)
        return name, create_body(spec, self._profile, node_id=self.node_id)

    def start(self, command: str, cpu_milli: int) -> str:
        """The id of a container that runs."""
        name, body = self.body(command, cpu_milli)
        container_id = str(self.client.create_container_from_config(body, name=name)["Id"])
        self.client.start(container_id)
        return container_id

    def run(self, command: str, cpu_milli: int) -> bytes:
        """Create, start, wait, read the log, remove: the least that runs a task through the API."""
        container_id = self.start(command, cpu_milli)
        self.client.wait(container_id)
        log: bytes = self.client.logs(container_id)
        self.client.remove_container(container_id, v=True)
        return log

    def run_by_command_line(self, command: str, cpu_milli: int) -> bytes:
        """`docker run --rm` with the same options."""
        name, body = self.body(command, cpu_milli)
        words = ["docker", "run", "--rm", *command_line(name, body)]
        return subprocess.run(words, capture_output=True, check=True, timeout=CALL_SECONDS).stdout


def command_line(name: str, body: Mapping[str, Any]) -> list[str]:
    """What follows `docker run` to ask for what the body asks for."""
    host = body["HostConfig"]
    options = {
        "--name": name, "--entrypoint": body["Entrypoint"][0], "--stop-signal": body["StopSignal"],
        "--stop-timeout": body["StopTimeout"], "--cpu-period": host["CpuPeriod"], "--cpu-quota": host["CpuQuota"],
        "--memory": host["Memory"], "--memory-swap": host["MemorySwap"], "--pids-limit": host["PidsLimit"],
        "--shm-size": host["ShmSize"], "--network": host["NetworkMode"], "--log-driver": host["LogConfig"]["Type"],
        "--restart": host["RestartPolicy"]["Name"], "--pull": "never",
    }  # fmt: skip
    words = [f"{option}={value}" for option, value in options.items()]
    words += [f"--env={entry}" for entry in body["Env"]]
    words += [f"--label={key}={value}" for key, value in body["Labels"].items()]
    words += [f"--ulimit={one['Name']}={one['Soft']}:{one['Hard']}" for one in host["Ulimits"]]
    words += [f"--security-opt={entry}" for entry in host["SecurityOpt"]]
    words += [f"--cap-drop={entry}" for entry in host["CapDrop"]]
    words += [f"--log-opt={key}={value}" for key, value in host["LogConfig"]["Config"].items()]
    for mount in host["Mounts"]:
        read_only = ",readonly" if mount["ReadOnly"] else ""
        words.append(f"--mount=type=bind,source={mount['Source']},target={mount['Target']}{read_only}")
    if host.get("Init"):
        words.append("--init")
    return [*words, body["Image"], *body["Entrypoint"][1:], *body["Cmd"]]


def seconds_for(run: Callable[[], object], *, task_count: int, at_a_time: int) -> float:
    """Run it so many times, so many at a time."""
    left: queue.SimpleQueue[None] = queue.SimpleQueue()
    for _ in range(task_count):
        left.put(None)

    def work() -> None:
        while True:
            try:
                left.get_nowait()
            except queue.Empty:
                return
            run()

    began = time.perf_counter()
    with ThreadPoolExecutor(at_a_time) as pool:
        for done in [pool.submit(work) for _ in range(at_a_time)]:
            done.result()
    return time.perf_counter() - began
