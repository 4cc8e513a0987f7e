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

import re
from dataclasses import dataclass
from typing import Final

from conversion.grub import MEMDISK

_UUID: Final = re.compile(r"[0-9A-Fa-f]+(?:-[0-9A-Fa-f]+)*")
_HEX_LETTER: Final = re.compile(r"[a-f]")
LABEL: Final = re.compile(r"[A-Za-z0-9_.+-]+")
_MOST_ENTRIES: Final = 64
_LONGEST_TEXT: Final = 8192

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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file system is: its UUID as GRUB and blkid write it, and its number in the MBR, asked first if given.

    The number counts as the partition table does: 1 to 4, and 5 on for logical partitions. One file system on two
    disks (a disk and its copy) is found on the disk that was booted from.
    """

    file_system_uuid: str
    partition: int | None = None

    def __post_init__(self) -> None:
        if not _UUID.fullmatch(self.file_system_uuid):
            raise ValueError(f"no UUID of a file system: {self.file_system_uuid!r}")
        if self.partition is not None and not 1 <= self.partition <= 255:
            raise ValueError(f"no number of a partition: {self.partition}")


@dataclass(frozen=True, slots=True)
class Substitution:
    """An argument ``KEY=PARTUUID=partuuid`` of the kernel becomes ``KEY=replacement``, ``UUID=…`` say.

    ``partlabel`` is a name of the same partition, where it may go by that too. Paths in /dev/disk are other ways to
    write either.
    """

    partuuid: str
    replacement: str
    partlabel: str = ""

    def __post_init__(self) -> None:
        if not _UUID.fullmatch(self.partuuid):
            raise ValueError(f"no UUID of a partition: {self.partuuid!r}")
        if self.partlabel and not LABEL.fullmatch(self.partlabel):
            raise ValueError(f"no name of a partition that a kernel command line can hold: {self.partlabel!r}")
        if not self.replacement or re.search(r"\s", self.replacement):
            raise ValueError(f"nothing to put in the place of a PARTUUID: {self.replacement!r}")

    def made_in(self, argument: str) -> str:
        """Return an argument of the kernel with this substitution made."""
        key, separator, value = argument.partition("=")
        for name, prefixes, fold in (
            (self.partuuid.lower(), ("PARTUUID=", "/dev/disk/by-partuuid/"), True),
            (self.partlabel, ("PARTLABEL=", "/dev/disk/by-partlabel/"), False),
        ):
            for prefix in prefixes:
                rest = value.removeprefix(prefix)
                if name and value.startswith(prefix) and (rest.lower() if fold else rest) == name:
                    return f"{key}{separator}{self.replacement}"
        return argument

    def patterns(self) -> list[str]:
        """Return the same as regular expressions; the first group is what stays."""
        uuid = _HEX_LETTER.sub(lambda found: f"[{found[0]}{found[0].upper()}]", self.partuuid.lower())
        found = [f"^([^=]*=)(PARTUUID=|/dev/disk/by-partuuid/){uuid}$"]
        if self.partlabel:
            label = self.partlabel.replace(".", "[.]").replace("+", "[+]")
            found.append(f"^([^=]*=)(PARTLABEL=|/dev/disk/by-partlabel/){label}$")
        return found


@dataclass(frozen=True, slots=True)
class Entry:
    """One kernel to start. Paths begin at the root of the file system (on btrfs: of its top-level subvolume)."""

    title: str
    place: Place
    kernel: str
    initrds: tuple[str, ...]
    command_line: str  # without the kernel's name; split at blanks outside of double quotes


@dataclass(frozen=True, slots=True)
class GrubGuest:
    """A guest with a grub.cfg: in ``folder`` (``/boot/grub``, ``/grub2``, ``/@/boot/grub``) of the file system.

    ``folder`` is what the guest's ``$prefix`` is to be: its environment and its fonts are looked for there.
    """

    place: Place
    folder: str
    substitutions: tuple[Substitution, ...] = ()
    known_entries: tuple[Entry, ...] = ()  # for a ``blscfg`` that finds none
    file: str = "grub.cfg"


@dataclass(frozen=True, slots=True)
class LoaderGuest:
    """A guest with systemd-boot: entries in ``entries_folder`` of the ESP or XBOOTLDR, kernels beside them.

    ``loader`` is the place of ``/loader/loader.conf``, the ESP, where that is another file system than the entries'.
    """

    place: Place
    entries_folder: str = "/loader/entries"
    loader: Place | None = None
    substitutions: tuple[Substitution, ...] = ()
    known_entries: tuple[Entry, ...] = ()  # where no entry is found
    timeout_seconds: int = 3  # where loader.conf names none


@dataclass(frozen=True, slots=True)
class EntriesGuest:
    """A guest of which only single kernels are known, the first being the default."""

    entries: tuple[Entry, ...]
    timeout_seconds: int = 3


@dataclass(frozen=True, slots=True)
class WindowsGuest:
    """A Windows: the partition with its boot manager for a BIOS, by number, by file system or, best, by both."""

    partition: int | None
    file_system_uuid: str | None
    boot_manager: str = "/bootmgr"

    def __post_init__(self) -> None:
        if self.partition is None and self.file_system_uuid is None:
            raise ValueError("a Windows is found by its partition's number or its file system's UUID")
        Place(self.file_system_uuid or "0", self.partition)


Guest = GrubGuest | LoaderGuest | EntriesGuest | WindowsGuest


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
    folder, file = _path(guest.folder), _quoted(f"/{guest.file}")
    body = [
        *_search(guest.place, "root"),
        f"set godwit_folder=($root){_quoted(folder)}",
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
        *_nothing_found(f"{folder}/{guest.file}", guest.place.file_system_uuid),
    ]
    known = ["function godwit_known {", *_indented(_menu(guest.known_entries)), "    true", "}"]
    functions = [*_uefi_commands(), *_linux_function(guest.substitutions), *_bls_functions(), *known, *_blscfg()]
    return _linux_script([*functions, *body])


def loader_script(guest: LoaderGuest) -> BootScript:
    """Return the script that does what systemd-boot does: read the entries, take the default that loader.conf names."""
    folder = _path(guest.entries_folder)
    loader = guest.loader or guest.place
    body = [
        f"set timeout={guest.timeout_seconds:d}",
        "set godwit_default=",
        *_search(loader, "godwit_loader"),
        '    if [ -f "($godwit_loader)/loader/loader.conf" ]; then source "($godwit_loader)/loader/loader.conf"; fi',
        "fi",
        *_search(guest.place, "root"),
        f'    godwit_entries "($root)"{_quoted(folder)} versions',
        f'    godwit_default "($root)"{_quoted(folder)}',
        "fi",
        'if [ -z "$godwit_found" ]; then',
        *_indented(_menu(guest.known_entries)),
        "    true",
        "fi",
    ]
    if not guest.known_entries:
        body += ['if [ -z "$godwit_found" ]; then', *_nothing_found(folder, guest.place.file_system_uuid), "fi"]
    functions = [*_linux_function(guest.substitutions), *_bls_functions(), *_loader_functions()]
    return _linux_script([*functions, *body])


def entries_script(guest: EntriesGuest) -> BootScript:
    """Return the script with a menu of the entries given."""
    if not guest.entries:
        raise ValueError("a menu without entries")
    body = [f"set timeout={guest.timeout_seconds:d}", "set default=0", *_menu(guest.entries)]
    return _linux_script([*_linux_function(()), *_bls_functions(), *body])


def windows_script(guest: WindowsGuest) -> BootScript:
    """Return the script that starts the Windows Boot Manager: from the partition, else from the file system."""
    manager = _path(guest.boot_manager)
    sought = [] if guest.partition is None else [f"partition {guest.partition:d}"]
    lines = []
    if guest.partition is not None:
        lines += [f'set root="$godwit_disk,msdos{guest.partition:d}"', "godwit_windows"]
    if guest.file_system_uuid is not None:
        lines += [*_search(Place(guest.file_system_uuid, guest.partition), "root"), "    godwit_windows", "fi"]
        sought.append(guest.file_system_uuid)
    function = [
        "function godwit_windows {",
        f'    if [ -f "($root)"{_quoted(manager)} ]; then',
        f'        ntldr "($root)"{_quoted(manager)}',
        "        boot",
        "    fi",
        "}",
    ]
    script = [*_start(), *function, *lines, *_nothing_found(manager, " or ".join(sought))]
    return BootScript(_text(script), _WINDOWS_MODULES, ())


def _linux_script(lines: list[str]) -> BootScript:
    modules = tuple(dict.fromkeys((*_LINUX_MODULES, *_LINUX_NEEDS)))
    return BootScript(_text([*_start(), *lines]), modules, ("linux",))


def _text(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"


def _start() -> list[str]:
    """Text on the screen and the first serial port, and the disk that was booted from in ``godwit_disk``."""
    return [
        "if serial --unit=0 --speed=115200; then",
        "    terminal_input --append serial",
        "    terminal_output --append serial",
        "fi",
        "set godwit_disk=hd0",
        "regexp --set=1:godwit_disk '^\\(([a-z0-9]+)' \"$cmdpath\"",
        "export godwit_disk",
    ]


def _search(place: Place, variable: str) -> list[str]:
    """An opened ``if``: the file system is found and ``variable`` names its device."""
    hint = "" if place.partition is None else f' --hint="$godwit_disk,msdos{place.partition:d}"'
    return [f"if search --no-floppy --fs-uuid --set={variable}{hint} {place.file_system_uuid}; then"]


def _nothing_found(path: str, where: str) -> list[str]:
    return [
        "echo",
        f"echo {_quoted(f'Nothing to start: {path} is not on {where}.')}",
        f"echo {_quoted('The disks and partitions that the BIOS shows:')}",
        "ls",
    ]


def _uefi_commands() -> list[str]:
    """What grub.cfg files call and a GRUB for a BIOS, or not Red Hat's, does not have."""
    return [
        'function linuxefi { linux "$@"; }',
        'function initrdefi { initrd "$@"; }',
        'function linux16 { linux "$@"; }',
        'function initrd16 { initrd "$@"; }',
        "function fwsetup {",
        '    if [ "$1" != --is-supported ]; then echo "This machine has a BIOS: there are no UEFI settings."; fi',
        "    return 1",
        "}",
        "function increment { true; }",  # Red Hat counts failed boots by these
        "function decrement { true; }",
        "function bli { true; }",
    ]


def _linux_function(substitutions: tuple[Substitution, ...]) -> list[str]:
    """``linux``: notes the kernel of an entry that is being read, else loads it, with the substitutions made."""
    lines = ["function godwit_argument {", '    set godwit_argument="$1"']
    for substitution in substitutions:
        for pattern in substitution.patterns():
            lines += [
                f"    if regexp --set=1:godwit_key '{pattern}' \"$1\"; then",
                f'        set godwit_argument="$godwit_key"{_quoted(substitution.replacement)}',
                "    fi",
            ]
    return [
        *lines,
        "}",
        "function linux {",
        '    if [ -n "$godwit_reading" ]; then',
        '        set godwit_linux="$1"',
        "        return 0",
        "    fi",
        "    set godwit_first=y",
        '    for godwit_word in "$@"; do',
        '        godwit_argument "$godwit_word"',
        '        if [ -n "$godwit_first" ]; then',
        '            setparams "$godwit_argument"',
        "        else",
        '            setparams "$@" "$godwit_argument"',
        "        fi",
        "        set godwit_first=",
        "    done",
        f"    insmod {MEMDISK}/linux.mod",
        '    linux "$@"',
        "}",
        "function initrd {",
        '    for godwit_word in "$@"; do',
        "        set godwit_initrd=\"$godwit_initrd '$godwit_device$godwit_word'\"",
        "    done",
        "}",
    ]


def _bls_functions() -> list[str]:
    """``godwit_entries FOLDER [versions]``: a menu entry for each file there, the newest first."""
    return [
        'function title { set godwit_title="$*"; }',
        'function version { set godwit_version="$*"; }',
        'function grub_users { set godwit_users="$*"; }',
        *(f"function {name} {{ true; }}" for name in ("id", "grub_arg", "grub_class", "grub_hotkey", "architecture")),
        *("function efi { true; }", "function uki { true; }", "function profile { true; }"),
        "function options {",
        '    for godwit_word in "$@"; do',
        '        godwit_argument "$godwit_word"',
        "        set godwit_options=\"$godwit_options '$godwit_argument'\"",
        "    done",
        "}",
        "function godwit_boot {",
        f"    insmod {MEMDISK}/linux.mod",
        '    echo "Loading $1"',
        '    eval "linux $1 $2"',
        '    if [ -n "$3" ]; then eval "initrd $3"; fi',
        "}",
        # Sorted by inserting each into those before it. -pgt compares the numbers at the first difference.
        "function godwit_sort {",
        "    set godwit_sorted=",
        '    for godwit_new in "$1"/*.conf; do',
        '        if [ -f "$godwit_new" ]; then',
        "            set godwit_list=",
        "            set godwit_placed=",
        "            for godwit_old in $godwit_sorted; do",
        '                if [ -z "$godwit_placed" -a "$godwit_new" -pgt "$godwit_old" ]; then',
        '                    set godwit_list="$godwit_list $godwit_new"',
        "                    set godwit_placed=y",
        "                fi",
        '                set godwit_list="$godwit_list $godwit_old"',
        "            done",
        '            if [ -z "$godwit_placed" ]; then set godwit_list="$godwit_list $godwit_new"; fi',
        '            set godwit_sorted="$godwit_list"',
        "        fi",
        "    done",
        "}",
        "function godwit_entry {",
        *(f"    set godwit_{name}=" for name in ("title", "version", "users", "linux", "options", "initrd")),
        "    regexp --set=1:godwit_device '^(\\([^)]*\\))' \"$1\"",
        "    regexp --set=1:godwit_id '([^/]*)\\.conf$' \"$1\"",
        "    set godwit_reading=y",
        '    source "$1"',
        "    set godwit_reading=",
        '    if [ -z "$godwit_linux" ]; then return 0; fi',
        '    if [ -z "$godwit_title" ]; then set godwit_title="$godwit_id"; fi',
        '    if [ -n "$2" -a -n "$godwit_version" ]; then set godwit_title="$godwit_title ($godwit_version)"; fi',
        '    if [ -z "$godwit_options" ]; then options $default_kernelopts; fi',
        "    set godwit_found=y",
        '    if [ -n "$godwit_users" ]; then',
        '        menuentry "$godwit_title" --id "$godwit_id" --users "$godwit_users" \\',
        '            "\'$godwit_device$godwit_linux\'" "$godwit_options" "$godwit_initrd" {',
        '            godwit_boot "$2" "$3" "$4"',
        "        }",
        "    else",
        '        menuentry "$godwit_title" --id "$godwit_id" --unrestricted \\',
        '            "\'$godwit_device$godwit_linux\'" "$godwit_options" "$godwit_initrd" {',
        '            godwit_boot "$2" "$3" "$4"',
        "        }",
        "    fi",
        "}",
        "function godwit_entries {",
        '    godwit_sort "$1"',
        '    for godwit_file in $godwit_sorted; do godwit_entry "$godwit_file" "$2"; done',
        "}",
    ]


def _blscfg() -> list[str]:
    """Red Hat's command: the entries of the first folder that has any."""
    return [
        "function blscfg {",
        "    set godwit_found=",
        # Releases differ in which of the two variables names the file system that is to be mounted at /boot.
        '    for godwit_at in "$root" "$boot"; do',
        '        for godwit_below in "$blsdir" /loader/entries /boot/loader/entries; do',
        '            if [ -n "$godwit_at" -a -n "$godwit_below" -a -z "$godwit_found" ]; then',
        '                godwit_entries "($godwit_at)$godwit_below"',
        "            fi",
        "        done",
        "    done",
        '    if [ -z "$godwit_found" ]; then godwit_known; fi',
        "}",
    ]


def _loader_functions() -> list[str]:
    """The lines of loader.conf that matter, and ``godwit_default FOLDER``, which finds what its ``default`` names."""
    return [
        'function default { set godwit_default="$1"; }',
        *(f"function {name} {{ true; }}" for name in ("editor", "beep", "auto_entries", "auto_firmware")),
        'function timeout { if regexp \'^[0-9]+$\' "$1"; then set timeout="$1"; fi; }',
        # Its pattern may match several: the newest of them is meant.
        "function godwit_default {",
        "    set default=0",
        "    set godwit_chosen=",
        '    if [ -z "$godwit_default" ]; then return 0; fi',
        "    for godwit_file in $godwit_sorted; do",
        '        for godwit_match in "$1"/$godwit_default "$1"/$godwit_default.conf; do',
        '            if [ -z "$godwit_chosen" -a "$godwit_match" = "$godwit_file" ]; then',
        "                set godwit_chosen=y",
        "                regexp --set=1:default '([^/]*)\\.conf$' \"$godwit_file\"",
        "            fi",
        "        done",
        "    done",
        "}",
    ]


def _menu(entries: tuple[Entry, ...]) -> list[str]:
    """A menu entry for each."""
    if len(entries) > _MOST_ENTRIES:
        raise ValueError(f"{len(entries)} entries; {_MOST_ENTRIES} are the most")
    lines = []
    for entry in entries:
        initrds = " ".join(f'"($root)"{_quoted(_path(path))}' for path in entry.initrds)
        arguments = " ".join(map(_quoted, split_command_line(entry.command_line)))
        lines += [
            f"menuentry {_quoted(entry.title)} --unrestricted {{",
            f"    insmod {MEMDISK}/linux.mod",
            *_indented(_search(entry.place, "root")),
            f'        linux "($root)"{_quoted(_path(entry.kernel))} {arguments}',
            *([f"        initrd {initrds}"] if initrds else []),
            "    fi",
            "}",
        ]
    return lines


def split_command_line(text: str) -> list[str]:
    """Return a kernel command line's arguments: apart at blanks outside of double quotes, which are taken away.

    GRUB puts quotes around an argument with a blank in it when it hands it over.
    """
    arguments, current, quoted, begun = list[str](), list[str](), False, False
    for character in text:
        if character == '"':
            quoted, begun = not quoted, True
        elif character in " \t\n\r\0" and not quoted:
            if begun:
                arguments.append("".join(current))
            current, begun = [], False
        else:
            current.append(character)
            begun = True
    return [*arguments, "".join(current)] if begun else arguments


def _path(path: str) -> str:
    """Return an absolute path as it is, without a slash at its end. Raises ValueError for another."""
    if not path.startswith("/"):
        raise ValueError(f"not a path from the root of a file system: {path!r}")
    return path.rstrip("/")


def _quoted(text: str) -> str:
    """Return ``text`` as one word that GRUB takes for what it is. Raises ValueError where it cannot be one."""
    if len(text) > _LONGEST_TEXT or any(ord(character) < 32 for character in text):
        raise ValueError(f"not a text that a boot script can hold: {text[:80]!r}")
    return "'" + text.replace("'", "'\\''") + "'"


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]
