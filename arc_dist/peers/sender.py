"""Sends this rank's newest trusted snapshot to the ranks that keep copies of it, in the background.

The bytes go straight from shared memory to the network, block by block, at a bounded rate. The training process may
overwrite the slot meanwhile: that is looked for before each block and once more after the last one, and before the
receiver is told the digests without which it keeps nothing. So no torn copy is ever whole, and nobody waits for us.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from arc_dist.checkpoint_store.format import FAST_HASH, new_hash
from arc_dist.checkpoint_store.pace import Pace
from arc_dist.peers.channel import Abandoned, PeerUnavailable, connect
from arc_dist.peers.image import Facts, Image, digest
from arc_dist.peers.server import Job
from arc_dist.peers.shelf import Goods
from arc_dist.snapshot import layout
from arc_dist.snapshot.layout import SlotDamaged, SlotInfo
from arc_dist.telemetry.log import logger

_LOOK_EVERY_S = 0.2
_RETRY_S = 1.0
_RETRY_MAX_S = 30.0
_WORDS = {Goods.COPY: "copy", Goods.NOTE: "note"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partner:
    """A rank's supervisor that keeps or has copies, and where it listens."""

    rank: int
    host: str
    port: int

    def __str__(self) -> str:
        return f"the supervisor of rank {self.rank}"


@dataclasses.dataclass(kw_only=True)
class _Standing:
    """How it goes with one partner."""

    sent: SlotInfo | None = None
    failures: int = 0
    retry_at: float = 0.0
    is_told: bool = False  # that copies do not arrive


class CopySender:
    """A thread that sends whenever there is something new, until it is closed.

    Args:
        job: of this supervisor.
        shm_dir: of this rank.
        max_bytes_per_s: bound on the rate, over all partners; None for none.
        replicated_too: copy also what every rank has (plain DDP). Its replicas are copies of each other, apart from
            what each knows alone, such as its random state; notes of that are sent in any case.
        record: takes an incident, when copies stop arriving; must not raise.
        timeout_s: for each wait.

    Attributes:
        num_bytes: sent so far, of snapshots.
    """

    def __init__(
        self,
        job: Job,
        shm_dir: Path,
        *,
        max_bytes_per_s: float | None,
        replicated_too: bool = False,
        record: Callable[..., None],
        timeout_s: float = 30.0,
    ) -> None:
        self.num_bytes = 0
        self._job = job
        self._shm_dir = shm_dir
        self._pace = Pace(max_bytes_per_s)
        self._replicated_too = replicated_too
        self._record = record
        self._timeout_s = timeout_s
        self._guard = threading.Lock()
        self._generation = 0
        self._is_on = False
        self._standing: dict[tuple[Goods, Partner], _Standing] = {}
        self._base_digests: dict[tuple[int, int], str] = {}
        self._closing = threading.Event()
        threading.Thread(target=self._run, name="arc-copies", daemon=True).start()

    def begin(self, generation: int, partners: Sequence[Partner], keepers: Sequence[Partner] = ()) -> None:
        """From now on snapshots go to these partners, and notes to these keepers, in the name of a generation.

        Notes come first: they are small, and copies of large snapshots may take long.
        """
        wanted = [(Goods.NOTE, keeper) for keeper in keepers] + [(Goods.COPY, partner) for partner in partners]
        with self._guard:
            self._generation, self._is_on = generation, True
            self._standing = {each: self._standing.get(each, _Standing()) for each in wanted}

    def pause(self) -> None:
        """Begins no new transfer, and gives up the present one, until `begin`."""
        self._is_on = False

    def close(self) -> None:
        """Ends the thread at its next look."""
        self._is_on = False
        self._closing.set()

    def sent(self) -> Mapping[int, int]:
        """By partner's rank, the step of the last snapshot that it took."""
        with self._guard:
            return {
                partner.rank: standing.sent.step
                for (goods, partner), standing in self._standing.items()
                if goods is Goods.COPY and standing.sent is not None
            }

    def _run(self) -> None:
        while not self._closing.wait(_LOOK_EVERY_S):
            with self._guard:
                todo = list(self._standing.items()) if self._is_on else []
            for (goods, partner), standing in todo:
                newest = self._newest(goods)
                if newest is None or not self._is_on or time.monotonic() < standing.retry_at:
                    continue
                try:
                    self._catch_up(goods, partner, standing, newest)
                except (PeerUnavailable, OSError, ValueError, KeyError) as error:
                    self._failed(goods, partner, standing, newest, error)

    def _newest(self, goods: Goods) -> SlotInfo | None:
        """The newest trusted snapshot, if it is one to be sent: notes are of use to those that have replicas."""
        held = [info for info in layout.inspect(self._shm_dir) if info.certified]
        if goods is Goods.NOTE:
            held = [info for info in held if info.replica_key]
        else:
            held = [info for info in held if self._replicated_too or not info.replicated]
        return max(held, key=lambda info: info.sequence, default=None)

    def _catch_up(self, goods: Goods, partner: Partner, standing: _Standing, newest: SlotInfo) -> None:
        sent = standing.sent
        if sent is not None and (sent.sequence, sent.generation) == (newest.sequence, newest.generation):
            return
        if sent is not None and newest.step < sent.step:
            self._drop(goods, partner, newest.step)  # a rollback gave up what the partner still keeps
            standing.sent = None
        try:
            self._send(goods, partner, newest)
        except (Abandoned, SlotDamaged, FileNotFoundError):
            if self._is_on:
                self._late(goods, partner, standing, newest, "it was overwritten before it had been sent")
            return
        if standing.is_told:
            logger.info("a %s reaches %s again", _WORDS[goods], partner)
        standing.sent, standing.failures, standing.is_told = newest, 0, False

    def _send(self, goods: Goods, partner: Partner, newest: SlotInfo) -> None:
        image = Image.open(self._shm_dir, newest.slot)
        if image.header.sequence != newest.sequence:
            raise Abandoned
        original, image = image, image.note() if goods is Goods.NOTE else image
        began = time.monotonic()
        base_digest = self._base_digest(image)
        request = {
            "do": "put",
            "generation": self._generation,
            "header": dataclasses.asdict(image.header),
            "base_digest": base_digest,
        }
        sock, channel = connect(
            partner.host, partner.port, self._job.token, timeout_s=self._timeout_s, peer=str(partner)
        )
        with sock:
            channel.send({**self._about(goods), **request})
            answer = channel.receive()
            if answer["have"]:
                return
            parts = image.parts(with_base=answer["wants_base"])
            hasher = new_hash(FAST_HASH)
            first = self.num_bytes

            def before_each(block: memoryview) -> None:
                self._require_same(original)
                self._pace.spend(len(block), lambda: self._require_same(original))
                if self.num_bytes - first < len(image.body):
                    hasher.update(block)
                self.num_bytes += len(block)

            channel.send_bytes(parts, before_each)
            self._require_same(original)
            facts = Facts(
                sequence=image.header.sequence,
                generation=image.header.generation,
                step=image.header.step,
                body_digest=hasher.hexdigest(),
                base_digest=base_digest,
            )
            channel.send({"facts": dataclasses.asdict(facts)})
            channel.receive()
        took_s = time.monotonic() - began
        logger.debug("a %s of step %d went to %s in %.1f s", _WORDS[goods], newest.step, partner, took_s)

    def _drop(self, goods: Goods, partner: Partner, above: int) -> None:
        sock, channel = connect(
            partner.host, partner.port, self._job.token, timeout_s=self._timeout_s, peer=str(partner)
        )
        with sock:
            channel.send({**self._about(goods), "do": "drop", "above": above})
            channel.receive()

    def _about(self, goods: Goods) -> dict[str, object]:
        job = self._job
        return {"lineage": job.lineage, "world_size": job.world_size, "owner": job.rank, "goods": goods.value}

    def _require_same(self, image: Image) -> None:
        if not self._is_on or not image.is_unchanged():
            raise Abandoned

    def _base_digest(self, image: Image) -> str:
        """Of the base that the snapshot shares with others; a base never changes, so it is read once."""
        if not image.header.base:
            return digest(image.base)
        key = (image.header.base, layout.base_path(self._shm_dir, image.header.base).stat().st_ino)
        if key not in self._base_digests:
            self._base_digests = {key: digest(image.base)}
        return self._base_digests[key]

    def _failed(self, goods: Goods, partner: Partner, standing: _Standing, newest: SlotInfo, error: Exception) -> None:
        standing.failures += 1
        standing.retry_at = time.monotonic() + min(_RETRY_MAX_S, _RETRY_S * 2 ** min(standing.failures - 1, 8))
        if self._is_on:
            self._late(goods, partner, standing, newest, str(error))

    def _late(self, goods: Goods, partner: Partner, standing: _Standing, newest: SlotInfo, why: str) -> None:
        """Lost protection is announced: once, until a copy arrives again."""
        log = logger.debug if standing.is_told else logger.warning
        log("no %s of step %d at %s: %s", _WORDS[goods], newest.step, partner, why)
        if not standing.is_told:
            self._record(
                kind="copy_late",
                step=newest.step,
                ranks=[self._job.rank],
                generation=self._generation,
                cause=f"no {_WORDS[goods]} at {partner}: {why}",
                action="tried again with the next snapshot",
            )
        standing.is_told = True
