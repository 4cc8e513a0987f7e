"""Pieces of GRUB's script language: the commands of a guest's configuration as functions, menus, words, searches.

Each piece is a list of lines. What begins with ``godwit_`` is ours, functions and variables alike.
"""

from __future__ import annotations

from typing import Final

from conversion.bootguests import Entry, Place, Substitution
from conversion.grub import MEMDISK

_MOST_ENTRIES: Final = 64
_LONGEST_TEXT: Final = 8192


def start() -> list[str]:
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


def search(place: Place, variable: str) -> list[str]:
    """An opened ``if``: the file system is found and ``variable`` names its device."""
    hint = "" if place.partition is None else f' --hint="$godwit_disk,msdos{place.partition:d}"'
    return [f"if search --no-floppy --fs-uuid --set={variable}{hint} {place.file_system_uuid}; then"]


def nothing_found(path: str, where: str) -> list[str]:
    """What the screen says where the search has ended without a start: what was sought, and what there is."""
    return [
        "echo",
        f"echo {quoted(f'Nothing to start: {path} is not on {where}.')}",
        f"echo {quoted('The disks and partitions that the BIOS shows:')}",
        "ls",
    ]


def uefi_commands() -> list[str]:
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


def linux_function(substitutions: tuple[Substitution, ...]) -> list[str]:
    """``linux``: notes the kernel of an entry that is being read, else loads it, with the substitutions made."""
    lines = ["function godwit_argument {", '    set godwit_argument="$1"']
    for substitution in substitutions:
        for pattern in substitution.patterns():
            lines += [
                f"    if regexp --set=1:godwit_key '{pattern}' \"$1\"; then",
                f'        set godwit_argument="$godwit_key"{quoted(substitution.replacement)}',
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


def bls_functions() -> list[str]:
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


def blscfg() -> list[str]:
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


def loader_functions() -> list[str]:
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


def menu(entries: tuple[Entry, ...]) -> list[str]:
    """A menu entry for each."""
    if len(entries) > _MOST_ENTRIES:
        raise ValueError(f"{len(entries)} entries; {_MOST_ENTRIES} are the most")
    lines = []
    for entry in entries:
        initrds = " ".join(f'"($root)"{quoted(absolute(path))}' for path in entry.initrds)
        arguments = " ".join(map(quoted, split_command_line(entry.command_line)))
        lines += [
            f"menuentry {quoted(entry.title)} --unrestricted {{",
            f"    insmod {MEMDISK}/linux.mod",
            *indented(search(entry.place, "root")),
            f'        linux "($root)"{quoted(absolute(entry.kernel))} {arguments}',
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


def absolute(path: str) -> str:
    """Return an absolute path as it is, without a slash at its end. Raises ValueError for another."""
    if not path.startswith("/"):
        raise ValueError(f"not a path from the root of a file system: {path!r}")
    return path.rstrip("/")


def quoted(text: str) -> str:
    """Return ``text`` as one word that GRUB takes for what it is. Raises ValueError where it cannot be one."""
    if len(text) > _LONGEST_TEXT or any(ord(character) < 32 for character in text):
        raise ValueError(f"not a text that a boot script can hold: {text[:80]!r}")
    return "'" + text.replace("'", "'\\''") + "'"


def indented(lines: list[str]) -> list[str]:
    """Return the lines one level deeper."""
    return [f"    {line}" for line in lines]
