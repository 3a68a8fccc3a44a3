"""Text to a folder of token shards: in parallel, resumable after any interruption, the same bytes every time.

Torch-free. The steps, and what each leaves on the disk, are in `manifest`.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from windlass.data.chat_tokenizer import FILES as CHAT_FILES
from windlass.data.chat_tokenizer import TEMPLATES, ChatTokenizer, load_chat_tokenizer
from windlass.data.config import BYTES, ChatDataConfig, DataConfig, PreparedDataConfig, TokensDataConfig
from windlass.data.documents import RecordsUnit, Unit, unit_identity
from windlass.data.manifest import (
    FORMAT_VERSION,
    LOCK,
    MANIFEST,
    SETTINGS,
    SPLITS,
    TOKENIZER_FILE,
    UNITS,
    Manifest,
    SplitInfo,
    remove_temporaries,
    shard_file,
    unit_file,
    write_json,
)
from windlass.data.outputs import refuse_inside
from windlass.data.pool import WorkerPool, num_cores
from windlass.data.progress import ProgressReport
from windlass.data.shard_writer import BATCH_TOKENS, UnitResult, space_errors, token_dtype
from windlass.data.sources import Source
from windlass.data.tally import Tally, left_out
from windlass.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from windlass.data.worker import Advanced, Finished, Setup, Task
from windlass.errors import ConfigError, DataError, require
from windlass.files import TEMPORARY_SUFFIX, atomic_file, cache_folder, open_growing, refuse_links, sync_folder
from windlass.text import override, printable
from windlass.untrusted import Malformed, read_json

RULES = 2
"""The version of what becomes of text: a folder that was prepared by other rules is not taken for the same."""


def prepared_folder(cfg: DataConfig, progress: bool = True) -> Path:
    """The folder with the tokens of `cfg`, prepared now into the cache unless it is there already.

    The cache knows text by the places, names, sizes, times and inodes of its files. Any number of processes may call
    this at the same time: one prepares, the others wait.

    Args:
        progress: report on stderr how far it is, and what was left out.

    Raises:
        ConfigError, DataError: as `prepare`; or `data=tokens` names a folder that is not a finished one.
    """
    if isinstance(cfg, TokensDataConfig):
        if cfg.path in ("", "???"):
            fix = "set data.path=DIR, the folder given to `windlass data prepare --out`"
            raise ConfigError("data.path", cfg.path, "must name a prepared folder", fix)
        folder = Path(cfg.path).expanduser()
        manifest = Manifest.load(folder)
        if manifest.splits["train"].num_targets is not None:
            fix = f"{override('data', 'chat')} {override('data.path', cfg.path)}"
            raise DataError("data.path", folder, "holds conversations, not all of which is learned", f"set {fix}")
        _say_left_out(manifest, progress)
        return folder
    if isinstance(cfg, ChatDataConfig) and is_prepared(Path(cfg.path).expanduser()):
        folder = Path(cfg.path).expanduser()
        manifest = Manifest.load(folder)
        if manifest.splits["train"].num_targets is None:
            fix = f"set {override('data', 'tokens')} {override('data.path', cfg.path)}"
            raise DataError("data.path", folder, "was prepared from text and not from conversations", fix)
        _say_left_out(manifest, progress)
        return folder
    require(isinstance(cfg, PreparedDataConfig), "data", cfg.name, "has no source", "use data=stdlib, text or parquet")
    assert isinstance(cfg, PreparedDataConfig)
    source = cfg.source()
    tokenizer = _tokenizer_of(cfg)
    settings = _settings(source, tokenizer, cfg.validation_fraction)
    key = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = _cache_dir(cfg.cache_dir) / f"{source.name}-{key}"
    if "path" in vars(cfg):
        refuse_inside(folder, [vars(cfg)["path"]], "data.cache_dir")
    manifest = prepare(
        source,
        tokenizer,
        folder,
        validation_fraction=cfg.validation_fraction,
        num_workers=cfg.num_workers,
        progress=progress,
        key="data.cache_dir",
    )
    _say_left_out(manifest, progress)
    return folder


def vocab_size_of(cfg: DataConfig) -> int:
    """The vocabulary of the tokens that `cfg` describes, whether they are prepared or not.

    Raises:
        ConfigError, DataError: the tokenizer, or the prepared folder, is not there.
    """
    is_folder = isinstance(cfg, ChatDataConfig) and is_prepared(Path(cfg.path).expanduser())
    if isinstance(cfg, PreparedDataConfig) and not is_folder:
        return _tokenizer_of(cfg).vocab_size
    return Manifest.load(prepared_folder(cfg)).tokenizer["vocab_size"]


def is_prepared(folder: Path) -> bool:
    """True for a folder that a preparation wrote, finished or not."""
    return (folder / MANIFEST).is_file() or (folder / SETTINGS).is_file()


def _tokenizer_of(cfg: PreparedDataConfig) -> Tokenizer:
    if isinstance(cfg, ChatDataConfig):
        return load_chat_tokenizer(cfg.tokenizer)
    return load_tokenizer(cfg.tokenizer or BYTES)


def _say_left_out(manifest: Manifest, progress: bool) -> None:
    for clause in left_out(manifest.tally) if progress else ():
        sys.stderr.write(f"windlass: warning: data: {clause}\n")


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    out_dir: Path,
    *,
    validation_fraction: float,
    num_workers: int | None = None,
    progress: bool = True,
    key: str = "--out",
) -> Manifest:
    """Tokenise `source` into `out_dir`, or go on with an interrupted preparation; returns at once if it is
    finished.

    Args:
        validation_fraction: of the documents, chosen by a hash of their names, so that a document stays in
            its split when others come or go.
        num_workers: processes; None is one a core.
        progress: report on stderr how far it is.
        key: what the user knows `out_dir` by, for error messages.

    Raises:
        ConfigError: `out_dir` holds something else, or tokens prepared with other settings; it is left as it
            is.
        DataError: the text cannot be read, a split would have no documents, or the disk is full.
        KeyboardInterrupt: on Ctrl-C, with the folder ready to be resumed.
    """
    if not isinstance(tokenizer, ChatTokenizer):  # which is not loaded unless there is something to do
        require(
            0 <= tokenizer.eos_id < tokenizer.vocab_size,
            "data.tokenizer",
            tokenizer.name,
            f"its eos_id={tokenizer.eos_id} must be below its vocab_size={tokenizer.vocab_size}",
            "correct the tokenizer",
        )
    settings = _settings(source, tokenizer, validation_fraction)
    _make_folder(out_dir, key)
    with space_errors(out_dir):
        _refuse_foreign(out_dir, settings, key)
        if (out_dir / MANIFEST).exists():  # without the lock: the folder may be read-only by now
            return Manifest.load(out_dir)
        with _locked(out_dir, key, progress):
            _refuse_foreign(out_dir, settings, key)
            if (out_dir / MANIFEST).exists():
                return Manifest.load(out_dir)
            remove_temporaries(out_dir)
            _lay_out(out_dir, settings, tokenizer)
            try:
                _tokenize(source, Setup(tokenizer, out_dir, validation_fraction), num_workers, progress)
            finally:
                remove_temporaries(out_dir)
            return _finish(source, tokenizer, out_dir, settings)


def _settings(source: Source, tokenizer: Tokenizer, validation_fraction: float) -> dict[str, Any]:
    """All that determines the bytes of a prepared folder."""
    return {
        "format_version": FORMAT_VERSION,
        "rules": RULES,
        "source": source.settings,
        "input_files": source.fingerprint,
        "tokenizer": tokenizer.files_fingerprint if isinstance(tokenizer, ChatTokenizer) else tokenizer.fingerprint,
        "validation_fraction": validation_fraction,
        "batch_tokens": BATCH_TOKENS,
    }


def _cache_dir(given: str | None) -> Path:
    if given is not None:
        return Path(given).expanduser()
    folder = cache_folder()
    if folder is None:
        rule = "tokens are kept in the user's home, and HOME is not set"
        raise ConfigError("data.cache_dir", given, rule, "set data.cache_dir to a folder")
    return folder


def _make_folder(folder: Path, key: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            key, folder, f"cannot be made a folder ({error.strerror})", f"choose another with {key}"
        ) from None


def _refuse_foreign(folder: Path, settings: dict[str, Any], key: str) -> None:
    """Raise ConfigError unless `folder` is as good as empty, or is being prepared with these settings."""
    try:
        found = read_json(folder / SETTINGS)
    except FileNotFoundError:
        names = sorted(p.name for p in folder.iterdir())
        foreign = [name for name in names if name != LOCK and not name.endswith(TEMPORARY_SUFFIX)]
        if foreign:
            rule = f"must be empty or new; it holds {', '.join(foreign[:3])} ({len(foreign)} in all)"
            raise ConfigError(key, folder, rule, "choose another folder") from None
        return
    except Malformed as error:
        rule = f"its {SETTINGS} was not written by windlass: {error}"
        raise ConfigError(key, folder, rule, "choose another folder") from None
    if found != settings:
        names = sorted(name for name in settings if not isinstance(found, dict) or found.get(name) != settings[name])
        rule = f"was prepared from other input or with other settings: {', '.join(names)} differ"
        raise ConfigError(key, folder, rule, "choose another folder, or delete this one first")


@contextmanager
def _locked(folder: Path, key: str, progress: bool) -> Iterator[None]:
    """Hold `folder` against other processes. The lock goes with the process, however that ends."""
    try:
        for name in (LOCK, UNITS, *SPLITS):
            refuse_links(folder / name, folder)
    except OSError as error:
        fix = "remove that link, or choose another folder"
        raise ConfigError(key, folder, str(error.strerror), fix) from None
    with os.fdopen(open_growing(folder / LOCK), "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                sys.stderr.write(f"waiting for another process that prepares {printable(str(folder))}\n")
                sys.stderr.flush()
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(
                key,
                folder,
                f"must be on a file system with locks ({error.strerror})",
                "choose another folder",
            ) from None
        yield


def _lay_out(folder: Path, settings: dict[str, Any], tokenizer: Tokenizer) -> None:
    write_json(folder / SETTINGS, settings)  # first: from here on the folder is known as ours
    for name in (*SPLITS, UNITS):
        (folder / name).mkdir(exist_ok=True)
    for name, content in _tokenizer_files(tokenizer).items():
        (folder / name).parent.mkdir(exist_ok=True)
        with atomic_file(folder / name) as file:
            file.write(content)


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    if isinstance(tokenizer, ChatTokenizer):
        return tokenizer.files
    return {TOKENIZER_FILE: tokenizer.content} if isinstance(tokenizer, HuggingFaceTokenizer) else {}


def _tokenize(source: Source, setup: Setup, num_workers: int | None, progress: bool) -> None:
    tasks = [Task(i, unit, _unit_fingerprint(unit)) for i, unit in enumerate(source.units)]
    vocab_size = setup.tokenizer.vocab_size
    left = [task for task in tasks if _load_result(setup.folder, task.index, task.fingerprint, vocab_size) is None]
    if not left:
        return
    left_bytes = sum(task.unit.num_bytes for task in left)
    done_bytes = source.num_bytes - left_bytes
    num_workers = min(num_workers or num_cores(), len(left))
    finished_bytes = advanced_bytes = 0
    with (
        ProgressReport("tokenising", source.num_bytes, done_bytes, progress) as report,
        WorkerPool(setup, num_workers) as pool,
    ):
        for message in pool.run(left):
            if isinstance(message, Advanced):
                advanced_bytes += message.num_bytes
            elif isinstance(message, Finished):
                finished_bytes += tasks[message.index].unit.num_bytes
            # Documents leave out what lies between them, so what they add up to falls a little short.
            report.set_done(done_bytes + max(advanced_bytes, finished_bytes))


def _unit_fingerprint(unit: Unit) -> str:
    return sha256(json.dumps(unit_identity(unit), sort_keys=True).encode()).hexdigest()


def _load_result(folder: Path, index: int, fingerprint: str, vocab_size: int) -> UnitResult | None:
    """Reads the sidecar of a finished unit. None if the unit is still to be done."""
    try:
        result = UnitResult.load(folder / unit_file(index), vocab_size)
        are_whole = all(
            shard.file == shard_file(split, index) and (folder / shard.file).stat().st_size == shard.num_bytes
            for split, shard in result.shards.items()
        )
    except (FileNotFoundError, Malformed):
        return None
    return result if are_whole and result.unit == fingerprint else None


def _finish(source: Source, tokenizer: Tokenizer, folder: Path, settings: dict[str, Any]) -> Manifest:
    """Check the units, add them up, and write the manifest."""
    counts = {split: np.zeros(tokenizer.vocab_size, dtype=np.int64) for split in SPLITS}
    shards: dict[str, list] = {split: [] for split in SPLITS}
    lowest, highest, tally = 1.0, 0.0, Tally()
    for index, unit in enumerate(source.units):
        result = _load_result(folder, index, _unit_fingerprint(unit), tokenizer.vocab_size)
        assert result is not None, f"unit {index} was just finished"
        tally.add(result.tally)
        lowest, highest = min(lowest, result.lowest), max(highest, result.highest)
        for split, shard in result.shards.items():
            shards[split].append(shard)
            counts[split] += result.token_counts[split]
    has_separator = any(isinstance(unit, RecordsUnit) and unit.text_key is None for unit in source.units)
    if has_separator and not tally.separators:
        _discard(folder)
        raise DataError(
            "data.separator",
            source.settings["separator"],
            "must be what separates documents, and occurs nowhere in the text",
            "see what does (\\n, \\r and \\t in it stand for line ends and tabs), or leave it out",
        )
    if not shards["train"] or not shards["validation"]:
        _discard(folder)
        raise _empty_split(source, settings["validation_fraction"], bool(shards["train"]), lowest, highest, tally)
    splits = {
        split: SplitInfo(sum(s.num_documents for s in infos), sum(s.num_tokens for s in infos), infos)
        for split, infos in shards.items()
    }
    files = _tokenizer_files(tokenizer)
    manifest = Manifest(
        tokenizer={
            "spec": TOKENIZER_FILE if TOKENIZER_FILE in files else tokenizer.name,
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        settings=settings,
        dtype=token_dtype(tokenizer.vocab_size).name,
        splits=splits,
        max_token_id=max(
            int(np.flatnonzero(counts["train"] + counts["validation"])[-1]),
            *(shard.max_token_id or 0 for split in splits.values() for shard in split.shards),
        ),
        unigram_entropy_nats=unigram_cross_entropy(counts["train"], counts["validation"]),
        train_entropy_nats=entropy(counts["train"]),
        fingerprint=_stream_fingerprint(tokenizer, splits),
        tally=tally,
        tokenizer_files={name: sha256(files[name]).hexdigest() for name in sorted(files)},
    )
    for split in SPLITS:
        sync_folder(folder / split)
    manifest.save(folder)
    return manifest


def unigram_cross_entropy(train_counts: np.ndarray, validation_counts: np.ndarray) -> float:
    """Nats a validation token under p(t) = (train_count(t) + 1) / (num_train_tokens + vocab_size).

    Args:
        train_counts, validation_counts: int64 [vocab_size].
    """
    log_p = np.log(train_counts + 1.0) - math.log(train_counts.sum() + train_counts.size)
    return float(-(validation_counts @ log_p) / validation_counts.sum())


def entropy(counts: np.ndarray) -> float:
    """-sum f ln f of the frequencies f of `counts`, int64 [vocab_size], in nats."""
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies @ np.log(frequencies)))


def _stream_fingerprint(tokenizer: Tokenizer, splits: dict[str, SplitInfo]) -> str:
    digest = sha256(f"{tokenizer.fingerprint} eos={tokenizer.eos_id}".encode())
    for split in SPLITS:
        digest.update(split.encode())
        for shard in splits[split].shards:
            digest.update(bytes.fromhex(shard.tokens_sha256))
    return digest.hexdigest()


def _discard(folder: Path) -> None:
    """Take back what was prepared here. The settings go last: until then the folder is known as ours."""
    for name in (UNITS, *SPLITS):
        shutil.rmtree(folder / name)
    for name in (TOKENIZER_FILE, *CHAT_FILES):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / TEMPLATES, ignore_errors=True)
    (folder / SETTINGS).unlink()


def _empty_split(
    source: Source, fraction: float, has_train: bool, lowest: float, highest: float, tally: Tally
) -> DataError:
    if lowest > highest and tally.tokenless_documents:
        return DataError(
            "data.tokenizer",
            source.name,
            f"makes no token of any of the {tally.tokenless_documents:,} documents",
            "give a tokenizer that knows this text, or data.tokenizer=bytes",
        )
    if lowest > highest:
        return DataError("data", source.name, "has no text: all documents are empty", "give files with text")
    if lowest == highest:
        return DataError(
            "data",
            source.name,
            "has one document only, and validation needs one of its own",
            "give more files, or say what ends a document inside a file with data.separator (--separator)",
        )
    rule = f"leaves no document for {'validation' if has_train else 'training'}"
    suggestion = _fraction_between(lowest, highest, small=has_train)
    fix = f"set data.validation_fraction={suggestion} (--validation-fraction), or give more documents"
    return DataError("data.validation_fraction", fraction, rule, fix)


def _fraction_between(lowest: float, highest: float, small: bool) -> float:
    """A short number in (lowest, highest], where both splits get documents; near the lower or upper end."""
    for digits in range(1, 17):
        scale = 10**digits
        fraction = math.floor(lowest * scale + 1) / scale if small else math.floor(highest * scale) / scale
        if lowest < fraction <= highest:
            return fraction
    return highest
