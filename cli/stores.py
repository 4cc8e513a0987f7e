"""godwit init: makes an address a store, once it has shown that it keeps its promises."""

from __future__ import annotations

import click

from cli.output import Output, output_options
from cli.session import Session, store_options
from replica import catalog
from replica.stores.probe import probe_store


@click.command()
@click.argument("url", required=False)
@store_options
@output_options
def init(output: Output, url: str | None, *, session: Session) -> None:
    """Make URL a store: file:///folder or s3://bucket/prefix.

    First the store is probed, also by racing against itself: it must refuse to overwrite what exists and to replace
    what has changed. One that does not is refused, with the call that failed. Safe to repeat.
    """
    store = session.store(create=True, url=url)
    probed = probe_store(store)
    record, is_new = catalog.init_store(store, session.host)
    document = {
        "store": store.url,
        "store_id": record.store_id,
        "created_at": record.created_at,
        "new": is_new,
        "checks": probed.checks,
        "calls": probed.times,
    }

    def render() -> None:
        output.line(f"{'Made' if is_new else 'This already is'} a store at {store.url}")
        output.line(f"{len(probed.checks)} checks passed; the median call took:")
        output.table(
            ["call", "median", "longest"],
            [
                (time.call, f"{time.median_seconds * 1000:.1f} ms", f"{time.longest_seconds * 1000:.1f} ms")
                for time in probed.times
            ],
            right=(1, 2),
        )
        output.note(f"next: godwit protect NAME --disk PATH --store {store.url}")

    output.show(document, render)
