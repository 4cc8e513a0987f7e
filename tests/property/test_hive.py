"""Random edits of a hive against a model, and random damage to it."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.errors import ConversionError, NoSpaceError
from conversion.windows.hive import Hive
from conversion.windows.hiveedit import HiveEditor
from tests.support.hive_builder import build_hive, tree
from tests.unit.test_hive import everything
from tests.unit.test_hive_edit import check_cells

PATHS = ["", "A", r"A\b", r"A\C", r"A\C\d", "e"]
NAMES = ["", "x", "Long name of a value", "number"]
START: dict[str, dict[str, tuple[int, bytes] | str | int]] = {
    "A": {"x": (3, b"q" * 20), "number": 1},
    r"A\b": {"": (3, b"big" * 7000)},
    r"A\C\d": {"x": (3, b"")},
    "e": {},
}
data = st.one_of(st.binary(max_size=40), st.integers(0, 16344).map(bytes))
edits = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.sampled_from(PATHS), st.sampled_from(NAMES), data),
        st.tuples(st.just("delete"), st.sampled_from(PATHS), st.sampled_from(NAMES), st.just(b"")),
        st.tuples(st.just("key"), st.sampled_from(PATHS[1:]), st.just(""), st.just(b"")),
    ),
    max_size=25,
)


@settings(max_examples=80, deadline=None)
@given(edits=edits, room=st.sampled_from([0, 4096, 40960]), split=st.sampled_from([0, 1, 2]))
def test_edits_do_what_a_dictionary_does(edits: list[tuple[str, str, str, bytes]], room: int, split: int) -> None:
    original = build_hive(tree(START), split=split)
    original = original.ljust(len(original) + room, b"\x55")
    model = everything(Hive(original))
    editor = HiveEditor(original)
    for kind, path, name, content in edits:
        key = editor.hive.key(path)
        assert (key is not None) == (path in model)
        if key is None:
            continue
        if kind == "set":
            try:
                editor.set_value(key, name, 3, content)
            except NoSpaceError:
                return  # the edit is refused as a whole: nothing of it is kept by whoever asked
            model[path][name] = (3, content)
        elif kind == "delete":
            assert editor.delete_value(key, name) == (model[path].pop(name, None) is not None)
        else:
            parent = editor.hive.key(path.rpartition("\\")[0])
            assert parent is not None
            assert editor.delete_key(parent, path.rpartition("\\")[2])
            model = {each: found for each, found in model.items() if each != path and not each.startswith(f"{path}\\")}
    done = editor.finish()
    assert everything(Hive(done)) == model
    assert len(done) == len(original)
    check_cells(done)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 32), flips=st.integers(1, 30), cut=st.booleans())
def test_damage_ends_in_an_error_of_ours_whatever_is_done(seed: int, flips: int, cut: bool) -> None:
    chance = random.Random(seed)
    content = bytearray(build_hive(tree(START), split=2))
    for _ in range(flips):
        content[chance.randrange(4096, len(content))] = chance.choice([0, 1, 0xFF, chance.randrange(256)])
    if cut:
        del content[chance.randrange(len(content)) :]
    try:
        editor = HiveEditor(bytes(content))
        everything(editor.hive)
        for path in PATHS[1:]:
            key, parent = editor.hive.key(path), editor.hive.key(path.rpartition("\\")[0])
            if key is not None and parent is not None:
                editor.set_value(key, "x", 3, b"z" * chance.randrange(100))
                editor.delete_value(key, "number")
                editor.delete_key(parent, path.rpartition("\\")[2])
        assert len(editor.finish()) == len(content)
    except ConversionError:
        pass
