"""``python -m sam_kernels experiments``: list, run, resume and report."""

from __future__ import annotations

import argparse
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import documents, registry, runner
from .data import named
from .experiment import Experiment, Row, Settings, Trial
from .progress import Progress
from .store import Busy, Store

ACTIONS = ("list", "run", "resume", "report")
HELP = """\
  experiments list              what there is, and what has been run
  experiments NAME...           run, or go on where it was ended, and report; `run NAME...` is the same
  experiments resume NAME...    go on with what has been begun
  experiments report NAME...    tables, claims and picture of the runs that are there

`all` stands for all names. Ctrl-C at any time: what has finished is kept."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit code: 0, 1 if something failed, 2 for a wrong call, 130 after a ctrl-C."""
    parser = _parser()
    asked = parser.parse_intermixed_args(arguments)
    words = list(asked.words) or ["list"]
    action = words.pop(0) if words[0] in ACTIONS else "run"
    if asked.seeds is not None and asked.seeds < 1:
        parser.error(f"--seeds is {asked.seeds}; expected at least 1")
    if asked.workers < 1:
        parser.error(f"--workers is {asked.workers}; expected at least 1")
    if asked.data is not None and not asked.data.is_dir():
        parser.error(f"--data is {asked.data}, which is no folder; expected one with the original data sets")
    if asked.docs is not None and action == "list":
        parser.error("--docs goes with run and report")
    if asked.fresh and action != "run":
        why = "goes on with what is there" if action == "resume" else "runs nothing"
        parser.error(f"--fresh goes with run; {action} {why}")
    if asked.docs is not None and asked.quick:
        parser.error("--docs is for full runs; those of --quick measure nothing")
    settings = Settings(asked.seeds, asked.quick, asked.data, asked.workers)
    if action == "list":
        if words:
            parser.error(f"list takes no names, but got {' '.join(words)}")
        print(_listed(asked.out))
        return 0
    if not words:
        parser.error(f"{action} needs names. Known: {', '.join(registry.names())}, or all")
    try:
        chosen = _chosen(words)
    except ValueError as error:
        parser.error(str(error))
    if asked.docs is not None:
        try:
            documents.check(asked.docs, [experiment.name for experiment in chosen])
        except ValueError as error:
            parser.error(f"--docs: {error}")
    if action == "resume":
        for experiment in chosen:
            store = store_of(experiment, settings, asked.out)
            if not store.path.exists():
                parser.error(
                    f"{experiment.name}: there is nothing in {store.folder} to go on with; use run, or give "
                    "the --out, --quick and --data of before"
                )
    try:
        return _all(action, chosen, settings, asked)
    except KeyboardInterrupt:
        print("Interrupted between trials; all rows are kept.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sam_kernels experiments",
        description=__doc__,
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="NAME", help="an action, and names of experiments")
    parser.add_argument("--seeds", type=int, help="runs of each arm (default: each experiment's own)")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, a few steps, kept apart: to see that it runs"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="original data sets (default: embedded ones)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=runner.usable_cores(),
        help="processes at a time, one thread each (default: the cores there are, %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/experiments"),
        metavar="DIR",
        help="where rows and reports go (default: %(default)s)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over; rows of before are set aside, numbered"
    )
    parser.add_argument("--docs", type=Path, metavar="FILE", help="put the report into this page, too")
    return parser


def _chosen(words: list[str]) -> list[Experiment]:
    """The experiments of these names; of `all`, those that this version has."""
    absent = registry.missing()
    names: list[str] = []
    for word in words:
        if word != "all":
            names.append(word)
            continue
        if absent:
            print(f"Missing from this version: {', '.join(absent)}.", file=sys.stderr)
        names += [name for name in registry.names() if name not in absent]
    return [registry.get(name) for name in dict.fromkeys(names)]


def store_of(experiment: Experiment, settings: Settings, out: Path) -> Store:
    """Where the rows of these settings are: quick ones and those of other data never mix with the rest."""
    folder = experiment.name + ("-quick" if settings.quick else "")
    if _takes_data(experiment, settings):
        folder += "-data"
    return Store(out / folder, experiment.name)


def _takes_data(experiment: Experiment, settings: Settings) -> bool:
    """Whether the trials are others than without --data."""
    asked, embedded = (experiment.trials(s) for s in (settings, replace(settings, data=None)))
    return [trial.key for trial in asked] != [trial.key for trial in embedded]


def _without_data(chosen: list[Experiment], settings: Settings, asked: argparse.Namespace) -> dict[str, str]:
    """A sentence for each experiment that is to run and lacks its files; also says who needs none."""
    lacking: dict[str, str] = {}
    if settings.data is None:
        return lacking
    for experiment in chosen:
        if not _takes_data(experiment, settings):
            print(
                f"{experiment.name}: {settings.data} has nothing for it; it runs as without --data, on "
                "what is embedded",
                file=sys.stderr,
            )
            continue
        left = experiment.trials(settings)
        if not asked.fresh:
            left, _ = runner.remaining(experiment, settings, store_of(experiment, settings, asked.out))
        try:
            for name in {str(trial.options.get("data")) for trial in left}:
                named.require(name, settings.data)
        except FileNotFoundError as error:
            lacking[experiment.name] = f"{experiment.name} cannot run: {error}"
            print(lacking[experiment.name], file=sys.stderr)
    return lacking


def _listed(out: Path) -> str:
    lines = []
    absent = registry.missing()
    for name in registry.names():
        if name in absent:
            lines.append((name, "", "", "missing from this version"))
            continue
        experiment = registry.get(name)
        store = store_of(experiment, Settings(), out)
        left, there = runner.remaining(experiment, Settings(), store)
        ran = f"{there} of {there + len(left)} run"
        lines.append((name, f"{experiment.minutes:g} min", ran, experiment.title))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    rows = ["  ".join([*(t.ljust(w) for t, w in zip(line, widths, strict=False)), line[3]]) for line in lines]
    note = "Times are about, on two cores. python -m sam_kernels experiments NAME runs one, --help says more."
    return "\n".join([*rows, "", note])


def _all(action: str, chosen: list[Experiment], settings: Settings, asked: argparse.Namespace) -> int:
    progress = Progress()
    lacking = _without_data(chosen, settings, asked) if action != "report" else {}
    failures = list(lacking.values())
    for experiment in chosen:
        if experiment.name in lacking:
            continue
        store = store_of(experiment, settings, asked.out)
        if action != "report":
            try:
                outcome = _run(experiment, settings, store, asked.fresh, progress)
            except Busy as error:
                failures.append(str(error))
                continue
            failures += outcome.failures
            if outcome.interrupted:
                _say_how_to_resume(chosen[chosen.index(experiment) :], outcome, store, asked)
                _summarize(failures)
                return 130
            if outcome.not_run:
                failures.append(f"{experiment.name}: {outcome.not_run} trials were not run")
        try:
            failures += _report(experiment, settings, store, asked.docs)
        except Exception as error:  # a mistake in one report keeps no other from being run
            traceback.print_exc()
            failures.append(f"{experiment.name}: its report failed: {type(error).__name__}: {error}")
    _summarize(failures)
    return 1 if failures else 0


def _run(
    experiment: Experiment, settings: Settings, store: Store, fresh: bool, progress: Progress
) -> runner.Outcome:
    if fresh:
        with store.locked():
            aside = store.set_aside()
        if aside:
            progress.say(f"{experiment.name}: the rows of before are in {aside} now")
    return runner.run(experiment, settings, store, progress.say, progress)


def _setting(arm: str, options: dict[str, Any]) -> str:
    """The same for the same arm with the same options, whatever the seed."""
    return Trial(arm, 0, options).key


def _of_these_settings(experiment: Experiment, settings: Settings, rows: list[Row]) -> list[Row]:
    """The rows of arms and options that this version runs, of any seed; others mean something else by now."""
    trials = [*experiment.trials(settings), *experiment.trials(replace(settings, seeds=None))]
    known = {_setting(trial.arm, trial.options) for trial in trials}
    return [row for row in rows if _setting(row["arm"], row["options"]) in known]


def _report(experiment: Experiment, settings: Settings, store: Store, page: Path | None) -> list[str]:
    """Print and write the report; a sentence if there is nothing to report."""
    found = store.rows()
    rows = _of_these_settings(experiment, settings, found)
    if not rows:
        others = f" of these settings, but {len(found)} of others," if found else ""
        return [f"{experiment.name}: there are no rows{others} in {store.folder} to report; run it first"]
    missing, there = runner.remaining(experiment, settings, store)
    print(documents.text(experiment, rows))
    if missing:
        print(f"\n{len(missing)} of {len(missing) + there} trials have not been run; this is of the others.")
    if len(rows) < len(found):
        print(
            f"\n{len(found) - len(rows)} rows in {store.path} are left out: they are of other settings, "
            "which this version does not run."
        )
    if settings.quick:
        print("\nA quick run, to see that everything runs: its numbers measure nothing.")
    written = documents.write(experiment, rows, store.folder)
    print("\nWritten: " + ", ".join(str(path) for path in written))
    if page is not None:
        documents.put(experiment, rows, store.folder, page)
        print(f"Put into {page}")
    print(flush=True)
    return []


def _say_how_to_resume(
    left: list[Experiment], outcome: runner.Outcome, store: Store, asked: argparse.Namespace
) -> None:
    words = ["python", "-m", "sam_kernels", "experiments", *(experiment.name for experiment in left)]
    for name in ("seeds", "data", "out", "docs"):
        value = getattr(asked, name)
        if value is not None and not (name == "out" and value == Path("results/experiments")):
            words += [f"--{name}", str(value)]
    words += ["--quick"] if asked.quick else []
    print(
        f"Interrupted. {outcome.before + outcome.finished} finished trials are in {store.path}, "
        f"{outcome.not_run} are left. Go on with: {shlex.join(words)}",
        file=sys.stderr,
    )


def _summarize(failures: list[str]) -> None:
    for sentence in failures:
        print(sentence, file=sys.stderr)
