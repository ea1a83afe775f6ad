"""What the steps of all variants are made of: sums over lists of tensors, and the loop over the steps.

A method is an object with `step(weights, gradient, base, number)`, where gradient(weights, k) is the gradient
on batch k. It returns the weights after the step and keeps what it remembers in itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from oracles.sam import Tensors

Gradient = Callable[[Tensors, int], Tensors]


class Method(Protocol):
    """One variant, with what it remembers from step to step."""

    def step(self, weights: Tensors, gradient: Gradient, base: Any, number: int) -> Tensors:
        """Return the weights after one step."""


class Ascent:
    """The methods that differ from SAM in the perturbation only."""

    def perturbation(self, weights: Tensors, gradients: Tensors, number: int) -> Tensors:
        """Return e."""
        raise NotImplementedError

    def step(self, weights: Tensors, gradient: Gradient, base: Any, number: int) -> Tensors:
        """Return base(grad L(w + e)), taken at w."""
        e = self.perturbation(weights, gradient(weights, number), number)
        return base.step(weights, gradient(moved(weights, e), number))


def dot(left: Tensors, right: Tensors) -> float:
    """Return <left, right> over every element of every tensor."""
    return sum(float((t.double() * right[name].double()).sum()) for name, t in left.items())


def total(*terms: tuple[float, Tensors]) -> Tensors:
    """Return the sum of c * x over the terms (c, x), each a list of the same tensors."""
    return {name: sum(c * x[name] for c, x in terms) for name in terms[0][1]}


def moved(weights: Tensors, direction: Tensors, scale: float = 1.0) -> Tensors:
    """Return w + scale * d, and w where there is no d."""
    return {name: w + scale * direction[name] if name in direction else w for name, w in weights.items()}


def run(method: Method, weights: Tensors, gradient: Gradient, base: Any, steps: int) -> list[Tensors]:
    """Return the weights after each step."""
    weights = {name: w.detach().double().clone() for name, w in weights.items()}
    after = []
    for number in range(steps):
        weights = method.step(weights, gradient, base, number)
        after.append(weights)
    return after
