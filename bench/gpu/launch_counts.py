"""Stage 4, launches of a step: counted after all timing of a unit, in a process of their own.

A profiler stays attached to the process that it was used in, and what is timed there afterwards may be slower
(pytorch issues 144455 and 146604).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence

import torch

from ..peers import Unavailable
from ..records import Row, single
from . import apart
from .device import Gpu
from .gate import QUESTIONS, Question, make, one_step
from .lists import CASES, DeviceWorkspace, base_for
from .ours import OURS, SPECS
from .session import Session, Unfinished

# Of the stage: torch starts anew, Triton's kernels are loaded, and torch.compile finds what it has kept.
_LEAST_SECONDS, _MOST_SECONDS = 40, 90


def rows_for(question: Question, keys: Sequence[str], session: Session) -> list[Row]:
    """Launches of a step of each of these peers; a row that says why there are none."""
    if session.gpu.device.type != "cuda":  # nothing would stay attached
        return count(question, keys, session)
    if session.left() < _LEAST_SECONDS:
        return _none(session, f"{session.left():.0f} s were left")
    try:
        peers = ["--peers", *keys]
        rows, said = apart.run("bench.gpu.launch_counts", question.name, session, peers, _MOST_SECONDS)
    except Unfinished as late:  # what was timed before is not given up for this
        return _none(session, str(late))
    return _none(session, said) if rows is None else rows


def _none(session: Session, reason: str) -> list[Row]:
    session.log(f"  launches are not counted: {reason}")
    return [single("everybody", "launches_skipped", reason)]


def count(question: Question, keys: Sequence[str], session: Session) -> list[Row]:
    """Launches of a step with gradients at new addresses; of ours also with gradients in place."""
    gpu = session.gpu
    base = base_for(question.base, counts_on_device=False)
    workspace = DeviceWorkspace(CASES[question.case].shapes(session.cap), question.dtype, base, gpu.device)
    rows = []
    for key in keys:
        workspace.reset()
        gpu.free_bytes()
        try:
            peer = make(question, SPECS[key], workspace)
            for suffix in ("", "_in_place") if key in OURS else ("",):
                step = one_step(peer, workspace, is_in_place=bool(suffix))
                for _ in range(2):
                    step()
                rows.append(single(key, f"launches{suffix}", gpu.launches(step)))
        except (Unavailable, torch.OutOfMemoryError) as reason:
            rows.append(single(key, "launches_skipped", str(reason)))
    return rows


def main(arguments: list[str] | None = None, gpu: Callable[[], Gpu] = Gpu) -> int:
    questions = {question.name: question for question in QUESTIONS}
    parser = apart.parser("bench.gpu.launch_counts", list(questions), __doc__)
    parser.add_argument("--peers", nargs="+", required=True, choices=list(SPECS))
    options = parser.parse_args(arguments)
    rows = count(questions[options.unit], options.peers, apart.session_of(options, gpu))
    options.rows.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
