"""Fixtures every test file may use."""

from __future__ import annotations

import signal
import sys

import pytest
import torch
from cases import BASES, RECIPES

# Programs started in the background ignore ctrl-C, and hand that on; here it is to be heard.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised tensors that the package asks for hold NaN, so that reading one shows."""

    def poisoned(allocate):
        def call(*args, **kwargs):
            result = allocate(*args, **kwargs)
            asker = sys._getframe(1).f_globals.get("__name__", "")
            if asker.startswith("sam_kernels") and result.is_floating_point():
                with torch.no_grad():
                    result.fill_(float("nan"))
            return result

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


# Files of which the interpreter runs every n-th case, n odd so that it meets every parameter. All other
# backends run them whole.
_THINNED = {
    "test_bases.py": 3,
    "test_masked_passes.py": 9,
    "test_master_passes.py": 3,
    "test_masters.py": 5,
    "test_masks.py": 23,
    "test_optimizer.py": 3,
    "test_passes.py": 11,
    "test_promises.py": 13,
    "test_scaling.py": 9,
    "test_selection.py": 7,
    "test_state_dict.py": 3,
}

# The same for products of recipes, bases and backends that are long without it: of which backend, every n-th.
_THINNED_PRODUCTS = {
    ("test_passes.py", "foreach"): 3,
    ("test_variant_properties.py", "foreach"): 9,
    ("test_variant_properties.py", "reference"): 9,
}


# Files that take longest by themselves. They come first, so that no worker is left with one at the end.
_LONG = (
    "test_triton_build.py",
    "test_cuda_build.py",
    "test_passes.py",
    "test_variant_properties.py",
    "test_recipes.py",
    "test_promises.py",
    "test_graphs.py",
    "test_four_ranks.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter takes a thousand times as long as what it interprets, so products are thinned for it.

    Of some files it runs a part. Of recipes times base optimizers it runs every eighth pair: each
    recipe and each base appears, every other recipe in both dtypes. The rest is marked thorough;
    `pytest -m thorough` runs that.
    """
    places = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(_LONG)))
    thinned: dict[str, int] = {}
    for item in items:
        module = item.nodeid.partition("::")[0].rpartition("/")[2]
        if module in _THINNED and "interpreted" in item.nodeid:
            thinned[module] = thinned.get(module, -1) + 1
            if thinned[module] % _THINNED[module]:
                item.add_marker(pytest.mark.thorough)
        for (file, backend), n in _THINNED_PRODUCTS.items():
            if module == file and backend in item.nodeid:
                thinned[file + backend] = thinned.get(file + backend, -1) + 1
                if thinned[file + backend] % n:
                    item.add_marker(pytest.mark.thorough)
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        recipe, base = parameters.get("recipe"), parameters.get("base")
        if parameters.get("backend") != "interpreted" or recipe not in RECIPES or base not in BASES:
            continue
        number = RECIPES.index(recipe) + BASES.index(base)
        is_double = parameters.get("dtype") == torch.float64
        if is_double:
            number += 2
        if number % 8 or (is_double and RECIPES.index(recipe) % 2):
            item.add_marker(pytest.mark.thorough)
