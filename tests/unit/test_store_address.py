"""Store addresses: what opens which store, and what mistakes are told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from replica.errors import ConfigurationError, NoStoreError
from replica.stores.address import open_store
from replica.stores.file import FileStore
from replica.stores.s3 import S3Store


def test_a_path_and_its_file_url_open_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a folder, 100% #1"
    made = open_store(str(folder), create=True)
    made.create("key", b"x")
    assert made.url.startswith("file:///")
    assert open_store(made.url).get("key") == b"x"
    monkeypatch.chdir(tmp_path)
    assert open_store("a folder, 100% #1").url == made.url
    assert open_store("./a folder, 100% #1").url == made.url
    monkeypatch.setenv("HOME", str(tmp_path))
    assert isinstance(open_store("~/a folder, 100% #1").inner, FileStore)


def test_a_folder_that_holds_no_store_is_not_taken_for_one(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(NoStoreError) as caught:
            open_store(path.as_uri())
        assert str(path) in str(caught.value)
        assert "godwit init" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_memory_store_is_found_again_by_name() -> None:
    open_store("memory:address-test").create("key", b"x")
    assert open_store("memory:address-test").get("key") == b"x"
    assert list(open_store("memory:another").list("")) == []


def test_an_s3_address_opens_an_s3_store(aws_environment: None) -> None:
    url = "s3://bucket/a/prefix?endpoint=http://127.0.0.1:1&region=eu-west-1&path_style=0&checksum=md5&listing=folders"
    store = open_store(url, workers=3)
    assert isinstance(store.inner, S3Store)
    assert store.url == url
    assert store.inner._prefix == "a/prefix/"
    meta = store.inner._client.meta
    assert meta.endpoint_url == "http://127.0.0.1:1"
    assert meta.region_name == "eu-west-1"
    assert meta.config.max_pool_connections == 3
    assert meta.config.s3 == {"addressing_style": "auto"}


def test_the_environment_names_endpoint_and_region(aws_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:2")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    store = open_store("s3://bucket").inner
    assert isinstance(store, S3Store)
    assert store._client.meta.endpoint_url == "http://127.0.0.1:2"
    assert store._client.meta.region_name == "eu-north-1"
    assert store._client.meta.config.s3["addressing_style"] == "path"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3:/bucket/prefix", "does not name a bucket"),
        ("s3:bucket", "does not name a bucket"),
        ("s3://", "does not name a bucket"),
        ("s3://a b/prefix", "does not name a bucket"),
        ("s3://bucket/../up", "not a valid object key"),
        ("s3://bucket/a//b", "not a valid object key"),
        ("s3://bucket?endpont=http://x", "there is no option 'endpont'"),
        ("s3://bucket?region=a&region=b", "given twice"),
        ("s3://bucket?region", "is not NAME=VALUE"),
        ("s3://bucket?endpoint=127.0.0.1:8333", "the endpoint is not"),
        ("s3://bucket?endpoint=http://user:hunter2@host", "without credentials"),
        ("s3://AKIA:hunter2@bucket/prefix", "with credentials in it"),
        ("s3://bucket?path_style=maybe", "path_style is 1 or 0"),
        ("s3://bucket?checksum=sha1", "checksum is crc32c or md5"),
        ("s3://bucket?listing=tree", "listing is flat or folders"),
        ("S4://bucket", "s4: is not known"),
        ("https://user:hunter2@s3.example.com/bucket", "https: is not known"),
        ("gs://bucket", "gs: is not known"),
        ("file:relative", "does not name a folder of this machine"),
        ("file://", "does not name a folder of this machine"),
        ("file://host/share", "does not name a folder of this machine"),
        ("file:///folder?x=1", "something after the path"),
    ],
)
def test_a_wrong_address_is_told_with_what_is_accepted(url: str, told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_store(url)
    assert told in str(caught.value)
    assert caught.value.hint
    assert "hunter2" not in f"{caught.value} {caught.value.hint}"


def test_no_address_at_all_is_no_store() -> None:
    with pytest.raises(NoStoreError) as caught:
        open_store(" ")
    assert "GODWIT_STORE" in str(caught.value.hint)


def test_an_unknown_profile_is_a_configuration_error(aws_environment: None) -> None:
    with pytest.raises(ConfigurationError, match="nobody"):
        open_store("s3://bucket?profile=nobody")


def test_boto3_is_not_imported_for_other_stores(tmp_path: Path) -> None:
    code = (
        "import sys; from replica.stores.address import open_store; from replica.stores.probe import probe_store;"
        f"probe_store(open_store({str(tmp_path / 's')!r}, create=True)); sys.exit('boto3' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
