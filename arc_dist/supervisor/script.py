"""Runs the user's script in the trainer exactly as `python train.py` or `python -m train` would.

`runpy.run_path` is not used: it puts the old ``__main__`` back before atexit handlers and pickling in threads are
through, and leaves its own frames in tracebacks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import runpy
import sys
import traceback
import types
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any, NoReturn, cast

from arc_dist.config import Env
from arc_dist.errors import ArcError, ConfigError
from arc_dist.protocol import budgets
from arc_dist.snapshot import layout

_MAX_TRACEBACK_CHARS = 64 * 1024
_MAX_MESSAGE_CHARS = 4096
_OUR_DIRECTORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_RUNPY_FILES = ("<frozen runpy>", runpy.__file__)

_first_main: list[types.ModuleType] = []  # keeps the launcher's module alive while its frames are on the stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What to run: a script, a directory or zip file with a ``__main__.py``, or a module (`-m`)."""

    name: str
    args: tuple[str, ...] = ()
    is_module: bool = False

    def check(self) -> None:
        """Raises ConfigError when there is nothing to run, before any process is started."""
        if self.is_module:
            if importlib.util.find_spec(self.name.partition(".")[0]) is None:
                raise ConfigError(f"there is no module named {self.name!r}; check -m and PYTHONPATH", module=self.name)
            return
        path = Path(self.name)
        where = f"{self.name} (in {os.getcwd()})" if not path.is_absolute() else self.name
        if not path.exists():
            raise ConfigError(f"the script {where} does not exist; check the path", path=self.name)
        if path.is_dir() and not (path / "__main__.py").exists():
            raise ConfigError(f"{where} is a directory without __main__.py; name a script", path=self.name)
        if not os.access(path, os.R_OK):
            raise ConfigError(f"the script {where} cannot be read; check its permissions", path=self.name)


def run(target: Target) -> NoReturn:
    """Runs `target` as ``__main__`` and lets the interpreter end as it would have without us.

    SystemExit passes through untouched. Any other exception is noted in `exception.json`, loses our frames, and
    passes through too, so that the interpreter prints it with the hook that the script may have set.
    """
    run_call(lambda: _execute(target))


def run_call(call: Callable[[], None]) -> NoReturn:
    """Makes a call that ends the process, as `run` does."""
    try:
        call()
    except SystemExit:
        raise
    except BaseException as error:
        error.__traceback__ = _without_our_frames(error.__traceback__)
        note(error)
        if isinstance(error, ArcError):
            sys.excepthook(type(error), error, error.__traceback__)
            raise SystemExit(int(error.exit_code)) from None
        _strip_on_display(error)
        raise
    raise SystemExit(0)


def _execute(target: Target) -> None:
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = sys.modules["builtins"]
    if sys.version_info < (3, 14):
        main.__dict__["__annotations__"] = {}
    _first_main.append(sys.modules["__main__"])
    sys.modules["__main__"] = main
    sys.argv = [target.name, *target.args]
    _set_orig_argv(target)
    if target.is_module:
        runpy._run_module_as_main(target.name)  # type: ignore[attr-defined]  # what CPython calls for -m
        return
    path = os.path.abspath(target.name)
    if not _is_plain_file(path):
        _set_path_entry(path)
        runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]  # what CPython calls for a zip
        return
    _set_path_entry(os.path.dirname(os.path.realpath(path)))
    main.__dict__.update(
        __file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path), __spec__=None, __package__=None
    )
    exec(_compile(path), main.__dict__)


def _compile(path: str) -> CodeType:
    with open(path, "rb") as file:
        source = file.read()
    return compile(source, path, "exec", dont_inherit=True)


def _is_plain_file(path: str) -> bool:
    """False for what the import system can enter: a directory or a zip file."""
    if os.path.isdir(path):
        return False
    importer: Any = None
    with contextlib.suppress(ImportError):
        for hook in sys.path_hooks:
            with contextlib.suppress(ImportError):
                importer = hook(path)
                break
    return importer is None


def _set_path_entry(entry: str) -> None:
    """`python -m arc_dist` put the working directory first; a script's own directory belongs there."""
    if getattr(sys.flags, "safe_path", False) or sys.flags.isolated:
        return
    if sys.path and sys.path[0] in ("", os.getcwd()):
        sys.path[0] = entry
    else:
        sys.path.insert(0, entry)


def _set_orig_argv(target: Target) -> None:
    """Tools that start the program again read `sys.orig_argv`; ours would start a supervisor inside a trainer."""
    with contextlib.suppress(ValueError):
        index = sys.orig_argv.index("-m")
        head = [*sys.orig_argv[:index], *(["-m"] if target.is_module else [])]
        sys.orig_argv = [*head, target.name, *target.args]


def _without_our_frames(trace: TracebackType | None) -> TracebackType | None:
    """Drops everything up to the last of our frames at the outer end; runpy's own belong to a `-m` script."""
    kept = trace
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file.startswith(_OUR_DIRECTORY):
            kept = trace.tb_next
        elif file not in _RUNPY_FILES:
            break
        trace = trace.tb_next
    return kept


def _strip_on_display(error: BaseException) -> None:
    """The way up to the interpreter adds our frames again; take them off at the last moment."""
    hook = sys.excepthook

    def display(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        sys.excepthook = hook
        if value is error:
            trace = _without_our_frames(trace)
            value.__traceback__ = trace
        hook(kind, value, trace)

    sys.excepthook = display


def note(error: BaseException) -> None:
    """Leaves what happened where the supervisor finds it. Best effort: the traceback itself is printed anyway."""
    env = Env.read()
    directory = env.shm_dir
    if directory is None or isinstance(error, KeyboardInterrupt):
        return
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    batch = _batch_of(error)
    error = telling(error)
    kind = type(error)
    home = "" if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}."
    try:
        layout.write_exception(
            directory,
            {
                "type": home + kind.__qualname__,
                "message": str(error)[:_MAX_MESSAGE_CHARS],
                "step": _last_step(directory),
                "traceback": text[-_MAX_TRACEBACK_CHARS:],
                "frame": _innermost_frame(error),
                "batch": batch,
                "generation": env.generation,
                "rank": env.rank,
            },
        )
    except OSError as problem:
        sys.stderr.write(f"[arc] could not note the exception for the supervisor in {directory}: {problem}\n")


def telling(error: BaseException) -> BaseException:
    """The exception of a chain that tells whose fault it was: the outermost, or the one that it all began with.

    A script may wrap the loss of a peer into an error of its own, and the loss of a peer may be what its clean-up
    meets after its own error. Either way the beginning tells whether this rank failed first.
    """
    first = error
    seen = {id(first)}
    while True:
        before = first.__cause__ or (None if first.__suppress_context__ else first.__context__)
        if before is None or id(before) in seen:
            break
        first = before
        seen.add(id(first))
    outer, inner = (budgets.is_echo_of(type(one).__name__, str(one)) for one in (error, first))
    return first if outer != inner and not isinstance(error, ArcError) else error


def _innermost_frame(error: BaseException) -> str:
    """The line that raised it, as ``file:line in function``."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""


def _batch_of(error: BaseException) -> dict[str, Any] | None:
    """Where in the data it happened: left there by the loop (`data.place`); the script may have wrapped it since."""
    one: BaseException | None = error
    seen: set[int] = set()
    while one is not None and id(one) not in seen:
        if isinstance(batch := getattr(one, "arc_batch", None), dict):
            return cast("dict[str, Any]", batch)
        seen.add(id(one))
        one = one.__cause__ or one.__context__
    return None


def _last_step(directory: Path) -> int | None:
    """The last committed step, or None for a script that does not count steps."""
    try:
        status = layout.StatusPage.open(directory).read()
    except OSError:
        return None
    return status.step if status.pid == os.getpid() else None  # else the supervisor set the page up, and no more
