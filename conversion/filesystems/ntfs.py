"""NTFS, read through libfsntfs without mounting it, and files overwritten in place where their bytes lie.

A volume copied while Windows ran (a crash-consistent copy) has operations in its ``$LogFile`` that its metadata does
not show yet. It is read as it lies, without replaying that log: what was made, renamed or grown in the last seconds may
be missing or half there, while files that had not changed for longer, which is what booting needs, read right. Windows
replays the log at its next start, over the metadata; since nothing here but the content of existing clusters is ever
written, and file content is not journalled, that replay does not undo what was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import pyfsntfs

from conversion.device import BlockDevice, WritableDevice
from conversion.errors import ConversionError, DamagedError, UnsupportedError
from conversion.filesystems.filesystem import Entry, EntryKind

_BOOT_SECTOR_BYTES: Final = 512
_BITLOCKER: Final = b"-FVE-FS-"
_BITLOCKER_TO_GO: Final = bytes.fromhex("3bd66749292ed84a8399f6a339e3d001")  # at 0x1A8 of what looks like a FAT volume
_HIBERNATION_FILE: Final = "/hiberfil.sys"
# A whole image that the boot manager resumes from; one that is resumed from again and again; a pointer to another
# volume's. "wake" and "rstr" mark an image that was resumed from, zeros one that was given up.
_RESUMABLE: Final = (b"hibr", b"horm", b"link")

_FLAG_SPARSE: Final = 0x200
_FLAG_REPARSE: Final = 0x400
_FLAG_COMPRESSED: Final = 0x800
_FLAG_ENCRYPTED: Final = 0x4000
_DATA: Final = 0x80
_INDEX_ROOT: Final = 0x90
_VOLUME_INFORMATION: Final = 0x70
_VOLUME_DIRTY: Final = 0x0001
_VOLUME_RECORD: Final = 3
_FIRST_USER_RECORD: Final = 16
_RECORD_MASK: Final = (1 << 48) - 1

_MOST_ENTRIES: Final = 1 << 18
_MOST_EXTENTS: Final = 1 << 20
_MOST_READ_BYTES: Final = 512 << 20  # of metadata and content for one question; a library gone astray ends here
_HINT: Final = "run chkdsk on this volume in the guest, then try again"


class NtfsFileSystem:
    """The NTFS volume that fills ``device``: a FileSystem. Reparse points (links, junctions) are not followed.

    Only ``overwrite_file`` writes, and only to clusters that a file owns already.
    """

    def __init__(self, device: BlockDevice) -> None:
        """Open the volume. Raises DamagedError where it is none, or is not whole."""
        self._device = device
        total_bytes = _check_boot_sector(device)
        if total_bytes > device.size:
            raise _damaged(f"the boot sector says {total_bytes} bytes on a device of {device.size}", "NTFS volume")
        self._window = _Window(device)
        self._volume = pyfsntfs.volume()
        with self._asking("NTFS volume"):
            self._volume.open_file_object(self._window)

    @property
    def kind(self) -> str:
        """As blkid says: ntfs."""
        return "ntfs"

    @property
    def uuid(self) -> str:
        """The volume's serial number, 16 hexadecimal digits."""
        with self._asking("NTFS volume"):
            return f"{self._volume.serial_number:016X}"

    @property
    def label(self) -> str:
        """The volume's name, empty where it has none."""
        with self._asking("$Volume"):
            return self._volume.name or ""

    @property
    def sector_bytes(self) -> int:
        """Bytes to a sector, as the boot sector says."""
        with self._asking("NTFS volume"):
            return int(self._volume.bytes_per_sector)

    @property
    def cluster_bytes(self) -> int:
        """Bytes to a cluster."""
        with self._asking("NTFS volume"):
            return int(self._volume.cluster_block_size)

    @property
    def is_dirty(self) -> bool:
        """Whether Windows marked the volume to be checked at its next start.

        This is not whether ``$LogFile`` holds operations to replay, which it does in every crash-consistent copy.
        """
        with self._asking("$Volume"):
            for attribute in self._volume.get_file_entry(_VOLUME_RECORD).attributes:
                if attribute.attribute_type == _VOLUME_INFORMATION:
                    return bool(attribute.flags & _VOLUME_DIRTY)
        raise _damaged("it has no volume information", "$Volume")

    def read_file(self, path: str, *, largest_bytes: int = 16 << 20) -> bytes | None:
        """Return a file's content, decompressed; None where there is no such file.

        Raises DamagedError beyond ``largest_bytes``, UnsupportedError for an encrypted file.
        """
        with self._asking(path):
            entry = self._file(path)
            if entry is None:
                return None
            if entry.size > largest_bytes:
                raise DamagedError(f"{entry.size} bytes, where at most {largest_bytes} were expected", subject=path)
            return self._read(entry, path, entry.size)

    def read_start(self, path: str, length: int) -> bytes | None:
        """Return the first ``length`` bytes of a file of any size, or all of a shorter one; None where there is none.

        Raises as ``read_file``.
        """
        with self._asking(path):
            entry = self._file(path)
            return None if entry is None else self._read(entry, path, min(length, entry.size))

    def list_folder(self, path: str) -> tuple[Entry, ...] | None:
        """Return a folder's entries, sorted by name, without NTFS's own files; None where there is no such folder."""
        with self._asking(path):
            folder = self._entry(path)
            if folder is None or not _is_folder(folder):
                return None
            count = folder.number_of_sub_file_entries
            if count > _MOST_ENTRIES:
                raise _damaged(f"a folder of {count} entries", path)
            children = [folder.get_sub_file_entry(index) for index in range(count)]
            entries = [
                Entry(child.name or "", _kind_of(child), child.size if _kind_of(child) == "file" else 0)
                for child in children
                if child.file_reference & _RECORD_MASK >= _FIRST_USER_RECORD
            ]
        return tuple(sorted(entries, key=lambda entry: entry.name))

    def extents(self, path: str) -> tuple[tuple[int, int], ...] | None:
        """Return where a file's unnamed data lies, as (offset, length) on the device, together exactly its size.

        None where there is no such file, or its content is resident in the MFT, compressed (by NTFS or by Windows'
        system compression), encrypted, sparse, or not written to its end yet.
        """
        with self._asking(path):
            entry = self._file(path)
            return None if entry is None else self._extents_of(entry, path)

    def overwrite_file(self, path: str, data: bytes) -> None:
        """Replace a file's content by ``data`` of the same length, in place. No metadata changes, times included.

        Raises ConversionError where there is no such file, the lengths differ or the device takes no writes,
        UnsupportedError where the content is not plain clusters (see ``extents``).
        """
        with self._asking(path):
            entry = self._file(path)
            if entry is None:
                raise ConversionError("there is no such file", subject=path)
            size, extents = entry.size, self._extents_of(entry, path)
        if size != len(data):
            raise ConversionError(f"{len(data)} bytes cannot replace {size} in place", subject=path)
        if extents is None:
            raise UnsupportedError(
                "its content is resident, compressed, encrypted or sparse and cannot be overwritten in place",
                subject=path,
                hint="uncompress the file in the guest (compact /u), then try again",
            )
        if not hasattr(self._device, "write_at"):
            raise ConversionError("the device takes no writes", subject=path)
        done = 0
        for offset, length in extents:
            cast(WritableDevice, self._device).write_at(offset, data[done : done + length])
            done += length

    def _entry(self, path: str) -> Any:
        parts = [part for part in path.split("/") if part not in {"", "."}]
        if any("\\" in part or "\0" in part for part in parts):
            return None  # the library would take them for separators
        if not parts:
            return self._volume.get_root_directory()
        try:
            return self._volume.get_file_entry_by_path("\\" + "\\".join(parts))
        except OSError:
            if self._leads_through_a_file(parts):
                return None
            raise

    def _leads_through_a_file(self, parts: list[str]) -> bool:
        # Asked only where the library failed, as it does on such a path: it reads every folder whole to look it up.
        for depth in range(1, len(parts)):
            entry = self._volume.get_file_entry_by_path("\\" + "\\".join(parts[:depth]))
            if entry is None or not _is_folder(entry):
                return entry is not None
        return False

    def _file(self, path: str) -> Any:
        entry = self._entry(path)
        return None if entry is None or _kind_of(entry) != "file" else entry

    def _read(self, entry: Any, path: str, length: int) -> bytes:
        # Plain files are read where they lie: what overwrite_file wrote is seen, whatever the library remembers.
        extents = self._extents_of(entry, path)
        if extents is None:
            if entry.file_attribute_flags & _FLAG_ENCRYPTED:
                raise UnsupportedError("the file is encrypted", subject=path)
            content = entry.read_buffer_at_offset(length, 0) if length else b""
        else:
            content = b"".join(self._device.read_at(*extent) for extent in _first_bytes(extents, length))
        if len(content) != length:
            raise _damaged(f"{len(content)} bytes could be read of {length}", path)
        return bytes(content)

    def _extents_of(self, entry: Any, path: str) -> tuple[tuple[int, int], ...] | None:
        size = entry.size
        if size == 0:
            return ()
        if entry.file_attribute_flags & (_FLAG_SPARSE | _FLAG_REPARSE | _FLAG_COMPRESSED | _FLAG_ENCRYPTED):
            return None
        count = entry.number_of_extents
        if count == 0 or not _is_written_to_its_end(entry, size):
            return None
        if count > _MOST_EXTENTS:
            raise _damaged(f"a file in {count} pieces", path)
        extents: list[tuple[int, int]] = []
        for offset, length, flags in (entry.get_extent(index) for index in range(count)):
            if flags:  # sparse or compressed after all
                return None
            if offset < 0 or length <= 0 or offset + length > self._device.size:
                raise _damaged(f"{length} bytes at {offset} reach outside the volume", path)
            extents.append((offset, length))
        if sum(length for _, length in extents) < size:
            raise _damaged(f"its clusters do not hold its {size} bytes", path)
        _check_apart(extents, path)
        return _first_bytes(extents, size)

    @contextmanager
    def _asking(self, subject: str) -> Iterator[None]:
        """Answer one question with a fresh allowance of reads; whatever the library raises becomes DamagedError."""
        self._window.begin()
        try:
            yield
        except ConversionError:
            raise
        except (OSError, MemoryError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
            if self._window.failure is not None:  # the device below failed, not the file system
                raise self._window.failure from error
            raise _damaged(f"it cannot be read ({_first_line(error)})", subject) from error


class _Window:
    """The device as the library reads it: a file object that only reads, and only so much."""

    def __init__(self, device: BlockDevice) -> None:
        self._device = device
        self._offset = 0
        self._left = _MOST_READ_BYTES
        self.failure: Exception | None = None

    def begin(self) -> None:
        self._left = _MOST_READ_BYTES
        self.failure = None

    def read(self, size: int = -1) -> bytes:
        left = max(self._device.size - self._offset, 0)
        length = left if size < 0 else min(size, left)
        if length == 0:  # behind the end
            return b""
        if length > self._left:
            raise OSError("reads lead round in circles")
        self._left -= length
        try:
            data = self._device.read_at(self._offset, length)
        except Exception as error:
            self.failure = error
            raise
        self._offset += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        base = {0: 0, 1: self._offset, 2: self._device.size}[whence]
        self._offset = max(base + offset, 0)
        return self._offset

    def tell(self) -> int:
        return self._offset

    def get_size(self) -> int:
        return self._device.size


def is_ntfs(device: BlockDevice) -> bool:
    """Return whether ``device`` begins with the boot sector of an NTFS volume."""
    try:
        _check_boot_sector(device)
    except DamagedError:
        return False
    return True


def is_bitlocker(device: BlockDevice) -> bool:
    """Return whether ``device`` is a BitLocker volume, which nothing can be read of without its key."""
    if device.size < _BOOT_SECTOR_BYTES:
        return False
    sector = device.read_at(0, _BOOT_SECTOR_BYTES)
    return sector[3:11] == _BITLOCKER or sector[0x1A8:0x1B8] == _BITLOCKER_TO_GO


def is_hibernated(filesystem: NtfsFileSystem) -> bool:
    """Return whether the volume holds the memory of a Windows that expects to find it as it left it.

    So it is after hibernation and after a shutdown with Fast Startup: what Windows keeps of the volume in that image
    would be written over changes made meanwhile. Raises DamagedError.
    """
    start = filesystem.read_start(_HIBERNATION_FILE, 4)
    return start is not None and start.lower() in _RESUMABLE


def _check_boot_sector(device: BlockDevice) -> int:
    """Return the volume's size in bytes as its boot sector says. Raises DamagedError where it is not NTFS's."""
    sector = device.read_at(0, _BOOT_SECTOR_BYTES) if device.size >= _BOOT_SECTOR_BYTES else b""
    if sector[3:11] != b"NTFS    " or sector[510:512] != b"\x55\xaa":
        raise _damaged("the boot sector is not one of NTFS", "NTFS volume")
    sector_bytes = int.from_bytes(sector[11:13], "little")
    if sector_bytes not in {256, 512, 1024, 2048, 4096}:
        raise _damaged(f"the boot sector says {sector_bytes} bytes to a sector", "NTFS volume")
    return int.from_bytes(sector[40:48], "little") * sector_bytes


def _kind_of(entry: Any) -> EntryKind:
    # Other reparse points are plain files and folders for whoever reads: system compression, deduplication, clouds.
    if entry.file_attribute_flags & _FLAG_REPARSE and entry.symbolic_link_target is not None:
        return "link"
    if _is_folder(entry):
        return "folder"
    return "file" if entry.has_default_data_stream() else "other"


def _is_folder(entry: Any) -> bool:
    # Asked whether it has an index of folder entries, the library would read all of it.
    return any(attribute.attribute_type == _INDEX_ROOT for attribute in entry.attributes)


def _is_written_to_its_end(entry: Any, size: int) -> bool:
    """Return whether all of the data is valid: what lies behind that reads as zeros, whatever is written there."""
    for attribute in entry.attributes:
        if attribute.attribute_type == _DATA and not attribute.attribute_name:
            return bool(attribute.valid_data_size >= size)
    return False


def _first_bytes(
    extents: tuple[tuple[int, int], ...] | list[tuple[int, int]], size: int
) -> tuple[tuple[int, int], ...]:
    """Return the part of ``extents`` that holds the first ``size`` bytes."""
    kept: list[tuple[int, int]] = []
    for offset, length in extents:
        if size <= 0:
            break
        kept.append((offset, min(length, size)))
        size -= length
    return tuple(kept)


def _check_apart(extents: list[tuple[int, int]], path: str) -> None:
    end = 0
    for offset, length in sorted(extents):
        if offset < end:
            raise _damaged("it uses the same clusters twice", path)
        end = offset + length


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _damaged(message: str, subject: str) -> DamagedError:
    return DamagedError(message, subject=subject, hint=_HINT)
