"""Reads image names and picks the digest that a pull resolved to; pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nodeservice.errors import RequestError

_DEFAULT_REGISTRY = "docker.io"
_MAX_NAME_CHARACTERS = 512
_MAX_REPOSITORY_CHARACTERS = 255
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*(?::[0-9]+)?")
_BRACKETED_DOMAIN = re.compile(r"\[[0-9a-fA-F:]+\](?::[0-9]+)?")
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LIKE_AN_ID = re.compile(r"(?:sha256:)?[0-9a-f]{1,11}")
"""Of twelve digits and more, as engines print them, an id is meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageName:
    """A name taken apart. `repository` is as written; `canonical` has registry and library filled in, to compare by."""

    written: str
    repository: str
    canonical: str
    tag: str | None
    digest: str | None
    is_id: bool = False

    @property
    def pull_tag(self) -> str:
        """What the engine's pull takes as its tag: the digest if there is one."""
        return self.digest or self.tag or "latest"

    @property
    def lookup(self) -> str:
        """What to ask the engine for: it takes a name of few hexadecimal digits for the beginning of an image's id."""
        return self.full_name if _LIKE_AN_ID.fullmatch(self.written) else self.written

    @property
    def full_name(self) -> str:
        """What it is known by after a pull: registry and library filled in, the digest instead of a tag beside it."""
        if self.is_id:
            return self.repository
        return f"{self.canonical}@{self.digest}" if self.digest else f"{self.canonical}:{self.tag or 'latest'}"

    @property
    def key(self) -> str:
        """The same for all spellings of one image."""
        return f"{self.canonical}|{self.pull_tag}"


def parse_image(text: str) -> ImageName:
    """Take a name apart as the engine does. Raises RequestError (IMAGE_NOT_FOUND) that names what is wrong."""
    if not text:
        raise _invalid(text, "it is empty")
    if len(text) > _MAX_NAME_CHARACTERS:
        raise _invalid(text[:64] + "…", f"it is longer than {_MAX_NAME_CHARACTERS} characters")
    if _DIGEST.fullmatch(text):  # an image's id
        return ImageName(written=text, repository=text, canonical=text, tag=None, digest=None, is_id=True)
    rest, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise _invalid(text, "the digest must be sha256: and 64 hexadecimal digits")
    head, colon, tag = rest.rpartition(":")
    if colon and "/" not in tag:
        if not _TAG.fullmatch(tag):
            raise _invalid(text, "the tag has characters that a tag cannot have, or is empty")
    else:
        head, tag = rest, ""
    if not head:
        raise _invalid(text, "it has no repository")
    if len(head) > _MAX_REPOSITORY_CHARACTERS:
        raise _invalid(text[:64] + "…", f"its repository is longer than {_MAX_REPOSITORY_CHARACTERS} characters")
    registry, path = _split_registry(head)
    if not (_DOMAIN.fullmatch(registry) or _BRACKETED_DOMAIN.fullmatch(registry)):
        raise _invalid(text, f"{registry!r} is no registry address")
    if not all(_COMPONENT.fullmatch(part) for part in path.split("/")):
        raise _invalid(text, "a repository has lower-case letters, digits and single separators only")
    return ImageName(
        written=text,
        repository=head,
        canonical=f"{registry}/{path}",
        tag=tag or None,
        digest=digest or None,
    )


def choose_digest(name: ImageName, *, image_id: str, repo_digests: Sequence[str], announced: str | None) -> str:
    """`repository@sha256:…` of the repository asked for, else the image id.

    An image can have several digests in one repository; the one `announced` by the pull, or asked for, comes first.
    """
    known: dict[str, str] = {}
    for entry in repo_digests:
        repository, _, digest = entry.partition("@")
        try:
            if parse_image(repository).canonical == name.canonical and digest:
                known.setdefault(digest, entry)
        except RequestError:
            continue  # `<none>@sha256:…` of an image that lost its name
    for wanted in (name.digest, announced):
        if wanted in known:
            return known[wanted]
    return next(iter(known.values()), image_id)


def _split_registry(head: str) -> tuple[str, str]:
    registry, slash, path = head.partition("/")
    if not slash or not ("." in registry or ":" in registry or registry == "localhost"):
        registry, path = _DEFAULT_REGISTRY, head
    elif registry == "index.docker.io":
        registry = _DEFAULT_REGISTRY
    return registry, f"library/{path}" if registry == _DEFAULT_REGISTRY and "/" not in path else path


def _invalid(text: str, why: str) -> RequestError:
    return RequestError(
        f"image {text!r} is not a valid image name: {why}",
        reason="IMAGE_NOT_FOUND",
        field="image",
        hint="write [REGISTRY/]NAME[:TAG][@sha256:DIGEST]",
    )
