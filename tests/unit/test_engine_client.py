"""The short way to a local engine, against a small server on a Unix socket."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from docker.errors import NotFound

from nodeservice.errors import NodeFaultError
from nodeservice.runtime import docker_calls
from nodeservice.runtime.endpoint import resolve_endpoint
from nodeservice.runtime.engine_client import EngineClient

_VERSION = json.dumps({"ApiVersion": "1.41"}).encode()


class Engine:
    """Answers with what `answers` holds for a path, on connections that it keeps until told otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.requests: list[tuple[str, bytes]] = []
        self.connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def drop_connections(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)
        self.drop_connections()
        self._thread.join(10)
        self._listener.close()

    def _accept(self) -> None:
        threads = []
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections.append(connection)
                threads.append(threading.Thread(target=self._serve, args=(connection,)))
                threads[-1].start()
        for thread in threads:
            thread.join(10)

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as reader, contextlib.suppress(OSError):
            while line := reader.readline():
                length = 0
                while (field := reader.readline()) not in (b"\r\n", b""):
                    name, _, value = field.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                target = line.split()[1].decode()
                self.requests.append((f"{line.split()[0].decode()} {target}", reader.read(length)))
                answer = self.answers.get(target.partition("?")[0])
                if answer is None:
                    continue  # silence
                status, body = answer
                connection.sendall(b"HTTP/1.1 %d Said\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    served = Engine(tmp_path / "e.sock")
    served.answers["/version"] = (200, _VERSION)
    yield served
    served.close()


@pytest.fixture
def client(engine: Engine) -> Iterator[EngineClient]:
    opened = EngineClient(resolve_endpoint(f"unix://{engine.path}"), version="auto", timeout=5)
    yield opened
    opened.close()


def test_calls_of_different_containers_share_one_connection(engine: Engine, client: EngineClient) -> None:
    for name in ("a", "b"):
        engine.answers[f"/v1.41/containers/{name}/json"] = (200, json.dumps({"Id": name}).encode())
        assert client.inspect_container(name) == {"Id": name}
    assert len(engine.connections) == 1


def test_a_body_and_a_query_arrive_as_docker_py_sends_them(engine: Engine, client: EngineClient) -> None:
    engine.answers["/v1.41/containers/create"] = (201, b'{"Id": "x", "Warnings": []}')
    client.create_container_from_config({"Image": "ä"}, name="n 1")
    said, body = engine.requests[-1]
    assert said == "POST /v1.41/containers/create?name=n+1"
    assert json.loads(body) == {"Image": "ä"}


def test_a_connection_that_the_engine_has_closed_is_not_used_again(engine: Engine, client: EngineClient) -> None:
    engine.answers["/v1.41/containers/a/json"] = (200, b'{"Id": "a"}')
    client.inspect_container("a")
    engine.drop_connections()
    assert client.inspect_container("a") == {"Id": "a"}
    assert len(engine.connections) == 2


def test_an_error_of_the_engine_is_docker_pys_with_its_words(engine: Engine, client: EngineClient) -> None:
    engine.answers["/v1.41/containers/a/json"] = (404, b'{"message": "No such container: a"}')
    with pytest.raises(NotFound, match="No such container: a"):
        client.inspect_container("a")


def test_silence_is_a_timeout_and_an_engine_that_is_gone_a_lost_connection(
    engine: Engine, client: EngineClient
) -> None:
    client.timeout = 1
    with pytest.raises(requests.exceptions.ReadTimeout):
        client.inspect_container("silent")
    engine.close()
    engine.path.unlink()
    with pytest.raises(requests.exceptions.ConnectionError):
        client.inspect_container("a")


@pytest.mark.parametrize(("status", "body"), [(500, b"oops"), (200, b"not json"), (200, b"[]"), (200, b"{}")])
def test_an_answer_that_describes_no_container_is_a_fault_of_the_engine(status: int, body: bytes) -> None:
    with pytest.raises(NodeFaultError) as caught:
        docker_calls.inspected(status, body)
    assert caught.value.reason == "ENGINE_ERROR"
    assert docker_calls.inspected(404, b"") is None
