"""godwit serve: a recovery point as NBD exports, before anything is restored."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import click

from cli.output import Output, output_options
from cli.session import Session, store_options
from cli.sizes import human_size
from replica import serving
from replica.nbd.wire import TcpAddress, UnixAddress
from replica.scratch import default_scratch_folder


class Listen(click.ParamType["TcpAddress"]):
    """An address of this machine as a person writes it: HOST:PORT."""

    name = "address"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> TcpAddress:
        """Return the address."""
        if isinstance(value, TcpAddress):
            return value
        host, colon, port = str(value).rpartition(":")
        if not colon or not port.isdecimal() or int(port) > 65535:
            self.fail(f"{value!r} is no address: write 127.0.0.1:10809", param, ctx)
        return TcpAddress(host.strip("[]"), int(port))


@click.command()
@click.argument("name")
@click.option(
    "--point", "number", type=click.IntRange(1), metavar="P", help="The recovery point.  [default: the newest]"
)
@click.option("--disk", "disks", multiple=True, metavar="D", help="A disk by number or name.  [default: all]")
@click.option("--socket", type=click.Path(path_type=Path), metavar="PATH", help="The socket to make, and listen on.")
@click.option("--listen", type=Listen(), metavar="HOST:PORT", help="Listen on a loopback address instead.")
@click.option("--writable", is_flag=True, help="Take writes, into a scratch file that ends with the command.")
@click.option(
    "--scratch", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER", help="Where scratch files go."
)
@click.option(
    "--generation",
    type=click.Choice(["1", "2", "auto"]),
    default="auto",
    help="What the disks are to start as; auto: as the machine that was protected.",
)
@store_options
@output_options
def serve(
    output: Output,
    name: str,
    number: int | None,
    disks: tuple[str, ...],
    socket: Path | None,
    listen: TcpAddress | None,
    writable: bool,
    scratch: Path | None,
    generation: str,
    *,
    session: Session,
) -> None:
    """Serve the disks of a recovery point of the VM NAME by NBD, until interrupted.

    Nothing is restored first: blocks are fetched as they are read, and each is checked. Each disk is an export under
    its number; the first one also under the empty name. With --generation 1 a BIOS starts from the disks of a UEFI
    machine: the conversion lies over them, and is in no other place.
    """
    if (socket is None) == (listen is None):
        raise click.UsageError("say either --socket PATH or --listen HOST:PORT")
    store = session.store()
    found = session.vm(store, name)
    address = UnixAddress(str(socket)) if socket else listen
    assert address is not None
    with serving.serve_point(
        store,
        session.host,
        found,
        address,
        point=number,
        disks=disks,
        scratch=(scratch or default_scratch_folder()) if writable else None,
        workers=session.configuration.workers,
        report=lambda error: output.note(str(error)),
        generation=None if generation == "auto" else 1 if generation == "1" else 2,
    ) as served:

        def render() -> None:
            as_ = "" if generation == "auto" else f" as Generation {served.generation}"
            output.line(f"{name}: serving point {served.point}{as_} until interrupted (Ctrl-C)")
            for one in served.exports:
                output.line(f"  disk {one.disk.number}: {one.url} ({human_size(one.disk.size)})")

        output.show(served.document(), render)
        output.stdout.flush()
        ended = threading.Event()
        signal.signal(signal.SIGINT, lambda *_: ended.set())
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
        ended.wait()
