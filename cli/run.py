"""godwit run: the agent, and what it says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from cli import failure
from cli.output import Output, escape, output_options, to_json
from cli.session import Session, duration_text, store_options
from cli.sizes import human_size
from replica.errors import NoStoreError

if TYPE_CHECKING:
    from replica.catalog import ProtectedVm
    from replica.daemon.agent import Purpose
    from replica.daemon.events import Event
    from replica.daemon.terms import AgentTerms
    from replica.host import Host
    from replica.stores.store import Store


@click.command()
@click.option("--once", is_flag=True, help="One cycle for each VM, as soon as may be, and no more.")
@store_options
@output_options
def run(output: Output, once: bool, *, session: Session) -> int | None:
    """Replicate the VMs of this host at their intervals, and look after their recovery points, until told to stop.

    These are the VMs of the tenant whose disks can be read here, or those that the configuration chooses. What happens
    is told on stderr, an event a line, as JSON where that is no terminal. SIGTERM and Ctrl-C finish the cycles under
    way, or give them up after the grace period; a second one ends at once. SIGHUP rereads the configuration and tries
    again what had failed.
    """
    from replica.daemon.agent import Purpose  # noqa: PLC0415 - the reference of commands needs none of it
    from replica.daemon.terms import AgentTerms  # noqa: PLC0415

    terms = session.configuration.agent or AgentTerms()
    url, tenant = store_url(session), session.configuration.tenant
    folder = None if once else session.host.state_folder
    purpose = Purpose(url, tenant, once=once, care=not once, status_folder=folder, digests=not once)
    return serve(output, session, terms, purpose)


def watch(output: Output, session: Session, name: str | None) -> int | None:
    """Replicate one VM, or all of the tenant, at their intervals, and do nothing else for them."""
    from replica.daemon.agent import Purpose  # noqa: PLC0415
    from replica.daemon.terms import AgentTerms, chosen_by_name  # noqa: PLC0415

    terms = chosen_by_name(session.configuration.agent or AgentTerms(), name)
    purpose = Purpose(store_url(session), session.configuration.tenant, care=False)
    return serve(output, session, terms, purpose, lambda loaded: chosen_by_name(loaded, name))


def serve(
    output: Output,
    session: Session,
    terms: AgentTerms,
    purpose: Purpose,
    adapt: Callable[[AgentTerms], AgentTerms] = lambda terms: terms,
) -> int | None:
    """Run the agent, and return the exit code. ``adapt`` makes its terms of those of a configuration read again."""
    from replica.daemon import service  # noqa: PLC0415
    from replica.daemon.terms import AgentTerms  # noqa: PLC0415

    def reload() -> AgentTerms:
        from replica import configuration  # noqa: PLC0415

        loaded = configuration.load(environment=os.environ, file=session.configuration.file)
        return adapt(loaded.agent or AgentTerms())

    ending, status = service.serve(
        session.host,
        session.vault,
        session.configuration.workers,
        terms,
        purpose,
        tell=teller(output),
        reload=reload,
        drill=_drill(session),
    )
    output.show(status, lambda: None)
    if not ending.clean:  # threads hang, and the interpreter would wait for them
        output.stdout.flush()
        output.stderr.flush()
        os._exit(failure.DEGRADED)
    return failure.DEGRADED if purpose.once and not ending.complete else None


def _drill(session: Session) -> Callable[[Store, Host, ProtectedVm], dict[str, object]]:
    """Return what a scheduled drill does, looked up once one is due: most agents never need it."""

    def drill(store: Store, host: Host, found: ProtectedVm) -> dict[str, object]:
        from cli.drill import scheduled  # noqa: PLC0415

        return scheduled(session)(store, host, found)

    return drill


def store_url(session: Session) -> str:
    """Return the store's address. Raises NoStoreError."""
    url = session.configuration.store
    if url is None:
        raise NoStoreError(
            "no store was given", hint='say --store URL, set GODWIT_STORE, or write store = "URL" in godwit.toml'
        )
    return url


def teller(output: Output) -> Callable[[Event], None]:
    """Return what tells events on stderr: to a person at a terminal, else as JSON; with --quiet what is wrong alone."""
    line = _sentence if output.shows_progress_bar() else _json_line

    def tell(event: Event) -> None:
        if output.quiet and event.level == "info":
            return
        output.stderr.write(line(event) + "\n")
        output.stderr.flush()

    return tell


def _json_line(event: Event) -> str:
    return json.dumps(to_json(event.document()), ensure_ascii=True)


def _sentence(event: Event) -> str:
    told = dict(event.fields)
    message, hint = told.pop("message", None), told.pop("hint", None)
    told.pop("error", None)
    words = [f"{event.at:%H:%M:%S}", *([event.level.upper()] if event.level != "info" else []), event.name]
    words += [event.vm] if event.vm is not None else []
    words += [f"{name}={_value(name, value)}" for name, value in told.items() if value not in (None, [], ())]
    text = " ".join(words)
    if message is not None:
        text += f": {message}" + (f" ({hint})" if hint else "")
    return escape(text)


def _value(name: str, value: object) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if name.endswith("_bytes"):
            return human_size(int(value)).replace(" ", "")
        if name.endswith("seconds"):
            return duration_text(value).replace(" ", "") if value >= 60 else f"{value:.3g}s"
    if isinstance(value, (list, tuple)):
        return ",".join(str(one) for one in value)
    return str(to_json(value))
