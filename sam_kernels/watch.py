"""What every step asks of its lists of tensors, in C++ where the compiled module is there.

A step looks at each parameter, gradient and state tensor, for any of them may be another one, or elsewhere,
than in the step before. For hundreds of tensors that is most of the time of the host; see csrc/tensors.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from operator import is_
from types import ModuleType
from typing import Any

from torch import Tensor

# What a watch has seen: Python has to look, all are elsewhere but as they were, or nothing has changed.
UNSURE, MOVED, SAME = 0, 1, 2


def watch(params: list[Tensor]) -> Any:
    """A watch over parameters of one device and dtype, or None where there is none.

    ``look()`` returns UNSURE, MOVED or SAME. ``gradients()`` returns every ``.grad`` and how many are there,
    or None if any has another dtype, device or layout than its parameter.
    """
    if _module is None:
        return None
    try:
        return _module.Watch(params)
    except ValueError:  # a tensor without memory
        return None


def has_values(entries: Mapping[Any, Any], values: list[Any]) -> bool:
    """Whether the values of a mapping are these very objects, in this order.

    Example:
        >>> x = object()
        >>> has_values({1: x}, [x]), has_values({1: x}, [object()])
        (True, False)
    """
    if _module is not None and isinstance(entries, dict):
        return bool(_module.has_values(entries, values))
    return are_same(list(entries.values()), values)


def hold(entries: list[dict[str, Any]], name: str, objects: list[Any]) -> bool:
    """Whether each entry has this very object under the name.

    Example:
        >>> x = object()
        >>> hold([{"a": x}], "a", [x]), hold([{"b": x}], "a", [x])
        (True, False)
    """
    if _module is not None:
        return bool(_module.hold(entries, name, objects))
    try:
        return are_same([entry[name] for entry in entries], objects)
    except KeyError:
        return False


def are_same(xs: list[Any], ys: list[Any]) -> bool:
    """Whether two lists have the very same objects: tensors overload ==.

    Example:
        >>> x, y = object(), object()
        >>> are_same([x, y], [x, y]), are_same([x, y], [y, x]), are_same([x], [x, y])
        (True, False, False)
    """
    if _module is not None and isinstance(xs, list):
        return bool(_module.are_same(xs, ys))
    return len(xs) == len(ys) and all(map(is_, xs, ys))


def _load() -> ModuleType | None:
    """The compiled module, if it is of this version and torch lets tensors be viewed; torch 2.10 does."""
    try:
        module = import_module(f"{__package__}._native")
    except ImportError:  # the native backend says why
        return None
    set_exchange = getattr(module, "set_exchange", None)
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return module if set_exchange is not None and set_exchange(exchange) else None


_module = _load()
