"""The files of a Hyper-V host, read from here: on the host itself, through mapped folders, or through the session.

The last is slow, a question for each MiB, and works wherever questions do.
"""

from __future__ import annotations

import base64
import binascii
import ntpath
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from replica.errors import SourceError
from replica.hyperv.scripts import MEASURE, MOST_READ_BYTES, READ
from replica.hyperv.session import HypervError, Session, ask
from vhdx.chain import MAX_CHAIN_LENGTH, parent_linkages, parent_paths
from vhdx.disk import ReadableBuffer
from vhdx.errors import OsError, ParentError, ReadOnlyError
from vhdx.image import VhdxImage, naming
from vhdx.osfile import File, open_file
from vhdx.vhdx import VhdxDisk

CACHE_PAGES: Final = 16
_MOST_FILE_BYTES: Final = 1 << 56


class HostFiles:
    """How files of a host are opened, by the paths that the host has for them."""

    def __init__(self, session: Session, maps: Sequence[tuple[str, str]], *, here: bool) -> None:
        """``maps`` are pairs of folders, the host's and ours; ``here``: this machine is the host."""
        self._session = session
        self._maps = [(_normal(there), here_) for there, here_ in maps]
        self._here = here

    def open(self, path: str) -> File:
        """Open a file for reading. Raises OsError, HypervError."""
        mapped = self.mapped(path)
        if mapped is not None:
            return open_file(mapped)
        return open_file(path) if self._here else SessionFile(self._session, path)

    def mapped(self, path: str) -> Path | None:
        """Return where a file is in a mapped folder, the longest that fits; None where in none."""
        normal, fits = _normal(path), ""
        found: Path | None = None
        for there, here in self._maps:
            stem = there.rstrip("\\")
            inside = normal[len(stem) :]
            if normal.casefold().startswith(stem.casefold()) and inside.startswith("\\") and len(stem) >= len(fits):
                fits, found = stem, Path(here, *[part for part in inside.split("\\") if part])
        return found


def _normal(path: str) -> str:
    """Return the path with its dots followed and one kind of slash, so that it cannot climb out of a prefix."""
    return ntpath.normpath(path)


class SessionFile:
    """A file of the host, a MiB at a time through the session, the last few kept."""

    writable = False

    def __init__(self, session: Session, path: str) -> None:
        """Look at the file. Raises HypervError."""
        self._session = session
        self._name = path
        length = ask(session, MEASURE, Path=path).text("length")
        if not (length.isascii() and length.isdigit() and len(length) < 20 and int(length) < _MOST_FILE_BYTES):
            raise HypervError(f"the host tells of a file of {length!r:.40} bytes", path=path, kind="Answer")
        self._length = int(length)
        self._pages: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """The host's path. Here it is but a name."""
        return Path(self._name)

    def size(self) -> int:
        """Return the length that the file had when it was opened."""
        return self._length

    def pread(self, offset: int, length: int) -> bytes:
        """Return the bytes from ``offset``; fewer only where the file ends. Raises HypervError."""
        end = min(offset + length, self._length)
        if offset >= end:
            return b""
        first, last = offset // MOST_READ_BYTES, (end - 1) // MOST_READ_BYTES
        data = b"".join(self._page(number) for number in range(first, last + 1))
        start = offset - first * MOST_READ_BYTES
        return data[start : start + end - offset]

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``, and return how much of it. Raises HypervError."""
        done = 0
        while done < len(buffer):
            data = self.pread(offset + done, min(MOST_READ_BYTES, len(buffer) - done))
            if not data:
                break
            buffer[done : done + len(data)] = data
            done += len(data)
        return done

    def _page(self, number: int) -> bytes:
        with self._lock:
            page = self._pages.get(number)
            if page is not None:
                self._pages.move_to_end(number)
                return page
        page = self._fetched(number * MOST_READ_BYTES)
        with self._lock:
            self._pages[number] = page
            if len(self._pages) > CACHE_PAGES:
                self._pages.popitem(last=False)
        return page

    def _fetched(self, offset: int) -> bytes:
        wanted = min(MOST_READ_BYTES, self._length - offset)
        text = ask(self._session, READ, Path=self._name, Offset=offset, Length=wanted).text("data")
        try:
            data = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise HypervError("the host's answer is no Base64", path=self._name, kind="Answer") from error
        if len(data) != wanted:
            raise HypervError(f"the host read {len(data)} of {wanted} bytes", path=self._name, kind="Answer")
        return data

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield all there is of the range: where the file is sparse is not asked."""
        end = min(end, self._length)
        if start < end:
            yield start, end

    def close(self) -> None:
        """Let the pages go. Safe to repeat."""
        with self._lock:
            self._pages.clear()

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        """Raise ReadOnlyError."""
        raise self._read_only()

    def truncate(self, size: int) -> None:
        """Raise ReadOnlyError."""
        raise self._read_only()

    def fsync(self) -> None:
        """Raise ReadOnlyError."""
        raise self._read_only()

    def punch_hole(self, offset: int, length: int) -> bool:
        """Raise ReadOnlyError."""
        raise self._read_only()

    def _read_only(self) -> ReadOnlyError:
        return ReadOnlyError("files of a Hyper-V host are only read", path=self._name)


def open_chain(files: HostFiles, path: str) -> VhdxDisk:
    """Open a VHDX of the host with all its parents, wherever they lie. Raises DiskError, HypervError.

    Hyper-V follows a locator to any place, and so does this; what is opened must be the parent by its identifier.
    """
    with ExitStack() as opened:
        image = _image(files, path)
        disk = child = VhdxDisk(image)
        opened.callback(disk.close)
        for _ in range(MAX_CHAIN_LENGTH):
            if not child.image.geometry.has_parent:
                opened.pop_all()
                return disk
            path, parent = _parent(files, path, child.image)
            child.parent = child = VhdxDisk(parent)
        raise ParentError(f"the chain has more than {MAX_CHAIN_LENGTH} files", path=path)


def _image(files: HostFiles, path: str) -> VhdxImage:
    file = files.open(path)
    try:
        with naming(file.path):
            return VhdxImage.load(file)
    except BaseException:
        file.close()
        raise


def _parent(files: HostFiles, child_path: str, child: VhdxImage) -> tuple[str, VhdxImage]:
    linkages, tried = parent_linkages(child), []
    for path in _parent_paths(child_path, child):
        try:
            parent = _image(files, path)
        except (OsError, SourceError) as error:
            tried.append(str(error))
            continue
        if parent.data_write_guid in linkages and parent.geometry.sector_size == child.geometry.sector_size:
            return path, parent
        parent.close()
        tried.append(f"{path}: it has changed since the child was made")
    raise ParentError(f"its parent cannot be used: {'; '.join(tried)[:1000] or 'no path leads to it'}", path=child_path)


def _parent_paths(child_path: str, child: VhdxImage) -> Iterator[str]:
    paths = parent_paths(child)
    relative = paths.get("relative_path")
    if relative and "\0" not in relative and not ntpath.isabs(relative):
        yield _normal(ntpath.join(ntpath.dirname(child_path), relative))
    for key in ("absolute_win32_path", "volume_path"):
        value = paths.get(key)
        if value and "\0" not in value:
            yield _normal(value.removeprefix("\\\\?\\") if value[4:6].endswith(":") else value)
