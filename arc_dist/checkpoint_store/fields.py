"""Typed access to JSON that may come from anywhere: every refusal names the place and what was found there."""

from __future__ import annotations

import re
from typing import Any, cast

from arc_dist.checkpoint_store.format import MAX_DIMS
from arc_dist.errors import StoreCorrupt

REMEDY = "Restore an older step, or this one from a copy."
_HEX = re.compile(r"[0-9a-f]{32,128}")
MAX_INT = 1 << 62


class Fields:
    """Typed access to the fields of a JSON object; each refusal names the place."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.fields = fields
        self.where = where

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.fields.get(key, default)
        if type(value) is not int or not 0 <= value < MAX_INT:
            raise self.wrong(key, value)
        return value

    def text(self, key: str) -> str:
        value = self.fields.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, value)
        return value

    def digest(self, key: str) -> str:
        value = self.text(key)
        if not _HEX.fullmatch(value):
            raise self.wrong(key, value)
        return value

    def dims(self, key: str) -> tuple[int, ...]:
        value = self.fields.get(key)
        items = cast("list[Any]", value) if isinstance(value, list) else None
        if items is None or len(items) > MAX_DIMS or not all(type(n) is int and 0 <= n < MAX_INT for n in items):
            raise self.wrong(key, cast("object", value))
        return tuple(cast("list[int]", items))

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.fields.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, value)
        return cast("dict[str, Any]", value)

    def rows(self, key: str) -> list[Fields]:
        value = self.fields.get(key)
        if not isinstance(value, list):
            raise self.wrong(key, value)
        return [self.inner(row, f"{key}[{i}]") for i, row in enumerate(cast("list[Any]", value))]

    def inner(self, value: object, name: str) -> Fields:
        if not isinstance(value, dict):
            raise self.wrong(name, value)
        return Fields(cast("dict[str, Any]", value), f"{self.where}: {name}")

    def wrong(self, key: str, value: object) -> StoreCorrupt:
        return StoreCorrupt(f"{self.where}: {key} is {str(value)[:100]!r}, which cannot be. {REMEDY}", file=self.where)


def fields_of(value: object, where: str) -> Fields:
    """Typed access to a JSON object from outside."""
    return Fields({}, where).inner(value, "content")
