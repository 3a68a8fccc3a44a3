"""What snapshots in memory are refused with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from windlass.checkpoint.config import CheckpointConfig, FailureDomain
from windlass.checkpoint.snapshot.agent_clients import AgentClients
from windlass.conf.compose import compose
from windlass.errors import ConfigError
from windlass.launch.main import _end_agents
from windlass.parallel.config import Axis
from windlass.parallel.mesh import Mesh


def mesh_of(num_ranks: int, ranks_per_node: int) -> Mesh:
    return Mesh(
        rank=0,
        world_size=num_ranks,
        local_rank=0,
        local_world_size=ranks_per_node,
        axes={Axis.shard: num_ranks},
        device=torch.device("cpu"),
        world=None,
        device_mesh=None,
    )


@pytest.mark.parametrize(
    ("num_ranks", "ranks_per_node", "domain", "fix"),
    [
        (2, 2, FailureDomain.node, "set checkpoint.failure_domain=rank to protect the ranks of a machine"),
        (1, 1, FailureDomain.rank, "set checkpoint.num_parity_shards=0"),
        (4, 2, FailureDomain.node, "set checkpoint.num_parity_shards=1"),
        (3, 3, FailureDomain.rank, "set checkpoint.num_parity_shards=2"),
    ],
)
def test_more_parity_than_nodes_is_refused_with_what_is_possible(
    num_ranks: int, ranks_per_node: int, domain: FailureDomain, fix: str, tmp_path: Path
) -> None:
    settings = CheckpointConfig(num_parity_shards=3, failure_domain=domain, shm_dir=str(tmp_path))
    with pytest.raises(ConfigError) as raised:
        AgentClients(mesh_of(num_ranks, ranks_per_node), "a job", settings, tmp_path)
    assert f"Fix: {fix}" in str(raised.value)


def test_a_folder_of_shared_memory_that_is_missing_is_said_by_the_workers_alone(tmp_path: Path) -> None:
    overrides = ["checkpoint=lazy", f"checkpoint.shm_dir={tmp_path / 'missing'}", f"run_dir={tmp_path / 'run'}"]
    _end_agents(compose(overrides))
