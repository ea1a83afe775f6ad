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

from ._version import ABI_VERSION

# What a watch has seen: Python has to look, all are elsewhere but as they were, or nothing has changed.
UNSURE, MOVED, SAME = 0, 1, 2


def watch(params: list[Tensor]) -> Any:
    """A watch over parameters of one device and dtype, or None where there is none.

    ``look(params)`` returns UNSURE, MOVED or SAME. ``gradients(params)`` returns every ``.grad`` and how many
    are there, or None if any has another dtype, device or layout than its parameter.
    """
    if _module is None:
        return None
    try:
        return _module.Watch(params)
    except ValueError:  # a tensor without memory
        return None


def has_items(entries: Mapping[Any, Any], keys: list[Any], values: list[Any]) -> bool:
    """Whether a mapping has these very keys and values, in this order.

    Example:
        >>> x, y = object(), object()
        >>> has_items({1: x}, [1], [x]), has_items({1: x}, [1], [y]), has_items({1: x}, [2], [x])
        (True, False, False)
    """
    if _module is not None and isinstance(entries, dict):
        return bool(_module.has_items(entries, keys, values))
    return are_same(list(entries.keys()), keys) and are_same(list(entries.values()), values)


def have(entries: list[dict[str, Any]], name: str, objects: list[Any]) -> bool:
    """Whether each entry has this very object under the name.

    Example:
        >>> x = object()
        >>> have([{"a": x}], "a", [x]), have([{"b": x}], "a", [x])
        (True, False)
    """
    if _module is not None:
        return bool(_module.have(entries, name, objects))
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
    """The compiled module, if it was made of these sources and torch lets tensors be viewed; 2.10 does."""
    try:
        module = import_module(f"{__package__}._native")
        if module.abi_version != ABI_VERSION:
            return None
        is_ready = module.set_exchange(getattr(Tensor, "__dlpack_c_exchange_api__", None))
    except (ImportError, AttributeError, TypeError, ValueError):  # no module, an old one, or another exchange
        return None
    return module if is_ready else None


_module = _load()
