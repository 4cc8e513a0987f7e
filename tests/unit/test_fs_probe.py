"""What is on a device, told as blkid tells it, and devices that end anywhere."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from conversion.errors import ConversionError
from conversion.filesystems.probe import open_filesystem, probe
from tests.support.linux_filesystems import DamagedDevice, FileDevice, run

MAKERS: dict[str, Callable[[Path], object]] = {
    "vfat16": lambda image: run("mkfs.vfat", "-F", "16", "-n", "LABELLED", image),
    "vfat32": lambda image: run("mkfs.vfat", "-F", "32", image),
    "ntfs": lambda image: run("mkntfs", "-q", "-F", image),
    "swap": lambda image: run("mkswap", "-L", "labelled", image),
    "ext2": lambda image: run("mke2fs", "-q", "-F", "-t", "ext2", "-L", "labelled", image),
    "ext3": lambda image: run("mke2fs", "-q", "-F", "-t", "ext3", image),
    "ext4": lambda image: run("mke2fs", "-q", "-F", "-t", "ext4", image),
    "jbd": lambda image: run("mke2fs", "-q", "-F", "-O", "journal_dev", "-b", "4096", image),
    "btrfs": lambda image: run("mkfs.btrfs", "-q", "-L", "labelled", image),
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(160 << 20)
    return path


@pytest.mark.parametrize("kind", MAKERS)
def test_agrees_with_blkid(kind: str, image: Path) -> None:
    MAKERS[kind](image)
    found = probe(FileDevice(image))
    told = dict(line.split("=", 1) for line in run("blkid", "-p", "-o", "export", image).splitlines() if "=" in line)
    assert found.kind == told["TYPE"]
    assert found.uuid == told.get("UUID", "")
    if kind != "ntfs":  # an NTFS has its label in a file
        assert found.label == told.get("LABEL", "")
    reader = open_filesystem(FileDevice(image))
    if kind in {"swap", "jbd"}:
        assert reader is None
    else:
        assert reader is not None
        assert (reader.kind, reader.uuid, reader.label) == (found.kind, found.uuid, told.get("LABEL", ""))


@pytest.mark.parametrize(
    ("at", "signature", "kind"),
    [
        (3, b"-FVE-FS-", "BitLocker"),
        (0xA0, bytes.fromhex("3bd66749292ed84a8399f6a339e3d001"), "BitLocker"),
        (3, b"ReFS\0\0\0\0", "ReFS"),
        (3, b"EXFAT   ", "exfat"),
        (0, b"LUKS\xba\xbe\0\1", "crypto_LUKS"),
        (0x8001, b"CD001", "iso9660"),
        (4086, b"S1SUSPEND\0", "swsuspend"),
        (4096, b"\xfc\x4e\x2b\xa9\1\0\0\0", "linux_raid_member"),
    ],
)
def test_signatures(at: int, signature: bytes, kind: str) -> None:
    raw = bytearray(1 << 20)
    raw[at : at + len(signature)] = signature
    assert probe(FileDevice(bytes(raw))).kind == kind
    assert open_filesystem(FileDevice(bytes(raw))) is None


def test_nothing_is_nothing_and_noise_is_no_crash() -> None:
    for size in (0, 1, 511, 512, 4096, 65536, 131072, 200_000):
        assert probe(FileDevice(bytes(size))).kind is None
    chance = random.Random(6)
    for _ in range(50):
        noise = FileDevice(chance.randbytes(140_000))
        assert open_filesystem(noise) is None
        for at, signature in ((1024 + 0x38, b"\x53\xef"), (0, b"XFSB"), (0x10040, b"_BHRfS_M"), (3, b"NTFS    ")):
            changed = {at + index: value for index, value in enumerate(signature)}
            try:
                assert open_filesystem(DamagedDevice(noise, changed)) is None
            except ConversionError as error:
                assert str(error)
