"""Edits of hives: in place where possible, never longer than the file, and read again by hivexsh."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from conversion.errors import DamagedError, NoSpaceError
from conversion.windows.hive import REG_BINARY, REG_DWORD, BaseBlock, Hive, Key
from conversion.windows.hiveedit import HiveEditor
from tests.support import windows_disk
from tests.support.hive_builder import build_hive, tree
from tests.unit.test_hive import everything

LONG, SHORT = b"DMIO:ID:" + bytes(range(16)), b"\x01\x02\x03\x04" + bytes(8)
ORIGINAL = build_hive(
    tree({"Key": {"long": (3, LONG), "number": 3, "big": (3, b"z" * 40000)}, r"Key\Below": {"v": "text"}, "Other": {}}),
    spare_bytes=512,
)


def key_of(editor: HiveEditor, path: str) -> Key:
    found = editor.hive.key(path)
    assert found is not None
    return found


def differing(one: bytes, other: bytes) -> list[int]:
    assert len(one) == len(other)
    return [at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]


def check_cells(content: bytes) -> None:
    """Every cell in use is reached from the root exactly once, and the cells fill their bins."""
    editor = HiveEditor(content)
    used = {cell for start, end in editor._bins() for cell, size in editor._cells(start, end) if size < 0}
    reached: list[int] = []
    security: set[int] = set()
    users = 0
    for _, key in editor.hive.walk():
        node = key.node
        users += 1
        security.add(node.security)
        reached.append(key.cell)
        reached += key.leaves()
        if node.subkeys and key.leaves() != (node.subkey_list,):
            reached.append(node.subkey_list)
        if node.values:
            reached.append(node.value_list)
        for cell in key.value_cells():
            reached.append(cell)
            length, at = (int.from_bytes(editor.hive.piece(cell, 12)[start : start + 4], "little") for start in (4, 8))
            if length < 0x80000000 and length:
                reached.append(at)
                if length > 16344:
                    listed = int.from_bytes(editor.hive.piece(at, 8)[4:], "little")
                    reached += [listed, *editor.hive.numbers(listed, -(-length // 16344))]
    assert len(reached) == len(set(reached))
    assert used == set(reached) | security
    assert sum(int.from_bytes(editor.hive.piece(cell, 16)[12:], "little") for cell in security) == users


def test_a_number_is_set_in_its_own_cell() -> None:
    editor = HiveEditor(ORIGINAL)
    editor.set_value(key_of(editor, "Key"), "NUMBER", REG_DWORD, bytes(4))
    done = editor.finish()
    assert differing(done[4096:], ORIGINAL[4096:]) == [ORIGINAL.index(b"number") - 12 - 4096]
    base = BaseBlock.decode(done, subject="hive")
    assert (base.primary_sequence, base.secondary_sequence, base.intact) == (2, 2, True)


def test_shorter_data_stand_in_their_cell_and_the_longer_ones_find_it_again() -> None:
    editor = HiveEditor(ORIGINAL)
    editor.set_value(key_of(editor, "Key"), "long", REG_BINARY, SHORT)
    there = editor.finish()
    assert len(differing(there[4096:], ORIGINAL[4096:])) <= len(LONG) + 4
    value = key_of(editor, "Key").value("long")
    assert value is not None
    assert value.data == SHORT
    back = HiveEditor(there)
    back.set_value(key_of(back, "Key"), "long", REG_BINARY, LONG)
    assert back.finish()[4096:] == ORIGINAL[4096:]


@pytest.mark.parametrize("data", [b"", b"1", b"1234", b"12345", b"x" * 24, b"x" * 100, b"x" * 300])
@pytest.mark.parametrize("name", ["long", "number", "big", "new"])
def test_values_of_any_length_follow_one_another(name: str, data: bytes) -> None:
    editor = HiveEditor(ORIGINAL)
    editor.set_value(key_of(editor, "Key"), name, REG_BINARY, data)
    done = editor.finish()
    wanted = everything(Hive(ORIGINAL))
    wanted["Key"][name] = (REG_BINARY, data)
    assert everything(Hive(done)) == wanted
    assert len(done) == len(ORIGINAL)
    check_cells(done)


def test_values_are_deleted_and_their_cells_given_back() -> None:
    editor = HiveEditor(ORIGINAL)
    for name in ("big", "LONG", "number"):
        assert editor.delete_value(key_of(editor, "Key"), name)
        check_cells(bytes(editor.finish()))
    assert not editor.delete_value(key_of(editor, "Key"), "long")
    wanted = everything(Hive(ORIGINAL))
    wanted["Key"] = {}
    assert everything(Hive(editor.finish())) == wanted
    editor.set_value(key_of(editor, "Key"), "again", REG_BINARY, b"z" * 16000)  # in the room of the large one
    check_cells(editor.finish())


@pytest.mark.parametrize(("leaf", "split"), [(b"lh", 0), (b"lf", 2), (b"li", 1)])
def test_keys_are_deleted_with_all_below(leaf: bytes, split: int) -> None:
    names = [f"Key{number}" for number in range(5)]
    paths = {rf"Top\{name}\Below\Deeper": {"v": (3, b"data" * 9)} for name in names}
    original = build_hive(tree({**paths, "Top": {"stays": 1}}), leaf=leaf, split=split)
    editor = HiveEditor(original)
    wanted = everything(Hive(original))
    for name in ("KEY1", "key4", "Key0", "Key2", "Key3"):
        assert editor.delete_key(key_of(editor, "Top"), name)
        wanted = {path: found for path, found in wanted.items() if not path.lower().startswith(f"top\\{name.lower()}")}
        assert everything(editor.hive) == wanted
        check_cells(editor.finish())
    assert not editor.delete_key(key_of(editor, "Top"), "Key1")
    assert list(wanted) == ["", "Top"]


def test_free_room_at_the_end_of_the_file_becomes_a_bin_and_beyond_it_nothing_is_written() -> None:
    tight = build_hive(tree({"Key": {}}))
    original = tight.ljust(len(tight) + 4096, b"\x55")
    editor = HiveEditor(original)
    editor.set_value(key_of(editor, "Key"), "first", REG_BINARY, b"a" * 4000)
    done = editor.finish()
    assert len(done) == len(original)
    assert Hive(done).bins_bytes == len(original) - 4096
    check_cells(done)
    with pytest.raises(NoSpaceError) as caught:
        editor.set_value(key_of(editor, "Key"), "second", REG_BINARY, b"b" * 4000)
    assert caught.value.hint


def test_room_that_was_given_back_is_found_again() -> None:
    content = build_hive(tree({"Key": {"first": (3, b"a" * 1500), "second": (3, b"b" * 1500)}}))
    editor = HiveEditor(content)
    key = key_of(editor, "Key")
    with pytest.raises(NoSpaceError):
        editor._allocate(2000)  # it knows now how little room there is
    assert editor.delete_value(key, "first")
    assert editor.delete_value(key, "second")
    check_cells(editor.finish())
    assert editor.hive.room(editor._allocate(2000)) >= 2000


def test_a_hive_without_edits_comes_back_as_it_was_and_edits_number_it_above_its_logs() -> None:
    assert HiveEditor(ORIGINAL).finish(above_sequence=99) == ORIGINAL
    editor = HiveEditor(ORIGINAL)
    editor.set_value(key_of(editor, "Key"), "number", REG_DWORD, b"\x03\0\0\0")  # as it is
    assert editor.finish() == ORIGINAL
    editor.set_value(key_of(editor, "Key"), "number", REG_DWORD, b"\x04\0\0\0")
    assert BaseBlock.decode(editor.finish(above_sequence=99), subject="hive").primary_sequence == 100


def test_a_cell_that_is_listed_but_free_is_not_given_back_twice() -> None:
    content = bytearray(ORIGINAL)
    value = Hive(ORIGINAL).key(r"Key\Below")
    assert value is not None
    cell = value.value_cells()[0]
    size = int.from_bytes(content[4096 + cell : 4100 + cell], "little", signed=True)
    content[4096 + cell : 4100 + cell] = (-size).to_bytes(4, "little")
    editor = HiveEditor(bytes(content))
    with pytest.raises(DamagedError, match="not in use"):
        editor.delete_key(key_of(editor, "Key"), "Below")


@pytest.mark.skipif(shutil.which("hivexsh") is None, reason="hivexsh is not installed (Debian: libhivex-bin)")
@pytest.mark.skipif(not windows_disk.SAMPLES.is_dir(), reason=windows_disk.NO_SAMPLES)
def test_an_edited_sample_is_read_by_hivex(tmp_path: Path) -> None:
    editor = HiveEditor(windows_disk.sample("BCD"))
    objects = key_of(editor, "Objects")
    name, *others = [key.name for key in objects.keys()]  # noqa: SIM118
    assert editor.delete_key(objects, name)
    editor.set_value(key_of(editor, "Description"), "Added", REG_BINARY, b"123456")
    editor.set_value(key_of(editor, "Description"), "System", REG_DWORD, b"\x07\0\0\0")
    done = editor.finish()
    check_cells(done)
    (tmp_path / "BCD").write_bytes(done)
    commands = b"cd Description\nlsval System\ncd \\Objects\nls\ncd \\Description\nlsval Added\n"
    run = subprocess.run(["hivexsh", tmp_path / "BCD"], input=commands, capture_output=True, check=True)
    lines = run.stdout.decode().split()
    assert lines[0] == "7"
    assert [line for line in lines if line.startswith("{")] == others
    assert lines[-1] == "123456"
