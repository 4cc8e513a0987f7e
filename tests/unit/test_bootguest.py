"""What takes the place of names that the partition table gives: in the script, and where command lines are known."""

from __future__ import annotations

import re
from dataclasses import replace
from uuid import UUID

import pytest

from conversion.bootguests import EntriesGuest, Entry, GrubGuest, Guest, LoaderGuest, Place, Substitution
from conversion.filesystems.probe import Probed
from conversion.linux.bootguest import boot_guest
from conversion.linux.commandline import root_of
from conversion.linux.system import BootEntry, EntriesFolder, GrubConfig, LinuxSystem, Partition, Volume
from tests.support.linux_filesystems import FileDevice

PARTITION = UUID("6f0d3c52-8e43-4d5e-9a53-60d1700000af")
ROOT = "6f0d3c52-8e43-4d5e-9a53-60d170000009"
SIGNATURE = 0x60D17002

SUBSTITUTION = Substitution(str(PARTITION), f"UUID={ROOT}", "root-1.a+b")


@pytest.mark.parametrize(
    ("argument", "becomes"),
    [
        (f"root=PARTUUID={PARTITION}", f"root=UUID={ROOT}"),
        (f"resume=PARTUUID={str(PARTITION).upper()}", f"resume=UUID={ROOT}"),
        (f"root=/dev/disk/by-partuuid/{PARTITION}", f"root=UUID={ROOT}"),
        ("root=PARTLABEL=root-1.a+b", f"root=UUID={ROOT}"),
        ("root=/dev/disk/by-partlabel/root-1.a+b", f"root=UUID={ROOT}"),
        ("root=PARTLABEL=ROOT-1.a+b", None),  # names, unlike UUIDs, are told apart by case
        ("root=PARTLABEL=root-1xa+b", None),
        (f"root=PARTUUID={PARTITION}0", None),
        (f"root=PARTUUID={PARTITION}/PARTNROFF=1", None),
        (f"PARTUUID={PARTITION}", None),
        ("root=LABEL=root-1.a+b", None),
        ("quiet", None),
    ],
)
def test_the_script_and_the_program_replace_the_same(argument: str, becomes: str | None) -> None:
    assert SUBSTITUTION.made_in(argument) == (becomes or argument)
    matched = [found for pattern in SUBSTITUTION.patterns() if (found := re.search(pattern, argument))]
    assert [f"{found[1]}{SUBSTITUTION.replacement}" for found in matched] == ([becomes] if becomes else [])


@pytest.mark.parametrize("label", ["two words", "a'b", 'a"b', "a$b", "a[b"])
def test_a_name_that_no_command_line_holds_is_no_substitution(label: str) -> None:
    with pytest.raises(ValueError, match="name of a partition"):
        Substitution(str(PARTITION), "UUID=x", label)


def volume(label: str = "system") -> Volume:
    device = FileDevice(bytes(4096))
    probed = Probed("ext4", ROOT, "")
    return Volume("partition 2", Partition(2, device, None, PARTITION, label), device, probed, None)


def entry(command_line: str, *, initrds: tuple[str, ...] = ("/initrd",), source: str = "grub") -> BootEntry:
    named = root_of(command_line)
    made = BootEntry("bls", "/x.conf", "A\ttitle", "/vmlinuz", initrds, command_line, named, None, volume())
    return replace(made, source=source)  # type: ignore[arg-type]


def system(*entries: BootEntry, label: str = "system") -> LinuxSystem:
    config = GrubConfig(volume(label), "/boot/grub", "grub.cfg", False, (), entries)
    return LinuxSystem((volume(label),), grub=(config,))


def substitutions(guest: Guest) -> tuple[Substitution, ...]:
    assert isinstance(guest, (GrubGuest, LoaderGuest))
    return guest.substitutions


def number_of(number: int) -> int:
    return number


def test_a_root_is_named_by_its_file_system() -> None:
    guest = boot_guest(system(entry(f"root=PARTUUID={PARTITION} ro")), number_of, signature=SIGNATURE)
    assert substitutions(guest) == (Substitution(str(PARTITION), f"UUID={ROOT}", "system"),)


def test_a_kernel_without_an_initial_ram_disk_finds_its_root_by_the_new_table() -> None:
    guest = boot_guest(system(entry("root=PARTLABEL=system ro", initrds=())), number_of, signature=SIGNATURE)
    assert substitutions(guest) == (Substitution(str(PARTITION), "PARTUUID=60d17002-02", "system"),)


def test_a_name_with_blanks_is_left_out() -> None:
    guest = boot_guest(system(entry("root=UUID=x ro"), label="EFI system partition"), number_of, signature=1)
    assert substitutions(guest)[0].partlabel == ""


def test_command_lines_that_are_known_beforehand_are_replaced_too() -> None:
    known = entry(f"root=PARTUUID={PARTITION}\tro quiet", source="bls")
    folder = EntriesFolder(volume(), "/loader/entries", (known,))
    guest = boot_guest(LinuxSystem((volume(),), entries_folders=(folder,)), number_of)
    assert isinstance(guest, LoaderGuest)
    (one,) = guest.known_entries
    assert (one.title, one.command_line) == ("A title", f"root=UUID={ROOT} ro quiet")


def test_unified_kernels_are_replaced_too() -> None:
    unified = Entry("UKI", Place(ROOT, 2), "/linux0", (), f"root=PARTUUID={PARTITION} rw")
    guest = boot_guest(LinuxSystem((volume(),)), number_of, (unified,))
    assert isinstance(guest, EntriesGuest)
    assert guest.entries[0].command_line == f"root=UUID={ROOT} rw"
