"""SGD (Sutskever et al. 2013), Adam (Kingma, Ba 2015; Reddi et al. 2018), AdamW (Loshchilov, Hutter 2019)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from oracles.sam import Tensors


@dataclass
class Sgd:
    """Heavy-ball or Nesterov momentum; the first buffer is the first gradient, without dampening."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    buffers: Tensors = field(default_factory=dict)

    def step(self, weights: Tensors, gradients: Tensors) -> Tensors:
        """Return the weights after one step."""
        new = dict(weights)
        for name, g in gradients.items():
            d = (-g if self.maximize else g) + self.weight_decay * weights[name]
            if self.momentum:
                if name in self.buffers:
                    self.buffers[name] = self.momentum * self.buffers[name] + (1 - self.dampening) * d
                else:
                    self.buffers[name] = d.clone()
                d = d + self.momentum * self.buffers[name] if self.nesterov else self.buffers[name]
            new[name] = weights[name] - self.lr * d
        return new


@dataclass
class Adam:
    """Adam with coupled decay; `decoupled` makes it AdamW."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False
    decoupled: bool = False
    moments: dict[str, list] = field(default_factory=dict)

    def step(self, weights: Tensors, gradients: Tensors) -> Tensors:
        """Return the weights after one step."""
        new = dict(weights)
        b1, b2 = self.betas
        for name, g in gradients.items():
            w = weights[name]
            d = -g if self.maximize else g
            if self.decoupled:
                w = w * (1 - self.lr * self.weight_decay)
            else:
                d = d + self.weight_decay * w
            m, v, peak, t = self.moments.get(name, [0 * w, 0 * w, 0 * w, 0])
            t, m, v = t + 1, b1 * m + (1 - b1) * d, b2 * v + (1 - b2) * d * d
            peak = torch.maximum(peak, v)
            self.moments[name] = [m, v, peak, t]
            second = (peak if self.amsgrad else v) / (1 - b2**t)
            new[name] = w - self.lr * (m / (1 - b1**t)) / (second.sqrt() + self.eps)
        return new


def adamw(**options) -> Adam:
    """Return Adam with decoupled weight decay (torch's default of 0.01)."""
    return Adam(**{"weight_decay": 1e-2, "decoupled": True, **options})
