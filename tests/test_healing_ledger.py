"""The account of healing that outlives a process."""

from __future__ import annotations

from arc_dist.healing.ledger import Ledger


def test_an_account_is_read_back_and_replaced_as_a_whole(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.read() is None
    for number in range(3):
        ledger.write({"history": {"decisions": number}, "skipped": list(range(number))})
        assert Ledger(tmp_path).read() == {"history": {"decisions": number}, "skipped": list(range(number))}
    assert [path.name for path in tmp_path.iterdir()] == ["healing.json"]


def test_without_a_directory_nothing_is_kept():
    ledger = Ledger(None)
    ledger.write({"history": {}})
    assert ledger.read() is None


def test_what_cannot_be_read_or_written_is_said_and_stops_nothing(tmp_path, caplog):
    caplog.set_level("WARNING", logger="arc_dist")
    ledger = Ledger(tmp_path)
    ledger.path.write_text('{"history":')
    assert ledger.read() is None
    assert "cannot be read" in caplog.text
    ledger.path.write_text("[]")
    assert ledger.read() is None
    gone = Ledger(tmp_path / "gone")
    gone.write({"history": {}})
    assert "would be lost" in caplog.text
