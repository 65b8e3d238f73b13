"""What the doctor says: of each limit how it is kept, by which evidence, and what to do where it is not hard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    HARD = "hard"
    """The kernel refused, or holds the value that was asked for."""
    WATCHED = "watched"
    """The service measured, and ended the task soon after it had crossed the limit."""
    MISSING = "missing"
    """This machine can't keep it as it is set up now."""
    FAILED = "failed"
    """It should hold, and it did not, or that could not be shown."""

    @property
    def is_kept(self) -> bool:
        return self in (State.HARD, State.WATCHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    limit: str
    state: State
    evidence: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """`facts` are about the machine, by name, in words; `advice` what would be better without a limit being at stake."""

    findings: Sequence[Finding]
    facts: Mapping[str, str]
    advice: Sequence[str] = ()
    seconds: float = 0.0

    @property
    def is_sound(self) -> bool:
        """Whether every limit is kept in one way or the other."""
        return all(finding.state.is_kept for finding in self.findings)

    def as_dict(self) -> dict[str, object]:
        """JSON-able."""
        return {
            "sound": self.is_sound,
            "checks": [
                {
                    "limit": finding.limit,
                    "state": finding.state.value,
                    "evidence": finding.evidence,
                    "remedy": finding.remedy,
                }
                for finding in self.findings
            ],
            "facts": dict(self.facts),
            "advice": list(self.advice),
            "seconds": round(self.seconds, 3),
        }
