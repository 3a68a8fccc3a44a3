"""A password in a URL: seen, hidden, and refused by the name of its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from windlass.checkpoint.durable.storage import open_storage
from windlass.cli import main
from windlass.conf.compose import compose
from windlass.errors import ConfigError
from windlass.urls import has_password, hide_passwords


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("ftp://me:hunter2@host:21/ck", "ftp://(hidden)@host:21/ck"),
        ("s3://:hunter2@bucket", "s3://(hidden)@bucket"),
        ("s3+x.y-z://me:hun@ter2@bucket/a", "s3+x.y-z://(hidden)@bucket/a"),  # the last @ ends it
        ("simplecache::ftp://me:hunter2@host/a", "simplecache::ftp://(hidden)@host/a"),
        ("from ftp://a:hunter2@b to ftp://c:hunter2@d", "from ftp://(hidden)@b to ftp://(hidden)@d"),
    ],
)
def test_passwords_are_seen_and_hidden(text: str, hidden: str) -> None:
    assert has_password(text) and hide_passwords(text) == hidden


@pytest.mark.parametrize(
    "text",
    ["abfs://container@account.dfs.core.windows.net/a", "s3://bucket/a:b@c", "ftp://host:21/a@b", "a@b:c@d", "/a:b@c"],
)
def test_what_is_none_is_left_alone(text: str) -> None:
    assert not has_password(text) and hide_passwords(text) == text


@pytest.mark.slow
@pytest.mark.parametrize("key", ["checkpoint.dir", "data.cache_dir", "run_dir"])
def test_a_configuration_has_none(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_MINE", "hunter2")
    for password in ("hunter2", "${oc.env:SECRET_OF_MINE}"):
        with pytest.raises(ConfigError, match=rf"{key}=ftp://\(hidden\)@host/ck: has a password.*FSSPEC_FTP") as caught:
            compose([f'{key}="ftp://me:{password}@host/ck"'])
        assert "hunter2" not in str(caught.value)


def test_messages_of_other_mistakes_have_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "checkpoint.dir=ftp://me:hunter2@host/ck{"]) == 2
    said = capsys.readouterr()
    assert "hunter2" not in said.out + said.err and "checkpoint.dir" in said.err


def test_commands_that_take_a_location_refuse_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.dir=ftp://\(hidden\)@host/ck: has a password"):
        open_storage("ftp://me:hunter2@host/ck")
    assert main(["ckpt", "verify", "ftp://me:hunter2@host/ck"]) == 2
    said = capsys.readouterr()
    assert "hunter2" not in said.out + said.err


def test_what_the_fix_names_is_what_fsspec_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec import config

    read: dict[str, dict[str, str]] = {}
    monkeypatch.setenv("FSSPEC_FTP_USERNAME", "me")
    monkeypatch.setenv("FSSPEC_FTP_PASSWORD", "hunter2")
    config.set_conf_env(read)
    assert read == {"ftp": {"username": "me", "password": "hunter2"}}
