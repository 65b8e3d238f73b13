"""For how long the certificates of TLS hold. What is near its end is told before calls begin to fail."""

from __future__ import annotations

import contextlib
import re
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

EXPIRES = "CERTIFICATE_EXPIRES"
EXPIRED = "CERTIFICATE_EXPIRED"

_SOON = timedelta(days=14)
_SOON_SHARE = 4
"""Of one that holds for less than eight weeks, so long before its end: one over this of its whole time."""
_BLOCK = re.compile("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """Of a file: of a certificate and its chain what ends first, of authorities what ends last."""

    option: str
    path: Path
    begins_at: datetime
    ends_at: datetime

    @property
    def ends_on(self) -> str:
        return f"{self.ends_at:%Y-%m-%d %H:%M} UTC"

    def has_expired(self, now: datetime) -> bool:
        return now > self.ends_at

    def is_soon_over(self, now: datetime) -> bool:
        return now > self.ends_at - min(_SOON, (self.ends_at - self.begins_at) / _SOON_SHARE)


def read_terms(cert: Path | None, ca: Path | None) -> tuple[Term, ...]:
    """Of the files that there are. One that can't be read is left to who uses it."""
    chain, authorities = _terms("tls_cert", cert), _terms("tls_ca", ca)
    first = sorted(chain, key=lambda term: term.ends_at)[:1]
    return (*first, *sorted(authorities, key=lambda term: term.ends_at)[-1:])


def doubts_about(terms: Sequence[Term], now: datetime) -> dict[str, str]:
    """What has expired and what soon will, by `EXPIRED` and `EXPIRES`, in words."""
    over = [term for term in terms if term.has_expired(now)]
    soon = [term for term in terms if term.is_soon_over(now) and term not in over]
    remedy = "(renew it, then restart: it is read at the start)"
    told = {
        EXPIRED: [
            f"{one.option} {one.path} has expired, on {one.ends_on}: new connections fail {remedy}" for one in over
        ],
        EXPIRES: [f"{one.option} {one.path} expires on {one.ends_on} {remedy}" for one in soon],
    }
    return {name: "; ".join(words) for name, words in told.items() if words}


def _terms(option: str, path: Path | None) -> list[Term]:
    found: list[Term] = []
    with contextlib.suppress(OSError):
        for block in _BLOCK.findall("" if path is None else path.read_text(errors="replace")):
            with contextlib.suppress(ValueError, IndexError):
                begins_at, ends_at = _validity(ssl.PEM_cert_to_DER_cert(block))
                found.append(Term(option=option, path=Path(path or ""), begins_at=begins_at, ends_at=ends_at))
    return found


def _validity(der: bytes) -> tuple[datetime, datetime]:
    """Certificate { tbs { [0] version, serial, signature, issuer, validity { from, to }, … } } (RFC 5280, 4.1)."""
    (_, certificate), *_ = _parts(der)
    (_, tbs), *_ = _parts(certificate)
    fields = list(_parts(tbs))
    (_, validity) = fields[4 if fields[0][0] == 0xA0 else 3]
    begins_at, ends_at = (_instant(tag, text.decode("ascii")) for tag, text in _parts(validity))
    return begins_at, ends_at


def _parts(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of what stands side by side in DER (X.690)."""
    at = 0
    while at < len(der):
        tag, size, at = der[at], der[at + 1], at + 2
        if size & 0x80:
            width = size & 0x7F
            size, at = int.from_bytes(der[at : at + width]), at + width
        yield tag, der[at : at + size]
        at += size


def _instant(tag: int, text: str) -> datetime:
    """UTCTime has two digits of the year, from 1950 on; GeneralizedTime has four."""
    if tag == 0x17:
        text = ("19" if int(text[:2]) >= 50 else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
