"""The settings of how a run is watched. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class WandbMode(StrEnum):
    disabled = "disabled"
    offline = "offline"
    online = "online"


class ConsoleMode(StrEnum):
    auto = "auto"
    rich = "rich"
    plain = "plain"


@dataclass
class MetricsConfig:
    wandb: WandbMode = WandbMode.disabled
    wandb_project: str = "windlass"
    console: ConsoleMode = ConsoleMode.auto
    """`rich` is a live view, `plain` a line every `train.log_every` steps; `auto` is rich on a terminal."""
    report: bool = True
    """Draws `report.html` when the run is done, where matplotlib is installed: seconds of one core."""
    peak_flops: float | None = None
    """Peak FLOP/s of one device for the MFU; null looks the GPU up, and times a matrix product on a CPU."""
