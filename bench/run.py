"""One command for all measurements: python -m bench.run

Every unit (a parameter list with a base optimizer, the passes, a training step) is printed and saved
when it is done, so a run can be stopped and taken up again with --resume.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import machine, passes, report, sparse, steps, training, variants
from .cases import BASES, CASES
from .records import Results, Row
from .timing import Effort

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

_QUICK_VARIANTS = ("asam", "vasso", "gsam")

Measure = Callable[[Callable[[str], None], Callable[[int, int], None]], list[Row]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=report.SECTIONS, default=report.SECTIONS, help="sections"
    )
    parser.add_argument(
        "--cases", nargs="+", choices=[n for n, c in CASES.items() if c.bases], help="parameter lists"
    )
    parser.add_argument(
        "--bases", nargs="+", choices=BASES, help="base optimizers (default: those of each case)"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, two lists, nothing compiled; saved apart"
    )
    parser.add_argument(
        "--seconds", type=float, help="to spend on the rounds of a unit (default 10, quick 3)"
    )
    parser.add_argument("--compile", choices=("goals", "all", "none"), help="where torch.compile takes part")
    parser.add_argument("--cap", type=int, help="cut every tensor to this many elements (smoke tests)")
    parser.add_argument("--resume", action="store_true", help="skip units that this commit has measured here")
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results/<machine>)")
    return parser.parse_args()


def plan(arguments: argparse.Namespace) -> Iterator[tuple[str, Measure]]:
    """Names of units, and how to measure them."""
    quick = arguments.quick
    seconds = arguments.seconds or (3.0 if quick else 10.0)
    effort = Effort(2, 5, 50, seconds) if quick else Effort(5, 9, 200, seconds)
    cases = arguments.cases or (
        ["resnet50", "many_tiny"] if quick else [n for n, c in CASES.items() if c.bases]
    )
    dtypes = [DTYPES[name] for name in arguments.dtype]
    if "step" in arguments.only:
        for dtype in dtypes:
            for unit in _steps(arguments, cases, dtype):
                yield unit.name, partial(steps.measure, unit, effort)
    if "host" in arguments.only:
        for base in arguments.bases or BASES:
            no = "its host time is not measured unless asked for with --compile all"
            calls = steps.Unit("host", "resnet50", base, torch.float32, 1, arguments.compile == "all" or no)
            yield calls.name, partial(steps.measure, calls, effort)
    if "passes" in arguments.only:
        for dtype in dtypes:
            name = f"passes/one_huge/{str(dtype)[6:]}"
            yield name, partial(passes.measure, dtype, arguments.cap, effort)
    if "sparse" in arguments.only:
        sparsities = sparse.SPARSITIES[2:3] if quick else sparse.SPARSITIES
        units: list[sparse.Update | sparse.Step] = [
            sparse.Update(kind, sparsities, arguments.cap) for kind in sparse.UPDATES
        ]
        units += [sparse.Step(base, arguments.cap) for base in arguments.bases or BASES]
        for unit in units:
            yield unit.name, partial(sparse.measure, unit, effort)
    if "variants" in arguments.only:
        for name in _QUICK_VARIANTS if quick else variants.VARIANTS:
            unit = variants.Unit(name, arguments.cap)
            yield unit.name, partial(variants.measure, unit, effort)
    if "train" in arguments.only:
        for name, (*_, batches, _, _) in training.MODELS.items():
            for batch in batches[:1] if quick else batches:
                yield f"train/{name}/{batch}", partial(training.measure, name, batch, effort)
    if "whole" in arguments.only:
        for name, (*_, batches, _, _) in training.MODELS.items():
            if quick and name != "cnn":
                continue
            batch = batches[0 if quick else -1]
            chosen = _QUICK_VARIANTS if quick else None
            run_one = partial(training.measure_recipes, name, batch, effort, chosen=chosen)
            yield f"whole/{name}/{batch}", run_one


def _steps(arguments: argparse.Namespace, cases: list[str], dtype: torch.dtype) -> Iterator[steps.Unit]:
    where = arguments.compile or ("none" if arguments.quick else "goals")
    for name in cases:
        # AdamW's squares of gradients underflow in pure float16, for every peer alike.
        usual = ("sgd",) if dtype == torch.float16 else CASES[name].bases
        for base in arguments.bases or usual:
            compiled = where == "all" or (
                where == "goals" and base in CASES[name].compiled and dtype == torch.float32
            )
            no = "compiling takes about a minute and a half; --compile all includes this unit"
            yield steps.Unit("step", name, base, dtype, arguments.cap, compiled or no)


def main() -> int:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # An empty cache, or the compile times would be those of an earlier run.
    cache = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    torch._logging.set_logs(all=logging.ERROR)
    console = Console(width=None if Console().is_terminal else 200)
    about = machine.describe() | {"effort": "quick" if arguments.quick else "full"}
    folder = arguments.out or machine.RESULTS / machine.slug()
    results = Results(folder / ("quick.jsonl" if arguments.quick else "results.jsonl"), about)
    console.print("  ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    _warn_of_neighbours(console)
    failed = [
        name
        for name, measure in plan(arguments)
        if not _run(name, measure, results, arguments.resume, console)
    ]
    _write(results, console)
    broken = [
        row for row in results.rows if row["metric"] == "wrong" and row["peer"].startswith(("ours", "native"))
    ]
    for name in failed:
        console.print(f"{name} was not measured", style="bold red")
    for row in broken:
        console.print(f"{row['unit']}: {row['peer']} is wrong: {row['value']}", style="bold red")
    return 1 if failed or broken else 0


def _run(name: str, measure: Measure, results: Results, resume: bool, console: Console) -> bool:
    if resume and results.has(name):
        console.print(f"{name}: measured already")
        return True
    console.print(f"\n[bold]{name}[/bold]")
    began, neighbours = time.perf_counter(), machine.Neighbours()
    columns = (TextColumn("  {task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("gate", total=None)
        try:
            rows = measure(
                lambda text: console.print(text, highlight=False, markup=False),
                lambda done, of: progress.update(task, description="rounds", completed=done, total=of),
            )
        except Exception:  # one unit must not cost the others; the traceback says why
            console.print_exception()
            return False
    others = neighbours.cores()
    results.replace(
        name, [{**row, "neighbours": others if others is None else round(others, 2)} for row in rows]
    )
    console.print(report.unit_table(results, name))
    heard = "" if others is None else f", neighbours used {others:.2f} cores"
    console.print(f"  {time.perf_counter() - began:.0f} s{heard}", highlight=False)
    return True


def _warn_of_neighbours(console: Console) -> None:
    neighbours = machine.Neighbours()
    time.sleep(1)
    others = neighbours.cores()
    if others is not None and others > report.QUIET:
        console.print(
            f"neighbours use {others:.2f} of {machine.cores()} cores: {report.NOISE}", style="yellow"
        )


def _write(results: Results, console: Console) -> None:
    from . import plot

    console.print(report.goals_table(results))
    text = results.path.with_suffix(".txt")
    report.write_text(results, text)
    console.print(f"{results.path}\n{text}", highlight=False)
    try:
        for picture in plot.draw_all(results, results.path.with_suffix(".png")):
            console.print(str(picture), highlight=False)
    except ImportError as error:
        console.print(f"no picture: {error}. Install matplotlib and run python -m bench.plot {results.path}")


if __name__ == "__main__":
    raise SystemExit(main())
