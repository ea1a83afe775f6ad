"""Independent re-derivations, straight from the papers, in plain torch float64.

Nothing here imports the package under test. Weights and gradients are dictionaries from parameter name to
tensor; a gradient that is missing from the dictionary is a parameter that takes no part in the step.
"""
