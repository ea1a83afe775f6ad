"""How sharp a minimum is: ascents, averages, curvature, gaps and pictures of the loss around the weights.

    ascent, average, curvature, gap, landscape -> objective, estimate
    report -> all of them

Every function takes ``(model, loss_fn, loader)``, evaluates in evaluation mode, and leaves weights, buffers,
gradients, modes and random states as they were, also when interrupted.
"""

from .estimate import Estimate
from .objective import Objective

__all__ = ["Estimate", "Objective"]
