"""Files and folders put into an NTFS volume through Debian's libntfs-3g: no mount, no root, folders included."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path

_DATA = 0x80
_FOLDER, _FILE = 0o040000, 0o100000
_LIBRARY = "libntfs-3g.so.89"


def is_available() -> bool:
    """Whether the library is installed (Debian: ntfs-3g)."""
    try:
        _library()
    except OSError:
        return False
    return True


def fill(volume: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files`` (paths with ``/``) into the NTFS volume in the file ``volume``, with the folders they need."""
    library = _library()
    handle = library.ntfs_mount(str(volume).encode(), 0)
    assert handle, f"{volume}: libntfs-3g cannot open it"
    try:
        for path, content in sorted(files.items()):
            folder = ""
            for name in path.strip("/").split("/")[:-1]:
                _create(handle, folder, name, _FOLDER)
                folder = f"{folder}/{name}"
            name = path.rpartition("/")[2]
            _create(handle, folder, name, _FILE)
            _write(handle, f"{folder}/{name}", content)
    finally:
        assert library.ntfs_umount(handle, 0) == 0


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(_LIBRARY, use_errno=True)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("ntfs_mount", pointer, [ctypes.c_char_p, ctypes.c_ulong]),
        ("ntfs_umount", ctypes.c_int, [pointer, ctypes.c_int]),
        ("ntfs_pathname_to_inode", pointer, [pointer, pointer, ctypes.c_char_p]),
        ("ntfs_mbstoucs", ctypes.c_int, [ctypes.c_char_p, ctypes.POINTER(pointer)]),
        ("ntfs_create", pointer, [pointer, ctypes.c_uint32, pointer, ctypes.c_uint8, ctypes.c_uint32]),
        ("ntfs_inode_close", ctypes.c_int, [pointer]),
        ("ntfs_attr_open", pointer, [pointer, ctypes.c_uint32, pointer, ctypes.c_uint32]),
        ("ntfs_attr_pwrite", number, [pointer, number, number, ctypes.c_char_p]),
        ("ntfs_attr_close", None, [pointer]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _open(handle: int, path: str) -> int | None:
    found: int | None = _library().ntfs_pathname_to_inode(handle, None, (path or "/").encode())
    return found


def _create(handle: int, folder: str, name: str, kind: int) -> None:
    library = _library()
    existing = _open(handle, f"{folder}/{name}")
    if existing:
        library.ntfs_inode_close(existing)
        return
    parent = _open(handle, folder)
    assert parent, folder
    unicode_name = ctypes.c_void_p()
    length = library.ntfs_mbstoucs(name.encode(), ctypes.byref(unicode_name))
    made = library.ntfs_create(parent, 0, unicode_name, length, kind)
    assert made, f"{folder}/{name}: errno {ctypes.get_errno()}"
    library.ntfs_inode_close(made)
    library.ntfs_inode_close(parent)


def _write(handle: int, path: str, content: bytes) -> None:
    library = _library()
    inode = _open(handle, path)
    assert inode, path
    unnamed = ctypes.addressof(ctypes.c_uint16.in_dll(library, "AT_UNNAMED"))
    attribute = library.ntfs_attr_open(inode, _DATA, unnamed, 0)
    assert attribute, path
    written = library.ntfs_attr_pwrite(attribute, 0, len(content), content) if content else 0
    library.ntfs_attr_close(attribute)
    library.ntfs_inode_close(inode)
    assert written == len(content), f"{path}: {written} of {len(content)} bytes"
