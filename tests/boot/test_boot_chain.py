"""The chain from a BIOS to a guest, with stubs at its end that tell what they were given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from conversion.bootguests import (
    EntriesGuest,
    Entry,
    GrubGuest,
    Guest,
    LoaderGuest,
    Place,
    Substitution,
    WindowsGuest,
)
from conversion.bootscript import boot_script
from tests.support import boot_disks
from tests.support.boot_disks import MIB, SECTOR, Partition

pytestmark = [pytest.mark.boot, pytest.mark.xdist_group("machines")]

FAT_VOLUME = "60D1-7002"
EXT4_UUID = "6f0d3c52-8e43-4d5e-9a53-60d170000009"
PARTUUID = "6f0d3c52-8e43-4d5e-9a53-60d1700000aF"
START = MIB // SECTOR
SECTORS = 64 * MIB // SECTOR


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    missing = boot_disks.missing_tools()
    if missing:
        reason = f"not installed: {', '.join(missing)}; `make setup` installs what is needed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return boot_disks.sparse_file(tmp_path / "disk.raw", 160 * MIB)


def started(disk: Path, guest: Guest) -> list[str]:
    boot_disks.install_chain(disk, boot_script(guest))
    return boot_disks.run_stub(disk)


def told(lines: list[str], word: str) -> str:
    """What a stub said after ``word``."""
    return next(line.removeprefix(word) for line in lines if line.startswith(word))


class TestWindows:
    def bootmgr(self, tmp_path: Path) -> dict[str, bytes | Path]:
        return {"/bootmgr": boot_disks.assemble(boot_disks.BOOTMGR, tmp_path, "bootmgr")}

    def test_fat32_system_partition(self, tmp_path: Path, disk: Path) -> None:
        boot_disks.write_mbr(disk, [Partition(START, SECTORS, 0x0C, active=True)])
        boot_disks.make_fat(disk, START, SECTORS, self.bootmgr(tmp_path), volume="60D17002")
        lines = started(disk, WindowsGuest(partition=1, file_system_uuid=FAT_VOLUME))
        assert told(lines, "STUB-BOOTMGR") == " cs=2000 ip=0000 dl=0080 hidden=00000800 oem=mkfs.fat"

    def test_ntfs_system_partition_by_its_serial_number_alone(self, tmp_path: Path, disk: Path) -> None:
        boot_disks.write_mbr(disk, [Partition(START, SECTORS, 0x07, active=True)])
        serial = boot_disks.make_ntfs(disk, START, SECTORS, self.bootmgr(tmp_path))
        lines = started(disk, WindowsGuest(partition=None, file_system_uuid=serial))
        assert told(lines, "STUB-BOOTMGR") == " cs=2000 ip=0000 dl=0080 hidden=00000800 oem=NTFS    "

    def test_logical_partition(self, tmp_path: Path, disk: Path) -> None:
        second = START + SECTORS + 2048
        partitions = [Partition(START, 2048, 0x83), Partition(second, SECTORS, 0x0C, logical=True)]
        boot_disks.write_mbr(disk, partitions)
        boot_disks.make_fat(disk, second, SECTORS, self.bootmgr(tmp_path), volume="60D17002")
        lines = started(disk, WindowsGuest(partition=5, file_system_uuid=None))
        assert told(lines, "STUB-BOOTMGR") == f" cs=2000 ip=0000 dl=0080 hidden={second:08x} oem=mkfs.fat"

    def test_says_what_is_missing(self, disk: Path) -> None:
        boot_disks.write_mbr(disk, [Partition(START, SECTORS, 0x0C, active=True)])
        boot_disks.make_fat(disk, START, SECTORS, {}, volume="60D17002")
        boot_disks.install_chain(disk, boot_script(WindowsGuest(partition=1, file_system_uuid=FAT_VOLUME)))
        lines = boot_disks.run_stub(disk, end="Nothing to start")
        assert "Nothing to start: /bootmgr is not on partition 1 or 60D1-7002." in lines


class TestGrub:
    """A guest's grub.cfg, as written for UEFI, on a disk without a module for a BIOS."""

    def make(self, disk: Path, tmp_path: Path, files: dict[str, bytes | Path]) -> None:
        kernel = boot_disks.assemble(boot_disks.KERNEL, tmp_path, "kernel")
        boot_disks.write_mbr(disk, [Partition(START, SECTORS, 0x83)])
        files = {"/boot/vmlinuz": kernel, "/boot/initrd": b"the initrd", **files}
        boot_disks.make_ext4(disk, START, SECTORS, files, uuid=EXT4_UUID)

    def test_debian_with_modules_that_do_not_exist(self, tmp_path: Path, disk: Path) -> None:
        configuration = f"""\
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${{next_entry}}" ] ; then
   set default="${{next_entry}}"
   set next_entry=
   save_env next_entry
else
   set default="0"
fi
if [ x"${{feature_menuentry_id}}" = xy ]; then menuentry_id_option="--id"; else menuentry_id_option=""; fi
export menuentry_id_option
if loadfont unicode ; then set gfxmode=auto; insmod gfxterm; fi
insmod efi_gop
insmod efi_uga
rmmod tpm
set timeout=0
if [ "$grub_platform" = "efi" ]; then
    set default=firmware
    menuentry 'UEFI Firmware Settings' $menuentry_id_option 'firmware' {{ fwsetup }}
fi
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple' {{
    insmod gzio
    if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
    insmod part_gpt
    insmod ext2
    search --no-floppy --fs-uuid --set=root {EXT4_UUID}
    echo 'Loading Linux ...'
    linux /boot/vmlinuz root=PARTUUID={PARTUUID} resume=PARTUUID={PARTUUID.lower()} ro dyndbg="file a +p"
    initrd /boot/initrd
}}
"""
        self.make(disk, tmp_path, {"/boot/grub/grub.cfg": configuration.encode()})
        substitution = Substitution(PARTUUID.lower(), "UUID=abc")
        lines = started(disk, GrubGuest(Place(EXT4_UUID, 1), "/boot/grub", (substitution,)))
        expected = 'BOOT_IMAGE=/boot/vmlinuz root=UUID=abc resume=UUID=abc ro "dyndbg=file a +p"'
        assert told(lines, "STUB-COMMAND ") == expected
        assert told(lines, "STUB-INITRD ") == "the initrd"

    def test_linuxefi_and_a_guest_with_modules_for_a_bios(self, tmp_path: Path, disk: Path) -> None:
        configuration = """\
set timeout=0
set default="${saved_entry}"
menuentry wrong { true }
menuentry right --id right {
    linuxefi /boot/vmlinuz root=/dev/sda1
    initrdefi /boot/initrd
}
"""
        environment = b"# GRUB Environment Block\nsaved_entry=right\n".ljust(1024, b"#")
        foreign = {
            "/boot/grub/i386-pc/normal.mod": b"of another version",
            "/boot/grub/i386-pc/linux.mod": b"of another version",
            "/boot/grub/i386-pc/command.lst": b"linux: linux\ninitrd: linux\n",
            "/boot/grub/grubenv": environment,
        }
        self.make(disk, tmp_path, {"/boot/grub/it's.cfg": configuration.encode(), **foreign})
        lines = started(disk, GrubGuest(Place(EXT4_UUID, 1), "/boot/grub", file="it's.cfg"))
        assert told(lines, "STUB-COMMAND ") == "BOOT_IMAGE=/boot/vmlinuz root=/dev/sda1"
        assert told(lines, "STUB-INITRD ") == "the initrd"

    @pytest.mark.parametrize("saved", ["", "mid-5.14.0-70.el9"])
    def test_red_hat_entries(self, tmp_path: Path, disk: Path, saved: str) -> None:
        configuration = f"""\
set timeout=0
load_env -f ${{config_directory}}/grubenv
set default="${{saved_entry}}"
increment boot_indeterminate
search --no-floppy --fs-uuid --set=root {EXT4_UUID}
insmod blscfg
blscfg
"""
        environment = f"# GRUB Environment Block\nsaved_entry={saved}\nkernelopts=root=PARTUUID={PARTUUID} ro quiet\n"
        versions = ("0-rescue", "5.14.0-70.el9", "5.14.0-427.el9", "5.14.0-427.13.1.el9")
        files: dict[str, bytes | Path] = {"/boot/grub2/grub.cfg": configuration.encode()}
        files["/boot/grub2/grubenv"] = environment.encode().ljust(1024, b"#")
        for version in versions:
            text = f"""\
title Red Hat Enterprise Linux ({version}) 9.4 (Plow)
version {version}
linux /boot/vmlinuz-{version}
initrd /boot/initrd $tuned_initrd
initrd /boot/initrd
options $kernelopts $tuned_params crashkernel=1G-4G:192M,4G-64G:256M dyndbg="file a +p"
grub_users $grub_users
grub_arg --unrestricted
grub_class rhel
"""
            files[f"/boot/loader/entries/mid-{version}.conf"] = text.encode()
            files[f"/boot/vmlinuz-{version}"] = boot_disks.assemble(boot_disks.KERNEL, tmp_path, "kernel")
        self.make(disk, tmp_path, files)
        guest = GrubGuest(Place(EXT4_UUID, 1), "/boot/grub2", (Substitution(PARTUUID, "UUID=abc"),))
        lines = started(disk, guest)
        version = saved.removeprefix("mid-") or "5.14.0-427.13.1.el9"
        options = 'root=UUID=abc ro quiet crashkernel=1G-4G:192M,4G-64G:256M "dyndbg=file a +p"'
        assert told(lines, "STUB-COMMAND ") == f"BOOT_IMAGE=(hd0,msdos1)/boot/vmlinuz-{version} {options}"
        assert told(lines, "STUB-INITRD ").replace("\0", "") == "the initrdthe initrd"


class TestLoaderEntries:
    @pytest.mark.parametrize(
        ("loader", "expected"),
        [
            ("timeout 0\nconsole-mode keep\n", "6.1.0-56"),
            ("timeout 0\ndefault mid-6.1.0-9.conf\n", "6.1.0-9"),
            ("timeout 0\ndefault *-6.1.0-*\n", "6.1.0-56"),
            ("#timeout 3\ntimeout menu-hidden\ntimeout 0\ndefault old\n", "5.10"),
        ],
    )
    def test_newest_or_what_loader_conf_names(self, tmp_path: Path, disk: Path, loader: str, expected: str) -> None:
        files: dict[str, bytes | Path] = {"/loader/loader.conf": loader.encode()}
        for name, version in (("mid-6.1.0-9", "6.1.0-9"), ("mid-6.1.0-56", "6.1.0-56"), ("old", "5.10")):
            text = f"""\
# a remark that isn't one of ours
title      Debian GNU/Linux 12 (bookworm)
version    {version}
machine-id 6f0d3c528e434d5e9a5360d170000005
sort-key   debian
options    root=PARTUUID={PARTUUID} rootflags=subvol=@ systemd.machine_id=6f0d
linux      /mid/{version}/linux
initrd     /mid/{version}/initrd"""
            files[f"/loader/entries/{name}.conf"] = text.encode()
            files[f"/mid/{version}/linux"] = boot_disks.assemble(boot_disks.KERNEL, tmp_path, "kernel")
            files[f"/mid/{version}/initrd"] = b"initrd of " + version.encode()
        boot_disks.write_mbr(disk, [Partition(START, SECTORS, 0xEF)])
        boot_disks.make_fat(disk, START, SECTORS, files, volume="60D17002")
        guest = LoaderGuest(Place(FAT_VOLUME, 1), substitutions=(Substitution(PARTUUID, "UUID=abc"),))
        lines = started(disk, guest)
        options = "root=UUID=abc rootflags=subvol=@ systemd.machine_id=6f0d"
        assert told(lines, "STUB-COMMAND ") == f"BOOT_IMAGE=(hd0,msdos1)/mid/{expected}/linux {options}"
        assert told(lines, "STUB-INITRD ") == f"initrd of {expected}"
        assert not any(line.startswith("Nothing to start") for line in lines)

    def test_known_entries_where_none_is_left(self, tmp_path: Path, disk: Path) -> None:
        files: dict[str, bytes | Path] = {"/loader/loader.conf": b"timeout 0\n", "/it's/i": b"the initrd"}
        files["/it's/linux"] = boot_disks.assemble(boot_disks.KERNEL, tmp_path, "kernel")
        boot_disks.write_mbr(disk, [Partition(START, SECTORS, 0xEF)])
        boot_disks.make_fat(disk, START, SECTORS, files, volume="60D17002")
        line = 'root=LABEL=it\'s a=$b;c "d e" x*'
        entry = Entry("Someone's Linux", Place(FAT_VOLUME), "/it's/linux", ("/it's/i", "/it's/i"), line)
        lines = started(disk, LoaderGuest(Place(FAT_VOLUME, 1), known_entries=(entry,)))
        assert (
            told(lines, "STUB-COMMAND ") == "BOOT_IMAGE=(hd0,msdos1)/it\\'s/linux root=LABEL=it\\'s a=$b;c \"d e\" x*"
        )
        assert told(lines, "STUB-INITRD ").replace("\0", "") == "the initrdthe initrd"

    def test_entries_alone(self, tmp_path: Path, disk: Path) -> None:
        boot_disks.write_mbr(disk, [Partition(START, SECTORS, 0xEF)])
        kernel = boot_disks.assemble(boot_disks.KERNEL, tmp_path, "kernel")
        boot_disks.make_fat(disk, START, SECTORS, {"/EFI/Linux/kernel": kernel}, volume="60D17002")
        place = Place(FAT_VOLUME, 1)
        entries = (Entry("one", place, "/EFI/Linux/kernel", (), "a b"), Entry("two", place, "/none", (), ""))
        lines = started(disk, EntriesGuest(entries, timeout_seconds=0))
        assert told(lines, "STUB-COMMAND ") == "BOOT_IMAGE=(hd0,msdos1)/EFI/Linux/kernel a b"
        assert told(lines, "STUB-INITRD ") == ""
