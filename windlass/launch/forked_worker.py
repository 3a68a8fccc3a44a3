"""The entry of a worker that is forked."""

from __future__ import annotations

from collections.abc import Mapping


def forked_worker(config_file: str, environment: Mapping[str, str]) -> None:
    """Runs a worker. A launcher that names it has no need itself of all that a worker imports, which takes seconds."""
    from windlass.launch.worker import forked

    forked(config_file, environment)
