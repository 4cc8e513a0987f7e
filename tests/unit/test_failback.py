"""Disks that come home: what is read and written is what differs, and they hold what they are to hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.engine import BLOCK, random_blocks
from tests.support.home_lab import changed, make_home_lab

SIZE_BLOCKS = 96


def content(seed: int = 1) -> bytes:
    """Return a disk of 6 MiB, a third of it zeros."""
    return random_blocks(seed, 32) + bytes(32 * BLOCK) + random_blocks(seed + 1, 32)


@pytest.mark.parametrize("kind", ["vhdx", "vhdx-fixed", "raw", "vhd", "vhd-dynamic"])
def test_a_disk_comes_home_as_the_newest_point_has_it(tmp_path: Path, kind: str) -> None:
    data = content()
    lab = make_home_lab(tmp_path, [data], [changed(data, 5)], kind=kind)
    done = lab.bring()
    lab.assert_home()
    assert [one.how for one in done.disks] == ["overlay" if kind.startswith("vhdx") else "copy"]
    assert lab.asked == []
    print(done)
    again = lab.bring()
    assert (again.disks[0].how, again.disks[0].written_bytes) == ("was-home", 0)
    lab.assert_home()
