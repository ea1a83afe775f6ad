"""The six places of a Recipe, one file each: frozen descriptions that touch no torch operator.

direction  along what        metric  measured how         mask     which weights
probe      gradients where   combine gradients into one   cadence  on which steps
"""

from .cadence import Cadence, Every, EveryStep
from .combine import Combine, Last
from .direction import Direction, Gradient
from .mask import ByModule, ByName, Dense, Dynamic, Given, Mask, Ranked, Sparse, TopScores
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
    "Dynamic",
    "Euclidean",
    "Every",
    "EveryStep",
    "Given",
    "Gradient",
    "Last",
    "LayerWise",
    "Mask",
    "Member",
    "Metric",
    "OneStep",
    "Probe",
    "Ranked",
    "Sparse",
    "TopScores",
]
