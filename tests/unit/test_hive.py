"""Registry hives as read: against a writer of its own, hivexsh and regipy; and hives that contradict themselves."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from regipy.registry import NKRecord, RegistryHive

from conversion.errors import ConversionError, DamagedError, UnsupportedError
from conversion.windows.hive import Hive, Key, checksum
from tests.support import hive_builder, windows_disk
from tests.support.hive_builder import build_hive, tree

needs_samples = pytest.mark.skipif(not windows_disk.SAMPLES.is_dir(), reason=windows_disk.NO_SAMPLES)
CONTENT = {
    "": {"": "default", "Number": 7},
    r"Alpha\Beta": {"text": "grün", "empty": (3, b""), "one": (3, b"1"), "five": (3, b"12345")},
    r"Alpha\gamma": {"large": (3, bytes(range(256)) * 300), "just": (3, b"x" * 16344), "over": (3, b"y" * 16345)},
    "delta": {},
    "Epsilon": {},
    "zeta": {"": (2, b"a\0b\0\0\0")},
}


def everything(hive: Hive) -> dict[str, dict[str, tuple[int, bytes]]]:
    return {path: {value.name: (value.kind, value.data) for value in key.values()} for path, key in hive.walk()}


def expected() -> dict[str, dict[str, tuple[int, bytes]]]:
    result: dict[str, dict[str, tuple[int, bytes]]] = {"": {}, "Alpha": {}}
    for path, values in CONTENT.items():
        found = result.setdefault(path, {})
        for name, value in values.items():
            if isinstance(value, int):
                found[name] = (4, struct.pack("<I", value))
            elif isinstance(value, str):
                found[name] = (1, f"{value}\0".encode("utf-16-le"))
            else:
                found[name] = value
    return result


@pytest.mark.parametrize(("leaf", "split"), [(b"lh", 0), (b"lf", 0), (b"li", 0), (b"lh", 2), (b"li", 1)])
def test_every_kind_of_list_is_read(leaf: bytes, split: int) -> None:
    hive = Hive(build_hive(tree(CONTENT), leaf=leaf, split=split))
    assert everything(hive) == expected()


def test_keys_and_values_are_found_without_case() -> None:
    hive = Hive(build_hive(tree(CONTENT)))
    found = hive.key(r"ALPHA\beta")
    assert found is not None
    assert found.name == "Beta"
    assert found.text("TEXT") == "grün"
    assert found.number("five") is None
    assert hive.root.number("number") == 7
    assert hive.root.text("") == "default"
    assert hive.key(r"Alpha\missing\more") is None
    assert hive.root.value("missing") is None


def test_the_test_writer_makes_hives_that_hivex_reads(tmp_path: Path) -> None:
    if shutil.which("hivexsh") is None:
        pytest.skip("hivexsh is not installed (Debian: libhivex-bin)")
    (tmp_path / "hive").write_bytes(build_hive(tree(CONTENT), split=2))
    commands = b"cd Alpha\\Beta\nlsval text\ncd \\\nls\n"
    done = subprocess.run(["hivexsh", tmp_path / "hive"], input=commands, capture_output=True, check=True)
    assert done.stdout.decode().split() == ["grün", "Alpha", "delta", "Epsilon", "zeta"]


@needs_samples
@pytest.mark.parametrize("name", ["BCD", "BCD-bios", "BCD-efi-locate", "SYSTEM_WIN_10_1709"])
def test_samples_are_read_as_regipy_reads_them(name: str, tmp_path: Path) -> None:
    content = windows_disk.sample(name)
    (tmp_path / name).write_bytes(content)
    theirs = RegistryHive(str(tmp_path / name))
    pending: list[tuple[Key, NKRecord]] = [(Hive(content).root, theirs.root)]
    keys, values = 0, 0
    while pending and keys < 300:
        ours, other = pending.pop()
        assert ours.name == other.name
        keys += 1
        assert [value.name or "(default)" for value in ours.values()] == [value.name for value in other.iter_values()]
        values += len(ours.value_cells())
        below = list(ours.keys())
        assert len(below) == other.subkey_count
        pending += list(zip(below, other.iter_subkeys(), strict=True)) if below else []
    assert keys > 20
    assert values > 20


def test_the_checksum_is_never_all_zeros_or_all_ones() -> None:
    assert checksum(bytes(512)) == 1
    assert checksum(b"\xff\xff\xff\xff" + bytes(508)) == 0xFFFFFFFE
    assert checksum(bytes(511) + b"\x99") == 1  # what stands behind it does not count
    whole = build_hive(tree(CONTENT))
    assert checksum(whole) == hive_builder.checksum(whole) == struct.unpack_from("<I", whole, 508)[0]


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"fger", "begins with"),
        (40, b"\0\0\0\0", "bins of 0 bytes"),
        (40, b"\0\0\0\x70", "bins of"),
        (4096, b"nibh", "hbin"),
    ],
)
def test_a_base_block_that_contradicts_itself_is_refused(offset: int, data: bytes, message: str) -> None:
    content = bytearray(build_hive(tree(CONTENT)))
    content[offset : offset + 4] = data
    struct.pack_into("<I", content, 508, checksum(content))
    with pytest.raises(DamagedError, match=message):
        Hive(bytes(content))


def test_a_wrong_checksum_and_an_unknown_version_are_refused() -> None:
    content = bytearray(build_hive(tree(CONTENT)))
    content[24] = 9
    with pytest.raises(DamagedError, match="checksum"):
        Hive(bytes(content))
    struct.pack_into("<I", content, 508, checksum(content))
    with pytest.raises(UnsupportedError, match=r"1\.9"):
        Hive(bytes(content))


def test_a_circle_of_keys_ends_in_an_error() -> None:
    content = bytearray(build_hive(tree({"A": {}, r"A\B": {}})))
    hive = Hive(content)
    outer, inner = hive.key("A"), hive.key(r"A\B")
    assert outer is not None
    assert inner is not None
    struct.pack_into("<I", content, 4096 + inner.cell + 4 + 20, 1)
    struct.pack_into("<I", content, 4096 + inner.cell + 4 + 28, hive.root.node.subkey_list)
    with pytest.raises(DamagedError, match="circle"):
        list(hive.walk())


def test_a_count_beyond_the_hive_is_refused_before_it_is_believed() -> None:
    content = bytearray(build_hive(tree({"A": {"x": 1}})))
    hive = Hive(content)
    key = hive.key("A")
    assert key is not None
    struct.pack_into("<I", content, 4096 + key.cell + 4 + 36, 0x7FFFFFFF)
    with pytest.raises(DamagedError, match="counts more"):
        list(key.values())


@pytest.mark.parametrize("seed", range(8))
def test_flipped_and_cut_hives_end_in_an_error_of_ours_or_read(seed: int) -> None:
    chance = random.Random(seed)
    whole = build_hive(tree(CONTENT), split=2)
    refused = 0
    for _ in range(40):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 12)):
            content[chance.randrange(4096, len(content))] = chance.randrange(256)
        if chance.random() < 0.3:
            del content[chance.randrange(len(content)) :]
        try:
            everything(Hive(bytes(content)))
        except ConversionError:
            refused += 1
    assert refused > 0
