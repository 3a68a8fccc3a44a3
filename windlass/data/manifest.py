"""The files of a prepared folder: their names, what the JSON ones say, and writing them so that no crash
leaves half.

```
manifest.json               written last: the folder is complete and sound
settings.json               written first: what is prepared here, and how
train/000007.arrow          a shard: the training documents of unit 7
validation/000007.arrow
units/000007.json           written after the shards of unit 7: it is done
tokenizer.json              the Hugging Face tokenizer, if that is what was used
.lock                       held by the process that prepares
```

Torch-free.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from windlass.data.tally import Tally
from windlass.data.tokenizer import MAX_VOCAB_SIZE
from windlass.errors import DataError
from windlass.files import TEMPORARY_SUFFIX, atomic_file, sync_folder
from windlass.text import command
from windlass.untrusted import Malformed, convert, read_json

FORMAT = "windlass-tokens"
FORMAT_VERSION = 1
SPLITS = ("train", "validation")
MANIFEST, SETTINGS, UNITS, LOCK = "manifest.json", "settings.json", "units", ".lock"
TOKENIZER_FILE = "tokenizer.json"
TOKEN_BYTES = {"uint16": 2, "uint32": 4}
SHA256 = re.compile("[0-9a-f]{64}")
SHARD_FILE = re.compile(r"(train|validation)/\d{6,}\.arrow")


@dataclass(frozen=True)
class ShardInfo:
    """One Arrow file. `tokens_sha256` is over the documents alone, whatever version of Arrow wrote them."""

    file: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    sha256: str
    tokens_sha256: str
    batch_num_tokens: list[int]
    """Tokens in each record batch, so that a position is found without opening the shard."""
    num_targets: int | None = None
    """Tokens that are learned, of which the shard has a column; null: it has none, and all of them are."""
    max_token_id: int | None = None
    """The largest token, where the manifest's frequencies are those of targets alone."""


@dataclass(frozen=True)
class SplitInfo:
    num_documents: int
    num_tokens: int
    shards: list[ShardInfo]

    @property
    def num_targets(self) -> int | None:
        """Tokens that are learned; None: all of them."""
        counts = [shard.num_targets for shard in self.shards if shard.num_targets is not None]
        return sum(counts) if counts else None


@dataclass(frozen=True)
class TokenizerInfo:
    """As a manifest has it of the tokenizer; see `Manifest`."""

    spec: str
    name: str
    fingerprint: str
    vocab_size: int
    eos_id: int


@dataclass(frozen=True)
class Manifest:
    """The content of a prepared folder.

    Args:
        tokenizer: `spec` (`bytes`, or `tokenizer.json` in this folder), `name`, `fingerprint`, `vocab_size`,
            `eos_id`.
        settings: as `settings.json`.
        unigram_entropy_nats: cross entropy in nats a target of the validation split under the training split's
            unigram frequencies with add-one smoothing, p(t) = (count(t) + 1) / (num_tokens + vocab_size). A
            model that ignores all context can do no better than about this.
        train_entropy_nats: entropy of the training split's unigram frequencies, -sum f(t) ln f(t).
        fingerprint: hash over the tokenizer and the documents of both splits as they follow each other. Equal
            fingerprints mean equal token streams, also where the text was prepared on another machine.
        tally: of what was read and left out. All zero in folders that older versions prepared.
    """

    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    dtype: str
    splits: dict[str, SplitInfo]
    max_token_id: int
    unigram_entropy_nats: float
    train_entropy_nats: float
    fingerprint: str
    tally: Tally = field(default_factory=Tally)
    tokenizer_files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file of the tokenizer of conversations, by its name in this folder."""
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def save(self, folder: Path) -> None:
        write_json(folder / MANIFEST, asdict(self))

    @staticmethod
    def load(folder: Path) -> Manifest:
        """The manifest of `folder`. Raises DataError if there is none, or none that this version reads."""
        data = _read_manifest(folder)
        try:
            manifest = convert(data, Manifest)
            convert(manifest.tokenizer, TokenizerInfo, "tokenizer")
            _check(manifest)
        except Malformed as error:
            raise _broken(folder, f"cannot be used: {error}") from None
        return manifest


def _check(manifest: Manifest) -> None:
    """Raises Malformed if the numbers of a manifest contradict each other, or bounds of what is written."""

    def require(holds: bool, rule: str) -> None:
        if not holds:
            raise Malformed(rule)

    vocab_size, eos_id = manifest.tokenizer["vocab_size"], manifest.tokenizer["eos_id"]
    require(manifest.dtype in TOKEN_BYTES, f"`dtype` is {manifest.dtype[:20]!r}, not {' or '.join(TOKEN_BYTES)}")
    token_bytes = TOKEN_BYTES[manifest.dtype]
    require(0 <= eos_id < vocab_size <= min(MAX_VOCAB_SIZE, 1 << 8 * token_bytes), "`tokenizer` has impossible ids")
    require(0 <= manifest.max_token_id < vocab_size, "`max_token_id` is no id of the tokenizer")
    require(manifest.splits.keys() == set(SPLITS), f"`splits` are not {' and '.join(SPLITS)}")
    for name, split in manifest.splits.items():
        for i, shard in enumerate(split.shards):
            check_shard(shard, token_bytes, f"splits.{name}.shards[{i}]")
        require(sum(shard.num_tokens for shard in split.shards) == split.num_tokens, f"`splits.{name}` does not add up")
    has_targets = {shard.num_targets is not None for split in manifest.splits.values() for shard in split.shards}
    require(len(has_targets) <= 1, "`splits` have targets in some shards only")


def check_shard(shard: ShardInfo, token_bytes: int, where: str) -> None:
    """Raises Malformed if what is said of a shard is impossible."""
    rules = {
        "is no file of a split": SHARD_FILE.fullmatch(shard.file) is not None,
        "has no checksums": all(map(SHA256.fullmatch, (shard.sha256, shard.tokens_sha256))),
        "has a record batch without tokens": min(shard.batch_num_tokens, default=0) > 0,
        "does not add up": sum(shard.batch_num_tokens) == shard.num_tokens,
        # Each document has the token that ends it.
        "has an impossible number of documents": 0 < shard.num_documents <= shard.num_tokens,
        "has more tokens than bytes": shard.num_tokens * token_bytes <= shard.num_bytes,
        "has an impossible number of targets": 0 <= (shard.num_targets or 0) <= shard.num_tokens,
    }
    for rule, holds in rules.items():
        if not holds:
            raise Malformed(f"`{where}` {rule}")


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        data = read_json(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise _no_manifest(folder) from None
    except OSError as error:
        raise DataError(
            "data.path", folder / MANIFEST, f"cannot be read ({error.strerror})", "mend that and start again"
        ) from None
    except Malformed as error:
        raise _broken(folder, f"cannot be used: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DataError(
            "data.path",
            folder,
            f"its {MANIFEST} was not written by windlass",
            "give the folder that `windlass data prepare --out` wrote",
        )
    if data.get("format_version") != FORMAT_VERSION:
        raise DataError(
            "data.path",
            folder,
            f"has format version {str(data.get('format_version'))[:20]}; this windlass reads version {FORMAT_VERSION}",
            "prepare the text again with this version of windlass",
        )
    return data


def _no_manifest(folder: Path) -> DataError:
    if (folder / SETTINGS).exists():
        return DataError(
            "data.path",
            folder,
            "its preparation was interrupted and is not complete",
            "run the same `windlass data prepare` again: it goes on where it stopped",
        )
    return DataError(
        "data.path",
        folder,
        f"must be a folder that `windlass data prepare` wrote (it has no {MANIFEST})",
        f"{command('windlass', 'data', 'prepare', 'TEXT', '--out', folder)}; or train on text itself with data=text",
    )


def _broken(folder: Path, rule: str) -> DataError:
    fix = "delete the folder and prepare the text again"
    return DataError("data.path", folder / MANIFEST, rule, fix)


def shard_file(split: str, unit_index: int) -> str:
    return f"{split}/{unit_index:06d}.arrow"


def unit_file(unit_index: int) -> str:
    return f"{UNITS}/{unit_index:06d}.json"


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content, read in blocks."""
    digest = sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, data: object) -> None:
    """Write `path` as a whole or not at all, durably."""
    with atomic_file(path) as stream:
        stream.write(json.dumps(data, indent=1, sort_keys=True).encode() + b"\n")
    sync_folder(path.parent)


def remove_temporaries(folder: Path) -> None:
    """Removes what processes that were killed left half-written."""
    for subfolder in (folder, folder / UNITS, *(folder / split for split in SPLITS)):
        for path in subfolder.glob(f"*{TEMPORARY_SUFFIX}"):
            path.unlink(missing_ok=True)
