"""What a user is told whose Ray, cluster or runtime environment is not there; and that nobody else needs Ray."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from support.ranks import free_port

from windlass.errors import EXIT_USER_ERROR, ConfigError
from windlass.launch.ray_cluster import read_runtime_env


def train(*overrides: str, before: str = "pass", **environment: str) -> tuple[int, str]:
    """Exit code and output of `windlass train launch=ray`, in an interpreter that has done `before`."""
    code = f"import sys; {before}; from windlass.cli import main; sys.exit(main())"
    variables = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    result = subprocess.run(
        [sys.executable, "-c", code, "train", "launch=ray", *overrides],
        env=variables | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return result.returncode, result.stdout + result.stderr


def assert_told(told: tuple[int, str], *words: str) -> None:
    code, output = told
    assert code == EXIT_USER_ERROR, output
    assert "Traceback" not in output
    (message,) = [line for line in output.splitlines() if line.startswith("windlass: error: ")]
    assert all(word in message for word in (*words, "Fix: ")), message


@pytest.mark.slow
def test_ray_is_not_installed() -> None:
    assert_told(train(before="sys.modules['ray'] = None"), "launch=ray", "not installed", "pip install 'windlass[ray]'")


@pytest.mark.slow
def test_nobody_answers_at_the_address() -> None:
    address = f"127.0.0.1:{free_port()}"
    told = train(f"launch.address='{address}'")
    assert_told(told, f"launch.address={address}", "cannot be reached: Connection refused", "ray start --head")


@pytest.mark.slow
def test_the_name_of_the_host_is_unknown() -> None:
    assert_told(train("launch.address='no-such-host.invalid:6379'"), "launch.address=no-such-host.invalid:6379")


@pytest.mark.slow
def test_the_address_is_one_of_ray_clients() -> None:
    assert_told(train(RAY_ADDRESS="ray://127.0.0.1:10001"), "launch.address=ray://127.0.0.1:10001", "on a node of")


@pytest.mark.full
@pytest.mark.slow
def test_something_else_listens_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert_told(train(f"launch.address='{address}'"), f"launch.address={address}", "does not answer within 5 s")


@pytest.mark.slow
def test_a_server_of_something_else_answers_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def answer() -> None:
            client, _ = server.accept()
            with client:
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                client.recv(4096)

        thread = threading.Thread(target=answer)
        thread.start()
        assert_told(train(f"launch.address='{address}'"), f"launch.address={address}", "is no Ray cluster")
        thread.join()


@pytest.mark.slow
@pytest.mark.skipif(
    any(process.name() == "gcs_server" for process in psutil.process_iter()),
    reason="a Ray cluster runs on this machine",
)
def test_no_cluster_runs_here() -> None:
    assert_told(train(), "launch.address=auto", "no Ray cluster runs on this machine", "launch.address=local")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("- a\n- b\n", "it holds no keys"),
        ("pip: [a\n", "expected"),
        ("env_vars: {A: 1}\n", "env_vars"),
        ("env_var: {A: b}\n", "env_var is no key of it"),
        ("conda: a\npip: [b]\n", "pip"),
    ],
)
def test_the_runtime_environment_is_missing_or_malformed(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "env.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_runtime_env(str(path))
    assert raised.value.key == "launch.runtime_env" and words in str(raised.value)


def test_the_runtime_environment_is_passed_on_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "env.yaml"
    path.write_text("env_vars: {A: b}\n")
    assert read_runtime_env(str(path))["env_vars"] == {"A": "b"}
    assert read_runtime_env(None) == {}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["train", "--help"], ["train", "launch=ray", "--cfg", "job"]])
def test_ray_is_imported_by_who_asks_for_it_alone(arguments: list[str]) -> None:
    code = (
        "import sys; from windlass.cli import main\n"
        "try:\n    code = main()\nexcept SystemExit as end:\n    code = end.code\n"
        "assert not code, code; assert 'ray' not in sys.modules and 'windlass.launch.ray' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
