"""The outermost eigenvalues of the Hessian, by Lanczos, power iteration, or all products."""

from __future__ import annotations

import importlib.util
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .hessian import Hessian, Product, shaped
from .objective import Forward, Objective
from .vectors import flattened, gaussian, split

Method = Literal["auto", "lanczos", "power", "dense"]
Which = Literal["largest", "magnitude"]


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of the Hessian, the first ones first, and how far to trust them.

    Args:
        values: by value, or by absolute value with ``which="magnitude"``.
        vectors: for each value a list of tensors shaped like the parameters, of length 1 together.
        residuals: ``||H v - value v||``; the Hessian has an eigenvalue within that distance.
        products: how many products with the Hessian it took.
        converged: whether all residuals are below tol times the largest absolute value.
        method: "lanczos", "power" or "dense".
        which: "largest" or "magnitude".
        history: for power iteration, by eigenvalue, ``v^T H v`` after each product.
    """

    values: tuple[float, ...]
    vectors: tuple[list[Tensor], ...] = field(repr=False)
    residuals: tuple[float, ...]
    products: int
    converged: bool
    method: str
    which: str
    history: tuple[tuple[float, ...], ...] = field(default=(), repr=False)


class _NotFinite(Exception):
    """A product had entries that are not numbers."""


def eigenvalues(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    k: int = 1,
    *,
    which: Which = "largest",
    method: Method = "auto",
    tol: float = 1e-3,
    steps: int = 200,
    seed: int = 0,
    start: Sequence[Tensor] | None = None,
    ncv: int | None = None,
    hvp: Product = "exact",
    h: float | None = None,
    forward: Forward | None = None,
    samples: int | None = None,
) -> Spectrum:
    """The k outermost eigenvalues of the Hessian of the mean loss, ``H v = lambda v``.

    "lanczos" is `scipy.sparse.linalg.eigsh` (ARPACK), the fewest products; it holds `ncv` float64 vectors of
    all weights on the host. "power" is power iteration with deflation: no scipy and 2k + 2 such vectors, on
    the device of the weights, but many products where eigenvalues lie close. "dense" multiplies every unit
    vector and takes `torch.linalg.eigh`. "auto" takes "dense" where Lanczos would need as many products,
    and "lanczos" if scipy is there.

    A value counts as found when its residual ``||H v - lambda v||`` is small, which bounds its error; values
    themselves are usually good to the square of that. PyHessian stops when its estimate changes by
    less than 1e-3 of itself, returns the estimate before the last, and takes the largest absolute
    value, which may be negative: ``which="magnitude"`` here. ``which="largest"`` is the largest by value,
    lambda_max, what limits step sizes and what the papers on SAM plot.

    Args:
        model, loss_fn, loader, forward, samples: see `Objective`.
        k: how many.
        which: "largest" by value, "magnitude" by absolute value.
        method: see above.
        tol: residual as a share of the largest absolute value; 1e-3 is PyHessian's number.
        steps: products for each value, about, before it gives up with a warning.
        seed: of the start vectors, from 0 to 2^63 - 1; torch's generators are not used.
        start: a first guess shaped like the parameters, e.g. ``vectors[0]`` of an epoch before.
        ncv: size of the Lanczos basis; default scipy's, the larger of 20 and 2k + 1.
        hvp, h: the method of `hessian_vector_product`, and its step.

    Returns:
        `Spectrum`; with nan for values, and no vectors, if the Hessian is not finite.

    Raises:
        ValueError: if k exceeds the number of weights, or another number makes no sense.
        ImportError: if "lanczos" is asked for and there is no scipy.
        RuntimeError: if Lanczos finds none of the values in the number of steps.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> batch = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> found = eigenvalues(model, nn.functional.mse_loss, [batch], k=2)  # H = [[2, 4], [4, 8]]
        >>> [round(value, 4) + 0.0 for value in found.values], found.converged
        ([10.0, 0.0], True)

    Source: Lehoucq, Sorensen and Yang, ARPACK, 1998; Yao et al., PyHessian, 2020.
    """
    objective = Objective(model, loss_fn, loader, forward=forward, samples=samples)
    hessian = Hessian(objective, hvp, h)
    n = hessian.size
    _check(k, which, method, tol, steps, ncv, n)
    first = None if start is None else flattened(shaped("eigenvalues", "start", start, objective))
    if first is not None and not 0 < float(first.norm()) < math.inf:
        raise ValueError("eigenvalues: start is zero or not finite; expected a vector with a direction")
    basis = min(n, ncv or max(2 * k + 1, 20))
    if n <= basis and method in ("auto", "lanczos"):
        method = "dense"
    elif method == "auto":
        method = "lanczos" if importlib.util.find_spec("scipy") else "power"

    def fresh(draw: int) -> Tensor:
        if draw == 0 and first is not None:
            return first / first.norm()
        v = flattened(gaussian(objective.params, seed, draw))
        return v / v.norm()

    def product(v: Tensor) -> Tensor:
        found = hessian.flat(v)
        if not bool(found.isfinite().all()):
            raise _NotFinite
        return found

    history: list[list[float]] = []
    with objective.held():
        try:
            if method == "dense":
                basis_vectors, images = _dense(product, objective)
            elif method == "lanczos":
                basis_vectors, images = _lanczos(product, fresh, k, which, tol, steps, basis, seed)
            else:
                basis_vectors, images = _power(product, fresh, k, which, tol, steps, history)
        except _NotFinite:
            warnings.warn(
                "eigenvalues: the Hessian has entries that are not finite, so there are no eigenvalues; look "
                "whether the loss is finite at these weights",
                stacklevel=2,
            )
            nans = (math.nan,) * k
            return Spectrum(nans, (), nans, hessian.products, False, method, which)
    values, vectors, residuals = _ritz(basis_vectors, images, k, which)
    top = max(map(abs, values))
    converged = len(values) == k and max(residuals) <= tol * top
    if not converged:
        warnings.warn(
            f"eigenvalues: {len(values)} of {k} values by {method} after {hessian.products} products, the "
            f"largest residual {max(residuals):.2g} at a largest value of {top:.2g}; expected below tol="
            f"{tol:g} of that. Give more steps, a larger tol, or another method",
            stacklevel=2,
        )
    return Spectrum(
        values=tuple(values),
        vectors=tuple(split(v, objective.params) for v in vectors),
        residuals=tuple(residuals),
        products=hessian.products,
        converged=converged,
        method=method,
        which=which,
        history=tuple(map(tuple, history)),
    )


def _check(k: int, which: str, method: str, tol: float, steps: int, ncv: int | None, n: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n:
        raise ValueError(f"eigenvalues: k is {k!r}; expected 1 to {n}, the number of weights")
    if which not in ("largest", "magnitude"):
        raise ValueError(f"eigenvalues: which is {which!r}; expected 'largest' or 'magnitude'")
    if method not in ("auto", "lanczos", "power", "dense"):
        raise ValueError(f"eigenvalues: method is {method!r}; expected 'auto', 'lanczos', 'power' or 'dense'")
    if not 0 < tol < 1:
        raise ValueError(f"eigenvalues: tol is {tol!r}; expected a share between 0 and 1")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"eigenvalues: steps is {steps!r}; expected a whole number, at least 1")
    if ncv is not None and not k < ncv:
        raise ValueError(f"eigenvalues: ncv is {ncv!r}; expected more than k={k}, or None")


Pairs = tuple[list[Tensor], list[Tensor]]  # orthonormal vectors and their products with H


def _dense(product: Callable[[Tensor], Tensor], objective: Objective) -> Pairs:
    n = sum(p.numel() for p in objective.params)
    units = list(torch.eye(n, dtype=torch.float64, device=objective.params[0].device))
    return units, [product(v) for v in units]


def _lanczos(
    product: Callable[[Tensor], Tensor],
    fresh: Callable[[int], Tensor],
    k: int,
    which: str,
    tol: float,
    steps: int,
    ncv: int,
    seed: int,
) -> Pairs:
    try:
        import numpy as np
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ImportError as missing:
        raise ImportError(
            "eigenvalues: method='lanczos' needs scipy, which is not installed: "
            "pip install 'sam_kernels[sharpness]', or take method='power'"
        ) from missing
    v0 = fresh(0)
    if float(product(v0).norm()) == 0:  # ARPACK cannot build a basis from nothing
        return _orthonormal([fresh(i) for i in range(k)]), [torch.zeros_like(v0)] * k

    def matvec(v: Any) -> Any:
        return product(torch.from_numpy(np.array(v).reshape(-1)).to(v0.device)).cpu().numpy()

    operator = LinearOperator((len(v0), len(v0)), matvec=matvec, dtype=np.float64)
    # Later versions of scipy draw new directions from this where a basis breaks down.
    given = {"rng": np.random.default_rng(seed)} if "rng" in inspect.signature(eigsh).parameters else {}
    # The first round takes ncv products, each later one ncv - k.
    rounds = max(1, 1 + (steps * k - ncv) // (ncv - k))
    try:
        _, vectors = eigsh(
            operator,
            k,
            which="LA" if which == "largest" else "LM",
            v0=v0.cpu().numpy(),
            ncv=ncv,
            maxiter=rounds,
            tol=tol / 2,  # its bound is an estimate; ours is measured
            **given,
        )
    except ArpackNoConvergence as stopped:
        vectors = stopped.eigenvectors
        if vectors.shape[1] == 0:
            raise RuntimeError(
                f"eigenvalues: Lanczos found none of {k} eigenvalues in {rounds} rounds of {ncv} products; "
                f"give more steps (now {steps}) or a larger tol (now {tol:g}) or ncv (now {ncv}), or take "
                "method='power', which returns what it has"
            ) from stopped
    found = _orthonormal([torch.from_numpy(v.copy()).to(v0.device) for v in vectors.T])
    return found, [product(v) for v in found]


def _power(
    product: Callable[[Tensor], Tensor],
    fresh: Callable[[int], Tensor],
    k: int,
    which: str,
    tol: float,
    steps: int,
    history: list[list[float]],
) -> Pairs:
    """Power iteration, orthogonal to what was found.

    It finds the largest absolute value. If that is negative and the largest value is sought, its absolute
    value is added to all eigenvalues, after which none is negative, and the search begins anew.
    """
    vectors: list[Tensor] = []
    images: list[Tensor] = []
    top: list[float] = []
    shift = 0.0
    draw = 0
    while len(vectors) < k:
        v = _orthonormal([*vectors, fresh(draw)])[-1]
        draw += 1
        estimates: list[float] = []
        for step in range(steps):
            image = product(v)
            value = float(v @ image)
            estimates.append(value)
            free = _without(image, vectors)
            if float((free - value * v).norm()) <= tol / 2 * max(abs(value), *top, 0) or step == steps - 1:
                break
            v = free + shift * v
            v = _orthonormal([*vectors, v])[-1]
        if which == "largest" and value < 0 and shift == 0:
            shift = abs(value)
            continue
        history.append(estimates)
        top.append(abs(value))
        vectors.append(v)
        images.append(image)
    return vectors, images


def _without(v: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    for u in vectors:
        v = v - (u @ v) * u
    return v


def _orthonormal(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Gram-Schmidt, twice, as once leaves rounding errors of the size of what it removes."""
    done: list[Tensor] = []
    for v in vectors:
        v = _without(_without(v, done), done)
        done.append(v / v.norm())
    return done


def _ritz(
    vectors: list[Tensor], images: list[Tensor], k: int, which: str
) -> tuple[list[float], list[Tensor], list[float]]:
    """The best k eigenvalues and vectors within the span of some vectors, and their residuals."""
    v, image = torch.stack(vectors), torch.stack(images)  # one a row
    small = v @ image.T
    found, turn = torch.linalg.eigh((small + small.T) / 2)
    order = (found if which == "largest" else found.abs()).argsort(descending=True)[:k]
    values, turn = found[order], turn[:, order]
    vectors_found, images_found = turn.T @ v, turn.T @ image
    residuals = (images_found - values[:, None] * vectors_found).norm(dim=1)
    # Of v and -v the one whose largest entry is positive, so that the same weights give the same vectors.
    largest = vectors_found.gather(1, vectors_found.abs().argmax(1, keepdim=True))
    return values.tolist(), list(vectors_found * largest.sign()), residuals.tolist()
