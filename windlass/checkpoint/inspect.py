"""`windlass ckpt list` and `verify`. Torch-free."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

from windlass.checkpoint.durable.chunk_file import chunk_name, open_chunk
from windlass.checkpoint.durable.locate import checkpoints_of
from windlass.checkpoint.durable.manifest import Manifest
from windlass.checkpoint.durable.storage import Location, Storage, open_storage, resolved, split
from windlass.errors import CorruptCheckpoint
from windlass.text import printable


@dataclass(frozen=True)
class Listed:
    path: str
    step: int
    num_bytes: int
    shared_bytes: int
    """How many of them are in chunks that the checkpoint before has as well."""
    world_size: int
    time: float
    """Unix seconds."""
    problem: str | None


@dataclass(frozen=True)
class Verification:
    path: str
    num_bytes: int
    num_read_bytes: int
    """Less than all where a checkpoint before, of the same call, has the same chunks."""
    seconds: float
    problems: list[str]

    @property
    def is_sound(self) -> bool:
        return not self.problems


def list_checkpoints(path: Location) -> list[Listed]:
    rows = []
    before: dict[str, int] = {}
    for folder in checkpoints_of(path):
        try:
            manifest = Manifest.read(folder)
        except CorruptCheckpoint as error:
            rows.append(Listed(str(folder), -1, 0, 0, 0, 0.0, error.rule))
            continue
        shared = sum(size for sha256, size in manifest.chunks.items() if sha256 in before)
        before = manifest.chunks
        rows.append(
            Listed(str(folder), manifest.step, manifest.num_bytes, shared, manifest.world_size, manifest.time, None)
        )
    return rows


def render_list(rows: list[Listed], as_json: bool) -> str:
    if as_json:
        return json.dumps([asdict(row) for row in rows], indent=2)
    lines = [f"{'step':>8}  {'size':>10}  {'shared':>10}  {'ranks':>5}  {'written':<19}  path"]
    for row in rows:
        if row.problem:
            lines.append(f"{'?':>8}  {'?':>10}  {'?':>10}  {'?':>5}  {'?':<19}  {row.path}  {row.problem}")
            continue
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.time))
        size, shared = (f"{count / 2**20:.1f} MiB" for count in (row.num_bytes, row.shared_bytes))
        lines.append(f"{row.step:>8}  {size:>10}  {shared:>10}  {row.world_size:>5}  {written}  {row.path}")
    return "\n".join(map(printable, lines))


def verify(path: Location) -> list[Verification]:
    """Reads every byte of the checkpoints that `path` stands for; those that several share, once."""
    known: dict[str, str | None] = {}
    return [_verify_one(folder, known) for folder in checkpoints_of(path)]


def _verify_one(folder: Location, known: dict[str, str | None]) -> Verification:
    """`known` says of each chunk that was read what is wrong with it, and learns of more."""
    begin = time.perf_counter()
    try:
        manifest = Manifest.read(folder)
    except CorruptCheckpoint as error:
        return Verification(str(folder), 0, 0, time.perf_counter() - begin, [error.rule])
    place, _ = split(resolved(folder))
    storage = open_storage(place)
    num_read = 0
    for sha256, size in manifest.chunks.items():
        if sha256 not in known:
            known[sha256] = _problem_of(storage, sha256, size)
            num_read += size
    found = [(chunk_name(sha256), known[sha256]) for sha256 in manifest.chunks]
    problems = [f"{name}: {problem}" for name, problem in found if problem is not None]
    problems += [f"{name}: its fragments do not cover it" for name in manifest.uncovered()]
    return Verification(str(folder), manifest.num_bytes, num_read, time.perf_counter() - begin, problems)


def _problem_of(storage: Storage, sha256: str, size: int) -> str | None:
    try:
        open_chunk(storage, sha256, size)
    except FileNotFoundError:
        return "is not there"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def render_verification(results: list[Verification], as_json: bool) -> str:
    if as_json:
        return json.dumps([{**asdict(result), "is_sound": result.is_sound} for result in results], indent=2)
    lines = []
    for result in results:
        rate = result.num_read_bytes / max(result.seconds, 1e-9) / 1e6
        lines.append(
            f"{'sound  ' if result.is_sound else 'DAMAGED'}  {result.path}  "
            f"({result.num_bytes / 2**20:.1f} MiB, {result.num_read_bytes / 2**20:.1f} MiB of them read and compared, "
            f"{rate:.0f} MB/s)"
        )
        lines += [f"         {problem}" for problem in result.problems]
    return "\n".join(map(printable, lines))
