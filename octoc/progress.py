"""How long work tells how far it is. The pipeline knows only this; the command line draws it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol


class Progress(Protocol):
    """Somebody who watches."""

    def start(self, what: str, total: int | None) -> None:
        """A stage begins; `total` is its number of steps, None where nobody knows."""

    def advance(self, steps: int = 1) -> None:
        """Some steps of the current stage are done."""

    def finish(self) -> None:
        """The current stage is over."""


class Silent:
    """Nobody watches."""

    def start(self, what: str, total: int | None) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def finish(self) -> None: ...


@dataclass
class Clock:
    """Seconds by stage, told to a progress.

    Args:
        progress: who watches.
        seconds: by stage; the same stage adds up.
    """

    progress: Progress = field(default_factory=Silent)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, key: str, what: str, total: int | None = None) -> Iterator[None]:
        """Times what happens inside under `key`."""
        start = time.perf_counter()
        self.progress.start(what, total)
        try:
            yield
        finally:
            self.progress.finish()
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start
