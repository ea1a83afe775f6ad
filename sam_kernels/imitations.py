"""Wrappers that derive from the class of what they wrap, as Lightning's do.

note: [imitations]
``self.optimizers()`` in a LightningModule is of a class made of Lightning's wrapper and of the optimizer's
own, so that it passes for one, and has the optimizer in ``_optimizer``. Its ``step`` goes there. The
methods it inherits would run on the wrapper, which reads the attributes of the optimizer but writes its
own: `first_step` would be pending where nobody looks. So they are handed on as well.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

_WRAPPER = "LightningOptimizer"


def hand_on(cls: type, root: type) -> None:
    """Let the public methods of an imitation be those of what it wraps; see note [imitations].

    Args:
        cls: a class derived from root; nothing is done where it is no imitation.
        root: the class whose methods are handed on, but for those that the wrapper has itself.
    """
    wrappers = [base for base in cls.__mro__ if base.__name__ == _WRAPPER]
    if not wrappers:
        return
    for name in dir(root):
        method = getattr(root, name)
        if inspect.isfunction(method) and not name.startswith("_") and not hasattr(wrappers[0], name):
            setattr(cls, name, _handed_on(method, name))


def _handed_on(method: Any, name: str) -> Any:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._optimizer, name)(*args, **kwargs)

    return call
