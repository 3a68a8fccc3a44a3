"""Manifests that a stranger wrote, with a checksum that holds: one message each, from whatever reads them."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import Training, own_chunk

from windlass.checkpoint import inspect
from windlass.checkpoint.durable.manifest import FORMAT, MANIFEST, VERSION, Manifest, _digest
from windlass.checkpoint.durable.reader import open_checkpoint
from windlass.errors import CorruptCheckpoint, IncompatibleCheckpoint, RunFolderError, WindlassError
from windlass.parallel.mesh import Mesh

Body = dict[str, Any]
NAME = "model.0.weight"
ANY = ("list", "verify", "load")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, mesh: Mesh) -> Path:
    folder = tmp_path_factory.mktemp("base")
    training = Training()
    training.run(2)
    training.checkpointer(folder, mesh).save(2)
    return folder


def craft(base: Path, folder: Path, change: Callable[[Body], Any]) -> Path:
    """The checkpoint with another manifest; its chunks are those of `base`."""
    checkpoint = folder / "step-00000002"
    checkpoint.mkdir(parents=True, exist_ok=True)
    if not (folder / "chunks").exists():
        (folder / "chunks").symlink_to(base / "chunks")
    body = json.loads((base / "step-00000002" / MANIFEST).read_bytes())["body"]
    change(body)
    document = {"format": FORMAT, "version": VERSION, "sha256": _digest(VERSION, body), "body": body}
    (checkpoint / MANIFEST).write_text(json.dumps(document))
    return checkpoint


def part(body: Body) -> Body:
    return body["tensors"][NAME]["fragments"][0]


def of_part(**changes: Any) -> Callable[[Body], None]:
    return lambda body: part(body).update(changes)


def of_tensor(**changes: Any) -> Callable[[Body], None]:
    return lambda body: body["tensors"][NAME].update(changes)


def of_body(**changes: Any) -> Callable[[Body], None]:
    return lambda body: body.update(changes)


def shift(body: Body) -> None:
    size = body["chunks"][part(body)["chunk"]]
    part(body).update(begin=part(body)["begin"] - size, end=part(body)["end"] - size)


def half_twice(body: Body) -> None:
    entry = part(body)
    rows, columns = entry["shape"]
    half = {**entry, "shape": [rows // 2, columns], "end": (entry["begin"] + entry["end"]) // 2}
    body["tensors"][NAME]["fragments"] = [half, dict(half)]


def giant(body: Body) -> None:
    of_tensor(shape=[2**29, 2**29])(body)
    of_part(shape=[2**29, 2**29])(body)


def in_chunk(name: str) -> Callable[[Body], None]:
    def change(body: Body) -> None:
        body["chunks"][name] = 10**6
        part(body)["chunk"] = name

    return change


def optimizer(**changes: Any) -> Callable[[Body], None]:
    return lambda body: body["objects"]["optimizer"].update(changes)


MANIFESTS: dict[str, Callable[[Body], Any]] = {
    "offsets from the end": shift,
    "half twice": half_twice,
    "outside": of_part(offset=[10**6, 0]),
    "negative offset": of_part(offset=[-1, 0]),
    "negative shape": of_tensor(shape=[-4, -4]),
    "giant shape": giant,
    "another rank": of_part(offset=[0]),
    "function of torch": of_tensor(dtype="load"),
    "unknown dtype": of_tensor(dtype="nope"),
    "longer dtype": of_tensor(dtype="float64"),
    "number for a dtype": of_tensor(dtype=7),
    "path in a chunk": in_chunk("../../../../../etc/passwd"),
    "absolute chunk": in_chunk("/etc/passwd"),
    "capitals in a chunk": in_chunk("AB" * 32),
    "unlisted chunk": of_part(chunk="0" * 64),
    "number for a chunk": of_part(chunk=3),
    "float begin": of_part(begin=0.5),
    "nan begin": of_part(begin=float("nan")),
    "text begin": of_part(begin="0"),
    "true begin": of_part(begin=True),
    "more keys": of_part(more=1),
    "nan step": of_body(step=float("nan")),
    "escapes in step": of_body(step="x\x1b]0;pwn\x07"),
    "other step": of_body(step=7),
    "negative step": of_body(step=-1),
    "giant step": of_body(step=10**30),
    "huge time": of_body(time=1e300),
    "text time": of_body(time="x"),
    "no run": lambda body: body.pop("run"),
    "other kind of run": of_body(run="../x"),
    "list of objects": of_body(objects=[]),
    "list of tensors": of_body(tensors=[]),
    "list of chunks": of_body(chunks=[]),
    "text for a size": lambda body: body["chunks"].update(dict.fromkeys(body["chunks"], "x")),
    "negative ranks": of_body(world_size=-1),
    "surrogate name": lambda body: body["tensors"].update({"model.\ud800": body["tensors"][NAME]}),
    "escape in a name": lambda body: body["tensors"].update({"model.\x1b[2J": body["tensors"][NAME]}),
    "generators of floats": lambda body: body["tensors"].update({"rng.0.torch_cpu": body["tensors"][NAME]}),
    "no groups": optimizer(param_groups=None),
    "groups without names": optimizer(param_groups=[{"lr": 1}]),
    "list of numbers": optimizer(numbers=[]),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_each_is_one_message_from_all_that_read(kind: str, base: Path, tmp_path: Path, mesh: Mesh) -> None:
    checkpoint = craft(base, tmp_path, MANIFESTS[kind])
    with pytest.raises(CorruptCheckpoint) as caught:
        Training(5).checkpointer(tmp_path / "own", mesh).restore(checkpoint)
    (row,), (result,) = inspect.list_checkpoints(checkpoint), inspect.verify(checkpoint)
    assert row.problem is not None and not result.is_sound
    for text in (str(caught.value), inspect.render_list([row], False), inspect.render_verification([result], False)):
        assert "\x1b" not in text and len(text) < 2000


def test_bytes_of_another_tensor_are_found_by_verify_and_load(base: Path, tmp_path: Path, mesh: Mesh) -> None:
    """The chunk itself says what is where."""

    def swap(body: Body) -> None:
        other = body["tensors"][f"optimizer.state.{NAME}.exp_avg"]["fragments"][0]
        part(body).update({key: other[key] for key in ("chunk", "begin", "end")})

    checkpoint = craft(base, tmp_path, swap)
    (result,) = inspect.verify(checkpoint)
    assert [problem for problem in result.problems if f"has no {NAME} of float32" in problem]
    with pytest.raises(CorruptCheckpoint, match=f"has no {NAME} of float32"):
        Training(5).checkpointer(tmp_path / "own", mesh).restore(checkpoint)


@pytest.mark.parametrize(
    ("name", "value"),
    [("counter", None), ("counter", {}), ("rng", None), ("optimizer", {"state": {}}), ("optimizer", 3)],
)
def test_state_that_an_object_cannot_use_is_one_message(
    name: str, value: Any, base: Path, tmp_path: Path, mesh: Mesh
) -> None:
    def change(body: Body) -> None:
        if name == "rng":
            body["tensors"]["rng.0.torch_cpu"] = copy.deepcopy(body["tensors"]["rng.0.python"])
        else:
            body["objects"][name] = value

    checkpoint = craft(base, tmp_path, change)
    with pytest.raises(IncompatibleCheckpoint, match=name):
        Training(5).checkpointer(tmp_path / "own", mesh).restore(checkpoint)


@pytest.mark.parametrize(
    "text", ["[" * 100_000 + "]" * 100_000, '{"a":' * 70 + "1" + "}" * 70, "1" * 5000, "NaN", "\x00"]
)
def test_what_is_no_manifest_at_all(text: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000002"
    checkpoint.mkdir()
    (checkpoint / MANIFEST).write_text(text)
    with pytest.raises(CorruptCheckpoint):
        Manifest.read(checkpoint)


def test_a_pipe_or_a_giant_is_not_waited_for(tmp_path: Path) -> None:
    for step, make in ((1, os.mkfifo), (2, lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 1 << 40))):
        (tmp_path / f"step-0000000{step}").mkdir()
        make(tmp_path / f"step-0000000{step}" / MANIFEST)
    assert [result.is_sound for result in inspect.verify(tmp_path)] == [False, False]


def test_a_chunk_that_is_a_pipe_is_damage(base: Path, tmp_path: Path) -> None:
    checkpoint = craft(base, tmp_path / "run", lambda body: None)
    path = own_chunk(base / "step-00000002")
    (tmp_path / "run/chunks").unlink()
    (tmp_path / "run/chunks").mkdir()
    os.mkfifo(tmp_path / "run/chunks" / path.name)
    assert "it is no regular file" in "".join(inspect.verify(checkpoint)[0].problems)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["../x", "\x1b[2J", "load", "0" * 64, "float32"]),
    st.lists(st.integers(-3, 2**40), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        found += places(child, (*path, key))
    return found


def fuzz(base: Path, folder: Path, data: st.DataObject) -> None:
    """Changes some values of a manifest and has it read by all."""

    def change(body: Body) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            *path, last = data.draw(st.sampled_from(places(body)))
            node: Any = body
            for key in path:
                node = node[key]
            node[last] = data.draw(LEAVES)

    checkpoint = craft(base, folder, change)
    (result,) = inspect.verify(checkpoint)
    inspect.render_list(inspect.list_checkpoints(checkpoint), False)
    try:
        reader = open_checkpoint(checkpoint)
        for name in reader.manifest.tensors:
            reader.read_whole(name)
    except (CorruptCheckpoint, IncompatibleCheckpoint, RunFolderError):
        assert not result.is_sound
    except WindlassError as error:
        pytest.fail(str(error))
    else:
        assert result.is_sound


QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@QUICK
@given(data=st.data())
def test_whatever_is_in_it_verify_and_load_agree(
    base: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    fuzz(base, tmp_path_factory.mktemp("fuzz"), data)


@pytest.mark.soak
@settings(QUICK, max_examples=5000)
@given(data=st.data())
def test_whatever_is_in_it_verify_and_load_agree_for_long(
    base: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    fuzz(base, tmp_path_factory.mktemp("fuzz"), data)
