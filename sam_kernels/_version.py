"""The version, in its one place."""

__version__ = "0.1.0"

# SAMK_ABI_VERSION of csrc/sam_kernels.h
ABI_VERSION = 7
