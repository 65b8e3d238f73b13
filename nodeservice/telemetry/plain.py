"""Makes a text fit to be read in a log, whoever wrote it."""

from __future__ import annotations


def plain(text: str) -> str:
    """Escapes all but printable text, line ends and tabs: it could steer a terminal, or hide its entry from `journalctl`."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in text)
