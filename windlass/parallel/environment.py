"""Reads from the environment, as torchrun and launchers like it set it, which rank this process is. Torch-free."""

from __future__ import annotations

import os
from dataclasses import dataclass

from windlass.errors import ConfigError

VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"),
)
"""Variables that a rank reads."""
WHAT_TO_DO = (
    "start all ranks by `torchrun -m windlass.train`, which sets it, or unset RANK and WORLD_SIZE to train on one rank"
)


@dataclass(frozen=True)
class RankEnvironment:
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @staticmethod
    def read() -> RankEnvironment:
        """One rank without `WORLD_SIZE`; a variable that is empty is not set.

        Raises:
            ConfigError: a variable is missing beside the others, is no number, or does not fit them.
        """
        world_size = _number("WORLD_SIZE", 1, least=1)
        rank = _number("RANK", None if world_size > 1 else 0)
        _require(rank < world_size, "RANK", f"must be below WORLD_SIZE, which is {_value('WORLD_SIZE') or 'not set'}")
        if world_size == 1:
            return RankEnvironment()
        _require(_value("MASTER_ADDR") is not None, "MASTER_ADDR", "ranks meet there, and it is not set")
        _number("MASTER_PORT", None, least=1, most=65535)
        local_world_size = _number("LOCAL_WORLD_SIZE", world_size, least=1, most=world_size)
        local_rank = _number("LOCAL_RANK", 0, most=local_world_size - 1)
        return RankEnvironment(rank, world_size, local_rank, local_world_size)

    def describe(self) -> str:
        """Describes what such a rank waits for."""
        return f"{self.world_size} ranks to meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def forget() -> None:
    """Has this process, and those that it starts, be no rank of others."""
    for name in VARIABLES:
        os.environ.pop(name, None)


def _value(name: str) -> str | None:
    return os.environ.get(name, "").strip() or None


def _number(name: str, default: int | None, *, least: int = 0, most: int | None = None) -> int:
    text = _value(name)
    if text is None:
        _require(default is not None, name, "WORLD_SIZE says that there are other ranks, and this is not set")
        return default  # type: ignore[return-value]
    is_number = text.isascii() and text.isdigit() and len(text) < 10
    number = int(text) if is_number else -1
    span = f"from {least} to {most}" if most is not None else f"of at least {least}"
    _require(number >= least and (most is None or number <= most), name, f"must be a whole number {span}")
    return number


def _require(condition: bool, name: str, rule: str) -> None:
    if not condition:
        raise ConfigError(name, os.environ.get(name, "(not set)"), rule, WHAT_TO_DO)
