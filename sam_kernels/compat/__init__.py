"""Drop-in classes: the names, argument order and closure rule of SAM packages people already use.

    from sam_kernels.compat.davda54 import SAM
    from sam_kernels.compat.pytorch_optimizer import SAM

In both, ``step(closure)`` follows the caller's own backward and calls the closure once, at the
perturbed weights. `sam_kernels.SAM` calls its closure for every pass, the first one included; code
written for one rule runs under the other, and does a pass too many or trains something else. That is
why there are classes and not a flag.
"""
