"""By what machines are known: on their platforms, and at home before a failover."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from replica.failover.identity import identities_at_home
from replica.model import Identity, Machine, Nic, Point
from tests.support.engine import make_lab, random_blocks

MACHINE = Machine(2, nics=(Nic("52:54:00:00:00:01"), Nic(None)))


@pytest.fixture
def point(tmp_path: Path) -> Point:
    return make_lab(tmp_path, [random_blocks(1, 2), random_blocks(2, 2)]).replicate()


def read_from(point: Point, **source: str) -> Point:
    return replace(point, disks=tuple(replace(one, source=dict(source)) for one in point.disks))


def test_a_domain_is_known_by_its_uuid_which_its_guest_sees(point: Point) -> None:
    found = identities_at_home(MACHINE, read_from(point, kind="libvirt", domain="6f0d", disk="vda"))
    assert found == (Identity("libvirt", "6f0d", "6f0d", ("52:54:00:00:00:01",)),)


def test_a_vm_of_hyperv_is_known_by_its_identifier(point: Point) -> None:
    found = identities_at_home(MACHINE, read_from(point, kind="hyperv", vm="60d1", disk="scsi-0-1"))
    assert found == (Identity("hyperv", "60d1", "", ("52:54:00:00:00:01",)),)


def test_files_tell_nothing_of_their_machine(point: Point) -> None:
    assert identities_at_home(MACHINE, point) == ()
    assert identities_at_home(MACHINE, read_from(point, kind="libvirt")) == ()
