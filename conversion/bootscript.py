"""The configuration inside a GRUB core: how a guest that has only known UEFI is started by a BIOS.

What is made here is text in GRUB's script language, read by GRUB's ``normal`` (grub.cfg's language, not the few words
that a core knows by itself). It changes no file of the guest:

- a guest with GRUB is started through its own grub.cfg, with the commands that only a GRUB for UEFI has (or only Red
  Hat's: ``blscfg``) defined as functions;
- Boot Loader Specification entries are read when the machine starts, so kernels installed later are found: each line
  of such a file reads as a GRUB command, and the commands of that name are functions here. An entry whose text GRUB's
  language takes apart (an odd quote, a semicolon) is lost, and so the entries known at the time of the conversion
  can be given too: they are used where none is found;
- entries that are known beforehand only, of a kernel that was taken out of a unified image, say;
- Windows, through its boot manager for a BIOS.

GRUB finds commands before functions. For the function ``linux`` to be called, the module of that name must not be
loaded: it is in the core as a late module, and the function loads it when all is ready. A guest that also has modules
for a BIOS would bring that command back, and ones of a foreign version with it: there GRUB's own folder of modules
stays in the core, and the guest's is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from conversion.bootguests import EntriesGuest, GrubGuest, Guest, LoaderGuest, Place, WindowsGuest
from conversion.grubscript import (
    absolute,
    bls_functions,
    blscfg,
    indented,
    linux_function,
    loader_functions,
    menu,
    nothing_found,
    quoted,
    search,
    start,
    uefi_commands,
)

_DISK_MODULES: Final = ("biosdisk", "part_msdos", "part_gpt")
_SCRIPT_MODULES: Final = ("search", "test", "true", "echo", "regexp", "sleep", "configfile", "eval", "minicmd", "ls")
_TERMINAL_MODULES: Final = ("serial", "terminal")
_LINUX_MODULES: Final = (
    *_DISK_MODULES,
    *("lvm", "mdraid09", "mdraid1x", "ext2", "xfs", "btrfs", "f2fs", "fat", "ntfs"),
    *_SCRIPT_MODULES,
    *_TERMINAL_MODULES,
    # What a guest's grub.cfg may ask for, so that nothing is looked for in its folder of modules.
    *("loadenv", "gzio", "xzio", "lzopio", "zstd", "all_video", "gfxterm", "gfxterm_background", "gfxmenu", "font"),
    *("png", "jpeg", "gettext", "password", "password_pbkdf2", "keystatus", "cat", "probe", "halt", "reboot", "chain"),
    *("date", "read", "help", "hashsum"),
)
# What ``linux`` needs: inside from the start, so that the late module needs nothing but itself.
_LINUX_NEEDS: Final = ("relocator", "verifiers", "boot", "video", "mmap", "vbe")
_WINDOWS_MODULES: Final = (*_DISK_MODULES, "fat", "ntfs", *_SCRIPT_MODULES, *_TERMINAL_MODULES, "ntldr", "reboot")


@dataclass(frozen=True, slots=True)
class BootScript:
    """A configuration, the modules it needs, and those that it loads itself: the arguments of ``grub.build_core``."""

    configuration: str
    modules: tuple[str, ...]
    late_modules: tuple[str, ...]


def boot_script(guest: Guest) -> BootScript:
    """Return what the core for ``guest`` is to hold. Raises ValueError for text that no script can carry."""
    if isinstance(guest, GrubGuest):
        return grub_script(guest)
    if isinstance(guest, LoaderGuest):
        return loader_script(guest)
    if isinstance(guest, EntriesGuest):
        return entries_script(guest)
    return windows_script(guest)


def grub_script(guest: GrubGuest) -> BootScript:
    """Return the script that hands over to the guest's grub.cfg."""
    folder, file = absolute(guest.folder), quoted(f"/{guest.file}")
    body = [
        *search(guest.place, "root"),
        f"set godwit_folder=($root){quoted(folder)}",
        "export godwit_folder",
        f'if [ -f "$godwit_folder"{file} ]; then',
        # Its modules would be of another version than this GRUB: then the variable keeps pointing into the core, and
        # what the guest keeps in its environment is read and cleared for it.
        '    if [ -f "$godwit_folder/i386-pc/normal.mod" ]; then',
        '        if [ -s "$godwit_folder/grubenv" ]; then',
        '            load_env -f "$godwit_folder/grubenv"',
        '            if [ -n "$next_entry" ]; then',
        '                set godwit_next="$next_entry"',
        "                set next_entry=",
        '                save_env -f "$godwit_folder/grubenv" next_entry',
        '                set next_entry="$godwit_next"',
        "            fi",
        "            export saved_entry next_entry kernelopts boot_success",
        "        fi",
        "    else",
        '        set prefix="$godwit_folder"',
        "        export prefix",
        "    fi",
        f'    configfile "$godwit_folder"{file}',
        "fi",
        "fi",
        *nothing_found(f"{folder}/{guest.file}", guest.place.file_system_uuid),
    ]
    known = ["function godwit_known {", *indented(menu(guest.known_entries)), "    true", "}"]
    functions = [*uefi_commands(), *linux_function(guest.substitutions), *bls_functions(), *known, *blscfg()]
    return _linux_script([*functions, *body])


def loader_script(guest: LoaderGuest) -> BootScript:
    """Return the script that does what systemd-boot does: read the entries, take the default that loader.conf names."""
    folder = absolute(guest.entries_folder)
    loader = guest.loader or guest.place
    body = [
        f"set timeout={guest.timeout_seconds:d}",
        "set godwit_default=",
        *search(loader, "godwit_loader"),
        '    if [ -f "($godwit_loader)/loader/loader.conf" ]; then source "($godwit_loader)/loader/loader.conf"; fi',
        "fi",
        *search(guest.place, "root"),
        f'    godwit_entries "($root)"{quoted(folder)} versions',
        f'    godwit_default "($root)"{quoted(folder)}',
        "fi",
        'if [ -z "$godwit_found" ]; then',
        *indented(menu(guest.known_entries)),
        "    true",
        "fi",
    ]
    if not guest.known_entries:
        body += ['if [ -z "$godwit_found" ]; then', *nothing_found(folder, guest.place.file_system_uuid), "fi"]
    functions = [*linux_function(guest.substitutions), *bls_functions(), *loader_functions()]
    return _linux_script([*functions, *body])


def entries_script(guest: EntriesGuest) -> BootScript:
    """Return the script with a menu of the entries given."""
    if not guest.entries:
        raise ValueError("a menu without entries")
    body = [f"set timeout={guest.timeout_seconds:d}", "set default=0", *menu(guest.entries)]
    return _linux_script([*linux_function(()), *bls_functions(), *body])


def windows_script(guest: WindowsGuest) -> BootScript:
    """Return the script that starts the Windows Boot Manager: from the partition, else from the file system."""
    manager = absolute(guest.boot_manager)
    sought = [] if guest.partition is None else [f"partition {guest.partition:d}"]
    lines = []
    if guest.partition is not None:
        lines += [f'set root="$godwit_disk,msdos{guest.partition:d}"', "godwit_windows"]
    if guest.file_system_uuid is not None:
        lines += [*search(Place(guest.file_system_uuid, guest.partition), "root"), "    godwit_windows", "fi"]
        sought.append(guest.file_system_uuid)
    function = [
        "function godwit_windows {",
        f'    if [ -f "($root)"{quoted(manager)} ]; then',
        f'        ntldr "($root)"{quoted(manager)}',
        "        boot",
        "    fi",
        "}",
    ]
    script = [*start(), *function, *lines, *nothing_found(manager, " or ".join(sought))]
    return BootScript(_text(script), _WINDOWS_MODULES, ())


def _linux_script(lines: list[str]) -> BootScript:
    modules = tuple(dict.fromkeys((*_LINUX_MODULES, *_LINUX_NEEDS)))
    return BootScript(_text([*start(), *lines]), modules, ("linux",))


def _text(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
