"""What setup.py decides, what the build leaves behind, and that neither knows torch."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def setup_module_of_the_project():
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nowhere(tool):
    return None


def everywhere(tool):
    return f"/bin/{tool}"


def test_automatic_and_impossible_is_a_line():
    setup = setup_module_of_the_project()
    decision = setup.decide({}, find=nowhere)
    assert decision.compiler is None
    assert "no C++ compiler found; searched c++, g++, clang++" in decision.reason
    assert "torch backends serve" in setup.summary(decision)


def test_asked_for_and_impossible_is_an_error():
    setup = setup_module_of_the_project()
    with pytest.raises(SystemExit, match="SAM_KERNELS_BUILD=cpu: no C.. compiler found; searched mycc"):
        setup.decide({"SAM_KERNELS_BUILD": "cpu", "CXX": "mycc"}, find=nowhere)


def test_a_compiler_that_cannot_is_not_chosen():
    setup = setup_module_of_the_project()
    decision = setup.decide({}, find=everywhere, complaint=lambda compiler: "no string_view")
    assert decision.compiler is None and "no string_view" in decision.reason


def test_none_builds_nothing_and_unknown_modes_are_a_sentence():
    setup = setup_module_of_the_project()
    assert setup.decide({"SAM_KERNELS_BUILD": "none"}, find=everywhere).compiler is None
    with pytest.raises(SystemExit, match="not known. Known: auto, none, cpu"):
        setup.decide({"SAM_KERNELS_BUILD": "gpu"})
    with pytest.raises(SystemExit, match="no CUDA library yet"):
        setup.decide({"SAM_KERNELS_BUILD": "cuda"})


def test_version_stands_in_one_place():
    version = re.search(r'__version__ = "([^"]+)"', (ROOT / "sam_kernels/_version.py").read_text())[1]
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "sam_kernels/__init__.py"):
        assert version not in (ROOT / name).read_text(), name


def test_the_build_asks_for_no_torch():
    text = (ROOT / "pyproject.toml").read_text()
    assert "torch" not in re.search(r"^requires = (.*)$", text, re.M)[1]


def test_every_environment_variable_is_in_the_table_and_the_other_way_round():
    table = set(re.findall(r"^\| `(SAM_KERNELS_\w+)`", (ROOT / "ENVIRONMENT.md").read_text(), re.M))
    read = set()
    for path in [ROOT / "setup.py", *(ROOT / "sam_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]:
        read |= set(re.findall(r"SAM_KERNELS_[A-Z]+(?:_[A-Z]+)*", path.read_text()))
    assert read == table


def native_library():
    spec = importlib.util.find_spec("sam_kernels._native")
    if spec is None:
        pytest.skip("the native module is not built here")
    return spec.origin


def test_native_module_knows_no_torch():
    library = native_library()
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    symbols = subprocess.run(["nm", "-DC", library], capture_output=True, text=True, check=True).stdout
    assert "PyInit__native" in symbols
    assert not re.search(r"\b(at|c10|torch|caffe2)::|\baoti_torch_", symbols)


def test_native_module_links_no_torch_library():
    library = native_library()
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed
    assert not re.search(r"lib(torch|c10)", needed)


HIDE_NATIVE = """
import sys
sys.modules["sam_kernels._native"] = None
import torch
from sam_kernels import SAM
w = torch.nn.Parameter(torch.ones(3))
opt = SAM([w], torch.optim.SGD, lr=0.1)
w.grad = torch.ones(3); opt.first_step(); opt.second_step()
assert not torch.cuda.is_initialized()
print(opt.backends())
"""


def test_without_the_native_module_the_torch_backends_serve_and_say_why():
    run = subprocess.run([sys.executable, "-c", HIDE_NATIVE], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "foreach" in run.stdout and "passed over native" in run.stdout


@pytest.mark.slow
def test_wheel_without_the_native_module_holds_no_library(tmp_path):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed here")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", "results")
    shutil.copytree(ROOT, source, ignore=ignored)
    environment = {**os.environ, "SAM_KERNELS_BUILD": "none"}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "-w", str(tmp_path), str(source)], check=True, env=environment, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True, check=True
    ).stdout
    assert "sam_kernels/optimizer.py" in names and "_build.json" in names
    assert not re.search(r"\.(so|dylib|pyd)\b", names)
    assert wheel.name.endswith("py3-none-any.whl")


def test_doctor_reports_every_backend_and_never_fails():
    environment = {**os.environ, "SAM_KERNELS_CPU_ISA": "mmx"}
    for module in ("sam_kernels.doctor", "sam_kernels"):
        run = subprocess.run(
            [sys.executable, "-m", module], cwd=ROOT, capture_output=True, text=True, env=environment
        )
        assert run.returncode == 0, run.stderr
        for word in ("native", "foreach", "reference", "torch", "SAM_KERNELS_CPU_ISA"):
            assert word in run.stdout
