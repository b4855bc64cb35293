"""What the documents say is what the code does: tables, links, commands and names are compared with it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from arc_dist import errors
from arc_dist.errors import ArcError, ExitCode
from arc_dist.settings import Settings
from ranks import run_job, run_supervised, torchrun

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/*.md", "docker/*.md", "examples/**/*.md") for path in ROOT.glob(pattern)
)


def table(document: str, first_column: str) -> list[list[str]]:
    """The rows of the table whose header begins with `first_column`."""
    lines = (ROOT / document).read_text().splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |")]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def test_every_exit_code_is_documented():
    rows = table("docs/exit-codes.md", "code")
    assert {(int(code), name) for code, name, *_ in rows} == {(int(code), code.name) for code in ExitCode}
    retried = {name for _, name, again, _ in rows if again == "yes"}
    assert retried == {"PREEMPTED", "INFRASTRUCTURE"}


def test_every_error_is_documented_with_its_exit_code():
    classes = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, ArcError) and value is not ArcError
    ]
    expected = {(c.__name__, int(c.exit_code), "yes" if c.retryable else "no") for c in classes}
    assert {(name, int(code), again) for name, code, again, _ in table("docs/exit-codes.md", "error")} == expected


def test_the_tree_in_the_docstring_names_every_error():
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, ArcError):
            assert re.search(rf"^\W*{name}\b", errors.__doc__ or "", re.MULTILINE), name


def test_every_environment_variable_is_documented_and_no_other():
    read = set(re.findall(r'"(ARC_[A-Z_]+)"', (ROOT / "arc_dist/config.py").read_text()))
    text = (ROOT / "docs/configuration.md").read_text()
    assert set(re.findall(r"`(ARC_[A-Z_]+)`", text)) == read


def test_one_place_reads_the_environment():
    """Settings reach the rest as values. What torchrun sets may be read where processes are started."""
    offenders = []
    for path in (ROOT / "arc_dist").rglob("*.py"):
        text = path.read_text()
        reads = re.findall(r"""environ(?:\.get\(|\[)\s*["'](ARC_[A-Z_]+)["']\]?(?!\]?\s*=)""", text)
        if path.name != "config.py" and reads:
            offenders.append((str(path.relative_to(ROOT)), reads))
    assert not offenders


def test_every_setting_is_documented_with_its_default():
    def default(field: dataclasses.Field[object]) -> str:
        return f"`{field.default_factory()}`" if field.default is dataclasses.MISSING else str(field.default)  # type: ignore[misc]

    documented = {row[0].strip("`"): row[1] for row in table("docs/configuration.md", "setting")}
    assert documented.keys() == {field.name for field in dataclasses.fields(Settings)}
    for field in dataclasses.fields(Settings):
        if field.name != "policy":
            assert documented[field.name] == default(field), field.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_are_python(document: Path):
    for block in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_named_in_code_marks_exist(document: Path):
    names = re.findall(r"`([\w./-]+\.(?:py|md|toml|yaml))`", document.read_text())
    for name in names:
        places = [ROOT / name, ROOT / "arc_dist" / name, document.parent / name]
        assert any(place.exists() for place in places), f"{document.name} names {name}"


def test_make_targets_named_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        assert set(re.findall(r"\bmake ([a-z]+)\b", document.read_text())) <= targets | {"them"}, document


def test_the_fifteen_lines_of_the_readme_are_at_most_fifteen():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(block.strip().splitlines()) <= 15 + 1  # one blank line


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_fifteen_lines_train_and_go_on_where_they_were(tmp_path: Path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "train.py").write_text(block)
    first = run_job(torchrun(2, "-m", "arc_dist", "train.py"), cwd=tmp_path, timeout_s=100)
    assert first.exit_code == 0, first
    assert re.findall(r"^(\d+) ", first.stdout, re.MULTILINE) == [str(n) for n in range(100, 1001, 100)]
    (tmp_path / "train.py").write_text(block.replace("(loss_fn, data)", "(loss_fn, data, epochs=2)"))
    second = run_supervised(2, "train.py", cwd=tmp_path, timeout_s=100)
    assert second.exit_code == 0, second
    assert re.findall(r"^(\d+) ", second.stdout, re.MULTILINE) == [str(n) for n in range(1100, 2001, 100)]
