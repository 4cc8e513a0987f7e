"""NTFS volumes in image files, made by mkntfs and filled through ntfs-3g's library and programs, without mounting."""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_DATA = 0x80
_FOLDER = 0o040000
_FILE = 0o100000
_COMPRESSED = 0x800
_STATE_AT = 2  # the third word of the library's volume, a set of bits
_STATE_COMPRESSION = 1 << 6


def is_available() -> bool:
    """Whether the library is installed (Debian: ntfs-3g)."""
    try:
        _library()
    except OSError:
        return False
    return True


def fill(path: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files`` (paths with ``/``) into the volume at ``path``, with the folders they need."""
    with opened(path) as volume:
        for name, content in sorted(files.items()):
            folder = name.strip("/").rpartition("/")[0]
            if folder:
                volume.make_folders(folder)
            volume.write(f"/{name.strip('/')}", content)


def make_volume(
    path: Path, size: int, *, cluster_bytes: int = 4096, sector_bytes: int = 512, label: str = "Godwit"
) -> Path:
    """Make an empty NTFS volume of ``size`` bytes at ``path``."""
    with path.open("wb") as file:
        file.truncate(size)
    sizes = ["-s", str(sector_bytes), "-c", str(cluster_bytes), "-p", "2048", "-H", "255", "-S", "63"]
    run("mkntfs", "-q", "-F", *sizes, "-L", label, str(path))
    return path


def run(program: str, *arguments: str) -> bytes:
    """Run one of ntfs-3g's programs; return its output."""
    return subprocess.run([program, *arguments], check=True, capture_output=True).stdout


def cat(path: Path, name: str) -> bytes:
    """Return a file's content as ntfscat reads it."""
    return run("ntfscat", "-f", str(path), name)


class Volume:
    """An image file opened by ntfs-3g's library. Paths begin with ``/``; errors are AssertionErrors."""

    def __init__(self, library: ctypes.CDLL, handle: int) -> None:
        self._library = library
        self._handle = handle

    def make_folders(self, path: str) -> None:
        """Make a folder and those above it."""
        parts = path.strip("/").split("/")
        for depth in range(1, len(parts) + 1):
            name = "/".join(parts[:depth])
            inode = self._library.ntfs_pathname_to_inode(self._handle, None, name.encode())
            self._close(inode or self._create(name, _FOLDER))

    def write(self, path: str, data: bytes, *, offset: int = 0, size: int | None = None) -> None:
        """Write a file, made if missing; ``size`` first makes it that long, in holes where it grows."""
        inode = self._library.ntfs_pathname_to_inode(self._handle, None, path.encode()) or self._create(path, _FILE)
        unnamed = ctypes.addressof(ctypes.c_uint16.in_dll(self._library, "AT_UNNAMED"))
        attribute = self._library.ntfs_attr_open(inode, _DATA, unnamed, 0)
        assert attribute, path
        if size is not None:
            assert self._library.ntfs_attr_truncate(attribute, size) == 0, path
        done = 0
        while done < len(data):
            count = self._library.ntfs_attr_pwrite(attribute, offset + done, len(data) - done, data[done:])
            assert count > 0, path
            done += count
        assert self._library.ntfs_attr_pclose(attribute) == 0
        self._library.ntfs_attr_close(attribute)
        self._close(inode)

    def compress_folder(self, path: str) -> None:
        """Have the files that are made in a folder from now on compressed."""
        ctypes.cast(self._handle, ctypes.POINTER(ctypes.c_ulong))[_STATE_AT] |= _STATE_COMPRESSION
        inode = self._library.ntfs_pathname_to_inode(self._handle, None, path.encode())
        value = _COMPRESSED.to_bytes(4, "little")
        assert self._library.ntfs_set_ntfs_attrib(inode, value, len(value), 0) == 0, path
        self._close(inode)

    def give_short_name(self, path: str, short_name: str) -> None:
        """Give a file an 8.3 name beside its long one, as Windows does on its system volume."""
        parent = path.rpartition("/")[0]
        inode = self._library.ntfs_pathname_to_inode(self._handle, None, path.encode())
        folder = self._library.ntfs_pathname_to_inode(self._handle, None, (parent or "/").encode())
        value = short_name.encode()
        # It closes both.
        assert self._library.ntfs_set_ntfs_dos_name(inode, folder, value, len(value), 0) == 0, path

    def compress_for_system(self, path: str, data: bytes) -> None:
        """Make a file as Windows' CompactOS does: a reparse point, a hole, and the content in a stream of its own.

        The pieces of 4096 bytes are stored as they are, which is what the format does with those that do not shrink.
        """
        pieces = [data[at : at + 4096] for at in range(0, len(data), 4096)]
        ends = list(itertools.accumulate(len(piece) for piece in pieces))
        stream = b"".join(end.to_bytes(4, "little") for end in ends[:-1]) + data
        name = "WofCompressedData".encode("utf-16-le")
        inode = self._create(path, _FILE)
        added = self._library.ntfs_attr_add(inode, _DATA, name, len(name) // 2, stream, len(stream))
        assert added == 0, path
        reparse = struct.pack("<IHHIIII", 0x80000017, 16, 0, 1, 2, 1, 0)
        assert self._library.ntfs_set_ntfs_reparse_data(inode, reparse, len(reparse), 0) == 0, path
        self._close(inode)
        self.write(path, b"", size=len(data))

    def remove(self, path: str) -> None:
        """Remove a file."""
        parent, _, name = path.rpartition("/")
        units = name.encode("utf-16-le")
        inode = self._library.ntfs_pathname_to_inode(self._handle, None, path.encode())
        folder = self._library.ntfs_pathname_to_inode(self._handle, None, (parent or "/").encode())
        # It closes both.
        assert self._library.ntfs_delete(self._handle, None, inode, folder, units, len(units) // 2) == 0, path

    def _create(self, path: str, kind: int) -> int:
        parent, _, name = path.strip("/").rpartition("/")
        units = name.encode("utf-16-le")
        folder = self._library.ntfs_pathname_to_inode(self._handle, None, (parent or "/").encode())
        assert folder, parent
        inode: int = self._library.ntfs_create(folder, 0, units, len(units) // 2, kind)
        assert inode, path
        self._close(folder)
        return inode

    def _close(self, inode: int) -> None:
        assert self._library.ntfs_inode_close(inode) == 0


@contextmanager
def opened(path: Path) -> Iterator[Volume]:
    """Open a volume for changes; they are on disk when this ends."""
    library = _library()
    handle = library.ntfs_mount(str(path).encode(), 0)
    assert handle, f"libntfs-3g cannot open {path}"
    try:
        yield Volume(library, handle)
    finally:
        assert library.ntfs_umount(handle, 0) == 0


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(ctypes.util.find_library("ntfs-3g") or "libntfs-3g.so.89", use_errno=True)
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64
    declared: dict[str, tuple[Any, list[Any]]] = {
        "ntfs_mount": (pointer, [text, ctypes.c_ulong]),
        "ntfs_umount": (ctypes.c_int, [pointer, ctypes.c_int]),
        "ntfs_pathname_to_inode": (pointer, [pointer, pointer, text]),
        "ntfs_create": (pointer, [pointer, ctypes.c_uint32, text, ctypes.c_uint8, ctypes.c_uint32]),
        "ntfs_delete": (ctypes.c_int, [pointer, text, pointer, pointer, text, ctypes.c_uint8]),
        "ntfs_inode_close": (ctypes.c_int, [pointer]),
        "ntfs_attr_open": (pointer, [pointer, ctypes.c_uint32, pointer, ctypes.c_uint32]),
        "ntfs_attr_close": (None, [pointer]),
        "ntfs_attr_pclose": (ctypes.c_int, [pointer]),
        "ntfs_attr_truncate": (ctypes.c_int, [pointer, number]),
        "ntfs_attr_pwrite": (number, [pointer, number, number, text]),
        "ntfs_attr_add": (ctypes.c_int, [pointer, ctypes.c_uint32, text, ctypes.c_uint8, text, number]),
        "ntfs_set_ntfs_dos_name": (ctypes.c_int, [pointer, pointer, text, ctypes.c_size_t, ctypes.c_int]),
        "ntfs_set_ntfs_reparse_data": (ctypes.c_int, [pointer, text, ctypes.c_size_t, ctypes.c_int]),
        "ntfs_set_ntfs_attrib": (ctypes.c_int, [pointer, text, ctypes.c_size_t, ctypes.c_int]),
    }
    for name, (result, arguments) in declared.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
