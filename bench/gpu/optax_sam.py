"""optax.contrib.sam under jit with donated buffers: the optimizer phase alone, its gradients given.

Facts about its interface are from the package: google-deepmind/optax, optax/contrib/_sam.py. jax and optax
are imported when a peer is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cases import RHO, Base, Workspace
from ..peers import Unavailable

Look = Callable[[list[Tensor]], None]

# What jax calls the platforms of torch's devices.
_PLATFORMS = {"cuda": "gpu"}


class OptaxSam:
    """A SAM step of optax with arrays of its own.

    Opaque, one call to `update` does both halves and asks a function for the second gradients. Transparent,
    the default, each call does the work of both halves and keeps one.

    Args:
        workspace: whose weights are copied; its gradients are the only ones.
        base: the base optimizer.
        opaque: the mode.

    Raises:
        Unavailable: if jax or optax is missing, or jax does not serve the workspace's device.
    """

    def __init__(self, workspace: Workspace, base: Base, where: torch.device, *, opaque: bool) -> None:
        try:
            import jax
            import optax
            from optax import contrib
        except ImportError as error:
            raise Unavailable(f"jax with optax is not installed ({error})") from error
        platform = _PLATFORMS.get(where.type, where.type)
        try:
            device = jax.devices(platform)[0]
        except RuntimeError as error:
            raise Unavailable(f"jax serves no {platform} here: {error}") from error
        self.jax, self.optax, self.opaque = jax, optax, opaque
        ascent = optax.chain(contrib.normalize(), optax.sgd(RHO))
        self.optimizer = contrib.sam(_base(optax, base), ascent, opaque_mode=opaque)
        self.weights = self._arrays(workspace.initial)
        self.gradients = {id(grads): self._arrays(grads) for grads in (workspace.first, workspace.second)}
        # A copy of each leaf: the cache of weights starts as the weights, which cannot be donated twice.
        # On a device of its own choice, a leaf would have the program compiled again in the second step.
        self.state = jax.device_put(jax.tree.map(jax.numpy.copy, self.optimizer.init(self.weights)), device)
        self.perturbed = jax.tree.map(jax.numpy.copy, self.weights) if opaque else None
        self.steps = jax.jit(self._steps, static_argnums=3, donate_argnums=0, keep_unused=True)
        self.half = jax.jit(self._half, donate_argnums=0)
        self.wait()

    def _arrays(self, tensors: list[Tensor]) -> list[Any]:
        """Copies, which are jax's own to donate."""
        borrowed = [self.jax.dlpack.from_dlpack(x.detach()) for x in tensors]
        made = [self.jax.numpy.array(x, copy=True) for x in borrowed]
        return self.jax.block_until_ready(made)

    # ---- inside the program ------------------------------------------------------------------------

    def _half(self, carry: Any, grads: Any) -> Any:
        """One call to `update` in transparent mode."""
        weights, state = carry
        updates, state = self.optimizer.update(grads, state, weights)
        return self.optax.apply_updates(weights, updates), state

    def _whole(self, carry: Any, first: Any, second: Any) -> Any:
        """A SAM step.

        Barriers stand where a model would: the second gradients are there only after the perturbed weights
        are, which are written out, and no step knows the norm of the one before.
        """
        barrier = self.jax.lax.optimization_barrier
        carry, first = barrier((carry, first))
        if not self.opaque:
            carry, second = barrier((self._half(carry, first), second))
            return self._half(carry, second)
        weights, state, _ = carry
        written = []

        def gradients(perturbed: Any, _: int) -> Any:
            perturbed, grads = barrier((perturbed, second))
            written.append(perturbed)
            return grads

        updates, state = self.optimizer.update(first, state, weights, grad_fn=gradients)
        return self.optax.apply_updates(weights, updates), state, written[0]

    def _steps(self, carry: Any, first: Any, second: Any, times: int) -> Any:
        if times == 1:
            return self._whole(carry, first, second)
        return self.jax.lax.fori_loop(0, times, lambda _, c: self._whole(c, first, second), carry)

    # ---- from outside ------------------------------------------------------------------------------

    def step(self, first: list[Tensor], second: list[Tensor], look: Look | None = None) -> None:
        """A step as a program takes it: one call of an opaque update, two of a transparent one.

        Args:
            first, second: the workspace's lists of gradients, of which there are copies here.
            look: is shown the perturbed weights.
        """
        grads = self.gradients[id(first)], self.gradients[id(second)]
        if self.opaque:
            self.weights, self.state, self.perturbed = self.steps(
                (self.weights, self.state, self.perturbed), *grads, 1
            )
        else:
            self.weights, self.state = self.half((self.weights, self.state), grads[0])
        if look is not None:
            look(_tensors(self.perturbed if self.opaque else self.weights))
        if not self.opaque:
            self.weights, self.state = self.half((self.weights, self.state), grads[1])

    def several(self, first: list[Tensor], second: list[Tensor], times: int) -> None:
        """Steps inside one program, where the host has no part in them."""
        extra = (self.perturbed,) if self.opaque else ()
        grads = self.gradients[id(first)], self.gradients[id(second)]
        self.weights, self.state, *rest = self.steps((self.weights, self.state, *extra), *grads, times)
        if rest:
            self.perturbed = rest[0]

    def tensors(self) -> list[Tensor]:
        """The weights, seen by torch."""
        return _tensors(self.weights)

    def wait(self) -> None:
        self.jax.block_until_ready((self.weights, self.state))


def _tensors(arrays: Any) -> list[Tensor]:
    return [torch.from_dlpack(x.block_until_ready()) for x in arrays]


def _base(optax: Any, base: Base) -> Any:
    options = base.options
    if base.name == "adamw":
        return optax.adamw(options["lr"], weight_decay=options["weight_decay"])
    decay = optax.add_decayed_weights(options["weight_decay"])
    return optax.chain(decay, optax.sgd(options["lr"], momentum=options["momentum"]))
