"""Whether replicas are equal, and which of them is the odd one: pure rules about digests.

A vote is a bitwise OR, which cannot compare. But a bit that is set in the OR of all digests d, and in the OR of all
their complements, was 1 on one rank and 0 on another: the two ORs share no bit exactly when all digests are equal.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable, Sequence

DIGEST_BITS = 63  # a digest is not negative, so that it and its complement fit into a signed word of 64 bits
_MASK = (1 << DIGEST_BITS) - 1


def ballot(digest: int) -> tuple[int, int]:
    """The two words that a rank votes with: its digest and the digest's complement, both of `DIGEST_BITS` bits."""
    return digest & _MASK, ~digest & _MASK


def all_equal(any_set: int, any_clear: int) -> bool:
    """Whether all ranks voted with the same digest, from the ORs of the two words."""
    return any_set & any_clear == 0


def odd_ones(digests: Sequence[Hashable]) -> tuple[int, ...]:
    """The ranks whose digest is not that of a strict majority; empty when all are equal or there is no majority."""
    ((most, count),) = collections.Counter(digests).most_common(1) or [(None, 0)]
    if 2 * count <= len(digests):
        return ()
    return tuple(rank for rank, digest in enumerate(digests) if digest != most)


def mix(digest: int, word: int) -> int:
    """Adds one word of 64 bits to a digest; the order of the words matters.

    A word goes in as two halves, each by a step that can be undone: with all else equal, words that differ in one half
    always give different digests, whichever words follow.
    """
    for half in (word & 0xFFFF_FFFF, word >> 32):
        digest = (digest ^ half) * 0x9E3779B97F4A7C15 & _MASK
        digest ^= digest >> 29
    return digest
