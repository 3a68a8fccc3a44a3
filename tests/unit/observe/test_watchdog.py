"""Ranks that hang, each a process of its own: all that can write where they are, one tells, and all end."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import CONTEXT

from windlass.errors import EXIT_DONE, EXIT_FAILURE
from windlass.observe import watchdog
from windlass.observe.watchdog import Heartbeat, Watchdog, stacks_on_signal, watch_for_hangs
from windlass.outcome import OUTCOME_FILE
from windlass.parallel.config import ParallelConfig
from windlass.parallel.mesh import Mesh

TIMEOUT_S = 1.0
WAIT_S, LAUNCHER_WAITS_S = 60.0, 5.0


def rank_main(function: Callable[[Mesh, Heartbeat], None], run_dir: Path, variables: dict[str, str]) -> None:
    """A rank that has made step 7 and does `function` in the next."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    logs = run_dir / "logs"
    with (
        (logs / f"rank{variables['RANK']}.out").open("w") as out,
        (logs / f"rank{variables['RANK']}.log").open("a") as log,
    ):
        os.dup2(out.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        mesh = ParallelConfig().build(torch.device("cpu"))
        with watch_for_hangs(run_dir, mesh, log, TIMEOUT_S) as heartbeat, stacks_on_signal(log):
            heartbeat.begin_step()
            heartbeat.end_step(7)
            function(mesh, heartbeat)
        mesh.stop()


def live(
    function: Callable[[Mesh, Heartbeat], None], run_dir: Path, num_ranks: int, is_launched: bool = True
) -> list[int | None]:
    """Exit codes of ranks that do `function`; None is one that had to be killed. They meet as a launcher has them."""
    (run_dir / "logs").mkdir(parents=True)
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    processes = []
    for rank in range(num_ranks):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        if is_launched:
            variables[OUTCOME_FILE] = str(run_dir / "outcome")
        process = CONTEXT.Process(target=rank_main, args=(function, run_dir, variables))
        process.start()
        processes.append(process)
    deadline, has_failed = time.monotonic() + WAIT_S, False
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
        if not has_failed and any(process.exitcode for process in processes):
            has_failed, deadline = True, time.monotonic() + LAUNCHER_WAITS_S
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def log_of(run_dir: Path, rank: int) -> str:
    return (run_dir / "logs" / f"rank{rank}.log").read_text()


def hang_events(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def sleep_in_rank_1(mesh: Mesh, heartbeat: Heartbeat) -> None:
    heartbeat.begin_step()
    if mesh.rank == 1:
        time.sleep(300)
    mesh.barrier()


@pytest.mark.slow
def test_a_rank_that_hangs_is_told_from_those_that_wait_for_it(tmp_path: Path) -> None:
    assert live(sleep_in_rank_1, tmp_path, 3) == [EXIT_FAILURE] * 3
    (event,) = hang_events(tmp_path)
    assert (event["kind"], event["step"], event["silent"], event["num_waiting"]) == ("hang", 7, [], 2)
    (status,) = event["not_waiting"]
    assert status["rank"] == 1 and status["frame"].startswith("sleep_in_rank_1 (")
    assert event["seconds"] >= TIMEOUT_S
    for rank in range(3):
        assert "in sleep_in_rank_1" in log_of(tmp_path, rank)
        assert ("in barrier" in log_of(tmp_path, rank)) == (rank != 1)
    told = (tmp_path / "logs" / "rank0.out").read_text()
    assert "after step 7: rank 1 on " in told and "sleep_in_rank_1" in told


def stop_rank_0(mesh: Mesh, heartbeat: Heartbeat) -> None:
    heartbeat.begin_step()
    if mesh.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    mesh.barrier()


@pytest.mark.slow
def test_a_process_that_stands_still_is_told_by_another(tmp_path: Path) -> None:
    assert live(stop_rank_0, tmp_path, 3) == [None, EXIT_FAILURE, EXIT_FAILURE]
    (event,) = hang_events(tmp_path)
    assert (event["silent"], event["not_waiting"], event["num_waiting"]) == ([0], [], 2)


def hold_the_interpreter(mesh: Mesh, heartbeat: Heartbeat) -> None:
    watchdog.HELD_S = 1.0
    time.sleep(0.2)  # the timer is put off by the new time
    heartbeat.begin_step()
    ctypes.PyDLL(None).sleep(300)


@pytest.mark.slow
def test_a_rank_that_holds_the_interpreter_writes_its_stacks_and_ends(tmp_path: Path) -> None:
    assert live(hold_the_interpreter, tmp_path, 1) == [EXIT_FAILURE]
    assert "Timeout (" in log_of(tmp_path, 0) and "in hold_the_interpreter" in log_of(tmp_path, 0)
    assert hang_events(tmp_path) == []


def hang_between_steps(mesh: Mesh, heartbeat: Heartbeat) -> None:
    """Rank 0, as in writing a line of metrics to a dead disk; the others wait for it in their next step."""
    if mesh.rank == 0:
        time.sleep(300)
    heartbeat.begin_step()
    mesh.barrier()


@pytest.mark.slow
def test_a_rank_that_hangs_between_steps_is_found_by_the_others(tmp_path: Path) -> None:
    assert live(hang_between_steps, tmp_path, 2) == [EXIT_FAILURE] * 2
    (event,) = hang_events(tmp_path)
    assert [status["rank"] for status in event["not_waiting"]] == [0]
    assert "in hang_between_steps" in log_of(tmp_path, 0)


def save_for_long(mesh: Mesh, heartbeat: Heartbeat) -> None:
    time.sleep(3 * TIMEOUT_S)
    heartbeat.begin_step()
    mesh.barrier()
    heartbeat.end_step(8)


def wait_for_rank_1_between_steps(mesh: Mesh, heartbeat: Heartbeat) -> None:
    """As in a snapshot, where the other machine cannot be reached."""
    with heartbeat.watched(7):
        if mesh.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        mesh.barrier()


@pytest.mark.full
@pytest.mark.slow
def test_all_ranks_may_hang_between_steps_where_they_wait_for_each_other(tmp_path: Path) -> None:
    assert live(wait_for_rank_1_between_steps, tmp_path, 2)[0] == EXIT_FAILURE
    assert [event["step"] for event in hang_events(tmp_path)] == [7]
    assert "wait_for_rank_1_between_steps" in log_of(tmp_path, 0)


@pytest.mark.slow
def test_what_is_between_steps_may_take_long(tmp_path: Path) -> None:
    assert live(save_for_long, tmp_path, 2) == [EXIT_DONE] * 2
    assert hang_events(tmp_path) == []


def take_long(mesh: Mesh, heartbeat: Heartbeat) -> None:
    heartbeat.begin_step()
    time.sleep(3 * TIMEOUT_S)
    heartbeat.end_step(8)


@pytest.mark.slow
def test_nobody_is_ended_whom_no_launcher_would_start_again(tmp_path: Path) -> None:
    assert live(take_long, tmp_path, 1, is_launched=False) == [EXIT_DONE]
    assert log_of(tmp_path, 0) == ""


def ask_for_stacks(mesh: Mesh, heartbeat: Heartbeat) -> None:
    signal.raise_signal(signal.SIGUSR2)


def test_sigusr2_writes_stacks_and_ends_nothing(tmp_path: Path) -> None:
    assert live(ask_for_stacks, tmp_path, 1) == [EXIT_DONE]
    assert "in ask_for_stacks" in log_of(tmp_path, 0)


@pytest.mark.parametrize(
    ("configured_s", "longest_s", "expected_s"),
    [
        (None, None, 600.0),
        (5.0, None, 600.0),
        (900.0, None, 900.0),
        (5.0, 30.0, 5.0),
        (None, 1.0, 120.0),
        (None, 30.0, 300.0),
    ],
)
def test_how_long_a_step_may_take(
    configured_s: float | None,
    longest_s: float | None,
    expected_s: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mesh = ParallelConfig().build(torch.device("cpu"))
    dog = Watchdog(tmp_path, mesh, sys.stderr, configured_s)
    if longest_s is not None:
        for number, seconds in enumerate((longest_s / 2, longest_s, longest_s / 3)):
            now = 100.0 * number
            monkeypatch.setattr(watchdog.time, "monotonic", lambda now=now: now)
            dog.begin_step()
            monkeypatch.setattr(watchdog.time, "monotonic", lambda now=now, seconds=seconds: now + seconds)
            dog.end_step(number)
    assert dog.timeout_s == expected_s
