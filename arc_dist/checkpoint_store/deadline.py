"""A call to storage that may hang, with a deadline: the caller gets an error, the hanging call keeps its own thread."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

from arc_dist.errors import StoreTransient

T = TypeVar("T")


def call_within(timeout_s: float | None, what: str, function: Callable[[threading.Event], T]) -> T:
    """Calls `function(gave_up)` and returns what it returns, or raises what it raises.

    A system call on a dead NFS server cannot be interrupted, so it runs in a thread of its own, which is left behind
    when the time is over. One rank that hangs in a write would else hold all ranks until the group's timeout.

    Args:
        timeout_s: seconds to wait; None waits for ever, in the calling thread.
        what: what is being done, for the message.
        function: gets an event that is set when nobody waits any more; what it does afterwards must have no effect
            that anyone would see.

    Raises:
        StoreTransient: it had not returned in time.
    """
    gave_up = threading.Event()
    if timeout_s is None:
        return function(gave_up)
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    def body() -> None:
        try:
            outcome.set_result(function(gave_up))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it goes to the caller
            outcome.set_exception(error)

    # A daemon: a call that never returns must not keep the process alive at its end.
    threading.Thread(target=body, name="arc-storage", daemon=True).start()
    try:
        return outcome.result(timeout_s)
    except concurrent.futures.TimeoutError:
        if outcome.done():  # the error is the function's own, or it ended in this very moment
            return outcome.result()
        gave_up.set()
        raise StoreTransient(
            f"{what}: storage did not answer within {timeout_s:g} s. Look at the mount or the network, or raise "
            "timeout_s (below the timeout of the process group) if it is only slow.",
            timeout_s=timeout_s,
        ) from None


__all__ = ["call_within"]
