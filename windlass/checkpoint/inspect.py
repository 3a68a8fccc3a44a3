"""`windlass ckpt list` and `verify`. Torch-free."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace

from windlass.checkpoint.durable.chunk_file import Part, chunk_name, open_chunk
from windlass.checkpoint.durable.locate import checkpoints_of
from windlass.checkpoint.durable.manifest import Manifest, unreadable
from windlass.checkpoint.durable.storage import Location, open_storage, resolved, split
from windlass.checkpoint.durable.store import DurableStore
from windlass.checkpoint.kept_files import kept_problems
from windlass.errors import CorruptCheckpoint, WindlassError
from windlass.os_errors import MISSING
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
        except WindlassError as error:  # damaged, of another version, or not given: the others are told of all the same
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
    rows = [replace(row, path=printable(row.path), problem=row.problem and printable(row.problem)) for row in rows]
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
    """Makes every check that a load of them makes, of the checkpoints that `path` stands for, and reads every byte.

    Those that several share are read once.

    Raises:
        ConfigError: there is none.
        IncompatibleCheckpoint: another version of windlass wrote one.
        RunFolderError: the system does not give a file, which says nothing of its bytes.
    """
    known: dict[tuple[str, int, frozenset[Part]], str | None] = {}
    return [_verify_one(folder, known) for folder in checkpoints_of(path, with_lost=True)]


def _verify_one(folder: Location, known: dict[tuple[str, int, frozenset[Part]], str | None]) -> Verification:
    """`known` says of each chunk that was read what is wrong with it, and learns of more."""
    begin = time.perf_counter()
    store = DurableStore(split(resolved(folder))[0])
    try:
        manifest = Manifest.read(folder)
        problems = [] if (other := store.other_run(manifest)) is None else [other]
    except CorruptCheckpoint as error:
        return Verification(str(folder), 0, 0, time.perf_counter() - begin, [error.rule])
    num_read = 0
    for sha256, parts in manifest.parts_of_chunks().items():
        chunk = (sha256, manifest.chunks[sha256], frozenset(parts))
        if chunk not in known:
            known[chunk] = _problem_of(folder, *chunk)
            num_read += manifest.chunks[sha256]
        if known[chunk] is not None:
            problems.append(f"{chunk_name(sha256)}: {known[chunk]}")
    problems += kept_problems(manifest.objects.get("info"), folder)
    return Verification(str(folder), manifest.num_bytes, num_read, time.perf_counter() - begin, problems)


def _problem_of(folder: Location, sha256: str, size: int, parts: frozenset[Part]) -> str | None:
    try:
        open_chunk(open_storage(split(resolved(folder))[0]), sha256, size, parts)
    except FileNotFoundError:
        return "is not there"
    except ValueError as error:
        return str(error)
    except MISSING as error:
        return f"cannot be used: {error.strerror}"
    except OSError as error:
        raise unreadable(folder, chunk_name(sha256), error) from error
    return None


def render_verification(results: list[Verification], as_json: bool) -> str:
    if as_json:
        return json.dumps([{**asdict(result), "is_sound": result.is_sound} for result in results], indent=2)
    lines = []
    for result in results:
        rate = result.num_read_bytes / max(result.seconds, 1e-9) / 1e6
        lines.append(
            f"{'sound  ' if result.is_sound else 'DAMAGED'}  {printable(result.path)}  "
            f"({result.num_bytes / 2**20:.1f} MiB, {result.num_read_bytes / 2**20:.1f} MiB of them read and compared, "
            f"{rate:.0f} MB/s)"
        )
        lines += [f"         {problem}" for problem in result.problems]
    return "\n".join(map(printable, lines))
