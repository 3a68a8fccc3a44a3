"""A writer of checkpoints is killed with SIGKILL at random moments; what was committed is there, whole."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from support.ranks import CONTEXT
from support.stored import are_sound, content, expected, num_chunks, save

from windlass.checkpoint.durable.manifest import MANIFEST, Manifest, step_folder
from windlass.checkpoint.durable.store import POINTER, DurableStore

KEEP = 2
SIZES = [(1 << 20) + 77, (3 << 20) + 5]
"""Bytes a block: several chunks a checkpoint, some of which have more than one block."""
MAX_LIFE_S = 0.3


def versions_of(step: int) -> list[int]:
    """Two blocks stay as they are; some others change every third step, and three every time."""
    return [0, 0, step // 3, step // 3, step, step, step]


def write_until_killed(directory: Path, ready: Connection) -> None:
    """Saves step after step, and now and then the same step again, as a run does that went back."""
    store = DurableStore(directory)
    store.open_for_writing()
    step = store.latest_step() or 0
    ready.send(step)
    while True:
        step += 1
        for again in range(1 + (step % 4 == 0)):
            versions = versions_of(step)
            versions[-1] += 10_000 * again
            save(store, step, versions, keep=KEEP, num_bytes=SIZES[step % 2])


def kill_at_random(directory: Path, randomness: random.Random) -> int:
    """One attempt of a writer, and the step with which it began."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=write_until_killed, args=(directory, sender))
    process.start()
    first = receiver.recv()
    time.sleep(randomness.uniform(0, MAX_LIFE_S))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return first


def moment_of(store: DurableStore) -> str:
    """What the writer was doing, from what it has left."""
    names = [*store.storage.list(), *store.storage.list("chunks")]
    steps = store.steps()
    if any(name.endswith(".tmp") for name in names):
        return "writing a chunk or the pointer"
    if steps and store._pointed_step() != steps[-1]:
        return "between manifest and pointer"
    if len(steps) > KEEP:
        return "before retention"
    named = {sha256 for step in steps for sha256 in Manifest.read(step_folder(store.location, step)).chunks}
    return "between chunks" if num_chunks(store) > len(named) else "in no save"


def check(store: DurableStore, newest_before: int) -> int:
    """The pointer resolves, every checkpoint is sound, and none is lost. Returns the newest step."""
    steps = store.steps()
    if not steps:
        assert newest_before == 0
        return 0
    pointer = json.loads(store.storage.read(POINTER)) if store.storage.size(POINTER) is not None else None
    assert pointer is not None or steps == [1], "only the first checkpoint can be there without a pointer"
    if pointer is not None:
        manifest = Manifest.parse(store.storage.read(f"{pointer['folder']}/{MANIFEST}"), pointer["folder"])
        assert manifest.step == pointer["step"] in (steps[-1], steps[-1] - 1)
    assert are_sound(store.location)
    assert steps[-1] >= newest_before
    for step in steps:
        versions = Manifest.read(step_folder(store.location, step)).objects["versions"]
        assert versions[:-1] == versions_of(step)[:-1]
        assert content(store, step) == expected(versions, SIZES[step % 2])
    return steps[-1]


def survive(directory: Path, num_kills: int, seed: int) -> Counter[str]:
    """Kills writers one after the other and checks what each has left. Returns what they were doing."""
    randomness = random.Random(seed)
    store, newest, moments = DurableStore(directory), 0, Counter[str]()
    for _ in range(num_kills):
        first = kill_at_random(directory, randomness)
        assert first == newest, "a writer goes on from the newest checkpoint"
        moments[moment_of(store)] += 1
        newest = check(store, newest)
    assert newest > 0
    store.open_for_writing()
    store.retain(KEEP)
    check(store, newest)
    assert store.latest_step() == newest
    leftovers = [name for name in [*store.storage.list(), *store.storage.list("chunks")] if name.endswith(".tmp")]
    assert leftovers == []
    return moments


def test_a_killed_writer_loses_nothing(tmp_path: Path) -> None:
    survive(tmp_path, num_kills=12, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_hundred_killed_writers_lose_nothing(tmp_path: Path) -> None:
    moments = survive(tmp_path, num_kills=100, seed=2)
    print(dict(moments))
    assert sum(moments.values()) - moments["in no save"] >= 50
