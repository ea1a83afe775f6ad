"""Stage 2 in processes of its own: the test suite on the device, and every kernel under compute-sanitizer.

Whatever a process says is kept beside the results, as far as it fits, for nobody can go back and look.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from .. import machine
from ..records import Results, Row, single
from .ours import NATIVE, TRITON, absence, named
from .session import Session, Unfinished, Unit, skipped, verdict
from .variants import tool as tool_named

# What such a process needs at the least; less than that is left to the next call.
_LEAST_SECONDS = 60
_LAST_SECONDS = 10  # to end it, and to read what it said

_KEPT_BYTES = 200_000
_SHOWN_LINES = 60

_ENVIRONMENT = {"SAM_KERNELS_TEST_DEVICE": "cuda", "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Part:
    """Tests that run together.

    Attributes:
        files: where they are.
        chosen: which of them, as pytest's -k has it; the others of those files run without a GPU, elsewhere.
        backend: without which there is nothing to run.
    """

    files: tuple[str, ...]
    chosen: str
    backend: str = NATIVE


_PASSES = ("tests/test_passes.py",)
_VARIANTS = (
    "tests/test_masked_passes.py",
    "tests/test_master_passes.py",
    "tests/test_noise.py",
    "tests/test_rounding.py",
    "tests/test_triton_noise.py",
)

# Every file that reads the device is in one of them; the rest of the suite has nothing to do with a GPU.
PARTS = {
    "native": Part((*_PASSES, *_VARIANTS), "native-cuda"),
    "triton passes": Part(_PASSES, "triton-cuda", TRITON),
    "triton variants": Part(_VARIANTS, "triton-cuda", TRITON),
    "graphs": Part(("tests/test_graphs.py",), "on_a_gpu"),
    "foreach": Part((*_PASSES, *_VARIANTS), "foreach-cuda"),
}

# What watches which backend's kernels. Races are looked for in memory that a block shares; in Triton's
# kernels the compiler alone writes there.
_SANITIZERS = {NATIVE: ("memcheck", "racecheck", "initcheck"), TRITON: ("memcheck", "initcheck")}


def units() -> Iterator[Unit]:
    """Native's first: all kernels of an engine under the sanitizers, and its tests, before another's."""
    least = _LEAST_SECONDS + _LAST_SECONDS
    for backend in (NATIVE, TRITON):
        for tool in _SANITIZERS[backend]:
            run_it = partial(_sanitizer, backend, tool)
            yield Unit(f"correct/{backend}/sanitizer/{tool}", run_it, least)
        for name, part in PARTS.items():
            if part.backend == backend:
                yield Unit(
                    f"correct/pytest/{name}", partial(_tests, name, part), _LEAST_SECONDS + _LAST_SECONDS
                )


def is_process(unit: str) -> bool:
    """Whether a unit of stage 2 is one of these; no figure waits for them."""
    return unit.startswith("correct/pytest/") or "/sanitizer/" in unit


def not_run(results: Results) -> list[str]:
    """Sentences about the sanitizers that were skipped, one for each reason."""
    reasons: dict[str, list[str]] = {}
    for row in results.rows:
        if "/sanitizer/" in row["unit"] and row["metric"] == "skipped":
            reasons.setdefault(str(row["value"]), []).append(row["peer"])
    return [f"compute-sanitizer: not run ({', '.join(who)}): {why}" for why, who in reasons.items()]


# ---- pytest --------------------------------------------------------------------------------------------


def _tests(name: str, part: Part, session: Session) -> list[Row]:
    what, reason = f"pytest, {name}", absence(part.backend, session.gpu.device)
    if reason is not None:
        return [skipped(session, what, reason)]
    status, said, log = run(session, what, pytest_command(part), _ENVIRONMENT)
    last = summary_of(said)
    failures = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    problems = [] if status == 0 else [last, *failures]
    if not problems and " passed" not in last:  # a suite that skips all its tests ends with 0
        problems = [f"no test ran: {last}"]
    if problems:
        _show(session, failures_of(said), log)
    return [verdict(session, what, problems), single(what, "summary", last)]


_SUMMARY = re.compile(
    r"\b(no tests ran|\d+ (passed|failed|errors?|skipped|deselected|xfailed|xpassed)\b.*) in \d"
)


def summary_of(said: str) -> str:
    """pytest's last word, after which a library may still complain about its end; else the last line."""
    lines = said.strip().splitlines() or ["no output"]
    return next((line for line in reversed(lines) if _SUMMARY.search(line)), lines[-1])


def pytest_command(part: Part) -> list[str]:
    """Short messages of the first failures; in several processes where pytest-xdist is installed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not thorough"]
    command += ["-p", "no:cacheprovider", "--tb=short", "--maxfail=20", "-rfE"]
    if find_spec("xdist") is not None:
        command += ["-n", str(min(8, machine.cores()))]
    return [*command, "-k", part.chosen, *part.files]


def failures_of(said: str) -> list[str]:
    """From the first failure on; the end where there is none, as when pytest itself fails."""
    lines = said.strip().splitlines()
    for i, line in enumerate(lines):
        if re.match(r"=+ (FAILURES|ERRORS) =+$", line):
            return lines[i + 1 :]
    return lines[-_SHOWN_LINES:]


# ---- compute-sanitizer ---------------------------------------------------------------------------------


def _sanitizer(backend: str, tool: str, session: Session) -> list[Row]:
    """compute-sanitizer over a program that calls every kernel of a backend."""
    program, what = tool_named("compute-sanitizer"), named(backend, tool)
    reason = absence(backend, session.gpu.device)
    if program is None or reason is not None:
        return [skipped(session, what, reason or "it is neither on the PATH nor in a CUDA toolkit")]
    command = [program, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    if tool == "racecheck":
        # Watching torch's kernels too would take minutes. initcheck has to see them: they write our inputs.
        command += ["--kernel-name", "kns=samk"]
    command += [sys.executable, "-m", "bench.gpu.sanitized", backend]
    # Each tensor in an allocation of its own, or an overrun would end in a neighbour and go unseen.
    status, said, log = run(session, what, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    problems = sanitizer_problems(status, said, backend)
    if problems:
        _show(session, [line for line in said.splitlines() if line.startswith("=====")], log)
    return [verdict(session, what, problems)]


def kernels_of(backend: str) -> str:
    """A pattern for how a finding names our kernels: by namespace, or by function or source file."""
    if backend == NATIVE:
        return "samk"
    folder = machine.ROOT / "sam_kernels" / "backends" / "triton" / "kernels"
    sources = (path.read_text() for path in sorted(folder.glob("*.py")))
    found = [name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)]
    return rf"\b({'|'.join(found)})\b|backends/triton/"


def sanitizer_problems(status: int, said: str, backend: str = NATIVE) -> list[str]:
    """What a sanitizer's output says about our kernels; findings in torch's are not ours to judge."""
    lines = [line.removeprefix("=========").strip() for line in said.splitlines() if line.startswith("=====")]
    if not any(line.startswith(("ERROR SUMMARY", "RACECHECK SUMMARY")) for line in lines):
        return [f"it ended with status {status} before its summary: {said.strip()[-300:]}"]
    pattern = re.compile(kernels_of(backend))

    def is_ours(line: str) -> bool:
        return pattern.search(line) is not None

    ours = [
        f"{lines[i - 1]} {line}" for i, line in enumerate(lines) if line.startswith("at ") and is_ours(line)
    ]
    # Races name the kernel in the line itself, and not always after "at".
    ours += [line for line in lines if line.startswith("Error: Race") and is_ours(line)]
    if not ours and status not in (0, 9):
        return [f"the program under it failed with status {status}: {said.strip()[-300:]}"]
    return ours


# ---- processes -----------------------------------------------------------------------------------------


def run(
    session: Session, what: str, command: list[str], environment: dict[str, str]
) -> tuple[int, str, Path]:
    """Status and output of a command that gets what is left of the stage's time, and where the output is."""
    seconds = session.left() - _LAST_SECONDS
    if seconds < _LEAST_SECONDS:
        raise Unfinished(f"{max(0, seconds):.0f} s are left for {what}")
    log = log_of(session)
    begins = _open_section(log, what)
    # Straight into the file: then it is there too if this process is ended.
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            cwd=machine.ROOT,
            env={**os.environ, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except BaseException as problem:
            os.killpg(process.pid, signal.SIGKILL)  # what it started too
            process.wait()
            if isinstance(problem, subprocess.TimeoutExpired):
                _show(session, _kept(log, begins).splitlines()[-_SHOWN_LINES // 4 :], log)
                raise Unfinished(f"{what} did not end in {seconds:.0f} s") from problem
            raise
    return status, _kept(log, begins), log


def log_of(session: Session) -> Path:
    """Where the output of all processes is kept: beside the results, and not under version control."""
    return session.results.path.with_suffix(".log")


def section_of(log: Path, what: str) -> str:
    """What a process said, by the log."""
    _, _, rest = log.read_text(errors="replace").partition(_heading(what))
    return re.split(r"^######## .+ ########$", rest, maxsplit=1, flags=re.M)[0]


def _heading(what: str) -> str:
    return f"######## {what} ########\n"


def _open_section(log: Path, what: str) -> int:
    """Begin a section at the end of the log, in place of a former one; where its text begins."""
    log.parent.mkdir(parents=True, exist_ok=True)
    said = log.read_text(errors="replace") if log.exists() else ""
    heading = _heading(what)
    if heading in said:
        said = said.replace(heading + section_of(log, what), "")
    if said and not said.endswith("\n"):
        said += "\n"
    log.write_text(said + heading)
    return log.stat().st_size


def _kept(log: Path, begins: int) -> str:
    """What was said since the log had that size; of much, the end, in the file too."""
    whole = log.read_bytes()
    said = whole[begins:]
    if len(said) > _KEPT_BYTES:
        said = said[-_KEPT_BYTES:]
        log.write_bytes(whole[:begins] + said)
    return said.decode(errors="replace")


def _show(session: Session, lines: list[str], log: Path) -> None:
    for line in lines[:_SHOWN_LINES]:
        session.log(f"  | {line}")
    session.log(f"  all of it: {log}")
