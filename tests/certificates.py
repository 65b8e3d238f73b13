"""Makes certificates for TLS on loopback."""

from __future__ import annotations

import subprocess
from pathlib import Path


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=30)


def make_ca(folder: Path, name: str) -> Path:
    """The certificate; its key lies beside it."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", "-x509", *curve, "-keyout", key, "-out", cert, "-days", "2", "-subj", f"/CN={name}")
    return cert


def make_pair(folder: Path, name: str, ca: Path, *, days: int = 2) -> tuple[Path, Path]:
    """Certificate and key for this host, signed by `ca`; with -1 day it ended yesterday."""
    cert, key, request, extensions = (folder / f"{name}.{end}" for end in ("pem", "key", "csr", "ext"))
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", *curve, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
    extensions.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    signer = ["-CA", ca, "-CAkey", ca.with_suffix(".key"), "-CAcreateserial"]
    openssl("x509", "-req", "-in", request, *signer, "-out", cert, "-days", str(days), "-extfile", extensions)
    return cert, key
