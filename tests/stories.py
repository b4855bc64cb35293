"""Named stories: a seed, options and faults, and the trace that they must give. `python tests/stories.py` writes them.

A story is read by people, so its trace is compared line by line; when behaviour is meant to change, the difference is
what a reviewer looks at.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from arc_dist.testing import faults
from arc_dist.testing.faults import Fault
from arc_dist.testing.job import Options
from arc_dist.testing.simulation import Result, simulate

DIRECTORY = Path(__file__).parent / "stories"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Story:
    title: str
    seed: int
    options: Options
    faults: tuple[Fault, ...]
    trace: tuple[str, ...] = ()

    def play(self) -> Result:
        return simulate(self.seed, self.options, faults=self.faults, keep_trace=True)


def read(path: Path) -> Story:
    head, _, trace = path.read_text().partition("\n\n")
    title, seed, options, *rest = head.splitlines()
    return Story(
        title=title.removeprefix("# "),
        seed=int(seed.removeprefix("seed ")),
        options=_options(options),
        faults=tuple(faults.parse(line) for line in rest),
        trace=tuple(trace.splitlines()),
    )


def text_of(story: Story, trace: tuple[str, ...]) -> str:
    default = Options()
    changed = [
        f" {field.name}={getattr(story.options, field.name)}"
        for field in dataclasses.fields(Options)
        if getattr(story.options, field.name) != getattr(default, field.name)
    ]
    head = [f"# {story.title}", f"seed {story.seed}", f"options{''.join(changed)}", *map(str, story.faults)]
    return "\n".join([*head, "", *trace]) + "\n"


def _options(line: str) -> Options:
    values = dict(word.split("=") for word in line.removeprefix("options").split())
    return Options(
        **{name: value == "True" if value in ("True", "False") else int(value) for name, value in values.items()}
    )


def main() -> None:
    for path in sorted(DIRECTORY.glob("*.txt")) if len(sys.argv) == 1 else map(Path, sys.argv[1:]):
        story = read(path)
        path.write_text(text_of(story, story.play().trace))


if __name__ == "__main__":
    main()
