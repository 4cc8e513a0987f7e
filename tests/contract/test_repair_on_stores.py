"""Repair over every store: what is damaged or lost is put back under its key, and a manifest gives way to a fence."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica import history, packer
from replica.model import Fence
from replica.repair import plan, repair
from replica.stores.address import open_store
from replica.stores.store import Store
from replica.verify import verify
from tests.support.damage import harm, segments
from tests.support.engine import BLOCK, WORKERS, make_host, make_lab, random_blocks
from tests.support.servers import S3Server

KINDS = ("memory", "file", pytest.param("s3", marks=[pytest.mark.server, pytest.mark.xdist_group("seaweedfs")]))


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("seaweedfs")
        address = server.url(f"repair/{secrets.token_hex(6)}")
    else:
        address = f"memory:{secrets.token_hex(6)}" if request.param == "memory" else str(tmp_path / "store")
    opened = open_store(address, create=True)
    yield opened
    opened.close()


def test_a_store_is_repaired_and_every_point_restores(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer, "SEGMENT_FRAMES", 4)
    monkeypatch.setattr("replica.scan.BATCH_BLOCKS", 4)
    lab = make_lab(tmp_path / "vm", [random_blocks(1, 12)], store=store, host=make_host())
    for turn in range(3):
        lab.replicate()
        lab.patch((turn + 1) * BLOCK, random_blocks(turn + 20, 1))
    lab.replicate()
    _, lost, flipped = segments(lab, 1)
    before = {key: store.get(key) for key in (lost, flipped)}
    harm(store, lost, "missing")
    harm(store, flipped, "flipped")
    harm(store, lab.found.keys.manifest(2), "flipped")
    planned = plan(store, lab.host, lab.found, workers=WORKERS)
    done = repair(store, lab.host, lab.found, planned, workers=WORKERS)
    lab.published[5] = lab.contents()
    assert done.is_whole
    assert done.replaced_manifests == (2,)
    assert isinstance(history.read(store, lab.found.keys, 2), Fence)
    assert set(done.healed) == {lost, flipped}
    assert {key: store.get(key) for key in before} == before
    again = verify(store, make_host(name="another machine"), lab.found, full=True, workers=WORKERS)
    assert not again.damaged
    assert [verdict.point for verdict in again.verdicts] == [1, 3, 4, 5]
    lab.assert_restores(1, 3, 4, 5)
