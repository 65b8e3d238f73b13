"""Pulls images: one pull per image however many wait, watched for silence and for its total time."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import time
from dataclasses import replace
from typing import Any

import structlog

from nodeservice.core.model import PullPolicy
from nodeservice.errors import NodeServiceError, RequestError, TransientError
from nodeservice.ports import PulledImage, PullProgress
from nodeservice.runtime.connection import EngineConnection
from nodeservice.runtime.credentials import registry_auth
from nodeservice.runtime.errors import engine_unavailable, is_status, pull_error, translate
from nodeservice.runtime.images import ImageName, choose_digest, parse_image
from nodeservice.runtime.local_images import list_images
from nodeservice.runtime.streams import StreamRefusedError
from nodeservice.threads import Threads

log = structlog.get_logger(__name__)

_PULL_THREADS = 16
_ABORT_SECONDS = 5.0


class ImagePulls:
    """Waiters for the same image share one pull; the last to be cancelled ends it."""

    def __init__(
        self, connection: EngineConnection, *, total_timeout_seconds: float, inactivity_timeout_seconds: float
    ) -> None:
        self._connection = connection
        self._total_timeout_seconds = total_timeout_seconds
        self._inactivity_timeout_seconds = inactivity_timeout_seconds
        self._threads = Threads(_PULL_THREADS, name="image-pull")
        self._shared: dict[str, _SharedPull] = {}
        self._volumes: dict[str, tuple[str, ...]] = {}
        """That images declare, by the digest of their pull."""

    async def pull(self, image: str, *, policy: PullPolicy, on_progress: PullProgress | None) -> PulledImage:
        name = parse_image(image)
        if policy is not PullPolicy.ALWAYS or name.is_id:
            present = await self._present(image, name, announced=None)
            if present is not None:
                return present
            if policy is PullPolicy.NEVER or name.is_id:
                raise RequestError(
                    f"image {image!r} is not on this node",
                    reason="IMAGE_NOT_FOUND",
                    field="image",
                    hint="an image id cannot be pulled" if name.is_id else "the pull policy is never",
                )
        shared = self._shared.get(name.key)
        if shared is None:
            shared = self._shared[name.key] = _SharedPull()
            shared.task = asyncio.create_task(self._run(image, name, shared), name=f"pull {image}")
        return await self._wait(shared, on_progress)

    async def volumes_of(self, image: str) -> tuple[str, ...]:
        """Those that it declares; an image of whose pull another process knew is looked at."""
        if image not in self._volumes:
            found = await self._present(image, parse_image(image), announced=None)
            return found.volumes if found is not None else ()
        return self._volumes[image]

    async def close(self) -> None:
        for shared in list(self._shared.values()):
            if shared.task is not None:
                shared.task.cancel()
                await asyncio.wait({shared.task}, timeout=_ABORT_SECONDS)
        self._threads.close()

    async def _wait(self, shared: _SharedPull, on_progress: PullProgress | None) -> PulledImage:
        assert shared.task is not None
        shared.waiters_count += 1
        if on_progress is not None:
            shared.listeners.append(on_progress)
        try:
            return await asyncio.shield(shared.task)
        except asyncio.CancelledError:
            if shared.task.cancelled():  # we are being closed, and this waiter was not asked to stop
                raise TransientError("the pull was ended", reason="IMAGE_PULL_FAILED") from None
            raise
        finally:
            shared.waiters_count -= 1
            if on_progress is not None:
                shared.listeners.remove(on_progress)
            if shared.waiters_count == 0 and not shared.task.done():
                self._forget(shared)  # a newcomer starts afresh instead of joining a pull that is being ended
                shared.task.cancel()

    async def _run(self, image: str, name: ImageName, shared: _SharedPull) -> PulledImage:
        try:
            transfer = _Transfer(self._connection, image, name, shared)
            log.info("image.pull_started", image=image)
            begun = time.monotonic()
            before = await self._ids()
            await self._watch(transfer, image)
            pulled = await self._present(image, name, announced=transfer.announced_digest)
            if pulled is None:
                raise TransientError(f"image {image!r} vanished after its pull", reason="IMAGE_PULL_FAILED")
            seconds = round(time.monotonic() - begun, 3)
            log.info("image.pulled", image=image, digest=pulled.digest, duration_seconds=seconds)
            return replace(pulled, is_new=pulled.image_id not in before)
        finally:
            self._forget(shared)

    async def _ids(self) -> frozenset[str]:
        listed = await self._connection.call(list_images, doing="list images")
        return frozenset(image.image_id for image in listed)

    async def _watch(self, transfer: _Transfer, image: str) -> None:
        """Run the transfer in its thread, and cut it when it is silent for too long, lasts too long, or is not wanted."""
        work = asyncio.ensure_future(self._threads.run(transfer.run))
        try:
            while not work.done():
                now = time.monotonic()
                # The clocks start with the transfer, not while it waits for a free thread.
                total_left = (transfer.started_at or now) + self._total_timeout_seconds - now
                silence_left = (transfer.progressed_at or now) + self._inactivity_timeout_seconds - now
                if total_left <= 0 or silence_left <= 0:
                    raise _timeout(image, self._total_timeout_seconds if total_left <= 0 else None, transfer)
                await asyncio.wait({work}, timeout=min(total_left, silence_left))
            work.result()
        finally:
            if not work.done():
                transfer.abort()
                await asyncio.wait({work}, timeout=_ABORT_SECONDS)
            if work.done() and not work.cancelled():
                work.exception()  # seen: an aborted transfer fails, and nobody else will ask

    async def _present(self, image: str, name: ImageName, *, announced: str | None) -> PulledImage | None:
        def inspect(client: Any) -> dict[str, Any] | None:
            try:
                found: dict[str, Any] = client.inspect_image(name.lookup)
            except Exception as error:
                if is_status(error, 404):
                    return None
                if is_status(error, 400):  # its grammar is narrower than ours
                    raise pull_error(image, str(error), status=400) from error
                raise
            return found

        found = await self._connection.call(inspect, doing=f"look for image {image!r}")
        if found is None:
            return None
        image_id = str(found["Id"])
        digest = choose_digest(
            name, image_id=image_id, repo_digests=found.get("RepoDigests") or (), announced=announced
        )
        volumes = self._volumes[digest] = tuple((found.get("Config") or {}).get("Volumes") or ())
        size_bytes = int(found.get("Size") or 0)
        return PulledImage(
            digest=digest,
            image_id=image_id,
            size_bytes=size_bytes,
            name=name.full_name,
            volumes=volumes,
        )

    def _forget(self, shared: _SharedPull) -> None:
        for key in [key for key, value in self._shared.items() if value is shared]:
            del self._shared[key]


class _SharedPull:
    def __init__(self) -> None:
        self.task: asyncio.Task[PulledImage] | None = None
        self.waiters_count = 0
        self.listeners: list[PullProgress] = []

    def report(self, done_bytes: int, total_bytes: int) -> None:
        """From the pulling thread. A listener that fails is not heard of again, and harms no one."""
        for listener in list(self.listeners):
            try:
                listener(done_bytes, total_bytes)
            except Exception as error:
                log.warning("image.progress_listener_failed", error_type=type(error).__name__)


class _Transfer:
    """One pull call to the engine, run in a thread; the engine gives up the pull when the connection is cut."""

    def __init__(self, connection: EngineConnection, image: str, name: ImageName, shared: _SharedPull) -> None:
        self._connection = connection
        self._image = image
        self._name = name
        self._shared = shared
        self._stream = connection.stream()
        self._layers: dict[str, tuple[int, int]] = {}
        self._last_words: dict[str, str] = {}
        self._credentials_trouble = ""
        self.started_at: float | None = None
        self.progressed_at: float | None = None
        self.announced_digest: str | None = None

    def run(self) -> None:
        self.started_at = self.progressed_at = time.monotonic()
        try:
            self._transfer()
        except NodeServiceError:
            raise
        except StreamRefusedError as error:
            raise self._failure(error.message, status=error.status) from error
        except (ConnectionRefusedError, FileNotFoundError, PermissionError) as error:
            raise engine_unavailable(error) from error
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(
                f"pulling {self._image!r} failed: the engine broke off", reason="IMAGE_PULL_FAILED"
            ) from error
        except Exception as error:
            raise translate(error, doing=f"pull {self._image!r}") from error
        finally:
            with contextlib.suppress(OSError):
                self._stream.close()

    def abort(self) -> None:
        self._stream.abort()

    def _transfer(self) -> None:
        auth = registry_auth(self._name.repository)
        self._credentials_trouble = auth.trouble
        self._stream.open(
            "POST",
            self._connection.api_path("/images/create"),
            query={"fromImage": self._name.repository, "tag": self._name.pull_tag},
            headers={"X-Registry-Auth": auth.header} if auth.header else None,
        )
        for message in self._stream.messages():
            if error := message.get("error") or (message.get("errorDetail") or {}).get("message"):
                raise self._failure(str(error))
            self._note(message)

    def _failure(self, said: str, *, status: int | None = None) -> NodeServiceError:
        error = pull_error(self._image, said, status=status)
        if error.reason != "IMAGE_ACCESS_DENIED" or not self._credentials_trouble:
            return error
        return TransientError(
            f"{error.message}; this node's registry credentials could not be read: {self._credentials_trouble}",
            reason="IMAGE_PULL_FAILED",
            hint="check the Docker configuration of the user that the service runs as",
        )

    def _note(self, message: dict[str, Any]) -> None:
        status = str(message.get("status") or "")
        if status.startswith("Digest: "):
            self.announced_digest = status.removeprefix("Digest: ").strip()
        layer = str(message.get("id") or "")
        detail = message.get("progressDetail") or {}
        current, total = int(detail.get("current") or 0), int(detail.get("total") or 0)
        # The engine counts down the seconds to its next try; that is not progress.
        words = "Retrying" if status.startswith("Retrying") else f"{status} {current}"
        if words != self._last_words.get(layer) and words != "Retrying":
            self.progressed_at = time.monotonic()
        self._last_words[layer] = words
        if status == "Downloading":
            self._layers[layer] = (current, max(current, total))
        elif status in {"Download complete", "Pull complete"} and layer in self._layers:
            whole = self._layers[layer][1]
            self._layers[layer] = (whole, whole)
        else:
            return
        done, whole = (sum(column) for column in zip(*self._layers.values(), strict=True))
        self._shared.report(done, whole)


def _timeout(image: str, total_seconds: float | None, transfer: _Transfer) -> TransientError:
    silent = round(time.monotonic() - (transfer.progressed_at or time.monotonic()), 1)
    why = f"it took longer than {total_seconds:g} s" if total_seconds else f"nothing moved for {silent:g} s"
    return TransientError(f"pulling {image!r} was given up: {why}", reason="IMAGE_PULL_TIMEOUT")
