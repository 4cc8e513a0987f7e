"""A VM that the survey's listing did not show yet: its collection finds nothing to delete."""

from __future__ import annotations

from pathlib import Path

from replica import garbage
from tests.support.engine import BLOCK, make_host, make_lab, random_blocks


def test_a_vm_that_was_not_listed_loses_nothing(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 4)], host=make_host())
    references = garbage.survey(lab.store, "default")
    unlisted = garbage.survey(lab.store, "another")
    for seed in range(3):
        lab.patch(BLOCK, random_blocks(10 + seed, 1))
        lab.replicate()
    for known in (references, unlisted):
        for _ in range(2):
            done = garbage.collect(lab.store, lab.host, lab.found, known, grace=garbage.GRACE * 0)
            assert done.condemned.objects == done.deleted.objects == 0
    lab.assert_restores()
