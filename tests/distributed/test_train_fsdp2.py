"""The example that trains a GPT on two ranks learns, reports, and goes on from its checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--width 32 --depth 1 --heads 2 --length 32 --rows 4 --steps 6 --every 3 --lr 0.01".split()


def run(*options: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "examples.train_fsdp2", *SMALL, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def reports(said: str) -> dict[int, tuple[float, float, float]]:
    """By step: loss, tokens per second, the optimizer's share in percent."""
    line = r"step +(\d+) +loss ([\d.]+) +([\d.]+) tokens/s +optimizer +([\d.]+) %"
    return {int(step): (float(a), float(b), float(c)) for step, a, b, c in re.findall(line, said)}


def test_it_learns_reports_and_goes_on(tmp_path):
    whole = reports(run("--checkpoint", str(tmp_path)))
    assert whole[6][0] < whole[3][0] < 6.0, "the loss of guessing bytes is 5.5"
    assert all(rate > 0 and 0 < share < 100 for _, rate, share in whole.values())
    (tmp_path / "steps").write_text("3")  # as if it had stopped after the first report
    said = run("--checkpoint", str(tmp_path))
    assert "goes on after step 3" in said
    assert reports(said)[6][0] == pytest.approx(whole[6][0], abs=1.1e-4), "to the printed digits"


def test_without_torchrun_it_says_how_to_start_it():
    command = [sys.executable, "-m", "examples.train_fsdp2"]
    clean = {key: value for key, value in os.environ.items() if key != "RANK"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=clean)
    assert done.returncode == 1 and "torchrun" in done.stderr
