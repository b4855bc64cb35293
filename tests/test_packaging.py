"""What is built and installed: exactly one package, typed, with its two commands, whatever else lies in the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    pytest.importorskip("setuptools")
    tree = tmp_path_factory.mktemp("tree") / "arc-dist"
    # A copy, because setuptools leaves its working files beside the sources; the links are copied as links.
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(REPOSITORY, tree, symlinks=True, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_installs_exactly_arc_dist(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"arc_dist"}
    assert len(tops) == 2


def test_the_wheel_holds_every_module_the_page_and_the_type_marker(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "arc_dist").rglob("*.py")}
    assert sources <= names
    assert "arc_dist/py.typed" in names
    assert "arc_dist/coordinator/page.html" in names


def test_every_directory_of_modules_is_a_package():
    for directory in {path.parent for path in (REPOSITORY / "arc_dist").rglob("*.py")}:
        assert (directory / "__init__.py").exists(), f"{directory} has modules but no __init__.py"


def test_the_version_is_the_packages(wheel: Path):
    import arc_dist

    assert wheel.name.startswith(f"arc_dist-{arc_dist.__version__}-")


def test_the_wheel_carries_licence_and_commands(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    lines = archive.read(entry_points).decode().split()
    assert "".join(lines) == "[console_scripts]arc=arc_dist.cli:mainarcrun=arc_dist.launch.arcrun:main"


def test_the_commands_exist():
    from arc_dist.cli import main as arc
    from arc_dist.launch.arcrun import main as arcrun

    assert callable(arc)
    assert callable(arcrun)


def test_the_installed_wheel_imports_from_anywhere(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # Names that a user may well have beside train.py; they must not be taken for ours.
    for name in ("coordinator", "checkpoint_store", "config", "protocol"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module was imported')")
    code = "import arc_dist.coordinator, arc_dist.checkpoint_store, arc_dist; print(arc_dist.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).parent == site / "arc_dist"


@pytest.mark.parametrize("name", ["coordinator", "checkpoint_store"])
def test_the_links_at_the_top_point_into_the_package(name: str):
    link = REPOSITORY / name
    assert link.is_symlink()
    assert os.readlink(link) == f"arc_dist/{name}"
    assert link.is_dir()
