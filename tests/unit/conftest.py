from __future__ import annotations

import pytest
import torch

from windlass.parallel.config import ParallelConfig, Sharding
from windlass.parallel.mesh import Mesh


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    """One rank, no process group."""
    return ParallelConfig(name=Sharding.none).build(torch.device("cpu"))
