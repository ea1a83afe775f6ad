"""Numbers that kernels and the host agree on: those of csrc/sam_kernels.h, and the lists of a plan."""

import triton.language as tl

from ...bitmask import WORD as _WORD
from ...tensor_groups import ADAPTIVE as _ADAPTIVE
from ...tensor_groups import COLUMNS as _COLUMNS
from ...tensor_groups import EUCLIDEAN as _EUCLIDEAN
from ...tensor_groups import FISHER as _FISHER
from ...tensor_groups import FIXED as _FIXED
from ...tensor_groups import Column
from . import plan

# enum samk_metric
FIXED = tl.constexpr(_FIXED)
EUCLIDEAN = tl.constexpr(_EUCLIDEAN)
ADAPTIVE = tl.constexpr(_ADAPTIVE)
FISHER = tl.constexpr(_FISHER)

# enum samk_moment, samk_shape, samk_rule
SQUARE, PEAK, POWER = map(tl.constexpr, range(3))
LINEAR, SIGN, POWERED = map(tl.constexpr, range(3))
RULE_SGD, RULE_ADAM = map(tl.constexpr, range(2))

# enum samk_column
COLUMNS = tl.constexpr(_COLUMNS)
COLUMN_METRIC = tl.constexpr(int(Column.METRIC))
COLUMN_ETA = tl.constexpr(int(Column.ETA))
COLUMN_RHO = tl.constexpr(int(Column.RHO))
COLUMN_EPS = tl.constexpr(int(Column.EPS))
COLUMN_LR = tl.constexpr(int(Column.LR))
COLUMN_WEIGHT_DECAY = tl.constexpr(int(Column.WEIGHT_DECAY))
COLUMN_MAXIMIZE = tl.constexpr(int(Column.MAXIMIZE))
COLUMN_MOMENTUM = tl.constexpr(int(Column.MOMENTUM))
COLUMN_DAMPENING = tl.constexpr(int(Column.DAMPENING))
COLUMN_NESTEROV = tl.constexpr(int(Column.NESTEROV))
COLUMN_BETA1 = tl.constexpr(int(Column.BETA1))
COLUMN_BETA2 = tl.constexpr(int(Column.BETA2))
COLUMN_ADAM_EPS = tl.constexpr(int(Column.ADAM_EPS))
COLUMN_DECOUPLED = tl.constexpr(int(Column.DECOUPLED))

# The lists of a plan, and the columns of its chunks.
PARAMS = tl.constexpr(int(plan.List.PARAMS))
GRADS = tl.constexpr(int(plan.List.GRADS))
SNAPSHOTS = tl.constexpr(int(plan.List.SNAPSHOTS))
LISTS = tl.constexpr(int(plan.List.LISTS))
OUTS = tl.constexpr(int(plan.List.OUTS))
STEPS = tl.constexpr(int(plan.List.STEPS))
FRESH = tl.constexpr(int(plan.List.FRESH))
MASKS = tl.constexpr(int(plan.List.MASKS))
WITHIN = tl.constexpr(int(plan.List.WITHIN))
NUMBERS = tl.constexpr(int(plan.List.NUMBERS))
POSITIONS = tl.constexpr(int(plan.List.POSITIONS))
CHUNK_COLUMNS = tl.constexpr(plan.CHUNK_COLUMNS)

# Elements that share a word of a mask.
WORD = tl.constexpr(_WORD)
