"""Maps what the engine and its client say onto the errors of this package."""

from __future__ import annotations

import http.client
import re
from typing import TYPE_CHECKING

from nodeservice.errors import NodeFaultError, NodeServiceError, RequestError, TransientError
from nodeservice.runtime.images import parse_image

if TYPE_CHECKING:
    from docker.errors import APIError

# What a registry says, as the engine repeats it. The order of the three groups matters: a rate limit or a name that does
# not resolve must never be taken for a missing image, for then the user is blamed for an outage.
_REGISTRY_TROUBLE = re.compile(
    r"toomanyrequests|too many requests|rate limit|no such host|server misbehaving|connection refused|connection reset"
    r"|timeout|timed out|\beof\b|network is unreachable|no route to host|unexpected http status: 5\d\d|x509|tls:",
)
_ACCESS_DENIED = re.compile(
    r"pull access denied|access to the resource is denied|unauthorized|authentication required|no basic auth credentials"
    r"|403 forbidden|\bdenied:",
)
_NO_SUCH_IMAGE = re.compile(
    r"manifest unknown|name unknown|name_unknown|repository name not known|no such image|no such manifest"
    r"|manifest for .* not found|not found: manifest|does not exist|invalid reference format"
    r"|invalid repository name|: not found$",
)
_NOT_FOR_US = re.compile(
    r"no matching manifest|no match for platform|no image found in|cannot be used on this platform|max depth exceeded"
    r"|unsupported.* media ?type|unsupported image-specific operation|invalid rootfs in image configuration"
    r"|layers from manifest don't match|invalid tar header",
)
"""The registry has it, and no try will make this engine take it."""
_DISK_FULL = "no space left on device"
_IMAGE_NOT_KNOWN = "image not known"
"""Podman's own API says this with status 500."""
_INIT_MISSING = "container-init binary not found"
_GPU_STACK = re.compile(r"could not select device driver|nvidia-container|libnvidia|cdi device|unresolvable cdi")
_NO_DRIVER = "could not select device driver"
_NO_DRIVER_HINT = "restart the engine: it looks for NVIDIA's hook and for CDI only when it starts"
_NOT_EXECUTABLE = re.compile(
    r"executable file not found|no such file or directory|permission denied|exec format error|is a directory"
    r"|not a directory",
)
_LONGEST_TEXT = 600
_HALF_STARTED = re.compile(r"id already in use|with given id already exists|task .*already exists")
"""What containerd and the runtime say of a container that a killed dockerd had handed to them, and has forgotten."""
_CONTAINERD_AWAY = re.compile(r": unavailable$")
"""How Docker's words end when it cannot reach containerd, which may be restarted by itself; the status is 500 then."""
# runc, crun and Docker put the word exec before the command; a mount that fails with the same words has no such word.
_ABOUT_THE_COMMAND = re.compile(r"\bexec[:` ]|exec user process|executable file|cannot find.*in \$path|open executable")


class InitMissingError(NodeFaultError):
    """Podman's create: the program that it would run as PID 1 is not installed."""


def engine_unavailable(error: BaseException, *, address: str = "") -> TransientError:
    at = f" at {address}" if address else ""
    return TransientError(
        f"the container engine{at} cannot be reached: {_root_cause(error)}",
        reason="ENGINE_UNAVAILABLE",
        hint="is it running, and may this user open its socket?",
    )


def _root_cause(error: BaseException) -> str:
    """What the kernel said, which the libraries wrap many times over; else what they say."""
    inner, found = error, ""
    for _ in range(10):
        if isinstance(inner, TimeoutError):
            found = "it does not answer"
        elif isinstance(inner, OSError) and inner.strerror:
            found = inner.strerror
        following = inner.__cause__ or inner.__context__
        if following is None:
            break
        inner = following
    return found or _shorten(str(error) or type(error).__name__)


def translate(error: Exception, *, doing: str) -> NodeServiceError:
    """The general case: unreachable or silent is transient, an error of the server is a fault of this node.

    `doing` is what was tried, for the message. Callers handle the answers that mean something special before this.
    """
    import requests
    from docker.errors import APIError, DockerException

    if isinstance(error, NodeServiceError):
        return error
    if isinstance(error, APIError):
        message = f"the container engine failed to {doing}: {explanation(error)}"
        if _is_away(error):
            return TransientError(message, reason="ENGINE_UNAVAILABLE")
        return NodeFaultError(message, reason="ENGINE_ERROR")
    if isinstance(error, requests.exceptions.ReadTimeout | TimeoutError):
        return TransientError(f"the container engine did not {doing} in time", reason="ENGINE_TIMEOUT")
    if isinstance(error, OSError | http.client.HTTPException | requests.exceptions.RequestException | DockerException):
        return engine_unavailable(error)
    return NodeFaultError(f"the container engine failed to {doing}: {_shorten(repr(error))}", reason="ENGINE_ERROR")


def pull_error(image: str, message: str, *, status: int | None = None) -> NodeServiceError:
    """What a failed pull means, from the engine's words; `status` is the HTTP status when it answered with one."""
    text = message.lower()
    said = f"pulling {image!r} failed: {_shorten(message)}"
    if _DISK_FULL in text:
        return NodeFaultError(said, reason="IMAGE_PULL_FAILED", hint="the engine's disk is full")
    if _REGISTRY_TROUBLE.search(_without_name(text, image)) or status == 429:
        return TransientError(said, reason="IMAGE_PULL_FAILED")
    if _ACCESS_DENIED.search(text) or status in {401, 403}:
        return RequestError(
            said,
            reason="IMAGE_ACCESS_DENIED",
            field="image",
            hint="check the name, and the node's registry credentials (docker login)",
        )
    if _NOT_FOR_US.search(text):
        hint = (
            "the registry has it, but it is not for this kind of machine, or not a sound image that the engine can use"
        )
        return RequestError(said, reason="IMAGE_NOT_FOUND", field="image", hint=hint)
    if _NO_SUCH_IMAGE.search(text) or status in {400, 404}:
        return RequestError(said, reason="IMAGE_NOT_FOUND", field="image")
    return TransientError(said, reason="IMAGE_PULL_FAILED")


def _without_name(text: str, image: str) -> str:
    """What is said of an image called `tools/timeout` has that word in it."""
    path = parse_image(image).canonical.partition("/")[2].removeprefix("library/")
    if not path:
        return text
    return re.sub(rf"(?<![\w.-])(?:[\w.:\[\]-]+/)*{re.escape(path)}(?::[\w.-]+)?(?![\w-])", "", text)


def create_error(name: str, image: str, error: APIError) -> NodeServiceError:
    """What a refused create means."""
    said = explanation(error)
    text = said.lower()
    if (error.status_code == 404 and "image" in text) or _IMAGE_NOT_KNOWN in text:
        return RequestError(f"image {image!r} is not on this node: {said}", reason="IMAGE_NOT_FOUND", field="image")
    if _INIT_MISSING in text:
        return InitMissingError(f"the engine could not create {name!r}: {said}", reason="NODE_FAULT")
    if _DISK_FULL in text or _GPU_STACK.search(text):
        return NodeFaultError(f"the engine could not create {name!r}: {said}", reason="NODE_FAULT")
    hint = "the image names no command: give one" if "no command specified" in text else None
    if hint or error.status_code in {400, 404, 406, 409, 422}:
        return RequestError(f"the engine refused to create {name!r}: {said}", reason="CREATE_FAILED", hint=hint)
    return translate(error, doing=f"create {name!r}")


def start_error(container: str, error: APIError, *, init_binary: str) -> NodeServiceError:
    """What a refused start means: the user's command, this node's GPU stack or disk, or something else in the request."""
    said = explanation(error)
    text = said.lower()
    if "executable file not found" in text and re.search(rf'exec: "[^"]*{re.escape(init_binary.lower())}"', text):
        return NodeFaultError(
            f"the engine's init program is missing: {said}",
            reason="NODE_FAULT",
            hint=f"install {init_binary} (the package tini), or set init-path for the engine",
        )
    if _ABOUT_THE_COMMAND.search(text) and _NOT_EXECUTABLE.search(text):
        return command_error(said)
    if _DISK_FULL in text or _GPU_STACK.search(text):
        hint = _NO_DRIVER_HINT if _NO_DRIVER in text else None
        return NodeFaultError(f"the engine could not start {container}: {said}", reason="NODE_FAULT", hint=hint)
    if _is_away(error):
        return translate(error, doing=f"start {container}")
    if _HALF_STARTED.search(text):
        return NodeFaultError(
            f"the engine was ended while it started {container}: {said}",
            reason="ENGINE_FAULT",
            hint="whether the task has run at all is not known",
        )
    return RequestError(f"the engine could not start {container}: {said}", reason="START_FAILED")


def command_error(said: str) -> RequestError:
    return RequestError(
        f"the command could not be executed: {said}",
        reason="COMMAND_NOT_FOUND",
        hint="it must exist in the image and be executable on this machine; a shell command needs /bin/sh in the image",
    )


def explanation(error: APIError) -> str:
    return _shorten(str(error.explanation or error))


def _is_away(error: APIError) -> bool:
    """The engine, or what it needs, is not there for now: the same call may succeed later."""
    return error.status_code in {429, 502, 503, 504} or bool(_CONTAINERD_AWAY.search(str(error.explanation).strip()))


def is_status(error: Exception, *statuses: int) -> bool:
    """Whether the engine answered with one of these HTTP statuses."""
    from docker.errors import APIError

    return isinstance(error, APIError) and error.status_code in statuses


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"
