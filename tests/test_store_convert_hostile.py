"""Foreign pickles at import: none runs, whatever it holds, and what would need one is refused by its name."""

from __future__ import annotations

import io
import os
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from arc_dist.checkpoint_store.convert import import_checkpoint
from arc_dist.checkpoint_store.dcp_pickle import read_dcp_metadata
from arc_dist.errors import ConfigError, StoreCorrupt
from test_store_convert import read_back, same

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning:torch")


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


def test_a_hostile_metadata_does_not_execute(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    attack = pickle.dumps(Trap(canary))
    pickle.loads(attack)
    assert canary.exists(), "the attack must work on a plain unpickler, or this test proves nothing"
    canary.unlink()
    source = tmp_path / "step-1"
    dcp.save({"x": torch.ones(2)}, checkpoint_id=source, no_dist=True)
    (source / ".metadata").write_bytes(attack)
    with pytest.raises(ConfigError, match=r"names (posix|nt)\.system, which DCP's own metadata never does"):
        import_checkpoint(source, tmp_path / "store")
    assert not canary.exists()
    assert not (tmp_path / "store").exists()


HOSTILE = {
    "builtins.eval": b"cbuiltins\neval\n(V1+1\ntR.",
    "builtins.getattr": b"cbuiltins\ngetattr\n.",
    "torch.load": b"ctorch\nload\n(Vx\ntR.",
    "torch.Size.__class__": b"\x80\x04\x8c\x05torch\x8c\x0eSize.__class__\x93.",
    "a module's import": b"ctorch.distributed.checkpoint.metadata\ntorch\n.",
    "a dotted name": b"\x80\x04\x8c%torch.distributed.checkpoint.metadata\x8c\tos.system\x93.",
    "torch.serialization.load": b"ctorch.serialization\nload\n.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_beyond_the_list_is_looked_up(name: str) -> None:
    with pytest.raises(ConfigError, match="never does"):
        read_dcp_metadata(HOSTILE[name], "m")


def classic_metadata(directory: Path) -> bytes:
    dcp.save({"x": torch.ones(2), "n": 3}, checkpoint_id=directory, no_dist=True)
    return (directory / ".metadata").read_bytes()


def test_a_pickle_cannot_change_the_classes_it_names(tmp_path: Path) -> None:
    """BUILD with a state of slots sets attributes of what is on the stack, which may be a class."""
    attack = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N(dV__init__\nVspoiled\nstb."
    spoiled = pickle.loads(b"ctest_store_convert_hostile\nTrap\n(N(dVspoiled\nVyes\nstb.")
    assert spoiled.spoiled == "yes", "the attack must work on a plain unpickler"
    del Trap.spoiled  # type: ignore[attr-defined]
    before = Metadata.__init__
    with pytest.raises(StoreCorrupt):
        read_dcp_metadata(attack, "m")
    assert Metadata.__init__ is before
    assert read_dcp_metadata(classic_metadata(tmp_path / "d"), "m").tensors  # and the next file is read as ever


def test_damaged_metadata_is_an_error_of_ours_or_other_plain_data(tmp_path: Path) -> None:
    data = classic_metadata(tmp_path / "d")
    read_dcp_metadata(data, "m")
    for position in range(len(data)):
        with pytest.raises((StoreCorrupt, ConfigError)):
            read_dcp_metadata(data[:position], "m")
        altered = data[:position] + bytes([data[position] ^ 0x41]) + data[position + 1 :]
        try:  # a flip may make another name or number, which then fits to no file; nothing but our errors may come
            read_dcp_metadata(altered, "m")
        except (StoreCorrupt, ConfigError):
            pass


@pytest.mark.parametrize(
    "data",
    [
        b"Nr\xff\xff\xff\x3f.",
        b"\x80\x05\x96\x00\x00\x00\x00\x04\x00\x00\x00.",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f.",
    ],
    ids=["memo index", "bytearray", "bytes"],
)
def test_a_few_bytes_cannot_ask_for_much_memory(data: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(StoreCorrupt):
        read_dcp_metadata(data, "m")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_a_persistent_id_is_refused() -> None:
    with pytest.raises(StoreCorrupt):
        read_dcp_metadata(b"Pfile\n.", "m")


@pytest.mark.parametrize("relative_path", ["../secret", "/etc/passwd", "a/b", "..", ""])
def test_metadata_cannot_lead_out_of_its_directory(tmp_path: Path, relative_path: str) -> None:
    metadata: Metadata = pickle.loads(classic_metadata(tmp_path / "d"))
    for info in metadata.storage_data.values():
        info.relative_path = relative_path
    with pytest.raises(StoreCorrupt, match="no name of a file"):
        read_dcp_metadata(pickle.dumps(metadata), "m")


def test_compressed_parts_are_refused(tmp_path: Path) -> None:
    metadata: Metadata = pickle.loads(classic_metadata(tmp_path / "d"))
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["zstd"]
    with pytest.raises(ConfigError, match="stream transforms"):
        read_dcp_metadata(pickle.dumps(metadata), "m")


@pytest.mark.parametrize("kind", ["file", "dcp"])
def test_objects_that_need_unpickling_are_refused(tmp_path: Path, kind: str) -> None:
    canary = tmp_path / "canary"
    state = {"x": torch.ones(2), "bad": Trap(canary), "n": 3}
    source = tmp_path / "5"
    if kind == "file":
        torch.save(state, source)
    else:
        dcp.save(state, checkpoint_id=source, no_dist=True)
    with pytest.raises(ConfigError, match="arbitrary unpickling") as info:
        import_checkpoint(source, tmp_path / "store")
    assert "save it again" in str(info.value)
    assert not canary.exists()
    assert not (tmp_path / "store").exists()
    if kind == "dcp":
        assert "--skip bad" in str(info.value)
        assert import_checkpoint(source, tmp_path / "store", skip=["bad"]).skipped == ("bad",)
        assert same({"x": torch.ones(2), "n": 3}, read_back(tmp_path / "store"))
        assert not canary.exists()


def test_a_buffer_as_older_torchtitan_kept_its_losses_can_be_skipped(tmp_path: Path) -> None:
    state = {"x": torch.ones(2), "train_state": {"step": torch.tensor(5), "losses": io.BytesIO(b"..")}}
    dcp.save(state, checkpoint_id=tmp_path / "5", no_dist=True)
    with pytest.raises(ConfigError, match=r"--skip train_state\.losses"):
        import_checkpoint(tmp_path / "5", tmp_path / "store")
    import_checkpoint(tmp_path / "5", tmp_path / "store", skip=["train_state.losses"])
    assert read_back(tmp_path / "store")["train_state"].keys() == {"step"}
