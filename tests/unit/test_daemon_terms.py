"""The agent's section of the configuration: a whole one is taken, and every mistake is named at once."""

from __future__ import annotations

from datetime import time
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from replica.configuration import load
from replica.daemon.bandwidth import Limits, Window
from replica.daemon.terms import AgentTerms, chosen_by_name
from replica.errors import ConfigurationError
from replica.sampling import Budget

WHOLE = """
[agent]
vms = ["web*", "db"]
concurrency = 8
refresh = "5m"
grace = "2m"
patience = "30s"
prune = "1h"
gc = "1d"
retain = false
verify = "5%"
drill = "7d"
metrics = "127.0.0.1:9478"
time_zone = "Europe/Berlin"

[[agent.bandwidth]]
from = "08:00"
to = "18:00"
days = ["mon", "fri"]
limit = "10MiB/s"

[[agent.bandwidth]]
from = 22:00:00
to = 06:00:00
zone = "UTC"
limit = "none"

[[agent.bandwidth]]
limit = "1.5G/s"
"""


def agent(folder: Path, text: str) -> AgentTerms | None:
    (folder / "godwit.toml").write_text(text)
    return load(environment={}, folder=folder).agent


def test_a_whole_section_is_taken(tmp_path: Path) -> None:
    found = agent(tmp_path, WHOLE)
    assert found is not None
    zone = ZoneInfo("Europe/Berlin")
    assert found.limits.windows[0] == Window(10 << 20, time(8), time(18), frozenset({0, 4}), zone)
    assert (found.limits.windows[1].limit, found.limits.windows[1].start) == (None, time(22))
    assert found.limits.windows[2] == Window(3 << 29, zone=zone)
    assert (found.vms, found.concurrency, found.refresh_seconds) == (("web*", "db"), 8, 300)
    assert (found.grace_seconds, found.patience_seconds) == (120, 30)
    assert (found.prune_seconds, found.gc_seconds, found.retain) == (3600, 86400, False)
    assert (found.verify, found.drill_seconds) == (Budget(share=0.05), 7 * 86400)
    assert found.metrics == ("127.0.0.1", 9478)


def test_a_rate_alone_holds_always_and_what_is_off_is_never(tmp_path: Path) -> None:
    found = agent(tmp_path, '[agent]\nbandwidth = "50MiB/s"\nprune = "off"\ngc = "off"\nverify = "off"\n')
    assert found is not None
    assert found.limits == Limits((Window(50 << 20),))
    assert (found.prune_seconds, found.gc_seconds, found.verify) == (None, None, None)
    assert agent(tmp_path, "") is None


def test_every_mistake_is_named(tmp_path: Path) -> None:
    text = """
    stroe = "x"
    [agent]
    vms = "web"
    concurrency = 0
    refresh = "often"
    prune = true
    verify = "0%"
    metrics = "0.0.0.0:80"
    time_zone = "Mars/Olympus"
    colour = "red"
    [[agent.bandwidth]]
    from = "8:00"
    to = "18:00"
    limit = "1MiB/s"
    [[agent.bandwidth]]
    from = "08:00"
    limit = "1MiB/s"
    [[agent.bandwidth]]
    limit = "1KiB/s"
    """
    with pytest.raises(ConfigurationError) as caught:
        agent(tmp_path, text)
    for word in (
        "'stroe'",
        "agent.vms",
        "agent.concurrency",
        "agent.refresh",
        "agent.prune",
        "agent.verify",
        "agent.metrics",
        "agent.time_zone",
        "agent.colour",
        "agent.bandwidth 1: '8:00'",
        "agent.bandwidth 2: 'from' and 'to'",
        "agent.bandwidth 3: '1KiB/s' is too little",
    ):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "agent = 3",
        "[[agent]]",
        "[agent]\nbandwidth = 7",
        '[agent]\nbandwidth = "10MiB"',
        '[agent]\nbandwidth = "/s"',
        "[agent]\nbandwidth = [1]",
        '[agent]\nbandwidth = [{from = "08:00", to = "08:00", limit = "1M/s"}]',
        '[agent]\nbandwidth = [{from = "24:00", to = "08:00", limit = "1M/s"}]',
        '[agent]\nbandwidth = [{days = ["monday"], limit = "1M/s"}]',
        '[agent]\nbandwidth = [{limt = "1M/s"}]',
        "[agent]\nbandwidth = [{}]",
        "[agent]\ntime_zone = 3",
        '[agent]\ntime_zone = "../../etc/passwd"',
        '[agent]\ntime_zone = "Europe"',
        '[agent]\ntime_zone = "\\u0000"',
        '[agent]\nverify = "-5%"',
        '[agent]\nverify = "101%"',
        '[agent]\nverify = "0"',
        '[agent]\ngc = "1000w"',
        '[agent]\nmetrics = "127.0.0.1:99999"',
        '[agent]\nmetrics = "[::]:80"',
        '[agent]\nmetrics = "999.0.0.1:80"',
        "[agent]\nconcurrency = true",
        "[agent]\nvms = []",
        "[agent]\nretain = 1",
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match="agent"):
        agent(tmp_path, text)


def test_addresses_of_this_machine_alone(tmp_path: Path) -> None:
    for text, expected in (
        ("localhost:1", ("127.0.0.1", 1)),
        ("[::1]:9478", ("::1", 9478)),
        ("127.1.2.3:0", ("127.1.2.3", 0)),
    ):
        found = agent(tmp_path, f'[agent]\nmetrics = "{text}"')
        assert found is not None and found.metrics == expected


def test_a_name_is_a_name_and_no_pattern() -> None:
    assert chosen_by_name(AgentTerms(), "web[1]*").vms == ("web[[]1][*]",)
    assert chosen_by_name(AgentTerms(vms=("x",), metrics=("127.0.0.1", 1)), None) == AgentTerms(vms=("*",))
