"""Progress bars that do not outlive an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from tqdm import tqdm

_OPEN: WeakSet[Bar] = WeakSet()


class Bar(tqdm):  # type: ignore[misc]
    """A bar that asks for the time left when it is drawn: ``{left}`` in its ``bar_format``.

    Args:
        left: returns the time left, as it is shown.
        **settings: tqdm's.
    """

    def __init__(self, left: Callable[[], str], **settings: Any) -> None:
        self._left = left
        super().__init__(**settings)
        _OPEN.add(self)

    @property
    def format_dict(self) -> dict[str, Any]:
        """What ``bar_format`` may name."""
        return {**super().format_dict, "left": self._left()}


def close_bars() -> None:
    """Close every bar that is still open, for example because an error has ended its run."""
    for bar in list(_OPEN):
        bar.close()
