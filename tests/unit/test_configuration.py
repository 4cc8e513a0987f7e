"""The configuration: flags over environment over file, the file looked for in order, every mistake named at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica import configuration
from replica.configuration import load
from replica.errors import ConfigurationError
from replica.host import this_host
from replica.platforms.registry import open_platform


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    made = {name: tmp_path / name for name in ("work", "home", "xdg")}
    for folder in made.values():
        folder.mkdir()
    return made


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_without_anything_there_are_defaults_and_no_store(folders: dict[str, Path]) -> None:
    found = load(environment={"HOME": str(folders["home"])}, folder=folders["work"])
    assert (found.store, found.tenant, found.state_folder, found.file) == (None, "default", None, None)
    assert 2 <= found.workers.threads <= 8
    assert found.workers.uploads == 3


def test_a_whole_file_is_taken(folders: dict[str, Path]) -> None:
    path = write(
        folders["work"] / "godwit.toml",
        'store = "file:///srv/store"\ntenant = "acme"\nthreads = 5\nuploads = 7\nstate_folder = "/var/lib/x"\n',
    )
    found = load(environment={}, folder=folders["work"])
    assert (found.store, found.tenant, found.file) == ("file:///srv/store", "acme", path)
    assert (found.workers.threads, found.workers.uploads) == (5, 7)
    assert found.state_folder == Path("/var/lib/x")


def test_flags_override_environment_overrides_file(folders: dict[str, Path]) -> None:
    write(folders["work"] / "godwit.toml", 'store = "file"\ntenant = "file"\n')
    environment = {"GODWIT_STORE": "environment", "GODWIT_TENANT": "environment"}
    by_file = load(environment={}, folder=folders["work"])
    by_environment = load(environment=environment, folder=folders["work"])
    by_flag = load(environment=environment, folder=folders["work"], store="flag", tenant="flag")
    assert [(one.store, one.tenant) for one in (by_file, by_environment, by_flag)] == [
        ("file", "file"),
        ("environment", "environment"),
        ("flag", "flag"),
    ]


def test_the_file_is_looked_for_in_order(folders: dict[str, Path]) -> None:
    environment = {"HOME": str(folders["home"])}
    in_home = write(folders["home"] / ".config" / "godwit" / "godwit.toml", "threads = 1")
    assert load(environment=environment, folder=folders["work"]).file == in_home
    in_xdg = write(folders["xdg"] / "godwit" / "godwit.toml", "threads = 2")
    environment["XDG_CONFIG_HOME"] = str(folders["xdg"])
    assert load(environment=environment, folder=folders["work"]).file == in_xdg
    in_work = write(folders["work"] / "godwit.toml", "threads = 3")
    assert load(environment=environment, folder=folders["work"]).file == in_work
    named = write(folders["home"] / "named.toml", "threads = 4")
    environment["GODWIT_CONFIG"] = str(named)
    assert load(environment=environment, folder=folders["work"]).file == named
    by_flag = write(folders["home"] / "flag.toml", "threads = 5")
    assert load(environment=environment, folder=folders["work"], file=by_flag).workers.threads == 5


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_a_file_that_is_named_must_be_there(folders: dict[str, Path], way: str) -> None:
    missing = folders["work"] / "missing.toml"
    for path in (missing, folders["work"]):
        with pytest.raises(ConfigurationError) as caught:
            if way == "flag":
                load(environment={}, file=path, folder=folders["work"])
            else:
                load(environment={"GODWIT_CONFIG": str(path)}, folder=folders["work"])
        assert caught.value.path == str(path)
        assert caught.value.exit_code == 13


def test_every_mistake_is_named_at_once(folders: dict[str, Path]) -> None:
    path = write(
        folders["work"] / "godwit.toml",
        'store = 5\ntenant = "A B"\nthreads = 0\nuploads = "many"\nstate_folder = "~no-such-user/x"\n'
        "stroe = 1\n[retention]\ndays = 1\n",
    )
    with pytest.raises(ConfigurationError) as caught:
        load(environment={}, folder=folders["work"])
    message = str(caught.value)
    for name in ("store", "tenant", "threads", "uploads", "state_folder", "'stroe'", "'retention'"):
        assert name in message
    assert caught.value.path == str(path)
    assert "\n" not in message


def test_a_path_with_a_zero_byte_is_a_mistake(folders: dict[str, Path]) -> None:
    write(folders["work"] / "godwit.toml", 'state_folder = "a\\u0000b"\n')
    with pytest.raises(ConfigurationError, match="state_folder"):
        load(environment={}, folder=folders["work"])


@pytest.mark.parametrize("value", ["true", "1.0", "65", "-1", '"4"', "[4]", "99999999999999999999"])
def test_a_count_is_a_whole_number_from_1_to_64(folders: dict[str, Path], value: str) -> None:
    write(folders["work"] / "godwit.toml", f"threads = {value}")
    with pytest.raises(ConfigurationError, match="threads: should be a whole number from 1 to 64"):
        load(environment={}, folder=folders["work"])


@pytest.mark.parametrize(
    "content", [b"store = ", b"\xff\xfe\x00", b"a = 1\na = 2", b"=" * 1000, b"[[[[" * 5000, b"a = " + b"[" * 50000]
)
def test_what_is_no_toml_is_refused_by_name(folders: dict[str, Path], content: bytes) -> None:
    path = folders["work"] / "godwit.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="TOML") as caught:
        load(environment={}, folder=folders["work"])
    assert caught.value.path == str(path)


def test_an_empty_variable_counts_as_unset(folders: dict[str, Path]) -> None:
    write(folders["work"] / "godwit.toml", 'store = "file"\n')
    environment = {"GODWIT_STORE": "", "GODWIT_TENANT": "", "GODWIT_CONFIG": ""}
    assert load(environment=environment, folder=folders["work"]).store == "file"


def test_the_home_folder_is_understood(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folders["home"]))
    write(folders["work"] / "godwit.toml", 'state_folder = "~/state"\n')
    assert load(environment={}, folder=folders["work"]).state_folder == folders["home"] / "state"


def test_a_working_folder_that_is_gone_is_no_traceback(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders["work"])
    folders["work"].rmdir()
    assert load(environment={"HOME": str(folders["home"])}).file is None


def test_the_settings_that_are_offered_are_those_that_are_known() -> None:
    assert configuration.SETTINGS == (
        "store",
        "tenant",
        "threads",
        "uploads",
        "state_folder",
        "key_file",
        "key_command",
        "require_encryption",
        "convertibility",
        "agent",
        "drill",
        "platforms",
    )


@pytest.mark.parametrize(
    "written, expected",
    [('"pass show godwit"', "pass show godwit"), ('["pass", "show", "my vm"]', ("pass", "show", "my vm"))],
)
def test_a_key_command_is_text_or_words(folders: dict[str, Path], written: str, expected: object) -> None:
    write(folders["work"] / "godwit.toml", f'key_command = {written}\nkey_file = "k"\nrequire_encryption = true\n')
    found = load(environment={}, folder=folders["work"])
    assert (found.key_command, found.key_file, found.require_encryption) == (expected, Path("k"), True)


@pytest.mark.parametrize("written", ["key_command = []", "key_command = [1]", "require_encryption = 1", "key_file = 3"])
def test_settings_of_encryption_that_make_no_sense_are_refused(folders: dict[str, Path], written: str) -> None:
    write(folders["work"] / "godwit.toml", written)
    with pytest.raises(ConfigurationError, match=written.split(" ", maxsplit=1)[0]):
        load(environment={}, folder=folders["work"])


def test_platforms_have_a_table_each(folders: dict[str, Path]) -> None:
    write(folders["work"] / "godwit.toml", '[platforms.libvirt]\nconnect = "qemu:///system"\n[platforms.qemu]\n')
    found = load(environment={}, folder=folders["work"])
    assert found.platforms == {"libvirt": {"connect": "qemu:///system"}, "qemu": {}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("platforms = 3\n", "a table for each platform"),
        ("[platforms]\nqemu = 1\n", "a table for each platform"),
        ("[platforms.vmware]\n", "no platform 'vmware'"),
    ],
)
def test_platforms_that_are_none_are_named(folders: dict[str, Path], text: str, said: str) -> None:
    write(folders["work"] / "godwit.toml", text)
    with pytest.raises(ConfigurationError, match=said):
        load(environment={}, folder=folders["work"])


def test_a_platform_without_settings_takes_none(tmp_path: Path) -> None:
    host = this_host(tmp_path)
    assert open_platform("files", host, tables={"qemu": {"a": 1}}).name == "files"
    with pytest.raises(ConfigurationError, match=r"platforms\.files: 'colour' is not a setting"):
        open_platform("files", host, tables={"files": {"colour": "red"}})
