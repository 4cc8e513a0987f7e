"""What Hyper-V recorded of a disk since a reference point, asked in pieces and kept in bounded memory."""

from __future__ import annotations

import base64
import binascii
from typing import Final

import numpy as np
import numpy.typing as npt

from replica.block import BLOCK_BYTES
from replica.hyperv.scripts import CHANGES
from replica.hyperv.session import Answer, HypervError, Session, ask
from vhdx.disk import Extents
from vhdx.extents import EMPTY, merged

MOST_RANGES: Final = 1 << 22  # kept at once, 64 MiB: more are told more coarsely
PIECE_BYTES: Final = 64 << 30
MOST_QUESTIONS: Final = 1 << 20


def changed_since(session: Session, path: str, limit: str, size: int, *, timeout_seconds: float = 600) -> Extents:
    """Return what may have been written to the disk since ``limit``, an identifier of Hyper-V's change tracking.

    Ranges are rounded outwards to blocks. ``path`` is a file of the host that is not written to; ``size`` the disk's,
    bytes. Raises HypervError where Hyper-V does not know the identifier, or tells what cannot be.
    """
    parts: list[Extents] = []
    granule, offset = BLOCK_BYTES, 0
    for _ in range(MOST_QUESTIONS):
        if offset >= size:
            return merged(parts)
        # GetVirtualDiskChanges is documented to want a length less than the disk's size: a disk is two pieces at least.
        length = min(PIECE_BYTES, size - offset, -(-size // 2 // 4096) * 4096 if size > 4096 else size)
        answer = ask(
            session, CHANGES, Path=path, Limit=limit, Offset=offset, Length=length, timeout_seconds=timeout_seconds
        )
        processed = _processed(answer, length, path)
        parts.append(_ranges(answer, offset, offset + processed, granule, size, path))
        if sum(map(len, parts)) > MOST_RANGES:
            parts = [merged(parts)]
            while len(parts[0]) > MOST_RANGES // 2:
                granule *= 2
                parts = [_rounded(parts[0], granule, size)]
        offset += processed
    raise HypervError("Hyper-V tells changes in pieces without end", path=path, kind="Answer")


def _processed(answer: Answer, length: int, path: str) -> int:
    text = answer.text("processed")
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
    if not 0 < value <= length:
        raise HypervError(f"Hyper-V looked at {text!r:.40} of {length} bytes", path=path, kind="Answer")
    return value


def _ranges(answer: Answer, start: int, end: int, granule: int, size: int, path: str) -> Extents:
    """Return the ranges of an answer that looked at [start, end), rounded to granules."""
    starts, lengths = _numbers(answer, "starts", path), _numbers(answer, "lengths", path)
    if len(starts) != len(lengths):
        raise HypervError("Hyper-V tells of another number of offsets than of lengths", path=path, kind="Answer")
    if not len(starts):
        return EMPTY
    if int(starts.max()) >= size or int(lengths.max()) > size:
        raise HypervError("Hyper-V tells of changes beyond the disk's end", path=path, kind="Answer")
    first = starts.astype(np.int64)
    # A range may reach out of what was asked for: its other part comes, or came, with another answer.
    pairs = np.column_stack((np.maximum(first, start), np.minimum(first + lengths.astype(np.int64), size)))
    return _rounded(pairs[pairs[:, 0] < pairs[:, 1]], granule, size)


def _rounded(ranges: Extents, granule: int, size: int) -> Extents:
    low = ranges[:, 0] // granule * granule
    high = np.minimum(-(-ranges[:, 1] // granule) * granule, size)
    pairs = np.column_stack((low, high))
    return merged([pairs, pairs[:1]])  # of one array alone, order would be taken for granted


def _numbers(answer: Answer, name: str, path: str) -> npt.NDArray[np.uint64]:
    try:
        data = base64.b64decode("".join(answer.text(name).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise HypervError("the host's answer is no Base64", path=path, kind="Answer") from error
    if len(data) % 8:
        raise HypervError("the host's answer is cut off", path=path, kind="Answer")
    return np.frombuffer(data, "<u8")
