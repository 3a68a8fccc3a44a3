"""Claim: after a kill a run goes on within seconds, from the memory of its nodes, and loses few steps.

`python benchmarks/recovery.py` trains a Llama of 64M parameters (ZeRO-3, AdamW, float32; `--layers` for others) on gloo
ranks of one thread each. Each rank is a node of its own, with a snapshot agent, on this machine. Its attempts end by
SIGKILL at random moments, and the next attempt goes on from

- `local_ram`: the trainers were killed, and the agents are there;
- `parity`: one node was lost as well, its agent and its shared memory: it is made again from what the others have;
- `durable`: all nodes were lost: the agents are started anew, and the newest checkpoint on disk is read.

What is timed begins with the kill and ends when all ranks have taken a step. Fresh interpreters are started at once,
as a launcher does, and import torch, which is most of the time. Parts are of the slowest rank.

Beside it, in the same attempt, stand the limits: a copy of the same state from memory to memory by the same ranks, once
into memory that they have, and once as a new process must, whose weights are there and whose optimizer state needs
pages that the kernel has yet to give and to clear (which takes longer than the copy); and for parity the receipt of the
bytes that the rebuild asks for, over one plain connection on loopback, and getting the shared memory of its slot. The
bar is what it takes to map and to read a snapshot from this node's memory, all bytes checked, over the copy of a new
process.
Timings are printed and never asserted: the exit code is 0 unless something fails, or goes on from elsewhere.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from checkpoint_trainer import SHAPE
from common import Spread, describe_machine, filesystem_of, free_port, num_cores, print_json, print_table
from recovery_attempt import PARTS, Recovery, Settings, live

from windlass.checkpoint.agent.listing import list_agents

SOURCES = ("local_ram", "parity", "durable")
RESTORE_BAR = 1.5
"""Reading from this node's memory over a copy of the same bytes."""
LIFE_S = 300.0
"""An attempt that has not come so far as to be killed by then has failed."""


@dataclass
class Measured:
    """A kill and how the run went on."""

    source: str
    lost_steps: int
    total_s: float
    seconds: dict[str, float]
    """Of each of `PARTS`."""
    ranks: list[Recovery]


class Attempt:
    """All ranks of one start of the run."""

    def __init__(self, settings: Settings) -> None:
        context = mp.get_context("spawn")
        variables = {
            "WORLD_SIZE": str(settings.num_ranks),
            "LOCAL_WORLD_SIZE": str(settings.num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        os.environ["OMP_NUM_THREADS"] = str(max(1, num_cores() // settings.num_ranks))
        self.processes: list[SpawnProcess] = []
        self.pipes: list[Connection] = []
        self.step = 0
        """The last one that rank 0 has taken."""
        self.newest: dict[str, int] = {}
        """Kind of event -> the newest step of it."""
        for rank in range(settings.num_ranks):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=live, args=(settings, rank, variables, sender))
            process.start()
            sender.close()
            self.processes.append(process)
            self.pipes.append(receiver)

    def recoveries(self) -> list[Recovery]:
        """How each rank went on. Raises RuntimeError if one did not."""
        found = []
        for pipe in self.pipes:
            try:
                found.append(pipe.recv())
            except EOFError as error:
                raise RuntimeError("a rank died; its traceback is above") from error
        self.step = found[0].step + 1
        return found

    def train_until(self, kinds: Sequence[str], more_steps: int) -> None:
        """Returns `more_steps` after each of `kinds` has happened to a step of this attempt."""
        deadline, last = time.monotonic() + LIFE_S, None
        while last is None or self.step < last:
            for pipe in self.pipes[1:]:
                while pipe.poll():
                    pipe.recv()
            if not self.pipes[0].poll(max(0.0, deadline - time.monotonic())):
                raise RuntimeError(f"after {LIFE_S:.0f} s there was no {' and no '.join(kinds)}")
            kind, step = self.pipes[0].recv()
            if kind == "step":
                self.step = step
            self.newest[kind] = step
            if last is None and all(kind in self.newest for kind in kinds):
                last = self.step + more_steps

    def kill(self) -> None:
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGKILL)

    def join(self) -> None:
        for process in self.processes:
            process.join()


def lose_nodes(shm_dir: Path, count: int | None) -> None:
    """Kills the agents of `count` nodes, or of all, and takes their memory away."""
    for agent in list_agents(shm_dir)[:count]:
        if agent.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(agent.pid, signal.SIGKILL)
        shutil.rmtree(agent.path)


def run_lives(settings: Settings, repeats: int, seed: int) -> list[Measured]:
    """One attempt after the other, each killed and gone on from in another way."""
    moments = random.Random(seed)
    measured: list[Measured] = []
    attempt = Attempt(settings)
    try:
        attempt.recoveries()
        for number, source in enumerate(SOURCES * repeats):
            kinds = ("snapshot_committed", "persisted") if source == "durable" else ("snapshot_committed",)
            attempt.train_until(kinds, moments.randrange(2 * settings.every))
            reached, before = attempt.step, attempt
            begin = time.monotonic()
            before.kill()
            if source != "local_ram":
                lose_nodes(settings.shm_dir, 1 if source == "parity" else None)
            attempt = Attempt(settings)
            before.join()
            ranks = attempt.recoveries()
            if ranks[0].source != source:
                raise RuntimeError(f"the run went on from {ranks[0].source} where it should have from {source}")
            seconds = {part: max(rank.seconds[part] for rank in ranks) for part in PARTS[1:]}
            seconds = {"processes": max(rank.up_at for rank in ranks) - begin} | seconds
            total_s = max(rank.end_at for rank in ranks) - begin
            measured.append(Measured(source, reached - ranks[0].step, total_s, seconds, ranks))
            print(f"{number + 1}/{len(SOURCES) * repeats}: {source} {total_s:.2f} s", file=sys.stderr, flush=True)
    finally:
        attempt.kill()
        attempt.join()
        lose_nodes(settings.shm_dir, None)
    return measured


def summarize(settings: Settings, measured: Sequence[Measured]) -> dict[str, Any]:
    rows = {}
    for source in SOURCES:
        of_source = [one for one in measured if one.source == source]
        limits = [one.ranks[0] for one in of_source]
        rows[source] = {
            "total_s": Spread.of([one.total_s for one in of_source]).to_dict(),
            "lost_steps": Spread.of([one.lost_steps for one in of_source]).to_dict(),
            "parts": {part: Spread.of([one.seconds[part] for one in of_source]).to_dict() for part in PARTS},
            "memcpy_s": Spread.of([limit.copy_s for limit in limits]).to_dict(),
            "new_memcpy_s": Spread.of([limit.new_copy_s for limit in limits]).to_dict(),
            "read_over_memcpy": Spread.of([_read_s(one) / one.ranks[0].copy_s for one in of_source]).to_dict(),
            "read_over_new_memcpy": Spread.of([_read_s(one) / one.ranks[0].new_copy_s for one in of_source]).to_dict(),
        }
    lost = [one for one in measured if one.source == "parity"]
    return {
        "machine": describe_machine(),
        "num_ranks": settings.num_ranks,
        "num_parity_shards": settings.num_parity_shards,
        "num_parameters": measured[0].ranks[0].num_parameters,
        "state_bytes": sum(rank.state_bytes for rank in measured[0].ranks),
        "every": settings.every,
        "persist_every": settings.persist_every,
        "repeats": len(lost),
        "filesystem": filesystem_of(settings.directory),
        "sources": rows,
        "rebuild": {
            "received_bytes": lost[0].ranks[0].received_bytes,
            "loopback_s": Spread.of([one.ranks[0].loopback_s for one in lost]).to_dict(),
            "new_slot_s": Spread.of([one.ranks[0].new_slot_s for one in lost]).to_dict(),
            "over_limit": Spread.of(
                [one.seconds["rebuild"] / _rebuild_limit_s(one.ranks[0]) for one in lost]
            ).to_dict(),
        },
    }


def _rebuild_limit_s(rank: Recovery) -> float:
    return rank.loopback_s + rank.new_slot_s


def _read_s(one: Measured) -> float:
    return one.seconds["open"] + one.seconds["read"]


def print_summary(result: dict[str, Any]) -> None:
    machine = result["machine"]
    print(
        f"\n{result['num_parameters'] / 1e6:.1f}M parameters, state {result['state_bytes'] / 1e6:.0f} MB in all, "
        f"{result['num_ranks']} ranks of 1 thread, each a node, {result['num_parity_shards']} parity; a snapshot every "
        f"{result['every']} steps, to {result['filesystem']} every {result['persist_every']}; {result['repeats']} kills"
    )
    print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_1min']}, torch {machine['torch']}\n")
    rows = []
    for part in ("total_s", "lost_steps", *PARTS, "memcpy_s", "new_memcpy_s"):
        spec = ".0f" if part == "lost_steps" else ".3f"
        of_sources = [row["parts"][part] if part in PARTS else row[part] for row in result["sources"].values()]
        name = {"total_s": "kill to first step", "lost_steps": "lost steps", "memcpy_s": "limit: copy"}.get(part)
        name = name or ("limit: copy, new process" if part == "new_memcpy_s" else f"  {part}")
        rows.append([name, *(Spread(**spread).text(spec) for spread in of_sources)])
    for key, name in (("read_over_memcpy", "open + read / copy"), ("read_over_new_memcpy", "  / copy, new process")):
        rows.append([name, *(Spread(**row[key]).text(".2f") for row in result["sources"].values())])
    print_table(["seconds", *result["sources"]], rows)
    rebuild = result["rebuild"]
    limits = [Spread(**rebuild[key]).text(".3f") for key in ("loopback_s", "new_slot_s")]
    print(
        f"\nmedian (lowest..highest) of {result['repeats']} kills. A rebuild receives "
        f"{rebuild['received_bytes'] / 1e6:.0f} MB: {limits[0]} s over plain loopback, and {limits[1]} s to get the "
        f"shared memory; it takes {Spread(**rebuild['over_limit']).text('.2f')} times both"
    )
    of_ram = result["sources"]["local_ram"]
    ratio = of_ram["read_over_new_memcpy"]["median"]
    held = "met" if ratio <= RESTORE_BAR else "MISSED"
    print(
        f"restore from local RAM: {ratio:.2f}x the copy of a new process, bar <= {RESTORE_BAR:.1f}x {held}; "
        f"{of_ram['read_over_memcpy']['median']:.2f}x a copy into memory that is there"
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="gloo ranks, each a node (2)")
    parser.add_argument("--parity", type=int, default=1, help="parity shards (1)")
    parser.add_argument("--layers", type=int, default=SHAPE["num_layers"], help="of the model (10: 64M parameters)")
    parser.add_argument("--every", type=int, default=2, help="steps between snapshots (2)")
    parser.add_argument("--persist-every", type=int, default=10, help="steps between durable checkpoints (10)")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences a rank (1)")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5, help="kills of each kind (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="where the checkpoints go, on a disk (runs)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args(arguments)
    if not 1 <= options.parity < options.ranks:
        parser.error("--parity must be at least 1 and below --ranks")
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.dir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="windlass-benchmark-", dir=options.dir)).resolve()
    shm_dir = Path(tempfile.mkdtemp(prefix="windlass-benchmark-", dir="/dev/shm"))
    settings = Settings(
        num_ranks=options.ranks,
        num_parity_shards=options.parity,
        shape=SHAPE | {"num_layers": options.layers},
        every=options.every,
        persist_every=options.persist_every,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        directory=directory,
        shm_dir=shm_dir,
    )
    try:
        result = summarize(settings, run_lives(settings, options.repeats, options.seed))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(shm_dir, ignore_errors=True)
    if options.json:
        print_json(result)
    else:
        print_summary(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
