"""Numbers worked out by hand or by the authors' own code, digit for digit: perturbation and new weights."""

from __future__ import annotations

import math

import pytest
import torch
from cases import ONE_TENSOR, THREE_TENSORS, Quadratic, row, toy_loss, toy_parameters
from fixtures import every_backend

from sam_kernels import SAM, Recipe, recipes
from sam_kernels.policies.mask import ByName
from sam_kernels.policies.metric import Adaptive

# The numbers below carry nine significant digits.
DIGITS = 2e-8


def agree(actual, expected) -> None:
    flat = torch.cat([t.detach().reshape(-1) for t in actual])
    torch.testing.assert_close(flat, row(*expected), rtol=DIGITS, atol=1e-11)


def perturb_and_step(problem: Quadratic, backend: str, options: dict, base: dict | None = None, groups=None):
    """Run one step in the two-step form; return e and the new weights, each a list of tensors."""
    weights = problem.parameters()
    opt = SAM(
        groups(weights) if groups else weights.items(),
        torch.optim.SGD,
        backend=backend,
        lr=0.1,
        **(base or {}),
        **options,
    )
    problem.loss(weights).backward()
    opt.first_step(zero_grad=True)
    e = [w.detach() - problem.start[name] for name, w in weights.items()]
    problem.loss(weights).backward()
    opt.second_step(zero_grad=True)
    return e, list(weights.values())


SAM_ROWS = {
    "p=2": (2.0, (0.0166666667, 0.0333333333, -0.0333333333), (0.988333333, -2.02666667, 3.03)),
    "p=inf": (math.inf, (0.05, 0.05, -0.05), (0.985, -2.03, 3.035)),
    "p=4": (4.0, (0.0318945476, 0.0401846119, -0.0401846119), (0.986810545, -2.02803692, 3.03205538)),
    "p=1.5": (1.5, (0.00756259291, 0.0302503717, -0.0302503717), (0.989243741, -2.02605007, 3.02907511)),
}


@every_backend
@pytest.mark.parametrize("label", SAM_ROWS)
def test_sam_on_one_tensor(label, backend):
    p, e, new = SAM_ROWS[label]
    actual_e, actual_new = perturb_and_step(ONE_TENSOR, backend, {"recipe": recipes.sam(rho=0.05, p=p)})
    agree(actual_e, e)
    agree(actual_new, new)


@every_backend
def test_sam_on_three_tensors_takes_one_norm(backend):
    e, new = perturb_and_step(THREE_TENSORS, backend, {"rho": 0.05})
    agree(e, (0.00845154255, 0.0169030851, -0.0169030851, 0.00845154255, -0.0253546276, 0.0338061702))
    agree(new, (0.989154846, -2.02338062, 3.02507093, 0.486619383, -0.207322686, 1.4397163))


@every_backend
def test_weight_decay_of_the_base_acts_on_the_restored_weights(backend):
    e, new = perturb_and_step(ONE_TENSOR, backend, {"rho": 0.05}, {"weight_decay": 0.01})
    agree(e, (0.0166666667, 0.0333333333, -0.0333333333))
    agree(new, (0.987333333, -2.02466667, 3.027))


@every_backend
def test_decay_written_into_the_loss_acts_in_both_passes(backend):
    class Decayed(Quadratic):
        def loss(self, parameters):
            return super().loss(parameters) + sum(0.005 * (w**2).sum() for w in parameters.values())

    problem = Decayed(ONE_TENSOR.start, ONE_TENSOR.slope, ONE_TENSOR.curvature)
    e, new = perturb_and_step(problem, backend, {"rho": 0.05})
    agree(e, (0.0203008704, 0.0332196062, -0.0313740725))
    agree(new, (0.986949612, -2.02467714, 3.0264436))


@every_backend
def test_sam_with_momentum_for_three_steps(backend):
    weights = ONE_TENSOR.parameters()
    (w,) = weights.values()
    opt = SAM([w], torch.optim.SGD, rho=0.05, backend=backend, lr=0.1, momentum=0.9)
    for expected in (
        (0.988333333, -2.02666667, 3.03),
        (0.966829691, -2.0725404, 3.07610795),
        (0.937122273, -2.12535245, 3.11010496),
    ):

        def closure():
            loss = ONE_TENSOR.loss(weights)
            loss.backward()
            return loss

        opt.step(closure)
        agree([w], expected)
    agree([opt.base_optimizer.state[w]["momentum_buffer"]], (0.297074179, 0.528120567, -0.339970084))


@every_backend
def test_clipping_between_second_backward_and_update(backend):
    weights = ONE_TENSOR.parameters()
    (w,) = weights.values()
    opt = SAM([w], torch.optim.SGD, rho=0.05, backend=backend, lr=0.1)
    ONE_TENSOR.loss(weights).backward()
    opt.first_step(zero_grad=True)
    ONE_TENSOR.loss(weights).backward()
    torch.nn.utils.clip_grad_norm_([w], 0.3)
    opt.step()
    clipped = row(0.0837322831, 0.191388076, -0.215311585)
    agree([w], (ONE_TENSOR.start["fc.weight"] - 0.1 * clipped).tolist())


@every_backend
def test_two_groups_share_one_norm_and_keep_their_own_rho_and_metric(backend):
    def groups(weights):
        first = [("fc.weight", weights["fc.weight"])]
        rest = [(name, weights[name]) for name in ("fc.bias", "bn.weight")]
        return [{"params": first, "rho": 0.05}, {"params": rest, "rho": 0.2, "adaptive": True}]

    e, _ = perturb_and_step(THREE_TENSORS, backend, {}, groups=groups)
    agree(e, (0.00738716855, 0.0147743371, -0.0147743371, 0.00738716855, -0.00554037641, 0.265938068))


ASAM_ROWS = {
    "one tensor, eta=0.01": (
        ONE_TENSOR,
        {"rho": 0.05, "eta": 0.01},
        (0.00697842076, 0.0552759881, -0.123958808),
        (0.989302158, -2.0310552, 3.05718764),
    ),
    "one tensor, eta=0": (
        ONE_TENSOR,
        {"rho": 0.05, "eta": 0.0},
        (0.0068680282, 0.0549442256, -0.123624508),
        (0.989313197, -2.03098885, 3.05708735),
    ),
    "one tensor, published defaults": (
        ONE_TENSOR,
        {},
        (0.0697842076, 0.552759881, -1.23958808),
        (0.983021579, -2.13055198, 3.39187642),
    ),
    "three tensors, eta=0.01": (
        THREE_TENSORS,
        {"rho": 0.05, "eta": 0.01},
        (0.00510298831, 0.0404207099, -0.0906452003, 0.00500243928, -0.0150073179, 0.0456242472),
        (0.989489701, -2.02808414, 3.04719356, 0.487999024, -0.212496341, 1.43262545),
    ),
    "three tensors, eta=0": (
        THREE_TENSORS,
        {"rho": 0.05, "eta": 0.0},
        (0.00502518908, 0.0402015126, -0.0904534034, 0.00502518908, -0.0150755672, 0.0452267017),
        (0.989497481, -2.0280403, 3.04713602, 0.487989924, -0.212462216, 1.43286398),
    ),
    "three tensors, p=inf": (
        THREE_TENSORS,
        {"rho": 0.05, "eta": 0.01, "p": math.inf},
        (0.0505, 0.1005, -0.1505, 0.05, -0.05, 0.0755),
        (0.98495, -2.0401, 3.06515, 0.47, -0.195, 1.4147),
    ),
}


@every_backend
@pytest.mark.parametrize("label", ASAM_ROWS)
def test_asam_of_the_authors(label, backend):
    problem, arguments, e, new = ASAM_ROWS[label]
    actual_e, actual_new = perturb_and_step(problem, backend, {"recipe": recipes.asam(**arguments)})
    agree(actual_e, e)
    agree(actual_new, new)


@every_backend
def test_adaptive_flag_is_the_elementwise_form_on_every_parameter(backend):
    e, new = perturb_and_step(THREE_TENSORS, backend, {"rho": 0.05, "adaptive": True})
    agree(e, (0.00527596143, 0.0422076914, -0.0949673057, 0.00131899036, -0.000989242767, 0.0474836528))
    agree(new, (0.989472404, -2.02844154, 3.04849019, 0.489472404, -0.219505379, 1.43150981))


@every_backend
def test_layerwise_operator_on_three_tensors(backend):
    e, new = perturb_and_step(
        THREE_TENSORS, backend, {"recipe": recipes.layerwise_sam(rho=0.05, eta=0.01, form="operator")}
    )
    agree(e, (0.0539391492, 0.107878298, -0.107878298, 0.00377688106, -0.0113306432, 0.0346751674))
    agree(new, (0.984606085, -2.04157566, 3.05236349, 0.488489248, -0.214334678, 1.4391949))


@every_backend
def test_nosam_perturbs_normalization_only_and_norms_over_it(backend):
    e, new = perturb_and_step(THREE_TENSORS, backend, {"recipe": recipes.nosam(rho=0.05)})
    agree(e, (0, 0, 0, 0, 0, 0.05))
    agree(new, (0.99, -2.02, 3.02, 0.49, -0.22, 1.43))


@every_backend
def test_adaptive_metric_restricted_to_normalization(backend):
    recipe = Recipe(metric=Adaptive(eta=0.01), mask=ByName(("*bn*", "*norm*")), rho=0.05)
    e, new = perturb_and_step(THREE_TENSORS, backend, {"recipe": recipe})
    agree(e, (0, 0, 0, 0, 0, 0.0755))
    agree([new[2]], (1.4147,))


@every_backend
def test_everything_but_normalization(backend):
    e, new = perturb_and_step(THREE_TENSORS, backend, {"recipe": Recipe(mask=ByName(("fc*",)), rho=0.05)})
    agree(e, (0.0114707867, 0.0229415734, -0.0229415734, 0.0114707867, -0.0344123601, 0))
    agree(new, (0.988852921, -2.02458831, 3.02688247, 0.485411685, -0.20279382, 1.46))


# (options of SAM, weights after step 1, weights after step 2 or 3 with the number of that step)
TOY_ROWS = {
    "sam": (
        lambda: {"recipe": recipes.sam(rho=0.1)},
        (0.8232763749, -0.2448577492, 1.8359596565),
        (3, (0.5622245042, -0.0750548844, 1.6126516133)),
    ),
    "per-tensor radius": (
        lambda: {"recipe": recipes.layerwise_sam(rho=0.1, form="radius")},
        (0.8209716691, -0.2402894331, 1.8331915007),
        (3, (0.5549020055, -0.0684308758, 1.6054206000)),
    ),
    "trust ratio": (
        lambda: {"recipe": recipes.layerwise_sam(rho=0.1, form="trust_ratio")},
        (0.8260707262, -0.2631233036, 1.8362921479),
        (3, (0.5684703676, -0.0910492024, 1.6108747663)),
    ),
    "layer-wise operator": (
        lambda: {"recipe": recipes.layerwise_sam(rho=0.1, eta=0.0)},
        (0.8209956738, -0.2478338488, 1.8314575768),
        (3, (0.5622506551, -0.0874310623, 1.6018119787)),
    ),
    "elementwise, p=inf": (
        lambda: {"recipe": recipes.asam(rho=0.1, eta=0.0, p=math.inf)},
        (0.8140000000, -0.2533450000, 1.8270000000),
        (3, (0.5478218610, -0.0893808615, 1.5935945080)),
    ),
    "only the second tensor": (
        lambda: {"recipe": Recipe(mask=ByName(("B*",)), rho=0.1)},
        (0.8270000000, -0.2750000000, 1.8350000000),
        (2, (0.7062500000, -0.1741681250, 1.7134400000)),
    ),
}


@every_backend
@pytest.mark.parametrize("label", TOY_ROWS)
def test_toy_problem(label, backend):
    options, first, (last, final) = TOY_ROWS[label]
    weights = toy_parameters()
    opt = SAM(weights.items(), torch.optim.SGD, backend=backend, lr=0.1, **options())
    for step in range(last):

        def closure(step=step):
            loss = toy_loss(weights, step)
            loss.backward()
            return loss

        opt.step(closure)
        if step == 0:
            agree(weights.values(), first)
    agree(weights.values(), final)


@every_backend
def test_one_step_sharpness_of_the_toy_problem(backend):
    weights = toy_parameters()
    opt = SAM(weights.items(), torch.optim.SGD, rho=0.1, backend=backend, lr=0.1)
    before = toy_loss(weights, 0)
    before.backward()
    with opt.perturbed():
        sharpness = toy_loss(weights, 0) - before
    # L(w + e) - L(w), and its first-order estimate rho * ||g|| = 0.32423
    torch.testing.assert_close(sharpness.item(), 0.3374123306, rtol=1e-9, atol=0)
