"""Certificates near their end and past it are told, by name and date."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nodeservice.certificates import EXPIRED, EXPIRES, Term, doubts_about, read_terms
from tests.certificates import make_ca, make_pair, openssl

NOW = datetime(2030, 3, 1, 12, tzinfo=UTC)


def term(*, holds: timedelta, left: timedelta) -> Term:
    return Term(option="tls_cert", path=Path("/n.pem"), begins_at=NOW + left - holds, ends_at=NOW + left)


@pytest.mark.parametrize(
    ("holds", "left", "name"),
    [
        (timedelta(days=365), timedelta(days=15), None),
        (timedelta(days=365), timedelta(days=13), EXPIRES),
        (timedelta(days=365), timedelta(seconds=-1), EXPIRED),
        (timedelta(hours=24), timedelta(hours=8), None),
        (timedelta(hours=24), timedelta(hours=5), EXPIRES),
    ],
)
def test_an_end_is_told_in_time_and_not_all_the_time(holds: timedelta, left: timedelta, name: str | None) -> None:
    one = term(holds=holds, left=left)
    doubts = doubts_about([one], NOW)
    assert list(doubts) == ([name] if name else [])
    assert all("tls_cert /n.pem" in words and one.ends_on in words for words in doubts.values())


def test_what_files_hold_is_read_as_openssl_reads_it(tmp_path: Path) -> None:
    ca = make_ca(tmp_path, "ca")
    cert, _ = make_pair(tmp_path, "node", ca)
    chain, authority = read_terms(cert, ca)
    assert (chain.option, chain.path, authority.option, authority.path) == ("tls_cert", cert, "tls_ca", ca)
    for one in (chain, authority):
        assert one.ends_at - one.begins_at == timedelta(days=2)
        assert abs(one.begins_at - datetime.now(UTC)) < timedelta(minutes=10)
    far = tmp_path / "far.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", "-x509", *curve, "-keyout", tmp_path / "far.key", "-out", far, "-days", "36500", "-subj", "/CN=far")
    both = tmp_path / "both.pem"
    both.write_text(f"of the year 2126\n{far.read_text()}{ca.read_text()}")
    (last,) = read_terms(None, both)
    assert last.ends_at.year > 2100, "one authority that holds on is enough"
    (first,) = read_terms(both, None)
    assert first.ends_at == authority.ends_at, "a chain is as good as its first end"


def test_what_is_no_certificate_has_no_end(tmp_path: Path) -> None:
    odd = tmp_path / "odd.pem"
    odd.write_text("-----BEGIN CERTIFICATE-----\nMAMCAQE=\n-----END CERTIFICATE-----\n")
    assert read_terms(odd, tmp_path / "missing.pem") == ()
    assert read_terms(None, None) == ()
