"""Times, sizes and rates as people write them: `5y`, `90s`, `2TB`, `10GB/s`."""

from __future__ import annotations

import math
import re

from arc_dist.errors import ConfigError

DAY_S = 86400.0
YEAR_S = 365.25 * DAY_S
_TIMES = {"ms": 1e-3, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": DAY_S, "w": 7 * DAY_S, "y": YEAR_S}
_SIZES = {"": 1.0, "B": 1.0}
for _power, _letter in enumerate("KMGTP", start=1):
    _SIZES[f"{_letter}B"] = _SIZES[_letter] = 1000.0**_power
    _SIZES[f"{_letter}IB"] = 1024.0**_power
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)(/s)?")
_NEVER = ("never", "none", "inf")


def parse_time(text: str) -> float:
    """``"5y"`` -> seconds; "never" -> infinity.

    Raises:
        ConfigError: it is no positive number with ms, s, m, h, d, w or y.
    """
    if text.strip().lower() in _NEVER:
        return math.inf
    number, unit, per_second = _split(text)
    if number is None or per_second or unit.lower() not in _TIMES:
        raise ConfigError(f"{text!r} is not a time: give a number with ms, s, m, h, d, w or y, such as 90s or 5y.")
    return number * _TIMES[unit.lower()]


def parse_size(text: str) -> float:
    """``"2TB"`` -> bytes, ``"1GiB"`` -> 2**30. ConfigError when it is not a number of bytes."""
    number, unit, per_second = _split(text)
    if number is None or per_second or unit.upper() not in _SIZES:
        raise ConfigError(f"{text!r} is not a size: give a number with MB, GB, TB or MiB, GiB, TiB, such as 2TB.")
    return number * _SIZES[unit.upper()]


def parse_rate(text: str) -> float:
    """``"10GB/s"`` (or ``"10GB"``) -> bytes per second. ConfigError when it is not a rate."""
    number, unit, _ = _split(text)
    if number is None or unit.upper() not in _SIZES:
        raise ConfigError(f"{text!r} is not a rate: give bytes per second, such as 10GB/s.")
    return number * _SIZES[unit.upper()]


def _split(text: str) -> tuple[float | None, str, bool]:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None, "", False
    number = float(match.group(1))
    return (number if math.isfinite(number) else None), match.group(2), match.group(3) is not None


def format_time(seconds: float) -> str:
    """``5400`` -> ``"1.5 h"``, with two or three significant digits."""
    if math.isinf(seconds):
        return "never"
    for unit, upto in (("y", YEAR_S), ("d", 2 * DAY_S), ("h", 5400.0), ("min", 120.0)):
        if seconds >= upto:
            return f"{seconds / _TIMES[unit]:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 or seconds == 0 else f"{seconds * 1e3:.3g} ms"


def format_size(nbytes: float) -> str:
    """``2e12`` -> ``"2 TB"``, in powers of 1000 as storage is sold."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} PB"
