"""Interleaved timing: every round runs every contestant once, in a new order."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

# A contestant runs once and returns the seconds of its parts.
Contestant = Callable[[], dict[str, float]]
Samples = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds fill `seconds`, within the limits."""

    warmup: int = 5
    fewest: int = 9
    most: int = 200
    seconds: float = 20.0


def clocked(run: Callable[[], object]) -> Contestant:
    """A contestant with one part, "total"."""

    def contestant() -> dict[str, float]:
        start = time.perf_counter()
        run()
        return {"total": time.perf_counter() - start}

    return contestant


def interleave(
    contestants: dict[str, Contestant],
    effort: Effort,
    tick: Callable[[int, int], None] = lambda done, of: None,
) -> Samples:
    """Seconds of every part of every contestant, one entry per round, in the order of rounds.

    Neighbours on the machine slow down whole rounds, not single contestants; entries of one round
    can therefore be divided by each other.

    Args:
        contestants: by name.
        effort: how many rounds.
        tick: told the rounds done and the rounds planned.
    """
    order = list(contestants)
    shuffle = random.Random(0).shuffle
    samples: Samples = {name: {} for name in contestants}
    rounds = effort.fewest
    collect = gc.isenabled()
    gc.disable()
    try:
        for done in range(effort.warmup):
            began = time.perf_counter()
            for name in order:
                contestants[name]()
            lasted = time.perf_counter() - began
            rounds = int(min(max(effort.seconds / lasted, effort.fewest), effort.most))
            tick(done + 1, effort.warmup + rounds)
        for done in range(rounds):
            shuffle(order)
            for name in order:
                for part, seconds in contestants[name]().items():
                    samples[name].setdefault(part, []).append(seconds)
            gc.collect(0)
            tick(effort.warmup + done + 1, effort.warmup + rounds)
    finally:
        if collect:
            gc.enable()
    return samples
