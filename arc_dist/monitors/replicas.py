"""A digest of the parameters that replicas must have in common, to be compared by the vote."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arc_dist.protocol.replicas import mix


class ReplicaDigest:
    """Digests tensors that are the same on every rank if all replicas are in step: one pass, one transfer.

    Each tensor's word is ``torch.hash_tensor``, an exclusive or of all its values, and for an even number of values its
    first value too: an even number of equal values would cancel out. Any single difference is found; two differences
    in one tensor that cancel each other are not.
    """

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []

    def watch(self, tensors: Sequence[torch.Tensor]) -> None:
        """Takes the tensors, in the same order on every rank."""
        self._tensors = [tensor.detach() for tensor in tensors]

    def digest(self) -> int:
        """The digest of the present values, not negative."""
        words = []
        for tensor in self._tensors:
            words.append(torch.hash_tensor(tensor))
            if tensor.numel() % 2 == 0:
                words.append(torch.hash_tensor(tensor[(0,) * (tensor.dim() - 1)][:1]))
        if not words:
            return 0
        if all(word.device == words[0].device for word in words):
            values = torch.stack(words).view(torch.int64).tolist()
        else:
            values = [int(word.view(torch.int64).item()) for word in words]
        digest = len(values)
        for value in values:
            digest = mix(digest, value & (1 << 64) - 1)
        return digest
