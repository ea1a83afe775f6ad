"""What a reader is promised: every public name has a docstring with an example, and the examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import warnings
from pathlib import Path

import pytest
import torch

import sam_kernels
from sam_kernels import SAM, Recipe, recipes

ROOT = Path(__file__).resolve().parents[1]
# The CUDA library lies in the package once built; it has the name of an extension module, but is none.
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(sam_kernels.__path__, "sam_kernels.")
    if not re.search(r"__main__|\._native|\._C|\.libsam_kernels|triton", m.name)
)


@pytest.mark.parametrize("name", MODULES)
def test_doctests_run(name):
    module = importlib.import_module(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is(name):
    assert (importlib.import_module(name).__doc__ or "").strip()


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_has_a_formula_and_a_runnable_example(name):
    text = inspect.getdoc(getattr(recipes, name)) or ""
    assert ">>>" in text, f"recipes.{name} has no example"
    assert re.search(r"\be(_\w+)?\s*=", text), f"recipes.{name} does not state its perturbation e = ..."
    assert re.search(r"\b(19|20)\d\d\b", text), f"recipes.{name} names no source with a year"


PUBLIC = {
    "SAM": SAM,
    "Recipe": Recipe,
    "SAM.wrap": SAM.wrap,
    "SAM.step": SAM.step,
    "SAM.first_step": SAM.first_step,
    "SAM.second_step": SAM.second_step,
    "SAM.perturbed": SAM.perturbed,
    "SAM.first_pass": SAM.first_pass,
    "SAM.capturable": SAM.capturable,
    "graphs.make_graphed_step": sam_kernels.graphs.make_graphed_step,
    "SAM.backends": SAM.backends,
    "running_stats.frozen": sam_kernels.running_stats.frozen,
    "sampling.sharpest": sam_kernels.sampling.sharpest,
    "sampling.top_losses": sam_kernels.sampling.top_losses,
    "recipes.get": recipes.get,
    "recipes.names": recipes.names,
    "SAM.metrics": SAM.metrics,
    **{f"sharpness.{name}": getattr(sam_kernels.sharpness, name) for name in sam_kernels.sharpness.__all__},
}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name):
    thing = PUBLIC[name]
    own = thing.__doc__ or ""
    assert own.strip(), name
    assert not own.startswith(f"{name}("), f"{name} has the docstring a dataclass makes up"


@pytest.mark.parametrize(
    "name",
    [
        "SAM",
        "Recipe",
        "SAM.first_pass",
        "graphs.make_graphed_step",
        "running_stats.frozen",
        "recipes.get",
        "sampling.sharpest",
        "sampling.top_losses",
        "SAM.metrics",
        *(name for name in PUBLIC if name.startswith("sharpness.") and inspect.isfunction(PUBLIC[name])),
    ],
)
def test_the_main_names_have_an_example(name):
    assert ">>>" in (inspect.getdoc(PUBLIC[name]) or "")


def test_all_lists_only_what_exists():
    assert {"SAM", "Recipe", "recipes"} <= set(sam_kernels.__all__)
    for name in sam_kernels.__all__:
        assert hasattr(sam_kernels, name), name


def test_version_is_spelled_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", sam_kernels.__version__)


def readme_examples() -> list[str]:
    readme = ROOT / "README.md"
    if not readme.exists():
        return []
    return re.findall(r"^```python\n(.*?)^```", readme.read_text(), re.M | re.S)


@pytest.mark.skipif(not readme_examples(), reason="there is no README with Python examples in this tree")
def test_examples_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one saves a picture
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    loss_fn = torch.nn.functional.cross_entropy

    def closure():
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    names = {"model": model, "x": x, "y": y, "loss_fn": loss_fn, "closure": closure, "torch": torch}
    names |= {"SAM": SAM, "Recipe": Recipe, "recipes": recipes, "loader": [(x, y)], "batches": [(x, y)]}
    names["loss"] = loss_fn(model(x), y)
    for number, example in enumerate(readme_examples(), 1):
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(example, f"README.md, Python example {number}", "exec"), names)
