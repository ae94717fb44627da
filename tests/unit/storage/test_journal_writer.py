"""The thread that writes a journal: nothing lost, nothing reordered, faults told to who appends, and no waiting."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from lepton_dist.errors import StoppedEarly
from lepton_dist.storage.journal import Journal
from lepton_dist.storage.journal_writer import JournalWriter


def opened(path: Path) -> Journal:
    return Journal.open(path, {"run": "1"}, lambda line: (json.loads(line)["id"], False))


def row(number: int) -> tuple[bytes, str]:
    return json.dumps({"id": str(number)}).encode() + b"\n", str(number)


def test_rows_are_written_in_order_and_counted_once_on_disk(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as journal:
        with JournalWriter(journal, sync_every_s=0.01) as writer:
            for number in range(500):
                line, key = row(number)
                writer.append(line, key=key, is_error=number % 10 == 0)
                if number == 250:
                    writer.flush()
                    assert writer.num_done == 251 and len((tmp_path / "out").read_bytes().splitlines()) == 251
        assert writer.num_done == len(journal.done) == 500 and journal.error_rows == 50
        journal.complete()
    assert (tmp_path / "out").read_bytes() == b"".join(row(number)[0] for number in range(500))
    with opened(tmp_path / "out") as journal:
        assert journal.is_complete


def test_a_slow_disk_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        assert release.wait(20)
        fsync(descriptor)

    with opened(tmp_path / "out") as journal:
        monkeypatch.setattr("lepton_dist.storage.journal.os.fsync", slow)
        with JournalWriter(journal, sync_every_s=0.0) as writer:
            for number in range(100):  # would never end if one of them waited for the disk
                line, key = row(number)
                writer.append(line, key=key, is_error=False)
                time.sleep(0.001)
            assert writer.num_done == 0
            release.set()
            writer.flush()
            assert writer.num_done == 100


def test_a_failing_disk_is_told_to_who_appends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    journal = opened(tmp_path / "out")
    with JournalWriter(journal, sync_every_s=0.0) as writer:
        monkeypatch.setattr("lepton_dist.storage.journal.write_all", full)
        writer.append(row(0)[0], key="0", is_error=False)
        with pytest.raises(StoppedEarly, match=r"No space left on device \(after 0 rows\)"):
            writer.flush()
        for act in (writer.check, lambda: writer.append(row(1)[0], key="1", is_error=False)):
            with pytest.raises(StoppedEarly):
                act()
    journal.close()
    assert (tmp_path / "out").read_bytes() == b""
