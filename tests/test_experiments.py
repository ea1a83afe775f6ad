"""The program of the experiments: nothing finished is lost, nothing runs twice, reports say what is there."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_experiment

from sam_kernels.__main__ import main as program
from sam_kernels.experiments import command, documents, pictures, registry, runner, tables
from sam_kernels.experiments.data import named
from sam_kernels.experiments.experiment import Findings, Settings, Table, Trial
from sam_kernels.experiments.store import Busy, Store, key_of

ROOT = Path(__file__).resolve().parents[1]
SEVEN = ["toys", "mnist", "m_sharpness", "out_of_distribution", "first_order_magic", "samar", "cost_benefit"]
TRIALS = 8  # of the tiny experiment: two arms of three seeds, and two that run alone

needs_pictures = pytest.mark.skipif(
    not pytest.importorskip("importlib.util").find_spec("matplotlib"), reason="matplotlib is not installed"
)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The program with the tiny experiment in it, as a function of the words after `experiments`."""
    monkeypatch.setattr(registry, "get", lambda name: tiny_experiment.EXPERIMENT)
    monkeypatch.setattr(documents, "write", lambda *_: [])  # pictures have a test of their own
    return lambda *words: command.main([*words, "toys", "--out", str(tmp_path), "--workers", "1"])


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "toys" / "runs.jsonl").read_text().splitlines()]


# ---- the words -------------------------------------------------------------------------------------


def test_list_names_all_seven(capsys, tmp_path):
    assert program(["experiments", "list", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:7]] == SEVEN
    for line in out.splitlines()[:7]:
        assert ("missing from this version" in line) == (line.split()[0] in registry.missing())
        assert ("0 of" in line) != ("missing" in line)


def test_without_words_the_doctor_reports(capsys):
    assert program([]) == 0
    assert "backend native" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["experiments", "digits"], "Known: toys, mnist"),
        (["experiments", "run"], "run needs names. Known: toys, mnist"),
        (["experiments", "resume", "toys"], "nothing in .* to go on with"),
        (["experiments", "toys", "--seeds", "0"], "--seeds is 0; expected at least 1"),
        (["experiments", "toys", "--workers", "0"], "--workers is 0; expected at least 1"),
        (["experiments", "toys", "--data", "/nowhere"], "/nowhere, which is no folder"),
        (["experiments", "list", "toys"], "list takes no names"),
        (["experiments", "report", "toys", "--fresh"], "--fresh goes with run; report runs nothing"),
        (["experiments", "resume", "toys", "--fresh"], "--fresh goes with run; resume goes on with"),
        (["experiments", "toys", "--quick", "--docs", "x.md"], "--docs is for full runs"),
    ],
)
def test_a_wrong_call_gets_a_sentence(words, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        program([*words, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert re.search(said, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_prints_what_there_is(word, capsys):
    assert program([word]) == 0
    out = capsys.readouterr().out
    assert "doctor's report" in out and "experiments NAME" in out and "experiments --help" in out


def test_an_unknown_word_gets_a_sentence(capsys):
    assert program(["experiment"]) == 2
    assert "'experiment' is not known" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in SEVEN if name not in registry.missing()])
def test_the_trials_of_every_group_differ_and_are_json(name):
    experiment = registry.get(name)
    for settings in (Settings(), Settings(seeds=2), Settings(quick=True)):
        trials = experiment.trials(settings)
        assert trials and len({trial.key for trial in trials}) == len(trials)
        assert [t.key for t in trials] == [t.key for t in experiment.trials(settings)]
        assert all(key_of(json.loads(json.dumps({**vars(t), "numbers": {}}))) == t.key for t in trials)


# ---- running and the store -------------------------------------------------------------------------


def test_a_run_leaves_a_row_for_each_trial_that_says_where_it_comes_from(tiny, tmp_path, capsys):
    assert tiny() == 0
    found = rows(tmp_path)
    assert sorted((row["arm"], row["seed"]) for row in found) == sorted(
        [("sgd", s) for s in range(3)] + [("sam", s) for s in range(3)] + [("timed", s) for s in range(2)]
    )
    assert [row["arm"] for row in found[-2:]] == ["timed", "timed"], "those alone come after the others"
    assert list(found[0]) == [
        *("experiment", "arm", "seed", "options", "numbers"),
        *("seconds", "versions", "machine", "date", "commit"),
    ]
    assert {"sam_kernels", "torch", "python", "numpy"} <= found[0]["versions"].keys()
    assert found[0]["machine"]["threads"] == 1 and found[0]["machine"]["cpu"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found[0]["date"])
    assert "SAM is better." in capsys.readouterr().out


def test_what_is_there_is_not_run_again_and_more_seeds_add_to_it(tiny, tmp_path, capsys):
    assert tiny() == 0
    before = rows(tmp_path)
    assert tiny() == 0
    assert rows(tmp_path) == before
    assert f"{TRIALS} trials are there already, 0 to run" in capsys.readouterr().err
    assert tiny("resume", "--seeds", "4") == 0
    assert rows(tmp_path)[:TRIALS] == before and len(rows(tmp_path)) == TRIALS + 2


def test_fresh_sets_the_old_rows_aside_each_time_and_says_where(tiny, tmp_path, capsys):
    assert tiny() == 0
    for number in (1, 2):
        before = rows(tmp_path)
        assert tiny("run", "--fresh") == 0
        assert len(rows(tmp_path)) == TRIALS and rows(tmp_path) != before
        aside = tmp_path / "toys" / f"runs.before.{number}.jsonl"
        assert [json.loads(line) for line in aside.read_text().splitlines()] == before
        assert f"the rows of before are in {aside} now" in capsys.readouterr().err
    first = json.loads((aside.with_name("runs.before.1.jsonl")).read_text().splitlines()[0])
    assert first["numbers"]["clock"] < before[0]["numbers"]["clock"], "the second is not over the first"


def test_quick_rows_are_kept_apart(tiny, tmp_path, capsys):
    assert tiny("--quick") == 0
    assert not (tmp_path / "toys").exists()
    assert len((tmp_path / "toys-quick" / "runs.jsonl").read_text().splitlines()) == 4
    assert "measure nothing" in capsys.readouterr().out


@pytest.mark.parametrize("lost", [1, 40])
def test_a_torn_last_line_is_dropped_and_its_trial_runs_again(tiny, tmp_path, capsys, lost):
    assert tiny() == 0
    before, path = rows(tmp_path), tmp_path / "toys" / "runs.jsonl"
    path.write_bytes(path.read_bytes()[:-lost])
    assert len(Store(tmp_path / "toys", "toys").rows()) == TRIALS - (lost > 1), "reading needs no mending"
    capsys.readouterr()
    assert tiny() == 0
    after = rows(tmp_path)
    assert after[:-1] == before[:-1] and len(after) == TRIALS
    # With only the end of the line gone the row is whole, and stays.
    assert (after[-1] == before[-1]) == (lost == 1)
    assert ("was torn" in capsys.readouterr().err) == (lost > 1)


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tiny, tmp_path):
    assert tiny() == 0
    path = tmp_path / "toys" / "runs.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][:30] + "\n", *lines[2:]]))
    with pytest.raises(ValueError, match="line 2 is not a row"):
        tiny()


def test_a_trial_that_raises_leaves_no_row_and_the_rest_goes_on(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TINY_FAILS", "sam 1")
    assert tiny() == 1
    err = capsys.readouterr().err
    assert "toys: sam, seed 1 (scale 2.0) failed: ArithmeticError: no such luck" in err.splitlines()[-1]
    assert "tiny_experiment.py" in err, "the traceback is shown"
    first = rows(tmp_path)
    assert len(first) == TRIALS - 1 and ("sam", 1) not in {(r["arm"], r["seed"]) for r in first}
    monkeypatch.delenv("TINY_FAILS")
    assert tiny() == 0
    assert rows(tmp_path)[:-1] == first and rows(tmp_path)[-1]["arm"] == "sam"


def test_numbers_that_are_no_json_are_a_failure_of_the_trial(tiny, tmp_path, capsys, monkeypatch):
    strange = {"numbers": {1, 2}}
    experiment = tiny_experiment.EXPERIMENT
    monkeypatch.setattr(
        registry, "get", lambda name: type(experiment)(**{**vars(experiment), "run": lambda t, d: strange})
    )
    assert tiny() == 1
    assert "its numbers are not JSON" in capsys.readouterr().err
    assert not (tmp_path / "toys" / "runs.jsonl").exists()


def test_a_second_program_on_the_same_rows_is_refused(tiny, tmp_path, capsys):
    with Store(tmp_path / "toys", "toys").locked():
        assert tiny() == 1
        with pytest.raises(Busy), Store(tmp_path / "toys", "toys").locked():
            pass
    assert f"process {os.getpid()}, is writing" in capsys.readouterr().err
    assert tiny() == 0, "the lock is given back"


def test_a_trial_listed_twice_is_an_error(tmp_path):
    experiment = tiny_experiment.EXPERIMENT
    twice = type(experiment)(**{**vars(experiment), "trials": lambda settings: [Trial("sam"), Trial("sam")]})
    with pytest.raises(ValueError, match="listed twice"):
        runner.remaining(twice, Settings(), Store(tmp_path, "toys"))


def test_rows_of_original_data_are_kept_apart_where_they_are_other_trials(tmp_path):
    experiment = tiny_experiment.EXPERIMENT

    def trials(settings):
        return [Trial("sam", 0, {"data": "original" if settings.data else "embedded"})]

    with_data = type(experiment)(**{**vars(experiment), "trials": trials})
    asked = Settings(data=tmp_path)
    assert command.store_of(with_data, asked, tmp_path).folder.name == "toys-data"
    assert command.store_of(experiment, asked, tmp_path).folder.name == "toys"


def test_who_lacks_its_files_says_so_before_the_first_trial_and_the_others_run(tmp_path, monkeypatch, capsys):
    def trials(data):
        return lambda settings: [Trial("sam", 0, {"data": data if settings.data else "digits"})]

    ran = []
    groups = {
        name: changed(
            name=name,
            trials=trials(data),
            run=lambda trial, folder: ran.append(trial.options["data"]) or {"accuracy": 1.0},
        )
        for name, data in (("toys", "digits"), ("mnist", "mnist"), ("samar", "cifar100"))
    }
    monkeypatch.setattr(registry, "get", groups.get)
    monkeypatch.setattr(documents, "write", lambda *_: [])
    folder = tmp_path / "sets"
    (folder / "FashionMNIST").mkdir(parents=True)
    (folder / "cifar-100-python").mkdir()
    for name in ("train", "test"):
        (folder / "cifar-100-python" / name).touch()
    for name in named.MNIST_FILES:
        (folder / "FashionMNIST" / name).touch()
    words = ["samar", "mnist", "toys", "--data", str(folder), "--out", str(tmp_path), "--workers", "1"]
    assert command.main(words) == 1
    said = capsys.readouterr().err
    assert ran == ["cifar100", "digits"]
    lack = said.index("mnist cannot run: MNIST is not there. Looked for train-images")
    fallback = said.index(f"toys: {folder} has nothing for it; it runs as without --data")
    assert max(lack, fallback) < said.index("1 trials to run")
    assert said.splitlines()[-1].startswith("mnist cannot run: MNIST is not there.")
    # Trials that are there need no files any more.
    for path in (folder / "cifar-100-python").iterdir():
        path.unlink()
    assert command.main(["samar", *words[3:]]) == 0
    assert command.main(["samar", "--fresh", *words[3:]]) == 1


# ---- killed and interrupted ------------------------------------------------------------------------


def started(folder: Path, *words: str) -> subprocess.Popen:
    """The program with trials of seed 1 and 2 that take a minute, two at a time, as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "tiny_experiment.py"), *words, "toys", "--out", str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TINY_SLEEP": "60", "OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(true, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def is_running(process: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_and_kill_keep_what_has_finished_and_leave_no_process(tmp_path, monkeypatch, capsys):
    folders = [tmp_path / "interrupted", tmp_path / "killed"]
    both = [
        started(folder, "--workers", "2") for folder in folders
    ]  # at the same time: starting takes longest
    try:
        for folder in folders:
            path = folder / "toys" / "runs.jsonl"
            until(lambda path=path: path.exists() and path.read_bytes().count(b"\n") >= 2)
        time.sleep(0.3)  # into the long trials
        os.killpg(both[0].pid, signal.SIGINT)  # a terminal sends it to all
        begin = time.monotonic()
        both[1].kill()
        out, err = both[0].communicate(timeout=30)
        both[1].communicate(timeout=30)
    finally:
        for process in both:
            if process.poll() is None:
                process.kill()
    assert both[0].returncode == 130, err
    assert time.monotonic() - begin < 20, "it does not wait for trials that take a minute"
    assert re.search(r"2 finished trials are in .*runs.jsonl, 6 are left. Go on with: .* toys --out", err)
    assert "Traceback" not in err and "KeyboardInterrupt" not in err
    for folder in folders:
        found = rows(folder)
        assert [(row["arm"], row["seed"]) for row in found] in (
            [("sgd", 0), ("sam", 0)],
            [("sam", 0), ("sgd", 0)],
        )
        for row in found:
            assert row["machine"]["threads"] == 1, "those of the worker; the program has two"
            until(lambda process=row["numbers"]["process"]: not is_running(process), 20)
        # And both go on from there, in this process.
        monkeypatch.setattr(registry, "get", lambda name: tiny_experiment.EXPERIMENT)
        monkeypatch.setattr(documents, "write", lambda *_: [])
        assert command.main(["resume", "toys", "--out", str(folder), "--workers", "1"]) == 0
        assert rows(folder)[:2] == found and len(rows(folder)) == TRIALS


def test_ctrl_c_in_a_trial_of_this_process_ends_it_with_130(tiny, tmp_path, capsys, monkeypatch):
    def run(trial, data):
        if trial.seed == 1:
            signal.raise_signal(signal.SIGINT)
        return tiny_experiment.run(trial, data)

    experiment = tiny_experiment.EXPERIMENT
    monkeypatch.setattr(registry, "get", lambda name: type(experiment)(**{**vars(experiment), "run": run}))
    assert tiny() == 130
    assert [row["seed"] for row in rows(tmp_path)] == [0, 0]
    assert "Go on with" in capsys.readouterr().err


# ---- reports ---------------------------------------------------------------------------------------


@needs_pictures
def test_a_report_needs_rows_only_and_goes_into_a_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(registry, "get", lambda name: tiny_experiment.EXPERIMENT)
    out = ["--out", str(tmp_path / "out"), "--workers", "1"]
    assert command.main(["toys", "--seeds", "2", *out]) == 0

    def refuse(*_):
        raise AssertionError("a report runs nothing")

    monkeypatch.setattr(runner, "run", refuse)
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("# Mine\n\n<!-- begin toys -->\nold\n<!-- end toys -->\n\nMy words.\n")
    capsys.readouterr()
    assert command.main(["report", "toys", *out, "--docs", str(page)]) == 0
    said = capsys.readouterr().out
    assert "The document says: SAM is better." in said and "Verdict:           agrees" in said
    assert "2 of 8 trials have not been run" in said
    folder = tmp_path / "out" / "toys"
    assert json.loads((folder / "table.json").read_text())["claims"][0]["verdict"] == "agrees"
    image = pytest.importorskip("matplotlib.image").imread(folder / "toys.png")
    assert image.shape[0] > 300 and image[..., :3].std() > 0.02

    text = page.read_text()
    assert text.startswith(
        "# Mine\n\n<!-- begin toys -->\n*Tiny* (source: a test)\n\nNothing is done.\n\nTwice."
    )
    assert text.endswith("<!-- end toys -->\n\nMy words.\n") and "old" not in text
    assert "| sam | 91.00 ± 0.71 |" in text and "**Accuracy | percent**" in text
    assert "![Tiny](page/toys.png)" in text and "[toys.jsonl](page/toys.jsonl)" in text
    copied = (page.parent / "page" / "toys.jsonl").read_bytes()
    assert copied == (folder / "runs.jsonl").read_bytes() and (page.parent / "page" / "toys.png").exists()
    assert command.main(["report", "toys", *out, "--docs", str(page)]) == 0
    assert page.read_text() == text, "a second time changes nothing"


def changed(**parts):
    """The tiny experiment with other parts."""
    return type(tiny_experiment.EXPERIMENT)(**{**vars(tiny_experiment.EXPERIMENT), **parts})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "page.md cannot be read as a page"),
        (b"\xff", "page.md cannot be read as a page"),
        (b"# Mine", "expected the lines <!-- begin toys --> and <!-- end toys --> once"),
    ],
)
def test_a_page_is_looked_at_before_anything_runs(tiny, tmp_path, capsys, content, said):
    page = tmp_path / "page.md"
    if content is not None:
        page.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        tiny("--docs", str(page))
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "toys").exists()


def test_a_report_that_raises_is_a_failure_and_the_next_group_goes_on(tmp_path, monkeypatch, capsys):
    def findings(rows):
        raise ZeroDivisionError("a mistake in the findings")

    groups = {"toys": changed(findings=findings), "mnist": changed(name="mnist")}
    monkeypatch.setattr(registry, "get", groups.get)
    monkeypatch.setattr(documents, "write", lambda *_: [])
    assert command.main(["toys", "mnist", "--seeds", "1", "--workers", "1", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "mnist: Tiny" in said.out
    assert said.err.splitlines()[-1] == (
        "toys: its report failed: ZeroDivisionError: a mistake in the findings"
    )
    assert "Traceback" in said.err and "in findings" in said.err


def test_rows_of_settings_that_this_version_does_not_run_are_left_out(tiny, tmp_path, monkeypatch, capsys):
    assert tiny("--seeds", "2") == 0

    def trials(settings):
        return [Trial(t.arm, t.seed, {"scale": 3.0}, t.alone) for t in tiny_experiment.trials(settings)]

    capsys.readouterr()
    monkeypatch.setattr(registry, "get", lambda name: changed(trials=trials))
    assert tiny("report") == 1
    assert "there are no rows of these settings, but 6 of others, in" in capsys.readouterr().err
    assert tiny("--seeds", "3") == 0, "arms with two rows of a seed could not be paired"
    said = " ".join(capsys.readouterr().out.split())
    assert "6 rows in" in said and "left out: they are of other settings" in said and "8 runs, " in said
    assert len(rows(tmp_path)) == 14, "no row is lost"
    assert tiny("report", "--seeds", "1") == 0
    assert "8 runs, " in capsys.readouterr().out, "more seeds than asked for are the same settings"
    # What goes beside a page is what the page can be made of again.
    page = tmp_path / "page.md"
    page.write_text("<!-- begin toys -->\n<!-- end toys -->\n")
    (tmp_path / "toys" / "toys.png").write_bytes(b"")
    assert tiny("report", "--docs", str(page)) == 0
    kept = [json.loads(line) for line in (tmp_path / "page" / "toys.jsonl").read_text().splitlines()]
    assert kept == rows(tmp_path)[6:]
    assert documents.block_in(page.read_text(), "toys", page) == documents.of_page(
        changed(trials=trials), kept, page
    )


def test_tables_of_diverged_runs_are_json(tmp_path):
    def findings(rows):
        numbers = {"sam": [math.nan, 1.5, (math.inf, 2)]}
        return Findings([Table("T", ["a"], [["nan"]])], [], lambda path: None, numbers)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    documents.write(changed(findings=findings), [], tmp_path)
    found = json.loads((tmp_path / "table.json").read_text(), parse_constant=refuse)
    assert found["numbers"] == {"sam": [None, 1.5, [None, 2]]}


def test_a_page_without_a_place_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected the lines <!-- begin toys --> and <!-- end toys --> once"):
        documents.replaced("nothing here", "toys", "new", tmp_path)


def test_a_report_of_nothing_says_so(tiny, capsys):
    assert tiny("report") == 1
    assert "there are no rows" in capsys.readouterr().err


@pytest.mark.parametrize("name", SEVEN)
def test_the_page_says_what_its_rows_say(name):
    page = ROOT / "docs" / "experiments.md"
    if not page.exists():
        pytest.skip("there are no docs in this tree")
    kept, picture = documents.beside(page, name)
    there = documents.block_in(page.read_text("utf-8"), name, page)
    if not kept.exists():
        assert not there, "a block without its rows"
        pytest.skip(f"nothing of {name} is in docs/experiments")
    found = [json.loads(line) for line in kept.read_text().splitlines()]
    assert there == documents.of_page(registry.get(name), found, page)
    assert picture.exists()


# ---- tables and pictures ---------------------------------------------------------------------------


def row(arm: str, seed: int, x: float, **options) -> dict:
    return {"arm": arm, "seed": seed, "options": options, "numbers": {"x": x}}


def test_pairs_share_a_seed_and_the_error_is_that_of_their_mean():
    found = [
        row("sam", 0, 1.0),
        row("sam", 1, 4.0),
        row("sam", 3, 9.0),
        row("sgd", 1, 1.0),
        row("sgd", 0, 0.0),
    ]
    difference = tables.paired(found, "x", "sam", "sgd")
    assert difference.seeds == (0, 1) and difference.values == (1.0, 3.0)
    assert difference.mean == 2.0 and difference.error == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert difference.said(1) == (
        "+2.0 ± 1.0 (mean and standard error of 2 pairs; 95 % interval -10.7 to +14.7)"
    )
    assert not tables.paired(found, "x", "sam", "adam").is_clear
    assert tables.paired(found, lambda r: -r["numbers"]["x"], "sam", "sgd").mean == -2.0


def test_an_arm_with_two_rows_for_a_seed_needs_options():
    found = [
        row("sam", 0, 1.0, m=1),
        row("sam", 0, 2.0, m=2),
        row("sgd", 0, 0.5, m=1),
        row("sgd", 0, 0.0, m=2),
    ]
    with pytest.raises(ValueError, match="several rows for seed 0"):
        tables.paired(found, "x", "sam", "sgd")
    assert tables.paired(found, "x", "sam", "sgd", m=2).values == (2.0,)


def test_cells_of_diverged_runs_do_not_raise():
    assert tables.cell([1.0, math.inf]) == "inf" and tables.cell([1.0, math.nan]) == "nan"
    mean, spread = tables.mean_and_spread([2.0])
    assert mean == 2.0 and math.isnan(spread)


def test_a_number_that_is_not_there_is_an_error_that_lists_those_that_are():
    with pytest.raises(KeyError, match="has no number 'y'; it has x"):
        tables.values([row("sam", 0, 1.0)], "y")


def test_tables_are_text_and_markdown_with_all_cells():
    table = Table("T", ["name", "a|b"], [["x", "1.5 ± 0.1"], ["a long name of a row", "2"]], "Note.")
    for text in (tables.render(table), tables._plain(table), tables.markdown(table)):
        assert all(word in text for word in ("T", "1.5 ± 0.1", "a long name of a row", "Note."))
    assert "a\\|b" in tables.markdown(table)
    assert max(map(len, tables.render(table, 40).splitlines())) <= 40


@needs_pictures
def test_pictures_choose_no_backend_and_change_no_setting(tmp_path):
    import matplotlib

    def settings():  # without asking for the backend, which would choose one
        return {name: dict.__getitem__(matplotlib.rcParams, name) for name in matplotlib.rcParams}

    before = settings()
    figure, axes = pictures.figure("Title", rows=2, columns=2)
    pictures.bars_with_dots(axes[0, 0], {"sgd": [1.0, 2.0], "sam": [2.0, math.nan], "none": []}, "bars")
    pictures.bars_with_dots(axes[0, 1], {f"sam, m={m}": [m + 1.0] for m in range(8)}, from_zero=False)
    pictures.curves(axes[1, 0], {"sgd": [[1, 2, 3], [2, 3]], "sam": [[3, 2, 1]]}, at=[10, 20, 30], log=True)
    pictures.save(figure, tmp_path / "folder" / "a.png", "note")
    assert [t.get_text() for t in axes[0, 0].get_xticklabels()] == ["SGD", "SAM"]
    assert len(set(pictures.colors(f"sam, m={m}" for m in range(8)).values())) == 8
    assert settings() == before
    assert (tmp_path / "folder" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_every_recipe_has_a_color_of_its_own():
    from sam_kernels import recipes

    assert set(recipes.names()) <= set(pictures.LOOKS)
    chosen = [pictures.color(name) for name in [*recipes.names(), "sgd", "adam", "adamw"]]
    assert len(set(chosen)) == len(chosen)


def test_the_readme_counts_the_verdicts_as_the_page_has_them():
    page = (ROOT / "docs" / "experiments.md").read_text()
    readme = (ROOT / "README.md").read_text().partition("\n## Experiments\n")[2]
    for name in registry.names():
        block = page[page.index(f"<!-- begin {name} -->") : page.index(f"<!-- end {name} -->")]
        counts = [
            block.count(f"**Our numbers {says}.**") for says in ("agree", "disagree", "do not decide it")
        ]
        assert sum(counts), name
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{name}` |"))
        assert [int(cell.strip() or 0) for cell in row.split("|")[3:6]] == counts, name
