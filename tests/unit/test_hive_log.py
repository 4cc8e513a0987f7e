"""Dirty hives and their logs: what is applied, what stops it, and what the hive is afterwards."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from regipy.recovery import apply_transaction_logs

from conversion.errors import ConversionError, DamagedError
from conversion.windows.hive import BaseBlock, Hive
from conversion.windows.hivelog import entries_of, marvin32, recover
from tests.support import windows_disk
from tests.support.hive_builder import base_block, build_hive, tree

PAGE = 4096
BEFORE = build_hive(tree({"Key": {"x": 1}}), sequences=(8, 7))
AFTER = build_hive(tree({"Key": {"x": 2, "y": 3}, "New": {}}))


def entry(sequence: int, pages: dict[int, bytes], *, bins: int | None = None, flags: int = 0) -> bytes:
    """Return a log entry. ``pages`` are by offset from the first bin."""
    bins = len(AFTER) - PAGE if bins is None else bins
    body = b"".join(struct.pack("<II", at, len(page)) for at, page in pages.items()) + b"".join(pages.values())
    size = -(-(40 + len(body)) // 512) * 512
    body = body.ljust(size - 40, b"\0")
    head = struct.pack("<4sIIIIIQ", b"HvLE", size, flags, sequence, bins, len(pages), marvin32(body))
    return head + struct.pack("<Q", marvin32(head)) + body


def log(sequence: int, *entries: bytes) -> bytes:
    block = base_block((sequence, sequence), len(AFTER) - PAGE, kind=6)[:512]
    return block + b"".join(entries) + bytes(512)


def bins(content: bytes) -> bytes:
    return content[PAGE:]


WHOLE = {0: bins(AFTER)}


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0x30ED35C100CD3C7D),
        (b"\xaf", 0x48E73FC77D75DDC1),
        (b"\xe7\x0f", 0xB5F6E1FC485DBFF8),
        (b"\x37\xf4\x95", 0xF0B07C789B8CF7E8),
        (b"\x86\x42\xdc\x59", 0x7008F2E87E9CF556),
        (b"\x15\x3f\xb7\x98\x26", 0xE6C08C6DA2AFA997),
    ],
)
def test_marvin32_gives_the_published_values(data: bytes, value: int) -> None:
    assert marvin32(data, 0x004FB61A001BDBCC) == value


def test_a_clean_hive_is_left_as_it_is_whatever_its_logs_say() -> None:
    done = recover(AFTER, [log(1, entry(1, {0: b"\xff" * PAGE}))])
    assert done.content == AFTER
    assert not done.was_dirty
    assert done.entries == 0
    assert done.highest_sequence == 1


def test_an_entry_is_applied_and_the_hive_is_clean_then() -> None:
    done = recover(BEFORE, [log(7, entry(7, WHOLE))])
    base = BaseBlock.decode(done.content, subject="hive")
    assert bins(done.content) == bins(AFTER)
    assert (base.primary_sequence, base.secondary_sequence, base.intact) == (7, 7, True)
    assert (done.was_dirty, done.entries, done.highest_sequence) == (True, 1, 8)


def test_both_logs_are_applied_in_the_order_of_their_numbers() -> None:
    old = {0: b"\xee" * PAGE}
    first, second = log(7, entry(7, old), entry(8, old)), log(9, entry(9, WHOLE))
    for logs in ([first, second], [second, first], [b"", second, None, first]):
        done = recover(BEFORE, logs)
        assert bins(done.content) == bins(AFTER)
        assert (done.entries, done.highest_sequence) == (3, 9)


def test_the_hive_grows_and_takes_its_flag_as_the_entries_say() -> None:
    bigger = bins(AFTER) + b"hbin".ljust(PAGE, b"\0")
    done = recover(BEFORE, [log(7, entry(7, {0: bigger}, bins=len(bigger), flags=1))])
    assert len(done.content) == PAGE + len(bigger)
    assert BaseBlock.decode(done.content, subject="hive").bins_bytes == len(bigger)
    assert done.content[144] == 1


@pytest.mark.parametrize("damaged", ["page", "head", "number"])
def test_a_damaged_entry_ends_the_chain_before_it(damaged: str) -> None:
    broken = bytearray(entry(9 if damaged == "number" else 8, {0: b"\xee" * PAGE}))
    if damaged != "number":
        broken[600 if damaged == "page" else 8] ^= 1
    done = recover(BEFORE, [log(7, entry(7, WHOLE), bytes(broken), entry(9, {0: b"\xdd" * PAGE}))])
    assert bins(done.content) == bins(AFTER)
    assert done.entries == 1
    assert done.highest_sequence == 9  # later ones stand there, so the hive has to be numbered above them


def test_a_log_that_does_not_continue_the_other_is_not_applied() -> None:
    done = recover(BEFORE, [log(7, entry(7, WHOLE)), log(9, entry(9, {0: b"\xee" * PAGE}))])
    assert bins(done.content) == bins(AFTER)
    assert done.entries == 1


@pytest.mark.parametrize(
    "logs",
    [
        [],
        [None, b""],
        [b"no log at all" * 100],
        [log(6, entry(6, WHOLE))],  # older than what the hive holds already
        [log(7, entry(8, WHOLE))],  # not the entry that the log says it begins with
        [log(7)],
        [log(7, entry(7, WHOLE))[:3000]],
        [log(7, entry(7, {len(AFTER) - PAGE - 512: b"\xee" * PAGE}))],  # a page beyond the bins
        [log(7, entry(7, WHOLE, bins=1000))],
    ],
)
def test_a_dirty_hive_without_a_log_that_fits_is_refused(logs: list[bytes | None]) -> None:
    with pytest.raises(DamagedError) as caught:
        recover(BEFORE, logs)
    assert caught.value.hint


def test_a_damaged_base_block_is_taken_from_the_later_log() -> None:
    broken = bytearray(BEFORE)
    broken[508] ^= 1
    done = recover(bytes(broken), [log(7, entry(7, {0: b"\xee" * PAGE})), log(8, entry(8, WHOLE))])
    base = BaseBlock.decode(done.content, subject="hive")
    assert bins(done.content) == bins(AFTER)
    assert (base.intact, base.file_type, base.primary_sequence) == (True, 0, 8)


def old_log(pages: dict[int, bytes], *, sequences: tuple[int, int] = (8, 8), written: int = 0) -> bytes:
    """Return a log of the old format. ``pages`` are by number, of 512 bytes."""
    size = len(AFTER) - PAGE
    bitmap = bytearray(size // 512 // 8)
    for number in pages:
        bitmap[number // 8] |= 1 << number % 8
    block = base_block(sequences, size, kind=1, written=written)[:512]
    vector = b"DIRT" + bytes(bitmap)
    return block + vector.ljust(-(-len(vector) // 512) * 512, b"\0") + b"".join(pages[at] for at in sorted(pages))


OLD_PAGES = {at // 512: bins(AFTER)[at : at + 512] for at in range(0, len(AFTER) - PAGE, 512)}


def test_a_log_of_the_old_format_is_applied() -> None:
    done = recover(BEFORE, [old_log(OLD_PAGES)])
    assert bins(done.content) == bins(AFTER)
    assert not BaseBlock.decode(done.content, subject="hive").is_dirty
    assert done.entries == len(OLD_PAGES)


def test_a_page_of_an_old_log_goes_where_its_bit_says() -> None:
    done = recover(BEFORE, [old_log({3: b"3" * 512, 6: b"6" * 512})])
    changed = bytearray(bins(BEFORE))
    changed[3 * 512 : 4 * 512] = b"3" * 512
    changed[6 * 512 : 7 * 512] = b"6" * 512
    assert bins(done.content) == bytes(changed)


@pytest.mark.parametrize(
    "log_file",
    [
        old_log(OLD_PAGES, sequences=(8, 7)),
        old_log(OLD_PAGES, written=5),
        old_log(OLD_PAGES)[:-512],
        old_log(OLD_PAGES).replace(b"DIRT", b"TRID"),
    ],
)
def test_an_old_log_that_does_not_fit_is_refused(log_file: bytes) -> None:
    with pytest.raises(DamagedError):
        recover(BEFORE, [log_file])


def test_an_old_log_beside_new_ones_is_left_alone() -> None:
    done = recover(BEFORE, [log(7, entry(7, WHOLE)), old_log({0: b"\xee" * 512})])
    assert bins(done.content) == bins(AFTER)


def test_logs_cut_anywhere_end_in_an_error_of_ours_or_a_hive() -> None:
    for whole in (log(7, entry(7, WHOLE), entry(8, WHOLE)), old_log(OLD_PAGES)):
        for end in range(0, len(whole), 97):
            try:
                done = recover(BEFORE, [whole[:end]])
            except ConversionError:
                continue
            assert not BaseBlock.decode(done.content, subject="hive").is_dirty


@pytest.mark.skipif(not windows_disk.SAMPLES.is_dir(), reason=windows_disk.NO_SAMPLES)
def test_the_sample_is_recovered_as_regipy_recovers_it_log_by_log(tmp_path: Path) -> None:
    content, logs = windows_disk.sample("SYSTEM_B"), [windows_disk.sample(f"SYSTEM_B.LOG{n}") for n in (1, 2)]
    # regipy takes two logs in a fixed order, whichever is the earlier; so it is given one after the other.
    for name, data in (("hive", content), ("LOG1", logs[0]), ("LOG2", logs[1])):
        (tmp_path / name).write_bytes(data)
    apply_transaction_logs(str(tmp_path / "hive"), str(tmp_path / "LOG1"), restored_hive_path=str(tmp_path / "one"))
    apply_transaction_logs(str(tmp_path / "one"), str(tmp_path / "LOG2"), restored_hive_path=str(tmp_path / "two"))

    done = recover(content, logs)

    assert [each.sequence for each in entries_of(logs[1])] == list(range(2111, 2131))
    assert (done.was_dirty, done.entries, done.highest_sequence) == (True, 24, 2130)
    assert len(done.content) == len(content)
    assert bins(done.content) == bins((tmp_path / "two").read_bytes())
    assert sum(1 for _ in Hive(done.content).walk()) == 35595
