"""A FAT volume under random changes behaves like a dictionary, and fsck.vfat finds nothing to say about it."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from conversion.errors import NoSpaceError
from conversion.filesystems.fat import FatFileSystem
from tests.support.block_devices import MemoryDevice
from tests.support.fat_images import fsck, make_volume

# Few folded names, so that changes meet each other: plain, long, of the same alias, not ASCII, of several slots.
NAMES = ["A.TXT", "bootmgr", "Long file name.efi", "long file name.efx", "ÄÖÜ и 😀", "n" * 80, "two.dots.txt"]
LAYOUTS = [
    (192 << 10, "-F12", "-s1", "-r32"),
    (256 << 10, "-F12", "-s2"),
    (2560 << 10, "-F16", "-s1", "-r64"),
    (256 << 10, "-F32", "-s1"),
    (1 << 20, "-F32", "-S2048", "-s1"),
]


@functools.cache
def pristine(layout: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        size, *options = LAYOUTS[layout]
        return bytes(make_volume(Path(folder), size, *options))


class FatVolume(RuleBasedStateMachine):
    """The model: path, folded → content of a file, None for a folder."""

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, bytes | None] = {}
        self.device = MemoryDevice(bytearray())

    @initialize(layout=st.integers(0, len(LAYOUTS) - 1))
    def format(self, layout: int) -> None:
        self.device = MemoryDevice(bytearray(pristine(layout)))
        self.filesystem = FatFileSystem(self.device)

    def folders(self) -> list[str]:
        return ["", *sorted(path for path, content in self.model.items() if content is None)]

    def files(self) -> list[str]:
        return sorted(path for path, content in self.model.items() if content is not None)

    @rule(data=st.data(), name=st.sampled_from(NAMES), size=st.integers(0, 40_000), upper=st.booleans())
    def write(self, data: st.DataObject, name: str, size: int, upper: bool) -> None:
        path = f"{data.draw(st.sampled_from(self.folders()))}/{name.upper()}"
        if path in self.model and self.model[path] is None:
            return
        content = random.Random(size).randbytes(size)
        before, writes = bytes(self.device.content), len(self.device.writes)
        try:
            self.filesystem.create_file(path if upper else f"{path[: -len(name)]}{name}", content, overwrite=True)
        except NoSpaceError:
            assert len(self.device.writes) == writes
            assert self.device.content == before
        else:
            self.model[path] = content

    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def make_folder(self, data: st.DataObject, name: str) -> None:
        path = f"{data.draw(st.sampled_from(self.folders()))}/{name.upper()}"
        if path.count("/") > 3 or self.model.get(path) is not None:
            return
        try:
            self.filesystem.make_folder(path)
        except NoSpaceError:
            return
        self.model[path] = None

    @precondition(lambda self: self.files())
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(self.files()))
        self.filesystem.remove_file(path)
        del self.model[path]

    @rule(data=st.data())
    def remove_folder(self, data: st.DataObject) -> None:
        empty = [path for path in self.folders()[1:] if not any(other.startswith(f"{path}/") for other in self.model)]
        if empty:
            path = data.draw(st.sampled_from(empty))
            self.filesystem.remove_folder(path)
            del self.model[path]

    @rule()
    def reopen(self) -> None:
        self.filesystem = FatFileSystem(self.device)

    def teardown(self) -> None:
        if not self.device.content:
            return
        fresh = FatFileSystem(self.device)
        for path, content in self.model.items():
            if content is not None:
                assert fresh.read_file(path) == content
                extents = fresh.extents(path) or ()
                assert b"".join(self.device.read_at(*extent) for extent in extents) == content
        for folder in self.folders():
            inside = {path for path in self.model if path.rpartition("/")[0] == folder}
            listed = fresh.list_folder(folder) or ()
            assert {f"{folder}/{entry.name.upper()}" for entry in listed} == inside
        assert not fresh.is_dirty
        with tempfile.TemporaryDirectory() as temporary:
            code, said = fsck(self.device.content, Path(temporary))
        assert code == 0, said


FatVolume.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_a_volume_behaves_like_a_dictionary = FatVolume.TestCase
