"""The variants of SAM in the way they are published: loops over tensors in eager PyTorch, written afresh.

What each allocates and how often it passes over memory follows the code named beside it, to a few bytes per
parameter; BYTES has the counts. Left out are switches, closures' bookkeeping, and what is a defect of one
version only. Where a method has no public code it is written in the manner of the others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .cases import Base
from .peers import Slots

Evaluate = Callable[[], object]


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm over all tensors, from the norms of each."""
    return torch.norm(torch.stack([x.norm(p=2) for x in tensors]), p=2)


def dot(left: Iterable[Tensor], right: Iterable[Tensor]) -> Tensor:
    """The inner product over all tensors, from the elementwise products of each."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


class Published:
    """A variant around a base optimizer in torch's default form."""

    def __init__(self, params: list[Tensor], base: Base, slots: Slots = None) -> None:
        self.params = params
        self.base = base.build(params, slots)
        self.count = 0

    @torch.no_grad()
    def step(self, evaluate: Evaluate) -> None:
        """Take a step; `evaluate` leaves gradients at the present weights in ``p.grad``."""
        self.take(evaluate)
        self.count += 1

    def take(self, evaluate: Evaluate) -> None:
        raise NotImplementedError

    def evaluate(self, evaluate: Evaluate) -> None:
        self.base.zero_grad()
        with torch.enable_grad():
            evaluate()

    @property
    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.params if p.grad is not None]

    def save(self) -> None:
        self.saved = {p: p.data.clone() for p in self.params}

    def restore(self) -> None:
        """As the most copied code does it: the copy becomes the parameter's storage."""
        for p in self.params:
            p.data = self.saved[p]

    def subtract(self, perturbations: dict[Tensor, Tensor]) -> None:
        for p in self.params:
            p.sub_(perturbations[p])


class Sam(Published):
    """Foret et al., ICLR 2021; davda54/sam."""

    def __init__(self, *arguments, rho: float) -> None:
        super().__init__(*arguments)
        self.rho = rho

    def take(self, evaluate: Evaluate) -> None:
        self.evaluate(evaluate)
        scale = self.rho / (norm_of(1.0 * g for g in self.grads) + 1e-12)
        self.save()
        for p in self.params:
            p.add_(1.0 * p.grad * scale)
        self.evaluate(evaluate)
        self.restore()
        self.base.step()


class Asam(Published):
    """Kwon et al., ICML 2021; SamsungLabs/ASAM. One buffer per tensor is T first and e then."""

    def __init__(self, *arguments, rho: float, eta: float, weights: Sequence[bool]) -> None:
        super().__init__(*arguments)
        self.rho, self.eta, self.weights = rho, eta, weights
        self.buffers = {p: torch.clone(p).detach() for p in self.params}

    def take(self, evaluate: Evaluate) -> None:
        self.evaluate(evaluate)
        norms = []
        for p, is_weight in zip(self.params, self.weights, strict=True):
            if is_weight:
                buffer = self.buffers[p]
                buffer.copy_(p)
                buffer.abs_()
                buffer.add_(self.eta)
                p.grad.mul_(buffer)
            norms.append(p.grad.norm(p=2))
        norm = torch.norm(torch.stack(norms), p=2) + 1e-16
        for p, is_weight in zip(self.params, self.weights, strict=True):
            buffer = self.buffers[p]
            if is_weight:
                p.grad.mul_(buffer)
            buffer.copy_(p.grad)
            buffer.mul_(self.rho / norm)
            p.add_(buffer)
        self.evaluate(evaluate)
        self.subtract(self.buffers)
        self.base.step()


class Layerwise(Published):
    """Mueller et al., NeurIPS 2023, the layer-wise operator of mueller-mp/SAM-ON: T_l = (1 + eta) ||w_l||."""

    def __init__(self, *arguments, rho: float, eta: float, weights: Sequence[bool]) -> None:
        super().__init__(*arguments)
        self.rho, self.eta, self.weights = rho, eta, weights

    def take(self, evaluate: Evaluate) -> None:
        self.evaluate(evaluate)
        self.save()
        operators, norms = {}, []
        for p, is_weight in zip(self.params, self.weights, strict=True):
            if is_weight:
                operator = torch.ones_like(p)
                operator.mul_(p.norm(p=2))
                operator.mul_(1 + self.eta)
                operators[p] = operator
                p.grad.mul_(operator)
            norms.append(p.grad.norm(p=2))
        norm = torch.norm(torch.stack(norms), p=2) + 1e-16
        for p in self.params:
            if p in operators:
                p.grad.mul_(operators[p])
            e = p.grad.clone()
            e.mul_(self.rho / norm)
            p.add_(e)
        self.evaluate(evaluate)
        self.restore()
        self.base.step()


class FisherSam(Published):
    """Kim et al., ICML 2022, as third parties write it: the inverse Fisher diagonal twice, step by step."""

    def __init__(self, *arguments, rho: float, eta: float) -> None:
        super().__init__(*arguments)
        self.rho, self.eta = rho, eta

    def inverse_fisher(self, g: Tensor) -> Tensor:
        return (1.0 + self.eta * g.clone().square()).reciprocal()

    def take(self, evaluate: Evaluate) -> None:
        self.evaluate(evaluate)
        products = [(g * self.inverse_fisher(g) * g).sum() for g in self.grads]
        scale = self.rho / (torch.stack(products).sum().sqrt() + 1e-12)
        self.save()
        for p in self.params:
            p.add_(self.inverse_fisher(p.grad) * p.grad * scale)
        self.evaluate(evaluate)
        self.restore()
        self.base.step()


class LookSam(Published):
    """Liu et al., CVPR 2022, with global norms as in Leminhbinh0209/LookSAM and MarlonBecker/MSAM."""

    def __init__(self, *arguments, rho: float, alpha: float, k: int) -> None:
        super().__init__(*arguments)
        self.rho, self.alpha, self.k = rho, alpha, k
        self.orthogonal: dict[Tensor, Tensor] = {}

    def take(self, evaluate: Evaluate) -> None:
        self.evaluate(evaluate)
        if self.count % self.k == 0:
            self.refresh(evaluate)
        else:
            ratio = norm_of(self.grads) / (norm_of(self.orthogonal.values()) + 1e-12)
            for p in self.params:
                p.grad.add_(self.orthogonal[p] * (self.alpha * ratio))
        self.base.step()

    def refresh(self, evaluate: Evaluate) -> None:
        scale = self.rho / (norm_of(self.grads) + 1e-12)
        self.save()
        first = {p: p.grad.clone() for p in self.params}
        for p in self.params:
            p.add_(p.grad * scale)
        self.evaluate(evaluate)
        self.restore()
        before, after = norm_of(first.values()), norm_of(self.grads)
        cosine = dot(first.values(), self.grads) / (before * after)
        for p in self.params:
            parallel = first[p] / before * (after * cosine)
            self.orthogonal[p] = (p.grad - parallel).clone()


class Esam(Published):
    """Du et al., ICLR 2022; dydjw9/Efficient_SAM. Whole tensors are left out, drawn after each step.

    Args:
        draws: per step, which tensors take part, in place of drawing; for comparisons.
    """

    def __init__(
        self, *arguments, rho: float, beta: float, draws: Sequence[Sequence[bool]] | None = None
    ) -> None:
        super().__init__(*arguments)
        self.rho, self.beta, self.draws = rho, beta, draws
        self.frozen: set[Tensor] = set()

    def take(self, evaluate: Evaluate) -> None:
        if self.draws is not None:
            chosen = zip(self.params, self.draws[self.count], strict=True)
            self.frozen = {p for p, takes_part in chosen if not takes_part}
        self.evaluate(evaluate)
        for p in self.frozen:
            p.grad = None
        perturbations = {}
        if self.grads:
            scale = self.rho / (norm_of(1.0 * g for g in self.grads) + 1e-7)
            for p in self.params:
                if p.grad is not None:
                    perturbations[p] = 1.0 * p.grad * scale * (1 / self.beta)
                    p.add_(perturbations[p])
        self.evaluate(evaluate)
        for p, e in perturbations.items():
            p.sub_(e)
        self.base.step()
        if self.draws is None:
            self.frozen = {p for p in self.params if random.random() > self.beta}


class FriendlySam(Published):
    """Li et al., CVPR 2024; nblt/F-SAM."""

    def __init__(self, *arguments, rho: float, sigma: float, lmbda: float) -> None:
        super().__init__(*arguments)
        self.rho, self.sigma, self.lmbda = rho, sigma, lmbda
        self.ema: dict[Tensor, Tensor] = {}

    def take(self, evaluate: Evaluate) -> None:
        self.evaluate(evaluate)
        for p in self.params:
            g = p.grad.clone()
            if p not in self.ema:
                self.ema[p] = g
            else:
                p.grad.sub_(self.ema[p] * self.sigma)
                self.ema[p] = self.ema[p] * self.lmbda + g * (1 - self.lmbda)
        scale = self.rho / (norm_of(1.0 * d for d in self.grads) + 1e-12)
        self.save()
        for p in self.params:
            p.add_(1.0 * p.grad * scale)
        self.evaluate(evaluate)
        self.restore()
        self.base.step()


class Vasso(Published):
    """Li and Giannakis, NeurIPS 2023; BingcongLi/VaSSO."""

    def __init__(self, *arguments, rho: float, theta: float) -> None:
        super().__init__(*arguments)
        self.rho, self.theta = rho, theta
        self.ema: dict[Tensor, Tensor] = {}

    def take(self, evaluate: Evaluate) -> None:
        self.evaluate(evaluate)
        for p in self.params:
            if p not in self.ema:
                self.ema[p] = p.grad.clone()
            else:
                self.ema[p].mul_(1 - self.theta)
                self.ema[p].add_(p.grad, alpha=self.theta)
        scale = self.rho / (norm_of(self.ema.values()) + 1e-7)
        perturbations = {}
        for p in self.params:
            perturbations[p] = self.ema[p] * scale
            p.add_(perturbations[p])
        self.evaluate(evaluate)
        self.subtract(perturbations)
        self.base.step()


class CrSam(Published):
    """Wu, Luo, Wunsch, AAAI 2024; TrustAIoT/CR-SAM: to w + e, to w - e, and back."""

    def __init__(self, *arguments, rho: float, gamma: float, beta: float) -> None:
        super().__init__(*arguments)
        self.rho, self.gamma, self.beta = rho, gamma, beta

    def take(self, evaluate: Evaluate) -> None:
        self.evaluate(evaluate)
        scale = self.rho / (norm_of(self.grads) + 1e-12)
        perturbations, at, above = {}, {}, {}
        for p in self.params:
            at[p] = p.grad.clone()
            perturbations[p] = 1.0 * p.grad * scale
            p.add_(perturbations[p])
        self.evaluate(evaluate)
        for p in self.params:
            above[p] = p.grad.clone()
            p.sub_(2 * perturbations[p])
        self.evaluate(evaluate)
        for p in self.params:
            p.add_(perturbations[p])
            curvature = above[p] + p.grad - 2 * at[p]
            slope = above[p] - p.grad
            p.grad = above[p] + self.gamma * curvature + self.beta * slope
        self.base.step()


class Gsam(Published):
    """Zhuang et al., ICLR 2022; juntang-zhuang/GSAM."""

    def __init__(self, *arguments, rho: float, alpha: float) -> None:
        super().__init__(*arguments)
        self.rho, self.alpha = rho, alpha

    def take(self, evaluate: Evaluate) -> None:
        self.evaluate(evaluate)
        scale = self.rho / (norm_of(1.0 * g for g in self.grads) + 1e-12)
        first, perturbations = {}, {}
        for p in self.params:
            first[p] = p.grad.clone()
            perturbations[p] = 1.0 * p.grad * scale
            p.add_(perturbations[p])
        self.evaluate(evaluate)
        before, after = norm_of(first.values()), norm_of(1.0 * g for g in self.grads)
        cosine = dot(first.values(), self.grads) / (before * after + 1e-12)
        for p in self.params:
            vertical = first[p] - before * cosine * (p.grad / (after + 1e-12))
            p.grad.add_(vertical, alpha=-self.alpha)
        self.subtract(perturbations)
        self.base.step()


class Wsam(Published):
    """Yue et al., KDD 2023, decoupled; atorch's WeightedSAM."""

    def __init__(self, *arguments, rho: float, gamma: float) -> None:
        super().__init__(*arguments)
        self.rho, self.weight = rho, gamma / (1 - gamma)

    def take(self, evaluate: Evaluate) -> None:
        self.evaluate(evaluate)
        scale = self.rho / (norm_of(1.0 * g for g in self.grads) + 1e-12)
        first = {}
        self.save()
        for p in self.params:
            p.add_(1.0 * p.grad * scale)
            first[p] = p.grad.clone()
        self.evaluate(evaluate)
        sharpness = {}
        for p in self.params:
            p.copy_(self.saved[p])
            sharpness[p] = p.grad.clone()
            sharpness[p].sub_(first[p])
            p.grad.copy_(first[p])
        self.base.step()
        for p in self.params:
            p.sub_(sharpness[p] * self.weight, alpha=self.base.param_groups[0]["lr"])


class Gnp(Published):
    """Zhao, Zhang, Hu, ICML 2022; the authors' code is JAX, this is its arithmetic, tensor by tensor."""

    def __init__(self, *arguments, rho: float, alpha: float, normalize: bool) -> None:
        super().__init__(*arguments)
        self.rho, self.alpha, self.normalize = rho, alpha, normalize

    def take(self, evaluate: Evaluate) -> None:
        self.evaluate(evaluate)
        norm = norm_of(self.grads) + 1e-12
        first, perturbations = {}, {}
        for p in self.params:
            first[p] = p.grad / norm if self.normalize else p.grad.clone()
            perturbations[p] = p.grad * (self.rho / norm)
            p.add_(perturbations[p])
        self.evaluate(evaluate)
        self.subtract(perturbations)
        for p in self.params:
            p.grad = (1 - self.alpha) * first[p] + self.alpha * p.grad
        self.base.step()


class MultiStep(Published):
    """n ascents with projection; tml-epfl/understanding-sam, whose norms are those of one long vector."""

    def __init__(self, *arguments, rho: float, n: int, step: float | None = None) -> None:
        super().__init__(*arguments)
        self.rho, self.n, self.size = rho, n, rho if step is None else step

    def take(self, evaluate: Evaluate) -> None:
        self.save()
        moved = {p: torch.zeros_like(p) for p in self.params}
        for _ in range(self.n):
            self.evaluate(evaluate)
            norm = torch.cat([g.flatten() for g in self.grads]).norm()
            for p in self.params:
                moved[p] = moved[p] + self.size * p.grad / (norm + 1e-12)
            length = torch.cat([d.flatten() for d in moved.values()]).norm()
            if length > self.rho:
                moved = {p: d * (self.rho / length) for p, d in moved.items()}
            for p in self.params:
                p.copy_(self.saved[p] + moved[p])
        self.evaluate(evaluate)
        self.restore()
        self.base.step()


class Lookbehind(Published):
    """Mordido et al., ICML 2024; chandar-lab/Lookbehind-SAM: k ascents, a base step for each, then back."""

    def __init__(self, *arguments, rho: float, k: int, alpha: float) -> None:
        super().__init__(*arguments)
        self.rho, self.k, self.alpha = rho, k, alpha

    def take(self, evaluate: Evaluate) -> None:
        slow = {p: p.data.clone() for p in self.params}
        fast = {p: p.data.clone() for p in self.params}
        for ascent in range(self.k):
            if ascent == 0:  # the authors evaluate this one k times; from the second on it is the one at hand
                self.evaluate(evaluate)
            scale = self.rho / (norm_of(self.grads) + 1e-16)
            for p in self.params:
                p.add_(1.0 * p.grad * scale)
            self.evaluate(evaluate)
            ascended = {}
            for p in self.params:
                ascended[p] = p.data.clone()
                p.copy_(fast[p])
            self.base.step()
            for p in self.params:
                fast[p].copy_(p)
                p.copy_(ascended[p])
        for p in self.params:
            slow[p].add_(fast[p] - slow[p], alpha=self.alpha)
            p.copy_(slow[p])


class Samar(Published):
    """Zou, Deng, Sun, arXiv 2412.16854, in the reconstruction of recipes.samar; there is no public code."""

    def __init__(self, *arguments, rho: float, lambda_0: float, chi: float, up: float, down: float) -> None:
        super().__init__(*arguments)
        self.rho, self.weight, self.chi, self.up, self.down = rho, lambda_0, chi, up, down
        self.last = 0.0

    def take(self, evaluate: Evaluate) -> None:
        self.evaluate(evaluate)
        norm = norm_of(self.grads).item()
        first, perturbations = {}, {}
        for p in self.params:
            first[p] = p.grad.clone()
            perturbations[p] = p.grad * (self.rho / (norm + 1e-12))
            p.add_(perturbations[p])
        self.evaluate(evaluate)
        self.subtract(perturbations)
        for p in self.params:
            p.grad = (1 - self.weight) * first[p] + self.weight * p.grad
        self.base.step()
        ratio = norm / self.last if self.last else 1.0
        if ratio > self.chi:
            self.weight = min(self.up * self.weight, 1.0)
        elif ratio < self.chi:
            self.weight = max(self.down * self.weight, 0.0)
        self.last = norm


class Sampa(Published):
    """Xie, Pethick, Cevher, NeurIPS 2024, on one device; LIONS-EPFL/SAMPa, whose norm is of one long vector.

    Begins with a gradient at the first weights; later ones are carried over.

    Args:
        momentum: whether the anticipated point has the decay and momentum of the base in it, as in the code.
    """

    def __init__(self, *arguments, rho: float, lmbda: float, momentum: bool = False) -> None:
        super().__init__(*arguments)
        self.rho, self.lmbda, self.momentum = rho, lmbda, momentum
        self.ahead: dict[Tensor, Tensor] = {}

    def step(self, evaluate: Evaluate, ahead: Evaluate | None = None) -> None:
        """Take a step; `ahead` evaluates at the next batch."""
        self.next = ahead or evaluate
        super().step(evaluate)

    def take(self, evaluate: Evaluate) -> None:
        if not self.ahead:
            self.evaluate(evaluate)
            self.ahead = {p: p.grad.clone() for p in self.params}
        group = self.base.param_groups[0]
        norm = torch.cat([g.flatten() for g in self.ahead.values()]).norm()
        self.save()
        for p in self.params:
            p.add_(self.ahead[p] * (self.rho / (norm + 1e-12)))
        self.evaluate(evaluate)
        first = {}
        for p in self.params:
            first[p] = p.grad.clone()
            forward = self.ahead[p]
            if self.momentum:
                forward = forward + group["weight_decay"] * self.saved[p]
                if (buffer := self.base.state[p].get("momentum_buffer")) is not None:
                    forward = forward + group["momentum"] * buffer
            p.copy_(self.saved[p] - group["lr"] * forward)
        self.evaluate(self.next)
        for p in self.params:
            self.ahead[p] = p.grad.clone()
            p.copy_(self.saved[p])
            p.grad = (1 - self.lmbda) * first[p] + self.lmbda * p.grad
        self.base.step()


class MomentumSam(Published):
    """Becker et al., arXiv 2401.12033; MarlonBecker/MSAM, an SGD of its own: stored weights are perturbed."""

    def __init__(self, *arguments, rho: float) -> None:
        super().__init__(*arguments)
        self.rho = rho
        self.factor: Tensor | float = 0.0
        for p in self.params:
            self.base.state[p].setdefault("momentum_buffer", torch.zeros_like(p))

    def take(self, evaluate: Evaluate) -> None:
        self.evaluate(evaluate)
        group = self.base.param_groups[0]
        buffers = [self.base.state[p]["momentum_buffer"] for p in self.params]
        for p, buffer in zip(self.params, buffers, strict=True):
            p.grad.add_(p, alpha=group["weight_decay"])
            p.add_(buffer, alpha=float(self.factor))
            buffer.mul_(group["momentum"]).add_(p.grad)
            p.add_(buffer, alpha=-group["lr"])
        self.factor = self.rho / (norm_of(buffers) + 1e-12)
        for p, buffer in zip(self.params, buffers, strict=True):
            p.sub_(buffer, alpha=float(self.factor))

    def unperturbed(self) -> list[Tensor]:
        """The weights themselves."""
        buffers = (self.base.state[p]["momentum_buffer"] for p in self.params)
        return [p.detach() + self.factor * b for p, b in zip(self.params, buffers, strict=True)]


class RandSam(Published):
    """Tiwary and Aananth, arXiv 2411.01714: a point on the sphere and one gradient; there is no public code.

    Args:
        draws: per step, a direction for each tensor, in place of drawing; for comparisons.
    """

    def __init__(self, *arguments, rho: float, draws: Sequence[Sequence[Tensor]] | None = None) -> None:
        super().__init__(*arguments)
        self.rho, self.draws = rho, draws

    def take(self, evaluate: Evaluate) -> None:
        if self.draws is None:
            noise = [torch.randn_like(p) for p in self.params]
        else:
            noise = [z.clone() for z in self.draws[self.count]]
        scale = self.rho / (norm_of(noise) + 1e-12)
        perturbations = {}
        for p, z in zip(self.params, noise, strict=True):
            perturbations[p] = z * scale
            p.add_(perturbations[p])
        self.evaluate(evaluate)
        self.subtract(perturbations)
        self.base.step()


# Bytes per fp32 parameter of a step with SGD, momentum and weight decay: reads and writes of whole lists by
# its operators, 44 of them the base's but MSAM's, which is its own. Counted by a test, with the options of
# `variants.py`, parameters that have a T, and ESAM's all taking part; LookSAM's is the mean of a period.
BYTES: dict[type[Published], float] = {
    Sam: 92,
    Asam: 136,
    Layerwise: 136,
    FisherSam: 192,
    LookSam: 86.4,
    Esam: 104,
    FriendlySam: 148,
    Vasso: 100,
    CrSam: 208,
    Gsam: 176,
    Wsam: 156,
    Gnp: 116,
    MultiStep: 292,
    Lookbehind: 264,
    Samar: 116,
    Sampa: 204,
    MomentumSam: 72,
    RandSam: 88,
}
