"""Output that cannot be written ends nothing, and is not lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = "import os, sys\nfrom pathlib import Path\nfrom windlass.streams import goes_on_in, make_lasting, why_lost\n"


def run(
    body: str, *arguments: Path | str, stdout: int = subprocess.PIPE, redirection: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BEGIN + body, *map(str, arguments)]
    return subprocess.run(
        ["bash", "-c", f'exec "$@" {redirection}', "bash", *command],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


WRITES = """
make_lasting()
print("before")
with goes_on_in(Path(sys.argv[1])):
    for number in range(3):
        print("line", number, flush=True)
    os.write(1, b"from C\\n")
    os.system("echo from a child")
    print("lost", why_lost(sys.stdout), file=sys.stderr)
"""


def test_output_goes_on_in_the_log_when_its_reader_leaves(tmp_path: Path) -> None:
    log = tmp_path / "log"
    reader, writer = os.pipe()
    os.close(reader)
    result = run(WRITES, log, stdout=writer)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "lost Broken pipe\n")
    said, *lines = log.read_text().splitlines()
    assert said == "stdout failed (Broken pipe) and goes on here"
    assert lines == ["before", "line 0", "line 1", "line 2", "from C", "from a child"]


def test_what_failed_before_there_was_a_log_goes_on_there_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    body = 'make_lasting()\nprint("nowhere", flush=True)\n' + WRITES.partition("\n\n")[0].replace(
        "make_lasting()\n", ""
    )
    result = run(body, log, redirection="> /dev/full")
    assert (result.returncode, result.stderr) == (0, "lost No space left on device\n")
    assert log.read_text().startswith("stdout failed (No space left on device) and goes on here\nbefore\nline 0\n")


def test_a_log_that_cannot_be_written_either_ends_nothing(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.touch()
    (tmp_path / "link").symlink_to(elsewhere)
    for log in ("/dev/full", tmp_path / "no folder" / "log", tmp_path / "link"):
        result = run(WRITES, log, redirection="> /dev/full")
        assert (result.returncode, result.stderr) == (0, "lost No space left on device\n")
    assert elsewhere.read_text() == ""


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_closed_descriptors_become_the_null_device_and_no_file(redirection: str, tmp_path: Path) -> None:
    body = """
make_lasting()
with Path(sys.argv[1]).open("w") as file:
    assert file.fileno() > 2
    print("out", flush=True)
    print("error", file=sys.stderr)
    sys.stdin.read()
    file.write("mine")
"""
    result = run(body, tmp_path / "file", redirection=redirection)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_characters_that_an_encoding_lacks_are_escaped() -> None:
    body = 'make_lasting()\nprint("rün", "実験", "\\udcff")\nprint("ü", file=sys.stderr)'
    result = run(body, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout) == (0, "r\\xfcn \\u5b9f\\u9a13 \\udcff\n"), result.stderr
    assert result.stderr == "\\xfc\n"


def test_a_pipe_that_is_not_read_yet_is_waited_for() -> None:
    """A terminal that another program has made non-blocking gives EAGAIN."""
    body = """
import threading, time
reader, writer = os.pipe()
os.set_blocking(writer, False)
os.dup2(writer, 1)
make_lasting()
def read():
    time.sleep(0.1)
    size = 0
    while size < 300_000:
        size += len(os.read(reader, 1 << 16))
thread = threading.Thread(target=read)
thread.start()
sys.stdout.write("x" * 300_000)
sys.stdout.flush()
thread.join()
print(why_lost(sys.stdout), file=sys.stderr)
"""
    result = run(body)
    assert (result.returncode, result.stderr) == (0, "None\n")


def test_streams_that_a_test_has_set_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    from windlass.streams import make_lasting

    before = sys.stdout, sys.stderr
    make_lasting()
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize(("redirection", "code"), [("> /dev/full", 1), ("", 0)])
def test_a_command_whose_output_is_lost_has_failed(redirection: str, code: int, tmp_path: Path) -> None:
    """Of all but training, what it prints is all that it does."""
    body = "from windlass.cli import main\nsys.exit(main(['ckpt', 'agents', '--shm-dir', sys.argv[1]]))"
    result = run(body, tmp_path, redirection=redirection)
    assert result.returncode == code
    assert ("could not be written: No space left on device" in result.stderr) == bool(code)
    assert "Traceback" not in result.stderr
