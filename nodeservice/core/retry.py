"""How long to wait before trying again: exponential, capped, jittered. The caller brings the randomness."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """`delay(n, u)` after n failures, `u` uniform in [0, 1): between half and all of min(max, first·2ⁿ⁻¹)."""

    first_seconds: float
    max_seconds: float

    def delay(self, failures: int, uniform: float) -> float:
        whole = min(self.max_seconds, self.first_seconds * 2.0 ** min(failures - 1, 32))
        return whole * (0.5 + 0.5 * uniform)


def is_worth_telling(failures: int) -> bool:
    """Of what is tried for ever: the first failure, the tenth, and each hundredth."""
    return failures in (1, 10) or failures % 100 == 0
