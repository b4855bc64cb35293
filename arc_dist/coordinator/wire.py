"""Reads the fields of a message. Unknown fields are left alone, so that newer senders can be understood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from arc_dist.errors import ConfigError

MAX_TEXT = 65_536
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
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._wrong(name, f"a whole number of at least {minimum}")
        return value

    def integer_or_none(self, name: str) -> int | None:
        return None if self._body.get(name) is None else self.integer(name)

    def number(self, name: str, *, default: float, maximum: float) -> float:
        """Seconds from 0 to `maximum`; larger ones are cut."""
        value = self._body.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise self._wrong(name, "a number of seconds")
        return min(float(value), maximum)

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
        shown = repr(self._body.get(name))[:80]
        return ConfigError(f"{self._method}: the field {name!r} must be {wanted}, got {shown}", field=name)
