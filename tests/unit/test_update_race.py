"""Two who change a VM's settings at one time: the later is refused rather than undoing what the earlier did."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica import catalog, protection
from replica.errors import LeaseHeldError
from replica.stores.store import Store
from tests.support.engine import BLOCK, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import RecordingStore


class _Slow(RecordingStore):
    """Lets somebody else remove a disk once the settings in force were read."""

    def __init__(self, inner: Store, lab: Lab) -> None:
        super().__init__(inner)
        self._lab: Lab | None = lab

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        data = super().get(key, start=start, length=length)
        if "/settings/" in key and self._lab is not None:
            lab, self._lab = self._lab, None
            protection.update(lab.store, lab.host, lab.found, disks=lab.paths[:1])
            lab.replicate()
        return data


def test_a_disk_that_was_removed_meanwhile_does_not_come_back_under_its_number(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 3), random_blocks(2, 3)], host=make_host())
    lab.replicate()
    with pytest.raises(LeaseHeldError, match="at the same moment"):
        protection.update(_Slow(lab.store, lab), lab.host, lab.found, disks=lab.paths)
    assert [one.number for one in catalog.settings_in_force(lab.store, lab.found).sources] == [0]
    protection.update(lab.store, lab.host, lab.found, disks=lab.paths)
    lab.patch(BLOCK, bytes(BLOCK), 1)
    point = lab.replicate()
    assert [disk.number for disk in point.disks] == [0, 2]
    assert lab.restore(point, 2) == lab.contents()[1]
