"""Real S3 servers on loopback: SeaweedFS, which keeps our promises, and rclone's, which ignores conditions."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ACCESS_KEY = "godwit-test"
SECRET_KEY = "godwit-test-secret"
BUCKET = "godwit-test"
START_LIMIT_SECONDS = 90


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running server with a bucket; credentials are in the environment while it runs."""

    endpoint: str
    bucket: str

    def url(self, prefix: str) -> str:
        """Return the store address of ``prefix`` in the bucket."""
        return f"s3://{self.bucket}/{prefix}?endpoint={self.endpoint}"


def aws_environment() -> dict[str, str]:
    """Return the variables that give the servers' credentials and keep the user's own AWS settings out."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@contextlib.contextmanager
def seaweedfs(folder: Path, *, others: Sequence[str] = ()) -> Iterator[S3Server]:
    """Run SeaweedFS with its data in ``folder``; skip the test where its program is not installed.

    ``others`` are identities beside the one that may do everything: they may do nothing but what policies let them.
    Their access keys are their names, their secret keys end in ``-secret``.
    """
    master, master_rpc, volume, volume_rpc, filer, filer_rpc, s3, s3_rpc = map(str, free_ports(8))
    identities = folder / "identities.json"
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    actions = ["Admin", "Read", "Write", "List"]
    all_identities = [{"name": "test", "credentials": credentials, "actions": actions}]
    for name in others:
        keys = [{"accessKey": name, "secretKey": f"{name}-secret"}]
        all_identities.append({"name": name, "credentials": keys, "actions": []})
    identities.write_text(json.dumps({"identities": all_identities}))
    command = [
        program("weed"),
        "-logtostderr=true",
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-master.port={master}",
        f"-master.port.grpc={master_rpc}",
        "-master.telemetry=false",
        "-master.electionTimeout=1s",
        "-master.volumeSizeLimitMB=64",
        f"-volume.port={volume}",
        f"-volume.port.grpc={volume_rpc}",
        "-volume.max=40",
        "-volume.preStopSeconds=0",
        "-filer",
        f"-filer.port={filer}",
        f"-filer.port.grpc={filer_rpc}",
        f"-filer.localSocket={folder}/filer.sock",
        "-s3",
        f"-s3.port={s3}",
        f"-s3.port.grpc={s3_rpc}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.localSocket={folder}/s3.sock",
        f"-s3.config={identities}",
        "-s3.autoCreateBucket=false",
        "-s3.cacheCapacityMB=0",
        "-s3.readerCacheSizeMB=32",
    ]
    server = S3Server(f"http://127.0.0.1:{s3}", BUCKET)
    with _running(command, folder, {"GOMEMLIMIT": "256MiB", "HOME": str(folder)}) as process:
        _wait_until_ready(process, server, folder)
        yield server


@contextlib.contextmanager
def rclone_s3(folder: Path) -> Iterator[S3Server]:
    """Run ``rclone serve s3`` over ``folder``; skip the test where its program is not installed."""
    (port,) = free_ports(1)
    data = folder / "data"
    data.mkdir()
    command = [
        program("rclone"),
        "serve",
        "s3",
        f"--addr=127.0.0.1:{port}",
        f"--auth-key={ACCESS_KEY},{SECRET_KEY}",
        "--vfs-cache-mode=off",
        str(data),
    ]
    server = S3Server(f"http://127.0.0.1:{port}", BUCKET)
    environment = {"RCLONE_CONFIG": os.devnull, "HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    with _running(command, folder, environment) as process:
        _wait_until_ready(process, server, folder)
        yield server


def program(name: str) -> str:
    """Return the path of a program from beside the interpreter or PATH; skip the test where there is none."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def free_ports(count: int) -> list[int]:
    """Return loopback ports that nothing listens on; held open together, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def _running(command: Sequence[str], folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    # setpriv has the kernel end the server when the test run dies without getting to it.
    guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*guard, *command], stdout=log, stderr=log, cwd=folder, env={**os.environ, **environment}
        )
    try:
        yield process
    finally:
        process.kill()  # its data goes with it, and an orderly end takes seconds
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], server: S3Server, folder: Path) -> None:
    """Return once the bucket exists and takes an object; the first one makes SeaweedFS prepare its volumes."""
    deadline = time.monotonic() + START_LIMIT_SECONDS
    problem: object = "not asked yet"
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(server.endpoint, timeout=5).close()
            problem = _prepare_bucket(server)
        except HTTPError:
            problem = _prepare_bucket(server)
        except (URLError, OSError) as error:
            problem = error
        if problem is None:
            return
        time.sleep(0.1)
    log = (folder / "server.log").read_text(errors="replace")[-2000:]
    pytest.fail(f"the server did not start: {problem}\n{log}")


def _prepare_bucket(server: S3Server) -> Exception | None:
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )
    try:
        if server.bucket not in [each["Name"] for each in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=server.bucket)
        client.put_object(Bucket=server.bucket, Key="ready", Body=b"ready")
        client.delete_object(Bucket=server.bucket, Key="ready")
    except (ClientError, BotoCoreError) as error:
        return error
    return None
