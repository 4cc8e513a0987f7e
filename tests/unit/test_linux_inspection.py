"""What is found out about Linux systems: real file systems with the boot configurations of several distributions."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from conversion.finding import Severity
from conversion.linux import LinuxSystem, Partition, inspect_linux
from conversion.linux.commandline import arguments, device_name, parse_fstab, root_of, subvolume_of
from conversion.linux.osrelease import parse_os_release
from tests.support.linux_filesystems import DamagedDevice, FileDevice, run
from tests.unit.test_volumes import FIRST, METADATA, SECOND, physical, segment, volume

ESP = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
LINUX = UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
XBOOTLDR = UUID("bc13c2ff-59e6-4262-a352-b275fd6f7172")
ROOT_UUID = "6f0d3c52-8e43-4d5e-9a53-60d170000004"
BOOT_UUID = "6f0d3c52-8e43-4d5e-9a53-60d170000005"
ROOT_PART = UUID("aaaaaaaa-bbbb-cccc-dddd-000000000002")
ESP_PART = UUID("aaaaaaaa-bbbb-cccc-dddd-000000000001")
BOOT_PART = UUID("aaaaaaaa-bbbb-cccc-dddd-000000000003")
ELF = b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HH", 3, 62) + bytes(100)
KERNEL = (b"MZ" + bytes(0x200) + b"HdrS").ljust(4096, b"k")
RELEASE = 'ID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n'
Files = dict[str, bytes | str]


@pytest.fixture
def ext4(tmp_path: Path) -> Callable[..., FileDevice]:
    def make(files: Files, uuid: str = ROOT_UUID, label: str = "root", kind: str = "ext4") -> FileDevice:
        folder = tmp_path / f"tree-{uuid}"
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        image = tmp_path / f"image-{uuid}"
        run("mke2fs", "-q", "-F", "-t", kind, "-U", uuid, "-L", label, "-d", folder, image, "8M")
        return FileDevice(image.read_bytes())

    return make


@pytest.fixture
def esp(tmp_path: Path) -> Callable[[Files], FileDevice]:
    def make(files: Files) -> FileDevice:
        image = tmp_path / "esp"
        with image.open("wb") as file:
            file.truncate(8 << 20)
        run("mkfs.vfat", "-i", "60D17001", "-n", "ESP", image)
        made: set[str] = set()
        for name, content in files.items():
            parts = name.split("/")
            for depth in range(1, len(parts)):
                folder = "/".join(parts[:depth])
                if folder not in made:
                    run("mmd", "-i", image, f"::/{folder}")
                    made.add(folder)
            source = tmp_path / "source"
            source.write_bytes(content.encode() if isinstance(content, str) else content)
            run("mcopy", "-i", image, source, f"::/{name}")
        return FileDevice(image.read_bytes())

    return make


def root_files(*, root: str = f"UUID={ROOT_UUID}", fstab: str = f"UUID={ROOT_UUID} / ext4 defaults 0 1\n") -> Files:
    config = f"""
set default=0
search --no-floppy --fs-uuid --set=root {ROOT_UUID}
menuentry 'Debian GNU/Linux' --class debian {{
    linux /boot/vmlinuz-6.1.0-9-amd64 root={root} ro quiet
    initrd /boot/initrd.img-6.1.0-9-amd64
}}
"""
    return {
        "etc/os-release": RELEASE,
        "etc/fstab": fstab,
        "bin/sh": ELF,
        "boot/vmlinuz-6.1.0-9-amd64": KERNEL,
        "boot/vmlinuz-6.1.0-10-amd64": KERNEL,
        "boot/initrd.img-6.1.0-9-amd64": b"initrd",
        "boot/grub/grub.cfg": config,
    }


STUB = f"search.fs_uuid {ROOT_UUID} root hd0,gpt2\nset prefix=($root)'/boot/grub'\nconfigfile $prefix/grub.cfg\n"


def inspect(root: FileDevice, esp: FileDevice | None = None, *more: Partition) -> LinuxSystem:
    partitions = [Partition(2, root, LINUX, ROOT_PART, "root")]
    if esp is not None:
        partitions.insert(0, Partition(1, esp, ESP, ESP_PART, "EFI system"))
    system = inspect_linux([*partitions, *more])
    assert system is not None
    return system


def rules(system: LinuxSystem) -> dict[str, Severity]:
    return {finding.rule: finding.severity for finding in system.findings}


def test_debian_with_its_stub(ext4: Callable[..., FileDevice], esp: Callable[[Files], FileDevice]) -> None:
    system = inspect(ext4(root_files()), esp({"EFI/debian/grub.cfg": STUB, "EFI/debian/shimx64.efi": b"MZ"}))
    assert system.distribution is not None
    assert (system.distribution.id, system.distribution.version_id) == ("debian", "12")
    assert system.architecture == "x86_64"
    assert [kernel.version for kernel in system.kernels] == ["6.1.0-10-amd64", "6.1.0-9-amd64"]
    assert [kernel.initrd for kernel in system.kernels] == [None, "/boot/initrd.img-6.1.0-9-amd64"]
    assert system.grub[0].folder == "/boot/grub"
    assert system.grub[0].volume.uuid == ROOT_UUID
    assert system.grub_stubs[0].file_system_uuid == ROOT_UUID
    assert system.grub_stubs[0].prefix == "/boot/grub"
    (entry,) = system.entries
    assert (entry.title, entry.kernel) == ("Debian GNU/Linux", "/boot/vmlinuz-6.1.0-9-amd64")
    assert entry.initrds == ("/boot/initrd.img-6.1.0-9-amd64",)
    assert (entry.root.by, entry.root.value) == ("uuid", ROOT_UUID)
    assert system.root is system.grub[0].volume
    assert system.root_argument == f"root=UUID={ROOT_UUID}"
    assert rules(system) == {"secure-boot": Severity.WARNING}


def test_partuuids_are_edited_in_place(ext4: Callable[..., FileDevice], esp: Callable[[Files], FileDevice]) -> None:
    fstab = (
        f"# comment\nPARTUUID={ROOT_PART} / ext4 defaults 0 1\n"
        "PARTLABEL=EFI\\040system  /boot/efi vfat umask=0077 0 1\n"
        f"PARTUUID={ESP_PART}\t/efi vfat noauto 0 0\n"
        "PARTUUID=00000000-0000-0000-0000-000000000000 /data ext4 defaults 0 0\n"
        "PARTUUID=00000000-0000-0000-0000-000000000001 /old ext4 nofail 0 0\n"
    )
    root = ext4(root_files(root=f"PARTUUID={ROOT_PART}", fstab=fstab))
    system = inspect(root, esp({"EFI/debian/grub.cfg": STUB}))
    assert [(edit.line, edit.path) for edit in system.edits] == [(line, "/etc/fstab") for line in (2, 3, 4)]
    edited = bytearray(fstab.encode())
    for edit in system.edits:
        assert len(edit.old) == len(edit.new)
        assert fstab.encode()[edit.offset :].startswith(edit.old)
        assert b"".join(device.read_at(at, length) for device, at, length in edit.places) == edit.old
        edited[edit.offset : edit.offset + len(edit.new)] = edit.new
    entries = {entry.target: entry for entry in parse_fstab(bytes(edited))}
    assert (entries["/"].source.by, entries["/"].source.value) == ("uuid", ROOT_UUID)
    assert (entries["/boot/efi"].source.by, entries["/boot/efi"].source.value) == ("uuid", "60D1-7001")
    assert (entries["/efi"].source.by, entries["/efi"].source.value) == ("uuid", "60D1-7001")
    assert [entry.options for entry in parse_fstab(bytes(edited))] == [entry.options for entry in system.fstab]
    severities = {finding.subject: finding.severity for finding in system.findings if finding.rule == "fstab-partuuid"}
    assert severities == {
        "/etc/fstab, line 2": Severity.NOTE,
        "/etc/fstab, line 4": Severity.NOTE,
        "/etc/fstab, line 5": Severity.REFUSAL,
        "/etc/fstab, line 6": Severity.WARNING,
    }
    assert rules(system)["root-partuuid"] is Severity.NOTE


def test_a_short_partlabel_takes_the_label_or_is_refused(ext4: Callable[..., FileDevice]) -> None:
    fits = inspect(ext4(root_files(fstab="PARTLABEL=root / ext4 defaults 0 1\n")))
    assert [edit.new.strip() for edit in fits.edits] == [b"LABEL=root"]
    assert rules(fits)["fstab-partlabel"] is Severity.NOTE


def test_a_name_with_no_room_for_another_is_refused(ext4: Callable[..., FileDevice]) -> None:
    system = inspect(ext4(root_files(fstab="PARTLABEL=root / ext4 defaults 0 1\n"), label="other label"))
    assert system.edits == ()
    assert rules(system)["fstab-partlabel"] is Severity.REFUSAL


def test_red_hat_with_entries_and_kernelopts(
    ext4: Callable[..., FileDevice], esp: Callable[[Files], FileDevice]
) -> None:
    root = ext4({"etc/os-release": 'ID="rhel"\nVERSION_ID="9.3"\n', "etc/fstab": "", "bin/sh": ELF})
    boot = ext4(
        {
            "grub2/grub.cfg": "insmod increment\nblscfg\n",
            "grub2/grubenv": f"# GRUB Environment Block\nkernelopts=root=UUID={ROOT_UUID} ro\n" + "#" * 900,
            "loader/entries/abc-5.14.conf": "title RHEL 9\nversion 5.14\nlinux /vmlinuz-5.14\n"
            "initrd /initramfs-5.14.img $tuned_initrd\noptions $kernelopts $tuned_params\ngrub_users $grub_users\n",
            "vmlinuz-5.14": KERNEL,
            "initramfs-5.14.img": b"initrd",
        },
        BOOT_UUID,
        "boot",
    )
    system = inspect(root, esp({"EFI/redhat/grub.cfg": STUB}), Partition(3, boot, LINUX, BOOT_PART, "boot"))
    assert system.distribution is not None
    assert system.distribution.id == "rhel"
    assert system.grub[0].uses_bls
    assert system.grub[0].folder == "/grub2"
    (folder,) = system.entries_folders
    assert (folder.folder, folder.volume.uuid) == ("/loader/entries", BOOT_UUID)
    (entry,) = folder.entries
    assert (entry.title, entry.kernel, entry.initrds) == ("RHEL 9", "/vmlinuz-5.14", ("/initramfs-5.14.img",))
    assert entry.command_line == f"root=UUID={ROOT_UUID} ro"
    assert [kernel.image for kernel in system.kernels] == ["/vmlinuz-5.14"]
    assert system.kernels[0].initrd == "/initramfs-5.14.img"
    assert system.root is not None
    assert system.root.uuid == ROOT_UUID
    assert not [finding for finding in system.findings if finding.severity is Severity.REFUSAL]


def test_systemd_boot_and_a_unified_kernel(ext4: Callable[..., FileDevice], esp: Callable[[Files], FileDevice]) -> None:
    root = ext4({"usr/lib/os-release": "ID=arch\n", "etc/fstab": "", "bin/sh": ELF})
    files: Files = {
        "EFI/systemd/systemd-bootx64.efi": b"MZ",
        "EFI/Linux/arch.efi": unified(f"root=UUID={ROOT_UUID} rw"),
        "loader/loader.conf": "timeout 5\ndefault arch*\n",
        "loader/entries/arch.conf": "title Arch\nlinux /vmlinuz-linux\n"
        "initrd /ucode.img\ninitrd /initrd.img\noptions quiet\n",
        "vmlinuz-linux": KERNEL,
    }
    system = inspect(root, esp(files))
    assert system.systemd_boot is not None
    assert (system.systemd_boot.timeout, system.systemd_boot.default) == ("5", "arch*")
    entry, image = system.entries
    assert entry.initrds == ("/ucode.img", "/initrd.img")
    assert entry.root.by == "auto"
    assert rules(system)["root-auto"] is Severity.REFUSAL
    assert (image.source, image.kernel, image.version) == ("uki", "/EFI/Linux/arch.efi", "6.6.1")
    assert image.command_line == f"root=UUID={ROOT_UUID} rw"
    (one,) = system.unified_kernels
    assert one.linux is not None
    assert one.initrd is not None
    raw = files["EFI/Linux/arch.efi"]
    assert isinstance(raw, bytes)
    assert raw[one.linux[0] : sum(one.linux)] == KERNEL
    assert raw[one.initrd[0] : sum(one.initrd)] == b"initrd of the image"
    assert one.pretty_name == "Arch Linux"


def unified(command_line: str) -> bytes:
    sections = {
        ".osrel": b'PRETTY_NAME="Arch Linux"\n',
        ".cmdline": command_line.encode() + b"\n\0",
        ".uname": b"6.6.1",
        ".linux": KERNEL,
        ".initrd": b"initrd of the image",
    }
    head = b"MZ".ljust(60, b"\0") + struct.pack("<I", 64) + b"PE\0\0"
    head += struct.pack("<HHIIIHH", 0x8664, len(sections), 0, 0, 0, 0, 0)
    body, at = b"", 1024
    for name, content in sections.items():
        size = -(-len(content) // 512) * 512
        head += struct.pack("<8sIIIIIIHHI", name.encode(), len(content), 0, size, at, 0, 0, 0, 0, 0)
        body += content.ljust(size, b"\0")
        at += size
    return head.ljust(1024, b"\0") + body


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"boot/vmlinuz-6.1.0-9-amd64": None, "boot/vmlinuz-6.1.0-10-amd64": None}, "no-kernel"),
        ({"boot/grub/grub.cfg": None}, "no-boot-configuration"),
        ({"etc/os-release": None, "etc/fstab": None}, "unreadable-root"),
        ({"bin/sh": ELF[:18] + b"\xb7\0" + ELF[20:]}, "arm64"),
    ],
)
def test_what_is_missing_is_refused(
    ext4: Callable[..., FileDevice], change: dict[str, bytes | None], rule: str
) -> None:
    files = root_files()
    for name, content in change.items():
        if content is None:
            del files[name]
        else:
            files[name] = content
    refusals = {found.rule for found in inspect(ext4(files)).findings if found.severity is Severity.REFUSAL}
    assert refusals == {rule}


def test_hibernation_and_encryption_are_found(ext4: Callable[..., FileDevice]) -> None:
    asleep = bytearray(65536)
    asleep[4086:4096] = b"S1SUSPEND\0"
    system = inspect(ext4(root_files()), None, Partition(3, FileDevice(bytes(asleep))))
    assert rules(system)["hibernated"] is Severity.REFUSAL
    token = b'{"tokens": {"0": {"type": "systemd-tpm2", "keyslots": ["1"]}}}'
    header = (b"LUKS\xba\xbe\0\2" + (16384).to_bytes(8, "big")).ljust(0xA8, b"\0") + ROOT_UUID.encode()
    locked = FileDevice(header.ljust(4096, b"\0") + token.ljust(65536, b"\0"))
    alone = inspect_linux([Partition(1, locked)])
    assert alone is not None
    assert rules(alone)["luks-tpm"] is Severity.REFUSAL
    assert rules(alone)["encrypted-boot"] is Severity.REFUSAL
    beside = inspect(ext4(root_files()), None, Partition(3, locked))
    assert rules(beside)["luks-tpm"] is Severity.WARNING


def test_nothing_of_linux_is_none(esp: Callable[[Files], FileDevice]) -> None:
    assert inspect_linux([]) is None
    assert inspect_linux([Partition(1, FileDevice(bytes(65536)))]) is None
    assert inspect_linux([Partition(1, esp({"EFI/Microsoft/x": b""}), ESP)]) is None


def test_a_damaged_guest_is_findings_and_no_error(ext4: Callable[..., FileDevice]) -> None:
    root = ext4(root_files(), kind="ext2")
    chance = random.Random(5)
    used = [at for at in range(0, root.size, 256) if any(root.read_at(at, 256))]
    for _ in range(60):
        places = chance.choices(used, k=chance.choice([1, 4, 40]))
        changed = {at + chance.randrange(256): chance.choice([0, 255, chance.randrange(256)]) for at in places}
        changed |= {
            at: chance.randrange(256) for at in range(1024 + chance.randrange(200), 1026 + chance.randrange(200))
        }
        inspect_linux([Partition(2, DamagedDevice(root, changed), LINUX, ROOT_PART, "root")])


def test_a_memory_test_and_a_shell_are_no_kernels(
    ext4: Callable[..., FileDevice], esp: Callable[[Files], FileDevice]
) -> None:
    files = root_files()
    config = files["boot/grub/grub.cfg"]
    assert isinstance(config, str)
    files["boot/grub/grub.cfg"] = config + "menuentry 'Memory test' {\n  linux /boot/memtest86+x64.bin\n}\n"
    shell: Files = {"loader/entries/shell.conf": "title Shell\nefi /shellx64.efi\n"}
    system = inspect(ext4(files), esp(shell))
    assert len(system.entries) == 2
    assert system.entries_folders == ()
    assert rules(system) == {}


def test_a_root_on_lvm_with_a_boot_partition(ext4: Callable[..., FileDevice]) -> None:
    fstab = f"PARTUUID={BOOT_PART} /boot ext4 defaults 0 1\n/dev/mapper/vg--0-root / ext4 defaults 0 1\n"
    root = ext4({"etc/os-release": RELEASE, "etc/fstab": fstab, "bin/sh": ELF})
    pieces = volume("root", segment(0, 3, ("pv0", 4)), segment(3, 5, ("pv0", 7)))
    text = METADATA.format(sequence=1, first=FIRST, second=SECOND, volumes=pieces)
    extents = bytes(4 << 20) + root.read_at(0, 8 << 20)
    group = FileDevice(physical(FIRST, text, extents, size=40 << 20))
    config = "menuentry 'x' {\n linux /vmlinuz-6.1 root=/dev/mapper/vg--0-root ro\n initrd /initrd.img-6.1\n}\n"
    boot = ext4({"grub/grub.cfg": config, "vmlinuz-6.1": KERNEL, "initrd.img-6.1": b""}, BOOT_UUID, "boot")
    system = inspect_linux([Partition(3, boot, LINUX, BOOT_PART, "boot"), Partition(2, group, LINUX, ROOT_PART)])
    assert system is not None
    assert system.root is not None
    assert system.root.mapper_name == "vg--0-root"
    assert system.root_argument == "root=/dev/mapper/vg--0-root"
    assert system.grub[0].volume.uuid == BOOT_UUID
    assert (system.grub[0].folder, system.entries[0].root.by) == ("/grub", "mapper")
    (edit,) = system.edits
    assert edit.new.decode().strip() == f"UUID={BOOT_UUID}"
    assert all(device is group for device, _, _ in edit.places)
    assert b"".join(device.read_at(at, length) for device, at, length in edit.places) == edit.old
    assert {found.severity for found in system.findings} == {Severity.NOTE}


def test_a_root_on_btrfs(tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    for name, content in root_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(160 << 20)
    run("mkfs.btrfs", "-q", "-U", ROOT_UUID, "--rootdir", folder, image)
    system = inspect(FileDevice(image))
    assert system.root is not None
    assert (system.root.uuid, system.root_path) == (ROOT_UUID, "")
    assert [kernel.version for kernel in system.kernels] == ["6.1.0-10-amd64", "6.1.0-9-amd64"]
    assert rules(system) == {}


def test_names_of_devices() -> None:
    assert device_name("/dev/mapper/vg--0-root").value == "vg--0-root"
    assert device_name("/dev/vg-0/root").value == "vg--0-root"
    assert device_name("/dev/sda2").by == "device"
    assert device_name("/dev/disk/by-partuuid/abc").by == "partuuid"
    assert device_name('UUID="abc"').value == "abc"
    assert root_of("ro root=LABEL=x root=UUID=y").value == "y"
    assert root_of("ro quiet").by == "auto"
    assert subvolume_of("rootflags=noatime,subvol=/@/x root=UUID=y") == "@/x"
    assert subvolume_of("rootflags=subvolid=256") == "id:256"
    assert arguments('a "b c"=d dyndbg="file x +p" e') == ["a", "b c=d", "dyndbg=file x +p", "e"]
    assert parse_os_release('ID=\'x\'\nVERSION_ID="unfinished\n#ID=y\nPRETTY_NAME="a \\"b\\""\n').id == "x"
