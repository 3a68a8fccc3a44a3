"""A small model that ranks snapshot into memory, without a run around it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from support.toy import Layout, build, digest, whole_weights
from windlass.checkpoint.manager import Checkpointer, Restored


class Protected:
    """A model, its AdamW and their `Checkpointer`, on this rank. Every step gives them bits of their own."""

    def __init__(self, directory: Path, layout: Layout | None = None, seed: int = 0) -> None:
        layout = layout or Layout()
        self.directory = directory
        self.mesh = layout.parallel_config().build(torch.device("cpu"))
        self.model, _, self.optimizer = build(layout, self.mesh, seed)
        self.checkpointer: Checkpointer | None = None

    def protect(self, shm_dir: Path, **settings: Any) -> Restored | None:
        """Restores what there is, and has a `Checkpointer` from then on.

        Args:
            shm_dir: the memory of this rank's node.
            settings: of the `Checkpointer`.
        """
        self.checkpointer = Checkpointer(
            {"model": self.model, "optimizer": self.optimizer},
            self.directory,
            self.mesh,
            kind="erasure",
            persist_every=1000,
            shm_dir=shm_dir,
            **settings,
        )
        return self.checkpointer.restore_latest()

    def advance(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = parameter.detach() + 1.0
        self.optimizer.step()
        self.optimizer.zero_grad()

    def snapshot(self, step: int) -> None:
        """Returns when it is committed on this rank's node."""
        checkpointer = self.checkpointer
        assert checkpointer is not None and checkpointer.snapshot(step)
        checkpointer.wait_staged()
        deadline = time.monotonic() + 60
        while {"snapshot_committed"} != {event["kind"] for event in checkpointer.poll() if event["step"] == step}:
            assert time.monotonic() < deadline, f"step {step} was not committed"
            time.sleep(0.01)
        self.mesh.barrier()

    def digests(self) -> tuple[str, str]:
        """Of all weights and of all moments, whatever their cut. Collective."""
        moments = {
            f"{name}.{key}": (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        return digest(whole_weights(self.model)), digest(moments)

    def status(self) -> dict[str, Any]:
        """Of this node's agent."""
        assert self.checkpointer is not None and self.checkpointer.snapshots is not None
        client = self.checkpointer.snapshots.coordinator.agents.client
        assert client is not None
        return client.ask("status")

    def close(self) -> None:
        """Ends the agents. Collective."""
        assert self.checkpointer is not None
        self.checkpointer.close()
        self.checkpointer = None
