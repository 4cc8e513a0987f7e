"""The picture of a machine's screen: from the raw RGB 565 that Hyper-V gives to PNG."""

from __future__ import annotations

import base64
import binascii
from typing import Final

import numpy as np

from replica.errors import PlatformError
from replica.platforms.qemu import screen

WIDTH: Final = 1024
HEIGHT: Final = 768


def png_of(text: str, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """Return the PNG of a picture in Base64: rows from the top, a pixel in two bytes, the lower first.

    Raises PlatformError.
    """
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PlatformError("the host's picture of the screen is no Base64") from error
    if len(data) != 2 * width * height:
        raise PlatformError(f"the host's picture of the screen has {len(data)} bytes, not {2 * width * height}")
    pixels = np.frombuffer(data, "<u2")
    colours = np.empty((len(pixels), 3), np.uint8)
    for at, (shift, bits) in enumerate(((11, 5), (5, 6), (0, 5))):
        most = (1 << bits) - 1
        colours[:, at] = ((pixels >> shift) & most).astype(np.uint32) * 255 // most
    return screen.png_of(b"P6 %d %d 255\n" % (width, height) + colours.tobytes())
