"""What the S3 store makes of a server's answers, told by a server that answers as each test wants."""

from __future__ import annotations

import base64
import hashlib
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import google_crc32c
import pytest

from replica.errors import (
    ConfigurationError,
    GodwitError,
    NoStoreError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectMissingError,
    StoreError,
    StoreFullError,
    StoreRefusedError,
    StoreUnavailableError,
)
from replica.stores import s3
from replica.stores.busy import StoreBusyError
from replica.stores.memory import MemoryStore
from replica.stores.retry import ResilientStore
from replica.stores.s3 import S3Store
from replica.stores.skew import skew_of
from replica.stores.store import Store
from tests.support.servers import S3Server, free_ports

CONTENT = bytes(range(256)) * 10
ETAG = f'"{hashlib.md5(CONTENT).hexdigest()}"'


@dataclass(frozen=True, slots=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Asked:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class FakeServer:
    """Answers with what ``answers`` holds, the last one again and again, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = [Answer()]
        self.asked: list[Asked] = []
        self.date: str | None = None  # what it says the time is
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                fake.asked.append(Asked(self.command, self.path, headers, body))
                answer = fake.answers.pop(0) if len(fake.answers) > 1 else fake.answers[0]
                if answer.status == 0:
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                framing = {"Content-Length": str(len(answer.body)), "Connection": "close"}
                for name, value in {**framing, **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)

            do_GET = do_PUT = do_HEAD = do_DELETE = answer  # noqa: N815

            def date_time_string(self, timestamp: float | None = None) -> str:
                return super().date_time_string(timestamp) if fake.date is None else fake.date

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.stop()


@pytest.fixture
def fake(running: FakeServer) -> FakeServer:
    running.answers = [Answer()]
    running.date = None
    running.asked.clear()
    return running


@pytest.fixture
def store(fake: FakeServer, aws_environment: None) -> Iterator[S3Store]:
    store = S3Store("bucket", "prefix", endpoint=fake.endpoint, listing="flat")
    yield store
    store.close()


def refusal(status: int, code: str, headers: Mapping[str, str] | None = None) -> Answer:
    body = f"<Error><Code>{code}</Code><Message>told so</Message></Error>".encode()
    return Answer(status, body, {"Content-Type": "application/xml", **(headers or {})})


def listing(*names: str, token: str = "") -> Answer:
    entries = "".join(f"<Contents><Key>{name}</Key><Size>1</Size><ETag>e</ETag></Contents>" for name in names)
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    return Answer(200, f"<ListBucketResult><Name>bucket</Name>{entries}{more}</ListBucketResult>".encode())


def crc_of(content: bytes) -> str:
    return base64.b64encode(struct.pack(">I", google_crc32c.value(content))).decode()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "NoSuchKey", ObjectMissingError),
        (404, "NoSuchBucket", NoStoreError),
        (403, "AccessDenied", StoreRefusedError),
        (403, "RequestTimeTooSkewed", StoreRefusedError),
        (400, "AuthorizationHeaderMalformed", StoreRefusedError),
        (501, "NotImplemented", StoreRefusedError),
        (500, "InternalError", StoreUnavailableError),
        (502, "BadGateway", StoreUnavailableError),
        (504, "GatewayTimeout", StoreUnavailableError),
        (400, "RequestTimeout", StoreUnavailableError),
        (400, "BadDigest", StoreUnavailableError),
        (409, "ConditionalRequestConflict", StoreUnavailableError),
        (503, "SlowDown", StoreBusyError),
        (429, "TooManyRequests", StoreBusyError),
        (507, "InsufficientStorage", StoreFullError),
        (403, "QuotaExceeded", StoreFullError),
        (400, "InvalidArgument", StoreError),
    ],
)
def test_an_answer_becomes_the_error_that_says_what_to_do(
    fake: FakeServer, store: S3Store, status: int, code: str, expected: type[GodwitError]
) -> None:
    fake.answers = [refusal(status, code)]
    asks: list[Callable[[], object]] = [
        lambda: store.get("key"),
        lambda: store.get("key", start=5, length=5),
        lambda: store.create("key", b"x"),
        lambda: list(store.list("")),
    ]
    for ask in asks:
        fake.asked.clear()
        with pytest.raises(GodwitError) as caught:
            ask()
        assert type(caught.value) is expected
        assert len(fake.asked) == 1, "it was repeated below the retries"
        if expected in (StoreRefusedError, StoreFullError, NoStoreError):
            assert caught.value.hint
        if expected is not ObjectMissingError and code != "NoSuchBucket":
            assert "told so" in str(caught.value)


def test_the_wait_that_a_server_asks_for_is_passed_on(fake: FakeServer, store: S3Store) -> None:
    fake.answers = [refusal(503, "SlowDown", {"Retry-After": "7"})]
    with pytest.raises(StoreBusyError) as caught:
        store.get("key")
    assert caught.value.retry_after_seconds == 7


def test_create_and_replace_carry_their_conditions_and_checksum(fake: FakeServer, store: S3Store) -> None:
    fake.answers = [Answer(200, b"", {"ETag": ETAG, "x-amz-checksum-crc32c": crc_of(CONTENT)})]
    assert store.create("a/key", memoryview(CONTENT)) == ETAG
    assert store.replace("a/key", bytearray(CONTENT), tag='"old"') == ETAG
    create, replace = fake.asked
    assert (create.method, create.path, create.body) == ("PUT", "/bucket/prefix/a/key", CONTENT)
    assert create.headers["if-none-match"] == "*"
    assert replace.headers["if-match"] == '"old"'
    for asked in (create, replace):
        assert asked.headers["x-amz-checksum-crc32c"] == crc_of(CONTENT)
        assert "transfer-encoding" not in asked.headers
        assert "content-md5" not in asked.headers


def test_a_refused_condition_tells_exists_changed_or_missing(fake: FakeServer, store: S3Store) -> None:
    fake.answers = [refusal(412, "PreconditionFailed")]
    with pytest.raises(ObjectExistsError):
        store.create("key", b"x")
    fake.answers = [refusal(412, "PreconditionFailed"), Answer(200, b"", {"ETag": '"new"'})]
    with pytest.raises(ObjectChangedError):
        store.replace("key", b"x", tag='"old"')
    fake.answers = [refusal(412, "PreconditionFailed"), Answer(404), Answer(200)]
    with pytest.raises(ObjectMissingError):
        store.replace("key", b"x", tag='"old"')


@pytest.mark.parametrize("tag", ["", "*", '"a", "b"', " "])
def test_a_tag_that_is_none_never_reaches_the_server(fake: FakeServer, store: S3Store, tag: str) -> None:
    fake.answers = [Answer(200, b"", {"ETag": '"new"'})]
    with pytest.raises(ObjectChangedError):
        store.replace("key", b"x", tag=tag)
    assert [asked.method for asked in fake.asked] == ["HEAD"]


def test_a_server_that_ignores_the_checksum_is_given_md5_from_then_on(fake: FakeServer, store: S3Store) -> None:
    fake.answers = [Answer(200, b"", {"ETag": ETAG})]
    store.create("1", CONTENT)
    store.create("2", CONTENT)
    assert "content-md5" not in fake.asked[0].headers
    assert fake.asked[1].headers["content-md5"] == base64.b64encode(hashlib.md5(CONTENT).digest()).decode()


def test_an_upload_that_arrived_damaged_is_noticed_by_its_etag(fake: FakeServer, store: S3Store) -> None:
    fake.answers = [Answer(200, b"", {"ETag": f'"{hashlib.md5(b"damaged").hexdigest()}"'})]
    with pytest.raises(StoreError, match="holds other bytes") as caught:
        store.create("key", CONTENT)
    assert not caught.value.retryable
    assert caught.value.hint


def test_a_missing_bucket_is_told_from_a_missing_object_where_the_answer_does_not(
    fake: FakeServer, store: S3Store
) -> None:
    fake.answers = [Answer(404)]
    with pytest.raises(NoStoreError, match="there is no bucket 'bucket'"):
        store.head("key")
    fake.answers = [Answer(404), Answer(200), Answer(404)]
    for _ in range(2):
        with pytest.raises(ObjectMissingError):
            store.head("key")
    assert [asked.path for asked in fake.asked[-3:]] == ["/bucket/prefix/key", "/bucket", "/bucket/prefix/key"]


def test_a_body_that_ends_early_is_told(fake: FakeServer, store: S3Store) -> None:
    short = {"Content-Length": str(len(CONTENT)), "ETag": ETAG}
    fake.answers = [Answer(200, CONTENT[:-1], short)]
    for ask in (
        lambda: store.get("key"),
        lambda: store.get_tagged("key"),
        lambda: store.get("key", length=len(CONTENT)),
    ):
        with pytest.raises(StoreUnavailableError):
            ask()


def test_a_server_without_ranges_is_no_trouble(fake: FakeServer, store: S3Store) -> None:
    fake.answers = [Answer(200, CONTENT, {"ETag": ETAG})]
    assert store.get("key", start=10, length=20) == CONTENT[10:30]
    assert store.get("key", start=10) == CONTENT[10:]
    assert store.get("key", start=-20) == CONTENT[-20:]
    assert store.get("key", start=-20, length=5) == CONTENT[-20:-15]


def test_a_lost_connection_and_a_slow_server_are_passing(
    fake: FakeServer, store: S3Store, aws_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.answers = [Answer(0)]
    with pytest.raises(StoreUnavailableError):
        store.get("key")
    with pytest.raises(StoreUnavailableError) as caught:
        S3Store("bucket", endpoint=f"http://127.0.0.1:{free_ports(1)[0]}").get("key")
    assert caught.value.hint
    monkeypatch.setattr(s3, "READ_LIMIT_SECONDS", 0.05)
    fake.answers = [Answer(200, b"", {"Content-Length": "100"})]
    released = threading.Event()
    monkeypatch.setattr(fake.http, "process_request", lambda *_: released.wait(2))
    with pytest.raises(StoreUnavailableError):
        S3Store("bucket", endpoint=fake.endpoint).get("key")
    released.set()


def test_an_answer_that_is_not_s3_is_an_error_of_the_store(fake: FakeServer, store: S3Store) -> None:
    for answer in (Answer(200, b"<html>Log in to the Wi-Fi</html>"), Answer(200, b"not xml at all")):
        fake.answers = [answer]
        with pytest.raises(StoreError):
            list(store.list(""))
    fake.answers = [Answer(200, b"<html>Log in to the Wi-Fi</html>")]
    with pytest.raises(StoreError):
        store.create("key", b"x")
    with pytest.raises(StoreError):
        store.get_tagged("key")
    with pytest.raises(StoreError):
        store.head("key")


def test_missing_credentials_are_a_configuration_error(
    fake: FakeServer, aws_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigurationError) as caught:
        S3Store("bucket", endpoint=fake.endpoint).get("key")
    assert "AWS_ACCESS_KEY_ID" in str(caught.value.hint)
    assert fake.asked == []


def test_a_listing_out_of_order_is_refused_with_the_way_out(fake: FakeServer, store: S3Store) -> None:
    fake.answers = [listing("prefix/a/b", "prefix/a-b")]
    with pytest.raises(StoreRefusedError) as caught:
        list(store.list(""))
    assert "listing=folders" in str(caught.value.hint)


def test_a_listing_goes_through_all_pages(fake: FakeServer, store: S3Store) -> None:
    fake.answers = [listing("prefix/a", "prefix/b", token="t1"), listing(token="t2"), listing("prefix/c")]
    assert [info.key for info in store.list("", start_after="0")] == ["a", "b", "c"]
    assert "start-after=prefix%2F0" in fake.asked[0].path
    assert ["continuation-token=" in asked.path for asked in fake.asked] == [False, True, True]


@pytest.mark.server
@pytest.mark.xdist_group("seaweedfs")
@pytest.mark.parametrize("page_size", [1, 2, 1000])
def test_pages_and_folders_of_a_real_server_add_up(seaweedfs: S3Server, page_size: int) -> None:
    store: Store = S3Store(
        seaweedfs.bucket, f"pages/{secrets.token_hex(4)}", endpoint=seaweedfs.endpoint, page_size=page_size
    )
    there = sorted(["a-b", "a/1", "a/2", "a/3", "a/x/1", "a/x-1", "b", "c/1", "c0"])
    for key in there:
        store.create(key, b"x")
    for after in ("", "a-b", "a/2", "a/x/1", "b"):
        assert [info.key for info in store.list("", start_after=after)] == [key for key in there if key > after]


@pytest.mark.parametrize("ahead_seconds", [-300, 0, 45])
def test_how_far_the_clocks_differ_is_known_from_the_first_answer(
    fake: FakeServer, store: S3Store, ahead_seconds: int
) -> None:
    assert skew_of(store) is None
    fake.date = formatdate(time.time() - ahead_seconds, usegmt=True)
    fake.answers = [Answer(200, CONTENT, {"ETag": ETAG})]
    ResilientStore(store).get("key")
    skew = skew_of(ResilientStore(store))
    assert skew is not None and ahead_seconds - 2 < skew < ahead_seconds + 30, "a slow machine looks late"


@pytest.mark.parametrize("date", ["", "yesterday", "Wed, 99 Xxx 2026 00:00:00 GMT", "Thu, 01 Jan 1970 00:00:00"])
def test_a_time_that_is_none_leaves_the_clocks_unknown(fake: FakeServer, store: S3Store, date: str) -> None:
    fake.date = date
    fake.answers = [Answer(200, CONTENT, {"ETag": ETAG})]
    assert store.get("key") == CONTENT
    assert skew_of(store) is None


def test_stores_that_tell_no_time_have_no_skew() -> None:
    assert skew_of(MemoryStore("no time")) is None
