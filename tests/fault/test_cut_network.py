"""Machines that lose the network, but neither their power nor their memory: two network namespaces and a cable."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import launched, nodes, runs
from support.ranks import free_port

ADDRESSES = ("10.77.0.1", "10.77.0.2")
HANG_TIMEOUT_S = 5.0


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Cable:
    """Between two namespaces, each with loopback and one interface of its own."""

    def __init__(self, name: str) -> None:
        self.names = [f"{name}-{side}" for side in "ab"]

    def lay(self) -> None:
        for name in self.names:
            run("ip", "netns", "add", name)
        first, second = self.names
        run("ip", "link", "add", "windlass0", "netns", first, "type", "veth", "peer", "windlass0", "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "windlass0")
            for interface in ("lo", "windlass0"):
                run("ip", "-n", name, "link", "set", interface, "up")

    def cut(self) -> None:
        run("ip", "-n", self.names[1], "link", "set", "windlass0", "down")

    def prefix(self, side: int) -> tuple[str, ...]:
        return ("nsenter", f"--net=/run/netns/{self.names[side]}")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(("ip", "netns", "delete", name), check=False, capture_output=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    if shutil.which("ip") is None or shutil.which("nsenter") is None:
        pytest.skip("needs ip and nsenter")
    laid = Cable(f"windlass-test-{os.getpid()}")
    try:
        try:
            laid.lay()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this system gives no network namespaces: {error.stderr.decode().strip()}")
        yield laid
    finally:
        laid.remove()


@pytest.mark.full
@pytest.mark.timeout(300)
def test_the_node_where_all_meet_goes_on_alone_and_the_other_ends(tmp_path: Path, cable: Cable) -> None:
    config = nodes.erasure_config(
        tmp_path,
        "cut",
        "checkpoint.num_parity_shards=1",
        "launch=torchrun",
        "launch.nproc_per_node=1",
        "launch.nnodes=1:2",
        f"launch.address={ADDRESSES[0]}:{free_port()}",
        "launch.wait_for_nodes_s=1",
        f"launch.hang_timeout_s={HANG_TIMEOUT_S}",
        "train.steps=100000",
    )
    with launched.machines() as machines:
        here, there = (machines.start(config, cable.prefix(side)) for side in range(2))
        # The first to come may train alone until the other is there.
        nodes.wait_until(lambda: "2 nodes have met" in here.output, "both nodes", 60)
        launched.wait_for_step(config, 1)
        launched.wait_for_step(config, launched.newest_step(config) + 5)
        num_before = len(runs.events(config, "recovered"))
        cut_off = launched.workers(there.launcher)
        assert len(cut_off) == 1
        cable.cut()
        nodes.wait_until(lambda: len(runs.events(config, "recovered")) > num_before, "a recovery", 60)
        recovered = runs.events(config, "recovered")[-1]
        assert "goes on without others" in here.output
        launched.wait_for_step(config, recovered["step"] + 5, 60)
        nodes.wait_until(lambda: "is lost or out of reach" in there.output, "words of the other", 60)
        assert not any(worker.is_running() for worker in cut_off)
        assert here.launcher.returncode is None
    assert recovered["source"] == "parity"
