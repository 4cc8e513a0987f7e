"""Recovery on Azure: blobs on Azurite, machines by a stand-in of az, and the commands as an operator types them."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli import main
from cli.output import Output
from conversion.tobios import plan_bios
from replica.errors import PlatformError
from replica.generation.image import as_device
from replica.host import this_host
from replica.model import Nic
from replica.platforms import servant
from replica.platforms.azure.platform import AzurePlatform
from replica.platforms.azure.settings import Container, read
from replica.platforms.azure.storage import Blobs
from replica.platforms.platform import DiskSpec, MachineSpec, Power
from tests.support import conversion_disks
from tests.support.azurite import ACCOUNT, Azurite, azurite
from tests.support.engine import BLOCK, random_blocks
from tests.support.fake_az import FakeAz
from tests.support.recovery import Recovery
from tests.support.servers import program
from vhdx.raw import RawDisk

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="a server of the disks runs beside"),
    pytest.mark.server,
    pytest.mark.xdist_group("azurite"),
]

NAME = "godwit-web-1"
MIB = 1 << 20
SUBNET = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/virtualNetworks/n/subnets/a"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    with azurite(tmp_path_factory.mktemp("azurite")) as running:
        yield running


@pytest.fixture
def recovery(tmp_path: Path) -> Recovery:
    return Recovery(tmp_path, disks=2)


def environment(server: Azurite, first: Path | None = None) -> dict[str, str]:
    path = os.environ["PATH"] if first is None else f"{first}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **server.environment, "PATH": path}


def platform_of(server: Azurite, recovery: Recovery, az: FakeAz | None = None, **table: Any) -> AzurePlatform:
    group = {} if az is None else {"resource_group": "recovery"}
    settings = read({"container": server.container, **group, **table})
    return AzurePlatform(recovery.host, settings, environment=environment(server, None if az is None else az.folder))


def downloaded(platform: AzurePlatform, name: str, number: int, path: Path) -> Path:
    with platform._blobs() as blobs:
        blob = blobs.blob(f"{name}/disk-{number}.vhd")
        state = blob.look()
        assert state is not None
        path.write_bytes(blob.read(0, state.size))
    return path


def test_disks_are_uploaded_and_a_template_lies_beside(server: Azurite, recovery: Recovery, tmp_path: Path) -> None:
    platform = platform_of(server, recovery)
    platform.check()
    folder = platform.folder(NAME)
    spec = recovery.spec(folder, NAME)
    platform.define(spec)
    assert platform.power(NAME) is Power.OFF
    assert [(one.hydrated, one.remaining_bytes) for one in platform.disks(NAME)] == [(False, 16 * MIB)] * 2
    platform.hydrate(NAME)
    assert not servant.is_running(folder.path)
    for one, source in zip(platform.disks(NAME), recovery.sources, strict=True):
        assert one.address == f"{server.container}/{NAME}/disk-{one.number}.vhd"
        assert one.hydrated and one.remaining_bytes == 0
        copy = downloaded(platform, NAME, one.number, tmp_path / "copy.vhd")
        subprocess.run([program("qemu-img"), "compare", "-q", "-f", "vpc", "-F", "raw", copy, source], check=True)
    platform.hydrate(NAME)  # again: nothing
    assert not servant.is_running(folder.path)

    parameters = json.loads((folder.path / "azuredeploy.parameters.json").read_text())["parameters"]
    assert parameters["disk1Blob"]["value"] == f"{server.container}/{NAME}/disk-1.vhd"
    template = json.loads((folder.path / "azuredeploy.json").read_text())
    assert template["parameters"]["storageAccountId"]["defaultValue"].endswith(f"'{ACCOUNT}')]")
    assert "resource machine 'Microsoft.Compute/virtualMachines@" in (folder.path / "main.bicep").read_text()
    guide = (folder.path / "START.txt").read_text().strip()
    assert guide.startswith(f"az deployment group create --resource-group RESOURCE-GROUP --name {NAME} ")
    assert guide.endswith("osType=OSTYPE subnetId=SUBNETID")  # nobody knows what a boot sector alone is
    with pytest.raises(PlatformError, match="no resource group") as caught:
        platform.start(NAME)
    assert caught.value.hint == guide
    with pytest.raises(PlatformError, match="not known here"):
        platform.stop(NAME)
    assert platform.channel(NAME) is None and platform.screenshot(NAME) is None and platform.names() == [NAME]

    elsewhere = AzurePlatform(this_host(tmp_path / "other"), platform._settings, environment=environment(server))
    assert elsewhere.power(NAME) is Power.OFF
    assert elsewhere.disks(NAME) == platform.disks(NAME)
    elsewhere.delete(NAME)
    assert elsewhere.power(NAME) is Power.GONE
    assert platform.power(NAME) is Power.OFF  # its folder is there still
    platform.delete(NAME)
    assert platform.power(NAME) is Power.GONE and not folder.path.exists()
    platform.delete(NAME)  # again: nothing


def test_a_machine_that_is_defined_anew_is_uploaded_anew(server: Azurite, recovery: Recovery, tmp_path: Path) -> None:
    platform = platform_of(server, recovery)
    disk = DiskSpec(0, 16 * MIB, "scsi", path=recovery.sources[0])
    platform.define(MachineSpec("other", "web", recovery.machine, (disk,)))
    platform.hydrate("other")
    platform.define(MachineSpec("other", "web", recovery.machine, (replace(disk, path=recovery.sources[1]),)))
    assert not any(one.hydrated for one in platform.disks("other"))
    platform.hydrate("other")
    copy = downloaded(platform, "other", 0, tmp_path / "copy.vhd")
    assert copy.read_bytes()[: 16 * MIB] == recovery.sources[1].read_bytes()
    platform.delete("other")


def test_what_azure_does_not_take_is_refused_before_anything_is_uploaded(server: Azurite, recovery: Recovery) -> None:
    platform = platform_of(server, recovery)
    disk = DiskSpec(0, 16 * MIB, "scsi", path=recovery.sources[0])
    good = MachineSpec("refused", "web", recovery.machine, (disk,))
    for spec, said in (
        (replace(good, disks=(replace(disk, size=5 << 40),)), "4095 GiB at most"),
        (replace(good, disks=(replace(disk, sector_size=4096),)), "sectors of 4096"),
        (replace(good, disks=(disk,) * 40), "no size is known"),
        (replace(good, name="a b"), "cannot be a machine's name"),
    ):
        with pytest.raises(PlatformError, match=said):
            platform.define(spec)
    assert platform.power("refused") is Power.GONE
    with pytest.raises(PlatformError, match="which subnet"):
        platform_of(server, recovery, FakeAz(recovery.folder / "bin")).check_machine(good)


def test_a_disk_that_cannot_be_read_leaves_no_blob_that_is_a_disk(server: Azurite, recovery: Recovery) -> None:
    platform = platform_of(server, recovery, system="linux")
    gone = DiskSpec(0, 16 * MIB, "ide", url=f"nbd+unix:///0?socket={recovery.folder / 'nobody'}")
    platform.define(MachineSpec("unread", "web", recovery.machine, (gone,)))
    with pytest.raises(PlatformError, match="disk 0 cannot be read"):
        platform.hydrate("unread")
    assert not any(one.hydrated for one in platform.disks("unread"))
    platform.delete("unread")


def test_az_makes_starts_stops_and_removes_the_machine(server: Azurite, recovery: Recovery) -> None:
    az = FakeAz(recovery.folder / "bin")
    platform = platform_of(server, recovery, az, subnet=SUBNET)
    platform.check()
    folder = platform.folder(NAME)
    spec = replace(recovery.spec(folder, NAME), machine=replace(recovery.machine, nics=(Nic(), Nic())))
    platform.define(spec)
    with pytest.raises(PlatformError, match="Linux or a Windows") as caught:
        platform.start(NAME)
    assert "system =" in str(caught.value.hint)
    assert az.state["deployments"] == []

    platform = platform_of(server, recovery, az, subnet=SUBNET, system="linux")
    platform.start(NAME)
    assert all(one.hydrated for one in platform.disks(NAME))
    assert platform.power(NAME) is Power.RUNNING
    made = [one["type"].rpartition("/")[2] for one in az.state["resources"]]
    assert made == ["disks", "disks", "networkInterfaces", "networkInterfaces", "virtualMachines"]
    identity = platform.identity(NAME)
    assert identity.hypervisor_id.endswith(f"/virtualMachines/{NAME}") and identity.bios_uuid.startswith("0a4c5f0d")
    asked = len(az.asked)
    platform.start(NAME)  # again: nothing
    assert [words[:2] for words in az.asked[asked:]] == [["vm", "get-instance-view"]]

    platform.stop(NAME)
    platform.stop(NAME)
    assert platform.power(NAME) is Power.OFF
    assert [words[1] for words in az.asked if words[0] == "vm" and words[1] in ("stop", "deallocate")] == [
        "stop",
        "deallocate",
    ]
    platform.start(NAME)
    assert platform.power(NAME) is Power.RUNNING
    platform.stop(NAME, force=True)
    assert any("--skip-shutdown" in words for words in az.asked)

    other = {"id": "/other", "name": "other", "type": "Microsoft.Compute/disks", "tags": {"godwit-machine": "other"}}
    az.set(resources=[*az.state["resources"], other], keeps=True)
    with pytest.raises(PlatformError, match="5 resources of godwit-web-1 are still there"):
        platform.delete(NAME)
    assert platform.power(NAME) is Power.OFF
    az.set(keeps=False, removed=[])
    platform.delete(NAME)
    order = [one.split("/")[-2] for one in az.state["removed"]]
    assert order == ["virtualMachines", "networkInterfaces", "networkInterfaces", "disks", "disks"]
    assert [one["name"] for one in az.state["resources"]] == ["other"] and az.state["deployments"] == []
    assert platform.power(NAME) is Power.GONE
    platform.delete(NAME)
    key = server.environment["AZURE_STORAGE_KEY"]
    assert not any(key in word for words in az.asked for word in words)
    for path in folder.path.parent.rglob("*"):
        assert not path.is_file() or key not in path.read_text(errors="replace")


def test_what_az_refuses_is_told_in_its_words_and_the_same_command_goes_on(server: Azurite, recovery: Recovery) -> None:
    az = FakeAz(recovery.folder / "bin")
    platform = platform_of(server, recovery, az, system="linux")
    az.set(refuses="(QuotaExceeded) Operation could not be completed as it results in exceeding approved quota.")
    spec = replace(recovery.spec(platform.folder("quota"), "quota"), isolated=True)
    platform.define(spec)
    with pytest.raises(PlatformError, match=r"az deployment group create failed: ERROR: \(QuotaExceeded\)"):
        platform.start("quota")
    assert platform.power("quota") is Power.OFF
    az.set(refuses="")
    platform.start("quota")
    made = {one["type"].rpartition("/")[2] for one in az.state["resources"]}
    assert {"virtualNetworks", "networkSecurityGroups"} <= made
    platform.delete("quota")
    assert az.state["resources"] == []
    with pytest.raises(PlatformError, match="no resource group nowhere"):
        platform_of(server, recovery, az, resource_group="nowhere").check()


def test_without_az_or_the_library_it_is_said_what_to_install(
    server: Azurite, recovery: Recovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = read({"container": server.container, "resource_group": "recovery"})
    bare = {**server.environment, "PATH": str(recovery.folder)}
    with pytest.raises(PlatformError, match="az is needed") as caught:
        AzurePlatform(recovery.host, settings, environment=bare).check()
    assert "azure-cli" in str(caught.value.hint)
    monkeypatch.delitem(sys.modules, "replica.platforms.azure.storage", raising=False)
    monkeypatch.setitem(sys.modules, "azure.storage.blob", None)
    with pytest.raises(PlatformError, match="not installed") as caught:
        platform_of(server, recovery).check()
    assert caught.value.hint == "pip install 'godwit-dr[azure]'"


# -- as an operator types it ------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> tuple[int, str, str]:
    output = Output(stdout=io.StringIO(), stderr=io.StringIO())
    code = main.run([str(argument) for argument in arguments], output)
    assert isinstance(output.stdout, io.StringIO) and isinstance(output.stderr, io.StringIO)
    out, err = output.stdout.getvalue(), output.stderr.getvalue()
    assert "Traceback" not in err and "unexpected" not in err, err
    return code, out, err


def good(*arguments: str | Path) -> Any:
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def place(server: Azurite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the VM "web" of one point, written to since, and a configuration that names the container."""
    for name in [name for name in os.environ if name.startswith(("GODWIT_", "AZURE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GODWIT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("GODWIT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("GODWIT_CONFIG", str(tmp_path / "godwit.toml"))
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "godwit.toml").write_text(f'[platforms.azure]\ncontainer = "{server.container}"\n')
    (tmp_path / "web.img").write_bytes(random_blocks(1, 8))
    good("init", tmp_path / "store")
    good("protect", "web", "--disk", tmp_path / "web.img")
    good("replicate", "web")
    with (tmp_path / "web.img").open("r+b") as file:
        file.seek(3 * BLOCK)
        file.write(random_blocks(2, 1))
    return tmp_path


def blobs_of(server: Azurite, machine: str) -> list[str]:
    opened = Blobs(Container(server.container, ACCOUNT), server.environment)
    try:
        return [one.name for one in opened.list(f"{machine}/")]
    finally:
        opened.close()


def test_the_commands_upload_settle_and_clean_up(server: Azurite, place: Path) -> None:
    tested = good("failover", "web", "--test", "--platform", "azure")["machine"]
    assert tested["isolated"] and blobs_of(server, tested["name"]) == [f"{tested['name']}/disk-0.vhd"]
    folder = place / "state" / "machines" / "azure" / tested["name"]
    assert "networkSecurityGroups" in (folder / "azuredeploy.json").read_text()
    good("cleanup", "web", "--test", tested["name"], "--yes")
    assert blobs_of(server, tested["name"]) == [] and not folder.exists()

    code, out, err = run("failover", "web", "--planned", "--platform", "azure", "--yes")
    assert code == 0, err
    assert '"phase": "uploading disk 0"' in err and "START.txt" in err
    assert re.search(r"web lies ready from point 2 on azure, Generation 1, as godwit-\w+-\w+\n", out)
    status = good("status", "web")
    machine = status["recovery_machine"]
    assert machine["disks"][0]["address"] == f"{server.container}/{machine['name']}/disk-0.vhd"
    assert good("failover", "web")["resumed"]
    good("commit", "web")
    code, _, err = run("reprotect", "web")
    assert code == 1 and "does not replicate from machines of azure" in err and "--seed-from web" in err
    assert good("status", "web")["standing"] == "committed"


def test_an_unplanned_failover_is_taken_back_from_another_host(
    server: Azurite, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = good("failover", "web", "--unplanned", "--platform", "azure", "--yes")["machine"]["name"]
    assert len(blobs_of(server, machine)) == 1
    monkeypatch.setenv("GODWIT_STATE", str(place / "another"))
    code, out, err = run("cleanup", "web", "--yes", "--json")
    assert code == 0, err
    assert json.loads(out)["standing"] == "protected" and json.loads(out)["removed"] == [machine]
    assert blobs_of(server, machine) == []


def test_az_runs_the_machine_where_a_resource_group_is_named(
    server: Azurite, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    az = FakeAz(place / "bin")
    monkeypatch.setenv("PATH", f"{az.folder}{os.pathsep}{os.environ['PATH']}")
    with (place / "godwit.toml").open("a") as file:
        file.write(f'resource_group = "recovery"\nsubnet = "{SUBNET}"\nsystem = "linux"\n')
    code, out, err = run("failover", "web", "--unplanned", "--platform", "azure", "--yes")
    assert code == 0, err
    assert "web runs from point 1 on azure" in out
    assert len(az.state["resources"]) == 3
    done = good("cleanup", "web", "--yes")
    assert done["standing"] == "protected" and az.state["resources"] == [] == az.state["deployments"]
    assert blobs_of(server, done["removed"][0]) == []


def test_what_stands_against_it_is_known_before_the_source_is_shut_down(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (place / "godwit.toml").open("a") as file:
        file.write('vm_size = "Standard_D2s_v5"\n')
    for number in range(6):
        (place / f"data-{number}.img").write_bytes(random_blocks(number, 1))
    disks = [word for number in range(6) for word in ("--disk", str(place / f"data-{number}.img"))]
    good("protect", "many", *disks)
    good("replicate", "many")
    code, _, err = run("failover", "many", "--planned", "--platform", "azure", "--yes")
    assert code == 1 and "5 data disks, and Standard_D2s_v5 takes 4" in err
    monkeypatch.setenv("AZURE_STORAGE_KEY", "d3Jvbmc=")
    code, _, err = run("failover", "web", "--planned", "--platform", "azure", "--yes")
    assert code == 1 and "access is denied" in err and "d3Jvbmc" not in err
    monkeypatch.delenv("GODWIT_CONFIG")
    code, _, err = run("failover", "web", "--planned", "--platform", "azure", "--yes", "--config", place / "none")
    assert code == 13
    for name in ("web", "many"):
        assert good("status", name)["standing"] == "protected"
        assert good("points", name)["points"][-1]["point"] == 1


@pytest.mark.skipif(bool(conversion_disks.missing()), reason=conversion_disks.missing() or "all is there")
@pytest.mark.parametrize("generation", [1, 2])
def test_a_uefi_machine_goes_as_it_is_or_converted_and_starts_from_the_disk_with_the_system(
    server: Azurite, place: Path, generation: int
) -> None:
    esp, root = conversion_disks.esp_files(), conversion_disks.root_files()
    places = conversion_disks.plain_places(
        conversion_disks.make_esp(place, esp), conversion_disks.make_root(place, root)
    )
    system = conversion_disks.make_disk(places, conversion_disks.PLAIN_SECTORS).to_file(place / "system.raw")
    (place / "data.raw").write_bytes(b"data".ljust(1 << 20, b"\0"))
    good("protect", "uefi", "--disk", place / "data.raw", "--disk", system, "--generation", "2")
    good("replicate", "uefi")
    asked = ("failover", "uefi", "--unplanned", "--platform", "azure", "--yes")
    made = good(*asked, *(("--generation", "1") if generation == 1 else ()))["machine"]
    assert (made["generation"], made["converted"]) == (generation, generation == 1)

    folder = place / "state" / "machines" / "azure" / made["name"]
    document = json.loads((folder / "azuredeploy.json").read_text())
    disks = [one["properties"] for one in document["resources"] if one["type"] == "Microsoft.Compute/disks"]
    assert disks[0]["creationData"]["sourceUri"] == "[parameters('disk1Blob')]"
    assert disks[0]["hyperVGeneration"] == f"V{generation}" and "osType" not in disks[1]
    parameters = json.loads((folder / "azuredeploy.parameters.json").read_text())["parameters"]
    assert parameters["osType"]["value"] == "Linux"

    with RawDisk.open(system) as disk:
        wanted = bytearray(disk.read_at(0, disk.size))
        for group in plan_bios(as_device(disk)).groups() if generation == 1 else ():
            for offset, written in group:
                wanted[offset : offset + len(written)] = written
    opened = Blobs(Container(server.container, ACCOUNT), server.environment)
    assert opened.blob(f"{made['name']}/disk-1.vhd").read(0, len(wanted)) == bytes(wanted)
    opened.close()
    good("cleanup", "uefi", "--yes")
