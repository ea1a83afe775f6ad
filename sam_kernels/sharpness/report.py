"""All measures in one call, with a bar while it runs and a table at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from . import curvature
from .ascent import m_sharpness, one_step, projected_ascent, worst_case
from .average import average_case, random_direction
from .bar import shown
from .checks import check_count, check_rho, finite
from .estimate import Estimate
from .gap import generalization_gap
from .moves import Weights
from .objective import Forward, Objective

# Radii in terms of rho. At rho = .05 they are: SAM's own .05; ASAM's .5 (Kwon et al. 2021); .1, the default
# of tml-epfl's projected ascent; .25, .001 and .05, of the grids in Andriushchenko et al. 2023 the first that
# suit small models, for the worst case, the sign perturbation and noise.
RADII = {
    "one_step": 1.0,
    "one_step_adaptive": 10.0,
    "one_step_inf": 0.02,
    "m_sharpness": 1.0,
    "projected_ascent": 2.0,
    "worst_case": 5.0,
    "average_case": 1.0,
    "random_direction": 1.0,
}


@dataclass(frozen=True)
class Row:
    """A measure as it stands in the table.

    Attributes:
        value: what was measured.
        rho: the radius it was measured with, None for measures without.
        seconds: how long it took; measures that come from one computation share theirs.
        meaning: what it is, in few words.
    """

    value: Estimate
    rho: float | None
    seconds: float
    meaning: str


class Report(Mapping[str, Estimate]):
    """Measures by name; ``print`` shows a table, and so does rich's.

    Attributes:
        rows: for each name its `Row`: value, radius, seconds, meaning.
        rho: what radii were made from.
        samples: how many samples were measured.
        seed: of everything that was drawn.

    Example:
        >>> rows = {"loss": Row(Estimate([0.5], is_random=False), None, 0.1, "mean loss of a sample")}
        >>> found = Report(rows, rho=0.05, samples=8, seed=0)
        >>> found["loss"], list(found)
        (0.5, ['loss'])
        >>> print(found)
        8 samples, rho 0.05, seed 0
        measure  value  ± error  radius  meaning
        loss       0.5                   mean loss of a sample
    """

    def __init__(self, rows: Mapping[str, Row], *, rho: float, samples: int, seed: int) -> None:
        self.rows, self.rho, self.samples, self.seed = dict(rows), rho, samples, seed

    def __getitem__(self, name: str) -> Estimate:
        return self.rows[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def json(self) -> dict[str, Any]:
        """Everything as a dict that `json.dumps` takes; None for errors that are not known."""
        measures = {
            name: {
                "value": _number(row.value),
                "error": _number(row.value.error),
                "rho": row.rho,
                "seconds": row.seconds,
                "meaning": row.meaning,
            }
            for name, row in self.rows.items()
        }
        return {"rho": self.rho, "samples": self.samples, "seed": self.seed, "measures": measures}

    @property
    def _title(self) -> str:
        return f"{self.samples} samples, rho {self.rho:g}, seed {self.seed}"

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                name.replace("_", " "),
                f"{float(row.value):.4g}",
                f"± {row.value.error:.2g}" if row.value.error > 0 else "",
                "" if row.rho is None else f"{row.rho:g}",
                row.meaning,
            )
            for name, row in self.rows.items()
        ]

    def __str__(self) -> str:
        lines = [HEADINGS, *self._cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
        aligned = [
            "  ".join(
                cell.rjust(width) if i in (1, 2, 3) else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self._title, *aligned])

    def __repr__(self) -> str:
        return f"<Report of {self._title}: {', '.join(self.rows)}>"

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=self._title)
        for i, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if i in (1, 2, 3) else "left", no_wrap=i < 4)
        for line in self._cells():
            table.add_row(*line)
        return table


HEADINGS = ("measure", "value", "± error", "radius", "meaning")


def report(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    *,
    test: Iterable[Any] | None = None,
    rho: float = 0.05,
    radii: Mapping[str, float] | None = None,
    m: int = 32,
    forward: Forward | None = None,
    samples: int | None = 1024,
    eigenvalues: int = 1,
    draws: int = 32,
    seed: int = 0,
    hvp: Literal["exact", "difference"] = "exact",
    progress: bool | None = None,
    backend: str = "auto",
) -> Report:
    """What the loss looks like around the weights: every measure of this package, on the same data.

    The data are taken from the loader once. Measures that average over draws take pairs d and -d.

    Args:
        model: the module; it is evaluated in evaluation mode, and left as it was, also after a ctrl-C.
        loss_fn: ``loss_fn(model(inputs), targets)``, the mean loss of a batch.
        loader: batches (inputs, targets), of training data.
        test: batches of test data, for the generalization gap (default: no gap).
        rho: what the radii are made from (default 0.05): each is rho times its number in `RADII`.
        radii: radii to use as they are, by the names in `RADII`.
        m: samples of a group of m-sharpness (default 32, that of SAM's CIFAR runs: Foret et al. 2021).
        forward: that of `Objective`.
        samples: take so many of either data (default 1024; None for all).
        eigenvalues: how many of the Hessian (default 1; 0 leaves its trace out, too).
        draws: for every mean over something random (default 32).
        seed: of the draws.
        hvp: how the Hessian is multiplied: "exact" by double backward, "difference" of two gradients where
            the model has layers that cannot be differentiated twice.
        progress: a bar on the terminal: True, False, or None for one if rich is installed and the standard
            error is a terminal (default).
        backend: "auto" or a backend's name, of the passes that move the weights.

    Returns:
        a `Report`, with "loss", "gradient_norm", the names of `RADII`, "eigenvalue" ("eigenvalue_2" ...),
        "trace" and with test data "loss_gap" and, for labels, "accuracy_gap".

    Raises:
        ValueError: if an argument is out of its range, or a loss or gradient is not finite.
        ImportError: if progress is True and rich is missing.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> found = report(model, torch.nn.functional.cross_entropy, data, draws=4, progress=False)
        >>> bool(found["one_step"] > found["random_direction"])
        True
        >>> found.json()["measures"]["worst_case"]["rho"]
        0.25
    """
    check_rho(rho)
    check_count("eigenvalues", eigenvalues, 0)
    check_count("draws", draws, 2)
    check_count("m", m)
    unknown = sorted(set(radii or {}) - set(RADII))
    if unknown:
        raise ValueError(
            f"sharpness: radii has no measure {unknown[0]!r}; expected names of {', '.join(RADII)}"
        )
    sizes = {name: rho * factor for name, factor in RADII.items()} | dict(radii or {})
    for size in sizes.values():
        check_rho(size)
    objective = Objective(model, loss_fn, loader, forward=forward, samples=samples)
    data = objective.batches
    # Whatever is wrong with these is to be known before the rest is measured.
    held_out = None if test is None else Objective(model, loss_fn, test, forward=forward, samples=samples)
    size = sum(p.numel() for p in objective.params)
    if eigenvalues > size:
        raise ValueError(f"sharpness: eigenvalues is {eigenvalues!r}; expected at most {size}, the weights")
    moved: dict[str, Any] = {"forward": forward, "backend": backend}
    whole = {**moved, "samples": None}
    random = {**moved, "draws": draws, "seed": seed, "antithetic": True}

    def first(loss_fn: Callable[..., Tensor]) -> dict[str, float]:
        own = Objective(model, loss_fn, data, forward=forward)
        with own.held() as base:
            loss, grads = own.gradient()
            return {
                "loss": finite(loss),
                "gradient_norm": Weights(own.params, base, backend, names=own.names).norm(grads),
            }

    def spectrum(loss_fn: Callable[..., Tensor]) -> dict[str, float]:
        options: dict[str, Any] = {"seed": seed, "hvp": hvp, "forward": forward}
        found = curvature.eigenvalues(model, loss_fn, data, eigenvalues, **options)
        names = ["eigenvalue", *(f"eigenvalue_{i}" for i in range(2, eigenvalues + 1))]
        return dict(zip(names, found.values, strict=False))

    def trace(loss_fn: Callable[..., Tensor]) -> dict[str, float]:
        options: dict[str, Any] = {"draws": draws, "seed": seed, "hvp": hvp, "forward": forward}
        return {"trace": curvature.trace(model, loss_fn, data, **options)}

    def gap(loss_fn: Callable[..., Tensor]) -> dict[str, float]:
        other = [] if held_out is None else held_out.batches
        found = generalization_gap(model, loss_fn, data, other, forward=forward)
        return {"loss_gap": found.loss} | ({} if found.accuracy is None else {"accuracy_gap": found.accuracy})

    def alone(name: str, measure: Callable[..., Estimate], **options: Any) -> _Step:
        return lambda loss_fn: {name: measure(model, loss_fn, data, rho=sizes[name], **options)}

    steps: dict[str, _Step] = {
        "loss": first,
        "one step": alone("one_step", one_step, **whole),
        "one step, adaptive": alone("one_step_adaptive", one_step, adaptive=True, **whole),
        "one step, p = inf": alone("one_step_inf", one_step, p=math.inf, **whole),
        "m-sharpness": alone("m_sharpness", m_sharpness, m=m, **whole),
        "projected ascent": alone("projected_ascent", projected_ascent, seed=seed, **whole),
        "worst case": alone("worst_case", worst_case, seed=seed, **whole),
        "average case": alone("average_case", average_case, **random),
        "random direction": alone("random_direction", random_direction, **random),
    }
    if eigenvalues:
        steps |= {"eigenvalues": spectrum, "trace": trace}
    if held_out is not None:
        steps["gap"] = gap
    rows: dict[str, Row] = {}
    with shown(progress, "{task.description:<18}", "{task.fields[batches]} batches") as bar:
        task = None if bar is None else bar.add_task("", total=len(steps), batches=0)
        batches = 0

        def counted(*arguments: Any) -> Tensor:
            nonlocal batches
            batches += 1
            if bar is not None:
                bar.update(task, batches=batches)
            return loss_fn(*arguments)

        for number, (title, step) in enumerate(steps.items()):
            if bar is not None:
                bar.update(task, description=title, completed=number)
            start = time.perf_counter()
            found = step(counted)
            seconds = time.perf_counter() - start
            for name, value in found.items():
                exact = value if isinstance(value, Estimate) else Estimate([value], is_random=False)
                rows[name] = Row(exact, sizes.get(name), seconds, _meaning(name, m))
        if bar is not None:
            bar.update(task, completed=len(steps))
    return Report(rows, rho=rho, samples=objective.count, seed=seed)


_Step = Callable[[Callable[..., Tensor]], Mapping[str, float]]


def _meaning(name: str, m: int) -> str:
    if name.startswith("eigenvalue_"):
        return f"curvature along eigenvector {name.rpartition('_')[2]}"
    return {
        "loss": "mean loss of a sample",
        "gradient_norm": "slope at the weights",
        "one_step": "rise at SAM's perturbation",
        "one_step_adaptive": "rise at ASAM's perturbation",
        "one_step_inf": "rise along the gradient's signs",
        "m_sharpness": f"rise at SAM's perturbation of {m} samples",
        "projected_ascent": "rise after 20 ascent steps in a ball",
        "worst_case": "largest rise found in a ball",
        "average_case": "mean rise with normal noise",
        "random_direction": "mean rise on the sphere",
        "eigenvalue": "largest curvature in any direction",
        "trace": "sum of all curvatures",
        "loss_gap": "test loss - training loss",
        "accuracy_gap": "training accuracy - test accuracy",
    }[name]


def _number(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None
