"""Whether a node may call itself what it does, by the names in the certificate that it shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import grpc.aio

from nodeservice.errors import RequestError
from nodeservice.master.checks import shown

if TYPE_CHECKING:
    from aiohttp import web

_NAMES = ("x509_common_name", "x509_subject_alternative_name")


def names_of_call(context: grpc.aio.ServicerContext[object, object]) -> set[str]:
    told = context.auth_context()
    return {name.decode(errors="replace") for kind in _NAMES for name in told.get(kind, ())}


def names_of_post(request: web.Request) -> set[str]:
    """As `ssl.SSLSocket.getpeercert` tells them."""
    certificate = (request.transport.get_extra_info("peercert") if request.transport else None) or {}
    subject = {value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"}
    return subject | {value for _, value in certificate.get("subjectAltName", ())}


def check_worker_id(worker_id: str, names: Iterable[str]) -> None:
    if worker_id not in names:
        listed = ", ".join(map(shown, sorted(names)))
        raise RequestError(
            f"the certificate is of {listed or 'nobody'}, not of the node {shown(worker_id)}",
            reason="WORKER_ID_NOT_CERTIFIED",
            field="worker_id",
            hint="give the node a certificate with its worker_id as common name or alternative name",
        )
