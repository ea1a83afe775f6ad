"""Toy separations: SAM and gradient descent where one minimum is sharp and another flat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .... import sharpness
from ...experiment import Experiment, Settings, Trial
from .findings import findings
from .functions import BARRIER, LINE, PLANE, AtPoint, Toy, descend, kappa
from .pictures import LR, RHO

TITLE = "Does SAM leave sharp minima of functions that one can draw?"
PROTOCOL = """
One dimension: f(x) = x^2 (x-1)^2 / (x^2 + 0.0001) has minima of height 0 at x = 0 (second derivative 20,000)
and x = 1 (2), and a barrier at x = 0.045 between them. The document gives neither step size nor radius. Ours
by rule: the step size is 5e-5, half of 2 / 20,000, the largest at which gradient descent can rest at x = 0;
the radius is 0.1, which reaches over the barrier from x = 0. Other values are in the table. 301 starts from
-1 to 2, at most 20,000 steps; a start ends "sharp" left of the barrier, "flat" within 0.3 of x = 1, and else
"between".

Two dimensions: f(x, y) = (x-1)^2 y^2, step size 0.1, 1,000 steps, as documented; radius 1e-5 as documented,
and larger ones. The start is not documented: we take 1,000 random ones, uniform in the square |x-1|, |y| < 2,
three times, and again for |x-1|, |y| < 4.5, where gradient descent diverges from some. The largest eigenvalue
of the Hessian at the end has a closed form; at some ends it is also measured with
`sam_kernels.sharpness.eigenvalues`. A start shows the documented pair if gradient descent ends within 5 % of
1.225 and SAM within 5 % of 0.016. The same is asked of a grid of starts: (1 + i/20, j/20), i and j up to 60.

Sharpness: kappa_rho, the largest rise of f within the distance rho, is found on a fine grid over the ball and
compared with rho ||g|| and with rho^2 lambda_1. Expanding, f(x+e) - f(x) = g.e + (1/2) e.H.e + ..., so where
the gradient g is zero the largest rise is (1/2) rho^2 lambda_1: the review's rho^2 lambda_1 lacks the factor
1/2.
"""

LINE_GRID = [(lr, rho) for lr in (5e-5, 2e-4, 7e-4, 1e-3, 1e-2) for rho in (0.0, 0.01, 0.03, 0.1, 0.3)]
RADII = (1e-5, 1e-3, 1e-2, 1e-1)
START = (2.0, 1.3)  # on the grid of starts, closest to the documented pair among those with one decimal
# Where kappa is measured: name, function, point.
PLACES: dict[str, tuple[Toy, tuple[float, ...]]] = {
    "line, sharp minimum x = 0": (LINE, (0.0,)),
    "line, flat minimum x = 1": (LINE, (1.0,)),
    "line, slope x = 0.5": (LINE, (0.5,)),
    "plane, minimum (1, 0.783)": (PLANE, PLANE.sharp),
    "plane, slope (2, 1.3)": (PLANE, START),
}


def trials(settings: Settings) -> list[Trial]:
    """All of them; --seeds is how many times 1,000 random starts are drawn (default 3)."""
    quick = settings.quick
    out = []
    for lr, rho in LINE_GRID[:10] if quick else LINE_GRID:
        most = 200 if quick else 20_000
        options = {
            "problem": "line",
            "lr": lr,
            "rho": rho,
            "starts": 31 if quick else 301,
            "steps": min(most, round(5 / lr)),
        }
        if lr == LR and rho in (0.0, RHO):
            options["paths"] = True  # for the picture
        out.append(Trial("sam" if rho else "gd", 0, options))
    shared = {"lr": 0.1, "steps": 100 if quick else 1000}
    for seed in range(1 if quick else settings.seeds or 3):
        for half in (2.0, 4.5):
            for rho in RADII:
                options = {"problem": "plane", "half": half, "rho": rho, "starts": 50 if quick else 1000}
                if seed == 0 and half == 2.0:
                    options["pairs"] = 200  # for the picture
                out.append(Trial("sam", seed, options | shared))
    for rho in RADII:
        out.append(Trial("sam", 0, {"problem": "grid", "rho": rho, "side": 6 if quick else 60} | shared))
        out.append(Trial("sam", 0, {"problem": "start", "rho": rho} | shared))
    out.append(Trial("gd", 0, {"problem": "start", "rho": 0.0} | shared))
    out += [Trial("kappa", 0, {"problem": "kappa", "place": place}) for place in PLACES]
    return out


def run(trial: Trial, data: Path | None) -> dict[str, Any]:
    """One of the kinds below."""
    options = dict(trial.options)
    kinds: dict[str, Callable[..., dict[str, Any]]] = {
        "line": _line,
        "plane": _plane,
        "grid": _grid,
        "start": _start,
        "kappa": _kappa,
    }
    kind = kinds[options.pop("problem")]
    return kind(seed=trial.seed, **options) if kind is _plane else kind(**options)


def _line(*, lr: float, rho: float, starts: int, steps: int, paths: bool = False) -> dict[str, Any]:
    x = torch.linspace(-1, 2, starts, dtype=torch.float64)[:, None]
    ends, _ = descend(LINE, x, lr=lr, rho=rho, steps=steps)
    end = ends[:, 0]
    finite = end.isfinite()
    sharp, flat = finite & (end < BARRIER), finite & ((end - 1).abs() < 0.3)
    between = finite & ~sharp & ~flat
    out: dict[str, Any] = {
        "sharp": int(sharp.sum()),
        "flat": int(flat.sum()),
        "between": int(between.sum()),
        "between_at": _median(end[between]),
        "diverged": int((~finite).sum()),
        "from_sharp": int((x[:, 0] < BARRIER).sum()),
        "leave_sharp": int(((x[:, 0] < BARRIER) & finite & ~sharp).sum()),
    }
    if paths:
        keep = sorted({round(steps ** (i / 79)) for i in range(80)} | {0})
        drawn = torch.tensor([-0.8, -0.4, -0.1, 0.02, 0.3, 1.6], dtype=torch.float64)[:, None]
        _, kept = descend(LINE, drawn, lr=lr, rho=rho, steps=steps, keep=keep)
        out["path_steps"] = keep
        out["paths"] = [[_short(v) for v in path] for path in kept[:, :, 0].T.tolist()]
    return out


def _plane(
    *, seed: int, half: float, lr: float, rho: float, starts: int, steps: int, pairs: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    offsets = (2 * torch.rand(starts, 2, dtype=torch.float64, generator=generator) - 1) * half
    found = _both(offsets + torch.tensor(PLANE.flat, dtype=torch.float64), lr, rho, steps)
    gd, sam, nearer = found["gd"], found["sam"], found["nearer"]
    ok = gd.isfinite() & sam.isfinite()
    checked = [_difference(found["ends"][i], sam[i]) for i in ok.nonzero()[:10, 0].tolist()]
    return {
        "finite": int(ok.sum()),
        "gd_diverged": int((~gd.isfinite()).sum()),
        "sam_diverged": int((~sam.isfinite()).sum()),
        "tenfold": int((ok & (sam < gd / 10)).sum()),
        "half": int((ok & (sam < gd / 2)).sum()),
        "higher": int((ok & (sam > gd * 1.01)).sum()),
        "nearer": int((ok & (nearer > 0)).sum()),
        "median_nearer": _median(nearer[ok]),
        "documented": int((ok & _documented(gd, sam)).sum()),
        "gd_median": _median(gd[ok]),
        "sam_median": _median(sam[ok]),
        "ratio_median": _median(sam[ok] / gd[ok]),
        "checked_difference": max(checked, default=0.0),
        "pairs": [[_short(a), _short(b)] for a, b in zip(gd[ok][:pairs], sam[ok][:pairs], strict=True)],
    }


def _grid(*, side: int, lr: float, rho: float, steps: int) -> dict[str, Any]:
    """Starts with round coordinates that show the documented pair."""
    places = torch.arange(1, side + 1, dtype=torch.float64) / 20 * (60 / side)
    starts = torch.cartesian_prod(places + 1, places)
    found = _both(starts, lr, rho, steps)
    gd, sam = found["gd"], found["sam"]
    like = (gd / 1.225 - 1).abs() < 0.05
    shown = like & _documented(gd, sam)
    return {
        "starts": len(starts),
        "gd_alike": int(like.sum()),
        "sam_of_these": [_short(v) for v in (sam[like].min(), sam[like].max())] if like.any() else [],
        "documented": int(shown.sum()),
        "examples": [
            [_short(v) for v in (*start, a, b)]
            for start, a, b in zip(starts[shown].tolist(), gd[shown], sam[shown], strict=True)
        ],
    }


def _start(*, lr: float, rho: float, steps: int) -> dict[str, Any]:
    """One start, with its way and what our tools say of its end."""
    start = torch.tensor([START], dtype=torch.float64)
    keep = sorted({round(steps ** (i / 119)) for i in range(120)} | {0})
    end, path = descend(PLANE, start, lr=lr, rho=rho, steps=steps, keep=keep)
    model = AtPoint(PLANE, end[0].tolist())
    return {
        "start": list(START),
        "end": end[0].tolist(),
        "distance": float((end[0] - torch.tensor(PLANE.flat, dtype=torch.float64)).norm()),
        "top": float(sharpness.eigenvalues(model, *model.data).values[0]),
        "top_closed": float(PLANE.top(end)[0]),
        "path": [[_short(v) for v in point] for point in path[:, 0].tolist()],
    }


def _kappa(*, place: str) -> dict[str, Any]:
    toy, point = PLACES[place]
    at = torch.tensor([point], dtype=torch.float64)
    slope, top = float(toy.gradient(at).norm()), float(toy.top(at)[0])
    model = AtPoint(toy, point)
    found = []
    for rho in (1e-1, 1e-2, 1e-4):
        ascent = sharpness.projected_ascent(model, *model.data, rho=rho, restarts=4, samples=None, m=None)
        found.append(
            {
                "rho": rho,
                "kappa": kappa(toy, point, rho),
                "slope": rho * slope,
                "half_curvature": rho**2 * top / 2,
                "one_step": float(sharpness.one_step(model, *model.data, rho=rho)),
                "projected_ascent": float(ascent),
            }
        )
    return {"gradient": slope, "top": top, "at": found}


def _both(starts: Tensor, lr: float, rho: float, steps: int) -> dict[str, Tensor]:
    """Largest eigenvalues where gradient descent and SAM end, and how much nearer to (1, 0) SAM does."""
    flat = torch.tensor(PLANE.flat, dtype=torch.float64)
    gd, sam = (descend(PLANE, starts, lr=lr, rho=r, steps=steps)[0] for r in (0.0, rho))
    nearer = (gd - flat).norm(dim=1) - (sam - flat).norm(dim=1)
    return {"gd": PLANE.top(gd), "sam": PLANE.top(sam), "nearer": nearer, "ends": sam}


def _documented(gd: Tensor, sam: Tensor) -> Tensor:
    return ((gd / 1.225 - 1).abs() < 0.05) & ((sam / 0.016 - 1).abs() < 0.05)


def _difference(end: Tensor, closed: Tensor) -> float:
    """By how much our measured eigenvalue differs from the closed form."""
    model = AtPoint(PLANE, end.tolist())
    measured = sharpness.eigenvalues(model, *model.data, method="power")
    return abs(float(measured.values[0]) - float(closed))


def _median(values: Tensor) -> float | None:
    return _short(values.median()) if len(values) else None


def _short(value: float | Tensor) -> float:
    return float(f"{float(value):.5g}")


EXPERIMENT = Experiment(
    name="toys",
    title=TITLE,
    protocol=PROTOCOL,
    source="the review of SAM, toy examples",
    trials=trials,
    run=run,
    findings=findings,
    minutes=2,
)
