"""What the readers of Linux file systems share: bounded reads, paths and symbolic links, checksums."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import google_crc32c

from conversion.device import BlockDevice
from conversion.errors import DamagedError
from conversion.filesystems.filesystem import Entry, EntryKind

MOST_LINKS: Final = 40  # as Linux counts before it answers ELOOP
MOST_COMPONENTS: Final = 4096
LONGEST_LINK_BYTES: Final = 4096  # PATH_MAX: no kernel makes a longer one
LARGEST_FOLDER_BYTES: Final = 32 << 20  # some 500,000 names
MOST_ENTRIES: Final = 500_000

Node = TypeVar("Node")


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks of a file. ``source_block`` None is a hole or blocks that were never written."""

    block: int  # in the file
    count: int
    source_block: int | None  # on the device


class Tree(Protocol[Node]):
    """Folders, files and links as a file system keeps them. ``Node`` is whatever it finds a file by."""

    def root(self) -> Node:
        """Return the topmost folder."""

    def kind_of(self, node: Node) -> EntryKind:
        """Return what ``node`` is."""

    def child(self, folder: Node, name: bytes) -> Node | None:
        """Return what ``name`` is in ``folder``; None where there is no such name."""

    def link_target(self, node: Node) -> bytes:
        """Return where the symbolic link ``node`` leads."""


def find(tree: Tree[Node], path: str) -> Node | None:
    """Return what ``path`` leads to, all symbolic links followed; None where there is no such thing or no end to it."""
    try:
        pending = path.encode("utf-8", "surrogateescape").split(b"/")[::-1]
    except UnicodeEncodeError:
        return None
    stack, links = [tree.root()], 0
    while pending:
        name = pending.pop()
        if name in {b"", b"."}:
            continue
        if name == b"..":
            del stack[max(1, len(stack) - 1) :]
            continue
        node = tree.child(stack[-1], name) if tree.kind_of(stack[-1]) == "folder" else None
        if node is None:
            return None
        if tree.kind_of(node) != "link":
            stack.append(node)
            continue
        links += 1
        target = tree.link_target(node)
        if links > MOST_LINKS or len(pending) > MOST_COMPONENTS:
            return None
        if target.startswith(b"/"):
            del stack[1:]
        pending.extend(target.split(b"/")[::-1])
    return stack[-1]


def listed(entries: Iterable[tuple[bytes, EntryKind, int]]) -> tuple[Entry, ...]:
    """Return entries by name, without ``.`` and ``..``. Bytes that are no UTF-8 become surrogates, as in Python."""
    found = (
        Entry(name.decode("utf-8", "surrogateescape"), kind, size if kind == "file" else 0)
        for name, kind, size in entries
        if name not in {b".", b".."}
    )
    return tuple(sorted(found, key=lambda entry: entry.name))


def kind_of_mode(mode: int) -> EntryKind:
    """Return what a Unix mode says a file is."""
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    return "link" if stat.S_ISLNK(mode) else "other"


def printable(raw: bytes) -> str:
    """Return a label as text: up to the first NUL, trailing spaces gone."""
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace").rstrip()


def uuid_text(raw: bytes) -> str:
    """Return 16 bytes as Linux writes a UUID, the empty string where they are all zero."""
    text = raw.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])) if any(raw) else ""


def crc32c(seed: int, data: bytes | bytearray | memoryview) -> int:
    """Return the CRC-32C of ``data`` with neither the first nor the last inversion, as kernel code chains it."""
    return int(google_crc32c.extend(seed ^ 0xFFFFFFFF, bytes(data))) ^ 0xFFFFFFFF


def digest(checksum_type: str, data: bytes) -> bytes:
    """Return the named cryptographic checksum."""
    return (
        hashlib.sha256(data).digest() if checksum_type == "sha256" else hashlib.blake2b(data, digest_size=32).digest()
    )


class Source:
    """Reads of a device that end in DamagedError where a file system points outside of it."""

    def __init__(self, device: BlockDevice, subject: str) -> None:
        self.device = device
        self.subject = subject

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``. Raises DamagedError outside the device."""
        if offset < 0 or length < 0 or offset + length > self.device.size:
            raise self.damaged(f"{length} bytes at {offset} reach outside its {self.device.size} bytes")
        data = self.device.read_at(offset, length) if length else b""
        if len(data) != length:
            raise self.damaged(f"its device gave {len(data)} of {length} bytes at {offset}")
        return bytes(data)

    def damaged(self, message: str) -> DamagedError:
        """Return the error that says so of this file system."""
        return DamagedError(
            message, subject=self.subject, hint="Check the file system inside the guest, then try again"
        )


def read_runs(source: Source, runs: Iterable[Run], block_size: int, size: int) -> bytes:
    """Return the ``size`` bytes of a file whose blocks lie in ``runs``; what no run holds is zeros."""
    content = bytearray(size)
    for run in runs:
        start = run.block * block_size
        length = min(run.count * block_size, size - start)
        if run.source_block is not None and length > 0:
            content[start : start + length] = source.read(run.source_block * block_size, length)
    return bytes(content)


def overwritable_extents(runs: Iterable[Run], block_size: int, size: int) -> tuple[tuple[int, int], ...] | None:
    """Return (offset, length) of a file's bytes, neighbours joined; None where some byte has no place of its own."""
    extents, reached = list[tuple[int, int]](), 0
    for run in sorted(runs, key=lambda run: run.block):
        start = run.block * block_size
        length = min(run.count * block_size, size - start)
        if length <= 0:
            continue
        if run.source_block is None or start != reached:
            return None
        offset = run.source_block * block_size
        if extents and sum(extents[-1]) == offset:
            extents[-1] = (extents[-1][0], extents[-1][1] + length)
        else:
            extents.append((offset, length))
        reached = start + length
    return tuple(extents) if reached == size else None
