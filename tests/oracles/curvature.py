"""Second derivatives in numpy: gradients by hand, Hessians from them by complex steps, exact to rounding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def hessian(gradient: Callable[[Array], Array], at: Array) -> Array:
    """Return dg/dw, column by column ``Im g(w + i h e) / h``: no difference is taken, so h may be tiny."""
    h = 1e-30
    columns = [gradient(at + 1j * h * unit).imag / h for unit in np.eye(len(at))]
    return np.stack(columns, 1)


# ---- the two-tensor toy: 0.5 (a1^2 + 4 a2^2 + 0.5 b^2) + 0.3 a1 b + 0.1 a2^4 + c . w ----------------------

TOY_START = np.array([1.0, -0.5, 2.0])
TOY_PUSH = np.array([0.1, -0.2, 0.3])


def toy_loss(w: Array) -> float:
    a1, a2, b = w
    return 0.5 * (a1**2 + 4 * a2**2 + 0.5 * b**2) + 0.3 * a1 * b + 0.1 * a2**4 + TOY_PUSH @ w


def toy_gradient(w: Array) -> Array:
    a1, a2, b = w
    return np.array([a1 + 0.3 * b, 4 * a2 + 0.4 * a2**3, 0.5 * b + 0.3 * a1]) + TOY_PUSH


# ---- networks, as functions of one vector of all weights -------------------------------------------------


def mlp_gradient(w: Array, x: Array, labels: Array, hidden: int, classes: int) -> Array:
    """Return the gradient of the mean cross-entropy of ``tanh(x A^T + a) B^T + b``, in the order A a B b."""
    n, inputs = x.shape
    sizes = [hidden * inputs, hidden, classes * hidden, classes]
    a, a0, b, b0 = np.split(w, np.cumsum(sizes)[:-1])
    a, b = a.reshape(hidden, inputs), b.reshape(classes, hidden)
    h = np.tanh(x @ a.T + a0)
    z = h @ b.T + b0
    p = np.exp(z - z.real.max(1, keepdims=True))
    p = p / p.sum(1, keepdims=True)
    dz = (p - np.eye(classes)[labels]) / n
    dh = (dz @ b) * (1 - h**2)
    return np.concatenate([(dh.T @ x).ravel(), dh.sum(0), (dz.T @ h).ravel(), dz.sum(0)])


def tied_gradient(w: Array, x: Array, hidden: int) -> Array:
    """Return the gradient of ``mean (tanh(x W^T) W - x)^2``, an autoencoder whose layers share W."""
    n, inputs = x.shape
    shared = w.reshape(hidden, inputs)
    h = np.tanh(x @ shared.T)
    dy = 2 * (h @ shared - x) / (n * inputs)
    dh = (dy @ shared.T) * (1 - h**2)
    return (dh.T @ x + h.T @ dy).ravel()


# ---- what is made of a Hessian ---------------------------------------------------------------------------


def power_iteration(matrix: Array, v: Array, steps: int, tau: float = 0.0) -> list[float]:
    """Return ``v . H v`` at each of a number of steps; PyHessian divides by the norm plus tau = 1e-6."""
    found = []
    for _ in range(steps):
        v = v / (np.linalg.norm(v) + tau)
        image = matrix @ v
        found.append(float(v @ image))
        v = image
    return found


def outermost(matrix: Array, k: int, magnitude: bool = False) -> Array:
    """Return the k largest eigenvalues, or those of largest absolute value, first ones first."""
    values = np.linalg.eigvalsh(matrix)
    return values[np.argsort(-(np.abs(values) if magnitude else values))][:k]
