"""A qcow2 image, its backing files included, read through QEMU's own NBD server: the one place that runs qemu-nbd."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from replica.nbd.disk import NbdDisk
from replica.nbd.wire import NbdGoneError, UnixAddress
from vhdx.errors import ToolError

PROGRAM: Final = "qemu-nbd"
START_SECONDS: Final = 30.0
END_SECONDS: Final = 10.0


@contextmanager
def served(path: Path, *, format: str, locked: bool = True) -> Iterator[NbdDisk]:  # noqa: A002 - what everyone calls it
    """Open the image for reading, as a disk that lasts as long as the context. Raises ToolError, NbdError.

    QEMU follows the image's backing files wherever they lie: whoever calls this has looked at them.
    Without ``locked`` another QEMU may open the image for writing meanwhile, and who calls this notices that.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise ToolError(f"{PROGRAM} is needed to read {format}, and is not installed", hint="install qemu-utils")
    with tempfile.TemporaryDirectory(prefix="godwit-nbd-") as folder, tempfile.TemporaryFile() as log:
        socket = Path(folder) / "s"
        command = [program, "--read-only", "--persistent", "--shared=8", f"--socket={socket}"]
        image = str(path.absolute())
        if locked:
            command += [f"--format={format}", image]
        else:
            name = image.replace(",", ",,")  # a comma ends an option
            command += ["--image-opts", f"driver={format},force-share=on,file.driver=file,file.filename={name}"]
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        except OSError as error:
            raise ToolError(f"{program} cannot be run: {error.strerror or error}") from error
        try:
            with _connected(process, socket, path, format, log) as disk:
                yield disk
        finally:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _connected(process: subprocess.Popen[bytes], socket: Path, path: Path, format: str, log: IO[bytes]) -> NbdDisk:  # noqa: A002
    deadline = time.monotonic() + START_SECONDS
    while True:
        ended = process.poll() is not None
        try:
            return NbdDisk(UnixAddress(str(socket)), name=str(path), format=format)
        except NbdGoneError:
            if ended or time.monotonic() > deadline:
                log.seek(0)
                message = log.read(2000).decode("utf-8", "replace").strip() or "it gave no reason"
                raise ToolError(f"{PROGRAM} cannot open the image: {message}", path=str(path)) from None
        time.sleep(0.01)
