"""What stage 6 varies: settings of csrc/core/tuning.h, which take a library each, and of Triton's engine.

One setting at a time, around the default; those that are expected to matter most come first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

STEPS = ("step sgd", "step adamw")  # norm, perturbation and descent, one after another
SINGLE = ("sq_norm", "perturb_", "restore_", "descend_ sgd", "descend_ adamw")

Settings = Mapping[str, int]


@dataclass(frozen=True)
class Variant:
    """A value of a setting.

    Attributes:
        own: by the first word of a pass, what concerns it alone; a winner is named for each.
        shared: what concerns all of them.
    """

    name: str
    own: Mapping[str, Settings] = field(default_factory=dict)
    shared: Settings = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, int]:
        merged = dict(self.shared)
        for settings in self.own.values():
            merged |= settings
        return merged


@dataclass(frozen=True)
class Sweep:
    """A setting of an engine, its values, and the passes that are timed with each."""

    name: str
    variants: tuple[Variant, ...]
    passes: tuple[str, ...]

    @property
    def judged(self) -> dict[str, tuple[str, ...]]:
        """What one winner is named for, and the passes that name it."""
        words = dict.fromkeys(word for variant in self.variants for word in variant.own)
        if words:
            return {word: tuple(p for p in self.passes if p.split()[0] == word) for word in words}
        return {"all passes": tuple(p for p in self.passes if p in STEPS) or self.passes}


def _of_passes(name: str, norm: int, perturb: int, copy: int, descend: int, what: str) -> Variant:
    """A setting that every pass has for itself; 0 leaves it."""
    given = {"sq_norm": ("NORM", norm), "perturb_": ("PERTURB", perturb), "restore_": ("COPY", copy)}
    own = {word: {f"SAMK_{part}_{what}": value} for word, (part, value) in given.items() if value}
    if descend:
        own["descend_"] = {f"SAMK_DESCEND_{what}": descend}
    return Variant(name, own)


def _blocks(count: int, of_halves: int) -> Variant:
    """Blocks on a multiprocessor; fewer than four have fewer bytes under way, which descend has to allow."""
    made = _of_passes(f"blocks={count}", count, count, count, count, "BLOCKS")
    descend = {**made.own["descend_"], "SAMK_DESCEND_HALF_BLOCKS": of_halves}
    allowed = {"SAMK_BYTES_IN_FLIGHT": 49152 * count // 4} if count < 4 else {}
    return Variant(made.name, {**made.own, "descend_": {**descend, **allowed}})


def _fewer_threads_with_more() -> Variant:
    """Twice the loads beside three blocks: the descent of SGD has no registers for them beside four."""
    loads, blocks = _of_passes("", 8, 4, 8, 2, "LOADS"), _blocks(3, 2)
    own = {word: {**loads.own[word], **blocks.own[word]} for word in loads.own}
    del own["descend_"]["SAMK_BYTES_IN_FLIGHT"]  # there are more than are asked for
    return Variant("loads=double beside blocks=3", own)


SWEEPS = (
    Sweep("blocks", (_blocks(2, 2), _blocks(3, 2), _blocks(5, 4), _blocks(6, 5)), SINGLE),
    Sweep(
        "loads",
        (
            _of_passes("loads=half", 2, 1, 2, 0, "LOADS"),
            _of_passes("loads=double", 8, 4, 8, 2, "LOADS"),
            _fewer_threads_with_more(),
        ),
        SINGLE,
    ),
    Sweep(
        "chunks",
        (
            Variant("chunks=512", shared={"SAMK_CHUNKS": 512}),
            Variant("chunks=2048", shared={"SAMK_CHUNKS": 2048, "SAMK_CHUNK_MOST": 32768}),
            Variant("chunks=4096", shared={"SAMK_CHUNKS": 4096, "SAMK_CHUNK_MOST": 16384}),
        ),
        (*SINGLE, *STEPS),
    ),
    # Alone a pass meets the cache as it left it itself; what an order gains shows in whole steps.
    Sweep("order of perturb", (Variant("perturb=forward", shared={"SAMK_PERTURB_BACKWARD": 0}),), STEPS),
    Sweep("order of descend", (Variant("descend=backward", shared={"SAMK_DESCEND_BACKWARD": 1}),), STEPS),
    Sweep(
        "stores",
        (
            Variant("stream=snapshot", shared={"SAMK_STREAM_SNAPSHOT": 1}),
            Variant("stream=weights", shared={"SAMK_STREAM_WEIGHTS": 1}),
            Variant("stream=both", shared={"SAMK_STREAM_SNAPSHOT": 1, "SAMK_STREAM_WEIGHTS": 1}),
        ),
        ("perturb_", "restore_", "descend_ sgd", *STEPS),
    ),
    Sweep(
        "threads",
        (
            Variant("threads=128", shared={"SAMK_THREADS": 128}),
            # Half of them is one block where there are three of 256, which descend has to allow.
            Variant("threads=512", shared={"SAMK_THREADS": 512, "SAMK_BYTES_IN_FLIGHT": 32768}),
        ),
        (*SINGLE, *STEPS),
    ),
)

# Of sam_kernels.backends.triton, by the names of its constants. "num_warps" is an entry of _LAUNCH.
TRITON_SWEEPS = (
    Sweep(
        "triton block",
        tuple(Variant(f"block={n}", shared={"_BLOCK_BYTES": n}) for n in (4096, 16384)),
        SINGLE,
    ),
    Sweep(
        "triton programs",
        tuple(Variant(f"programs={n}", shared={"_PROGRAMS_PER_PROCESSOR": n}) for n in (2, 6, 8)),
        SINGLE,
    ),
    Sweep("triton warps", tuple(Variant(f"warps={n}", shared={"num_warps": n}) for n in (4, 16)), SINGLE),
)
