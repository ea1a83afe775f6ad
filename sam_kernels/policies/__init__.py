"""The six places of a Recipe, one file each: frozen descriptions that touch no torch operator.

direction  along what        metric  measured how         mask     which weights
probe      gradients where   combine gradients into one   cadence  on which steps
"""

from .cadence import Cadence, Every, EveryStep, NormGate, WithProbability
from .combine import (
    AdaptiveRatio,
    Anticipate,
    Combine,
    Curvature,
    Decoupled,
    Last,
    Mix,
    ReuseOrthogonal,
    SurrogateGap,
)
from .direction import Direction, Ema, Friendly, Gradient, Momentum, Noise, Remembering
from .mask import Bernoulli, ByModule, ByName, Dense, Dynamic, Given, Mask, Ranked, Sparse, TopScores
from .member import Member
from .metric import Adaptive, Euclidean, Fisher, LayerWise, Metric
from .probe import Anticipated, Lookbehind, Mirrored, MultiStep, OneStep, Probe, RandomStart

__all__ = [
    "Adaptive",
    "AdaptiveRatio",
    "Anticipate",
    "Anticipated",
    "Bernoulli",
    "ByModule",
    "ByName",
    "Cadence",
    "Combine",
    "Curvature",
    "Decoupled",
    "Dense",
    "Direction",
    "Dynamic",
    "Ema",
    "Euclidean",
    "Every",
    "EveryStep",
    "Fisher",
    "Friendly",
    "Given",
    "Gradient",
    "Last",
    "LayerWise",
    "Lookbehind",
    "Mask",
    "Member",
    "Metric",
    "Mirrored",
    "Mix",
    "Momentum",
    "MultiStep",
    "Noise",
    "NormGate",
    "OneStep",
    "Probe",
    "RandomStart",
    "Ranked",
    "Remembering",
    "ReuseOrthogonal",
    "Sparse",
    "SurrogateGap",
    "TopScores",
    "WithProbability",
]
