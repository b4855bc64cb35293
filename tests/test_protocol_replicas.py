"""Replicas compared by a vote: the two ORs say "equal" exactly when all digests are, whatever the order of messages."""

from __future__ import annotations

import functools
import operator

from hypothesis import given
from hypothesis import strategies as st

from arc_dist.protocol import replicas

DIGESTS = st.integers(0, (1 << replicas.DIGEST_BITS) - 1)


@given(st.lists(DIGESTS | st.sampled_from([0, 1, (1 << replicas.DIGEST_BITS) - 1]), min_size=1, max_size=9))
def test_the_vote_says_equal_exactly_when_all_are(digests):
    words = [replicas.ballot(digest) for digest in digests]
    any_set = functools.reduce(operator.or_, [word[0] for word in words])
    any_clear = functools.reduce(operator.or_, [word[1] for word in words])
    assert 0 <= any_set < 1 << 63 and 0 <= any_clear < 1 << 63, "fits into a signed word"
    assert replicas.all_equal(any_set, any_clear) == (len(set(digests)) == 1)


@given(DIGESTS, st.integers(0, replicas.DIGEST_BITS - 1))
def test_any_single_bit_is_seen(digest, bit):
    mine, theirs = replicas.ballot(digest), replicas.ballot(digest ^ 1 << bit)
    assert not replicas.all_equal(mine[0] | theirs[0], mine[1] | theirs[1])


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9))
def test_only_a_strict_majority_names_the_odd_ones(digests):
    odd = replicas.odd_ones(digests)
    if odd:
        rest = {digest for rank, digest in enumerate(digests) if rank not in odd}
        assert len(rest) == 1 and len(odd) < len(digests) / 2
        assert all(digests[rank] not in rest for rank in odd)
    else:
        assert len(set(digests)) == 1 or max(map(digests.count, digests)) * 2 <= len(digests)


def test_two_that_differ_have_no_odd_one():
    assert replicas.odd_ones(["a", "b"]) == ()
    assert replicas.odd_ones(["a", "b", "a"]) == (1,)
    assert replicas.odd_ones([]) == ()


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=2, max_size=20), st.data())
def test_the_mix_depends_on_every_word_and_on_their_order(words, data):
    def digest(items):
        return functools.reduce(replicas.mix, items, 0)

    place = data.draw(st.integers(0, len(words) - 1))
    for bit in range(64):
        changed = list(words)
        changed[place] ^= 1 << bit
        assert digest(changed) != digest(words), bit
    assert 0 <= digest(words) < 1 << replicas.DIGEST_BITS
    first, last = words[0], words[-1]
    if first != last:
        assert digest([first, last]) != digest([last, first])
