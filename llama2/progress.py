"""Owns progress bars on a terminal: tqdm's where it is installed, and none where it is not.

Knows nothing of what is in progress.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class Bar(Protocol):
    """Walks through its items, or is told how much is done."""

    def __iter__(self) -> Iterator[Any]: ...

    def __enter__(self) -> Bar: ...

    def __exit__(self, *exception: Any) -> None: ...

    def update(self, amount: float = 1) -> Any: ...

    def set_postfix_str(self, text: str) -> Any: ...


def progress(items: Iterable[Any] | None = None, **settings: Any) -> Bar:
    """A bar over `items`, or one of `total` that `update` moves; `settings` are tqdm's."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar(items or ())
    bar: Bar = tqdm(items, **settings)
    return bar


def log_above_bars() -> AbstractContextManager[None]:
    """While it is open, what goes to the log on a terminal is written above the bars, and not behind them."""
    try:
        from tqdm.contrib.logging import logging_redirect_tqdm
    except ImportError:
        return nullcontext()
    return logging_redirect_tqdm()


class _NoBar:
    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def update(self, amount: float = 1) -> None:
        pass

    def set_postfix_str(self, text: str) -> None:
        pass
