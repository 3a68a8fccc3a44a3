"""`windlass train`: composes the configuration and starts the workers that it asks for."""

from __future__ import annotations

from collections.abc import Sequence

from windlass.conf.compose import run_hydra
from windlass.conf.schema import Config
from windlass.launch.config import LaunchKind


def train(arguments: Sequence[str]) -> int:
    """Runs `windlass train ARGUMENTS` and returns its exit code.

    Raises:
        WindlassError: what the user asked for cannot be done.
    """
    return run_hydra(_launch, "windlass train", arguments)


def _launch(config: Config) -> int:
    # Each launcher imports torch; `windlass train --help` and a typo must not wait for that.
    if config.launch.name == LaunchKind.torchrun:
        from windlass.launch.torchrun import launch

        return launch(config)
    from windlass.launch.worker import run_worker

    return run_worker(config)
