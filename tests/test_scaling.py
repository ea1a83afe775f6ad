"""SAM under torch.amp.GradScaler (M): the scaler is torch's own, on the CPU; overflows are planted."""

from __future__ import annotations

import pytest
import torch
from fixtures import (
    assert_close,
    base_state,
    batches,
    every_backend,
    same_bits,
    small_net,
    squared_error,
    values,
)
from torch.amp import GradScaler
from torch.nn import Parameter

from sam_kernels import SAM, Recipe, recipes
from sam_kernels.policies import Mix
from sam_kernels.scaling import is_scale_free, reason_at_first

INPUTS = batches(8, 4, 5, dtype=torch.float32)
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "eps": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-3}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "eps": 1e-3}),  # restore, then its own step
}
every_base = pytest.mark.parametrize("base", BASES)

# Of these a first_step must know the scale, which no scaler tells before step().
NEEDING_IT_FIRST = {"vasso", "friendly_sam", "fisher_sam", "ae_sam"}


def optimizer(model, base="sgd", **options) -> SAM:
    kind, arguments = BASES[base]
    return SAM(model.named_parameters(), kind, **{"rho": 0.1, **arguments, **options})


def scaler(enabled=True, scale=2.0**16, **options) -> GradScaler:
    return GradScaler("cpu", enabled=enabled, init_scale=scale, **options)


class Loop:
    """A training loop under a scaler, in either form; `spoil` puts an inf into gradients of (step, pass)."""

    def __init__(self, options, *, enabled=True, scale=2.0**16, base="sgd", spoil=()) -> None:
        self.model = small_net(torch.float32)
        self.opt = optimizer(self.model, base, **options)
        self.scaler = scaler(enabled, scale, growth_interval=2)
        self.spoil = set(spoil)
        self.passes = 0

    def backward(self, step):
        loss = squared_error(self.model(INPUTS[step]), step)
        self.scaler.scale(loss).backward()
        self.passes += 1
        if (step, self.passes) in self.spoil:
            self.opt.param_groups[0]["params"][2].grad[1] = float("inf")
        return loss

    def in_two_steps(self, step):
        self.passes = 0 if self.opt.recipe.direction.needs_gradient else 1
        self.opt.zero_grad()
        if self.opt.recipe.direction.needs_gradient:
            self.backward(step)
        self.opt.first_step(zero_grad=True)
        self.backward(step)
        self.scaler.step(self.opt)
        self.scaler.update()

    def by_closure(self, step):
        # As accelerate does: a backward of the user's, then the closure by position.
        self.opt.zero_grad()
        self.passes = -1
        self.backward(step)
        more = {"ahead": lambda: self.backward(step + 1)} if self.opt.recipe.name == "sampa" else {}
        self.scaler.step(self.opt, lambda: self.backward(step), **more)
        self.scaler.update()

    def with_scaler(self, step):
        self.opt.zero_grad()
        self.passes = 0
        more = {"ahead": lambda: self.backward(step + 1)} if self.opt.recipe.name == "sampa" else {}
        self.opt.step(lambda: self.backward(step), scaler=self.scaler, **more)
        if self.scaler.is_enabled():
            self.scaler.update()

    def results(self):
        slots = [x for own in self.opt._slots.tensors.values() for x in own.values()]
        return [*values(self.model.parameters()), *base_state(self.opt), *slots]


def recipe_of(name) -> Recipe:
    if name == "nosam":  # the small net's normalization is a class of its own, found by name
        return recipes.nosam()
    if name == "cr_sam":
        return recipes.cr_sam(beta=0.3)  # with beta = gamma the third gradient is of no account
    if name == "ae_sam":
        return recipes.ae_sam(steps=6, decay=0.5, late=0.5, early=0.5)
    return recipes.get(name)


def loops(recipe, **more):
    """The same loop without a scaler, and with one."""
    options = {"recipe": recipe, "rho": None}
    return [Loop(options, enabled=enabled, **more) for enabled in (False, True)]


# ---- clean steps -------------------------------------------------------------------------------------------


every_closure_form = pytest.mark.parametrize("form", ["by_closure", "with_scaler"])


@every_closure_form
@pytest.mark.parametrize("name", recipes.names())
def test_m3_closures_under_a_scaler_are_closures_without_one(name, form):
    plain, scaled = loops(recipe_of(name))
    for step in range(5):
        getattr(plain, form)(step)
        getattr(scaled, form)(step)
    assert scaled.scaler.get_scale() == 2.0**18  # it has grown twice, and memories of gradients have not
    assert_close(scaled.results(), plain.results(), 1e-6)


@pytest.mark.parametrize(
    "name", [name for name in recipes.names() if not recipes.get(name).probe.needs_closure]
)
def test_m1_two_step_under_a_scaler_is_two_step_without_one_or_a_sentence(name):
    plain, scaled = loops(recipe_of(name))
    if name in NEEDING_IT_FIRST:
        before = values(scaled.model.parameters())
        with pytest.raises(RuntimeError, match=rf"'{name}' must know the scale before the second backward"):
            scaled.in_two_steps(0)
        assert same_bits(scaled.model.parameters(), before)
        assert not base_state(scaled.opt)
        return
    for step in range(5):
        plain.in_two_steps(step)
        scaled.in_two_steps(step)
    assert scaled.scaler.get_scale() == 2.0**18
    assert_close(scaled.results(), plain.results(), 1e-6)


@every_backend
@every_base
@pytest.mark.parametrize("bound", [None, 0.01])
@pytest.mark.parametrize("form", ["in_two_steps", "by_closure", "with_scaler"])
def test_every_base_and_backend_unscales_and_clips_the_unscaled_gradient(form, bound, base, backend):
    options = {"backend": backend, "max_grad_norm": bound}
    plain, scaled = (Loop(options, base=base, enabled=e, scale=1000.0) for e in (False, True))
    for step in range(3):
        getattr(plain, form)(step)
        getattr(scaled, form)(step)
    assert_close(scaled.results(), plain.results(), 2e-6)


@every_base
def test_all_of_a_step_by_hand(base):
    """SAM as the paper has it, in torch alone, clipped; against ours under a scaler of an odd scale."""
    model = small_net(torch.float32)
    weights = list(model.parameters())
    kind, arguments = BASES[base]
    other = kind(weights, **arguments)
    loop = Loop({"max_grad_norm": 0.05, "rho": 0.1}, base=base, scale=1536.0)
    for step in range(3):
        model.zero_grad()
        squared_error(model(INPUTS[step]), step).backward()
        before = values(weights)
        norm = torch.sqrt(sum(w.grad.double().square().sum() for w in weights))
        with torch.no_grad():
            for w in weights:
                w.add_((0.1 / norm).float() * w.grad)
        model.zero_grad()
        squared_error(model(INPUTS[step]), step).backward()
        with torch.no_grad():
            for w, old in zip(weights, before, strict=True):
                w.copy_(old)
        torch.nn.utils.clip_grad_norm_(weights, 0.05)
        other.step()
        loop.in_two_steps(step)
    assert_close(loop.model.parameters(), weights, 2e-6)


def test_unscale_and_clip_by_the_user():
    loop, ours = Loop({}), Loop({"max_grad_norm": 0.05}, enabled=False)
    for step in range(3):
        loop.opt.zero_grad()
        loop.backward(step)
        loop.opt.first_step(zero_grad=True)
        loop.backward(step)
        loop.scaler.unscale_(loop.opt)
        torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 0.05)
        loop.scaler.step(loop.opt)
        loop.scaler.update()
        ours.in_two_steps(step)
    assert_close(loop.results(), ours.results(), 1e-6)


def test_lists_of_closures():
    for m_sharpness in (False, True):
        plain, scaled = (Loop({}, enabled=enabled) for enabled in (False, True))
        for loop in (plain, scaled):
            for step in range(3):
                loop.opt.zero_grad()
                loop.backward(step)
                parts = [lambda loop=loop, i=i: loop.backward(i) for i in (step, step + 1)]
                # What a scaler does beyond handing things over is not for lists, so by hand.
                if loop is scaled:
                    loop.opt.grad_scale, loop.opt.found_inf = torch.tensor(2.0**16), torch.tensor(0.0)
                loop.opt.step(parts, m_sharpness=m_sharpness)
                if loop is scaled:
                    del loop.opt.grad_scale, loop.opt.found_inf
        assert_close(scaled.results(), plain.results(), 1e-6)


def test_a_plain_step_unscales_too():
    for lr in (0.05, 0.0):
        plain, scaled = (Loop({"allow_plain_step": True, "lr": lr}, enabled=e) for e in (False, True))
        for loop in (plain, scaled):
            for step in range(3):
                loop.opt.zero_grad()
                loop.backward(step)
                loop.scaler.step(loop.opt)
                loop.scaler.update()
        assert_close(scaled.results(), plain.results(), 1e-6)


def test_perturbed_blocks():
    plain, scaled = (Loop({}, enabled=enabled) for enabled in (False, True))
    for loop in (plain, scaled):
        for step in range(3):
            loop.opt.zero_grad()
            loop.backward(step)
            with loop.opt.perturbed():
                loop.backward(step)
            loop.scaler.step(loop.opt)
            loop.scaler.update()
    assert_close(scaled.results(), plain.results(), 1e-6)


def test_weight_decay_inside_of_the_loss():
    for name in ("sam", "msam"):
        recipe = recipes.get(name, decay="inside")
        plain, scaled = loops(recipe)
        for step in range(3):
            plain.by_closure(step)
            scaled.by_closure(step)
        assert_close(scaled.results(), plain.results(), 1e-6)
    with pytest.raises(RuntimeError, match="it adds weight decay to the first gradient"):
        loops(recipes.sam(decay="inside"))[1].in_two_steps(0)
    loop = loops(recipes.msam(decay="inside"))[1]
    loop.in_two_steps(0)  # its only gradient is the last
    with loop.opt.perturbed():
        loop.backward(1)
    before = values(loop.model.parameters())
    with pytest.raises(RuntimeError, match=r"a perturbed\(\) block adds weight decay to its gradient"):
        loop.scaler.step(loop.opt)
    assert same_bits(loop.model.parameters(), before)


# ---- overflow ----------------------------------------------------------------------------------------------


@every_backend
@every_base
@pytest.mark.parametrize("where", [(1,), (2,), (1, 2)], ids=["pass 1", "pass 2", "both"])
def test_m2_overflow_leaves_every_bit_and_backs_off_once(where, base, backend):
    # In pass 1 alone: as where pass 2, at the same weights, overflows again, which planting must do by hand.
    planted = {(2, number) for number in where} | {(2, 2)}
    loop = Loop({"backend": backend}, base=base, spoil=planted)
    for step in range(2):
        loop.in_two_steps(step)
    before, scale = loop.results(), loop.scaler.get_scale()
    loop.in_two_steps(2)
    assert same_bits(loop.results(), before)
    assert loop.scaler.get_scale() == scale / 2
    loop.in_two_steps(3)
    assert not same_bits(loop.results(), before)
    assert all(bool(torch.isfinite(x).all()) for x in loop.results())


@every_base
def test_an_overflow_that_the_scaler_cannot_see_skips_the_step_all_the_same(base):
    loop = Loop({}, base=base, spoil={(2, 1)})
    for step in range(2):
        loop.in_two_steps(step)
    before = loop.results()
    loop.in_two_steps(2)
    assert same_bits(loop.results(), before)


@every_base
def test_m2_overflow_in_the_first_step_of_all_makes_no_state(base):
    loop = Loop({}, base=base, spoil={(0, 1), (0, 2)})
    before = values(loop.model.parameters())
    loop.in_two_steps(0)
    assert same_bits(loop.model.parameters(), before)
    assert not base_state(loop.opt)


@pytest.mark.parametrize("base", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("name", recipes.names())
@pytest.mark.parametrize("number", [0, 1, 2], ids=["the user's backward", "pass 1", "pass 2"])
def test_m3_overflow_in_a_closure_is_seen_by_us(number, name, base):
    recipe = recipe_of(name)
    if recipe.gradients == 1 and number == 2:
        pytest.skip("it has one pass")
    if name == "msam" and base == "rmsprop":
        pytest.skip("it goes along the base's momentum, and RMSprop keeps none")
    is_ahead = name == "sampa" and number == 2
    loop = loops(recipe, base=base, spoil={(2 + is_ahead, number)})[1]
    for step in range(2):
        loop.by_closure(step)
    before = values(loop.model.parameters()) + base_state(loop.opt)
    scale = loop.scaler.get_scale()
    loop.by_closure(2)
    if loop.passes < number:
        assert name in ("looksam", "rst", "ae_sam")  # this step of theirs has no second pass
        return
    assert same_bits(values(loop.model.parameters()) + base_state(loop.opt), before)
    # The scaler has looked before the closure ran: what overflows inside it alone cannot tell.
    assert loop.scaler.get_scale() == (scale / 2 if number == 0 else scale)
    loop.by_closure(3)
    assert all(bool(torch.isfinite(x).all()) for x in loop.results())


@every_backend
@pytest.mark.parametrize("base", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("number", [1, 2], ids=["pass 1", "pass 2"])
def test_m2_a_scaler_that_is_given_hears_of_an_overflow_in_any_pass(number, base, backend):
    loop = Loop({"backend": backend}, base=base, spoil={(2, number)})
    for step in range(2):
        loop.with_scaler(step)
    before, scale = loop.results(), loop.scaler.get_scale()
    loop.with_scaler(2)
    assert same_bits(loop.results(), before)
    assert loop.scaler.get_scale() == scale / 2
    loop.with_scaler(3)
    assert loop.scaler.get_scale() == scale / 2
    assert not same_bits(loop.results(), before)


@pytest.mark.parametrize("name", recipes.names())
def test_m2_of_every_recipe_in_every_pass(name):
    recipe = recipe_of(name)
    for number in range(1, recipe.gradients + 1):
        is_ahead = name == "sampa" and number == 2
        loop = loops(recipe, spoil={(2 + is_ahead, number)})[1]
        for step in range(2):
            loop.with_scaler(step)
        before, scale = values(loop.model.parameters()) + base_state(loop.opt), loop.scaler.get_scale()
        loop.with_scaler(2)
        if loop.passes < number:
            assert name in ("looksam", "rst", "ae_sam")  # this step of theirs has no such pass
            continue
        if name == "lookbehind_sam" and number == 3:
            # Its base has stepped with the second gradient by then, and that stands.
            assert all(bool(torch.isfinite(x).all()) for x in loop.results())
            assert loop.scaler.get_scale() == scale / 2
            continue
        assert same_bits(values(loop.model.parameters()) + base_state(loop.opt), before)
        assert loop.scaler.get_scale() == scale / 2


def test_a_scaler_that_is_given_and_lists_of_closures():
    for m_sharpness in (False, True):
        loop, plain = Loop({}, spoil={(2, 4)}), Loop({}, enabled=False)  # the second part of step 1
        for step in range(2):
            for one in (loop, plain):
                one.passes = 0
                parts = [lambda one=one, i=i: one.backward(i) for i in (step, step + 1)]
                one.opt.step(parts, m_sharpness=m_sharpness, scaler=one.scaler)
            if step == 0:
                assert_close(loop.results(), plain.results(), 1e-6)
                before = loop.results()
            loop.scaler.update()
        assert loop.passes == 4
        assert same_bits(loop.results(), before)
        assert loop.scaler.get_scale() == 2.0**15


def test_a_scaler_is_given_with_closures_alone():
    loop = Loop({})
    with pytest.raises(TypeError, match=r"in the two-step form call scaler\.step\(opt\)"):
        loop.opt.step(scaler=loop.scaler)
    loop.backward(0)
    with pytest.raises(TypeError, match=r"where scaler\.step\(\) makes the call it is not needed"):
        loop.scaler.step(loop.opt, lambda: loop.backward(0), scaler=loop.scaler)
    assert same_bits(loop.model.parameters(), Loop({}).model.parameters())


def test_a_closure_that_raises_tells_the_scaler_nothing():
    loop = Loop({})

    def closure():
        if loop.passes == 1:
            raise ValueError("here")
        return loop.backward(0)

    before = values(loop.model.parameters())
    with pytest.raises(ValueError, match="here"):
        loop.opt.step(closure, scaler=loop.scaler)
    assert same_bits(loop.model.parameters(), before)
    assert not loop.opt._is_scaled
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        loop.scaler.update()
    loop.with_scaler(0)
    assert not same_bits(loop.model.parameters(), before)


def test_two_optimizers_under_one_scaler():
    models = [small_net(torch.float32, seed=s) for s in (1, 2)]
    opts = [optimizer(models[0], "sgd"), optimizer(models[1], "adamw")]
    one = scaler()
    for step in range(3):
        for k, passes in enumerate((opts[0].first_step, opts[1].first_step)):
            one.scale(squared_error(models[k](INPUTS[step]), step)).backward()
            passes(zero_grad=True)
        state = base_state(opts[1])
        for model in models:
            one.scale(squared_error(model(INPUTS[step]), step)).backward()
        if step == 2:
            opts[1].param_groups[0]["params"][0].grad[0] = float("nan")
        kept = [values(group.snapshots) for opt in opts for group, _ in opt._groups()]
        for opt in opts:
            one.step(opt)
            opt.zero_grad()
        one.update()
    assert not same_bits(models[0].parameters(), kept[0])
    assert same_bits(models[1].parameters(), kept[1])
    assert same_bits(base_state(opts[1]), state)
    assert one.get_scale() == 2.0**15


def test_half_precision_sums_that_leave_the_range_are_skipped():
    w = Parameter(torch.ones(4, dtype=torch.float16))
    opt = SAM([w], torch.optim.SGD, recipe=Recipe(combine=Mix(4.0, 4.0)), lr=0.1)
    for size, moves in ((20_000.0, False), (2_000.0, True)):
        for passes in range(2):
            w.grad = torch.full_like(w, size)
            if passes == 0:
                opt.first_step(zero_grad=True)
        opt.grad_scale, opt.found_inf = torch.tensor(2.0**14), torch.tensor(0.0)
        opt.step()
        del opt.grad_scale, opt.found_inf
        assert torch.equal(w, torch.ones_like(w)) != moves
        assert bool(torch.isfinite(w).all())


# ---- refusals and the property -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gsam", "gnp", "wsam", "samar", "looksam"])
def test_unscale_between_two_gradients_that_are_both_needed_is_refused(name):
    loop = loops(recipe_of(name))[1]
    before = values(loop.model.parameters())
    loop.backward(0)
    loop.opt.first_step(zero_grad=True)
    loop.backward(0)
    loop.scaler.unscale_(loop.opt)
    with pytest.raises(RuntimeError, match=r"needs the gradients of both passes, and unscale_\(\)"):
        loop.scaler.step(loop.opt)
    assert same_bits(loop.model.parameters(), before)


def test_unscale_before_a_closure_is_refused():
    loop = Loop({})
    before = values(loop.model.parameters())
    loop.backward(0)
    loop.scaler.unscale_(loop.opt)
    with pytest.raises(RuntimeError, match=r"closure's gradients could not be unscaled"):
        loop.scaler.step(loop.opt, lambda: loop.backward(0))
    assert same_bits(loop.model.parameters(), before)


@pytest.mark.parametrize("lr", [0.05, 0.0])
def test_m3_a_scaler_that_steps_with_nothing_pending_is_loud(lr):
    # Lightning's 16-mixed: the closure has run outside, once.
    loop = Loop({"lr": lr})
    before = values(loop.model.parameters())
    loop.backward(0)
    with pytest.raises(RuntimeError, match="nothing pending"):
        loop.scaler.step(loop.opt)
    assert same_bits(loop.model.parameters(), before)
    assert not base_state(loop.opt)


def test_m1_the_property_is_false_inside_of_a_closure_alone():
    loop, seen = Loop({}), []

    def closure():
        seen.append(loop.opt._step_supports_amp_scaling)
        loss = loop.backward(0)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return loss

    assert loop.opt._step_supports_amp_scaling
    loop.opt.step(closure)
    assert seen == [False, False]
    assert loop.opt._step_supports_amp_scaling
    with pytest.raises(KeyboardInterrupt):
        loop.opt.step(closure)
    assert loop.opt._step_supports_amp_scaling
    loop.opt.zero_grad()
    loop.backward(0)
    loop.opt.first_step()
    assert loop.opt._step_supports_amp_scaling


def test_which_recipes_are_scale_free():
    free = {name for name in recipes.names() if is_scale_free(recipes.get(name))}
    tied = {"gnp", "looksam", "samar", "wsam", "sampa", "lookbehind_sam"} | NEEDING_IT_FIRST
    assert free == set(recipes.names()) - tied
    assert not is_scale_free(recipes.layerwise_sam(form="trust_ratio"))
    assert reason_at_first(recipes.layerwise_sam(form="trust_ratio")) is not None
    assert is_scale_free(recipes.gnp(normalize=False))
    assert is_scale_free(recipes.wsam(decoupled=False))


# ---- steps that fail ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["by_closure", "in_two_steps"])
def test_a_step_that_raises_leaves_no_scale_behind(form):
    failed, whole = Loop({}, scale=1024.0), Loop({}, scale=1024.0)
    failed.scaler.scale(squared_error(failed.model(INPUTS[0]), 0)).backward()

    def raises():
        raise MemoryError

    with pytest.raises(MemoryError):
        failed.scaler.step(failed.opt, raises)
    failed.scaler = scaler(scale=1024.0)  # the loop around goes on with another, or with none
    for loop in (failed, whole):
        loop.opt.zero_grad()
        getattr(loop, form)(0)
    assert same_bits(failed.model.parameters(), whole.model.parameters())
