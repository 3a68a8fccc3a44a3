"""Pickles that a stranger made: what is needed of them is read, and nothing they ask for is made."""

from __future__ import annotations

import collections
import os
import pickle
import resource
import struct
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import Training

from windlass.errors import ConfigError, CorruptCheckpoint, DoesNotFit, RunFolderError
from windlass.exchange import plain_pickle
from windlass.exchange.dcp import DcpFolder
from windlass.exchange.dcp_metadata import ADMITTED, METADATA, read_contents
from windlass.exchange.dcp_state import read_state
from windlass.exchange.plain_pickle import Refused, load

PLAIN: list[Any] = [
    {"a": [1, 2.5, None, True, False], "b": (), "c": ("x", (1, 2, 3, 4)), "ü": {}},
    [0, 255, 256, 65535, 65536, -1, -(2**31), 2**31, 2**62, -(2**63), 1e300],
    ("x" * 300, "y" * 70000, {("a", 1): 2}),
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", PLAIN)
def test_plain_data_are_read(value: Any, protocol: int) -> None:
    shared = [value, value]
    found = load(pickle.dumps(shared, protocol=protocol), {})
    assert found == shared and found[0] is found[1]


def test_sizes_and_ordered_dicts_are_plain() -> None:
    value = collections.OrderedDict(size=torch.Size((2, 3)), dtype=torch.bfloat16)
    assert load(pickle.dumps(value), ADMITTED) == {"size": (2, 3), "dtype": torch.bfloat16}


def tuples(depth: int) -> bytes:
    """A tuple of itself and itself, again and again: its hash takes 2^depth steps."""
    return b"K\x01" + b"q\x00h\x00\x86" * depth


BOMBS: dict[str, bytes] = {
    "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "long": b"\x80\x02\x8b\x00\x00\x00\x40" + b"\x01" * 100 + b".",
    "digits": b"\x80\x02L" + b"1" * 10**6 + b"L\n.",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b".",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62),
    "hash": b"\x80\x02}" + tuples(60) + b"Ns.",
    "hash in a set": b"\x80\x04\x8f(" + tuples(60) + b"\x90.",
    "copies": b"\x80\x02ctorch\nSize\nq\x00("
    + b"]"
    + b"("
    + b"N" * 10**5
    + b"eq\x01"
    + b"h\x00h\x01\x85R" * 10**5
    + b"t.",
    "wide key": b"\x80\x02}(" + b"(" + b"K\x01" * 10**5 + b"tq\x01" + b"N" + b"h\x01N" * 10**4 + b"u.",
    "deep": b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".",
    "deep tuples": b"\x80\x02N" + b"\x85" * 10**6 + b".",
    "marks": b"\x80\x02" + b"(" * 10**6 + b".",
    "nothing": b"",
    "no stop": b"\x80\x02N",
    "later protocol": b"\x80\x06N.",
    "unknown memo": b"\x80\x02h\x05.",
    "no items": b"\x80\x02t.",
    "key alone": b"\x80\x02}(Nu.",
    "list as key": b"\x80\x02}]Ns.",
    "build of a list": b"\x80\x02]Nb.",
    "call of a value": b"\x80\x02N)R.",
    "call with much": b"\x80\x02ctorch\nSize\n(" + b"N" * 100 + b"tR.",
    "bad utf-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "half a name": b"\x80\x02ctorch",
}


@contextmanager
def little_memory() -> Iterator[None]:
    """2 GiB more than there is now."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_do_not_go_off(kind: str, tmp_path: Path) -> None:
    (tmp_path / METADATA).write_bytes(BOMBS[kind])
    begin = time.process_time()
    with little_memory(), pytest.raises(CorruptCheckpoint):
        read_contents(tmp_path)
    assert time.process_time() - begin < 10


def test_entries_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_pickle, "MAX_OPS", 1000)
    assert load(b"\x80\x02" + b"]" * 998 + b".", {}) == []
    with pytest.raises(Refused, match="over 1,000 entries"):
        load(b"\x80\x02" + b"]" * 1000 + b".", {})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp") / "out"
    training = Training()
    training.run(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": training.model.state_dict(), "n": 3}, checkpoint_id=folder, no_dist=True)
    return folder


def with_metadata(folder: Path, exported: Path, data: bytes) -> DcpFolder:
    folder.mkdir(exist_ok=True)
    for path in exported.glob("*.distcp"):
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    (folder / METADATA).write_bytes(data)
    return DcpFolder(folder)


def test_one_list_of_parts_for_many_tensors_is_refused(exported: Path, tmp_path: Path) -> None:
    """A file of kilobytes would be weeks of work."""
    metadata = pickle.loads((exported / METADATA).read_bytes())
    entry = metadata.state_dict_metadata["model.0.weight"]
    entry.chunks = entry.chunks * 1000
    metadata.state_dict_metadata |= {f"model.{number}": entry for number in range(1000)}
    with pytest.raises(CorruptCheckpoint, match="more parts than it has places"):
        with_metadata(tmp_path / "in", exported, pickle.dumps(metadata))


def compressed(folder: Path) -> None:
    import zipfile

    path = next(folder.glob("*.distcp"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * (1 << 26))


@pytest.mark.parametrize("how", ["compressed", "longer", "older"])
def test_streams_are_no_longer_than_they_say(how: str, exported: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((exported / METADATA).read_bytes())
    folder = tmp_path / "in"
    folder.mkdir()
    (index,) = (index for index in metadata.storage_data if index.fqn == "model.0.weight")
    place = metadata.storage_data[index]
    path = folder / place.relative_path
    place.offset = 0
    if how == "compressed":
        path.touch()
        compressed(folder)
    elif how == "older":
        torch.save(torch.zeros(6, 4), path, _use_new_zipfile_serialization=False)
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    place.length = path.stat().st_size
    found = with_metadata(folder, exported, pickle.dumps(metadata))
    with little_memory(), pytest.raises(CorruptCheckpoint, match=r"model\.0\.weight cannot be read"):
        found.read_tensor("model.0.weight")


def shared(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value, value]
    return value


def test_a_value_that_is_itself_many_times_is_refused(tmp_path: Path) -> None:
    state = {"model": {"w": torch.zeros(2)}, "optimizer": {"param_groups": [{"lr": torch.zeros(0), "params": ["w"]}]}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    folder = DcpFolder(tmp_path / "dcp")
    for value in (shared(60), {"a": {1: 2}}, object(), [float("nan")] * 2_000_000):
        folder.read_tensor = lambda _, value=value: value  # type: ignore[method-assign]
        with pytest.raises(ConfigError, match="no plain value"):
            read_state(folder, "AdamW")


QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def fuzz(exported: Path, folder: Path, data: st.DataObject) -> None:
    """Changes some bytes of a table of contents, and reads all that it says is there."""
    text = bytearray((exported / METADATA).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position, num_removed = data.draw(st.integers(0, len(text) - 1)), data.draw(st.integers(0, 2))
        text[position : position + num_removed] = data.draw(st.binary(max_size=3))
    try:
        found = with_metadata(folder, exported, bytes(text))
        for name in found.contents.tensors:
            found.read_tensor(name)
        for name in found.contents.values:
            found.read_value(name)
        read_state(found, "AdamW")
    except (CorruptCheckpoint, ConfigError, DoesNotFit, RunFolderError) as error:
        assert str(error)


@pytest.mark.slow
@QUICK
@given(data=st.data())
def test_whatever_a_table_says_it_is_read_or_refused(
    exported: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    fuzz(exported, tmp_path_factory.mktemp("fuzz"), data)


@pytest.mark.soak
@settings(QUICK, max_examples=10_000)
@given(data=st.data())
def test_whatever_a_table_says_it_is_read_or_refused_for_long(
    exported: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    fuzz(exported, tmp_path_factory.mktemp("fuzz"), data)
