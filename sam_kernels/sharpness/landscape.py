"""The loss around the weights, along one direction or two: values, a picture, two models side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import ops
from .bar import shown
from .directions import Direction, Normalize, directions_of
from .hessian import Product
from .objective import Forward, Objective
from .vectors import alike, by_list, dot, norm

_FORMAT = "sam_kernels landscape 1"


@dataclass(frozen=True, eq=False)
class Landscape:
    """Losses at ``w + a d`` or ``w + a d1 + b d2``, on a grid.

    Args:
        coordinates: the values of a, or those of a and of b; float64.
        losses: float64 [points], or [points, points] with a by rows; not finite where the loss is not.
        directions: their names, "random", "gradient", "eigenvector" or "given".
        normalize: "filter", "layer" or "none", for each.
        norms: their lengths, so ``a * norms[0]`` is a distance in the space of weights.
        cosine: between two directions; 0 for one.
        base: the loss at the weights.
        weights_norm: ``||w||``.
        samples: how many samples the loss is a mean of.
        label: the name of the model, for pictures.
    """

    coordinates: tuple[NDArray[np.float64], ...]
    losses: NDArray[np.float64]
    directions: tuple[str, ...]
    normalize: tuple[str, ...]
    norms: tuple[float, ...]
    cosine: float
    base: float
    weights_norm: float
    samples: int
    label: str = ""

    @property
    def lowest(self) -> tuple[tuple[float, ...], float]:
        """Where on the grid the loss is least, and that loss; nan if it is finite nowhere."""
        finite = np.isfinite(self.losses)
        if not finite.any():
            return (math.nan,) * self.losses.ndim, math.nan
        place = np.unravel_index(np.where(finite, self.losses, np.inf).argmin(), self.losses.shape)
        found = tuple(float(axis[i]) for axis, i in zip(self.coordinates, place, strict=True))
        return found, float(self.losses[place])

    def save(self, path: str | Path) -> None:
        """Write a picture, and beside it the values, of the same name with .json.

        Args:
            path: ends in .png; folders are made.

        Raises:
            ValueError: if it ends otherwise.
            ImportError: without matplotlib; the values are written all the same.
        """
        _write([self], path, self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """What the JSON holds; numbers that are not finite are strings, which JSON has no numbers for."""
        return {
            "format": _FORMAT,
            "label": self.label,
            "directions": list(self.directions),
            "normalize": list(self.normalize),
            "norms": list(self.norms),
            "cosine": self.cosine,
            "weights_norm": self.weights_norm,
            "samples": self.samples,
            "base": _spelled(self.base),
            "coordinates": [axis.tolist() for axis in self.coordinates],
            "losses": _spelled(self.losses.tolist()),
        }

    @classmethod
    def load(cls, path: str | Path) -> Landscape:
        """What `save` has written.

        Args:
            path: of the JSON, or of the picture beside it.

        Raises:
            ValueError: if the file holds something else, or several landscapes, as those of `compare` do.
        """
        path = Path(path).with_suffix(".json")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise ValueError(f"Landscape.load: {path} has no format {_FORMAT!r}; expected what save wrote")
        return cls.from_dict(found)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Landscape:
        """The landscape of `as_dict`, also of an entry of the "landscapes" that `compare` writes."""
        return cls(
            coordinates=tuple(np.array(axis, dtype=np.float64) for axis in found["coordinates"]),
            losses=np.array(found["losses"], dtype=np.float64),  # reads "nan" and "inf" as well
            directions=tuple(found["directions"]),
            normalize=tuple(found["normalize"]),
            norms=tuple(found["norms"]),
            cosine=found["cosine"],
            base=float(found["base"]),
            weights_norm=found["weights_norm"],
            samples=found["samples"],
            label=found["label"],
        )


def line(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    direction: Direction = "random",
    *,
    radius: float = 1.0,
    points: int = 41,
    normalize: Normalize | None = None,
    seed: int = 0,
    label: str = "",
    hvp: Product = "exact",
    progress: bool | None = None,
    forward: Forward | None = None,
    samples: int | None = None,
) -> Landscape:
    """The loss at ``w + a d`` for a from -radius to radius.

    Args:
        model, loss_fn, loader, forward, samples: see `Objective`; it is evaluated `points` + 1 times.
        direction: "random", "gradient" (uphill), "eigenvector" (of the largest eigenvalue of the Hessian), or
            tensors shaped like the parameters, e.g. the difference to another model.
        radius: the largest a. With "filter" and "layer" 1 is a move as large as the weights, with "none" it
            is a distance; given tensors are taken as they are.
        points: how many a; an odd number has the weights among them.
        normalize: "filter" makes each row (filter) of d as long as that of the weights, "layer" each tensor;
            both leave out biases and other one-dimensional parameters. "none" makes d one long. Default:
            "filter" for "random", so that models whose weights are scaled differently can be compared
            (Li et al.), else "none".
        seed: of random directions; torch's generators are not used.
        label: the name of the model, for pictures.
        hvp: how products with the Hessian are taken, see `hessian_vector_product`.
        progress: a bar on the terminal: True, False, or None for one if rich is installed and the standard
            error is a terminal.

    Raises:
        ValueError: if a number makes no sense, tensors do not fit, or there is no such direction.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> batch = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> found = line(model, nn.functional.mse_loss, [batch], "gradient", points=3)
        >>> found.losses.shape, bool(found.losses[1] == found.base)
        ((3,), True)

    Source: Li et al., Visualizing the loss landscape of neural nets, 2018 (arXiv 1712.09913).
    """
    objective = Objective(model, loss_fn, loader, forward=forward, samples=samples)
    axes = (_axis("line", radius, points),)
    with objective.held():
        found = directions_of("line", objective, [direction], [normalize], seed, hvp, False)
        return _measured(objective, found, axes, label, progress)


def plane(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    directions: tuple[Direction, Direction] = ("random", "random"),
    *,
    radius: float | tuple[float, float] = 1.0,
    points: int = 25,
    normalize: Normalize | None = None,
    orthogonal: bool | None = None,
    seed: int = 0,
    label: str = "",
    hvp: Product = "exact",
    progress: bool | None = None,
    forward: Forward | None = None,
    samples: int | None = None,
) -> Landscape:
    """The loss at ``w + a d1 + b d2`` for a and b from -radius to radius.

    Args:
        model, loss_fn, loader, forward, samples: see `Objective`; it is evaluated points^2 + 1 times.
        directions: two of what `line` takes. "random" twice are two draws, "eigenvector" twice are the first
            two eigenvectors.
        radius: the largest a and b, or one for each.
        points: how many a, and how many b.
        normalize, seed, label, hvp, progress: as in `line`.
        orthogonal: whether the part of d2 along d1 is taken out, at the same length; otherwise distances in
            the picture are not those in the space of weights. Default: if neither is given nor normalized,
            as filters would lose their lengths; random ones are nearly orthogonal by themselves.

    Raises:
        ValueError: if a number makes no sense, tensors do not fit, or the directions do not span a plane.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> batch = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> found = plane(model, nn.functional.mse_loss, [batch], ("gradient", "random"), points=3)
        >>> found.losses.shape, bool(found.losses[1, 1] == found.base)
        ((3, 3), True)

    Source: Li et al., Visualizing the loss landscape of neural nets, 2018 (arXiv 1712.09913).
    """
    objective = Objective(model, loss_fn, loader, forward=forward, samples=samples)
    if isinstance(directions, str) or len(directions) != 2:
        raise ValueError(f"plane: directions is {directions!r}; expected two of them")
    pair = radius if isinstance(radius, tuple) else (radius, radius)
    if len(pair) != 2:
        raise ValueError(f"plane: radius is {radius!r}; expected a number, or one for each direction")
    axes = tuple(_axis("plane", r, points) for r in pair)
    with objective.held():
        found = directions_of("plane", objective, directions, [normalize] * 2, seed, hvp, orthogonal)
        return _measured(objective, found, axes, label, progress)


def compare(
    landscapes: Sequence[Landscape], path: str | Path, *, labels: Sequence[str] | None = None
) -> None:
    """Draw models side by side, on the same axes and with the same colors for the same losses.

    Lines become curves in one picture, planes contours beside each other. The values are written beside the
    picture, as .json with the list "landscapes".

    Args:
        landscapes: two or more, all lines or all planes.
        path: of the picture, ends in .png; folders are made.
        labels: names of the models (default: their own, else numbers).

    Raises:
        ValueError: if there are fewer than two, lines and planes are mixed, or labels do not fit.
        ImportError: without matplotlib; the values are written all the same.

    Example:
        >>> batch = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> models = {"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)}
        >>> found = [line(m, nn.functional.mse_loss, [batch], label=k) for k, m in models.items()]
        >>> compare(found, "both.png")  # doctest: +SKIP
    """
    found = list(landscapes)
    if len(found) < 2:
        raise ValueError(f"compare: {len(found)} landscapes; expected two or more")
    if len({one.losses.ndim for one in found}) > 1:
        raise ValueError("compare: some landscapes are lines and some are planes; expected one kind")
    names = [one.label or str(i) for i, one in enumerate(found, 1)] if labels is None else list(labels)
    if len(names) != len(found):
        raise ValueError(f"compare: {len(names)} labels for {len(found)} landscapes")
    values = [{**one.as_dict(), "label": name} for one, name in zip(found, names, strict=True)]
    _write([Landscape.from_dict(one) for one in values], path, {"landscapes": values})


def _axis(owner: str, radius: float, points: int) -> NDArray[np.float64]:
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise ValueError(f"{owner}: points is {points!r}; expected a whole number, at least 2")
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"{owner}: radius is {radius!r}; expected a positive number")
    steps = np.arange(points) * 2 - (points - 1)  # symmetric, and 0 in the middle to the bit
    return radius * steps / (points - 1)


def _measured(
    objective: Objective,
    found: list[tuple[str, str, list[Tensor]]],
    axes: tuple[NDArray[np.float64], ...],
    label: str,
    progress: bool | None,
) -> Landscape:
    vectors = [d for _, _, d in found]
    norms = [norm(d) for d in vectors]
    cosine = dot(*vectors) / math.prod(norms) if len(vectors) == 2 else 0.0
    if abs(cosine) > 1 - 1e-6:
        raise ValueError("plane: the two directions are parallel; expected two that span a plane")
    base = objective.loss()
    shape = tuple(map(len, axes))
    losses = np.empty(shape)
    move = _Mover(objective, vectors)
    with shown(progress, "loss landscape") as bar:
        task = None if bar is None else bar.add_task("", total=losses.size)
        for place in np.ndindex(*shape):
            move([axis[i] for axis, i in zip(axes, place, strict=True)])
            losses[place] = objective.loss()
            if bar is not None:
                bar.advance(task)
    return Landscape(
        coordinates=axes,
        losses=losses,
        directions=tuple(name for name, _, _ in found),
        normalize=tuple(kind for _, kind, _ in found),
        norms=tuple(norms),
        cosine=cosine,
        base=base,
        weights_norm=norm([s for snapshots, _, _ in move.lists for s in snapshots]),
        samples=objective.count,
        label=label,
    )


class _Mover:
    """Puts the weights to ``w + a d1 + b d2``, each time from the same copy of w."""

    def __init__(self, objective: Objective, vectors: list[list[Tensor]]) -> None:
        self.lists = []
        for places in by_list(objective.params):
            params: list[Tensor] = [objective.params[i] for i in places]
            snapshots = [alike(p).copy_(p.detach()) for p in params]
            along = [[alike(p).copy_(d[i]) for i, p in zip(places, params, strict=True)] for d in vectors]
            self.lists.append((snapshots, params, along))

    def __call__(self, steps: Sequence[float]) -> None:
        with torch.no_grad():
            for snapshots, params, along in self.lists:
                row = torch.tensor([[1.0, *steps]], dtype=torch.float64, device=params[0].device)
                ops.combine_([params], [snapshots, *along], row)


def _write(landscapes: list[Landscape], path: str | Path, values: dict[str, Any]) -> None:
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"landscape: the path is {str(path)!r}; expected one that ends in .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, allow_nan=False)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    from .drawing import draw

    draw(landscapes, path)


def _spelled(x: Any) -> Any:
    """Lists of numbers with those that are not finite as strings."""
    if isinstance(x, list):
        return [_spelled(item) for item in x]
    return x if math.isfinite(x) else str(x)
