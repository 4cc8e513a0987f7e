"""Runs the agent in this process: its threads, signals, endpoint and status file together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from replica import catalog
from replica.daemon import endpoint, signals, statusfile
from replica.daemon.agent import Agent, Ending, Purpose
from replica.daemon.bandwidth import Bucket
from replica.daemon.events import Tell
from replica.daemon.mailbox import QueueMailbox, Threads
from replica.daemon.site import Drill, Site
from replica.daemon.terms import AgentTerms
from replica.errors import LeaseHeldError, StoreUnavailableError
from replica.host import Host
from replica.stores.address import open_store
from replica.stores.retry import Patience
from replica.vault import Vault
from replica.workers import Workers


def serve(
    host: Host,
    vault: Vault,
    workers: Workers,
    terms: AgentTerms,
    purpose: Purpose,
    *,
    tell: Tell,
    reload: Callable[[], AgentTerms] | None = None,
    drill: Drill | None = None,
) -> tuple[Ending, dict[str, object]]:
    """Work until the process is told to stop; return how it ended and the last status. For the main thread.

    Raises NoStoreError, ConfigurationError, LeaseHeldError where another agent uses the same state folder. A store
    that does not answer is waited for.
    """
    site = Site(host, vault, workers, terms, Bucket(terms.limits, host.clock), drill=drill)
    mailbox = QueueMailbox()
    threads = Threads()
    agent = Agent(site, purpose, tell=tell, mailbox=mailbox, perform=threads, reload=reload)
    with ExitStack() as stack:
        if purpose.status_folder is not None:
            stack.enter_context(_only_one(host))
        _look_for_store(site, purpose)
        if terms.metrics is not None:
            stack.enter_context(endpoint.served(terms.metrics, _pages(agent, purpose)))
        stack.enter_context(signals.heeded(mailbox))
        ending = agent.run()
        threads.close(wait=ending.clean)
    return ending, agent.status()


@contextmanager
def _only_one(host: Host) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(host.exclusive("agent"))
        except LeaseHeldError as error:
            raise LeaseHeldError(
                "another agent is at work with the same state folder",
                path=None if host.state_folder is None else str(host.state_folder),
                hint="stop it, or give this one a state_folder of its own",
            ) from error
        yield


def _look_for_store(site: Site, purpose: Purpose) -> None:
    """Say at once where an address holds no store; one that cannot be reached now may be there later."""
    try:
        store = open_store(purpose.store_url, patience=Patience(attempts=1), around=site.vault.around)
        try:
            catalog.read_store(store)
        finally:
            store.close()
    except StoreUnavailableError:
        return


def _pages(agent: Agent, purpose: Purpose) -> endpoint.Pages:
    def status() -> str | None:
        folder = purpose.status_folder
        document = None if folder is None else statusfile.read(folder)
        return None if document is None else json.dumps(document)

    return {"/metrics": (endpoint.TEXT, lambda: agent.metrics_text), "/status": (endpoint.JSON, status)}
