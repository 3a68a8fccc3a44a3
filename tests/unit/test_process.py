"""How processes begin, and end: with their code, whatever threads of torch are left."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ENDS = """
import atexit, os, sys, tempfile, threading, time
from datetime import timedelta
import torch
from torch.distributed import FileStore, ProcessGroupGloo
from windlass import process

for HOW in sys.argv[1:]:
    child = os.fork()
    if not child:
        break
    print(HOW, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)

groups = [None, None]

def member(rank, path):
    groups[rank] = ProcessGroupGloo(FileStore(path, 2), rank, 2, timedelta(seconds=60))

with tempfile.TemporaryDirectory() as folder:
    members = [threading.Thread(target=member, args=(rank, f"{folder}/store")) for rank in (0, 1)]
    [thread.start() for thread in members]
    [thread.join() for thread in members]
mine, theirs = torch.ones(1), torch.ones(1)
groups[0].allreduce([mine])  # waits for the other, as that of a rank that fails

def let_it_go():
    # The thread of gloo that gives `mine` back waits for the interpreter, which nobody lends it until the end.
    print("atexit", flush=True)
    sys.setswitchinterval(1000)
    groups[1].allreduce([theirs])
    begin = time.perf_counter()
    while time.perf_counter() < begin + 0.3:
        pass

atexit.register(let_it_go)

class Last:
    def __del__(self, sleep=time.sleep):
        sleep(0.3)

sys.modules["last"] = Last()  # goes when the interpreter is ending

def main():
    sys.stdout.write("main ")
    if HOW == "raises":
        raise ValueError("as it was")
    if HOW == "exits":
        sys.exit(75)
    return 7

if HOW == "plain":
    sys.exit(main())
process.run(main)
"""


@pytest.mark.slow
def test_a_process_ends_with_its_code_while_a_thread_of_torch_wants_the_interpreter() -> None:
    """As the interpreter ends by itself (`plain`), it is ended by SIGABRT: "terminate called ..."."""
    command = [sys.executable, "-c", ENDS, "returns", "raises", "exits"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n") == [
        *("main atexit", "returns 7"),
        *("main atexit", "raises 1"),
        *("main atexit", "exits 75", ""),
    ]
    assert result.stderr.count("Traceback") == result.stderr.count("ValueError: as it was") == 1
    assert "terminate called" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["0", "1"])
def test_names_that_are_not_ascii_are_read_where_the_locale_knows_only_ascii(mode: str) -> None:
    code = """
import os, sys
from windlass.process import run

def main():
    print(ascii(os.fsencode(sys.argv[1]).decode()), os.environ["PYTHONUTF8"])
    return 3

run(main)
"""
    locale = {"LC_ALL": "POSIX", "PYTHONUTF8": mode, "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", code, "rünß"], env={**os.environ, **locale}, check=False, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (3, "'r\\xfcn\\xdf' 1\n"), ended.stderr
