"""What every backend must do, as cases that run on any storage: the contract of `backends.base.Backend`.

Run it on storage of your own before you trust a job to it::

    python -m arc_dist.checkpoint_store.contract s3://bucket/some/prefix

It writes below ``contract-<random>`` at that place, removes what it wrote, prints one line per case, and exits with 1
when a promise is broken. In tests::

    for case in contract.cases():
        case.run(backend)

A case passes, raises `ContractBroken`, or raises `Unsupported` where the storage says that it cannot do what is asked.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import uuid
from collections.abc import Callable, Sequence

from arc_dist.checkpoint_store.backends import Backend, Unsupported, open_backend
from arc_dist.checkpoint_store.contract_cases import CASES, Room
from arc_dist.checkpoint_store.contract_races import RACES
from arc_dist.checkpoint_store.contract_support import ContractBroken
from arc_dist.errors import ArcError

__all__ = ["Case", "ContractBroken", "cases", "main"]


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One promise of the contract.

    Attributes:
        name: of the case.
        promise: what it proves, in words.
        needs: the capabilities without which there is nothing to prove.
    """

    name: str
    promise: str
    needs: tuple[str, ...]
    body: Callable[[Room], None]

    def run(self, backend: Backend) -> None:
        """Proves the promise in a directory of its own, which is removed afterwards.

        Raises:
            ContractBroken: the promise does not hold.
            Unsupported: the backend does not declare what the case needs, or says so when asked.
            ArcError: the storage failed (denied, gone, full, transient).
        """
        missing = [name for name in self.needs if not getattr(backend.capabilities, name)]
        if missing:
            raise Unsupported(f"{backend.url}: does not promise {', '.join(missing)}")
        room = Room(backend, f"contract-{uuid.uuid4().hex[:12]}")
        try:
            self.body(room)
        finally:
            room.clear()


def cases() -> tuple[Case, ...]:
    """All cases, in the order in which a broken one explains those behind it."""
    return tuple(Case(body.__name__, _sentence(body), needs, body) for needs, body in sorted_by_need([*CASES, *RACES]))


def sorted_by_need(
    found: Sequence[tuple[tuple[str, ...], Callable[[Room], None]]],
) -> list[tuple[tuple[str, ...], Callable[[Room], None]]]:
    """Cases that need nothing first; otherwise in the order in which they were written."""
    return sorted(found, key=lambda item: len(item[0]))


def _sentence(body: Callable[[Room], None]) -> str:
    return (body.__doc__ or "").strip().splitlines()[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all cases on the storage at a URL; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m arc_dist.checkpoint_store.contract",
        description="Checks that a storage keeps the promises that checkpoints need.",
    )
    parser.add_argument("url", help="a directory, s3://bucket/prefix, or another URL that fsspec knows")
    parser.add_argument("--case", action="append", default=[], help="only this case (may be repeated)")
    options = parser.parse_args(arguments)
    known = {case.name for case in cases()}
    if unknown := sorted(set(options.case) - known):
        parser.error(f"no such case: {', '.join(unknown)}. There are: {', '.join(sorted(known))}")
    broken = 0
    try:
        backend = open_backend(options.url)
        with contextlib.suppress(Unsupported):  # said again, and counted, by the cases
            backend.prepare()
    except ArcError as error:
        _say(f"FAILED       {error}")
        return 1
    for case in cases():
        if options.case and case.name not in options.case:
            continue
        try:
            case.run(backend)
        except Unsupported as error:
            _say(f"unsupported  {case.name}: {error.message}")
        except ArcError as error:
            broken += 1
            _say(f"FAILED       {case.name}: {case.promise} {type(error).__name__}: {error.message}")
        else:
            _say(f"ok           {case.name}: {case.promise}")
    _say(f"{broken} of the promises are broken. Do not keep checkpoints there." if broken else "All promises hold.")
    return 1 if broken else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
