"""The whole way of a VM over every store: protected, replicated twice, restored, verified."""

from __future__ import annotations

import io
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli import main
from cli.output import Output
from replica import history, protection
from replica.model import Point
from replica.stores.address import open_store
from replica.stores.probe import probe_store
from replica.stores.store import Store
from replica.vault import Vault
from replica.verify import verify
from tests.support.encryption import give_key, vault_for
from tests.support.engine import BLOCK, WORKERS, make_host, make_lab, random_blocks
from tests.support.servers import S3Server

KINDS = (
    "memory",
    "file",
    pytest.param("s3", marks=[pytest.mark.server, pytest.mark.xdist_group("seaweedfs")]),
)


@pytest.fixture(params=[False, True], ids=["in clear", "encrypted"])
def vault(request: pytest.FixtureRequest) -> Vault | None:
    return vault_for() if request.param else None


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path, vault: Vault | None) -> Iterator[Store]:
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("seaweedfs")
        address = server.url(f"replication/{secrets.token_hex(6)}")
    else:
        address = f"memory:{secrets.token_hex(6)}" if request.param == "memory" else str(tmp_path / "store")
    opened = open_store(address, create=True, around=vault.around if vault else None)
    if vault:
        give_key(opened)
    yield opened
    opened.close()


def test_a_vm_is_replicated_and_restored_over_every_store(store: Store, vault: Vault | None, tmp_path: Path) -> None:
    probe_store(store)
    disks = [random_blocks(1, 40) + bytes(BLOCK * 5) + b"tail" * 128, bytes(BLOCK * 9)]
    lab = make_lab(
        tmp_path / "vm", disks, store=store, host=make_host(tmp_path / "state"), name="größe 1/2", vault=vault
    )
    first = lab.replicate()
    lab.patch(7 * BLOCK - 5, b"over the edge of a block")
    lab.patch(3 * BLOCK, random_blocks(9, 1), 1)
    lab.patch(20 * BLOCK, bytes(BLOCK))
    second = lab.replicate()
    assert (first.cycle.changed_blocks, second.cycle.changed_blocks, second.cycle.zero_blocks) == (41, 3, 1)
    lab.replicate()
    fresh = make_host(name="another machine")
    for point, held in lab.published.items():
        for number, data in enumerate(held):
            assert lab.restore(point, number, host=fresh) == data
    report = verify(store, fresh, lab.found, full=True, workers=WORKERS)
    assert not report.damaged
    assert [one.point for one in history.points(store, lab.found.keys) if isinstance(one, Point)] == [1, 2, 3]
    protection.update(store, lab.host, lab.found, disks=[lab.paths[1]], interval_seconds=60)
    assert [disk.number for disk in lab.replicate().disks] == [1]


@pytest.mark.server
def test_init_refuses_a_store_that_ignores_conditions(rclone_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GODWIT_STORE", raising=False)
    output = Output(stdout=io.StringIO(), stderr=io.StringIO())
    code = main.run(["init", rclone_s3.url("refused")], output)
    assert isinstance(output.stderr, io.StringIO)
    told = output.stderr.getvalue()
    assert code == 10
    assert "If-None-Match" in told or "create" in told, told
    assert "Traceback" not in told
    again = Output(stdout=io.StringIO(), stderr=io.StringIO())
    assert main.run(["status", "--store", rclone_s3.url("refused")], again) == 10
