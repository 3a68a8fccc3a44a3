"""Runs a function on several ranks, each a process of its own, over gloo on loopback."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as mp

# A server process that has imported torch and is forked for each rank: seconds a test less than fresh interpreters.
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint.state_dict",
        "torch._inductor",  # what `torch.use_deterministic_algorithms` imports, most of the start of a rank
        "pytest",
        "support.toy",
        "support.runs",
        "support.optimizers",
        "windlass.optim.apollo",
        "windlass.optim.natural_galore",
        "windlass.optim.muon",
        "windlass.optim.cosmos",
        "windlass.optim.sgd_sai",
    ]
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, local_world_size: int | None = None) -> list:
    """`function(*args)` on `num_ranks` ranks; what each returned, in rank order.

    `function` must be importable and find its rank in torchrun's environment, as `ParallelConfig.build` does.
    """
    port = free_port()
    processes, pipes = [], []
    for rank in range(num_ranks):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % (local_world_size or num_ranks)),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(local_world_size or num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        process = CONTEXT.Process(target=_rank_main, args=(environment, sender, function, args))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    outcomes = []
    for rank, receiver in enumerate(pipes):
        try:
            outcomes.append(receiver.recv())
        except EOFError:
            outcomes.append((None, f"rank {rank} died without a word"))
    for process in processes:
        process.join()
    failures = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
    assert not failures, "\n".join(failures)
    return [result for result, _ in outcomes]


def _rank_main(environment: dict[str, str], sender: Connection, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        sender.send((function(*args), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))
    finally:
        sender.close()
