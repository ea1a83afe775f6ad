"""Stage 2, extremes: gradients that are not finite, and a tensor of more elements than 32 bits count."""

from __future__ import annotations

from functools import partial

import torch

from ..records import Row
from . import compare
from .compare import AWKWARD
from .ours import named
from .session import Session, guarded, skipped, verdict
from .trajectories import give, methods, state_of


def huge(backend: str, session: Session) -> list[Row]:
    """One tensor with more elements than 32 bits count, of numbers whose results are known."""
    elements = 2**31 + 3 if session.cap is None else session.cap
    if session.gpu.free_bytes() < 8 * elements + 2**30:
        reason = "three bfloat16 lists of 2^31 elements do not fit the free memory"
        return [skipped(session, named(backend, "huge"), reason)]
    return [verdict(session, named(backend, "huge"), guarded(partial(_exact, session, backend, elements)))]


def _exact(session: Session, backend: str, elements: int) -> list[str]:
    from sam_kernels import ops
    from sam_kernels.bitmask import count_words

    device = session.gpu.device
    w, g, s = (torch.full((elements,), x, dtype=torch.bfloat16, device=device) for x in (1.0, 1.0, 7.0))
    found = []
    with torch.no_grad():
        total = ops.sq_norm([g], backend=backend)
        # Wrong indices would lose whole chunks; a backend that takes a root in between loses some digits.
        if not abs(total.item() - elements) <= 1e-6 * elements:
            found.append(f"sq_norm is {total.item()}, not {elements}")
        ops.perturb_([w], [g], [s], torch.ones_like(total), rho=0.5, eps=0.0, backend=backend)
        for name, tensor, value in (("weights", w, 1.5), ("snapshot", s, 1.0)):
            if not bool((tensor == value).all()):
                found.append(f"perturb_: not all {name} are {value}")
        ops.restore_([w], [s], backend=backend)
        if not bool((w == 1.0).all()):
            found.append("restore_: not all weights are back")
        words = torch.zeros(count_words(elements), dtype=torch.int64, device=device)
        words[-1] = 1  # the first element of the last word, and no other
        ops.perturb_([w], [g], [s], torch.ones_like(total), rho=0.5, eps=0.0, masks=[words], backend=backend)
        at = 64 * (len(words) - 1)
        if not (bool((w[:at] == 1.0).all()) and bool(w[at] == 1.5) and bool((w[at + 1 :] == 1.0).all())):
            found.append("masked perturb_: other weights moved than the one selected")
    return found


def non_finite(backend: str, session: Session) -> list[Row]:
    """A first gradient that is not finite moves nothing: no weight, no state, no counter."""
    rows = []
    for name in ("sgd", "adamw", "asam", "p_inf", "p_3", "p_1", "clipped"):
        for value in (float("inf"), float("nan")):
            what = named(backend, f"{name}, {value} in the first gradient")
            rows.append(verdict(session, what, guarded(partial(_poisoned, session, backend, name, value))))
    what = named(backend, "sgd, nan in the second gradient")
    rows.append(verdict(session, what, guarded(partial(_poisoned_second, session, backend))))
    return rows


def _with(values: list[torch.Tensor], value: float) -> list[torch.Tensor]:
    """The values with one of them replaced, in the middle of the longest tensor."""
    longest = max(values, key=torch.Tensor.numel).view(-1)
    longest[longest.numel() // 2] = value
    return values


def _poisoned(session: Session, backend: str, name: str, value: float) -> list[str]:
    gpu = session.gpu
    params = [torch.nn.Parameter(x.to(gpu.device)) for x in compare.draw(AWKWARD, torch.float32, 0)]
    optimizer = methods()[name].build(params, backend)

    def step(first: list[torch.Tensor]) -> None:
        give(params, first, "plain")
        optimizer.first_step()
        give(params, compare.draw(AWKWARD, torch.float32, 2), "plain")
        optimizer.second_step()

    step(compare.draw(AWKWARD, torch.float32, 1))
    before = [p.detach().clone() for p in params]
    state = {k: [x.clone() for x in v] for k, v in state_of(optimizer).items()}
    step(_with(compare.draw(AWKWARD, torch.float32, 3), value))
    after = state_of(optimizer)
    found = [] if compare.same_bits(params, before) else ["weights moved"]
    found += [f"{k} moved" for k in state if not compare.same_bits(state[k], after[k])]
    return found


def _poisoned_second(session: Session, backend: str) -> list[str]:
    """In the second gradient it spreads as in the base optimizer: to its own elements only."""
    results = []
    for one in (backend, "reference"):
        values = compare.draw(AWKWARD, torch.float32, 0)
        params = [torch.nn.Parameter(x.to(session.gpu.device)) for x in values]
        optimizer = methods()["sgd"].build(params, one)
        give(params, compare.draw(AWKWARD, torch.float32, 1), "plain")
        optimizer.first_step()
        give(params, _with(compare.draw(AWKWARD, torch.float32, 2), float("nan")), "plain")
        optimizer.second_step()
        results.append(params)
    got, want = results
    sentence = compare.difference(got, want)
    return [sentence] if sentence else []
