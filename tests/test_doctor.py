"""The doctor tells what there is and why not more, and is never the one that fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sam_kernels
from sam_kernels import backends, doctor

ROOT = Path(__file__).resolve().parents[1]


def lines() -> dict[str, str]:
    """The report by its left column."""
    report = [line.split("  ", 1) for line in doctor.report().splitlines()]
    return {key: value.strip() for key, value in report}


def test_versions_are_those_in_use():
    report = lines()
    assert report["sam_kernels"].startswith(sam_kernels.__version__)
    assert report["torch"].startswith(torch.__version__)
    assert {"python", "numpy", "triton", "platform", "cpu", "build"} <= set(report)


def test_every_backend_is_there_with_a_reason():
    report = lines()
    for name in backends.names():
        assert report[f"backend {name}"].startswith(("available", "not available: "))
    assert report["backend reference"] == "available"


def test_columns_are_aligned():
    widths = {len(line) - len(line[line.index("  ") :].lstrip()) for line in doctor.report().splitlines()}
    assert len(widths) == 1


def test_a_package_that_is_missing_is_said_to_be():
    assert doctor._version("surely-not-a-package") == "not installed"


def test_a_broken_backend_is_reported_and_the_rest_goes_on(monkeypatch):
    whole = backends.get

    def broken(name):
        if name == "foreach":
            raise OSError("its library is gone")
        return whole(name)

    monkeypatch.setattr(backends, "get", broken)
    report = lines()
    assert report["backend foreach"] == "not available: OSError: its library is gone"
    assert report["backend reference"] == "available"


def test_the_refusal_of_a_backend_is_the_reason(monkeypatch):
    monkeypatch.setattr(type(backends.get("foreach")), "refusal", lambda self, group: "it is on strike")
    assert lines()["backend foreach"] == "not available: it is on strike"


def test_the_cuda_library_is_described_by_what_loads_it(monkeypatch):
    from sam_kernels.backends import native

    monkeypatch.setattr(native, "describe_cuda", lambda: "CUDA 13.0; sm_90", raising=False)
    assert lines()["cuda library"] == "CUDA 13.0; sm_90"


class Driver:
    """A stand-in for the driver library."""

    def __init__(self, version: int, status: int = 0):
        self.version, self.status = version, status

    def cuDriverGetVersion(self, found):
        found._obj.value = self.version
        return self.status


@pytest.mark.parametrize(
    ("driver", "told"),
    [
        (OSError("libcuda.so.1: cannot open shared object file"), "none: this machine has no NVIDIA driver"),
        (Driver(13000), "runs CUDA 13.0 and older"),
        (Driver(12080), "runs CUDA 12.8 and older"),
        (Driver(0, status=803), "not working: cuDriverGetVersion answers 803"),
    ],
    ids=["none", "13.0", "12.8", "broken"],
)
def test_the_driver_is_asked_for_its_version(monkeypatch, driver, told):
    def load(name):
        assert "cuda" in name
        if isinstance(driver, OSError):
            raise driver
        return driver

    monkeypatch.setattr(doctor.ctypes, "CDLL", load)
    assert doctor._cuda_driver().startswith(told)


def test_the_devices_are_told_or_why_there_are_none(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert lines()["cuda device"] == f"none: torch {torch.__version__} was built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lines()["cuda device"] == f"none: torch {torch.__version__} for CUDA 13.0 sees no device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), (10, 0)][i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ["H200", "B200"][i])
    assert doctor._cuda_device() == "H200 (sm_90), B200 (sm_100)"


@pytest.mark.parametrize("record", [None, '{"summary": "sam_kernels: native CPU yes"}', "not json"])
def test_the_build_is_told_from_its_record(monkeypatch, tmp_path, record):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    if record is not None:
        (tmp_path / "_build.json").write_text(record)
    told = lines()["build"]
    if record is None:
        assert "not recorded" in told
    elif record == "not json":
        assert told.startswith(f"not available: {json.JSONDecodeError.__name__}")
    else:
        assert told == "sam_kernels: native CPU yes"


def test_our_variables_are_shown(monkeypatch):
    monkeypatch.setenv("SAM_KERNELS_BACKEND", "reference")
    assert lines()["SAM_KERNELS_BACKEND"] == "reference"


@pytest.mark.parametrize("module", ["sam_kernels", "sam_kernels.doctor"])
def test_both_commands_print_the_report(module):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", module], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("sam_kernels") and "backend reference" in result.stdout
    assert result.stderr == ""
