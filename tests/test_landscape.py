"""Landscapes: values against formulas, directions, pictures, and what is left of the model."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from fixtures import values
from torch import nn
from torch.nn import functional as F

from sam_kernels.sharpness import Landscape, Objective, compare, eigenvalues, line, plane
from sam_kernels.sharpness.directions import directions_of
from sam_kernels.sharpness.vectors import dot, norm


class Bowl(nn.Module):
    """L = 0.5 w^T H w + c . w, so every slice is a parabola."""

    H = torch.tensor([[3.0, 0.5, 0.0], [0.5, 1.0, -0.2], [0.0, -0.2, 0.4]], dtype=torch.float64)
    C = torch.tensor([0.3, -0.1, 0.2], dtype=torch.float64)
    START = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(self.START.clone())

    def forward(self, x):
        return (0.5 * self.w @ self.H @ self.w + self.C @ self.w) * x.mean()


def itself(output, target):
    return output


ONE = torch.ones(1, 1, dtype=torch.float64)
BOWL = (itself, [(ONE, ONE)])


def parabola(w):
    return (0.5 * w @ Bowl.H @ w + Bowl.C @ w).item()


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(36, 3)
    model = nn.Sequential(*layers).to(dtype)
    x, y = torch.randn(10, 2, 5, 5, dtype=dtype), torch.randint(3, (10,))
    F.cross_entropy(model(x), y).backward()
    model[1].eval()
    return model, F.cross_entropy, [(x[:7], y[:7]), (x[7:], y[7:])]


def found_directions(problem, wished, normalize=None, orthogonal=None, seed=0):
    model, loss_fn, batches = problem
    objective = Objective(model, loss_fn, batches)
    with objective.held():
        kinds = [normalize] * len(wished)
        return [d for *_, d in directions_of("plane", objective, wished, kinds, seed, "exact", orthogonal)]


# ---- values --------------------------------------------------------------------------------------------


def test_a_line_along_a_given_direction_is_the_parabola():
    d = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    found = line(Bowl(), *BOWL, [d], radius=0.5, points=5)
    np.testing.assert_allclose(found.coordinates[0], [-0.5, -0.25, 0, 0.25, 0.5], rtol=1e-15)
    np.testing.assert_allclose(
        found.losses, [parabola(Bowl.START + a * d) for a in found.coordinates[0]], rtol=1e-13
    )
    assert found.base == parabola(Bowl.START) == found.losses[2]
    assert found.directions == ("given",) and found.normalize == ("none",)
    assert found.norms[0] == pytest.approx(d.norm().item())
    assert found.weights_norm == pytest.approx(Bowl.START.norm().item())
    assert found.samples == 1
    (place,), least = found.lowest
    assert least == found.losses.min() and found.losses[found.coordinates[0] == place] == least


def test_a_plane_has_the_first_direction_by_rows():
    d = torch.eye(3, dtype=torch.float64)
    found = plane(Bowl(), *BOWL, ([d[0]], [d[1] + d[2]]), radius=(0.5, 2.0), points=3)
    truth = [
        [parabola(Bowl.START + a * d[0] + b * (d[1] + d[2])) for b in (-2, 0, 2)] for a in (-0.5, 0, 0.5)
    ]
    np.testing.assert_allclose(found.losses, truth, rtol=1e-13)
    assert found.losses.shape == (3, 3) and found.cosine == 0
    (a, b), least = found.lowest
    assert parabola(Bowl.START + a * d[0] + b * (d[1] + d[2])) == pytest.approx(least) == found.losses.min()


def test_the_gradient_goes_uphill_and_is_one_long():
    found = line(Bowl(), *BOWL, "gradient", radius=1e-3, points=3)
    g = Bowl.H @ Bowl.START + Bowl.C
    slope = (found.losses[2] - found.losses[0]) / 2e-3
    assert slope == pytest.approx(g.norm().item(), rel=1e-9)
    assert found.norms == pytest.approx((1.0,))


def test_eigenvectors_have_the_curvature_of_the_eigenvalues():
    truth = np.linalg.eigvalsh(Bowl.H.numpy())[::-1]
    found = plane(Bowl(), *BOWL, ("eigenvector", "eigenvector"), radius=0.1, points=3)
    for row, value in zip((found.losses[:, 1], found.losses[1]), truth, strict=False):
        assert (row[0] + row[2] - 2 * row[1]) / 0.01 == pytest.approx(value, rel=1e-9)
    assert found.cosine == pytest.approx(0, abs=1e-12)
    alone = line(Bowl(), *BOWL, "eigenvector", radius=0.1, points=3)
    np.testing.assert_allclose(alone.losses, found.losses[:, 1], rtol=1e-12)


def test_losses_are_those_of_the_mean_over_all_samples_in_evaluation_mode():
    model, loss_fn, batches = network(torch.float64)
    (d,) = found_directions((model, loss_fn, batches), ["random"])
    found = line(model, loss_fn, batches, points=3, radius=0.7)
    model.eval()
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    with torch.no_grad():
        for a, loss in zip(found.coordinates[0], found.losses, strict=True):
            moved = {n: p + a * e for (n, p), e in zip(model.named_parameters(), d, strict=True)}
            output = torch.func.functional_call(model, moved, (x,))
            assert loss == pytest.approx(loss_fn(output, y).item(), rel=1e-12)
    assert found.samples == 10


def test_an_odd_number_of_points_has_the_weights_among_them_to_the_bit():
    problem = network()
    for radius in (1.0, 0.3, 1e-3, 7.7):
        found = line(*problem, radius=radius, points=7)
        assert found.coordinates[0][3] == 0 and found.losses[3] == found.base
        assert found.coordinates[0][-1] == radius == -found.coordinates[0][0]


def test_a_grid_has_no_drift():
    # One point reached by a long way has the loss of the point alone.
    problem = network()
    dense, sparse = (line(*problem, points=points) for points in (201, 3))
    assert [dense.losses[0], dense.losses[100], dense.losses[200]] == sparse.losses.tolist()


# ---- directions ----------------------------------------------------------------------------------------


def test_filters_of_a_random_direction_are_as_long_as_those_of_the_weights():
    problem = network()
    (d,) = found_directions(problem, ["random"])
    for e, p in zip(d, problem[0].parameters(), strict=True):
        if p.dim() < 2:
            assert not e.any(), "biases and scales stay"
        else:
            own, weights = (t.detach().flatten(1).norm(dim=1) for t in (e, p))
            torch.testing.assert_close(own, weights)
            assert len(set(own.tolist())) > 1 and own.min() > 0
            assert abs(torch.nn.functional.cosine_similarity(e.flatten(), p.detach().flatten(), 0)) < 0.5


def test_layers_of_a_random_direction_are_as_long_as_those_of_the_weights():
    problem = network()
    (d,) = found_directions(problem, ["random"], "layer")
    for e, p in zip(d, problem[0].parameters(), strict=True):
        assert e.norm().item() == pytest.approx(p.norm().item() if p.dim() > 1 else 0, rel=1e-5)


def test_filters_that_are_zero_stay_zero():
    problem = network()
    with torch.no_grad():
        problem[0][0].weight[1] = 0
    (d,) = found_directions(problem, ["random"])
    assert not d[0][1].any() and d[0][0].all()


def test_random_directions_differ_by_seed_and_place_and_not_by_torch():
    problem = network()
    first, second = found_directions(problem, ["random", "random"])
    torch.manual_seed(99)
    again, _ = found_directions(problem, ["random", "random"])
    other, _ = found_directions(problem, ["random", "random"], seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for d in (second, other):
        assert abs(dot(first, d) / norm(first) / norm(d)) < 0.4


def test_a_second_direction_is_made_orthogonal_at_the_same_length():
    problem = network(torch.float64)
    g, v = found_directions(problem, ["gradient", "eigenvector"])
    assert dot(g, v) == pytest.approx(0, abs=1e-12) and norm(v) == pytest.approx(1)
    _, free = found_directions(problem, ["gradient", "eigenvector"], orthogonal=False)
    assert abs(dot(g, free)) > 1e-3
    spectrum = eigenvalues(*problem)
    assert abs(dot(free, spectrum.vectors[0])) == pytest.approx(1)
    # v lies in the plane of the two, whatever was taken out.
    rest = [x - dot(free, g) * y for x, y in zip(free, g, strict=True)]
    assert dot(rest, v) == pytest.approx(norm(rest))
    a, b = found_directions(problem, ["random", "random"], orthogonal=True)
    assert dot(a, b) == pytest.approx(0, abs=1e-10)


# ---- files ---------------------------------------------------------------------------------------------


def small(label="", dims=2, scale=1.0):
    d = torch.eye(3, dtype=torch.float64)
    if dims == 1:
        found = line(Bowl(), *BOWL, "gradient", points=9, label=label)
    else:
        found = plane(Bowl(), *BOWL, ([d[0]], [d[1]]), points=9, label=label)
    return dataclasses.replace(found, losses=found.losses * scale)


def pixels(path):
    image = pytest.importorskip("matplotlib.image").imread(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert image.shape[0] > 500 and image.shape[1] > 700
    assert image[..., :3].std() > 0.02, "the picture is nearly one color"
    return image


@pytest.mark.parametrize("dims", [1, 2])
def test_what_is_saved_can_be_loaded(tmp_path, dims):
    pytest.importorskip("matplotlib")
    found = small("a model", dims)
    found.losses[(0,) * dims], found.losses[(1,) * dims] = math.nan, math.inf
    found.save(tmp_path / "deep" / "x.png")
    pixels(tmp_path / "deep" / "x.png")
    text = (tmp_path / "deep" / "x.json").read_text()
    assert len(text) < 5000 and "NaN" not in text and "Infinity" not in text
    for name in ("x.json", "x.png"):
        again = Landscape.load(tmp_path / "deep" / name)
        assert np.array_equal(again.losses, found.losses, equal_nan=True)
        for a, b in zip(again.coordinates, found.coordinates, strict=True):
            assert np.array_equal(a, b)
        for field in (
            "directions",
            "normalize",
            "norms",
            "cosine",
            "base",
            "weights_norm",
            "samples",
            "label",
        ):
            assert getattr(again, field) == getattr(found, field), field
    assert found.lowest[1] == np.nanmin(found.losses)


@pytest.mark.parametrize("dims", [1, 2])
def test_two_models_side_by_side_share_axes_and_colors(tmp_path, dims):
    pytest.importorskip("matplotlib")
    both = [small("flat", dims), small("sharp", dims, 7.0)]
    compare(both, tmp_path / "both.png")
    one = tmp_path / "one.png"
    both[0].save(one)
    if dims == 2:
        assert pixels(tmp_path / "both.png").shape[1] > 1.5 * pixels(one).shape[1]
    found = json.loads((tmp_path / "both.json").read_text())["landscapes"]
    for entry, own in zip(found, both, strict=True):
        assert entry["label"] == own.label
        np.testing.assert_array_equal(Landscape.from_dict(entry).losses, own.losses)
    compare(both, tmp_path / "named.png", labels=["A", "B"])
    named = json.loads((tmp_path / "named.json").read_text())["landscapes"]
    assert [entry["label"] for entry in named] == ["A", "B"]


def test_bounds_of_colors_show_small_losses_beside_large_ones():
    pytest.importorskip("matplotlib")
    from sam_kernels.sharpness.drawing import _levels

    even, clipped = _levels(np.linspace(1, 3, 50))
    assert np.allclose(np.diff(even), even[1] - even[0]) and even[0] <= 1 and even[-1] >= 3 and not clipped
    wide, clipped = _levels(np.geomspace(0.02, 50, 50))
    assert wide[0] <= 0.02 and wide[-1] >= 50 and not clipped and 8 < len(wide) <= 22
    assert max(wide[1:] / wide[:-1]) < 3
    exploded = np.array([0.1] * 30 + [1.0] * 60 + [1e30] * 10)
    cut, clipped = _levels(exploded)
    assert clipped and cut[0] <= 0.1 and 1 <= cut[-1] <= 1e4
    for odd in ([2.0, 2.0], [0.0, 0.0], [math.nan, math.inf], [-3.0, 5.0], [0.0, 1e9]):
        bounds, _ = _levels(np.array(odd))
        assert np.isfinite(bounds).all() and len(bounds) > 1 and (np.diff(bounds) > 0).all()


@pytest.mark.parametrize("fill", [math.nan, math.inf, 1e300, 0.0, -1.0])
@pytest.mark.parametrize("dims", [1, 2])
def test_any_losses_can_be_drawn(tmp_path, fill, dims):
    pytest.importorskip("matplotlib")
    found = small("", dims)
    odd = dataclasses.replace(found, losses=np.full_like(found.losses, fill), base=fill)
    odd.save(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_drawing_leaves_the_settings_of_matplotlib(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    small().save(tmp_path / "x.png")
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_values_are_written_and_the_sentence_says_what_to_install(
    tmp_path, monkeypatch
):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = small()
    with pytest.raises(ImportError, match=r"pip install 'sam_kernels\[sharpness\]'.*x.json"):
        found.save(tmp_path / "x.png")
    np.testing.assert_array_equal(Landscape.load(tmp_path / "x.json").losses, found.losses)


# ---- what is left of the model -------------------------------------------------------------------------

MEASURES = {
    "line": lambda *a: line(*a, points=5),
    "plane": lambda *a: plane(*a, points=3, progress=False),
    "gradient and eigenvector": lambda *a: plane(*a, ("gradient", "eigenvector"), points=3),
}


def look_of(model):
    return (
        [t.numpy().tobytes() for t in values([*model.parameters(), *model.buffers()])],
        [p.grad.numpy().tobytes() for p in model.parameters()],
        [m.training for m in model.modules()],
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("stop", [None, 3, 9])
def test_a_landscape_leaves_the_model_as_it_was(name, stop):
    model, loss_fn, batches = network()
    before = look_of(model)
    calls = []

    def interrupted(output, target):
        calls.append(None)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return loss_fn(output, target)

    if stop is None:
        MEASURES[name](model, interrupted, batches)
    else:
        with pytest.raises(KeyboardInterrupt):
            MEASURES[name](model, interrupted, batches)
    assert look_of(model) == before


def test_a_bar_is_shown_where_it_is_asked_for(capsys):
    pytest.importorskip("rich")
    line(Bowl(), *BOWL, "gradient", points=3, progress=False)
    assert capsys.readouterr().err == ""
    line(Bowl(), *BOWL, "gradient", points=3, progress=True)
    shown = capsys.readouterr()
    assert "loss landscape" in shown.err and "3/3" in shown.err and shown.out == ""


# ---- what is refused -----------------------------------------------------------------------------------

ZEROS = [torch.zeros(3)]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda *a: line(*a, "gradient", points=1), "points is 1; expected a whole number, at least 2"),
        (lambda *a: line(*a, "gradient", radius=0), "radius is 0; expected a positive number"),
        (lambda *a: line(*a, "downhill"), "'downhill'; expected 'random', 'gradient', 'eigenvector'"),
        (lambda *a: line(*a, "gradient", normalize="row"), "'row'; expected 'filter', 'layer' or 'none'"),
        (lambda *a: line(*a), "random direction is zero, as normalize='filter' leaves out one-dimensional"),
        (lambda *a: line(*a, ZEROS), "the given direction is zero"),
        (lambda *a: line(*a, [torch.ones(3) * math.nan]), "the given direction is not finite"),
        (
            lambda *a: line(*a, [torch.ones(2)]),
            r"direction\[0\] is \(2,\); expected a tensor \(3,\) as 'w' is",
        ),
        (lambda *a: plane(*a, "gradient"), "'gradient'; expected two of them"),
        (lambda *a: plane(*a, ("gradient", "gradient")), "two directions are parallel"),
        (lambda *a: plane(*a, ([Bowl.C], [2 * Bowl.C])), "two directions are parallel"),
        (lambda *a: plane(*a, ("gradient", "eigenvector"), radius=(1, 2, 3)), "one for each direction"),
    ],
)
def test_what_makes_no_sense_gets_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(Bowl(), *BOWL)


def test_files_that_make_no_sense_get_a_sentence(tmp_path):
    found = small()
    with pytest.raises(ValueError, match="expected one that ends in .png"):
        found.save(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match="1 landscapes; expected two or more"):
        compare([found], tmp_path / "x.png")
    with pytest.raises(ValueError, match="some are planes; expected one kind"):
        compare([found, small(dims=1)], tmp_path / "x.png")
    with pytest.raises(ValueError, match="1 labels for 2 landscapes"):
        compare([found, found], tmp_path / "x.png", labels=["a"])
    (tmp_path / "other.json").write_text('{"landscapes": []}')
    with pytest.raises(ValueError, match="expected what save wrote"):
        Landscape.load(tmp_path / "other.json")
    assert not list(tmp_path.glob("*.png"))
