"""moto's S3 server on 127.0.0.1, with one thing mended: of racing requests with If-None-Match, one wins.

``python moto_main.py PORT``. moto looks whether a name is free and takes it in two steps, between which another of its
threads may take it too; a service does both in one. So requests with a condition are answered one at a time.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def one_condition_at_a_time(application: Application) -> Application:
    conditional = threading.Lock()

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with conditional if "HTTP_IF_NONE_MATCH" in environ else contextlib.nullcontext():
            return application(environ, start_response)

    return answer


if __name__ == "__main__":
    application = DomainDispatcherApplication(create_backend_app)
    run_simple(
        "127.0.0.1",
        int(sys.argv[1]),
        one_condition_at_a_time(application),  # type: ignore[arg-type]
        threaded=True,
        request_handler=MotoRequestHandler,
    )
