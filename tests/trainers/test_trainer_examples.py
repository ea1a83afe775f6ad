"""The examples run, and learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")


@pytest.fixture(autouse=True)
def same_threads(monkeypatch):
    """The examples take one; what runs after them has what it had."""
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_lightning_digits():
    pytest.importorskip("lightning", reason="lightning is not installed: make test-trainers does so")
    from examples.trainers import lightning_digits

    assert lightning_digits.main(epochs=3) > 85


def test_accelerate_digits():
    pytest.importorskip("accelerate", reason="accelerate is not installed: make test-trainers does so")
    from accelerate.state import AcceleratorState

    from examples.trainers import accelerate_digits

    assert accelerate_digits.main(epochs=3) > 85
    AcceleratorState._reset_state(reset_partial_state=True)


def test_transformers_text():
    pytest.importorskip("accelerate", reason="accelerate is not installed: make test-trainers does so")
    pytest.importorskip("transformers", reason="transformers is not installed: make test-trainers does so")
    from examples.trainers import transformers_text

    losses = transformers_text.main(epochs=3)
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]


@pytest.mark.slow
def test_deepspeed_digits():
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: make test-trainers does so")
    run = subprocess.run(
        [sys.executable, "-m", "examples.trainers.deepspeed_digits"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    said = re.search(r"test accuracy ([\d.]+) %", run.stdout)
    assert said and float(said[1]) > 85, run.stdout
