"""Steps that did not fit into memory, done again by all ranks in smaller micro-batches.

What to do is decided by `protocol.oom`, by all ranks alike, once they have heard of it: the rank that failed takes part
in what is left of the step's collectives with values that are not finite (`healing.stand_in`), so no peer waits for it,
and the exchange of details that follows says what happened. Where that cannot be done, a restart of all processes goes
on divided: what was asked for is left beside the snapshots, in memory that outlives the process.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from arc_dist.data.source import Batch, BatchSource
from arc_dist.engine import Engine
from arc_dist.errors import ArcError, ConfigError, TrainingStopped
from arc_dist.healing.microbatch import SplitFunction, Splitter
from arc_dist.healing.out_of_memory import free, is_out_of_memory, one_line
from arc_dist.healing.stand_in import NotMatched, ReplicaStandIn
from arc_dist.healing.vote import agree
from arc_dist.parallel import GradientSync, Parallelism, ddp_modules
from arc_dist.protocol.budgets import is_echo_of
from arc_dist.protocol.decision import Decision
from arc_dist.protocol.flags import Flag
from arc_dist.protocol.hangs import Section
from arc_dist.protocol.oom import Division, DivisionPolicy, Where, healthy, restarted
from arc_dist.settings import OnOutOfMemory
from arc_dist.snapshot.rng import RngState, capture_rng, restore_rng
from arc_dist.telemetry.log import logger

_REQUEST = "division"  # file in the rank's shared-memory directory
_RESTART_FACTOR = 4  # only three generations in a row may bring no step
_TINY = 2  # samples; some norms cannot do with one


class Piece(NamedTuple):
    """One forward and backward of a divided step.

    Attributes:
        batch: index of the batch that it is a part of.
        data: what the loss function gets.
        weight: of its loss in that of the batch.
        ends_batch: it is the batch's last.
        reduces: gradients are reduced over ranks after it.
        is_last: of the step.
    """

    batch: int
    data: Any
    weight: float
    ends_batch: bool
    reduces: bool
    is_last: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calls:
    """What of the loop a divided step is made of.

    Attributes:
        loss: of a (part of a) batch, checked.
        scaled: by the gradient scaler, where there is one.
        last_backward: votes, and does the backward that reduces: (loss, losses of the batches, their ordinals).
        clip: measures the gradient's norm; communicates where the model is sharded.
    """

    loss: Callable[[Any], torch.Tensor]
    scaled: Callable[[torch.Tensor], torch.Tensor]
    last_backward: Callable[[torch.Tensor, tuple[float, ...], tuple[int, ...]], None]
    clip: Callable[[], float]


class Divided:
    """One rank's part in retrying steps that did not fit.

    Args:
        engine: the started guard and what belongs to it.
        source: the batches.
        sync: switches the reduction of gradients off and on.
        calls: what a step is made of.
        split: divides a batch; None for the rule of `healing.microbatch`.

    Attributes:
        is_reducing: the last backward of the step, which votes and reduces gradients, has begun.
        is_torn: an update is half done on this rank.
        piece: index of the forward and backward at hand.
    """

    def __init__(
        self, engine: Engine, source: BatchSource, sync: GradientSync, calls: Calls, split: SplitFunction | None
    ) -> None:
        self._engine = engine
        self._guard = engine.guard
        self._source = source
        self._sync = sync
        self._calls = calls
        self._split = Splitter(split)
        self._answer = OnOutOfMemory(engine.settings.out_of_memory)
        self._policy = DivisionPolicy(widen_after=engine.settings.widen_after)
        shm_dir = engine.env.shm_dir
        self._request: Path | None = shm_dir / _REQUEST if shm_dir is not None else None
        self._moving = engine.state.statistics()
        self._moved = [tensor.clone() for tensor in self._moving]
        self._rng: RngState | None = None
        self._replicas: ReplicaStandIn | None = None
        self._shards: Any = None
        self.is_reducing = False
        self.is_torn = False
        self.piece = 0
        self._remembers = self._answer is OnOutOfMemory.RETRY
        self.obstacle = self._find_obstacle()

    def _find_obstacle(self) -> str:
        """Why a step cannot be done again in place; "" when it can."""
        engine, state = self._engine, self._engine.state
        if self._answer is not OnOutOfMemory.RETRY:
            return f'out_of_memory="{self._answer.value}"'
        if engine.parallelism is Parallelism.NONE:
            return ""
        if state.scaler is not None:
            return "a gradient scaler drops steps by itself"
        if not engine.settings.heeded & Flag.GRAD_NONFINITE:
            return "gradients that are not finite are ignored"
        models = list(state.models.values())
        if engine.parallelism is Parallelism.REPLICATED:
            if not self._guard.carries_votes:
                return "the DDP module has a communication hook, or a process group of its own"
            stand_in = ReplicaStandIn([module for model in models for module in ddp_modules(model)])
            self._replicas = stand_in if not stand_in.obstacle else None
            return stand_in.obstacle
        if engine.parallelism is Parallelism.SHARDED:
            try:
                from arc_dist.healing.shard_stand_in import ShardStandIn
            except ImportError as error:
                return f"this version of torch shards in another way ({error})"
            stand_in = ShardStandIn(models)
            self._shards = stand_in if not stand_in.obstacle else None
            return stand_in.obstacle
        return "how gradients are reduced is not known"

    def begin(self) -> None:
        """Before the first step of this process: agrees on the division. Every rank must call this; it blocks."""
        guard = self._guard
        mine = {"division": guard.division.as_dict(), "requested": self._requested(), "obstacle": self.obstacle}
        everyone = guard.voter.gather(mine, guard.step)
        if self.obstacle == "" and any(theirs["obstacle"] for theirs in everyone):
            self.obstacle = next(theirs["obstacle"] for theirs in everyone if theirs["obstacle"])
        division = Division.from_dict(max((theirs["division"] for theirs in everyone), key=lambda one: one["parts"]))
        guard.division = restarted(division, max(theirs["requested"] for theirs in everyone))
        if guard.division.parts > 1:
            logger.info("each batch is divided into %d micro-batches, as memory asks for", guard.division.parts)

    def _requested(self) -> int:
        if self._request is None or not self._request.exists():
            return 1
        return int(self._request.read_text())

    def close(self) -> None:
        """Leaves the models as they were."""
        for stand_in in (self._replicas, self._shards):
            if stand_in is not None:
                stand_in.remove()

    # ------------------------------------------------------------------ a step

    @property
    def parts(self) -> int:
        """Micro-batches that each batch is divided into."""
        return self._guard.division.parts

    def begin_step(self) -> None:
        """Before the batches of a step are fetched: remembers what a forward pass changes."""
        if not self._remembers:
            return
        self._rng = capture_rng()
        if self._moving:
            torch._foreach_copy_(self._moved, self._moving)
        self.is_reducing = False
        self.piece = 0
        if self._replicas is not None:
            self._replicas.begin_step(self._engine.accumulate * self._guard.division.parts)
        if self._shards is not None:
            self._shards.begin_micro_batch()

    def begin_piece(self, number: int) -> None:
        """Before the forward of one of several pieces of a step."""
        self.piece = number
        if self._shards is not None:
            self._shards.begin_micro_batch()

    def pieces(self, batches: Sequence[Batch]) -> Iterator[Piece]:
        """The step as a sequence of forwards and backwards, as many on every rank.

        Raises:
            ConfigError: a batch cannot be divided.
        """
        parts, count = self._guard.division.parts, len(batches)
        # Without accumulation of the user's own, a sharded gradient is reduced after each part: unreduced it would have
        # to be held for the whole model at once.
        each = self._engine.parallelism is Parallelism.SHARDED and count == 1
        for index, batch in enumerate(batches):
            found = self._split(batch.data, parts) if parts > 1 else [(batch.data, 1.0)]
            for number, (data, weight) in enumerate(found):
                ends = number == len(found) - 1
                last = ends and index == count - 1
                yield Piece(index, data, weight, ends, last or each, last)

    def forward_backward(self, batches: Sequence[Batch]) -> tuple[float, ...]:
        """Forward and backward of a divided step; the losses are those of the undivided batches, up to rounding."""
        sections, calls = self._engine.sections, self._calls
        losses: list[float] = []
        total = 0.0
        for number, piece in enumerate(self.pieces(batches)):
            self.begin_piece(number)
            with self._sync.micro_batch(last=piece.reduces):
                loss = calls.loss(piece.data)
                if piece.weight:
                    total += piece.weight * loss.item()
                loss = loss * (piece.weight / len(batches))
                if piece.ends_batch:
                    losses.append(total)
                    total = 0.0
                if piece.is_last:
                    calls.last_backward(loss, tuple(losses), tuple([batch.ordinal for batch in batches]))
                else:
                    sections.enter_computing(int(Section.BACKWARD))
                    calls.scaled(loss).backward()
                    sections.enter_computing(int(Section.FORWARD))
        return tuple(losses)

    def committed(self) -> None:
        """A step was committed while the division is not settled."""
        guard = self._guard
        before = guard.division.parts
        guard.division = healthy(self._policy, guard.division)
        if guard.division.parts < before:
            logger.info(
                "step %d: trying %d instead of %d micro-batches per batch", guard.step, guard.division.parts, before
            )
            if self._request is not None:
                self._request.unlink(missing_ok=True)

    # ------------------------------------------------------------------ out of memory

    def failed(self, error: Exception, batches: Sequence[Batch]) -> Decision:
        """Answers an error of forward or backward together with all ranks; what is no lack of memory is raised again.

        Returns:
            What all ranks decided.

        Raises:
            TrainingStopped: this rank cannot go on by itself, and there is no supervisor to start it again.
            NotMatched: the same, under a supervisor, which does.
        """
        if not is_out_of_memory(error) or self._answer is OnOutOfMemory.RAISE:
            raise error
        where = Where.BACKWARD if self._engine.sections.present == Section.BACKWARD else Where.FORWARD
        told = one_line(error)
        free(error, thoroughly=self.parts > 1)
        if self.obstacle:
            self._restart(where, told, self.obstacle)
        logger.warning("step %d: out of memory in %s (%s)", self._guard.step + 1, where.value, told)
        self._tell(where, batches, told)
        has_voted = self.is_reducing
        if has_voted:
            self._guard.attempt.flags |= Flag.OUT_OF_MEMORY.value
            self._guard.attempt.voids_gradient = True
        else:
            self._guard.request(Flag.OUT_OF_MEMORY)
        try:
            self._stand_in(batches, has_voted)
        except NotMatched as obstacle:
            self._restart(where, told, obstacle.message)
        except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError, ArcError) as second:
            if is_echo_of(type(second).__name__, str(second)):
                raise
            self._restart(where, told, f"its place in the collectives cannot be taken: {one_line(second)}")
        decision = self._guard.conclude(math.nan)
        assert decision is not None, "a gradient of NaN was applied"
        return decision

    def _tell(self, where: Where, batches: Sequence[Batch], told: str) -> None:
        """Leaves what all ranks are to hear of."""
        division = self._guard.division
        samples, obstacle = None, ""
        try:
            samples = (
                max((self._split.largest(batch.data, division.parts) or 0 for batch in batches), default=0) or None
            )
            if where is not Where.OPTIMIZER and samples != 1:
                for batch in batches:
                    self._split(batch.data, 2 * division.parts)
        except ConfigError as error:
            obstacle = error.message
        self._guard.attempt.memory = {
            "where": where.value,
            "samples": samples,
            "obstacle": obstacle if where is not Where.OPTIMIZER else "",
            "parts": division.parts,
            "error": told,
        }

    def _stand_in(self, batches: Sequence[Batch], has_voted: bool) -> None:
        """Takes part in what is left of this step's votes and collectives."""
        if self._shards is None:
            self._vote(batches)
            if self._replicas is not None:
                self._replicas.complete(is_reducing=has_voted, is_first=self.piece == 0)
            return
        pieces = list(self.pieces(batches))
        for size in range(_TINY, -1, -1):
            try:
                self._tiny_pass(batches, pieces, size)
                break
            except (MemoryError, RuntimeError) as error:
                if size == 0 or not is_out_of_memory(error):
                    raise
                free(error, thoroughly=True)
        # Where the norm is the same on all ranks the ballot went out before the backward.
        self._shards.end(must_void=has_voted and self._guard.votes_early)
        self._calls.clip()

    def _vote(self, batches: Sequence[Batch]) -> None:
        """Hands the ballot in, unless the step that failed did; as in a step, between its forward and last backward."""
        if not self.is_reducing:
            self._guard.begin_vote((), tuple([batch.ordinal for batch in batches]))
            self.is_reducing = True
        elif self._guard.watch.followed == self._guard.step:
            self._engine.state.tensors()  # lets go of gathered parameters, as the vote did: they are gathered once more

    def _tiny_pass(self, batches: Sequence[Batch], pieces: Sequence[Piece], size: int) -> None:
        """The rest of the step, from the piece at hand on, with `size` samples of each piece."""
        self._shards.begin()
        for number in range(self.piece, len(pieces)):
            if number > self.piece:
                self.begin_piece(number)
            piece = pieces[number]
            with self._sync.micro_batch(last=piece.reduces):
                loss = self._calls.loss(self._split.some(piece.data, size))
                if piece.is_last:
                    self._vote(batches)
                loss.backward()

    def enough_of(self, data: Any, guard_state: dict[str, Any]) -> Any:
        """What of a batch a throw-away pass needs: all of it, unless the state to come divides batches.

        Local: ranks may take more or less of theirs.
        """
        parts = Division.from_dict(guard_state.get("division", {})).parts
        return self._split.some(data, _TINY) if max(parts, self._requested()) > 1 else data

    def _restart(self, where: Where, told: str, why: str) -> NoReturn:
        """Goes on in fresh processes, divided further; the end where nobody starts them."""
        guard, step = self._guard, self._guard.step + 1
        text = (
            f"rank {guard.voter.rank} ran out of memory in the {where.value} of step {step}: {told}. {_sentence(why)}"
        )
        if self._request is None:
            raise TrainingStopped(
                f"{text} Only a restart can divide the batches further, and there is no supervisor to make it: start "
                "the job with arcrun, or make batches smaller (with accumulate= for the same result).",
                rank=guard.voter.rank,
                step=step,
            )
        parts = _RESTART_FACTOR * self.parts
        self._request.write_text(str(parts))
        raise NotMatched(
            f"{text} All ranks start again with each batch in {parts} micro-batches.", rank=guard.voter.rank, step=step
        )

    def update_failed(self, error: Exception, batch: Batch) -> None:
        """An optimizer ran out of memory: its update is half done here, and whole on the other ranks.

        The step counts as committed, and all ranks go back to a snapshot at the next vote; what is no lack of memory
        is raised again.
        """
        state = self._engine.state
        if not is_out_of_memory(error) or self._answer is not OnOutOfMemory.RETRY or state.scaler is not None:
            raise error
        told = one_line(error)
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=True)
        free(error, thoroughly=True)
        logger.warning("step %d: out of memory in the optimizer (%s)", self._guard.step + 1, told)
        self.is_torn = True
        self._tell(Where.OPTIMIZER, (batch,), told)
        self._guard.request(Flag.OUT_OF_MEMORY)

    def go_back(self) -> None:
        """After all ranks decided on a retry: the batches, the generators and the statistics are those before it.

        Every rank must call this; it blocks.
        """
        guard, source = self._guard, self._source
        agree(guard.voter, lambda: source.rewind(source.position_before_fetch()), "the batch cannot be had again")
        if self._moving:
            torch._foreach_copy_(self._moving, self._moved)
        assert self._rng is not None
        restore_rng(self._rng)


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
