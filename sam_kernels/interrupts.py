"""Ctrl-C that waits until something is whole again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def deferred() -> Iterator[list[Any]]:
    """A ctrl-C inside waits until the block has ended; the list that is given has something in it then.

    Outside of the main thread nothing is done: signals come to that one only.

    Example:
        >>> import os
        >>> try:
        ...     with deferred() as came:
        ...         os.kill(os.getpid(), signal.SIGINT)
        ...         print("this is finished", len(came))
        ... except KeyboardInterrupt:
        ...     print("and then it is heard")
        this is finished 1
        and then it is heard
    """
    came: list[Any] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)
        if came and callable(before):
            before(*came[0])
