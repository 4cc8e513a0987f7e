"""What every file system reader offers, whatever is on the partition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

EntryKind: TypeAlias = Literal["file", "folder", "link", "other"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a folder. ``size`` is bytes, 0 but for files."""

    name: str
    kind: EntryKind
    size: int


class FileSystem(Protocol):
    """A file system, read without mounting it. Paths begin at its root and use ``/``; symbolic links are followed.

    FAT and NTFS compare names without case, the others with it. Everything raises DamagedError where the file system
    contradicts itself, never an error of a library below, and takes bounded time and memory.
    """

    @property
    def kind(self) -> str:
        """As blkid says: vfat, ntfs, ext2, ext3, ext4, xfs, btrfs."""

    @property
    def uuid(self) -> str:
        """As blkid and GRUB's ``search --fs-uuid`` write it, empty where it has none."""

    @property
    def label(self) -> str:
        """The volume's label, empty where it has none."""

    def read_file(self, path: str, *, largest_bytes: int = 16 << 20) -> bytes | None:
        """Return a file's content, None where there is no such file. Raises DamagedError beyond ``largest_bytes``."""

    def list_folder(self, path: str) -> tuple[Entry, ...] | None:
        """Return a folder's entries without ``.`` and ``..``, sorted by name; None where there is no such folder."""

    def extents(self, path: str) -> tuple[tuple[int, int], ...] | None:
        """Return where a file's bytes lie, as (offset, length) on the file system's device, in the file's order.

        Together they hold exactly the file's size. None where there is no such file or its bytes cannot be
        overwritten in place: stored inside metadata, compressed, encrypted, sparse, or covered by checksums.
        """
