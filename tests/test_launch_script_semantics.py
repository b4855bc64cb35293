"""What a script can see of being run by `python -m arc_dist` must be what it sees under `python`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import arc_dist
from ranks import JobResult, run_job

# Scripts run in other directories, where the package must be found too.
ENVIRON = {"PYTHONPATH": str(Path(arc_dist.__path__[0]).parent)}
SCRIPTS = Path(__file__).parent / "scripts"
SUPERVISED = [sys.executable, "-m", "arc_dist", "--no-preload", "--no-guard"]


def plain(*args: str, cwd: Path | None = None) -> JobResult:
    return run_job([sys.executable, *args], cwd=cwd, env=ENVIRON)


def supervised(*args: str, cwd: Path | None = None) -> JobResult:
    return run_job([*SUPERVISED, *args], cwd=cwd, env=ENVIRON)


def without_our_log(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("[arc"))


def assert_same(ours: JobResult, theirs: JobResult) -> None:
    assert ours.exit_code == theirs.exit_code, str(ours)
    assert ours.stdout == theirs.stdout
    assert without_our_log(ours.stderr) == without_our_log(theirs.stderr)


@pytest.mark.parametrize("mode", ["code", "message", "none", "hard", "nothing"])
def test_exit_codes_output_and_atexit_are_those_of_plain_python(mode: str) -> None:
    script = str(SCRIPTS / "semantics.py")
    assert_same(supervised(script, mode, "--flag"), plain(script, mode, "--flag"))


@pytest.mark.parametrize("mode", ["exception", "hook"])
def test_an_uncaught_exception_shows_the_script_alone(mode: str) -> None:
    script = str(SCRIPTS / "semantics.py")
    ours = supervised(script, mode)
    assert_same(ours, plain(script, mode))
    assert "arc_dist" not in without_our_log(ours.stderr)


def test_a_relative_path_and_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "link.py").symlink_to(SCRIPTS / "semantics.py")
    ours, theirs = supervised("link.py", "none", cwd=tmp_path), plain("link.py", "none", cwd=tmp_path)
    assert_same(ours, theirs)
    assert str(SCRIPTS) in ours.stdout  # sys.path[0] follows the link, __file__ does not


def test_a_syntax_error(tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text("def f(:\n")
    assert_same(supervised(str(script)), plain(str(script)))


def test_a_module(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "job.py").write_text(
        "import sys\n"
        "print(__name__, __package__, __spec__.name, sys.argv, sys.path[0])\n"
        "raise ValueError('in a module')\n"
    )
    assert_same(supervised("-m", "package.job", "x", cwd=tmp_path), plain("-m", "package.job", "x", cwd=tmp_path))


def test_a_directory(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "helper.py").write_text("value = 7\n")
    (tmp_path / "app" / "__main__.py").write_text("import sys, helper\nprint(helper.value, sys.argv, sys.path[0])\n")
    assert_same(supervised("app", "x", cwd=tmp_path), plain("app", "x", cwd=tmp_path))


def test_start_methods_of_multiprocessing() -> None:
    result = supervised(str(SCRIPTS / "children.py"))
    assert result.exit_code == 0, str(result)
    assert result.stdout == "spawn [1, 4, 9]\nforkserver [1, 4, 9]\nfork [1, 4, 9]\n"


def test_standard_input_is_the_scripts() -> None:
    script = str(SCRIPTS / "semantics.py")
    done = subprocess.run([*SUPERVISED, script, "input"], input="a line\n", capture_output=True, text=True, timeout=60)
    assert "read: a line" in done.stdout
    assert done.returncode == 0


def test_output_that_was_not_flushed_is_written_once(tmp_path: Path) -> None:
    script = tmp_path / "buffered.py"
    script.write_text("import sys\nsys.stdout.write('once')\n")
    assert supervised(str(script)).stdout == "once"


def test_every_generation_has_fresh_random_state(tmp_path: Path) -> None:
    log = tmp_path / "log"
    result = run_job([sys.executable, "-m", "arc_dist", "--no-guard", str(SCRIPTS / "randomness.py"), str(log)])
    assert result.exit_code == 0, str(result)
    first, second = log.read_text().splitlines()
    for one, other in zip(first.split(), second.split(), strict=True):
        assert one != other


def test_a_script_that_does_not_exist() -> None:
    result = supervised("no/such/train.py")
    assert result.exit_code == 78
    assert re.fullmatch(r"\[arc\] ConfigError: the script no/such/train.py .*does not exist.*\n", result.stderr)


def test_a_module_that_does_not_exist() -> None:
    result = supervised("-m", "no_such_module")
    assert result.exit_code == 78
    assert "no module named 'no_such_module'" in result.stderr


def test_a_wrong_option_is_a_configuration_error() -> None:
    result = run_job([sys.executable, "-m", "arc_dist", "--no-such-option", "x.py"])
    assert result.exit_code == 78
    assert "--no-such-option" in result.stderr


def test_help_tells_the_exit_codes() -> None:
    result = run_job([sys.executable, "-m", "arc_dist", "--help"])
    assert result.exit_code == 0
    assert "75 preempted" in result.stdout
    assert "--store" in result.stdout
