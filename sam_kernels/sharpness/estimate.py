"""A measured number that knows what it was averaged from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


class Estimate(float):
    """A float: the mean of `values`, with its standard error.

    ``error = s / sqrt(n)`` with s the standard deviation (n - 1) of the values; 0 for a value that is exact
    and nan for a single draw of something random.

    Args:
        values: what was averaged, finite or not; at least one.
        is_random: whether another seed or sample would give other values.
        weights: what each value counts in the mean, as many (default: all alike).

    Raises:
        ValueError: without values, or if weights do not fit them.

    Example:
        >>> found = Estimate([1.0, 2.0, 3.0])
        >>> found + 1, found.error, found.values
        (3.0, 0.5773502691896257, (1.0, 2.0, 3.0))
    """

    values: tuple[float, ...]
    weights: tuple[float, ...]
    error: float

    def __new__(
        cls, values: Sequence[float], *, is_random: bool = True, weights: Sequence[float] | None = None
    ) -> Estimate:
        kept = tuple(float(v) for v in values)
        shares = [1.0] * len(kept) if weights is None else [float(w) for w in weights]
        if not kept or len(shares) != len(kept) or not sum(shares) > 0:
            raise ValueError(
                f"Estimate: {len(kept)} values and {len(shares)} weights; expected at least one value, and "
                "as many weights with a positive sum"
            )
        total = sum(shares)
        mean = math.fsum(w * v for w, v in zip(shares, kept, strict=True)) / total
        self = super().__new__(cls, mean)
        self.values, self.weights = kept, tuple(shares)
        if not is_random:
            self.error = 0.0
        elif len(kept) == 1:
            self.error = math.nan
        else:
            spread = math.fsum(w * (v - mean) ** 2 for w, v in zip(shares, kept, strict=True)) / total
            self.error = math.sqrt(spread / (len(kept) - 1))
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[tuple[float, ...]], dict[str, Any]]:
        """For copies and pickles."""
        return (self.values,), {"is_random": self.error != 0.0, "weights": self.weights}

    def __str__(self) -> str:
        return f"{float(self):.6g}" + (f" ± {self.error:.2g}" if self.error > 0 else "")
