"""Pruning, pins and garbage collection over every store: what is kept restores, what is not gives its room back."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from replica import garbage, history, pins, prune, retention
from replica.model import Point
from replica.stores.address import open_store
from replica.stores.store import Store
from replica.verify import verify
from tests.support.engine import WORKERS, make_host, make_lab, random_blocks
from tests.support.servers import S3Server

KINDS = ("memory", "file", pytest.param("s3", marks=[pytest.mark.server, pytest.mark.xdist_group("seaweedfs")]))


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("seaweedfs")
        address = server.url(f"housekeeping/{secrets.token_hex(6)}")
    else:
        address = f"memory:{secrets.token_hex(6)}" if request.param == "memory" else str(tmp_path / "store")
    opened = open_store(address, create=True)
    yield opened
    opened.close()


def test_old_points_are_removed_over_every_store(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replica.blockmap.MERGE_MAPS", 2)
    lab = make_lab(tmp_path / "vm", [random_blocks(1, 4)], store=store, host=make_host(tmp_path / "state"))
    for turn in range(6):
        lab.write(random_blocks(turn + 20, 4))
        lab.replicate()
    keys, rule = lab.found.keys, retention.parse("last:1")
    pins.pin(store, lab.host, lab.found, 2, "größer ☃")
    assert [one.point for one in prune.plan(store, lab.host, lab.found, rule=rule).removed] == [1, 3, 4, 5]
    prune.prune(store, lab.host, lab.found, rule=rule)
    assert [one.point for one in history.points(store, keys) if isinstance(one, Point)] == [2, 6]

    def collect() -> garbage.Collection:
        references = garbage.survey(store, keys.tenant, workers=WORKERS)
        return garbage.collect(store, lab.host, lab.found, references, grace=timedelta(), workers=WORKERS)

    def held() -> list[int]:
        return [info.size for prefix in (keys.segments, keys.maps) for info in store.list(prefix)]

    before = held()
    condemned = collect().condemned
    done = collect()
    after = held()
    assert done.deleted == condemned
    assert done.deleted.objects == len(before) - len(after) >= 6
    assert done.deleted.bytes == sum(before) - sum(after)
    assert list(store.list(keys.condemned)) == []
    lab.write(random_blocks(99, 4))
    lab.replicate()
    lab.assert_restores(2, 6, 7)
    assert not verify(store, make_host(name="another machine"), lab.found, full=True, workers=WORKERS).damaged
