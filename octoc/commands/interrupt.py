"""Ctrl-C and SIGTERM: both end the work, and it is remembered that they came, because libraries swallow exceptions."""

from __future__ import annotations

import signal
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []


def listen() -> None:
    """From now on either signal raises KeyboardInterrupt, except where the parent wants it ignored, as nohup does."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def ignore() -> None:
    """From now on neither does anything."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def received() -> bool:
    """Whether one came while we listened."""
    return bool(_received)


def _stop(number: int, _: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt
