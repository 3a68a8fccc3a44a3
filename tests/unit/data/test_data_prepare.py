from __future__ import annotations

import base64
import fcntl
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from data_helpers import (
    InProcessPool,
    folder_bytes,
    jsonl_source,
    prepare_in_process,
    run_python,
    start_python,
    without_privileges,
    write_lossy_tokenizer,
    write_tokenizer,
)

from windlass.data import prepare as prepare_module
from windlass.data import shard_writer
from windlass.data.config import DataConfig, StdlibDataConfig, TextDataConfig, TokensDataConfig
from windlass.data.documents import FilesUnit
from windlass.data.manifest import Manifest, file_sha256
from windlass.data.outputs import refuse_inside
from windlass.data.prepare import (
    entropy,
    prepare,
    prepared_folder,
    unigram_cross_entropy,
)
from windlass.data.shards import TokenDataset
from windlass.data.sources import Source, list_files, text_source
from windlass.data.tally import Tally
from windlass.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from windlass.errors import ConfigError, DataError

NUM_UNITS = 200
PREPARE_SCRIPT = """
import sys
from pathlib import Path
from windlass.errors import WindlassError
from windlass.data.documents import FilesUnit
from windlass.data.prepare import prepare
from windlass.data.sources import Source, list_files
from windlass.data.tokenizer import ByteTokenizer
text, out = map(Path, sys.argv[1:3])
source = Source("many", {}, tuple(FilesUnit((file,), "strict") for file in list_files([text], "**/*")))
try:
    prepare(source, ByteTokenizer(), out, validation_fraction=0.3, num_workers=2)
except WindlassError as error:
    sys.exit(f"{type(error).__name__}: {error}")
assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def many_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(NUM_UNITS):
        (folder / f"{i:03d}.txt").write_text(f"file {i} " + "anchor " * (200 * (i % 7)))
    return folder


def many_units(folder: Path) -> Source:
    return Source("many", {}, tuple(FilesUnit((file,), "strict") for file in list_files([folder], "**/*")))


@pytest.fixture(scope="module")
def reference(many_files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("reference") / "out"
    prepare_in_process(many_units(many_files), folder)
    return folder_bytes(folder)


def wait_for(condition, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.002)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def num_finished(folder: Path) -> int:
    return len(list((folder / "units").glob("*.json")))


def test_a_user_without_a_home_is_told_to_name_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(ConfigError, match=r"HOME is not set\. Fix: set data\.cache_dir to a folder"):
        prepared_folder(StdlibDataConfig())


def test_documents_arrive_whole_in_order_and_in_their_split(tmp_path: Path) -> None:
    texts = [f"document {i} ünï" * (i % 5 + 1) for i in range(200)]
    source = jsonl_source(tmp_path / "a.jsonl", texts)
    manifest = prepare_in_process(source, tmp_path / "out")
    tokenizer = ByteTokenizer()
    found = {}
    for split in ("train", "validation"):
        dataset = TokenDataset(tmp_path / "out", split)
        tokens, _ = dataset.window(0, dataset.num_tokens)
        assert tokens[-1] == tokenizer.eos_id
        ends = np.flatnonzero(tokens == tokenizer.eos_id)
        found[split] = [tokenizer.decode(part) for part in np.split(tokens, ends + 1)[:-1]]
        assert len(found[split]) == dataset.num_documents == manifest.splits[split].num_documents
    assert sorted(found["train"] + found["validation"]) == sorted(texts)
    for documents in found.values():
        assert documents == [text for text in texts if text in set(documents)]
    assert len(found["validation"]) / 200 == pytest.approx(0.3, abs=0.13)


def test_manifest_says_what_is_there(tmp_path: Path) -> None:
    source = jsonl_source(tmp_path / "a.jsonl", [f"text number {i}" for i in range(50)])
    manifest = prepare_in_process(source, tmp_path / "out")
    assert Manifest.load(tmp_path / "out") == manifest
    tokens = {
        split: TokenDataset(tmp_path / "out", split).window(0, info.num_tokens)[0]
        for split, info in manifest.splits.items()
    }
    counts = np.bincount(tokens["train"], minlength=257)
    p = [(int(count) + 1) / (len(tokens["train"]) + 257) for count in counts]
    expected = -sum(math.log(p[t]) for t in tokens["validation"]) / len(tokens["validation"])
    assert manifest.unigram_entropy_nats == pytest.approx(expected, rel=1e-12)
    f = counts[counts > 0] / counts.sum()
    assert manifest.train_entropy_nats == pytest.approx(-(f * np.log(f)).sum(), rel=1e-12)
    assert manifest.max_token_id == 256
    assert manifest.dtype == "uint16"
    assert manifest.tokenizer == {"spec": "bytes", "name": "bytes", "fingerprint": ByteTokenizer.fingerprint,
                                  "vocab_size": 257, "eos_id": 256}  # fmt: skip
    for info in manifest.splits.values():
        for shard in info.shards:
            path = tmp_path / "out" / shard.file
            assert (shard.num_bytes, shard.sha256) == (path.stat().st_size, file_sha256(path))


def test_entropies_of_known_distributions() -> None:
    assert entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))
    assert entropy(np.array([0, 9])) == 0
    assert unigram_cross_entropy(np.array([2, 0]), np.array([3, 1])) == pytest.approx(
        -(3 * math.log(3 / 4) + math.log(1 / 4)) / 4
    )


def test_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(30)]
    fingerprints = []
    for place, time_ns in (("x", 1), ("y", 2)):
        (tmp_path / place).mkdir()
        jsonl_source(tmp_path / place / "a.jsonl", texts)
        os.utime(tmp_path / place / "a.jsonl", ns=(time_ns, time_ns))
        source = text_source([tmp_path / place])
        fingerprints.append(prepare_in_process(source, tmp_path / place / "out").fingerprint)
    assert fingerprints[0] == fingerprints[1]
    other = prepare_in_process(jsonl_source(tmp_path / "b.jsonl", [*texts, "more"]), tmp_path / "other")
    assert other.fingerprint != fingerprints[0]


def test_batches_hold_whole_documents_and_a_long_one_stands_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "BATCH_TOKENS", 100)
    texts = ["a" * 39] * 7 + ["b" * 1000] + ["c" * 9] * 3
    manifest = prepare_in_process(jsonl_source(tmp_path / "a.jsonl", texts), tmp_path / "out", fraction=0.1)
    batches = {s: [n for shard in info.shards for n in shard.batch_num_tokens] for s, info in manifest.splits.items()}
    assert sum(map(sum, batches.values())) == sum(len(t) + 1 for t in texts)
    assert 1001 in batches["train"]
    assert all(n <= 100 or n == 1001 for n in batches["train"])


def test_hugging_face_tokenizer_travels_with_the_folder(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(write_tokenizer(tmp_path))
    source = jsonl_source(tmp_path / "a.jsonl", [f"the windlass lifts anchor {i}" for i in range(30)])
    manifest = prepare(source, tokenizer, tmp_path / "out", validation_fraction=0.3, num_workers=1, progress=False)
    dataset = TokenDataset(tmp_path / "out", "train")
    copy = HuggingFaceTokenizer(dataset.tokenizer_spec)
    assert copy.path == tmp_path / "out" / "tokenizer.json"
    assert copy.fingerprint == manifest.tokenizer["fingerprint"]
    first = np.flatnonzero(dataset.window(0, dataset.num_tokens)[0] == dataset.eos_id)[0]
    assert copy.decode(dataset.window(0, int(first))[0]).startswith("the windlass lifts anchor ")


class WideTokenizer(ByteTokenizer):
    """Ids that need 32 bits."""

    name, vocab_size, eos_id, fingerprint = "wide", 70_001, 70_000, "wide"

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [ids.astype(np.int64) + 65_500 for ids in super().encode(texts)]


def test_vocabularies_over_65536_take_uint32(tmp_path: Path) -> None:
    source = jsonl_source(tmp_path / "a.jsonl", ["abc"] * 20)
    manifest = prepare_in_process(source, tmp_path / "out", tokenizer=WideTokenizer())
    dataset = TokenDataset(tmp_path / "out", "train")
    assert (manifest.dtype, dataset.dtype) == ("uint32", np.uint32)
    assert dataset.window(0, 4)[0].tolist() == [65_597, 65_598, 65_599, 70_000]
    assert manifest.max_token_id == 70_000


def test_tokenizer_that_breaks_its_word(tmp_path: Path) -> None:
    tokenizer = WideTokenizer()
    source = jsonl_source(tmp_path / "a.jsonl", ["abc"] * 20)
    tokenizer.eos_id, tokenizer.vocab_size = 999, 1000
    with pytest.raises(ConfigError, match=r"ids 65597 to 65599: must return ids below its vocab_size=1000"):
        prepare_in_process(source, tmp_path / "out", tokenizer=tokenizer)
    tokenizer.eos_id = 1000
    with pytest.raises(ConfigError, match=r"its eos_id=1000 must be below its vocab_size=1000"):
        prepare_in_process(source, tmp_path / "other", tokenizer=tokenizer)


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_processes(
    many_files: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    result = run_python(PREPARE_SCRIPT, many_files, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "100%" in result.stderr
    assert folder_bytes(tmp_path / "out") == reference


@pytest.mark.slow
@pytest.mark.parametrize(
    "sign", [signal.SIGKILL, *(pytest.param(sign, marks=pytest.mark.full) for sign in (signal.SIGTERM, signal.SIGINT))]
)
def test_killed_at_any_time_it_goes_on_to_the_same_bytes(
    many_files: Path, reference: dict[str, bytes], tmp_path: Path, sign: signal.Signals
) -> None:
    out, rng, num_kills = tmp_path / "out", random.Random(int(sign)), 0
    finished: dict[Path, int] = {}

    def interrupt(num_units: int) -> str:
        """Send the signal when `num_units` more are finished. Returns what the process wrote to stderr."""
        nonlocal num_kills
        target = num_finished(out) + num_units
        process = start_python(PREPARE_SCRIPT, many_files, out, start_new_session=True)
        wait_for(lambda: num_finished(out) >= target or process.poll() is not None)
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        if sign == signal.SIGINT:
            os.killpg(process.pid, sign)  # as a terminal does
        else:
            process.send_signal(sign)
        _, stderr = process.communicate(timeout=20)
        num_kills += process.returncode != 0
        wait_for(lambda: not any(map(is_alive, workers)), timeout_s=5)
        return stderr

    for _ in range(3):
        stderr = interrupt(rng.randint(1, NUM_UNITS // 8))
        if sign == signal.SIGINT and not (out / "manifest.json").exists():
            assert stderr.count("KeyboardInterrupt") == 1, "of the parent; the workers say nothing"
            assert not list(out.rglob("*.tmp"))
        again = {path: path.stat().st_mtime_ns for path in out.glob("*/*.arrow")}
        assert {path: again[path] for path in finished} == finished, "finished units are not done again"
        done = {f"{path.stem}.arrow" for path in (out / "units").glob("*.json")}
        finished = {path: mtime for path, mtime in again.items() if path.name in done}
    assert num_kills >= 2, "killed in the middle"
    result = run_python(PREPARE_SCRIPT, many_files, out)
    assert result.returncode == 0, result.stderr
    assert folder_bytes(out) == reference


@pytest.mark.slow
def test_a_unit_whose_shard_is_cut_off_is_done_again(many_files: Path, tmp_path: Path, reference) -> None:
    out = tmp_path / "out"
    prepare_in_process(many_units(many_files), out)
    (out / "manifest.json").unlink()
    victim = sorted(out.glob("train/*.arrow"))[3]
    victim.write_bytes(victim.read_bytes()[:-8])
    (out / "units" / "000005.json").write_text('{"unit":')
    (out / "train" / "000001.arrow.77.tmp").touch()
    prepare_in_process(many_units(many_files), out)
    assert folder_bytes(out) == reference


@pytest.mark.slow
def test_a_unit_that_is_of_other_text_is_done_again(many_files: Path, tmp_path: Path, reference) -> None:
    out = tmp_path / "out"
    prepare_in_process(many_units(many_files), out)
    (out / "manifest.json").unlink()
    for shard in out.glob("*/000002.arrow"):
        shutil.copy(shard, shard.with_name("000004.arrow"))
    sidecar = (out / "units" / "000002.json").read_text()
    (out / "units" / "000004.json").write_text(sidecar.replace("000002", "000004"))
    prepare_in_process(many_units(many_files), out)
    assert folder_bytes(out) == reference


@pytest.mark.slow
def test_two_at_once_share_the_work(many_files: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # enough to hold off who wants it alone
        both = [start_python(PREPARE_SCRIPT, many_files, out) for _ in range(2)]
        for process in both:
            assert process.stderr is not None
            assert "waiting for another process that prepares" in process.stderr.readline()
    outputs = [process.communicate(timeout=30)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted("tokenising" in stderr for stderr in outputs) == [False, True], "one works, the other finds it done"
    assert folder_bytes(out) == reference


def test_finished_folder_is_found_even_if_read_only(tmp_path: Path) -> None:
    source = jsonl_source(tmp_path / "a.jsonl", [f"text {i}" for i in range(20)])
    first = prepare_in_process(source, tmp_path / "out")
    (tmp_path / "out" / ".lock").unlink()
    again = prepare(source, ByteTokenizer(), tmp_path / "out", validation_fraction=0.3)
    assert again == first
    assert not (tmp_path / "out" / ".lock").exists(), "nothing was written"


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    source = jsonl_source(tmp_path / "a.jsonl", [f"text {i}" for i in range(20)])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"--out=.*foreign: must be empty or new; it holds thesis\.tex \(1 in all\)"):
        prepare_in_process(source, foreign)
    assert folder_bytes(foreign) == {"thesis.tex": b"years of work"}
    (foreign / "thesis.tex").rename(foreign / "settings.json")
    with pytest.raises(ConfigError, match=r"its settings\.json was not written by windlass: it is not JSON"):
        prepare_in_process(source, foreign)
    with pytest.raises(ConfigError, match=r"cannot be made a folder"):
        prepare_in_process(source, foreign / "settings.json" / "out")


def test_other_settings_or_input_are_refused(tmp_path: Path) -> None:
    source = jsonl_source(tmp_path / "a.jsonl", [f"text {i}" for i in range(20)])
    prepare_in_process(source, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"other settings: validation_fraction differ\. Fix: choose another folder"):
        prepare_in_process(source, tmp_path / "out", fraction=0.4)
    with pytest.raises(ConfigError, match=r"tokenizer differ"):
        prepare_in_process(source, tmp_path / "out", tokenizer=WideTokenizer())
    with pytest.raises(ConfigError, match=r"input_files differ"):
        prepare_in_process(jsonl_source(tmp_path / "a.jsonl", ["other"] * 20), tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == before


def test_a_split_without_documents_says_which_fraction_would_do(tmp_path: Path) -> None:
    source = jsonl_source(tmp_path / "a.jsonl", [f"text {i}" for i in range(4)])
    for fraction, side in ((1e-6, "validation"), (1 - 1e-6, "training")):
        with pytest.raises(DataError, match=rf"leaves no document for {side}") as caught:
            prepare_in_process(source, tmp_path / "out", fraction=fraction)
        suggested = float(caught.value.fix.split("=")[1].split(" ")[0])
        assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / ".lock"], "nothing stays in the way"
        prepare_in_process(source, tmp_path / side, fraction=suggested)
    prepare_in_process(source, tmp_path / "out", fraction=suggested)


def test_too_few_documents(tmp_path: Path) -> None:
    one = jsonl_source(tmp_path / "a.jsonl", ["only one"])
    with pytest.raises(DataError, match=r"has one document only.*data\.separator"):
        prepare_in_process(one, tmp_path / "out")
    with pytest.raises(DataError, match=r"all documents are empty"):
        prepare_in_process(jsonl_source(tmp_path / "a.jsonl", ["", ""]), tmp_path / "out")


def test_errors_in_a_worker_reach_the_parent_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: must be UTF-8 text, and is not at byte 25") as caught:
        prepare(text_source([tmp_path / "a.jsonl"]), ByteTokenizer(), tmp_path / "out",
                validation_fraction=0.3, progress=False)  # fmt: skip
    assert caught.value.key == "data.path"
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.slow
def test_file_size_limit_then_resume(tmp_path: Path, many_files: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    limit = (resource.RLIMIT_FSIZE, (6000, 6000))
    result = run_python(PREPARE_SCRIPT, many_files, out, preexec_fn=lambda: resource.setrlimit(*limit))
    assert result.returncode == 1
    assert f"DataError: prepared folder={out}: a shard is larger than files may be here" in result.stderr
    assert "Traceback" not in result.stderr
    result = run_python(PREPARE_SCRIPT, many_files, out)
    assert result.returncode == 0, result.stderr
    assert folder_bytes(out) == reference


@pytest.mark.slow
def test_full_disk_then_resume(tmp_path: Path, many_files: Path, reference: dict[str, bytes]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        result = run_python(PREPARE_SCRIPT, many_files, disk / "out")
        assert result.returncode == 1
        assert f"DataError: prepared folder={disk / 'out'}: the disk is full (No space left" in result.stderr
        assert "goes on where it stopped" in result.stderr
        assert num_finished(disk / "out") > 0
        assert not list(disk.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        result = run_python(PREPARE_SCRIPT, many_files, disk / "out")
        assert result.returncode == 0, result.stderr
        assert folder_bytes(disk / "out") == reference
    finally:
        subprocess.run(["umount", disk], check=True)


def test_folder_without_write_permission(tmp_path: Path) -> None:
    source = jsonl_source(tmp_path / "a.jsonl", [f"text {i}" for i in range(20)])
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        with (
            without_privileges(),
            pytest.raises(ConfigError, match=r"out: cannot be made a folder \(Permission denied\)"),
        ):
            prepare_in_process(source, Path(name) / "out")
        (Path(name) / "out").mkdir(mode=0o555)
        with without_privileges(), pytest.raises(DataError, match=r"cannot be written to \(Permission denied\)"):
            prepare_in_process(source, Path(name) / "out")


def test_prepared_folder_is_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, cache = tmp_path / "text", tmp_path / "cache"
    text.mkdir()
    for i in range(12):
        (text / f"{i}.txt").write_text(f"text {i}")
    cfg = TextDataConfig(path=str(text), cache_dir=str(cache), validation_fraction=0.3, num_workers=1)
    folder = prepared_folder(cfg, progress=False)
    assert folder.parent == cache
    assert folder.name.startswith("text-")
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "WorkerPool", None)  # would fail if anything were tokenised
        assert prepared_folder(cfg, progress=False) == folder
        assert prepared_folder(TokensDataConfig(path=str(folder))) == folder
    (text / "0.txt").write_text("other text")
    changed = prepared_folder(cfg, progress=False)
    assert changed != folder
    assert Manifest.load(changed).fingerprint != Manifest.load(folder).fingerprint


def test_files_that_differ_in_content_alone_share_no_cache(tmp_path: Path) -> None:
    """Equal names, sizes and times, in two folders and in one after the other."""
    folders = []
    for name, text in (("a", "first"), ("b", "other"), ("a", "third")):
        (tmp_path / name).mkdir(exist_ok=True)
        for i in range(12):
            (tmp_path / name / f"{i}.txt").write_text(f"{text} {i}")
            os.utime(tmp_path / name / f"{i}.txt", ns=(7, 7))
        cfg = TextDataConfig(path=str(tmp_path / name), cache_dir=str(tmp_path / "cache"), validation_fraction=0.3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare_module, "WorkerPool", InProcessPool)
            folders.append(prepared_folder(cfg, progress=False))
    assert len({TokenDataset(folder, "train").fingerprint for folder in folders}) == 3


def test_what_becomes_of_text_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Characters that the tokenizer has no token for, documents of only such, and documents without text."""
    tokenizer = HuggingFaceTokenizer(write_lossy_tokenizer(tmp_path))
    texts = ["ab ba", "aéb", "你好", "", "   "] * 10
    manifest = prepare_in_process(jsonl_source(tmp_path / "a.jsonl", texts), tmp_path / "out", tokenizer=tokenizer)
    expected = Tally(
        characters=130,
        empty_documents=10,
        tokenless_documents=20,
        dropped_characters=30,  # the é, and 你 and 好
    )
    assert manifest.tally == Manifest.load(tmp_path / "out").tally == expected
    for split in ("train", "validation"):
        dataset = TokenDataset(tmp_path / "out", split)
        tokens, _ = dataset.window(0, dataset.num_tokens)
        assert (
            tokens[0] != dataset.eos_id and not ((tokens[1:] == dataset.eos_id) & (tokens[:-1] == dataset.eos_id)).any()
        )
    assert sum(split.num_documents for split in manifest.splits.values()) == 20
    prepared_folder(TokensDataConfig(path=str(tmp_path / "out")))
    said = capsys.readouterr().err
    assert "10 documents without text were left out" in said
    assert "20 documents were left out: the tokenizer makes no token" in said
    assert "30 of 130 characters were left out" in said


def test_a_text_that_no_token_is_made_of(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(write_lossy_tokenizer(tmp_path))
    with pytest.raises(DataError, match=r"data\.tokenizer=text: makes no token of any of the 2 documents"):
        prepare_in_process(jsonl_source(tmp_path / "a.jsonl", ["你", "好"]), tmp_path / "out", tokenizer=tokenizer)


def test_a_separator_that_never_occurs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(9):
        (tmp_path / "in" / f"{i}.txt").write_text(f"one paragraph {i}\n")
    with pytest.raises(DataError, match=r"data\.separator='\\n\\n': must be what separates documents, and occurs now"):
        prepare_in_process(text_source([tmp_path / "in"], separator="\\n\\n"), tmp_path / "out")
    assert not (tmp_path / "out" / "settings.json").exists()


def test_a_sidecar_of_a_stranger_is_done_again(tmp_path: Path) -> None:
    source = jsonl_source(tmp_path / "a.jsonl", [f"text {i}" for i in range(20)])
    prepare_in_process(source, tmp_path / "out")
    reference = folder_bytes(tmp_path / "out")
    sidecar = tmp_path / "out" / "units" / "000000.json"
    good = json.loads(sidecar.read_text())
    bomb = base64.b64encode(zlib.compress(bytes(1 << 26), 9)).decode()
    for change in (
        "[" * 100_000,
        good | {"lowest": "0"},
        good | {"token_counts": {"train": bomb, "validation": bomb}},
        good | {"shards": {"train": good["shards"]["train"] | {"file": "../../elsewhere"}}},
        good | {"shards": {"train": good["shards"]["train"] | {"tokens_sha256": "zz"}}},
    ):
        (tmp_path / "out" / "manifest.json").unlink()
        sidecar.write_text(change if isinstance(change, str) else json.dumps(change))
        prepare_in_process(source, tmp_path / "out")
        assert folder_bytes(tmp_path / "out") == reference


def test_default_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_prepare(source: Source, tokenizer: Tokenizer, folder: Path, **kwargs: object) -> SimpleNamespace:
        folders.append(folder)
        return SimpleNamespace(tally=Tally())

    monkeypatch.setattr(prepare_module, "prepare", fake_prepare)
    folders: list[Path] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prepared_folder(StdlibDataConfig()).parent == tmp_path / "windlass"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepared_folder(StdlibDataConfig()).parent == tmp_path / ".cache" / "windlass"
    assert len(folders) == 2
    assert folders[0].name.startswith("stdlib-")


def test_prepared_folder_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path=\?\?\?: must name a prepared folder"):
        prepared_folder(TokensDataConfig())
    with pytest.raises(DataError, match=r"must be a folder that `windlass data prepare` wrote"):
        prepared_folder(TokensDataConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"has no source"):
        prepared_folder(DataConfig())
    (tmp_path / "a.txt").write_text("text")
    cfg = TextDataConfig(path=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*cache/text-.*: must not lie inside the input"):
        prepared_folder(cfg)
    refuse_inside(tmp_path / "beside", [tmp_path / "input"], "--out")


def test_manifest_of_another_format(tmp_path: Path, make_folder) -> None:
    folder = make_folder([f"text {i}" for i in range(20)])
    path = folder / "manifest.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"format": "tar"}, r"was not written by windlass"),
        ({"format_version": 9}, r"has format version 9; this windlass reads version 1"),
        ({"splits": {"train": {}}}, r"manifest\.json: cannot be used: `splits\.train\.num_documents` is missing"),
        ({"dtype": "float32"}, r"`dtype` is 'float32'"),
        ({"tokenizer": good["tokenizer"] | {"vocab_size": 1 << 40}}, r"impossible ids"),
        ({"tokenizer": good["tokenizer"] | {"eos_id": "7"}}, r"`tokenizer\.eos_id` is '7', not an integer"),
        ({"splits": good["splits"] | {"test": good["splits"]["train"]}}, r"`splits` are not train and validation"),
        ({"splits": good["splits"] | {"train": good["splits"]["train"] | {"num_tokens": 9}}}, r"does not add up"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(DataError, match=message):
            Manifest.load(folder)
    path.write_text("{")
    with pytest.raises(DataError, match=r"is not JSON"):
        Manifest.load(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"its preparation was interrupted.*run the same `windlass data prepare` again"):
        Manifest.load(folder)
    path.mkdir()
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        Manifest.load(folder)
