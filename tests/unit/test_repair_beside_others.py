"""Repair where the store reads short, and where another agent publishes as soon as the lease is given back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from replica import history, repair
from replica.model import Point
from tests.support.engine import WORKERS, make_host, make_lab, random_blocks
from tests.support.store_doubles import Fault, FaultKind, FaultyStore, _Around

T = TypeVar("T")


def test_a_manifest_that_was_read_short_is_not_taken_for_damaged(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 3)])
    lab.replicate()
    lab.patch(0, random_blocks(2, 1))
    lab.replicate()
    key = lab.found.keys.manifest(1)
    short = FaultyStore(lab.store, [Fault(FaultKind.SHORT_BODY, pattern=key)])
    planned = repair.plan(short, lab.host, lab.found, workers=WORKERS)
    assert planned.manifests == (1,)
    done = repair.repair(short, lab.host, lab.found, planned, workers=WORKERS)
    assert done.replaced_manifests == ()
    lab.assert_restores()


def test_a_point_that_is_published_as_soon_as_the_lease_is_free_is_reported_too(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 3)])
    lab.replicate()
    other = make_host(tmp_path / "other", name="host-b")

    class Released(_Around):
        def _call(self, kind: str, key: str, sent: int, work: Callable[[], T]) -> T:
            result = work()
            if kind == "replace" and b'"state":"released"' in lab.store.get(key):
                lab.patch(0, random_blocks(3, 1))
                lab.replicate(host=other)
            return result

    planned = repair.plan(lab.store, lab.host, lab.found, workers=WORKERS)
    done = repair.repair(Released(lab.store), lab.host, lab.found, planned, workers=WORKERS)
    points = [one.point for one in history.points(lab.store, lab.found.keys) if isinstance(one, Point)]
    assert [one.point for one in done.report.verdicts] == points == [1, 2]
