"""Page blobs: what uploads rely on, on Azurite as on the double that other tests use; and uploads to Azurite itself."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from azure.storage.blob import ContainerSasPermissions, generate_container_sas

from replica.errors import PlatformError
from replica.platforms.azure.settings import Container
from replica.platforms.azure.storage import Blobs
from replica.platforms.azure.target import BlobHeldError, BlobLostError, BlobUnreachableError, PageBlob
from replica.platforms.azure.upload import Order, Pace, upload
from tests.support.azurite import ACCOUNT, CONTAINER, KEY, Azurite, azurite
from tests.support.page_blobs import MemoryBlob, WatchedBlob
from tests.support.servers import program
from tests.support.store_doubles import CrashMode, SimulatedCrash
from vhdx.raw import RawDisk
from vhdx.vhd import open_vhd

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("azurite")]

MIB = 1 << 20
HERE, ELSEWHERE = str(uuid4()), str(uuid4())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    with azurite(tmp_path_factory.mktemp("azurite")) as running:
        yield running


@pytest.fixture
def blobs(server: Azurite) -> Iterator[Blobs]:
    opened = Blobs(Container(server.container, ACCOUNT), server.environment)
    yield opened
    opened.close()


@pytest.fixture(params=["memory", "azurite"])
def blob(request: pytest.FixtureRequest) -> PageBlob:
    if request.param == "memory":
        return MemoryBlob()
    opened: Blobs = request.getfixturevalue("blobs")
    return opened.blob(f"{uuid4()}/disk-0.vhd")


def order(**changes: object) -> Order:
    fields: dict[str, object] = {"content": "content", "lease": HERE, "created": datetime(2026, 3, 1, tzinfo=UTC)}
    return Order(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_blob_is_made_once_and_is_zeros_until_it_is_written_to(blob: PageBlob) -> None:
    assert blob.look() is None
    assert blob.create(8 * MIB + 512, {"godwit_content": "a"})
    assert not blob.create(512, {"godwit_content": "b"})
    state = blob.look()
    assert state is not None and (state.size, state.metadata, state.is_page_blob) == (
        8 * MIB + 512,
        {"godwit_content": "a"},
        True,
    )
    assert list(blob.ranges()) == []
    blob.acquire(HERE, 60)
    assert not blob.create(512, {"godwit_content": "b"})  # nor while it is leased
    blob.put(HERE, MIB, b"a" * MIB)
    blob.put(HERE, 8 * MIB, b"f" * 512)
    blob.put(HERE, 2 * MIB, b"b" * 512)
    assert list(blob.ranges()) == [(MIB, 2 * MIB + 512), (8 * MIB, 8 * MIB + 512)]
    assert blob.read(2 * MIB - 2, 4) == b"aabb"
    assert blob.read(0, MIB) == bytes(MIB)
    blob.note(HERE, {"godwit_state": "whole"})
    state = blob.look()
    assert state is not None and state.metadata == {"godwit_state": "whole"}
    blob.delete()  # leased or not
    assert blob.look() is None
    blob.delete()


def test_a_lease_keeps_others_out_and_its_holder_has_it_again_at_once(blob: PageBlob) -> None:
    blob.create(MIB, {})
    blob.acquire(HERE, 60)
    blob.acquire(HERE, 60)
    blob.renew(HERE)
    with pytest.raises(BlobHeldError):
        blob.acquire(ELSEWHERE, 60)
    for change in (
        lambda: blob.put(ELSEWHERE, 0, b"x" * 512),
        lambda: blob.note(ELSEWHERE, {}),
        lambda: blob.renew(ELSEWHERE),
        lambda: blob.release(ELSEWHERE),
    ):
        with pytest.raises(BlobLostError):
            change()
    assert list(blob.ranges()) == []
    blob.release(HERE)
    for change in (lambda: blob.put(HERE, 0, b"x" * 512), lambda: blob.renew(HERE), lambda: blob.note(HERE, {})):
        with pytest.raises(BlobLostError):
            change()
    blob.acquire(ELSEWHERE, 60)
    blob.put(ELSEWHERE, 0, b"x" * 512)


def test_what_is_done_to_a_blob_that_is_gone_says_so(blob: PageBlob) -> None:
    for change in (
        lambda: blob.acquire(HERE, 60),
        lambda: blob.renew(HERE),
        lambda: blob.put(HERE, 0, b"x" * 512),
        lambda: blob.note(HERE, {}),
        lambda: list(blob.ranges()),
        lambda: blob.read(0, 512),
    ):
        with pytest.raises(BlobLostError):
            change()


def _sparse(path: Path, size: int, content: dict[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for start, data in content.items():
            file.seek(start)
            file.write(data)
    return path


def test_an_upload_comes_back_byte_for_byte_as_a_fixed_vhd(blobs: Blobs, tmp_path: Path) -> None:
    content = {0: b"boot" * 128, 3 * MIB: os.urandom(2 * MIB), 30 * MIB + 512: b"\x01" * 512}
    source = _sparse(tmp_path / "disk.raw", 40 * MIB, content)
    blob = blobs.blob(f"{uuid4()}/disk-0.vhd")
    with RawDisk.open(source) as disk:
        done = upload(disk, blob, order(verify="full"))
    assert done.sent_bytes == 2 * MIB + 2 * 65536
    assert list(blob.ranges()) == [
        (0, 65536),
        (3 * MIB, 5 * MIB),
        (30 * MIB, 30 * MIB + 65536),
        (40 * MIB, 40 * MIB + 512),
    ]
    copy = tmp_path / "copy.vhd"
    copy.write_bytes(blob.read(0, 40 * MIB + 512))
    assert copy.read_bytes()[: 40 * MIB] == source.read_bytes()
    with open_vhd(copy) as opened:
        assert opened.size == 40 * MIB
    subprocess.run([program("qemu-img"), "compare", "-q", "-f", "vpc", "-F", "raw", copy, source], check=True)


@pytest.mark.parametrize("mode", [CrashMode.BEFORE, CrashMode.AFTER])
def test_an_upload_that_dies_goes_on(blobs: Blobs, tmp_path: Path, mode: CrashMode) -> None:
    source = _sparse(tmp_path / "disk.raw", 24 * MIB, {at * MIB: b"%02d" % at * 40000 for at in range(0, 24, 2)})
    with RawDisk.open(source) as disk:
        for at in (2, 9, 18):
            blob = blobs.blob(f"{uuid4()}/disk-0.vhd")
            with pytest.raises(SimulatedCrash):
                upload(disk, WatchedBlob(blob, at, mode), order(uploads=1), pace=Pace(note_bytes=512 << 10))
            upload(disk, blob, order(uploads=4, verify="full"))
            assert blob.read(0, disk.size) == source.read_bytes()
            ends = list(blob.ranges())[-1]
            assert ends == (24 * MIB, 24 * MIB + 512)


def test_two_operators_at_once_make_one_blob(blobs: Blobs, tmp_path: Path) -> None:
    source = _sparse(tmp_path / "disk.raw", 24 * MIB, {at * MIB: b"%02d" % at * 40000 for at in range(0, 24, 2)})
    blob = blobs.blob(f"{uuid4()}/disk-0.vhd")
    outcomes: list[object] = []

    def work(lease: str) -> None:
        with RawDisk.open(source) as disk:
            try:
                outcomes.append(upload(disk, blob, order(lease=lease), pace=Pace(wait_seconds=0)))
            except BlobHeldError as error:
                outcomes.append(error)

    threads = [threading.Thread(target=work, args=(lease,)) for lease in (HERE, ELSEWHERE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 2 and not all(isinstance(one, BlobHeldError) for one in outcomes)
    assert blob.read(0, 24 * MIB) == source.read_bytes()


def test_two_tebibytes_of_nothing_cost_a_handful_of_requests(blobs: Blobs, tmp_path: Path) -> None:
    size = 2 << 40
    source = _sparse(
        tmp_path / "disk.raw", size, {0: b"boot" * 128, size // 2: b"data" * 128, size - 512: b"end." * 128}
    )
    watched = WatchedBlob(blobs.blob(f"{uuid4()}/disk-0.vhd"))
    with RawDisk.open(source) as disk:
        done = upload(disk, watched, order())
    assert done.sent_bytes == 3 * 65536
    assert len(watched.calls) <= 20, watched.calls
    state = watched.look()
    assert state is not None and state.size == size + 512
    assert watched.blob.read(size // 2, 512) == b"data" * 128
    watched.blob.delete()


def _refused(server: Azurite, environment: dict[str, str], container: str | None = None) -> PlatformError:
    opened = Blobs(Container(container or server.container, ACCOUNT), environment)
    with pytest.raises(PlatformError) as caught:
        opened.check()
    opened.close()
    assert caught.value.hint
    return caught.value


def test_wrong_credentials_are_refused_and_never_shown(server: Azurite) -> None:
    wrong = "d3Jvbmc" + KEY[7:]
    told = _refused(server, {"AZURE_STORAGE_KEY": wrong})
    assert "access is denied" in str(told) and wrong not in str(told) + str(told.hint)
    told = _refused(server, {"AZURE_STORAGE_SAS_TOKEN": "sv=2024-01-01&sp=rl&sig=SECRETSECRET"})
    assert "access is denied" in str(told) and "SECRET" not in str(told) + str(told.hint)
    told = _refused(server, {"AZURE_STORAGE_KEY": "no base64!"})
    assert "base64" not in str(told.hint)
    told = _refused(server, server.environment, f"{server.endpoint}/nowhere")
    assert "no such container" in str(told)


def test_a_signature_or_a_connection_string_will_do(server: Azurite) -> None:
    until = datetime.now(UTC) + timedelta(hours=1)
    permission = ContainerSasPermissions(read=True, write=True, delete=True, list=True, create=True)
    sas = generate_container_sas(ACCOUNT, CONTAINER, account_key=KEY, permission=permission, expiry=until)
    connection = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};"
    for environment in (
        {"AZURE_STORAGE_SAS_TOKEN": sas},
        {"AZURE_STORAGE_SAS_TOKEN": f"?{sas}"},
        {"AZURE_STORAGE_CONNECTION_STRING": connection},
        {"AZURE_STORAGE_CONNECTION_STRING": f"BlobEndpoint={server.endpoint};SharedAccessSignature={sas}"},
    ):
        opened = Blobs(Container(server.container, ACCOUNT), environment)
        opened.check()
        blob = opened.blob(f"{uuid4()}/disk-0.vhd")
        assert blob.create(1024, {})
        blob.delete()
        opened.close()
    with pytest.raises(PlatformError, match="of the account other"):
        Blobs(
            Container(server.container, ACCOUNT),
            {"AZURE_STORAGE_CONNECTION_STRING": f"AccountName=other;AccountKey={KEY}"},
        )
    with pytest.raises(PlatformError, match="neither"):
        Blobs(Container(server.container, ACCOUNT), {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=godwitaccount"})
    with pytest.raises(PlatformError, match="no credentials"):
        Blobs(Container(server.container, ACCOUNT), {})


def test_a_service_that_is_away_is_told_so_without_the_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replica.platforms.azure.storage.RETRIES", 0)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/{ACCOUNT}/{CONTAINER}"
        opened = Blobs(Container(url, ACCOUNT), {"AZURE_STORAGE_SAS_TOKEN": "sv=2024-01-01&sig=SECRETSECRET"})
        with pytest.raises(BlobUnreachableError) as caught:
            opened.blob("m/disk-0.vhd").look()
        opened.close()
    assert "SECRET" not in f"{caught.value} {caught.value.hint} {caught.value.__cause__}"
