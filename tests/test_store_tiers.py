"""Several places for checkpoints: a full, slow, silent or damaged one costs neither a save nor the training."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_dist import Store
from arc_dist.checkpoint_store.backends.local import LocalBackend
from arc_dist.checkpoint_store.commands import add_commands
from arc_dist.checkpoint_store.drain import Copy, Drainer, next_copy
from arc_dist.checkpoint_store.pace import Pace
from arc_dist.checkpoint_store.retry import Retries, retrying
from arc_dist.checkpoint_store.tiers import Tier, Tiers, parse_tiers
from arc_dist.checkpoint_store.transfer import TransferAborted
from arc_dist.errors import ConfigError, StoreCorrupt, StoreFull, StoreGone, StoreTransient
from ranks import run_ranks
from store_helpers import same_bits, save
from toy import Toy, guarded, plain

# ---------------------------------------------------------------------- reading what the user wrote


def test_tiers_are_read_in_order_with_their_options():
    assert parse_tiers("shm, /nvme/ckpt?keep=last=3;every=100, s3://bucket/run?every=1000") == (
        Tier(url="/nvme/ckpt", keep="last=3,every=100"),
        Tier(url="s3://bucket/run", every=1000),
    )
    assert parse_tiers(["/a,b"]) == (Tier(url="/a,b"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shm", "outlives no job"),
        ("/a, shm", "first tier"),
        ("/a,, /b", "empty"),
        ("/a, /a/", "named twice"),
        ("/a/b, /a", "inside one another"),
        ("s3://b/x, s3://b/x/y", "inside one another"),
        ("file:///a, /a", "named twice"),
        ("/a?often=2", "unknown option often"),
        ("/a?every=0", "1 or more"),
        (",".join(f"/t{i}" for i in range(9)), "at most 8"),
    ],
)
def test_bad_tiers_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_tiers(text)


# ---------------------------------------------------------------------- trying again


class Clock:
    def __init__(self):
        self.now = 0.0
        self.slept = []

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def failing(errors):
    calls = []

    def action():
        calls.append(1)
        if errors:
            raise errors.pop(0)
        return "done"

    return action, calls


def attempt(errors, clock=None, **options):
    clock = clock or Clock()
    action, calls = failing(list(errors))
    done = retrying(action, Retries(), clock=lambda: clock.now, sleep=clock.sleep, jitter=lambda: 1.0, **options)
    return done, len(calls)


def test_what_may_pass_is_tried_again_with_growing_pauses():
    clock = Clock()
    assert attempt([StoreTransient("busy")] * 3, clock) == ("done", 4)
    assert clock.slept == [0.2, 0.4, 0.8]


def test_what_will_not_pass_is_raised_at_once_and_attempts_are_bounded():
    with pytest.raises(StoreFull):
        attempt([StoreFull("full")])
    clock = Clock()
    with pytest.raises(StoreTransient):
        attempt([StoreTransient("busy")] * 9, clock)
    assert len(clock.slept) == 4


def test_no_attempt_begins_after_the_deadline():
    clock = Clock()
    with pytest.raises(StoreTransient):
        attempt([StoreTransient("busy")] * 9, clock, deadline=0.5)
    assert clock.now < 0.5


def test_the_pace_is_kept_and_idle_time_is_not_saved_up():
    clock = Clock()
    pace = Pace(100.0, clock=lambda: clock.now, sleep=clock.sleep)
    begins = []
    for _ in range(5):
        pace.spend(100, lambda: None)
        begins.append(clock.now)
    assert begins == pytest.approx([0.0, 1.0, 2.0, 3.0, 4.0])
    clock.now += 60.0
    pace.spend(100, lambda: None)
    pace.spend(100, lambda: None)
    assert clock.now == pytest.approx(65.0)


def test_a_wait_for_the_pace_can_be_given_up():
    clock = Clock()
    pace = Pace(1.0, clock=lambda: clock.now, sleep=clock.sleep)
    pace.spend(3600, lambda: None)

    def told_to_stop_at_7() -> None:
        if clock.now >= 7.0:
            raise TransferAborted("stop")

    with pytest.raises(TransferAborted):
        pace.spend(1, told_to_stop_at_7)
    assert clock.now == pytest.approx(7.0, abs=0.2)


# ---------------------------------------------------------------------- reading from several


def two_tiers(tmp_path):
    for name in ("fast", "slow"):
        (tmp_path / name).mkdir()
    return Tiers(parse_tiers(f"{tmp_path / 'fast'}, {tmp_path / 'slow'}"), owner="o")


def copy_run(tiers):
    subprocess.run(["cp", "-r", f"{tiers.stores[0].url}/run", tiers.stores[1].url], check=True)


def damage(path, offset=-5):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "what", ["a flipped bit", "a missing file", "a truncated file", "a damaged manifest", "objects"]
)
def test_what_is_wrong_in_one_tier_is_taken_from_the_other(tmp_path, what):
    tiers = two_tiers(tmp_path)
    saved = save(tiers.stores[0], 7)
    copy_run(tiers)
    step = Path(tiers.stores[0].url, "run", "step-00000007")
    if what == "a flipped bit":
        damage(step / "rank-00000.safetensors")
    elif what == "a missing file":
        (step / "rank-00000.safetensors").unlink()
    elif what == "a truncated file":
        (step / "rank-00000.safetensors").write_bytes((step / "rank-00000.safetensors").read_bytes()[:-9])
    elif what == "objects":
        damage(step / "rank-00000.json")
    else:
        damage(step / "manifest.json", 200)
    checkpoint = tiers.open(7)
    specs = list(checkpoint.specs().values())
    for spec, tensor in zip(specs, checkpoint.read(specs), strict=True):
        assert same_bits(tensor, saved[spec.name])
    assert checkpoint.objects(0) == Tiers(tiers.tiers[1:]).open(7).objects(0)
    if what != "a damaged manifest":  # then the fast tier does not count as a holder at all
        assert any("fast" in problem.file for problem in checkpoint.damage)
    assert [info.step for info in tiers.steps()] == [7]


def test_a_step_damaged_everywhere_is_an_error_that_names_the_fastest_copy(tmp_path):
    tiers = two_tiers(tmp_path)
    save(tiers.stores[0], 7)
    copy_run(tiers)
    for store in tiers.stores:
        damage(Path(store.url, "run", "step-00000007", "rank-00000.safetensors"))
    with pytest.raises(StoreCorrupt, match="fast"):
        tiers.open(7).read(list(tiers.open(7).specs().values()))
    with pytest.raises(StoreGone, match="no committed step 8"):
        tiers.open(8)


def test_steps_are_those_of_all_tiers_and_holders_says_where(tmp_path):
    tiers = two_tiers(tmp_path)
    save(tiers.stores[0], 2)
    copy_run(tiers)
    save(tiers.stores[0], 4)
    save(tiers.stores[1], 6)
    assert [info.step for info in tiers.steps()] == [2, 4, 6]
    assert tiers.holders() == {2: [0, 1], 4: [0], 6: [1]}


# ---------------------------------------------------------------------- training on


def refuse(monkey, rank, world, error):
    """Every write of a shard below `fast` fails on this rank."""
    create = LocalBackend.create
    fired = []

    def hurt(self, path, nbytes, *, exclusive):
        if self.root.name == "fast" and path.endswith(f"rank-{rank:05d}.safetensors"):
            fired.append(path)
            raise error("no space left in fast. Free some.")
        return create(self, path, nbytes, exclusive=exclusive)

    monkey.setattr(LocalBackend, "create", hurt)
    return fired


def finish_each_save(job):
    """Steps wait for a save at hand, so that none is left out because one before it takes its time."""
    for count, _ in enumerate(job.steps, 1):  # noqa: B007
        job.arc._engine._checkpointer.wait()
    return count


def full_on_one_rank_body(rank, world_size, toy, root):
    with pytest.MonkeyPatch.context() as monkey:
        fired = refuse(monkey, 1, world_size, StoreFull) if rank == 1 else []
        job = guarded(toy, store=f"{root}/fast, {root}/slow", checkpoint_every=10)
        finish_each_save(job)
    return len(fired), job.digest()


def plain_body(rank, world_size, toy):
    return plain(toy)[0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_tier_that_is_full_on_one_rank_moves_the_save_of_all(tmp_path, kind):
    two_tiers(tmp_path)
    toy = Toy(kind=kind)
    outcomes = run_ranks(2, full_on_one_rank_body, toy, str(tmp_path), timeout_s=90)
    assert [fired > 0 for fired, _ in outcomes] == [False, True], "the fault must have fired"
    assert [digest for _, digest in outcomes] == run_ranks(2, plain_body, toy)
    assert [info.step for info in Store(tmp_path / "slow").steps()] == [10, 20, 30]
    assert Store(tmp_path / "fast").steps() == []
    assert list((tmp_path / "fast" / "run").glob("step-*")) == [], "abandoned attempts are removed"


def test_with_every_tier_full_training_goes_on_and_says_so(tmp_path, monkeypatch):
    two_tiers(tmp_path)
    create = LocalBackend.create

    def hurt(self, path, nbytes, *, exclusive):
        if path.endswith(".safetensors") and "0010" not in path:
            raise StoreFull("no space left. Free some.")
        return create(self, path, nbytes, exclusive=exclusive)

    monkeypatch.setattr(LocalBackend, "create", hurt)
    told = []
    job = guarded(Toy(), store=f"{tmp_path}/fast, {tmp_path}/slow", checkpoint_every=10)
    engine = job.arc._engine
    record = engine.record
    engine.record = lambda **fields: (told.append(fields["kind"]), record(**fields))
    assert finish_each_save(job) == 30
    assert job.digest() == plain(Toy())[0]
    assert [info.step for info in Store(tmp_path / "fast").steps()] == [10]
    assert told.count("checkpoint_failed") == 2  # steps 20 and 30, each said once
    assert told.count("tier_full") == 4


def test_a_tier_that_never_answers_holds_up_neither_training_nor_later_saves_nor_the_end(tmp_path, monkeypatch):
    two_tiers(tmp_path)
    silence = threading.Event()
    create = LocalBackend.create
    stuck = []

    def hurt(self, path, nbytes, *, exclusive):
        if self.root.name == "fast" and path.endswith(".safetensors"):
            stuck.append(path)
            silence.wait()
        return create(self, path, nbytes, exclusive=exclusive)

    monkeypatch.setattr(LocalBackend, "create", hurt)
    job = guarded(Toy(steps=60), store=f"{tmp_path}/fast, {tmp_path}/slow", checkpoint_every=10, save_timeout_s=0.2)
    began = time.monotonic()
    for _ in job.steps:
        time.sleep(0.02)
    assert time.monotonic() - began < 60
    assert stuck, "the fault must have fired"
    assert job.digest() == plain(Toy(steps=60))[0]
    steps = [info.step for info in Store(tmp_path / "slow").steps()]
    assert steps[-1] == 60
    assert len(steps) >= 3
    silence.set()


def test_a_slow_tier_is_given_up_and_then_the_next_and_training_goes_on(tmp_path):
    two_tiers(tmp_path)
    toy = Toy(steps=10)
    size = sum(p.numel() for p in guarded(toy).model.parameters()) * 4 * 3
    job = guarded(
        toy, store=f"{tmp_path}/fast, {tmp_path}/slow", checkpoint_every=10, max_bytes_per_s=size, save_timeout_s=0.3
    )
    told = []
    record = job.arc._engine.record
    job.arc._engine.record = lambda **fields: (told.append((fields["kind"], fields.get("reason"))), record(**fields))
    assert len(list(job.steps)) == 10  # no tier is fast enough at this rate, and training does not mind
    failed = [reason for kind, reason in told if kind == "tier_failed"]
    assert len(failed) == 2, told
    assert all("too slow" in reason for reason in failed)
    assert job.digest() == plain(toy)[0]
    assert Tiers(parse_tiers(f"{tmp_path}/fast, {tmp_path}/slow")).steps() == []


# ---------------------------------------------------------------------- a real full disk

SCRIPT = """
import json, sys, torch
from arc_dist import Arc, Store
root, width = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = torch.nn.Linear(width, width)
arc = Arc(model, torch.optim.AdamW(model.parameters()), store=f"{root}/small, {root}/large", checkpoint_every=5)
batches = [torch.randn(4, width) for _ in range(5)]
for result in arc.train(lambda b: model(b).square().mean(), batches, steps=20):
    arc._engine._checkpointer.wait()
print(json.dumps([result.number, [i.step for i in Store(f"{root}/small").steps()],
                  [i.step for i in Store(f"{root}/large").steps()]]))
"""


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 24 MiB."""
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
    small = tmp_path / "small"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", small], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs root: mount is not permitted here: {mounted.stderr.strip()}")
    assert small.is_mount()
    yield tmp_path
    subprocess.run(["umount", "-l", small], check=True)


def test_a_disk_that_fills_up_sends_the_next_saves_to_the_next_tier(small_disk):
    width = 760  # three of its tensors make 6.9 MB, so three checkpoints fit
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(small_disk), str(width)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    last, in_small, in_large = json.loads(done.stdout.splitlines()[-1])
    assert last == 20
    assert in_small == [5, 10, 15], done.stderr
    assert in_large[-1] == 20
    assert not list((small_disk / "small" / "run").glob("*/.*")), "half-written files are removed"
    assert Store(small_disk / "small").open(15).verify() == []


# ---------------------------------------------------------------------- draining


def test_the_newest_step_goes_to_the_fastest_tier_that_lacks_it():
    assert next_copy([[1, 2, 3], [1], []], [None] * 3) == Copy(3, 0, 1)
    assert next_copy([[1, 2, 3], [3], [1]], [None] * 3) == Copy(3, 0, 2)
    assert next_copy([[2], [3], []], [None] * 3) == Copy(3, 1, 2)
    assert next_copy([[3], [3], [3]], [None] * 3) is None
    assert next_copy([[], []], [None] * 2) is None
    assert next_copy([[3], [5]], [None] * 2) is None, "nothing older than what a tier has is sent there"


def test_a_tier_gets_the_first_step_of_each_stretch_and_at_the_end_the_newest():
    assert next_copy([[950], [0]], [None, 1000]) is None
    assert next_copy([[1010], [0]], [None, 1000]) == Copy(1010, 0, 1)
    assert next_copy([[1900], [1010]], [None, 1000]) is None
    assert next_copy([[1900], [1010]], [None, 1000], finishing=True) == Copy(1900, 0, 1)
    assert next_copy([[7], []], [None, 1000]) == Copy(7, 0, 1)


@given(
    held=st.lists(st.sets(st.integers(0, 30)), min_size=2, max_size=4),
    every=st.lists(st.sampled_from([None, 1, 5, 10]), min_size=4, max_size=4),
    finishing=st.booleans(),
)
def test_draining_ends_and_gives_every_tier_the_newest(held, every, finishing):
    for _ in range(100):
        copy = next_copy(held, every, finishing=finishing)
        if copy is None:
            break
        assert copy.step in held[copy.source]
        assert copy.step > max(held[copy.target], default=-1)
        held[copy.target].add(copy.step)
    else:
        raise AssertionError("it goes on for ever")
    if finishing:
        for slower in range(1, len(held)):
            newest = max((step for tier in held[:slower] for step in tier), default=-1)
            assert max(held[slower], default=-1) >= newest


def steps_in(path):
    return [info.step for info in Store(path).steps()]


def test_steps_are_drained_and_pruned_while_training_goes_on(tmp_path):
    two_tiers(tmp_path)
    store = f"shm, {tmp_path}/fast?keep=last=2, {tmp_path}/slow?every=20"
    finish_each_save(guarded(Toy(steps=60), store=store, checkpoint_every=5))
    assert steps_in(tmp_path / "fast") == [55, 60]
    slow = steps_in(tmp_path / "slow")
    assert slow[-1] == 60
    assert [step // 20 for step in slow] == sorted({step // 20 for step in slow}), "one of each stretch"
    assert all(Store(tmp_path / "slow").open(step).verify() == [] for step in slow)


def test_training_goes_on_from_the_slow_tier_when_the_fast_one_is_wiped(tmp_path):
    two_tiers(tmp_path)
    toy = Toy(steps=20)
    store = f"{tmp_path}/fast, {tmp_path}/slow"
    list(guarded(toy, store=store, checkpoint_every=10).steps)
    subprocess.run(["rm", "-r", str(tmp_path / "fast")], check=True)
    more = Toy(steps=30)
    job = guarded(more, store=store, checkpoint_every=10)
    assert [result.number for result in job.steps] == list(range(21, 31))
    assert job.digest() == plain(more)[0]
    assert steps_in(tmp_path / "fast") == [30]
    assert steps_in(tmp_path / "slow")[-2:] == [20, 30]


def test_a_copy_that_was_cut_off_is_finished_by_the_next_process(tmp_path):
    tiers = two_tiers(tmp_path)
    save(tiers.stores[0], 7)
    half = tmp_path / "slow" / "run" / "step-00000007"
    half.mkdir(parents=True)
    for name in ("attempt.json", "rank-00000.json"):
        (half / name).write_bytes((tmp_path / "fast" / "run" / "step-00000007" / name).read_bytes())
    drainer = Drainer(tiers)
    drainer.start()
    assert drainer.close(finish_within_s=30)
    assert steps_in(tmp_path / "slow") == [7]
    assert Store(tmp_path / "slow").open(7).verify() == []


def test_a_slow_tier_that_fails_is_told_once_and_tried_again(tmp_path, monkeypatch):
    tiers = two_tiers(tmp_path)
    save(tiers.stores[0], 7)
    create = LocalBackend.create
    fired = []

    def hurt(self, path, nbytes, *, exclusive):
        if self.root.name == "slow" and len(fired) < 3:
            fired.append(path)
            raise StoreFull("no space left. Free some.")
        return create(self, path, nbytes, exclusive=exclusive)

    monkeypatch.setattr(LocalBackend, "create", hurt)
    told = []
    drainer = Drainer(tiers, record=lambda **fields: told.append(fields["kind"]), first_pause_s=0.01)
    drainer.start()
    assert drainer.close(finish_within_s=30)
    assert len(fired) == 3
    assert told == ["tier_full"]
    assert steps_in(tmp_path / "slow") == [7]


# ---------------------------------------------------------------------- what a rollback gives up


def test_what_a_rollback_gave_up_is_in_quarantine_in_every_tier_for_the_next_job(tmp_path):
    two_tiers(tmp_path)
    job = guarded(Toy(steps=14), store=f"{tmp_path}/fast, {tmp_path}/slow", checkpoint_every=5)
    tiers = Tiers(parse_tiers(f"{tmp_path}/fast, {tmp_path}/slow"))

    def wait_for(condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    for step in job.steps:
        job.arc._engine._checkpointer.wait()
        if step.number == 14:
            wait_for(lambda: tiers.holders().get(10) == [0, 1])
            assert [store.newest().step for store in tiers.stores] == [10, 10]
            job.arc._engine._abandon(6, 11)  # what the guard says when it goes back to step 5
            wait_for(lambda: [store.newest().step for store in tiers.stores] == [5, 5])
    assert [info.step for info in tiers.steps() if info.certified] == [5, 14]


def test_arc_ls_shows_which_tier_holds_which_step(tmp_path, capsys):
    tiers = two_tiers(tmp_path)
    save(tiers.stores[0], 2)
    copy_run(tiers)
    save(tiers.stores[0], 4)
    damage(tmp_path / "slow" / "run" / "step-00000002" / "manifest.json", 200)
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    args = parser.parse_args(["ls", f"{tmp_path}/fast, {tmp_path}/slow", "--json"])
    assert args.run(args) == 1, "a damaged manifest is told by the exit code"
    fast, slow = str(tmp_path / "fast"), str(tmp_path / "slow")
    states = {row["step"]: row["tiers"] for row in json.loads(capsys.readouterr().out)}
    certified = states[4][fast]
    assert states == {2: {fast: certified, slow: "DAMAGED"}, 4: {fast: certified, slow: "-"}}
    args = parser.parse_args(["ls", f"{tmp_path}/fast, {tmp_path}/slow"])
    assert args.run(args) == 1
    assert "TIER 1" in capsys.readouterr().out
