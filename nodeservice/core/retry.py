"""How long to wait before trying again: exponential, capped, jittered. The caller brings the randomness."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """`delay(n, u)` for the n-th failure (from 0) and `u` uniform in [0, 1): between half and all of min(max, first·2ⁿ)."""

    first_seconds: float = 0.5
    max_seconds: float = 60.0

    def delay(self, failures: int, uniform: float) -> float:
        whole = min(self.max_seconds, self.first_seconds * 2.0 ** min(failures, 32))
        return whole * (0.5 + 0.5 * uniform)


def is_worth_telling(failures: int) -> bool:
    """Of what is tried for ever: the first failure, the tenth, and each hundredth."""
    return failures in (1, 10) or failures % 100 == 0
