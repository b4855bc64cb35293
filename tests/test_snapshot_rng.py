"""Random generators go back to exactly where they were, in this process or another, whatever moved them."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from arc_dist.snapshot.rng import capture_rng, derive_rng, pack_rng, restore_rng, unpack_rng
from ranks import run_ranks

# Each draws from one generator; Gaussians come in pairs, of which the second waits in the state.
DRAWS: dict[str, Callable[[], object]] = {
    "python": random.random,
    "python gauss": lambda: random.gauss(0, 1),
    "python integers": lambda: random.randrange(1 << 80),
    "numpy": np.random.rand,
    "numpy gauss": np.random.randn,
    "torch": lambda: torch.rand(3).tolist(),
    "torch gauss": lambda: torch.randn(1).item(),
    "torch permutation": lambda: torch.randperm(50).tolist(),
}


def draw() -> list[object]:
    return [way() for way in DRAWS.values()]


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("packed", [False, True], ids=["object", "bytes"])
def test_every_draw_comes_again(name: str, packed: bool) -> None:
    way = DRAWS[name]
    for _ in range(5):
        state = capture_rng()
        first = [way() for _ in range(4)]
        restore_rng(pack_rng(state) if packed else state)
        assert [way() for _ in range(4)] == first
        way()


def test_any_order_of_captures_and_restores_is_exact() -> None:
    """Captures reuse what they saw before if nothing moved; this looks for a reuse that is wrong."""
    chance = random.Random(5)
    kept = [(capture_rng(), None)]
    ways = list(DRAWS.values())
    for _ in range(400):
        action = chance.randrange(4)
        if action == 0:
            state = capture_rng()
            after = draw()
            restore_rng(state)
            kept.append((state, after))
        elif action == 1:
            state, after = chance.choice(kept)
            restore_rng(state)
            if after is not None:
                again = capture_rng()
                assert draw() == after
                restore_rng(again)
                assert draw() == after
        elif action == 2:
            np.random.seed(chance.randrange(3))
            random.seed(chance.randrange(3))
            torch.manual_seed(chance.randrange(3))
        else:
            chance.choice(ways)()


@pytest.mark.parametrize("kind", ["PCG64", "SFC64", "Philox", "MT19937"])
def test_numpys_other_generators_are_kept_too(kind: str) -> None:
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(getattr(np.random, kind)(3))
        for _ in range(3):
            state = pack_rng(capture_rng())
            first = np.random.randn(5).tolist()
            restore_rng(state)
            assert np.random.randn(5).tolist() == first
            np.random.randn()
    finally:
        np.random.set_bit_generator(before)


def test_packing_loses_nothing() -> None:
    np.random.randn()
    random.gauss(0, 1)
    state = capture_rng()
    again = unpack_rng(pack_rng(state))
    assert again.python == state.python
    assert torch.equal(again.torch, state.torch)
    assert again.cuda == ()
    assert pack_rng(again) == pack_rng(state)


def test_another_process_goes_on_where_this_one_was() -> None:
    random.gauss(0, 1)
    data = pack_rng(capture_rng())
    (elsewhere,) = run_ranks(1, _draw_elsewhere, data, init=False)
    assert elsewhere == _gaussians()


def _gaussians() -> list[float]:
    return [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(1).item()]


def _draw_elsewhere(rank: int, world_size: int, data: bytes) -> list[float]:
    restore_rng(data)
    return _gaussians()


def test_numpy_is_neither_imported_nor_asked_where_nobody_uses_it() -> None:
    code = (
        "import sys; sys.modules['numpy'] = None\n"  # `import numpy` fails from here on
        "import random, torch\n"
        "del sys.modules['numpy']\n"
        "loaded = 'numpy' in sys.modules\n"
        "from arc_dist.snapshot.rng import capture_rng, pack_rng, restore_rng\n"
        "state = capture_rng(); a = random.random(); restore_rng(pack_rng(state)); assert random.random() == a\n"
        "print(loaded, state.numpy, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False None False"


def test_a_derived_point_is_a_function_of_point_and_name_and_moves_nothing_here() -> None:
    base = pack_rng(capture_rng())
    one, again, other = derive_rng(base, "rank 4"), derive_rng(base, "rank 4"), derive_rng(base, "rank 5")
    assert pack_rng(capture_rng()) == base
    assert one == again
    random.random()
    torch.rand(1)
    assert derive_rng(base, "rank 4") == one, "it does not depend on where this process is"
    draws = []
    for point in (base, one, other):
        restore_rng(point)
        draws.append(draw())
    assert all(len({str(drawn) for drawn in way}) == 3 for way in zip(*draws, strict=True)), draws
