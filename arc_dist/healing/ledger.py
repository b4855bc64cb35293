"""What healing has learned, beside a rank's snapshots: it must not be forgotten with the state that it rolled back.

A restart goes on from a snapshot that may be older than the newest fault. Its own account of the ladder knows nothing
of that fault, so a run that fails and dies in turn would begin at the lowest rung for ever, with the batches that were
left out given again. So after each action the account is written into the rank's directory in shared memory, which
outlives the process; the next one takes the latest account of any rank.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from arc_dist.telemetry.log import logger

_NAME = "healing.json"


class Ledger:
    """One rank's copy of the account.

    Args:
        directory: in shared memory; None keeps none.
    """

    def __init__(self, directory: Path | None) -> None:
        self.path = None if directory is None else directory / _NAME

    def write(self, account: dict[str, Any]) -> None:
        """Replaces the account; a process that dies meanwhile leaves the old one."""
        if self.path is None:
            return
        fresh = self.path.with_suffix(".new")
        try:
            fresh.write_text(json.dumps(account), encoding="utf-8")
            os.replace(fresh, self.path)
        except OSError as error:
            logger.warning("what healing has learned would be lost with this process: %s", error)

    def read(self) -> dict[str, Any] | None:
        """The account that an earlier process left, or None."""
        if self.path is None:
            return None
        try:
            account = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read, healing begins anew: %s", self.path, error)
            return None
        return account if isinstance(account, dict) else None
