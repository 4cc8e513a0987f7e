"""Whether a machine converts, in the points of every kind of source: as of the instant, and anew where it changed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from replica import catalog, cycle, protection
from replica.catalog import ProtectedVm
from replica.generation.convertibility import Verdict
from replica.host import Host
from replica.model import Point
from replica.nbd.disk import NbdDisk
from replica.protection import MachineWishes
from replica.stores.memory import MemoryStore
from tests.support import conversion_disks as disks
from tests.support import libvirt_host, running_qemu
from tests.support.conversion_disks import PLAIN_SECTORS, plain_places
from tests.support.engine import WORKERS, make_host
from tests.support.fake_hyperv import FakeHost
from tests.support.libvirt_host import LibvirtHost, RunningDomain
from tests.support.running_qemu import RunningQemu
from vhdx.create import create_disk
from vhdx.disk import WritableBuffer
from vhdx.formats import open_disk

pytestmark = pytest.mark.skipif(bool(disks.missing()), reason=disks.missing() or "all is there")

TABLE_BYTES = 1 << 20  # its copy at the end is wiped with it
HARMLESS = 17 << 20  # in no file system and no table


class Source(Protocol):
    """A machine whose boot disk converts, under replication."""

    def protect(self, store: MemoryStore, host: Host) -> ProtectedVm: ...

    def write(self, offset: int, length: int, value: int) -> None: ...


class FromQemu:
    """A running QEMU."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.qemu = RunningQemu(folder, ("raw",), image.stat().st_size)
        self.qemu.images[0].write_bytes(image.read_bytes())

    def protect(self, store: MemoryStore, host: Host) -> ProtectedVm:
        return protection.protect(store, host, tenant="default", name="vm", disks=self.qemu.addresses())[0]

    def write(self, offset: int, length: int, value: int) -> None:
        self.qemu.write(0, offset, length, value)


class FromLibvirt:
    """A running domain of libvirt."""

    def __init__(self, libvirt: LibvirtHost, image: Path) -> None:
        self.domain = RunningDomain(libvirt, "boots", ("qcow2",), image.stat().st_size)
        command = ["qemu-img", "convert", "-q", "-n", "-f", "raw", "-O", "qcow2", str(image)]
        subprocess.run([*command, str(self.domain.files[0])], check=True)
        self.domain.start()

    def protect(self, store: MemoryStore, host: Host) -> ProtectedVm:
        wishes = MachineWishes(generation=2)
        disks = self.domain.addresses()
        return protection.protect(store, host, tenant="default", name="vm", disks=disks, wishes=wishes)[0]

    def write(self, offset: int, length: int, value: int) -> None:
        self.domain.write(0, offset, length, value)


class FromHyperv:
    """A VM on the stand-in for a Hyper-V host."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.fake = FakeHost(folder / "host")
        self.vm = self.fake.add_vm("web 1")
        content = image.read_bytes()
        self.disk = self.vm.add_disk("os", len(content))
        self.disk.write(0, content)

    def protect(self, store: MemoryStore, host: Host) -> ProtectedVm:
        from replica.hyperv.protecting import find_vm  # noqa: PLC0415 - as it is connected by then

        maps = (f"C:\\={self.fake.here('C:')}",)
        found = find_vm("web 1", host="hv1.example", maps=maps, wishes=MachineWishes())
        return protection.protect(
            store, host, tenant="default", name="vm", disks=found.disks, buses=found.buses, wishes=found.machine
        )[0]

    def write(self, offset: int, length: int, value: int) -> None:
        self.disk.write(offset, bytes([value]) * length)


class FromChain:
    """A VHDX under which each state of before stays as it was: what is written goes into a new child."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.folder = folder
        self.top = folder / "vm-0.vhdx"
        content = image.read_bytes()
        create_disk(self.top, size=len(content))
        with open_disk(self.top, writable=True) as disk:
            disk.write_at(0, content)
        self._store: MemoryStore
        self._host: Host
        self._vm: ProtectedVm

    def protect(self, store: MemoryStore, host: Host) -> ProtectedVm:
        self._store, self._host = store, host
        self._vm, _ = protection.protect(store, host, tenant="default", name="vm", disks=[self.top])
        return self._vm

    def write(self, offset: int, length: int, value: int) -> None:
        child = self.top.with_name(f"vm-{len(list(self.folder.glob('vm-*.vhdx')))}.vhdx")
        create_disk(child, kind="differencing", parent=self.top)
        with open_disk(child, writable=True) as disk:
            disk.write_at(offset, bytes([value]) * length)
        self.top = child
        protection.update(self._store, self._host, self._vm, disks=[child])


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image")
    esp, root = disks.make_esp(folder, disks.esp_files()), disks.make_root(folder, disks.root_files())
    return disks.make_disk(plain_places(esp, root), PLAIN_SECTORS).to_file(folder / "disk.raw")


def _missing(names: list[str]) -> None:
    if names:
        pytest.skip(f"not installed: {', '.join(names)}")


@pytest.fixture
def chain(tmp_path: Path, image: Path) -> Source:
    return FromChain(tmp_path, image)


@pytest.fixture
def hyperv(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    from replica.hyperv import connect  # noqa: PLC0415

    made = FromHyperv(tmp_path, image)
    monkeypatch.setattr(connect, "connect", made.fake.connect)
    return made


@pytest.fixture
def qemu(tmp_path: Path, image: Path) -> Iterator[Source]:
    _missing(running_qemu.missing())
    made = FromQemu(tmp_path, image)
    with made.qemu:
        yield made


@pytest.fixture
def libvirt(image: Path) -> Iterator[Source]:
    _missing(libvirt_host.missing())
    with LibvirtHost() as host:
        made = FromLibvirt(host, image)
        yield made
        made.domain.kill()


@pytest.mark.parametrize(
    "kind",
    [
        "chain",
        "hyperv",
        pytest.param("qemu", marks=pytest.mark.xdist_group("live")),
        pytest.param("libvirt", marks=pytest.mark.xdist_group("libvirt")),
    ],
)
def test_a_verdict_is_of_the_instant_and_is_renewed(
    kind: str, tmp_path: Path, image: Path, request: pytest.FixtureRequest
) -> None:
    source: Source = request.getfixturevalue(kind)
    store, host = MemoryStore("kinds"), make_host(tmp_path / "state", seed=os.getpid())
    catalog.init_store(store, host)
    vm = source.protect(store, host)
    size = image.stat().st_size

    def wipe() -> None:
        source.write(0, TABLE_BYTES, 1)
        source.write(size - TABLE_BYTES, TABLE_BYTES, 1)

    def point(during: Callable[[], None] | None = None) -> Point:
        if during is None:
            return cycle.replicate(store, host, vm, workers=WORKERS)
        with before_the_first_read(during):
            return cycle.replicate(store, host, vm, workers=WORKERS)

    live = kind in ("qemu", "libvirt")
    first = point(wipe if live else None)
    assert first.convertibility is not None
    assert first.convertibility.verdict is Verdict.CONVERTIBLE, first.convertibility
    assert first.convertibility.system == "Debian GNU/Linux 12 (bookworm)"
    if not live:
        source.write(HARMLESS, 512, 7)
        second = point()
        assert second.cycle.changed_blocks >= 1
        assert second.convertibility == first.convertibility
        wipe()
    last = point()
    assert last.disks[0].source["found_by"] != "scan"
    assert last.convertibility is not None
    assert last.convertibility.verdict is Verdict.REFUSED
    assert [one.rule for one in last.convertibility.refusals] == ["no-esp"]


@contextmanager
def before_the_first_read(act: Callable[[], None]) -> Iterator[None]:
    """Act once the instant has been taken and before anything is read of it."""
    original, done = NbdDisk.read_into, list[bool]()

    def read_into(self: NbdDisk, offset: int, buffer: WritableBuffer) -> None:
        if not done:
            done.append(True)
            act()
        original(self, offset, buffer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NbdDisk, "read_into", read_into)
        yield
    assert done
