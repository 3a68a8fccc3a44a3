"""Bad input and bad disks: one message with key, value, rule and fix; exit code 2 on every rank; nothing lost."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import runs
from support.runs import refused

from windlass.checkpoint.durable.chunk_file import chunk_name
from windlass.checkpoint.durable.manifest import MANIFEST, Manifest, committed_steps, step_folder
from windlass.errors import EXIT_DONE, EXIT_USER_ERROR

CONSTANT = "optim.schedule=constant"
"""So that more steps do not change the first ones."""


def test_a_data_folder_that_is_not_there(tmp_path: Path) -> None:
    config = runs.run_config(tmp_path, "run", f"data.path={tmp_path}/nowhere")
    assert "nowhere" in refused(config)


def test_an_empty_data_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(runs.run_config(tmp_path, "run", f"data.path={tmp_path}/empty"))
    assert "data.path" in message and "empty" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_data_folder_that_may_not_be_read(tmp_path: Path) -> None:
    folder = runs.write_corpus(tmp_path / "closed")
    (folder / "000.txt").chmod(0)
    assert "000.txt" in refused(runs.run_config(tmp_path, "run", f"data.path={folder}"))


def test_corrupt_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "parquet"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["some text that is long enough"] * 200}), folder / "good.parquet")
    whole = bytearray((folder / "good.parquet").read_bytes())
    whole[len(whole) // 3 : len(whole) // 2] = b"\0" * (len(whole) // 2 - len(whole) // 3)
    (folder / "bad.parquet").write_bytes(whole[: len(whole) // 2])
    config = runs.run_config(tmp_path, "run", "data=parquet", f"data.path={folder}")
    assert "bad.parquet" in refused(config)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    folder = runs.write_corpus(tmp_path / "latin")
    (folder / "007.txt").write_bytes("der Anker hängt".encode("latin-1"))
    message = refused(runs.run_config(tmp_path, "run", f"data.path={folder}"))
    assert "007.txt" in message and "data.encoding_errors=replace" in message


def test_a_vocabulary_smaller_than_the_token_ids(tmp_path: Path) -> None:
    message = refused(runs.run_config(tmp_path, "run", "model.vocab_size=100"), num_ranks=2)
    assert "model.vocab_size=100" in message and "model.vocab_size=null" in message


def test_a_mesh_that_does_not_divide_the_ranks(tmp_path: Path) -> None:
    config = runs.run_config(tmp_path, "run", "parallel=hsdp", "parallel.num_replicas=2")
    printed = runs.run(config, 3), runs.output(config)
    assert printed[0] == [EXIT_USER_ERROR] * 3
    assert "parallel.num_replicas=2: must divide the number of ranks, 3" in printed[1]


def test_parallel_none_with_two_ranks(tmp_path: Path) -> None:
    config = runs.run_config(tmp_path, "run", "parallel=none")
    assert runs.run(config, 2) == [EXIT_USER_ERROR] * 2
    assert "parallel=none: trains on one rank, and 2 were started" in runs.output(config)


def test_a_text_shorter_than_one_sequence(tmp_path: Path) -> None:
    message = refused(runs.run_config(tmp_path, "run", "train.seq_len=1000000"))
    assert "train.seq_len=1000000" in message


@pytest.fixture(scope="module")
def finished() -> runs.Config:
    """A run of two ranks with two checkpoints. Tests copy it."""
    config = runs.undisturbed(2, "train.steps=6", CONSTANT)
    assert committed_steps(runs.checkpoints(config)) == [3, 6]
    return config


def copy_of(finished: runs.Config, tmp_path: Path, *overrides: str) -> runs.Config:
    config = runs.run_config(tmp_path, "run", "train.steps=9", CONSTANT, *overrides)
    os.system(f"cp -r {finished.run_dir} {config.run_dir}")
    return config


def checkpoint_files(config: runs.Config, step: int) -> list[Path]:
    """The manifest and the chunks that no other checkpoint has."""
    directory = runs.checkpoints(config)
    chunks = {n: set(Manifest.read(step_folder(directory, n)).chunks) for n in committed_steps(directory)}
    own = chunks.pop(step).difference(*chunks.values())
    return [directory / f"step-{step:08d}" / MANIFEST, *(directory / chunk_name(sha256) for sha256 in sorted(own))]


def test_a_checkpoint_of_another_model(finished: runs.Config, tmp_path: Path) -> None:
    other = runs.run_config(tmp_path, "other", "model.hidden_size=64", f"resume={finished.run_dir}")
    message = refused(other, num_ranks=2)
    assert "another model" in message and "model.embed_tokens.weight" in message


def test_a_run_folder_of_another_model(finished: runs.Config, tmp_path: Path) -> None:
    config = copy_of(finished, tmp_path, "model.hidden_size=64")
    message = refused(config, num_ranks=2)
    assert "model.hidden_size=64" in message and "holds a run with model.hidden_size=32" in message
    assert committed_steps(runs.checkpoints(config)) == [3, 6]


def test_resume_never_in_a_folder_with_a_run(finished: runs.Config, tmp_path: Path) -> None:
    config = copy_of(finished, tmp_path, "resume=never")
    assert "resume=never begins a new one" in refused(config)
    assert committed_steps(runs.checkpoints(config)) == [3, 6]


def test_resume_from_nothing(tmp_path: Path) -> None:
    config = runs.run_config(tmp_path, "run", f"resume={tmp_path}/nothing")
    assert "is neither a checkpoint nor a folder that holds some" in refused(config)


def damage(path: Path, how: str, randomness: random.Random) -> None:
    whole = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(whole[: randomness.randrange(len(whole))])
    else:
        whole[randomness.randrange(len(whole))] ^= 1 << randomness.randrange(8)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("how", "file"),
    [
        *(("truncated", 0), ("flipped", 1), ("flipped", 2)),
        *(
            pytest.param(*damage, marks=pytest.mark.full)
            for damage in (("flipped", 0), ("truncated", 1), ("truncated", 2))
        ),
    ],
)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_goes_on_from_the_older(
    finished: runs.Config, tmp_path: Path, how: str, file: int
) -> None:
    config = copy_of(finished, tmp_path)
    damaged = checkpoint_files(config, 6)[file]
    damage(damaged, how, random.Random(file))
    contents = damaged.read_bytes()

    assert runs.run(config, 2) == [EXIT_DONE] * 2, runs.output(config)

    assert "resumed at step 3" in runs.output(config) and "step-00000006.damaged" in runs.output(config)
    if damaged.name == MANIFEST:
        kept = runs.checkpoints(config) / "step-00000006.damaged" / MANIFEST
    else:
        kept = damaged.with_name(damaged.name + ".damaged")
    assert kept.read_bytes() == contents, "what was damaged is kept as it was found"
    assert len({tuple(values) for values in runs.losses(config).values() if len(values) > 1}) == 3
    assert all(len(set(values)) == 1 for values in runs.losses(config).values()), "steps 4 to 6 again, to the bit"


def test_when_every_checkpoint_is_damaged_the_run_says_so_and_deletes_nothing(
    finished: runs.Config, tmp_path: Path
) -> None:
    config = copy_of(finished, tmp_path)
    for step in (3, 6):
        damage(checkpoint_files(config, step)[1], "flipped", random.Random(step))
    message = refused(config, num_ranks=2)
    assert "step-00000003" in message and "is damaged" in message
    assert {path.name for path in runs.checkpoints(config).iterdir()} == {
        "step-00000003",
        "step-00000006.damaged",
        "chunks",
        "latest.json",
        "generation",
        "job",
        ".lock",
    }


def test_resuming_from_a_damaged_path_is_refused(finished: runs.Config, tmp_path: Path) -> None:
    config = copy_of(finished, tmp_path)
    manifest = checkpoint_files(config, 6)[0]
    body = json.loads(manifest.read_text())
    body["body"]["step"] = 7
    manifest.write_text(json.dumps(body))
    config.resume = str(manifest.parent)
    assert "manifest.json cannot be used: its bytes have changed" in refused(config, num_ranks=2)


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    config = runs.run_config(tmp_path, "run")
    Path(config.run_dir).write_text("not a folder")
    message = refused(config, num_ranks=2)
    assert message.startswith(f"windlass: error: run_dir={config.run_dir}: cannot be written: ")
    assert Path(config.run_dir).read_text() == "not a folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_folder_that_is_read_only(tmp_path: Path) -> None:
    config = runs.run_config(tmp_path, "run")
    Path(config.run_dir).mkdir()
    Path(config.run_dir).chmod(0o500)
    assert "cannot be written: Permission denied" in refused(config)


def test_a_disk_that_fills_while_a_checkpoint_is_written(finished: runs.Config, tmp_path: Path) -> None:
    """The message names the folder, the older checkpoints are intact, and the run goes on once there is room."""
    config = copy_of(finished, tmp_path)
    before = set(runs.checkpoints(config).glob("chunks/*"))
    message = refused(config, num_ranks=2, largest_file_bytes=100_000)
    assert "checkpoint.dir" in message and "make room" in message
    assert committed_steps(runs.checkpoints(config)) == [3, 6]
    assert set(runs.checkpoints(config).glob("chunks/*")) == before
    assert runs.run(config, 2) == [EXIT_DONE] * 2, runs.output(config)
    assert committed_steps(runs.checkpoints(config)) == [6, 9]


def test_a_second_run_in_the_same_folder(tmp_path: Path) -> None:
    config = runs.run_config(tmp_path, "run", "train.steps=100000", "checkpoint=none")
    first = runs.start(config, 1)
    while not (Path(config.run_dir) / "metrics.jsonl").exists():
        assert first.is_alive(), runs.output(config)
        time.sleep(0.01)
    (pid,) = [process.pid for process in first.processes]
    psutil.Process(pid).suspend()  # it needs no core to have the folder
    assert runs.run(config, 1) == [EXIT_USER_ERROR]
    assert f"is in use by process {pid} on" in runs.output(config)
    assert first.is_alive()
    first.kill()
    first.join()


def test_steps_with_gradients_that_are_not_finite_are_skipped_by_all_ranks_and_end_the_run(tmp_path: Path) -> None:
    config = runs.run_config(tmp_path, "run", "optim.lr=1e38", "optim.warmup_steps=0", "train.eval_samples=2")
    message = refused(config, 2)
    assert "train.max_skipped_steps=10: steps 2 to 11 were skipped" in message
    skipped = [event["step"] for event in runs.events(config, "skipped_step")]
    assert skipped == list(range(2, 12)), "the first step throws the weights away; no later one is taken"
    assert "step 2 skipped: its gradients are not finite" in runs.output(config)


def test_a_checkpoint_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    shared = f"checkpoint.dir={tmp_path}/shared"
    first = runs.run_config(tmp_path, "first", "train.steps=3", shared)
    assert runs.run(first, 1) == [EXIT_DONE], runs.output(first)
    second = runs.run_config(tmp_path, "second", "train.steps=3", "optim.lr=0.5", shared)
    message = refused(second)
    assert "optim.lr=0.5" in message and f"{tmp_path}/shared holds a run with optim.lr=0.002" in message
    assert committed_steps(tmp_path / "shared") == [3]


def test_a_refused_run_leaves_the_folder_to_its_owner(finished: runs.Config, tmp_path: Path) -> None:
    config = copy_of(finished, tmp_path, "model.hidden_size=64")
    before = (Path(config.run_dir) / "config.yaml").read_bytes()
    config.resume = str(runs.checkpoints(config) / "step-00000003")
    assert "another model" in refused(config, num_ranks=2)
    assert (Path(config.run_dir) / "config.yaml").read_bytes() == before
    assert runs.run(copy_of_settings(config), 2) == [EXIT_DONE] * 2, runs.output(config)


def copy_of_settings(config: runs.Config) -> runs.Config:
    """The owner's own command again."""
    return runs.run_config(Path(config.run_dir).parent, "run", "train.steps=9", CONSTANT)


def test_going_back_sets_newer_checkpoints_aside(finished: runs.Config, tmp_path: Path) -> None:
    config = copy_of(finished, tmp_path, "optim.lr=0.01")
    config.resume = str(runs.checkpoints(config) / "step-00000003")
    assert runs.run(config, 2) == [EXIT_DONE] * 2, runs.output(config)
    assert "changed optim.lr: 0.002 -> 0.01" in runs.output(config)
    names = {path.name for path in runs.checkpoints(config).iterdir()}
    steps = {"step-00000006", "step-00000009", "step-00000006.superseded"}
    assert names == steps | {"chunks", "latest.json", "generation", "job", ".lock"}
