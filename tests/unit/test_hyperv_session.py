"""How a Hyper-V host is asked, and its answers read: scripts, JSON, PowerShell here and far away, no secrets told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from replica.errors import GodwitError
from replica.hyperv import connect, local, remote, scripts
from replica.hyperv.local import LocalSession
from replica.hyperv.remote import RemoteSession
from replica.hyperv.session import Answer, HypervDeniedError, HypervError, HypervMissingError, SessionError, ask, decode

SECRET = "correct horse"
HOST = "https://hv1.example:5986"


class Canned:
    """A session that prints what it is told to."""

    def __init__(self, printed: str) -> None:
        self.printed = printed
        self.given: dict[str, str] = {}

    def run(self, script: str, parameters: Any, *, timeout_seconds: float) -> str:
        self.given = dict(parameters)
        return self.printed

    def close(self) -> None: ...


# -- scripts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [*scripts.ALL, None], ids=lambda one: one.name if one else "bootstrap")
def test_scripts_are_powershell(script: scripts.Script | None) -> None:
    tree_sitter = pytest.importorskip("tree_sitter")
    grammar = pytest.importorskip("tree_sitter_powershell")
    parser = tree_sitter.Parser(tree_sitter.Language(grammar.language()))
    text = (script.text if script else local.BOOTSTRAP).encode()
    wrong, nodes = [], [parser.parse(text).root_node]
    while nodes:
        node = nodes.pop()
        if node.type == "ERROR" or node.is_missing:
            wrong.append((node.start_point, text[node.start_byte : node.end_byte][:80]))
        nodes += node.children
    assert wrong == []


@pytest.mark.parametrize("script", scripts.ALL, ids=lambda one: one.name)
def test_scripts_run_nothing_that_they_are_given(script: scripts.Script) -> None:
    forbidden = r"Invoke-Expression|\biex\b|scriptblock\]::Create|-Filter|-Query|Add-Type|Start-Process|Invoke-Command"
    assert not re.search(forbidden, script.text, re.IGNORECASE)
    body = script.text.partition("try {\n")[2]
    for name in script.parameters:
        assert f"${name}" in body, "declared and not used"
        assert not re.search(rf'"[^"\n]*\${name}\b', body), "put into a text"


def test_only_documented_methods_are_called() -> None:
    called = {name for one in scripts.ALL for name in re.findall(r"-MethodName (\w+)", one.text)}
    assert called == {
        "CreateSnapshot",
        "ConvertToReferencePoint",
        "DestroySnapshot",
        "DestroyReferencePoint",
        "GetVirtualDiskChanges",
    }
    assert len({one.name for one in scripts.ALL}) == len(scripts.ALL)


def test_a_parameter_that_is_forgotten_is_a_mistake_of_ours() -> None:
    with pytest.raises(TypeError, match="takes"):
        ask(Canned("{}"), scripts.DESCRIBE)


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "printed",
    [
        "",
        "Get-VM : Der Benutzer hat keine Berechtigung.\r\n",
        "[]",
        "null",
        '"x"',
        '{"godwit":2}',
        '{"fault":null}',
        "{" * 100_000,
        "[" * 100_000,
        '{"godwit":1',
        '{"godwit":1}{"godwit":1}',
        '{"godwit":1,"machines":"System.Object[]"}',
        '{"godwit":1,"machines":["@{id=1; name=x}"]}',
        '{"godwit":1,"machines":[[]]}',
        '{"godwit":1,"machines":[null]}',
    ],
)
def test_what_is_no_answer_is_an_error(printed: str) -> None:
    with pytest.raises(HypervError):
        ask(Canned(printed), scripts.DESCRIBE, Name="x").objects("machines")


def test_fields_are_of_the_type_that_they_should_be() -> None:
    answer = Answer({"a": "x", "b": 7, "c": True, "d": None, "e": 1.5, "f": {"value": "text", "PSPath": "y"}}, "test")
    assert (answer.text("a"), answer.integer("b"), answer.flag("c"), answer.text("d")) == ("x", 7, True, "")
    assert answer.text("f") == "text"
    assert answer.texts("a") == ("x",)
    assert answer.texts("d") == answer.texts("missing") == ()
    for read, name in (
        ("integer", "c"),
        ("integer", "e"),
        ("integer", "d"),
        ("text", "b"),
        ("flag", "a"),
        ("texts", "b"),
    ):
        with pytest.raises(HypervError, match=f"as {name}"):
            getattr(answer, read)(name)


@pytest.mark.parametrize(("kind", "error"), [("Denied", HypervDeniedError), ("NotFound", HypervMissingError)])
def test_failures_are_told_by_kind_and_number_not_by_words(kind: str, error: type[HypervError]) -> None:
    words = "アクセスが拒否されました\r\n   " + "x" * 5000
    fault = {"godwit": 1, "fault": {"kind": kind, "code": -2147024891, "message": words}}
    with pytest.raises(error, match="0x80070005") as raised:
        ask(Canned(json.dumps(fault)), scripts.DESCRIBE, Name="x")
    assert "アクセスが拒否されました" in str(raised.value)
    assert len(str(raised.value)) < 1200


def test_an_answer_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replica.hyperv.session.MOST_ANSWER_CHARACTERS", 100)
    with pytest.raises(HypervError, match="too long"):
        decode('{"godwit":1,"x":"' + "y" * 100 + '"}', "test")


# -- PowerShell on this machine ---------------------------------------------------------------------------------------

STAND_IN = """#!{python}
import base64, json, sys
request = json.load(sys.stdin)
arguments = sys.argv[1:]
assert arguments[:4] == ["-NoLogo", "-NoProfile", "-NonInteractive", "-EncodedCommand"], arguments
assert "Create([string]$Request.script)" in base64.b64decode(arguments[4]).decode("utf-16-le")
answer = json.dumps({{"godwit": 1, "script": len(request["script"]), **request["parameters"]}}, ensure_ascii=False)
printed = base64.b64encode(("\\ufeff" + answer + "\\r\\n").encode()).decode()
print("\\n".join(printed[at:at + 79] for at in range(0, len(printed), 79)))
"""


def stand_in(folder: Path, text: str = STAND_IN) -> str:
    path = folder / "powershell"
    path.write_text(text.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def test_a_local_script_gets_its_parameters_whole(tmp_path: Path) -> None:
    session = LocalSession(stand_in(tmp_path))
    name = 'it\'s "$x" `n ü \U0001f600\n'
    answer = ask(session, scripts.DESCRIBE, Name=name)
    assert answer.text("Name") == name
    assert answer.integer("script") == len(scripts.DESCRIBE.text)
    session.close()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("#!{python}\nimport sys\nsys.exit('Zugriff verweigert')\n", "Zugriff verweigert"),
        ("#!{python}\nprint('no Base64!')\n", "no reason"),
        ("#!{python}\n", "no reason"),
    ],
)
def test_a_powershell_that_fails_says_so(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(SessionError, match=told):
        ask(LocalSession(stand_in(tmp_path, text)), scripts.DESCRIBE, Name="x")


def test_a_powershell_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object, timeout: float, **rest: object) -> None:
        raise subprocess.TimeoutExpired("powershell.exe", timeout)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SessionError, match="within 180 s") as raised:
        ask(LocalSession(stand_in(tmp_path)), scripts.DESCRIBE, Name="x")
    assert raised.value.retryable


def test_this_machine_is_no_hyperv_host() -> None:
    with pytest.raises(SessionError, match="no Hyper-V host") as raised:
        connect.connect(None)
    assert "--host" in (raised.value.hint or "")


# -- PowerShell remoting ----------------------------------------------------------------------------------------------


class FakeRemoting:
    """Stands for pypsrp: what a session makes of it is noted down, and what it does is told beforehand."""

    def __init__(self) -> None:
        self.connections: list[dict[str, Any]] = []
        self.pools: list[FakeRemoting.Pool] = []
        self.pipelines: list[FakeRemoting.Pipeline] = []
        self.output: list[Any] = ['{"godwit":1,"machines":[]}']
        self.state_after, self.polls = 4, 2
        self.error: Exception | None = None
        outer = self

        class WSMan:
            def __init__(self, server: str, **settings: Any) -> None:
                outer.connections.append({"server": server, **settings})

            def close(self) -> None: ...

        class RunspacePool(FakeRemoting.Pool):
            def __init__(self, connection: Any, **settings: Any) -> None:
                super().__init__()
                outer.pools.append(self)

        class PowerShell(FakeRemoting.Pipeline):
            def __init__(self, pool: Any) -> None:
                super().__init__(outer, pool)
                outer.pipelines.append(self)

        self.wsman = types.SimpleNamespace(WSMan=WSMan)
        self.powershell = types.SimpleNamespace(RunspacePool=RunspacePool, PowerShell=PowerShell)

    class Pool:
        def __init__(self) -> None:
            self.opened = self.closed = False

        def open(self) -> None:
            self.opened = True

        def close(self) -> None:
            self.closed = True

    class Pipeline:
        def __init__(self, outer: FakeRemoting, pool: Any) -> None:
            self._outer, self.state = outer, 0
            self.script, self.parameters, self.output = "", {}, list(outer.output)
            self.streams = types.SimpleNamespace(error=[f"boom {SECRET}"])
            self._polls = outer.polls

        def add_script(self, script: str) -> None:
            self.script = script

        def add_parameters(self, parameters: dict[str, str]) -> None:
            self.parameters = parameters

        def begin_invoke(self) -> None:
            if self._outer.error is not None:
                raise self._outer.error
            self.state = 1

        def poll_invoke(self, timeout: int) -> None:
            self._polls -= 1
            if self._polls <= 0:
                self.state = self._outer.state_after


@pytest.fixture
def remoting(monkeypatch: pytest.MonkeyPatch) -> FakeRemoting:
    fake = FakeRemoting()
    modules = {"pypsrp.wsman": fake.wsman, "pypsrp.powershell": fake.powershell}
    monkeypatch.setattr(remote.importlib, "import_module", modules.__getitem__)
    monkeypatch.setenv(remote.USER, "LAB\\agent")
    monkeypatch.setenv(remote.PASSWORD, SECRET)
    return fake


def test_one_runspace_serves_all_questions(remoting: FakeRemoting) -> None:
    session = connect.connect(HOST)
    for name in ("a", "b"):
        assert ask(session, scripts.DESCRIBE, Name=name).objects("machines") == ()
    assert [one.parameters for one in remoting.pipelines] == [{"Name": "a"}, {"Name": "b"}]
    assert all(one.script == scripts.DESCRIBE.text for one in remoting.pipelines)
    session.close()
    session.close()
    assert [(one.opened, one.closed) for one in remoting.pools] == [(True, True)]
    made = remoting.connections[0]
    assert (made["server"], made["port"], made["ssl"], made["cert_validation"]) == ("hv1.example", 5986, True, True)
    assert (made["username"], made["password"]) == ("LAB\\agent", SECRET)


def test_http_is_encrypted_or_nothing(remoting: FakeRemoting) -> None:
    ask(RemoteSession("http://hv1:5985"), scripts.DESCRIBE, Name="x")
    made = remoting.connections[0]
    assert (made["ssl"], made["encryption"], made["auth"]) == (False, "always", "negotiate")


@pytest.mark.parametrize("what", ["raises", "fails", "hangs"])
def test_no_error_holds_the_password(
    remoting: FakeRemoting, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if what == "raises":
        remoting.error = ConnectionError(f"https://LAB:{SECRET}@hv1 {'x' * 980} {SECRET}")
    elif what == "fails":
        remoting.state_after = 5
    else:
        clock = iter(range(0, 10**9, 1000))
        monkeypatch.setattr(remote.time, "monotonic", lambda: next(clock))
        remoting.polls = 1 << 40
    with pytest.raises(SessionError) as raised:
        ask(RemoteSession(HOST), scripts.DESCRIBE, Name="x")
    error: BaseException | None = raised.value
    while error is not None:  # and what would be shown of its causes
        assert SECRET not in f"{error} {getattr(error, 'hint', '')} {error.args!r}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert SECRET not in caplog.text
    assert "hv1.example" in str(raised.value)
    assert isinstance(raised.value, GodwitError)


def test_a_session_that_broke_is_opened_anew(remoting: FakeRemoting) -> None:
    session = RemoteSession(HOST)
    remoting.error = OSError("reset")
    with pytest.raises(SessionError, match="reset"):
        ask(session, scripts.DESCRIBE, Name="x")
    remoting.error = None
    ask(session, scripts.DESCRIBE, Name="x")
    assert [one.closed for one in remoting.pools] == [True, False]


def test_without_pypsrp_the_hint_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(remote.importlib, "import_module", missing)
    with pytest.raises(SessionError) as raised:
        RemoteSession(HOST)
    assert "godwit-dr[hyperv]" in (raised.value.hint or "")


def test_pypsrp_has_what_is_used_of_it() -> None:
    wsman = pytest.importorskip("pypsrp.wsman")
    powershell = pytest.importorskip("pypsrp.powershell")
    states = pytest.importorskip("pypsrp.complex_objects").PSInvocationState
    assert (states.RUNNING, states.COMPLETED) == (remote.RUNNING, remote.COMPLETED)
    session = RemoteSession("http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(SessionError, match="cannot be asked"):
        ask(session, scripts.DESCRIBE, Name="x")
    connection = wsman.WSMan("127.0.0.1", port=9, ssl=False, auth="negotiate", username="u", password="p")
    pool = powershell.RunspacePool(connection, no_profile=True)
    pool.protocol_version = "2.3"  # which opening it tells
    pipeline = powershell.PowerShell(pool)
    pipeline.add_script("param($a)")
    pipeline.add_parameters({"a": "1"})
    for name in ("begin_invoke", "poll_invoke", "close"):
        assert callable(getattr(pipeline, name))
    assert pipeline.streams.error == []
    assert pipeline.output == []
