"""Looks at the tensors of the state: some in each step, all of them when it matters."""

from __future__ import annotations

from arc_dist.monitors import StateProbe
from arc_dist.monitors.state import Probed
from arc_dist.protocol.flags import Flag
from arc_dist.snapshot.state import TrainingState


class StateWatch:
    """A `StateProbe` that follows the state as tensors come and go (an optimizer's appear with its first step).

    Attributes:
        probe: what judges the tensors, and knows which were never finite.
    """

    def __init__(self, state: TrainingState) -> None:
        self.probe = StateProbe()
        self._state = state
        self._watched: object = None
        self._num_states = -1

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
