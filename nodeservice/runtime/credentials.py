"""Looks up what the Docker configuration knows of a registry."""

from __future__ import annotations

import structlog

log = structlog.get_logger(__name__)


def registry_auth_header(repository: str) -> str | None:
    """The X-Registry-Auth value for pulling this repository, None for an anonymous pull. Blocking: helpers are programs.

    Read anew for each pull, for tokens expire and people log in later. A configuration or helper that is broken does not
    stop the pull, which may need no credentials at all.
    """
    from docker import auth
    from docker.errors import DockerException

    try:
        registry, _ = auth.resolve_repository_name(repository)
        found = auth.load_config().resolve_authconfig(registry)
        if not found:
            return None
        header = auth.encode_header(found)
    except (DockerException, OSError, ValueError, KeyError) as error:
        log.warning("registry.credentials_unreadable", repository=repository, error_type=type(error).__name__)
        return None
    return header.decode("ascii") if isinstance(header, bytes) else str(header)
