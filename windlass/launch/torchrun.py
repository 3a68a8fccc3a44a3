"""`launch=torchrun`: torch's elastic agent in this process, and a worker process a rank."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig as ElasticConfig
from torch.distributed.launcher.api import elastic_launch

from windlass.conf.schema import Config
from windlass.conf.store import save_config
from windlass.errors import EXIT_DONE, EXIT_FAILURE
from windlass.train.outcome import OUTCOME_FILE, STOP_FILE, reported_outcome
from windlass.train.signals import STOP_SIGNALS


def launch(config: Config) -> int:
    """Starts the workers, starts them again when one dies, and returns the run's exit code."""
    num_ranks = config.launch.nproc_per_node or max(1, torch.cuda.device_count())
    config.parallel.mesh_shape(num_ranks, num_ranks)  # raises before anything is started
    scratch = Path(tempfile.mkdtemp(prefix="windlass-"))
    try:
        save_config(config, scratch / "config.yaml")
        with _environment(num_ranks, scratch), _signals_forwarded(scratch / "stop"):
            return _run_agent(config, num_ranks, scratch / "config.yaml")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run_agent(config: Config, num_ranks: int, config_file: Path) -> int:
    settings: dict[str, Any] = {
        "min_nodes": 1,
        "max_nodes": 1,
        "nproc_per_node": num_ranks,
        "run_id": config_file.parent.name,
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
        "max_restarts": config.launch.max_restarts,
        "monitor_interval": 0.1,
        "start_method": "spawn",
    }
    # The signals that ask for a stop are for the workers; the agent must not die of them and take the workers along.
    if "signals_to_handle" in {field.name for field in dataclasses.fields(ElasticConfig)}:
        settings["signals_to_handle"] = "SIGQUIT"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        elastic_launch(ElasticConfig(**settings), entrypoint=sys.executable)(
            "-m", "windlass.launch.worker", str(config_file)
        )
    except ChildFailedError as error:
        if reported_outcome() is None:
            rank, failure = error.get_first_failure()
            sys.stderr.write(
                f"windlass: error: rank {rank} died ({_how(failure.exitcode)}) and launch.max_restarts="
                f"{config.launch.max_restarts} is used up; see {config.run_dir}/logs/\n"
            )
            return EXIT_FAILURE
    except SignalException as error:
        return 128 + error.sigval
    outcome = reported_outcome()
    if outcome is None:
        return EXIT_DONE
    if outcome.rank != 0 and outcome.message is not None:  # rank 0 lost its peer and could not say why
        sys.stderr.write(f"windlass: error: rank {outcome.rank}: {outcome.message}\n")
    return outcome.exit_code


def _how(exit_code: int) -> str:
    return f"{signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"


@contextmanager
def _environment(num_ranks: int, scratch: Path) -> Iterator[None]:
    """What workers inherit: the threads of their share of the cores, and the files of `windlass.train.outcome`."""
    added = {OUTCOME_FILE: str(scratch / "outcome"), STOP_FILE: str(scratch / "stop")}
    if "OMP_NUM_THREADS" not in os.environ:
        added["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


@contextmanager
def _signals_forwarded(stop_file: Path) -> Iterator[None]:
    """Passes requests to stop on to the workers, which save and end by themselves, and to those still to come."""

    def forward(number: int, _: object) -> None:
        stop_file.touch()
        for child in psutil.Process().children():
            try:
                child.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
