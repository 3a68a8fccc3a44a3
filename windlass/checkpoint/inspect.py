"""`windlass ckpt list` and `verify`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from windlass.checkpoint.durable import open_checked
from windlass.checkpoint.manager import find_checkpoint
from windlass.checkpoint.manifest import Manifest, committed_steps, step_folder
from windlass.checkpoint.safetensors_file import Stored
from windlass.errors import CorruptCheckpoint


@dataclass(frozen=True)
class Listed:
    path: str
    step: int
    num_bytes: int
    world_size: int
    time: float
    """Unix seconds."""
    problem: str | None


@dataclass(frozen=True)
class Verification:
    path: str
    num_bytes: int
    seconds: float
    problems: list[str]

    @property
    def is_sound(self) -> bool:
        return not self.problems


def checkpoints_of(path: Path) -> list[Path]:
    """The checkpoints that `path` stands for, oldest first: one, or all of a run.

    Raises:
        ConfigError: there is none.
    """
    newest = find_checkpoint(path)
    if newest == path:
        return [path]
    return [step_folder(newest.parent, step) for step in committed_steps(newest.parent)]


def list_checkpoints(path: Path) -> list[Listed]:
    rows = []
    for folder in checkpoints_of(path):
        try:
            manifest = Manifest.read(folder)
        except CorruptCheckpoint as error:
            rows.append(Listed(str(folder), -1, 0, 0, 0.0, error.rule))
            continue
        rows.append(Listed(str(folder), manifest.step, manifest.num_bytes, manifest.world_size, manifest.time, None))
    return rows


def render_list(rows: list[Listed], as_json: bool) -> str:
    if as_json:
        return json.dumps([asdict(row) for row in rows], indent=2)
    lines = [f"{'step':>8}  {'size':>10}  {'ranks':>5}  {'written':<19}  path"]
    for row in rows:
        if row.problem:
            lines.append(f"{'?':>8}  {'?':>10}  {'?':>5}  {'?':<19}  {row.path}  {row.problem}")
            continue
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.time))
        size = f"{row.num_bytes / 2**20:.1f} MiB"
        lines.append(f"{row.step:>8}  {size:>10}  {row.world_size:>5}  {written}  {row.path}")
    return "\n".join(lines)


def verify(path: Path) -> list[Verification]:
    """Reads every byte of the checkpoints that `path` stands for."""
    return [_verify_one(folder) for folder in checkpoints_of(path)]


def _verify_one(folder: Path) -> Verification:
    begin = time.perf_counter()
    problems: list[str] = []
    try:
        manifest = Manifest.read(folder)
    except CorruptCheckpoint as error:
        return Verification(str(folder), 0, time.perf_counter() - begin, [error.rule])
    for file in manifest.files:
        try:
            reader = open_checked(folder, file, manifest)
        except (OSError, ValueError) as error:
            problems.append(f"{file}: {error}")
            continue
        for tensor in manifest.tensors.values():
            for stored in tensor.fragments:
                if stored.file != file:
                    continue
                try:
                    reader.check(Stored(stored.key, stored.begin, stored.end, stored.sha256))
                except ValueError as error:
                    problems.append(f"{file}: {error}")
        reader.close()
    problems += [
        f"{name}: its fragments do not cover it"
        for name, tensor in manifest.tensors.items()
        if sum(_numel(fragment.shape) for fragment in tensor.fragments) != _numel(tensor.shape)
    ]
    return Verification(str(folder), manifest.num_bytes, time.perf_counter() - begin, problems)


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def render_verification(results: list[Verification], as_json: bool) -> str:
    if as_json:
        return json.dumps([{**asdict(result), "is_sound": result.is_sound} for result in results], indent=2)
    lines = []
    for result in results:
        rate = result.num_bytes / max(result.seconds, 1e-9) / 1e6
        lines.append(
            f"{'sound  ' if result.is_sound else 'DAMAGED'}  {result.path}  "
            f"({result.num_bytes / 2**20:.1f} MiB read and compared, {rate:.0f} MB/s)"
        )
        lines += [f"         {problem}" for problem in result.problems]
    return "\n".join(lines)
