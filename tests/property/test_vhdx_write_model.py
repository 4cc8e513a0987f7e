"""A chain of VHDX disks under any sequence of requests, crashes and changes of shape, against a bytearray."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.crash_files import RecordingFiles, crash_now, scratch_folder
from tests.support.crash_model import Begun, Flushed, assert_possible
from vhdx.chain import open_vhdx
from vhdx.check import check_disk
from vhdx.compact import compact_disk
from vhdx.create import create_disk
from vhdx.merge import merge_into_parent
from vhdx.resize import resize_disk
from vhdx.vhdx import VhdxDisk
from vhdx.writer import open_writable

MIB = 1 << 20
MAX_DEPTH = 7
MAX_SIZE = 5 * MIB

places = st.integers(0, MAX_SIZE - 1)
lengths = st.sampled_from([1, 511, 512, 4096, 5000, 70_000, MIB - 1, MIB, 2 * MIB + 3])
seeds = st.integers(0, 1 << 16)


class ChainMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.folder = self.stack.enter_context(scratch_folder())
        self.count = 0

    @initialize(sector_size=st.sampled_from([512, 4096]), kind=st.sampled_from(["dynamic", "fixed"]))
    def create(self, sector_size: int, kind: str) -> None:
        self.sector_size = sector_size
        self.paths = [self.folder / "disk0.vhdx"]
        size = 3 * MIB + 8 * 512
        if kind == "fixed":
            create_disk(self.paths[0], size=size, block_size=MIB, sector_size=sector_size, kind="fixed")
        else:
            create_disk(self.paths[0], size=size, block_size=MIB, sector_size=sector_size)
        self.model = bytearray(size)
        self.below: list[bytes] = []  # what each disk under the top one must go on reading as
        self.open()

    def open(self) -> None:
        self.files = RecordingFiles(self.folder)
        self.initial = bytes(self.model)
        self.disk: VhdxDisk = open_writable(self.top, files=self.files)

    @property
    def top(self) -> Path:
        return self.paths[-1]

    def clamp(self, offset: int, length: int) -> tuple[int, int]:
        offset %= len(self.model)
        return offset, min(length, len(self.model) - offset)

    @rule(offset=places, length=lengths, seed=seeds)
    def write(self, offset: int, length: int, seed: int) -> None:
        offset, length = self.clamp(offset, length)
        data = random.Random(seed).randbytes(length)
        self.model[offset : offset + length] = data
        self.files.mark(Begun(bytes(self.model)))
        self.disk.write_at(offset, data)

    @rule(offset=places, length=lengths)
    def trim(self, offset: int, length: int) -> None:
        offset, length = self.clamp(offset, length)
        self.model[offset : offset + length] = bytes(length)
        self.files.mark(Begun(bytes(self.model)))
        self.disk.trim(offset, length)

    @rule()
    def flush(self) -> None:
        self.disk.flush()
        self.files.mark(Flushed(bytes(self.model)))

    @rule()
    def reopen(self) -> None:
        self.disk.close()
        self.open()

    @rule(seed=seeds)
    def crash(self, seed: int) -> None:
        point = crash_now(self.files, seed)
        self.disk.image.close()  # the process is gone: nothing is flushed
        point.write_to(self.folder)
        with open_vhdx(self.top) as disk:
            actual = disk.read_at(0, disk.size)
        assert_possible(actual, self.initial, point.marks, point)
        self.model = bytearray(actual)
        self.open()
        assert self.disk.read_at(0, self.disk.size) == actual

    @precondition(lambda self: len(self.paths) < MAX_DEPTH)
    @rule(block_size=st.sampled_from([MIB, 2 * MIB]))
    def add_child(self, block_size: int) -> None:
        self.disk.close()
        self.count += 1
        self.below.append(bytes(self.model))
        child = self.folder / f"disk{self.count}.avhdx"
        create_disk(child, parent=self.top, block_size=block_size)
        self.paths.append(child)
        self.open()

    @precondition(lambda self: len(self.paths) > 1)
    @rule()
    def merge_top(self) -> None:
        self.disk.close()
        assert merge_into_parent(self.top).name == self.paths[-2].name
        self.paths.pop()
        self.below.pop()
        self.open()

    @precondition(lambda self: len(self.paths) > 2)
    @rule(data=st.data())
    def merge_inside(self, data: st.DataObject) -> None:
        self.disk.close()
        number = data.draw(st.integers(1, len(self.paths) - 2))
        merge_into_parent(self.paths[number])
        del self.paths[number]
        del self.below[number - 1]
        self.open()

    @rule()
    def compact(self) -> None:
        self.disk.close()
        compact_disk(self.top)
        self.open()

    @precondition(lambda self: len(self.model) < MAX_SIZE)
    @rule(more=st.integers(1, 40))
    def grow(self, more: int) -> None:
        self.disk.close()
        size = min(MAX_SIZE, len(self.model) + more * 65536)
        resize_disk(self.top, size)
        self.model += bytes(size - len(self.model))
        self.open()

    @precondition(lambda self: len(self.paths) == 1 and len(self.model) > MIB)
    @rule(less=st.integers(1, 40))
    def shrink(self, less: int) -> None:
        size = max(MIB, len(self.model) - less * 65536)
        self.disk.trim(size, len(self.model) - size)
        self.disk.close()
        resize_disk(self.top, size)
        del self.model[size:]
        self.open()

    @invariant()
    def reads_as_the_model(self) -> None:
        if hasattr(self, "disk"):
            assert self.disk.read_at(0, self.disk.size) == self.model

    def teardown(self) -> None:
        if hasattr(self, "disk"):
            self.disk.close()
            for path, content in zip(self.paths, [*self.below, self.model], strict=True):
                with open_vhdx(path) as disk:
                    assert disk.read_at(0, len(content)) == content
                    assert not any(disk.read_at(len(content), disk.size - len(content)))
                # A crash may leave a file of any length: of the writes past its end, storage took what it took.
                findings = check_disk(path).findings
                assert not [found for found in findings if found.severity != "info" and found.rule != "file-size"]
        self.stack.close()


TestChain = ChainMachine.TestCase
TestChain.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
