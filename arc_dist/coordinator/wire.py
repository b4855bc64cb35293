"""Reads the fields of a message. Unknown fields are left alone, so that newer senders can be understood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from arc_dist.errors import ConfigError

MAX_TEXT = 65_536
MAX_INTEGER = 2**63 - 1  # what the journal's readers, status pages and other languages can hold
MAX_POLL_S = 60.0


class Fields:
    """The fields of one message, with checks.

    Args:
        method: named in errors.
        body: what was received.

    Every reader raises `ConfigError` when the field is missing or is something else.
    """

    def __init__(self, method: str, body: Mapping[str, Any]) -> None:
        self._method = method
        self._body = body

    def integer(self, name: str, *, minimum: int = 0, default: int | None = None) -> int:
        """A whole number of at least `minimum`. A missing field has the value `default`, if there is one."""
        value = self._body.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= MAX_INTEGER:
            raise self._wrong(name, f"a whole number of at least {minimum} that fits 64 bits")
        return value

    def integer_or_none(self, name: str) -> int | None:
        return None if self._body.get(name) is None else self.integer(name)

    def number(self, name: str, *, default: float, maximum: float) -> float:
        """Seconds from 0 to `maximum`; larger ones are cut."""
        value = self._body.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise self._wrong(name, "a number of seconds")
        return maximum if value >= maximum else float(value)

    def number_or_none(self, name: str, *, maximum: float) -> float | None:
        return None if self._body.get(name) is None else self.number(name, default=0.0, maximum=maximum)

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self._body.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def text(self, name: str, *, default: str | None = None) -> str:
        value = self._body.get(name, default)
        if not isinstance(value, str) or len(value) > MAX_TEXT:
            raise self._wrong(name, "a text")
        return value

    def others(self) -> dict[str, Any]:
        """All fields, less those that every message may carry."""
        return {name: value for name, value in self._body.items() if name not in ("epoch", "sender")}

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self._body.get(name)
        if not isinstance(value, Mapping):
            raise self._wrong(name, "an object")
        return cast("Mapping[str, Any]", value)

    def mapping_or_none(self, name: str) -> Mapping[str, Any] | None:
        return None if self._body.get(name) is None else self.mapping(name)

    def mappings(self, name: str, *, max_items: int) -> list[Mapping[str, Any]]:
        """A list of objects; a missing one is empty."""
        value = self._body.get(name)
        if value is None:
            return []
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            raise self._wrong(name, "a list of objects")
        items = cast("Sequence[object]", value)
        if len(items) > max_items:
            raise self._wrong(name, f"a list of at most {max_items} objects")
        if not all(isinstance(item, Mapping) for item in items):
            raise self._wrong(name, "a list of objects")
        return [cast("Mapping[str, Any]", item) for item in items]

    def _wrong(self, name: str, wanted: str) -> ConfigError:
        shown = _short(self._body.get(name))
        return ConfigError(f"{self._method}: the field {name!r} must be {wanted}, got {shown}", field=name)


def _short(value: object) -> str:
    try:
        return repr(value)[:80]
    except (ValueError, RecursionError):  # an integer of thousands of digits, or nested as deep as JSON may be
        return f"a {type(value).__name__} that is too large to show"
