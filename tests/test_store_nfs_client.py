"""What the store makes of an NFS client's habits, as a local disk can show it; test_real_nfs.py has the real ones."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from arc_dist.checkpoint_store.backends import LocalBackend, nfs_client
from arc_dist.errors import StoreError, StoreGone, StoreTransient


def test_a_local_disk_is_no_nfs(tmp_path: Path):
    assert not nfs_client.is_nfs(tmp_path)
    assert not nfs_client.is_nfs(tmp_path / "not there")


def test_removed_files_that_are_still_open_are_not_listed_and_hold_up_no_removal(tmp_path: Path):
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / ".nfs0001").touch()
    backend = LocalBackend(tmp_path)
    assert backend.list("step") == []
    backend.remove_directory("step")
    assert not (tmp_path / "step").exists()


def test_a_directory_with_an_open_one_stays_and_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / ".nfs0001").touch()
    refused: list[str] = []

    def unlink(path: Path) -> None:  # as the client answers; a local disk never does
        refused.append(str(path))
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "unlink", unlink)
    LocalBackend(tmp_path).remove_directory("step")
    assert refused == [str(tmp_path / "step" / ".nfs0001")]
    assert (tmp_path / "step").is_dir()


def test_a_directory_with_anything_else_stays_and_is_an_error(tmp_path: Path):
    (tmp_path / "step").mkdir()
    names = [".nfs0001", "rank-00000.json"]
    for name in names:
        (tmp_path / "step" / name).touch()
    with pytest.raises(StoreError):
        LocalBackend(tmp_path).remove_directory("step")
    assert sorted(os.listdir(tmp_path / "step")) == names


def test_on_nfs_a_name_that_is_not_there_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "run" / "step").mkdir(parents=True)
    backend = LocalBackend(tmp_path)
    opened: list[str] = []
    real = os.open

    def spy(path: Path, flags: int) -> int:
        opened.append(os.path.relpath(path, tmp_path))
        return real(path, flags)

    monkeypatch.setattr(os, "open", spy)
    assert not backend.exists("run/step/manifest.json")
    assert opened == [], "a local disk forgets nothing and remembers nothing"
    monkeypatch.setattr(nfs_client, "is_nfs", lambda path: True)
    assert not backend.exists("run/step/manifest.json")
    assert opened == [".", "run", "run/step"]
    opened.clear()
    assert not backend.exists("none/step/manifest.json")
    assert opened == [".", "none"]
    opened.clear()
    assert backend.exists("run/step")
    assert opened == []
    assert not LocalBackend(tmp_path / "root").exists("")


@pytest.mark.parametrize(("code", "error"), [(errno.ESTALE, StoreGone), (errno.EIO, StoreTransient)])
def test_a_server_that_cannot_be_asked_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[StoreError]
):
    monkeypatch.setattr(nfs_client, "is_nfs", lambda path: True)

    def failing(path: Path, flags: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(error) as caught:
        LocalBackend(tmp_path).exists("manifest.json")
    assert caught.value.fields["errno"] == code
