"""The script inside the core: text that GRUB's own checker accepts, whatever names a guest uses."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from conversion.grubscript import split_command_line

UUID = "6f0d3c52-8e43-4d5e-9a53-60d170000009"
ENTRY = Entry("It's {one} $of; them", Place(UUID, 2), "/a b/vmlinuz", ("/i|1", "/i&2"), 'root=LABEL=x\'y "a b"')
GUESTS: dict[str, Guest] = {
    "grub": GrubGuest(Place(UUID, 2), "/boot/grub"),
    "grub with all": GrubGuest(Place(UUID), "/@ it's/grub", (Substitution(UUID, "UUID=x"),), (ENTRY,)),
    "loader": LoaderGuest(Place("60D1-7002", 1)),
    "loader with all": LoaderGuest(
        Place(UUID), "/entries", Place("60D1-7002", 1), (Substitution(UUID, "/dev/sda1"),), (ENTRY, ENTRY), 9
    ),
    "entries": EntriesGuest((ENTRY, ENTRY)),
    "windows by number": WindowsGuest(5, None),
    "windows by file system": WindowsGuest(None, "0123456789ABCDEF"),
    "windows by both": WindowsGuest(1, "60D1-7002", "/it's bootmgr"),
}
CHECKER = shutil.which("grub-script-check")


@pytest.mark.parametrize("guest", GUESTS.values(), ids=GUESTS)
def test_grub_takes_the_script(guest: Guest) -> None:
    if CHECKER is None:
        pytest.skip("grub-common is not installed")
    script = boot_script(guest)
    done = subprocess.run([CHECKER], check=False, input=script.configuration.encode(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert boot_script(guest) == script


def test_linux_is_left_to_the_script_to_load_and_windows_has_no_linux() -> None:
    for name, guest in GUESTS.items():
        script = boot_script(guest)
        assert "linux" not in script.modules, name
        assert script.late_modules == (() if name.startswith("windows") else ("linux",))
    assert "ntldr" in boot_script(GUESTS["windows by both"]).modules


def test_windows_is_sought_by_number_first() -> None:
    text = boot_script(GUESTS["windows by both"]).configuration
    assert text.index('set root="$godwit_disk,msdos1"') < text.index("--fs-uuid")


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("", []),
        (" \t\n", []),
        ("root=/dev/sda1 ro", ["root=/dev/sda1", "ro"]),
        ('dyndbg="file a +p"  x', ["dyndbg=file a +p", "x"]),
        ('"a b" "" c', ["a b", "", "c"]),
        ("it's -- 'one two'", ["it's", "--", "'one", "two'"]),
    ],
)
def test_command_lines_come_apart_as_the_kernel_takes_them_apart(text: str, arguments: list[str]) -> None:
    assert split_command_line(text) == arguments


@given(st.lists(st.text(st.characters(exclude_characters=' \t\n\r\0"'), min_size=1)))
@settings(deadline=None, max_examples=50)
def test_words_without_quotes_stay_what_they_are(words: list[str]) -> None:
    assert split_command_line(" ".join(words)) == words


@pytest.mark.parametrize(
    "uuid", ["", "x", "60D1-7002; halt", "60D1 7002", "-60D1", "60D1-7002\n", "$root", "'", "60D1--7002"]
)
def test_no_text_gets_in_as_a_uuid(uuid: str) -> None:
    with pytest.raises(ValueError, match="UUID"):
        Place(uuid)
    with pytest.raises(ValueError, match="UUID"):
        Substitution(uuid, "UUID=x")
    if uuid:
        with pytest.raises(ValueError, match="UUID"):
            WindowsGuest(None, uuid)


def test_refuses_what_no_script_can_hold() -> None:
    place = Place(UUID)
    with pytest.raises(ValueError, match="path"):
        boot_script(GrubGuest(place, "boot/grub"))
    with pytest.raises(ValueError, match="boot script"):
        boot_script(GrubGuest(place, "/boot\n/grub"))
    with pytest.raises(ValueError, match="boot script"):
        boot_script(EntriesGuest((Entry("x" * 10_000, place, "/vmlinuz", (), ""),)))
    with pytest.raises(ValueError, match="without entries"):
        boot_script(EntriesGuest(()))
    with pytest.raises(ValueError, match="65 entries"):
        boot_script(EntriesGuest((ENTRY,) * 65))
    with pytest.raises(ValueError, match="number"):
        Place(UUID, 0)
    with pytest.raises(ValueError, match="found by"):
        WindowsGuest(None, None)
    with pytest.raises(ValueError, match="in the place"):
        Substitution(UUID, "UUID=x quiet")
