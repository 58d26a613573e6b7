"""Sizes and times as people write them: `150kB` is 150 000 bytes, `150KiB` is 153 600; `15min` is 900 s."""

from __future__ import annotations

import re
from fractions import Fraction

from octoc.errors import UsageError

# SI prefixes are powers of 1000 and IEC prefixes powers of 1024 (IEC 80000-13); the letters' case is free.
_UNITS = {
    "": 1,
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "kib": 1024,
    "mib": 1024**2,
    "gib": 1024**3,
}
_SIZE = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?|\.[0-9]{1,15})\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)

_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_TIME = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(s|min|h)\s*", re.IGNORECASE | re.ASCII)


def parse_seconds(text: str) -> float:
    """Seconds of a written time: a number and s, min or h.

    Raises:
        UsageError: not a time, or none at all.
    """
    match = _TIME.fullmatch(text)
    seconds = float(match[1]) * _SECONDS[match[2].lower()] if match else 0.0
    if not seconds:
        raise UsageError(f"{text!r} is not a time; write a number and s, min or h, such as 15min")
    return seconds


def parse_size(text: str) -> int:
    """Bytes of a written size, a fraction of a byte dropped.

    Args:
        text: a number and a unit: B, kB, MB, GB (powers of 1000), KiB, MiB, GiB (powers of 1024); bytes without one.

    Raises:
        UsageError: not a size, or less than one byte.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(f"{text!r} is not a size; write a number and B, kB, MB, GB, KiB, MiB or GiB, such as 150kB")
    size = int(Fraction(match[1]) * _UNITS[match[2].lower()])
    if size < 1:
        raise UsageError(f"{text!r} is less than one byte; a file needs more, such as 150kB")
    return size


def format_size(size: int) -> str:
    """A size in bytes with three significant digits and a unit that is a power of 1000, as `parse_size` reads."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    if unit == "B" or abs(value) >= 99.95:
        return f"{value:.0f} {unit}"
    return f"{value:.1f} {unit}" if abs(value) >= 9.995 else f"{value:.2f} {unit}"
