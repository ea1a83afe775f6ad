"""Sharpness in numpy, on one vector of weights: definitions of algorithms-2.md 16 and searches step by step.

The toy of section 0.3: f(w; c) = 0.5 (a1^2 + 4 a2^2 + 0.5 b1^2) + 0.3 a1 b1 + 0.1 a2^4 + c . w, with the
weights w = (a1, a2, b1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Vector = np.ndarray
Function = Callable[[Vector], float]
Slope = Callable[[Vector], Vector]

START = np.array([1.0, -0.5, 2.0])
PUSHES = np.array([[0.1, -0.2, 0.3], [-0.2, 0.1, 0.0], [0.05, 0.05, -0.1], [0.0, -0.1, 0.1]])


def toy(w: Vector, push: Vector) -> float:
    a1, a2, b1 = w
    return float(0.5 * (a1**2 + 4 * a2**2 + 0.5 * b1**2) + 0.3 * a1 * b1 + 0.1 * a2**4 + push @ w)


def toy_gradient(w: Vector, push: Vector) -> Vector:
    a1, a2, b1 = w
    return np.array([a1 + 0.3 * b1, 4 * a2 + 0.4 * a2**3, 0.5 * b1 + 0.3 * a1]) + push


def toy_average(rho: float, p: float, adaptive: bool) -> float:
    """E f(w + d) - f(w), from the moments of d: only even ones count, and only a2 has a fourth."""
    t = np.abs(START) if adaptive else np.ones(3)
    second, fourth = (1.0, 3.0) if p == 2 else (1 / 3, 1 / 5)
    hessian = np.array([1.0, 4.0 + 1.2 * START[1] ** 2, 0.5])
    return float(0.5 * second * rho**2 * (hessian @ t**2) + 0.1 * fourth * (rho * t[1]) ** 4)


def farthest(w: Vector, g: Vector, rho: float, p: float = 2, t: Vector | float = 1.0) -> Vector:
    """argmax g . e with ||e / t||_p <= rho."""
    u = t * g
    if not np.any(u):
        return np.zeros_like(w)
    if math.isinf(p):
        return rho * t * np.sign(u)
    if p == 1:
        at = np.abs(u) == np.abs(u).max()
        return rho * t * np.sign(u) * at / at.sum()
    q = p / (p - 1)
    return rho * t * np.sign(u) * np.abs(u) ** (q - 1) / np.sum(np.abs(u) ** q) ** (1 / p)


def one_step(
    f: Function, slope: Slope, w: Vector, rho: float, p: float = 2, t: Vector | float = 1.0
) -> float:
    return f(w + farthest(w, slope(w), rho, p, t)) - f(w)


def projected_ascent(
    f: Function, slope: Slope, w: Vector, rho: float, steps: int, step: float, start: Vector | None = None
) -> float:
    d = np.zeros_like(w) if start is None else start
    losses = [f(w)]
    for _ in range(steps):
        g = slope(w + d)
        d = d + step * rho * g / np.linalg.norm(g)
        d = d * min(1.0, rho / np.linalg.norm(d))
        losses.append(f(w + d))
    return max(losses) - f(w)


def nearest(e: Vector, t: Vector, rho: float) -> Vector:
    """The point z with ||z / t|| <= rho and the least ||z - e||, by 200 bisections."""
    if np.linalg.norm(e / t) <= rho:
        return e
    low, high = 0.0, 1e6
    for _ in range(200):
        k = (low + high) / 2
        z = e / (1 + k / t**2)
        low, high = (k, high) if np.linalg.norm(z / t) > rho else (low, k)
    return z


def auto_pgd(
    f: Function, slope: Slope, w: Vector, rho: float, p: float, t: Vector, steps: int, published: bool = False
) -> float:
    """The largest rise that the search sees, w and the one-step point included."""
    looks, before, share = [math.ceil(0.22 * steps)], 0.0, 0.22
    while share < 1:
        share, before = share + max(share - before - 0.03, 0.06), share
        looks.append(math.ceil(round(share * steps, 9)))
    base = f(w)
    trail = [np.zeros_like(w)]
    best, best_e = base, trail[0]
    size = 2 * rho
    sizes, bests, last, wins = [size], [best], 0, 0
    for k in range(1, steps + 1):
        e = trail[-1]
        g = slope(w + e)
        if math.isinf(p):
            z = np.clip(e + size * t * np.sign(g), -rho * t, rho * t)
        elif published:
            z = nearest(e + size * t * g / np.linalg.norm(g), t, rho)
        else:
            u = e / t + size * t * g / np.linalg.norm(t * g)
            z = t * u * min(1.0, rho / np.linalg.norm(u))
        trail.append(0.75 * z + 0.25 * (trail[-2] if len(trail) > 1 else e))
        value = f(w + trail[-1])
        if value > best:
            best, best_e, wins = value, trail[-1], wins + 1
        if k in looks:
            halve = wins < 0.75 * (k - last) or (sizes[-1] == size and bests[-1] == best)
            sizes.append(size)
            bests.append(best)
            last, wins = k, 0
            if halve:
                size /= 2
                trail = [best_e]
    return max(best, f(w + farthest(w, slope(w), rho, p, t))) - base


def largest_on_ball(f: Function, w: Vector, rho: float, p: float, t: Vector) -> float:
    """The maximum over the edge of the ball of three weights, by trying: corners, or a fine net."""
    if math.isinf(p):
        signs = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3), -1).reshape(-1, 3)
        return max(f(w + rho * t * s) for s in signs) - f(w)
    up, around = np.meshgrid(np.linspace(0, np.pi, 181), np.linspace(0, 2 * np.pi, 361))
    points = np.stack([np.sin(up) * np.cos(around), np.sin(up) * np.sin(around), np.cos(up)], -1)
    return max(f(w + rho * t * s) for s in points.reshape(-1, 3)) - f(w)


def quadratic_maximum(g: Vector, h: Vector, rho: float) -> Vector:
    """argmax g . e + 0.5 sum h e^2 on ||e|| = rho: e = g / (k - h), k above every h, by bisection."""
    low, high = h.max(), h.max() + np.linalg.norm(g) / rho
    for _ in range(200):
        k = (low + high) / 2
        low, high = (k, high) if np.linalg.norm(g / (k - h)) > rho else (low, k)
    return g / (k - h)
