"""Every disk that cannot be converted says so through the command line: why, where, and what to do about it."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from cli.main import run
from cli.output import Output
from conversion import grub
from conversion.gpt_copies import write_gpt
from tests.support import boot_disks, windows_disk
from tests.support import conversion_disks as disks
from tests.support.conversion_disks import LINUX, PLAIN_SECTORS, SECTOR, Place, plain_places
from tests.support.gpt_disks import make_table
from vhdx.create import create_disk
from vhdx.formats import open_disk

pytestmark = pytest.mark.skipif(bool(disks.missing()), reason=disks.missing() or "all is there")
windows = pytest.mark.skipif(bool(windows_disk.missing()), reason=windows_disk.missing() or "all is there")

REFUSED = 14
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40


def godwit(*arguments: object) -> tuple[int, str, str]:
    output = Output(stdout=io.StringIO(), stderr=io.StringIO())
    code = run([str(argument) for argument in arguments], output)
    assert isinstance(output.stdout, io.StringIO) and isinstance(output.stderr, io.StringIO)
    assert "Traceback" not in output.stderr.getvalue()
    return code, output.stdout.getvalue(), output.stderr.getvalue()


def refused(path: Path, rule: str, subject: str, *options: str, inspected: bool = True) -> dict[str, Any]:
    """Check that the disk is refused by ``rule``, as text and as JSON, and nothing is written; return the finding."""
    before = {item: item.stat().st_mtime_ns for item in path.parent.iterdir()}
    code, text, said = godwit("convert", path, "--to", "gen1", *options)
    assert (code, said) == (REFUSED, ""), (text, said)
    assert "It cannot be converted; nothing was written." in text
    code, text_json, _ = godwit("convert", path, "--to", "gen1", "--json", *options)
    document = json.loads(text_json)
    assert code == REFUSED and document["refused"] and document["target"] is None
    found = {one["rule"]: one for one in document["findings"] if one["severity"] == "refusal"}
    assert rule in found, document["findings"]
    finding: dict[str, Any] = found[rule]
    assert finding["subject"] == subject
    # A person needs the sentence, what was seen, and what to do.
    assert finding["message"].endswith(".") and finding["evidence"] and finding["remedy"]
    assert f"refused: {finding['message']} [{rule}: {subject}; {finding['evidence']}]" in text
    assert finding["remedy"] in text
    if inspected:
        code, text_json, _ = godwit("inspect", path, "--json")
        document = json.loads(text_json)
        assert code == REFUSED and not document["convertible"]
        assert rule in {one["rule"] for one in document["findings"] if one["severity"] == "refusal"}
    assert {item: item.stat().st_mtime_ns for item in path.parent.iterdir()} == before
    return finding


# --- Windows


@lru_cache(maxsize=8)
def _windows(folder: Path, without: str = "", machine: int = 0x8664, hibernated: bool = False) -> Path:
    path = folder / f"windows-{without.rpartition('/')[2]}-{machine}-{hibernated}.raw"
    files = windows_disk.windows_files(machine=machine)
    files.pop(without, None)
    if hibernated:
        files["/hiberfil.sys"] = b"HIBR" + bytes(20000)
    windows_disk.build(path, windows_disk.standard_layout(windows=files))
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("windows")


def copy_of(source: Path, folder: Path) -> Path:
    target = folder / "disk.raw"
    boot_disks.run("cp", "--sparse=always", source, target)
    return target


@windows
def test_bitlocker(built: Path, tmp_path: Path) -> None:
    path = copy_of(_windows(built), tmp_path)
    with path.open("r+b") as file:
        file.seek(117 * MIB + 3)
        file.write(b"-FVE-FS-")
    finding = refused(path, "bitlocker", "partition 3")
    assert "manage-bde -off" in finding["remedy"]


@windows
def test_dynamic_disk(built: Path, tmp_path: Path) -> None:
    path = copy_of(_windows(built), tmp_path)
    boot_disks.run("sgdisk", f"--typecode=3:{disks.LDM_DATA}", path)
    refused(path, "dynamic-disk", "partition 3")


@windows
@pytest.mark.parametrize(
    ("missing", "rule"),
    [
        ("/Windows/Boot/PCAT/bootmgr", "missing-bootmgr"),
        ("/Windows/System32/winload.exe", "missing-winload"),
    ],
)
def test_missing_programs_of_windows(built: Path, tmp_path: Path, missing: str, rule: str) -> None:
    finding = refused(copy_of(_windows(built, missing), tmp_path), rule, "partition 3")
    assert missing in finding["evidence"]


@windows
def test_windows_for_arm(built: Path, tmp_path: Path) -> None:
    finding = refused(copy_of(_windows(built, "", 0xAA64), tmp_path), "arm64", "partition 3")
    assert "Generation 2" in finding["remedy"]


@windows
def test_hibernated_windows_is_refused_but_by_a_flag_converted_and_taken_back(built: Path, tmp_path: Path) -> None:
    path = copy_of(_windows(built, hibernated=True), tmp_path)
    finding = refused(path, "hibernated", "partition 3")
    assert "powercfg /h off" in finding["remedy"]
    before = path.read_bytes()
    code, text, said = godwit("convert", path, "--to", "gen1", "--in-place", "--yes", "--discard-hibernation")
    assert code == 0, (text, said)
    assert "warning: Windows is hibernated; its sleeping state is discarded" in text
    assert path.read_bytes().count(b"HIBR\0") == before.count(b"HIBR\0") - 1
    assert godwit("convert", path, "--to", "gen2", "--in-place", "--yes")[0] == 0
    assert path.read_bytes() == before


# --- Linux


@pytest.fixture(scope="module")
def esp(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return disks.make_esp(tmp_path_factory.mktemp("esp"), disks.esp_files())


@pytest.fixture(scope="module")
def make_root(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    @lru_cache(maxsize=8)
    def make(**changes: Any) -> bytes:
        return disks.make_root(tmp_path_factory.mktemp("root"), disks.root_files(**changes))

    return make


def raw(tmp_path: Path, places: list[Place], sectors: int = PLAIN_SECTORS) -> Path:
    return disks.make_disk(places, sectors).to_file(tmp_path / "disk.raw")


def sparse_vhdx(path: Path, places: list[Place], size: int) -> Path:
    """Return a VHDX with a table and what the places hold."""
    create_disk(path, size=size)
    partitions = [(one.number, one.kind, one.start_sector, one.start_sector + one.sectors) for one in places]
    with open_disk(path, writable=True) as disk:
        write_gpt(disk, make_table(partitions, sectors=size // SECTOR), boot_code=b"")
        for one in places:
            disk.write_at(one.start_sector * SECTOR, one.content)
        disk.flush()
    return path


def test_the_plain_disk_is_taken(tmp_path: Path, esp: bytes, make_root: Callable[..., bytes]) -> None:
    path = raw(tmp_path, plain_places(esp, make_root()))
    code, text, _ = godwit("convert", path, "--to", "gen1", "--dry-run")
    assert code == 0 and "Nothing was written: this was a dry run." in text
    assert [item.name for item in tmp_path.iterdir()] == ["disk.raw"]
    code, text, _ = godwit("inspect", path)
    assert code == 0 and "Debian GNU/Linux 12 (bookworm), Generation 2" in text and "It can be converted." in text


def test_linux_for_arm(tmp_path: Path, esp: bytes, make_root: Callable[..., bytes]) -> None:
    root = make_root(machine=disks.ARM64)
    finding = refused(raw(tmp_path, plain_places(esp, root)), "arm64", "the system")
    assert "Generation 2" in finding["remedy"]


def test_large_sectors(tmp_path: Path, esp: bytes, make_root: Callable[..., bytes]) -> None:
    (tmp_path / "made").mkdir()
    flat = boot_disks.sparse_file(tmp_path / "made" / "disk.raw", 64 * MIB)
    commands = "g n 1 256 2303 t 1 n 2 4096 6143 w".replace(" ", "\n") + "\n"  # a table, the ESP, another partition
    boot_disks.run("fdisk", "--sector-size", "4096", "--wipe", "never", flat, stdin=commands.encode())
    path = tmp_path / "disk.vhdx"
    create_disk(path, size=64 * MIB, sector_size=4096)
    with open_disk(path, writable=True) as disk:
        disk.write_at(0, flat.read_bytes())
        disk.write_at(256 * 4096, esp)
        disk.write_at(4096 * 4096, make_root())
        disk.flush()
    finding = refused(path, "4k-sectors", "disk")
    assert finding["evidence"] == "the logical sector size is 4096 bytes"


def test_a_partition_beyond_2_tib(tmp_path: Path, esp: bytes, make_root: Callable[..., bytes]) -> None:
    places = plain_places(esp, make_root())
    places[1] = Place(2, LINUX, places[1].start_sector, (3 * TIB - GIB) // SECTOR, make_root())
    path = sparse_vhdx(tmp_path / "disk.vhdx", places, 3 * TIB)
    refused(path, "partition-beyond-2tib", "partition 2")


def test_more_than_a_fixed_vhd_holds(tmp_path: Path, esp: bytes, make_root: Callable[..., bytes]) -> None:
    path = sparse_vhdx(tmp_path / "disk.vhdx", plain_places(esp, make_root()), 2041 * GIB)
    refused(path, "disk-too-large", "disk", "--for-azure", inspected=False)
    assert godwit("convert", path, "--to", "gen1")[0] == 0  # as a VHDX it can be


@pytest.mark.parametrize("token", ['{"type":"systemd-tpm2"}', '{"type":"clevis","jwe":{"protected":"TPM"}}'])
def test_an_encrypted_root_that_a_tpm_opens(
    tmp_path: Path, esp: bytes, make_root: Callable[..., bytes], token: str
) -> None:
    if "TPM" in token:  # clevis names what opens the volume in a header that is base64
        import base64  # noqa: PLC0415

        header = base64.urlsafe_b64encode(b'{"clevis":{"pin":"tpm2"}}').decode().rstrip("=")
        token = token.replace("TPM", header)
    text = f'{{"keyslots":{{}},"tokens":{{"0":{token}}},"segments":{{}},"digests":{{}},"config":{{}}}}'
    header_bytes = (b"LUKS\xba\xbe\0\2" + struct.pack(">Q", 16384)).ljust(0xA8, b"\0") + disks.ROOT_UUID.encode()
    luks = header_bytes.ljust(4096, b"\0") + text.encode().ljust(12288, b"\0")
    finding = refused(raw(tmp_path, plain_places(esp, luks)), "luks-tpm", "partition 2")
    assert "passphrase" in finding["remedy"]


def test_no_efi_system_partition(tmp_path: Path, esp: bytes, make_root: Callable[..., bytes]) -> None:
    places = plain_places(esp, make_root())[1:]
    refused(raw(tmp_path, places), "no-esp", "disk")


def test_a_disk_of_data(tmp_path: Path) -> None:
    refused(raw(tmp_path, [Place(1, disks.BASIC_DATA, 2048, 4096)]), "no-system", "disk")
    (tmp_path / "other").mkdir()
    empty = boot_disks.sparse_file(tmp_path / "other" / "disk.raw", MIB)
    refused(empty, "no-table", "disk")


def test_already_of_generation_1(tmp_path: Path, esp: bytes, make_root: Callable[..., bytes]) -> None:
    path = raw(tmp_path, plain_places(esp, make_root()))
    assert godwit("convert", path, "--to", "gen1", "--in-place", "--yes")[0] == 0
    finding = refused(path, "is-generation-1", "disk")
    assert "--to gen2" in finding["remedy"]


def test_partuuid_that_no_other_name_fits_for(tmp_path: Path, esp: bytes, make_root: Callable[..., bytes]) -> None:
    path = raw(tmp_path, plain_places(esp, make_root(fstab="PARTLABEL=a / ext4 defaults 0 1\n")))
    refused(path, "fstab-partlabel", "/etc/fstab, line 1")


def test_the_table_has_more_partitions_than_fit(tmp_path: Path, esp: bytes, make_root: Callable[..., bytes]) -> None:
    places = plain_places(esp, make_root())
    start = PLAIN_SECTORS - 2048
    places += [Place(number, LINUX, start + (number - 3) * 64, 64) for number in range(3, 8)]
    # Packed from the first usable sector on: neither the boot core nor a record of a logical partition has room.
    shift = 2048 - 34
    places = [Place(one.number, one.kind, one.start_sector - shift, one.sectors, one.content) for one in places]
    path = raw(tmp_path, places, start - shift + 5 * 64 + 33)
    finding = refused(path, "no-room-for-core", "disk")
    assert "gap" in finding["message"] or "room" in finding["message"] or "free" in finding["message"]


def test_no_grub_on_this_machine(
    tmp_path: Path, esp: bytes, make_root: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is wrong with the disk: the machine that converts lacks a program, and is told its name."""
    path = raw(tmp_path, plain_places(esp, make_root()))
    monkeypatch.setattr(grub, "PROGRAMS", ("no-such-grub-mkimage",))
    code, out, said = godwit("convert", path, "--to", "gen1")
    assert (code, out) == (1, "")
    assert "no-such-grub-mkimage: is not installed" in said and "grub-pc-bin" in said
    code, out, _ = godwit("convert", path, "--to", "gen1", "--json")
    error = json.loads(out)["error"]
    assert (code, error["type"], error["exit_code"]) == (1, "ToolError", 1)
    assert "grub-common" in error["hint"]
    assert [item.name for item in tmp_path.iterdir()] == ["disk.raw"]
    assert godwit("inspect", path)[0] == 0


def test_protect_says_what_stands_against_a_recovery_as_generation_1(
    tmp_path: Path, esp: bytes, make_root: Callable[..., bytes]
) -> None:
    store = f"file://{tmp_path}/store"
    assert godwit("init", store)[0] == 0
    for name, fstab in (("good", None), ("bad", "PARTLABEL=a / ext4 defaults 0 1\n")):
        path = disks.make_disk(plain_places(esp, make_root(fstab=fstab)), PLAIN_SECTORS).to_file(tmp_path / name)
        code, text, said = godwit("protect", name, "--disk", path, "--store", store)
        assert code == 0, said
        assert ("could not be recovered as Generation 1" in text + said) is (name == "bad")
        code, text, _ = godwit("protect", name, "--update", "--disk", path, "--store", store, "--json")
        found = json.loads(text)["convertibility"]
        assert code == 0 and found["convertible"] is (name == "good")
        assert [one["rule"] for one in found["findings"]] == ([] if name == "good" else ["fstab-partlabel"])
