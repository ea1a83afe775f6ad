"""The six places of a Recipe, one file each: frozen descriptions that touch no torch operator.

direction  along what        metric  measured how         mask     which weights
probe      gradients where   combine gradients into one   cadence  on which steps
"""

from .cadence import Cadence, Every, EveryStep
from .combine import Combine, Last
from .direction import Direction, Gradient
from .mask import ByModule, ByName, Dense, Mask
from .member import Member
from .metric import Adaptive, Euclidean, LayerWise, Metric
from .probe import OneStep, Probe

__all__ = [
    "Adaptive",
    "ByModule",
    "ByName",
    "Cadence",
    "Combine",
    "Dense",
    "Direction",
    "Euclidean",
    "Every",
    "EveryStep",
    "Gradient",
    "Last",
    "LayerWise",
    "Mask",
    "Member",
    "Metric",
    "OneStep",
    "Probe",
]
