"""Where the secret of a job's nodes comes from, and what keeps it one."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from windlass.errors import ConfigError
from windlass.launch.config import LaunchConfig, LaunchKind
from windlass.launch.secret import SECRET, job_secret


def launch(file: Path | None = None, address: str = "node0:29400") -> LaunchConfig:
    return LaunchConfig(LaunchKind.torchrun, nnodes="2", address=address, secret_file=file and str(file))


def test_a_job_that_is_alone_has_another_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "x" * 32)
    alone = LaunchConfig(LaunchKind.torchrun)
    assert job_secret(alone) != job_secret(alone) and len(job_secret(alone)) == 32


def test_the_environment_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, " from the environment\n")
    assert job_secret(launch(tmp_path / "secret")) == b"from the environment"
    assert not (tmp_path / "secret").exists()


def test_a_file_is_made_once_for_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET, raising=False)
    file = tmp_path / "new" / "secret"
    previous = os.umask(0)
    try:
        with ThreadPoolExecutor(8) as nodes:
            found = set(nodes.map(lambda _: job_secret(launch(file)), range(8)))
    finally:
        os.umask(previous)
    assert len(found) == 1 and len(found.pop()) == 64
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_usual_file_is_in_the_users_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    secret = job_secret(launch())
    assert (tmp_path / "home" / ".config" / "windlass" / "secret").read_bytes().strip() == secret
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "configuration"))
    assert job_secret(launch()) != secret
    assert (tmp_path / "configuration" / "windlass" / "secret").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_file_that_others_can_use_is_refused(mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET, raising=False)
    file = tmp_path / "secret"
    job_secret(launch(file))
    file.chmod(mode)
    with pytest.raises(ConfigError, match=rf"launch\.secret_file={file}: can be read or changed .*chmod 600 {file}"):
        job_secret(launch(file))


def test_what_cannot_be_one_is_said_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("windlass.launch.secret.WRITE_S", 0.0)
    monkeypatch.setenv(SECRET, "hunter2")
    with pytest.raises(ConfigError, match=r"WINDLASS_SECRET=\(hidden\): the job's secret has 7 bytes") as caught:
        job_secret(launch())
    assert "hunter2" not in str(caught.value)
    monkeypatch.delenv(SECRET)
    file = tmp_path / "secret"
    file.touch(0o600)
    with pytest.raises(ConfigError, match="the job's secret has 0 bytes"):
        job_secret(launch(file))
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="cannot be read: it is no regular file"):
        job_secret(launch(tmp_path / "pipe"))
    with pytest.raises(ConfigError, match=r"cannot be (made|read): Not a directory"):
        job_secret(launch(file / "below"))
