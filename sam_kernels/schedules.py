"""Schedules of the radius; any function ``step -> rho`` is one, and this is one that follows another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .policies.checks import check_number


@dataclass(frozen=True)
class ProportionalToLr:
    """A radius that falls with the learning rate, from rho_max at lr_max to rho_min at lr_min: GSAM's.

    ``rho = rho_min + (rho_max - rho_min) (lr - lr_min) / (lr_max - lr_min)``, by the lr of each param group;
    below lr_min, as in a warm-up from 0, it stays rho_min, and above lr_max it stays rho_max.

    Args:
        rho_max, rho_min: radii, at least 0 (0.6 and 0.1 in google-research/big_vision for ViT-B/32).
        lr_max, lr_min: learning rates of the schedule; where they are equal, the radius is rho_max.

    Raises:
        ValueError: if a number is negative or not finite, or lr_min is above lr_max.

    Example:
        >>> ProportionalToLr(rho_max=0.5, rho_min=0.0, lr_max=0.1, lr_min=0.0).at(0.05)
        0.25

    Source: Zhuang et al., ICLR 2022, arXiv 2203.08065.
    """

    rho_max: float
    rho_min: float
    lr_max: float
    lr_min: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rho_max", "rho_min", "lr_max", "lr_min"):
            check_number(self, name, getattr(self, name), least=0)
        if self.lr_min > self.lr_max:
            raise ValueError(
                f"ProportionalToLr: lr_min is {self.lr_min} and lr_max {self.lr_max}; expected lr_min to "
                "be at most lr_max"
            )

    def at(self, lr: Any) -> Any:
        """The radius at a learning rate, a number or a tensor; the radius is then likewise."""
        if self.lr_max == self.lr_min:
            return float(self.rho_max)
        if isinstance(lr, Tensor):
            part = ((lr - self.lr_min) / (self.lr_max - self.lr_min)).clamp(0.0, 1.0)
            return self.rho_min + (self.rho_max - self.rho_min) * part
        share = min(max((float(lr) - self.lr_min) / (self.lr_max - self.lr_min), 0.0), 1.0)
        return self.rho_min + (self.rho_max - self.rho_min) * share
