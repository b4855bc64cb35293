"""Two jobs on one run: the later start counts, and the earlier one hears of it instead of mixing its steps in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from arc_dist import Store
from arc_dist.checkpoint_store import owners
from arc_dist.errors import ConfigError, Fenced
from store_helpers import save
from toy import Toy, guarded


def taken_over(root, owner):
    store = Store(root, owner=owner)
    store.check_writable()
    store.take_over()
    return store


def test_the_later_start_commits_and_the_earlier_one_is_refused(tmp_path):
    first = taken_over(tmp_path, "first")
    save(first, 1)
    second = taken_over(tmp_path, "second")
    with pytest.raises(Fenced, match="taken over by another job"):
        save(first, 2)
    save(second, 2)
    assert [info.step for info in second.steps()] == [1, 2]
    assert second.manifest(2).owner == "second"


def test_an_owner_that_never_took_over_is_let_pass(tmp_path):
    taken_over(tmp_path, "first")
    save(Store(tmp_path, owner="by hand"), 1)
    assert [info.step for info in Store(tmp_path).steps()] == [1]


def test_of_many_that_start_at_once_one_is_the_owner(tmp_path):
    Store(tmp_path, owner="x").check_writable()
    names = [f"job-{i}" for i in range(12)]
    threads = [threading.Thread(target=taken_over, args=(tmp_path, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = []
    for step, name in enumerate(names):
        try:
            save(Store(tmp_path, owner=name), step + 1)
        except Fenced:
            refused.append(name)
    assert len(refused) == 11


def test_a_run_is_not_taken_away_from_a_job_that_lives_on_this_host(tmp_path):
    script = "import sys; sys.path[:0] = [sys.argv[2]]; from test_store_owners import taken_over\n"
    script += "taken_over(sys.argv[1], 'living'); print('ready', flush=True); sys.stdin.read()"
    tests = os.path.dirname(__file__)
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), tests], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(ConfigError, match=rf"process {other.pid}"):
            next(guarded(Toy(steps=2), store=str(tmp_path)).steps)
        other.stdin.close()
    assert len(list(guarded(Toy(steps=2), store=str(tmp_path)).steps)) == 2


def test_a_dead_process_that_nobody_has_waited_for_is_no_owner(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as other:
        living = owners._identity(other.pid)
        assert living
        other.kill()
        deadline = time.monotonic() + 10
        while owners._identity(other.pid) == living and time.monotonic() < deadline:
            time.sleep(0.01)
        assert owners._identity(other.pid) == ""


def test_a_process_number_that_was_used_again_is_not_taken_for_the_old_owner(tmp_path):
    taken_over(tmp_path, "old")
    (path,) = (tmp_path / "run").glob("owner-*.json")
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "pid": os.getppid(), "process": "pid:[1] 12345"}))
    taken_over(tmp_path, "new")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b"\xff\xfe", b'{"owner": 3}'])
def test_a_damaged_owner_file_neither_stops_nor_fences_anyone(tmp_path, content):
    first = taken_over(tmp_path, "first")
    (tmp_path / "run" / "owner-00000009.json").write_bytes(content)
    save(first, 1)
    second = taken_over(tmp_path, "second")
    save(second, 2)
    assert [info.step for info in second.steps()] == [1, 2]


def test_old_files_do_not_pile_up(tmp_path, monkeypatch):
    monkeypatch.setattr(owners, "_NUM_KEPT", 4)
    for i in range(20):
        taken_over(tmp_path, f"job-{i}")
    assert len(list((tmp_path / "run").glob("owner-*.json"))) == 5
