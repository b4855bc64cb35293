"""The memory of one rank's snapshots: how much it needs, in which form it is held, and the ring that is made of it."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from arc_dist.config import Env
from arc_dist.healing.vote import Voter
from arc_dist.settings import Settings
from arc_dist.snapshot import layout
from arc_dist.snapshot.form import (
    MEMORY_FILE_SYSTEMS,
    Form,
    Room,
    choose_form,
    file_system_type,
    measure_room,
)
from arc_dist.snapshot.replicas import replica_key
from arc_dist.snapshot.ring import SnapshotRing
from arc_dist.snapshot.state import TrainingState
from arc_dist.snapshot.tensors import local
from arc_dist.telemetry.log import logger

_SLOTS_WITH_PEERS = 3
_UNBORN_STATE = 2  # times a parameter's bytes: what Adam will keep of it, which is the most of the common optimizers


def open_ring(state: TrainingState, settings: Settings, voter: Voter, env: Env, *, slots: int) -> SnapshotRing:
    """The ring in the form that the settings name. With "auto" every rank must call this, and it blocks.

    Args:
        state: what is held.
        settings: the form, for one.
        voter: to choose the same form everywhere.
        env: where this rank's memory is.
        slots: number of snapshots that may be held at once.
    """
    if env.has_peers and not all(spec.replicated for spec in state.tensors()[0]):
        # While copies of the newest snapshot are on their way, the one before is what all ranks have in common.
        slots = max(slots, _SLOTS_WITH_PEERS)
    form = Form(settings.snapshot_form)
    if form is Form.AUTO:
        root = env.shm_dir if env.shm_dir is not None else env.shm_root
        room = measure_room(root, expected_bytes(state), slots, bytes_in_memory(env.shm_dir))
        form, reason = choose_form([Room(**theirs) for theirs in voter.gather(dataclasses.asdict(room), step=0)])
        if voter.rank == 0:
            logger.info("snapshots are held in the form %r: %s", form.value, reason)
    if form is Form.BF16 and voter.rank == 0:
        logger.warning(
            "snapshots hold weights rounded to bfloat16: a rollback, and every checkpoint, has them with a relative "
            "error of up to 2**-8. Optimizer state and buffers are exact. snapshot_form='full' is exact in all"
        )
    if form is Form.DISK and (kind := file_system_type(Path(tempfile.gettempdir()))) in MEMORY_FILE_SYSTEMS:
        logger.warning(
            "snapshots are to lie on disk, but %s is a memory file system (%s): set TMPDIR to a directory on a disk",
            tempfile.gettempdir(),
            kind,
        )
    rounds = state.is_parameter if form is Form.BF16 else None
    return SnapshotRing(
        env.shm_dir, slots=slots, root=env.shm_root, form=form, replica_key=replica_key(state), rounds=rounds
    )


def expected_bytes(state: TrainingState) -> int:
    """Bytes of one snapshot of this rank once every optimizer has its state; an estimate before the first step."""
    specs, _ = state.tensors()
    unborn = sum(
        local(parameter).numel() * parameter.element_size()
        for optimizer in state.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and not optimizer.state.get(parameter)
    )
    return sum(spec.nbytes for spec in specs) + _UNBORN_STATE * unborn


def bytes_in_memory(directory: Path | None) -> int:
    """Bytes of the slots and bases that an earlier generation left in a rank's directory, those on disk left out."""
    if directory is None:
        return 0
    files = [path for _, path in [*layout.slot_files(directory), *layout.base_files(directory)]]
    return sum(path.stat().st_size for path in files if not path.is_symlink())
