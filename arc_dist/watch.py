"""Looks at the tensors of the state: some in each step, all of them when it matters; and whether replicas are equal."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from arc_dist.monitors import StateProbe
from arc_dist.monitors.replicas import ReplicaDigest
from arc_dist.monitors.state import Probed
from arc_dist.parallel import ddp_modules
from arc_dist.protocol.flags import Flag
from arc_dist.snapshot.state import TrainingState


class StateWatch:
    """A `StateProbe` that follows the state as tensors come and go (an optimizer's appear with its first step).

    Attributes:
        probe: what judges the tensors, and knows which were never finite.
        followed: the last step at which `judge` looked for new tensors, which lets go of what FSDP2 has gathered.
    """

    def __init__(self, state: TrainingState) -> None:
        self.probe = StateProbe()
        self._state = state
        self._watched: object = None
        self._num_states = -1
        self.followed = -1

    def follow(self) -> int:
        """Hands the present tensors to the probe; returns the flags of what changed in a way that no step makes."""
        specs, tensors = self._state.tensors()
        if tensors is self._watched:
            return 0
        self._watched = tensors
        probed = [
            Probed(spec.name, tensor, is_weight=not spec.name.startswith("optimizer."))
            for spec, tensor in zip(specs, tensors, strict=True)
            if self._state.is_judged(spec.name)
        ]
        return self.probe.watch(probed, tensors).value

    def judge(self, step: int) -> int:
        """The flags of this step's share of the tensors."""
        num_states = 0
        for optimizer in self._state.optimizers:
            num_states += len(optimizer.state)
        flags = 0
        if num_states != self._num_states or step % self.probe.pause == 0:
            self._num_states = num_states
            self.followed = step
            flags = self.follow()
        return flags | self.probe.judge(step).value

    def scan(self) -> Flag:
        """The flags of all judged numbers."""
        self.follow()
        return self.probe.scan()

    def begin(self, step: int) -> None:
        """Before the first step: what is not finite already (a mask, an unused row) is this model's way."""
        self.follow()
        if step == 0:
            self.probe.exempt_present()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """After the tensors changed under it."""
        self._watched = None
        self.probe.forget()
        self.follow()
        self.probe.load_state_dict(state)


class ReplicaWatch:
    """Digests what DDP keeps equal on all ranks: the parameters inside its wrappers, less those it was told to ignore.

    The digest rides in the vote of every `every` steps, and in that of the first step after each snapshot, so that no
    snapshot is trusted whose replicas differ.

    Args:
        state: whose models are wrapped in DDP.
        every: updates between two comparisons.
    """

    def __init__(self, state: TrainingState, every: int) -> None:
        self._state = state
        self._every = every
        self._watched: object = None
        self._digest = ReplicaDigest()

    def is_due(self, step: int, snapshot_step: int | None) -> bool:
        """Whether the vote after `step` updates carries the digest; the same on every rank.

        Args:
            step: updates applied.
            snapshot_step: of the newest snapshot.
        """
        return step % self._every == 0 or step == snapshot_step

    def digest(self) -> int:
        """The digest of the present parameters."""
        _, tensors = self._state.tensors()
        if tensors is not self._watched:
            self._watched = tensors
            self._digest.watch(list(self._replicated()))
        with torch.no_grad():
            return self._digest.digest()

    def _replicated(self) -> Iterator[torch.Tensor]:
        seen: set[int] = set()
        for model in self._state.models.values():
            for wrapper in ddp_modules(model):
                ignored = wrapper.parameters_to_ignore
                for name, parameter in wrapper.module.named_parameters():
                    hashable = parameter.numel() and not parameter.is_complex()
                    if name not in ignored and id(parameter) not in seen and hashable:
                        seen.add(id(parameter))
                        yield parameter
