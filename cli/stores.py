"""godwit init: makes an address a store, once it has shown that it keeps its promises."""

from __future__ import annotations

from datetime import timedelta

import click

from cli.output import Output, output_options
from cli.session import Duration, Session, duration_text, store_options
from replica import catalog, immutability
from replica.stores.probe import probe_store


@click.command()
@click.argument("url", required=False)
@click.option(
    "--immutable-for",
    type=Duration(),
    help="Lock what points need, so that nobody can delete a point before it is that old. Needs S3 Object Lock.",
)
@store_options
@output_options
def init(output: Output, url: str | None, immutable_for: int | None, *, session: Session) -> None:
    """Make URL a store: file:///folder or s3://bucket/prefix.

    First the store is probed, also by racing against itself: it must refuse to overwrite what exists and to replace
    what has changed. One that does not is refused, with the call that failed. Safe to repeat.
    """
    store = session.store(create=True, url=url)
    terms = None if immutable_for is None else immutability.prepare(store, timedelta(seconds=immutable_for))
    probed = probe_store(store)
    record, is_new = catalog.init_store(store, session.host, terms)
    immutability.require_terms(record.terms, terms)
    document = {
        "store": store.url,
        "store_id": record.store_id,
        "created_at": record.created_at,
        "new": is_new,
        "immutable_seconds": None if record.terms is None else int(record.terms.period.total_seconds()),
        "checks": probed.checks,
        "calls": probed.times,
    }

    def render() -> None:
        output.line(f"{'Made' if is_new else 'This already is'} a store at {store.url}")
        if record.terms is not None:
            output.line(
                f"Points stay for {duration_text(record.terms.period.total_seconds())} at least: run 'godwit retain' "
                f"every {duration_text(record.terms.renewal.total_seconds())} or more often"
            )
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
