"""Formulas per element, mirroring csrc/math name by name."""
