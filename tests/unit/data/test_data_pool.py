from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from data_helpers import folder_bytes, jsonl_source, run_python

from windlass.data import pool as pool_module
from windlass.data.pool import num_cores
from windlass.data.prepare import prepare
from windlass.data.tokenizer import ByteTokenizer
from windlass.errors import DataError


class Killed(ByteTokenizer):
    def encode(self, texts: list[str]) -> list[np.ndarray]:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(texts)


class Exits(ByteTokenizer):
    def encode(self, texts: list[str]) -> list[np.ndarray]:
        os._exit(3)


class Broken(ByteTokenizer):
    def encode(self, texts: list[str]) -> list[np.ndarray]:
        raise ZeroDivisionError("in the tokenizer")


def prepare_with(tokenizer: ByteTokenizer, folder: Path) -> None:
    source = jsonl_source(folder / "a.jsonl", ["text"] * 20)
    prepare(source, tokenizer, folder / "out", validation_fraction=0.3, num_workers=1, progress=False)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Killed(), r"data\.num_workers=1: a worker process was killed by SIGKILL, as happens when memory runs out"),
        (Exits(), r"a worker process ended with code 3\. Fix: run the same command again"),
    ],
)
def test_a_worker_that_dies_is_reported(tmp_path: Path, tokenizer: ByteTokenizer, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare_with(tokenizer, tmp_path)


def test_other_errors_bring_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)a worker process failed:.*Traceback.*ZeroDivisionError: in the tok"):
        prepare_with(Broken(), tmp_path)


def test_a_tokenizer_that_the_worker_cannot_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "__module__", "__main__")
    monkeypatch.setattr("__main__.Broken", Broken, raising=False)
    with pytest.raises(RuntimeError, match=r"(?s)a worker process failed:.*AttributeError.*Broken"):
        prepare_with(Broken(), tmp_path)


def test_a_worker_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by SIGSTOP it does not see that its socket is closed."""
    monkeypatch.setattr(pool_module, "EXIT_TIMEOUT_S", 0.1)
    source = jsonl_source(tmp_path / "a.jsonl", ["text"] * 20)
    (tmp_path / "out").mkdir()
    for split in ("train", "validation", "units"):
        (tmp_path / "out" / split).mkdir()
    setup = pool_module.Setup(ByteTokenizer(), tmp_path / "out", 0.3)
    started_at = time.monotonic()
    with pool_module.WorkerPool(setup, 1) as pool:
        list(pool.run([pool_module.Task(0, source.units[0], "")]))
        (process,) = pool._processes.values()
        process.send_signal(signal.SIGSTOP)
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
    assert process.returncode == -signal.SIGKILL
    assert time.monotonic() - started_at < 10


def test_num_cores_is_what_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= num_cores() <= (os.cpu_count() or 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 7}, raising=False)
    assert num_cores() == 2


SCRIPT = """
import sys, threading
from pathlib import Path
with open(sys.argv[1], "a") as stream:
    stream.write("imported ")
from windlass.data.prepare import prepare
from windlass.data.sources import text_source
from windlass.data.tokenizer import ByteTokenizer

def work():
    source = text_source([sys.argv[2]])
    prepare(source, ByteTokenizer(), Path(sys.argv[3]), validation_fraction=0.3, num_workers=2)

thread = threading.Thread(target=work)  # as in a process that has other threads too
thread.start()
thread.join()
"""


@pytest.mark.slow
def test_a_script_without_main_guard_is_not_run_again(tmp_path: Path) -> None:
    jsonl_source(tmp_path / "a.jsonl", [f"text {i}" for i in range(20)])
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    result = run_python(code, script, tmp_path / "log", tmp_path / "a.jsonl", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "log").read_text() == "imported "
    assert "manifest.json" in folder_bytes(tmp_path / "out")


@pytest.mark.parametrize("module", ["cli", "pool", "prepare", "shards", "worker"])
def test_starts_without_torch(module: str) -> None:
    code = f"import sys, windlass.data.{module}; assert not {{'torch', 'tokenizers'}} & set(sys.modules)"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
