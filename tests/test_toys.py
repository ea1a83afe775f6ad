"""The toys are what their formulas say, SAM on them is our SAM, and the bounds use constants that hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sam_kernels import SAM, recipes
from sam_kernels.experiments import convergence
from sam_kernels.experiments.experiment import Settings, Trial
from sam_kernels.experiments.groups import toys
from sam_kernels.experiments.groups.toys.functions import BARRIER, LINE, PLANE, AtPoint, Toy, descend, kappa


def points(*rows: float | tuple[float, ...]) -> Tensor:
    return torch.tensor([r if isinstance(r, tuple) else (r,) for r in rows], dtype=torch.float64)


# As the document writes them, for torch to differentiate.
WRITTEN = {
    "line": (LINE, lambda p: p[0] ** 2 * (p[0] - 1) ** 2 / (p[0] ** 2 + 0.0001)),
    "plane": (PLANE, lambda p: (p[0] - 1) ** 2 * p[1] ** 2),
}
PLACES = {
    "line": points(-0.7, -0.01, 0.0, 0.003, 0.02, 0.045, 0.4, 1.0, 1.7),
    "plane": points((2.0, 1.3), (0.4, -0.8), (1.0, 0.78), (1.0, 0.0), (-1.5, 3.0)),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_derivatives_are_those_of_the_function_as_documented(name):
    toy, written = WRITTEN[name]
    at = PLACES[name]
    for i, p in enumerate(at):
        q = p.clone().requires_grad_()
        value = written(q)
        (gradient,) = torch.autograd.grad(value, q)
        hessian = torch.autograd.functional.hessian(written, p)
        torch.testing.assert_close(toy.value(at)[i], value.detach())
        torch.testing.assert_close(toy.gradient(at)[i], gradient, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(toy.hessian(at)[i], hessian, rtol=1e-8, atol=1e-8)
        assert float(toy.top(at)[i]) == pytest.approx(
            float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-8, abs=1e-8
        )


def test_the_sharp_and_the_flat_minimum_have_the_curvatures_that_are_stated():
    assert LINE.top(points(0.0, 1.0)).tolist() == pytest.approx([20_000, 2 / 1.0001])
    assert PLANE.top(points(PLANE.sharp, PLANE.flat)).tolist() == pytest.approx([1.225, 0.0])
    around = LINE.gradient(points(BARRIER - 1e-6, BARRIER + 1e-6))[:, 0]
    assert around[0] > 0 > around[1], "the barrier is a maximum, to its last digit"


@pytest.mark.parametrize("rho", [0.0, 1e-5, 0.1])
@pytest.mark.parametrize(
    ("toy", "start", "lr"), [(PLANE, (2.0, 1.3), 0.1), (PLANE, (-0.6, -1.8), 0.1), (LINE, (-0.2,), 1e-3)]
)
def test_many_starts_at_a_time_go_where_our_optimizer_goes(toy: Toy, start, lr, rho):
    starts = points(start, tuple(0.9 * s for s in start))  # a second one, which must not matter
    ends, kept = descend(toy, starts, lr=lr, rho=rho, steps=60, keep=(0, 7, 60))
    model = AtPoint(toy, start)
    opt = SAM(model.parameters(), torch.optim.SGD, recipe=recipes.sam(rho=rho), lr=lr)
    seen = [model.point.detach().clone()]

    def closure():
        opt.zero_grad()
        loss = model(torch.zeros(1))
        loss.backward()
        return loss

    for _ in range(60):
        opt.step(closure)
        seen.append(model.point.detach().clone())
    assert (seen[-1] - seen[0]).norm() > 0.01, "it went somewhere"
    for step, found in zip((0, 7, 60), kept[:, 0], strict=True):
        torch.testing.assert_close(found, seen[step], rtol=1e-9, atol=1e-12)
    assert torch.equal(ends, kept[-1])


@pytest.mark.parametrize("rho", [0.1, 0.004])
@pytest.mark.parametrize(
    ("toy", "point"), [(PLANE, (2.0, 1.3)), (PLANE, PLANE.sharp), (LINE, (0.0,)), (LINE, (0.5,))]
)
def test_kappa_is_above_every_point_of_the_ball_and_close_to_the_best(toy: Toy, point, rho):
    generator = torch.Generator().manual_seed(3)
    at = points(point)
    e = torch.randn(50_000, at.shape[1], dtype=torch.float64, generator=generator)
    e *= (
        rho
        * torch.rand(50_000, 1, dtype=torch.float64, generator=generator) ** 0.1
        / e.norm(dim=1, keepdim=True)
    )
    rises = toy.value(at + e) - toy.value(at)
    found = kappa(toy, point, rho)
    assert rises.max() <= found * (1 + 1e-9)
    assert float(rises.max()) > 0.99 * found


def test_at_a_minimum_kappa_is_half_of_rho_squared_times_the_largest_eigenvalue():
    for toy, point in ((LINE, (0.0,)), (LINE, (1.0,)), (PLANE, (1.0, -0.6)), (PLANE, (1.7, 0.0))):
        top = float(torch.linalg.eigvalsh(toy.hessian(points(point)))[0, -1])
        assert kappa(toy, point, 1e-4) == pytest.approx(0.5 * 1e-8 * top, rel=2e-3)


def test_in_one_dimension_gradient_descent_stays_and_sam_leaves():
    options = {"problem": "line", "lr": 2e-4, "starts": 31, "steps": 3000, "paths": True}
    gd, sam = (toys.run(Trial("", 0, options | {"rho": rho}), None) for rho in (0.0, 0.1))
    assert gd["from_sharp"] == sam["from_sharp"] == 11
    assert gd["leave_sharp"] == 0 and sam["leave_sharp"] == 11
    assert gd["sharp"] + gd["between"] + gd["flat"] + gd["diverged"] == 31
    assert sam["between"] > 0 and sam["between_at"] == pytest.approx(0.1, abs=0.01), (
        "held where the probe is at 0"
    )
    assert [path[0] for path in sam["paths"]] == [path[0] for path in gd["paths"]]


def test_in_two_dimensions_the_documented_pair_needs_a_radius_of_a_tenth():
    def top(rho: float) -> float:
        found = toys.run(Trial("", 0, {"problem": "start", "rho": rho, "lr": 0.1, "steps": 1000}), None)
        assert found["top"] == pytest.approx(found["top_closed"], rel=1e-3)
        x, y = found["end"]
        u = x - 1
        closed = u * u + y * y + math.sqrt((u * u - y * y) ** 2 + 16 * u * u * y * y)
        assert found["top_closed"] == pytest.approx(closed)
        return found["top"]

    assert top(0.0) == pytest.approx(1.225, rel=0.01)
    assert top(1e-5) == pytest.approx(1.225, rel=0.01)
    assert top(0.1) == pytest.approx(0.016, rel=0.1)


def toy_claims():
    """Of rows with the numbers that 3,000 starts gave, and a part of them."""
    from sam_kernels.experiments.groups.toys.findings import findings

    def row(problem, numbers, seed=0, **options):
        return {"arm": "", "seed": seed, "options": {"problem": problem, **options}, "numbers": numbers}

    line = {"from_sharp": 105, "between": 0, "between_at": None, "sharp": 105, "flat": 196, "leave_sharp": 0}
    out = line | {"sharp": 0, "between": 115, "between_at": 0.1, "flat": 186, "leave_sharp": 105}
    rows = [row("line", line, lr=5e-5, rho=0.0, starts=301), row("line", out, lr=5e-5, rho=0.1, starts=301)]
    plane = {"finite": 1000, "gd_diverged": 0, "tenfold": 0, "documented": 0, "nearer": 1000}
    plane |= {"median_nearer": 1e-5, "gd_median": 1.0, "sam_median": 1.0, "checked_difference": 0.0}
    for seed, middle in enumerate((0.11, 0.12, 0.2)):
        rows.append(row("plane", plane, seed, half=2.0, rho=1e-5, starts=1000))
        large = plane | {"documented": 5 * (seed == 0), "median_nearer": middle}
        rows.append(row("plane", large, seed, half=2.0, rho=0.1, starts=1000))
        rows.append(row("plane", plane | {"nearer": 790}, seed, half=4.5, rho=1e-5, starts=1000))
    end = {"start": [2.0, 1.3], "end": [1.0, 0.1], "distance": 0.1, "top": 0.0172, "top_closed": 0.0172}
    rows.append(row("start", end, rho=0.1))
    return findings(rows).claims


def test_claims_of_the_toys_say_no_more_than_was_seen():
    line, pair, nearer = toy_claims()[:3]
    assert "agrees in part" in line.measured and "chosen to reach over the barrier" in line.measured
    assert "186 of all 301 starts end at the flat minimum" in line.measured and "115 end at" in line.measured
    assert "With radius 0.1 some starts show the documented pair (5), with 1e-5 none." in pair.measured
    assert "ends at 0.0172" in pair.measured and "those of a radius near" not in pair.measured
    assert "2370 of 3000 (79 %), which the verdict leaves out" in nearer.measured
    assert "by 0.11 to 0.2 in the medians of the draws" in nearer.measured


def test_counts_over_random_starts_are_those_of_the_starts():
    options = {"problem": "plane", "half": 4.5, "rho": 0.1, "starts": 60, "lr": 0.1, "steps": 300, "pairs": 5}
    found = toys.run(Trial("sam", 5, options), None)
    generator = torch.Generator().manual_seed(5)
    starts = (2 * torch.rand(60, 2, dtype=torch.float64, generator=generator) - 1) * 4.5 + points((1.0, 0.0))
    assert (starts[:, 0] - 1).abs().max() <= 4.5 and starts.std() > 1
    tops = [PLANE.top(descend(PLANE, starts, lr=0.1, rho=rho, steps=300)[0]) for rho in (0.0, 0.1)]
    ok = tops[0].isfinite() & tops[1].isfinite()
    assert found["finite"] == int(ok.sum()) and 0 < found["gd_diverged"] == int((~tops[0].isfinite()).sum())
    assert found["tenfold"] == int((tops[1] < tops[0] / 10)[ok].sum())
    assert found["pairs"][0] == pytest.approx([float(tops[0][ok][0]), float(tops[1][ok][0])], rel=1e-4)
    assert found["checked_difference"] < 1e-3
    assert toys.run(Trial("sam", 6, options), None)["pairs"] != found["pairs"], "another seed, other starts"


def test_findings_of_some_rows_are_tables_and_claims(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the picture, is not installed")
    small = {"line": {"starts": 31, "steps": 500}, "plane": {"starts": 40, "steps": 200}}
    rows = []
    for trial in toys.trials(Settings(quick=True)):
        options = trial.options | small.get(trial.options["problem"], {})
        if (
            options.get("place", "").startswith("plane")
            or options.get("lr") == 5e-5
            or options.get("rho") in (1e-5, 0.1)
        ):
            rows.append(
                {
                    "arm": trial.arm,
                    "seed": 0,
                    "options": options,
                    "numbers": toys.run(Trial("", 0, options), None),
                }
            )
    found = toys.EXPERIMENT.findings(rows)
    assert len(found.tables) == 4 and len(found.claims) == 5
    assert all(len(line) == len(table.columns) for table in found.tables for line in table.rows)
    verdicts = {claim.says[:30]: claim.verdict for claim in found.claims}
    assert verdicts["at a minimum kappa_rho is abou"] == "disagrees", "the factor 1/2"
    assert verdicts["where the gradient is not zero"] == "agrees"
    found.draw(tmp_path / "toys.png")
    assert (tmp_path / "toys.png").stat().st_size > 20_000
    nothing = toys.EXPERIMENT.findings([])
    assert {claim.verdict for claim in nothing.claims} == {"not measured"}


# ---- convergence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quadratic", "logistic"])
def test_the_constants_of_a_problem_hold(name):
    of = convergence.problem(name)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        w = torch.randn(10, dtype=torch.float64, generator=generator)
        h = 1e-5 * torch.randn(10, dtype=torch.float64, generator=generator)
        rise = (of.value(w + h) - of.value(w - h)) / 2
        assert rise == pytest.approx(float(of.gradient(w) @ h), rel=1e-5, abs=1e-12)
        v = w + torch.randn(10, dtype=torch.float64, generator=generator)
        assert (of.gradient(v) - of.gradient(w)).norm() <= of.smoothness * (v - w).norm() * (1 + 1e-9)
    noisy = torch.stack([of.noisy(w, of.draw(generator)) for _ in range(4000)])
    spread = (noisy - of.gradient(w)).square().sum(1)
    # Four standard errors of 4000 draws.
    assert float(spread.mean()) == pytest.approx(of.variance(w), abs=4 * float(spread.std()) / 4000**0.5)
    assert (noisy.mean(0) - of.gradient(w)).norm() < 4 * (of.variance(w) / 4000) ** 0.5


def test_the_bound_is_the_documents_formula_over_the_run():
    found = convergence.bound_trial("logistic", seed=2, rho_0=0.2, horizons=(20, 150))
    lr, rho, at = found["lr_0"], found["rho_0"], found["at"][1]
    assert lr == pytest.approx(0.5 / found["L"]) and rho == 0.2

    # The same run, written out.
    of = convergence.problem("logistic")
    generator, w, squared = torch.Generator().manual_seed(2), of.start.clone(), []
    for t in range(1, 151):
        batch = of.draw(generator)
        squared.append(float(of.gradient(w).square().sum()))
        g = of.noisy(w, batch)
        w = w - lr / t**0.5 * of.noisy(w + rho / t**0.5 * g / g.norm(), batch)
    assert at["mean"] == pytest.approx(sum(squared) / 150, rel=1e-9)
    c1 = 2 / lr * (of.value(of.start) - of.value(w))
    c2 = 2 * (found["L"] * found["sigma2"] * lr + found["L"] * found["G"] * rho)
    bound = c1 / math.sqrt(150) + c2 * math.log(150) / math.sqrt(150)
    assert at["bound"] == pytest.approx(bound, rel=1e-9) and at["share"] == pytest.approx(at["mean"] / bound)
    assert found["G"] >= max(squared) ** 0.5 and 0 < at["share"] < 1


def test_the_slope_is_the_one_of_the_means():
    found = convergence.slope_trial("quadratic", recipe="samar", horizons=(20, 80, 320))
    xs = torch.tensor([at["K"] for at in found["at"]]).double().log()
    ys = torch.tensor([at["mean_squared"] for at in found["at"]]).double().log()
    line = torch.linalg.lstsq(torch.stack([xs, torch.ones(3).double()], 1), ys[:, None]).solution
    assert found["slope"] == pytest.approx(float(line[0, 0])) and found["slope"] < -0.2
    plain = convergence.slope_trial("quadratic", recipe=None, horizons=(20, 80))
    assert plain["at"][0]["mean_squared"] != found["at"][0]["mean_squared"]
    same = convergence.slope_trial(
        "quadratic", recipe="samar", horizons=(20, 80), lambda_0=0.0, up=1.0, down=1.0
    )
    assert same["at"][0]["mean_squared"] == pytest.approx(plain["at"][0]["mean_squared"], rel=1e-9)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: convergence.problem("cubic"), "Known: quadratic, logistic"),
        (lambda: convergence.bound_trial(horizons=(100, 10)), "increasing numbers from at least 2"),
        (lambda: convergence.slope_trial(horizons=(100,)), "two or more"),
    ],
)
def test_a_wrong_call_gets_a_sentence(call, said):
    with pytest.raises(ValueError, match=said):
        call()
