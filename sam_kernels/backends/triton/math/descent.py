"""The base optimizers' element updates, in torch.optim's order of operations."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..codes import (
    COLUMN_ADAM_EPS,
    COLUMN_BETA1,
    COLUMN_BETA2,
    COLUMN_DAMPENING,
    COLUMN_DECOUPLED,
    COLUMN_LR,
    COLUMN_MAXIMIZE,
    COLUMN_MOMENTUM,
    COLUMN_NESTEROV,
    COLUMN_WEIGHT_DECAY,
    RULE_SGD,
)
from ..rounding import divide, square_root
from .power import power


class Decayed(NamedTuple):
    """g' = +-g + weight_decay * w; without decay the weight has no part, since 0 * w is NaN for some w."""

    sign: tl.tensor
    weight_decay: tl.tensor


class Sgd(NamedTuple):
    """buffer' = momentum * buffer + (1 - dampening) * g'; along g' + momentum * buffer' or buffer'."""

    neg_lr: tl.tensor
    momentum: tl.tensor
    kept: tl.tensor
    nesterov_momentum: tl.tensor
    gradient_share: tl.tensor


class Adam(NamedTuple):
    """m' = m + (1 - beta1)(g' - m);  v' = beta2 v + (1 - beta2) g'^2;
    w' = keep * w - step_size * m' / (sqrt(v') / sqrt(1 - beta2^t) + eps)"""

    one_minus_beta1: tl.tensor
    beta2: tl.tensor
    one_minus_beta2: tl.tensor
    neg_step_size: tl.tensor
    sqrt_correction2: tl.tensor
    eps: tl.tensor
    keep: tl.tensor


@triton.jit
def apply_decayed(self, g, w=None):
    if w is None:
        return self.sign * g
    else:
        return tl.fma(self.weight_decay, w, self.sign * g)


@triton.jit
def sgd_buffer(self, old, g):
    return tl.fma(self.kept, g, self.momentum * old)


@triton.jit
def sgd_weight(self, w, g, buf=None):
    # nesterov: gradient_share 1, nesterov_momentum m; plain momentum: 0 and 1.
    if buf is None:
        return tl.fma(self.neg_lr, g, w)
    else:
        return tl.fma(self.neg_lr, tl.fma(self.nesterov_momentum, buf, self.gradient_share * g), w)


@triton.jit
def adam_first_moment(self, m, g):
    return tl.fma(self.one_minus_beta1, g - m, m)


@triton.jit
def adam_second_moment(self, v, g):
    return tl.fma(self.one_minus_beta2 * g, g, self.beta2 * v)


@triton.jit
def adam_weight(self, w, m, v):
    denominator = divide(square_root(v), self.sqrt_correction2) + self.eps
    return tl.fma(self.neg_step_size, divide(m, denominator), self.keep * w)


# The scalars of one row; note: [table of scalars] in csrc/sam_kernels.h. Powers and quotients are taken in
# double and rounded once.


@triton.jit
def decayed(row, rule: tl.constexpr, inv_scale, S: tl.constexpr):
    sign = tl.where(tl.load(row + COLUMN_MAXIMIZE) != 0, -inv_scale, inv_scale)
    decay = tl.load(row + COLUMN_WEIGHT_DECAY)
    if rule != RULE_SGD:
        decay = tl.where(tl.load(row + COLUMN_DECOUPLED) == 0, decay, 0.0)
    return Decayed(sign=sign.to(S), weight_decay=decay.to(S))


@triton.jit
def sgd(row, S: tl.constexpr):
    momentum = tl.load(row + COLUMN_MOMENTUM)
    nesterov = tl.load(row + COLUMN_NESTEROV) != 0
    return Sgd(
        neg_lr=(-tl.load(row + COLUMN_LR)).to(S),
        momentum=momentum.to(S),
        kept=(1 - tl.load(row + COLUMN_DAMPENING)).to(S),
        nesterov_momentum=tl.where(nesterov, momentum, 1.0).to(S),
        gradient_share=tl.where(nesterov, 1.0, 0.0).to(S),
    )


@triton.jit
def adam(row, step, S: tl.constexpr):
    # step: the number of this step, counted from 1.
    beta1, beta2 = tl.load(row + COLUMN_BETA1), tl.load(row + COLUMN_BETA2)
    lr = tl.load(row + COLUMN_LR)
    decoupled = tl.load(row + COLUMN_DECOUPLED) != 0
    kept = 1 - lr * tl.load(row + COLUMN_WEIGHT_DECAY)
    return Adam(
        one_minus_beta1=(1 - beta1).to(S),
        beta2=beta2.to(S),
        one_minus_beta2=(1 - beta2).to(S),
        neg_step_size=(-lr / (1 - power(beta1, step))).to(S),
        sqrt_correction2=tl.sqrt(1 - power(beta2, step)).to(S),
        eps=tl.load(row + COLUMN_ADAM_EPS).to(S),
        keep=tl.where(decoupled, kept, 1.0).to(S),
    )
