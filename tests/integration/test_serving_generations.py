"""Points served as the other generation: the conversion lies over the disks, and is refused where there is none."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cli.main import run
from cli.output import Output
from conversion.errors import RefusedError
from conversion.inspection import inspect
from conversion.tobios import plan_bios
from replica import catalog, cycle, protection
from replica.catalog import ProtectedVm
from replica.errors import PlatformError
from replica.generation.image import as_device
from replica.generation.patched import Conversion, plan_conversion
from replica.host import Host, this_host
from replica.nbd.disk import NbdDisk
from replica.nbd.wire import UnixAddress
from replica.platforms import servant
from replica.platforms.folder import MachineFolder
from replica.serving import serve_point
from replica.stores.address import open_store
from replica.stores.store import Store
from replica.view import PointView
from tests.support import conversion_disks as disks
from tests.support.gpt_disks import SparseDisk
from vhdx.raw import RawDisk

pytestmark = [
    pytest.mark.skipif(bool(disks.missing()), reason=disks.missing() or "all is there"),
    pytest.mark.skipif(sys.platform != "linux", reason="served on a socket in the file system"),
]


class Vm:
    """A VM of Generation 2 with a disk of data before that of its system, protected in a store."""

    def __init__(self, folder: Path, system: SparseDisk | None) -> None:
        self.folder = folder
        self.url = f"file://{folder / 'store'}"
        self.host: Host = this_host(folder / "state")
        self.store: Store = open_store(self.url, create=True)
        catalog.init_store(self.store, self.host)
        data = folder / "data.raw"
        data.write_bytes(b"data".ljust(1 << 20, b"\0"))
        self.paths = [data]
        if system is not None:
            self.paths.append(system.to_file(folder / "system.raw"))
        wishes = protection.MachineWishes(generation=2 if system is not None else 1)
        found, _ = protection.protect(
            self.store, self.host, tenant="default", name="vm", disks=self.paths, wishes=wishes
        )
        self.found: ProtectedVm = found
        self.point = cycle.replicate(self.store, self.host, found)

    def views(self) -> list[tuple[int, PointView]]:
        return [(one.number, PointView(self.store, self.host, self.found, self.point, one)) for one in self.point.disks]

    def converted(self) -> bytes:
        """Return what the system's disk holds once it is converted, by the converter alone."""
        with RawDisk.open(self.paths[1]) as disk:
            content = bytearray(disk.read_at(0, disk.size))
            for group in plan_bios(as_device(disk)).groups():
                for offset, written in group:
                    content[offset : offset + len(written)] = written
        return bytes(content)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> SparseDisk:
    folder = tmp_path_factory.mktemp("volumes")
    places = disks.plain_places(disks.make_esp(folder, disks.esp_files()), disks.make_root(folder, disks.root_files()))
    return disks.make_disk(places, disks.PLAIN_SECTORS)


@pytest.fixture
def vm(tmp_path: Path, system: SparseDisk) -> Vm:
    return Vm(tmp_path, system)


def served(address: UnixAddress, export: str) -> bytes:
    with NbdDisk(address, export) as disk:
        return disk.read_at(0, disk.size)


def test_the_disk_of_the_system_is_served_converted_and_no_other(vm: Vm, tmp_path: Path) -> None:
    assert vm.point.machine.generation == 2
    address = UnixAddress(str(tmp_path / "s"))
    with serve_point(vm.store, vm.host, vm.found, address, generation=1) as serving:
        assert serving.generation == 1
        assert served(address, "0") == vm.paths[0].read_bytes()
        assert served(address, "1") == vm.converted()
        with NbdDisk(address, "1") as disk:
            assert inspect(as_device(disk)).generation == 1
    for generation in (None, 2):
        with serve_point(vm.store, vm.host, vm.found, address, generation=generation) as serving:
            assert serving.generation == 2
            assert served(address, "1") == vm.paths[1].read_bytes()


def test_a_server_in_the_background_serves_the_conversion_it_was_given(vm: Vm) -> None:
    folder = MachineFolder(vm.folder / "machine", "machine")
    spec = servant.ServantSpec(vm.url, "default", "vm", vm.point.point, 1, (), str(vm.host.state_folder))
    conversion = plan_conversion(vm.views(), vm.point.machine)
    assert conversion.disk == 1 and conversion.manifest is not None
    try:
        for given in (conversion, None):  # without one it plans by itself
            servant.prepare(folder, spec, given)
            servant.ensure(folder.path)
            address = UnixAddress(str(folder.path / servant.SOCKET))
            assert served(address, "1") == vm.converted()
            servant.ensure(folder.path)  # again: nothing
    finally:
        servant.end(folder.path)
    assert not servant.is_running(folder.path)
    servant.end(folder.path)  # again: nothing


def test_a_manifest_that_was_damaged_serves_nothing(vm: Vm) -> None:
    folder = MachineFolder(vm.folder / "machine", "machine")
    spec = servant.ServantSpec(vm.url, "default", "vm", vm.point.point, 1, (), str(vm.host.state_folder))
    servant.prepare(folder, spec, plan_conversion(vm.views(), vm.point.machine))
    damaged = bytearray((folder.path / servant.MANIFEST).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder.path / servant.MANIFEST).write_bytes(damaged)
    with pytest.raises(PlatformError, match="its checksum does not hold"):
        servant.ensure(folder.path)
    (folder.path / servant.CONFIGURATION).write_bytes(b'{"store": 5')
    with pytest.raises(PlatformError, match="the configuration cannot be read"):
        servant.ensure(folder.path)


def test_what_has_no_system_is_refused(tmp_path: Path) -> None:
    vm = Vm(tmp_path, None)
    godwit = ["--store", vm.url]
    output = Output(stdout=io.StringIO(), stderr=io.StringIO())
    other = "1" if vm.point.machine.generation == 2 else "2"
    assert run(["serve", "vm", "--socket", str(tmp_path / "s"), "--generation", other, *godwit], output) == 14
    assert isinstance(output.stderr, io.StringIO)
    assert "Generation 1, which cannot become one of Generation 2" in output.stderr.getvalue()
    with pytest.raises(RefusedError, match="no disk has an EFI system partition"):
        plan_conversion(vm.views(), replace(vm.point.machine, generation=2))
    assert plan_conversion(vm.views(), vm.point.machine) == Conversion()


def test_the_command_serves_as_the_other_generation(vm: Vm, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from cli.main import main; main()", "serve", "vm", "--generation", "1", "--json"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [*command, "--socket", str(tmp_path / "s"), "--store", vm.url], cwd=root, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            told = json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")
            assert told["generation"] == 1
            assert served(UnixAddress(str(tmp_path / "s")), "1") == vm.converted()
        finally:
            process.terminate()
        assert process.wait(30) == 0
