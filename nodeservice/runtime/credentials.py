"""Looks up what the Docker configuration knows of a registry."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from typing import Any

import structlog

log = structlog.get_logger(__name__)

_HELPER_SECONDS = 30.0
_TOKEN_USER = "<token>"  # noqa: S105
_NOT_FOUND = b"credentials not found"


@dataclass(frozen=True, slots=True)
class RegistryAuth:
    """The X-Registry-Auth value, None for an anonymous pull; and why there is none although there should be one."""

    header: str | None = None
    trouble: str = ""


def registry_auth(repository: str) -> RegistryAuth:
    """For pulling this repository. Blocking: helpers are programs.

    Read anew for each pull, for tokens expire and people log in later. A configuration or helper that is broken or silent
    does not stop the pull, which may need no credentials at all.
    """
    from docker import auth

    try:
        registry, _ = auth.resolve_repository_name(repository)
        config = auth.load_config()
        helper = config.get_credential_store(registry)
        found = _ask(helper, auth.INDEX_URL if registry == auth.INDEX_NAME else registry) if helper else None
        if found is None:
            found = auth.AuthConfig({"auths": config.auths}).resolve_authconfig(registry)
        if not found:
            return RegistryAuth()
        return RegistryAuth(base64.urlsafe_b64encode(json.dumps(found).encode()).decode("ascii"))
    except Exception as error:  # whatever somebody wrote into that file, or a helper says
        # What it says may hold a secret; only a helper's failure is told in words, which are ours.
        trouble = (
            str(error) if isinstance(error, _HelperError) else f"the Docker configuration ({type(error).__name__})"
        )
        log.warning("registry.credentials_unreadable", repository=repository, what=trouble)
        return RegistryAuth(trouble=trouble)


class _HelperError(Exception):
    pass


def _ask(helper: str, server: str) -> dict[str, Any] | None:
    """What a credential helper knows of a server; None where it knows nothing. Raises _HelperError, or what JSON does."""
    program = shutil.which(f"docker-credential-{helper}")
    if program is None:
        raise _HelperError(f"docker-credential-{helper} is not installed")
    # In a session of its own, so that what it has started ends with it.
    with subprocess.Popen(  # noqa: S603 the operator names it
        [program, "get"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(server.encode(), timeout=_HELPER_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise _HelperError(f"docker-credential-{helper} did not answer within {_HELPER_SECONDS:g} s") from None
    if process.returncode != 0:
        if _NOT_FOUND in said:
            return None
        raise _HelperError(f"docker-credential-{helper} failed with exit code {process.returncode}")
    told = json.loads(said)
    user, secret = told["Username"], told["Secret"]
    if not user and not secret:
        return None
    named = {"identitytoken": secret} if user == _TOKEN_USER else {"username": user, "password": secret}
    return {"serveraddress": server, **named}
