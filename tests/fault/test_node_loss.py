"""Trainers, agents and whole nodes are killed, at random moments and within snapshots; the run goes on to the bit."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from support import nodes, runs

from windlass.checkpoint.agent.ledger import IN_FLIGHT, Phase
from windlass.errors import EXIT_DONE

NUM_NODES, NUM_PARITY = 6, 2
KINDS = ("node", "node", "trainer", "processes")
"""What is killed: trainer, agent and memory of a node; its trainer alone; its trainer and its agent."""


@dataclass
class Strike:
    """One kill, and how the run went on from it."""

    kind: str
    victims: list[int]
    is_early: bool
    """Before this attempt had committed a snapshot."""
    phases: list[Phase]
    """Of the victims' slots, right after the kill."""
    committed: int
    """The newest step that any node had committed."""
    recovery: str = "killed again before it was restored"

    @property
    def is_mid_snapshot(self) -> bool:
        return any(phase in IN_FLIGHT for phase in self.phases)

    @property
    def row(self) -> str:
        when = "while it started" if self.is_early else " ".join(self.phases)
        return f"{self.kind:<9} {self.victims!s:<6} {when:<42} step {self.committed:>3} committed  {self.recovery}"


def survive(tmp_path: Path, num_steps: int, num_kills: int, seed: int, may_strike_early: bool) -> list[Strike]:
    """Runs undisturbed, then with kills, and compares. Returns what struck."""
    calm = nodes.undisturbed(NUM_NODES, f"train.steps={num_steps}")
    stormy = nodes.erasure_config(
        tmp_path, "stormy", f"train.steps={num_steps}", f"checkpoint.num_parity_shards={NUM_PARITY}"
    )
    randomness = random.Random(seed)
    strikes: list[Strike] = []
    with nodes.cluster(NUM_NODES) as cluster:
        for _ in range(num_kills):
            # Two in a row may well be what sets a snapshot aside that kills the job: see MAX_RESUMES.
            is_early = may_strike_early and bool(strikes) and not strikes[-1].is_early and randomness.random() < 0.2
            strike = live_until_struck(cluster, stormy, randomness, is_early, strikes[-1] if strikes else None)
            strikes.append(strike)
        num_before = len(recoveries(stormy))
        assert cluster.start(stormy).join(200) == [EXIT_DONE] * NUM_NODES, runs.output(stormy)
        check_recovery(stormy, num_before, strikes[-1])
        for node in cluster.nodes:
            node.wait_until_left()

    runs.assert_same_training(stormy, calm, "\n".join(strike.row for strike in strikes))
    return strikes


def live_until_struck(
    cluster: nodes.Cluster, config: runs.Config, randomness: random.Random, is_early: bool, last: Strike | None
) -> Strike:
    """Starts all trainers, kills one or two nodes or trainers, and then the trainers that are left."""
    generation, num_before = cluster.newest_generation(), len(recoveries(config))
    attempt = cluster.start(config)
    victims = sorted(randomness.sample(range(NUM_NODES), randomness.choice((1, 2))))
    kind = "trainer" if is_early else randomness.choice(KINDS)
    doomed = [psutil.Process(attempt.processes[victim].pid) for victim in victims]
    if is_early:
        time.sleep(randomness.uniform(0.0, 5.0))
    else:
        nodes.wait_until(lambda: cluster.has_committed_after(generation) or not attempt.is_alive(), "a snapshot")
        step = cluster.newest_committed() + randomness.randint(0, 4)
        nodes.wait_until(lambda: cluster.newest_committed() >= step or not attempt.is_alive(), f"step {step}")
        if kind != "trainer":
            doomed = [cluster.nodes[victim].running_agent() for victim in victims] + doomed
        if randomness.random() < 0.6:
            phase = Phase.writing if kind == "trainer" else randomness.choice(IN_FLIGHT)
            cluster.nodes[victims[0]].stop_within(phase, doomed[0])
        else:
            time.sleep(randomness.uniform(0.0, 1.0))
    assert attempt.is_alive(), f"the run was over before it could be struck: {runs.output(config)[-2000:]}"
    for process in doomed:
        process.kill()
    phases = [phase for victim in victims for phase in cluster.nodes[victim].phases()]
    strike = Strike(kind, victims, is_early, phases, cluster.newest_committed())
    if kind == "node":
        for victim in victims:
            cluster.nodes[victim].lose_memory()
    time.sleep(randomness.uniform(0.0, 0.3))
    nodes.kill_trainers(attempt)
    if last is not None and (not is_early or len(recoveries(config)) > num_before):
        check_recovery(config, num_before, last)
    return strike


def check_recovery(config: runs.Config, num_before: int, strike: Strike) -> None:
    """The attempt that followed `strike` went on from memory, and from no older step than the newest commit."""
    (recovered,) = recoveries(config)[num_before:]
    step, source, lost = recovered["step"], recovered["source"], recovered["lost_nodes"]
    strike.recovery = f"-> step {step:>3} from {source}, {lost} lost, {recovered['seconds']:.2f} s"
    assert step >= strike.committed, strike.row
    # A node that had given up what all others had prepared has lost that, too.
    assert (len(strike.victims) if strike.kind == "node" else 0) <= lost <= NUM_PARITY, strike.row
    assert source == ("parity" if lost else "local_ram"), strike.row


def recoveries(config: runs.Config) -> list[dict]:
    return runs.events(config, "recovered") if (Path(config.run_dir) / "events.jsonl").exists() else []


@pytest.mark.timeout(600)
def test_killed_nodes_and_trainers_end_with_the_same_bits(tmp_path: Path) -> None:
    strikes = survive(tmp_path, num_steps=30, num_kills=3, seed=68, may_strike_early=False)
    assert sum(strike.is_mid_snapshot for strike in strikes) >= 2, [strike.row for strike in strikes]
    assert {strike.kind for strike in strikes} == set(KINDS)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(4))
def test_a_hundred_kills_end_with_the_same_bits(tmp_path: Path, seed: int) -> None:
    """25 kills a seed."""
    strikes = survive(tmp_path, num_steps=200, num_kills=25, seed=seed, may_strike_early=True)
    for number, strike in enumerate(strikes, 1):
        print(f"{number:>3}  {strike.row}")
    num_mid = sum(strike.is_mid_snapshot for strike in strikes)
    print(f"{num_mid} of {len(strikes)} within a snapshot")
    assert num_mid >= 0.3 * len(strikes)
