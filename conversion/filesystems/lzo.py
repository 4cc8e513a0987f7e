"""Decompression of LZO1X, the form in which btrfs compresses with ``compress=lzo``.

The stream is a series of instructions, each copying from what is already decompressed and then up to three literal
bytes. Description: the kernel's Documentation/staging/lzo.rst.
"""

from __future__ import annotations


def decompress_lzo(source: bytes, largest_bytes: int) -> bytes:
    """Return what ``source`` holds. Raises ValueError where it is damaged or holds more than ``largest_bytes``."""
    try:
        return _decompress(source, largest_bytes)
    except IndexError:
        raise ValueError("the stream ends too early") from None


def _decompress(source: bytes, largest_bytes: int) -> bytes:
    target, at, literals = bytearray(), 0, 0  # literals: how many the last instruction copied, 4 for more
    if source[0] > 17:
        literals = min(source[0] - 17, 4)
        at = source[0] - 17 + 1
        target += _taken(source, 1, source[0] - 17)
    while True:
        code = source[at]
        at += 1
        if code < 16 and literals == 0:
            count, at = _length(source, at, code, 15)
            target += _taken(source, at, count + 3)
            at += count + 3
            literals = 4
            continue
        if code < 16:
            distance = (code >> 2) + (source[at] << 2) + (1 if literals < 4 else 2049)
            length = 2 if literals < 4 else 3
            state, at = code & 3, at + 1
        elif code >= 64:
            distance = (code >> 2 & 7) + (source[at] << 3) + 1
            length = (code >> 5) + 1
            state, at = code & 3, at + 1
        else:
            length, at = _length(source, at, code & (31 if code >= 32 else 7), 31 if code >= 32 else 7)
            length += 2
            tail = source[at] | source[at + 1] << 8
            state, at = tail & 3, at + 2
            distance = (tail >> 2) + 1
            if code < 32:
                distance += 16383 + ((code & 8) << 11)
                if distance == 16384:
                    return bytes(target)
        _repeat(target, distance, length, largest_bytes)
        target += _taken(source, at, state)
        at += state
        literals = state
        if len(target) > largest_bytes:
            raise ValueError(f"it holds more than {largest_bytes} bytes")


def _length(source: bytes, at: int, bits: int, most: int) -> tuple[int, int]:
    """Return a length that goes on in zero bytes, 255 each, where its bits in the instruction are zero."""
    if bits:
        return bits, at
    zeros = at
    while source[at] == 0:
        at += 1
    return most + 255 * (at - zeros) + source[at], at + 1


def _taken(source: bytes, at: int, count: int) -> bytes:
    if at + count > len(source):
        raise ValueError("the stream ends too early")
    return source[at : at + count]


def _repeat(target: bytearray, distance: int, length: int, largest_bytes: int) -> None:
    """Append ``length`` bytes from ``distance`` back, which may reach into what is being appended."""
    if distance > len(target) or len(target) + length > largest_bytes:
        raise ValueError("a copy reaches outside of what it holds")
    pattern = target[len(target) - distance :][:length]
    target += (pattern * (length // len(pattern) + 1))[:length]
