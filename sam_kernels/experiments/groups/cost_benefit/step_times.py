"""How long a step takes beside one of the base optimizer: blocks of steps in turn, on the same machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping

ROUNDS = 24
BLOCK = 10  # steps: two periods of LookSAM, so that its dear and its cheap steps are in every block


def beside(
    base: Callable[[], Iterator[float]],
    others: Mapping[str, Callable[[], Iterator[float]]],
    rounds: int,
    *,
    block: int = BLOCK,
    varying: Collection[str] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Step times as multiples of the base's, each measured in pairs of neighbouring blocks.

    In every round each of the others takes a block of steps right after, or in the next round right before,
    a block of the base. What the machine does meanwhile meets both, and the median of the ratios leaves
    out what meets one. A median would also leave out the dear blocks of those that vary by themselves:
    theirs is the time of all their blocks divided by that of the base's beside them. The first block of each
    is not counted.

    Args:
        base: makes the steps of the base; a step is taken when the next item is asked for.
        others: those of the others, by name.
        rounds: pairs for each.
        block: steps of a block.
        varying: names of those whose blocks do not all have as many gradients.
        clock: seconds.

    Returns:
        For each name "ratio", the median over the rounds or the ratio of the sums, "low" and "high", the
        quartiles of the rounds, "error", the standard error of the ratio (nan, as they, for a single round),
        "ms", the median time of its step, and "rounds".

    Raises:
        ValueError: for fewer than one round or step.

    Example:
        >>> now = [0.0]
        >>> def steps(seconds):
        ...     while True:
        ...         now[0] += seconds
        ...         yield 0.0
        >>> beside(lambda: steps(1), {"sam": lambda: steps(2)}, rounds=3, clock=lambda: now[0])
        {'sam': {'ratio': 2.0, 'low': 2.0, 'high': 2.0, 'error': 0.0, 'ms': 2000.0, 'rounds': 3}}
    """
    if rounds < 1 or block < 1:
        raise ValueError(f"beside: rounds is {rounds!r} and block {block!r}; expected at least 1 of each")

    def timed(steps: Iterator[float]) -> float:
        start = clock()
        for _ in range(block):
            next(steps)
        return (clock() - start) / block

    plain, made = base(), {name: make() for name, make in others.items()}
    for steps in (plain, *made.values()):
        timed(steps)  # memory is taken, masks are made
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for turn in range(rounds):
        for name, steps in made.items():
            first, second = (plain, steps) if turn % 2 else (steps, plain)
            times = timed(first), timed(second)
            pairs[name].append(times[::-1] if turn % 2 else times)
    return {name: _summary(found, name in varying) for name, found in pairs.items()}


def _summary(pairs: list[tuple[float, float]], varies: bool) -> dict[str, float]:
    ratios = [other / base for other, base in pairs]
    low, middle, high = (
        statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (math.nan, *ratios, math.nan)
    )
    # Of n normal values the quartiles are 1.349 deviations apart and the median has 1.253 / sqrt(n) of one.
    error = 1.253 / 1.349 * (high - low) / math.sqrt(len(ratios))
    if varies:
        base = math.fsum(base for _, base in pairs)
        middle = math.fsum(other for other, _ in pairs) / base
        if len(pairs) > 1:  # of a ratio of sums, to first order
            rest = math.fsum((other - middle * base) ** 2 for other, base in pairs)
            error = math.sqrt(rest * len(pairs) / (len(pairs) - 1)) / base
    ms = 1e3 * statistics.median(other for other, _ in pairs)
    return {"ratio": middle, "low": low, "high": high, "error": error, "ms": ms, "rounds": len(pairs)}
