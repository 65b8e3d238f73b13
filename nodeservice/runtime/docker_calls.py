"""Single blocking calls to the engine, each with the answers that mean something special sorted out.

For use inside `EngineConnection.call`, which translates all other errors.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from nodeservice.errors import NodeFaultError, RequestError, TransientError
from nodeservice.ports import ContainerSpec, ContainerState, labels
from nodeservice.runtime.cdi_specs import DEFAULT_DIRECTORIES, read_cdi_specs
from nodeservice.runtime.docker_spec import is_same_request
from nodeservice.runtime.docker_state import read_listed, read_state
from nodeservice.runtime.endpoint import Endpoint
from nodeservice.runtime.engine_process import read_engine_process
from nodeservice.runtime.errors import create_error, is_status, start_error, translate
from nodeservice.runtime.hidden_results import refuse_hidden
from nodeservice.runtime.libpod import create_natively
from nodeservice.runtime.profile import EngineProfile, read_profile

if TYPE_CHECKING:
    from docker import APIClient

log = structlog.get_logger(__name__)

_NAME_PATIENCE_SECONDS = 3.0
_NAME_LOOK_SECONDS = 0.02


def profile(client: APIClient, endpoint: Endpoint, *, lacks_init: bool) -> EngineProfile:
    info = client.info()
    process = read_engine_process(endpoint)
    return read_profile(
        info,
        client.version(),
        client.networks(),
        lacks_init=lacks_init,
        process=process,
        specs=read_cdi_specs(process.root, info.get("CDISpecDirs") or DEFAULT_DIRECTORIES),
    )


def inspect(client: APIClient, name_or_id: str) -> ContainerState | None:
    try:
        return read_state(client.inspect_container(name_or_id))
    except Exception as error:
        if is_status(error, 404):
            return None
        raise


def bears_our_name(entry: Mapping[str, Any]) -> bool:
    """Of one in the engine's list."""
    return any(str(name).removeprefix("/").startswith(labels.PREFIX) for name in entry.get("Names") or ())


def look_at_listed(client: APIClient, *, entry: Mapping[str, Any]) -> ContainerState | None:
    """As `inspect`, and where the engine fails at this one, what its list says: whose it is must not be lost with that.

    Docker answers 500 for one whose writable layer is gone, and lists it all the same.
    """
    container_id = str(entry["Id"])
    try:
        return inspect(client, container_id)
    except Exception as error:
        failed = translate(error, doing=f"look at container {container_id[:12]}")
        if not isinstance(failed, NodeFaultError):
            raise
        log.warning("container.not_described", container_id=container_id, error=str(failed))
        return read_listed(entry)


def inspected(status: int, body: bytes) -> ContainerState | None:
    """From an answer to the question of `inspect`. Raises NodeFaultError (ENGINE_ERROR) for anything else."""
    if status == 404:
        return None
    try:
        if status == 200:
            return read_state(json.loads(body))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # told below
    said = body[:200].decode(errors="replace")
    raise NodeFaultError(f"the engine answered {status} when asked for a container: {said}", reason="ENGINE_ERROR")


def log_path(client: APIClient, container_id: str) -> Path:
    """Where the engine writes the container's log. Raises NodeFaultError (CONTAINER_LOST)."""
    try:
        return Path(client.inspect_container(container_id)["LogPath"])
    except Exception as error:
        if is_status(error, 404):
            raise lost(container_id) from error
        raise


def log_bound(body: bytes) -> int | None:
    """How many bytes one file of the container's log takes, by the answer to an inspection; None if not known."""
    try:
        return int(json.loads(body)["HostConfig"]["LogConfig"]["Config"]["max-size"])
    except (ValueError, KeyError, TypeError):
        return None


def create(
    client: APIClient,
    spec: ContainerSpec,
    body: dict[str, Any],
    *,
    native: bool = False,
    volumes: Sequence[str] = (),
) -> tuple[str, bool]:
    """Create, or find one of the same request: the id, and whether it is new.

    Whatever goes wrong on the way, the name tells whether it is there. `native` is for the body of a Podman specification,
    `volumes` are those that the image declares: see `refuse_hidden`. A native container has none of them.
    """
    from docker.errors import APIError

    volumes = () if native else volumes
    try:
        answer = create_natively(client, body) if native else client.create_container_from_config(body, name=spec.name)
    except Exception as error:
        refused = error if isinstance(error, APIError) else None
        if refused is not None and not _is_name_taken(refused):
            raise create_error(spec.name, spec.image, refused) from error
        existing = _await_name(client, spec.name, is_taken=refused is not None)
        if existing is None:
            if refused is None:
                raise
            raise _engine_error(f"the name {spec.name!r} is taken by a container that is going away") from error
        if not is_same_request(spec, existing.labels):
            raise RequestError(
                f"a container {spec.name!r} of another request is there already ({existing.id[:12]})",
                reason="CREATE_FAILED",
                field="name",
            ) from error
        refuse_hidden(client, existing.id, spec, volumes)
        return existing.id, False
    for warning in answer.get("Warnings") or ():
        log.warning("container.created_with_warning", name=spec.name, warning=warning)
    refuse_hidden(client, str(answer["Id"]), spec, volumes)
    return str(answer["Id"]), True


def start(client: APIClient, container_id: str, *, init_binary: str) -> ContainerState | None:
    """What it is like right after."""
    from docker.errors import APIError

    try:
        client.start(container_id)
    except APIError as error:
        if error.status_code == 404 and "no such container" in str(error.explanation).lower():
            raise lost(container_id) from error
        raise start_error(container_id[:12], error, init_binary=init_binary) from error
    return inspect(client, container_id)


def signal(client: APIClient, container_id: str, name: str) -> bool:
    """False if there was nothing to signal."""
    try:
        client.kill(container_id, name)
    except Exception as error:
        if is_status(error, 404, 409):
            return False
        if is_status(error, 500):  # ended between the engine's look and its kill, or Podman's way of saying 409
            state = inspect(client, container_id)
            if state is None or not state.is_running:
                return False
            raise _engine_error(f"the engine could not signal {container_id[:12]}: {error}") from error
        raise
    return True


def remove(client: APIClient, container_id: str) -> bool:
    """False if someone else is removing it at this moment."""
    try:
        client.remove_container(container_id, v=True, force=True)
    except Exception as error:
        if is_status(error, 404):
            return True
        if is_status(error, 409):
            return False
        if is_status(error, 500):  # a mount that is busy for a moment, a process that dies slowly
            raise _engine_error(f"the engine could not remove {container_id[:12]}: {error}") from error
        raise
    return True


def lost(container_id: str) -> NodeFaultError:
    return NodeFaultError(f"container {container_id[:12]} does not exist any more", reason="CONTAINER_LOST")


def _await_name(client: APIClient, name: str, *, is_taken: bool) -> ContainerState | None:
    """The container of that name. The engine reserves a name some time before its container can be seen."""
    patience_until = time.monotonic() + (_NAME_PATIENCE_SECONDS if is_taken else 0)
    while True:
        found = inspect(client, name)
        if found is not None or time.monotonic() >= patience_until:
            return found
        time.sleep(_NAME_LOOK_SECONDS)


def _is_name_taken(error: Any) -> bool:
    """Docker answers 409; Podman 500 with these words."""
    return error.status_code == 409 or (error.status_code == 500 and "already in use" in str(error.explanation).lower())


def _engine_error(message: str) -> TransientError:
    return TransientError(message, reason="ENGINE_ERROR")
