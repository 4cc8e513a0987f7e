"""The verdict on a machine's disks: short, the grave first, within bounds, and never an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from conversion.finding import RULES_VERSION, Finding, Severity
from replica.errors import SourceError
from replica.generation import convertibility, verdict
from replica.generation.convertibility import LONGEST_TEXT, MOST_RANGES, Convertibility, Verdict
from replica.generation.verdict import coarsened, judged
from replica.record import Fields
from tests.support import conversion_disks as disks
from tests.support.conversion_disks import BASIC_DATA, PLAIN_SECTORS, Place, plain_places
from vhdx.disk import Disk
from vhdx.raw import RawDisk

pytestmark = pytest.mark.skipif(bool(disks.missing()), reason=disks.missing() or "all is there")

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
Judge = Callable[..., Convertibility]


class Counted:
    """A disk whose reads are counted; one of them may fail."""

    def __init__(self, inner: Disk, error: BaseException | None = None, *, after: int = 0) -> None:
        self._inner = inner
        self._error = error
        self._after = after
        self.size = inner.size
        self.sector_size = inner.sector_size
        self.read = set[int]()
        self.reads = 0

    def read_at(self, offset: int, length: int) -> bytes:
        self.reads += 1
        if self._error is not None and self.reads > self._after:
            raise self._error
        self.read.update(range(offset >> 16, (offset + max(length, 1) - 1 >> 16) + 1))
        return self._inner.read_at(offset, length)


def make(folder: Path, **changes: Any) -> Path:
    (folder / "made").mkdir()
    esp = disks.make_esp(folder / "made", disks.esp_files() | {"EFI/debian/shimx64.efi": b"MZ"})
    root = disks.make_root(folder / "made", disks.root_files(**changes))
    return disks.make_disk(plain_places(esp, root), PLAIN_SECTORS).to_file(folder / "disk.raw")


def data_disk(folder: Path) -> Path:
    return disks.make_disk([Place(1, BASIC_DATA, 2048, 64)], 8192).to_file(folder / "data.raw")


def judge(*opened: Any, generation: int = 2, monotonic: Callable[[], float] = lambda: 7.0) -> Convertibility:
    return judged(list(enumerate(opened)), generation=generation, now=NOW, monotonic=monotonic)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("good"))


@contextmanager
def counted(path: Path, error: BaseException | None = None, *, after: int = 0) -> Iterator[Counted]:
    with RawDisk.open(path) as disk:
        yield Counted(disk, error, after=after)


def kept(found: Convertibility) -> Convertibility | None:
    """Return it as a later cycle reads it."""
    return convertibility.decode(Fields(json.loads(json.dumps(convertibility.encode(found))), "manifest"))


def test_a_disk_that_converts(good: Path) -> None:
    with counted(good) as disk:
        found = judge(disk)
    assert (found.verdict, found.system, found.disk) == (Verdict.CONVERTIBLE, "Debian GNU/Linux 12 (bookworm)", 0)
    assert [(one.rule, one.severity) for one in found.findings] == [("secure-boot", Severity.WARNING)]
    assert (found.rules, found.judged_at, found.pending, found.refusals) == (RULES_VERSION, NOW, False, ())
    assert kept(found) == found
    assert len(json.dumps(convertibility.encode(found))) < 1500


def test_it_remembers_every_block_that_it_read_and_no_other(good: Path) -> None:
    with counted(good) as disk:
        (looked,) = judge(disk).inspected
    assert {block for first, end in looked.blocks for block in range(first, end)} == disk.read
    assert (looked.disk, looked.size) == (0, good.stat().st_size)


def test_refusals_come_first_and_texts_are_short(tmp_path: Path) -> None:
    with counted(make(tmp_path, fstab=f"PARTLABEL={'x' * 400} / ext4 defaults 0 1\n")) as disk:
        found = judge(disk)
    assert found.verdict is Verdict.REFUSED
    assert [one.severity for one in found.findings] == [Severity.REFUSAL, Severity.WARNING]
    assert [one.rule for one in found.refusals] == ["fstab-partlabel"]
    assert len(found.findings[0].evidence) == LONGEST_TEXT
    assert all(one.message and one.remedy for one in found.refusals)
    assert kept(found) == found
    assert found.document()["convertible"] is False


def test_the_system_is_sought_on_disk_after_disk(good: Path, tmp_path: Path) -> None:
    with counted(data_disk(tmp_path)) as data, counted(good) as disk, counted(good) as never:
        found = judge(data, disk, never)
    assert (found.verdict, found.disk) == (Verdict.CONVERTIBLE, 1)
    assert [one.disk for one in found.inspected] == [0, 1]
    assert never.reads == 0


def test_a_machine_of_generation_1_needs_none_and_nothing_is_read(good: Path) -> None:
    with counted(good) as disk:
        found = judge(disk, generation=1)
    assert (found.verdict, found.findings, disk.reads) == (Verdict.NOT_NEEDED, (), 0)
    assert kept(found) == found


def test_a_machine_without_any_system_to_start_is_refused_and_told_why(tmp_path: Path) -> None:
    with counted(data_disk(tmp_path)) as data:
        found = judge(data)
    assert found.verdict is Verdict.REFUSED
    assert [one.rule for one in found.refusals] == ["no-esp"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SourceError("the server is gone", path="nbd"), "the server is gone"),
        (KeyError("x"), "KeyError"),
        (MemoryError(), "MemoryError"),
        (RecursionError("too deep"), "RecursionError"),
    ],
)
@pytest.mark.parametrize("after", [0, 3])
def test_whatever_goes_wrong_is_unknown_with_its_reason(good: Path, error: Exception, said: str, after: int) -> None:
    with counted(good, error, after=after) as disk:
        found = judge(disk)
    assert found.verdict is Verdict.UNKNOWN
    assert said in found.because
    assert (found.pending, found.findings) == (True, ())
    assert kept(found) == found


def test_an_interruption_is_not_swallowed(good: Path) -> None:
    with counted(good, KeyboardInterrupt()) as disk, pytest.raises(KeyboardInterrupt):
        judge(disk)


def test_it_gives_up_once_its_time_is_over(good: Path) -> None:
    times = iter(range(0, 10_000, 4))
    with counted(good) as disk:
        found = judge(disk, monotonic=lambda: float(next(times)))
    assert (found.verdict, found.because) == (Verdict.UNKNOWN, "the inspection took too long")
    assert 0 < disk.reads <= verdict.MOST_SECONDS
    assert found.seconds > verdict.MOST_SECONDS


@pytest.mark.parametrize("bound", ["MOST_BYTES", "MOST_READS"])
def test_it_gives_up_where_it_would_read_without_end(good: Path, bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, bound, 3)
    with counted(good) as disk:
        found = judge(disk)
    assert (found.verdict, found.because) == (Verdict.UNKNOWN, "the inspection would read more than it may")
    assert disk.reads <= 3


def test_many_ranges_become_few_that_hold_them_all() -> None:
    ranges = [(10 * number + (number % 7), 10 * number + 8) for number in range(1000)]
    few = coarsened(ranges, MOST_RANGES)
    assert len(few) == MOST_RANGES
    assert all(any(first <= one[0] and one[1] <= end for first, end in few) for one in ranges)
    assert all(end < first for (_, end), (first, _) in pairwise(few))
    assert coarsened([(0, 1), (3, 4), (5, 6)], 2) == ((0, 1), (3, 6))
    assert coarsened([(0, 1), (5, 6)], 1) == ((0, 6),)
    assert coarsened([], 1) == ()


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "maybe"},
        {"judged_at": "yesterday"},
        {"rules": -1},
        {"generation": 3},
        {"seconds": "long"},
        {"disk": 1 << 20},
        {"pending": 1},
        {"findings": [{}] * 13},
        {"findings": [{"rule": "x", "severity": "odd", "subject": "", "message": "", "evidence": "", "remedy": ""}]},
        {"inspected": [{"disk": 0, "size_bytes": 1 << 20, "blocks": [3]}]},
        {"inspected": [{"disk": 0, "size_bytes": 1 << 20, "blocks": [3, 3]}]},
        {"inspected": [{"disk": 0, "size_bytes": 1 << 20, "blocks": [3, 17]}]},
        {"inspected": [{"disk": 0, "size_bytes": 1 << 30, "blocks": list(range(2 * MOST_RANGES + 2))}]},
        {"inspected": [{"disk": 0, "size_bytes": 1 << 20, "blocks": []}] * 17},
        {"system": 1},
    ],
)
def test_what_is_not_understood_counts_as_nothing_said(change: dict[str, Any]) -> None:
    body = convertibility.encode(Convertibility(Verdict.CONVERTIBLE, NOW, disk=0))
    assert convertibility.decode(Fields(body, "manifest")) is not None
    assert convertibility.decode(Fields({**body, **change}, "manifest")) is None


def test_what_is_kept_is_bounded() -> None:
    largest = Convertibility(
        Verdict.REFUSED,
        NOW,
        system="s" * LONGEST_TEXT,
        findings=verdict._kept([_finding("x" * 10_000)] * 100),
        inspected=(convertibility.Inspected(0, 64 << 40, coarsened([(2 * n, 2 * n + 1) for n in range(10**5)], 256)),),
    )
    assert len(json.dumps(convertibility.encode(largest))) < 20 << 10


def _finding(text: str) -> Finding:
    return Finding("rule", Severity.REFUSAL, text, text, text, text)
