"""How sharp a minimum is: ascents, averages, curvature, gaps and pictures of the loss around the weights.

    ascent, average, gap -> search, moves -> ball     how far the loss rises
    curvature -> spectrum -> hessian                  how it is curved
    landscape -> directions, drawing                  how it looks
    report -> all of them, bar
    all of them -> objective, estimate, vectors, checks

Every function takes ``(model, loss_fn, loader)``, evaluates in evaluation mode, and leaves weights, buffers,
gradients, modes and random states as they were, also when interrupted.
"""

from .ascent import m_sharpness, one_step, projected_ascent, worst_case
from .average import average_case, random_direction
from .curvature import Spectrum, along_gradient, eigenvalues, hessian_vector_product, trace
from .estimate import Estimate
from .gap import Gap, generalization_gap
from .landscape import Landscape, compare, line, plane
from .objective import Objective
from .report import Report, report

__all__ = [
    "Estimate",
    "Gap",
    "Landscape",
    "Objective",
    "Report",
    "Spectrum",
    "along_gradient",
    "average_case",
    "compare",
    "eigenvalues",
    "generalization_gap",
    "hessian_vector_product",
    "line",
    "m_sharpness",
    "one_step",
    "plane",
    "projected_ascent",
    "random_direction",
    "report",
    "trace",
    "worst_case",
]
