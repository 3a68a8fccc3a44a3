"""A checkpoint is read back into another number of ranks and another ZeRO stage."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import runs
from support.ranks import run_ranks
from support.toy import Layout, build, digest, train_steps, whole_weights

from windlass.checkpoint.durable.manifest import step_name
from windlass.checkpoint.manager import Checkpointer
from windlass.data.loader import Loader
from windlass.data.prepare import prepared_folder
from windlass.data.shards import TokenDataset
from windlass.errors import EXIT_DONE, IncompatibleCheckpoint
from windlass.parallel.fragment import local_tensor


def save_toy(layout: Layout, directory: Path, num_steps: int) -> tuple[str, str]:
    """Trains and saves. Digests of all weights, and of all AdamW moments."""
    mesh = layout.parallel_config().build(torch.device("cpu"))
    model, sharder, optimizer = build(layout, mesh)
    train_steps(layout, mesh, model, sharder, optimizer, range(num_steps))
    Checkpointer({"model": model, "optimizer": optimizer}, directory, mesh).save(num_steps)
    digests = digest(whole_weights(model)), digest(moments(model, optimizer))
    mesh.stop()
    return digests


def load_toy(layout: Layout, directory: Path, save_as: int | None = None) -> tuple[str, str, list[float]]:
    """Restores into a fresh model of another first seed, saves it again as step `save_as`, and trains one step."""
    mesh = layout.parallel_config().build(torch.device("cpu"))
    model, sharder, optimizer = build(layout, mesh, seed=99)
    checkpointer = Checkpointer({"model": model, "optimizer": optimizer}, directory, mesh)
    restored = checkpointer.restore_latest()
    assert restored is not None
    digests = digest(whole_weights(model)), digest(moments(model, optimizer))
    if save_as is not None:
        checkpointer.save(save_as)
    losses = train_steps(layout, mesh, model, sharder, optimizer, range(5, 6))
    mesh.stop()
    return *digests, losses


def moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


@pytest.mark.parametrize("sharding", ["zero3", pytest.param("zero1", marks=pytest.mark.full)])
def test_four_to_two_to_one_ranks_restores_every_bit(tmp_path: Path, sharding: str) -> None:
    saved = run_ranks(save_toy, 4, Layout(sharding), tmp_path, 2)[0]
    on_two = run_ranks(load_toy, 2, Layout(sharding), tmp_path, 3)
    on_one = run_ranks(load_toy, 1, Layout(sharding), tmp_path)
    for weights, moments_, losses in (*on_two, *on_one):
        assert (weights, moments_) == saved
        assert losses == pytest.approx(on_one[0][2], abs=1e-5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Layout("zero3"), Layout("zero1", cut="dim0")),
        pytest.param(Layout("hsdp", num_replicas=2), Layout("zero3"), marks=pytest.mark.full),
        pytest.param(Layout("zero2"), Layout("ddp"), marks=pytest.mark.full),
        (Layout("ddp"), Layout("hsdp", num_replicas=2)),
    ],
)
def test_another_stage_and_another_cut_restore_every_bit(tmp_path: Path, before: Layout, after: Layout) -> None:
    saved = run_ranks(save_toy, 4, before, tmp_path, 2)[0]
    for weights, moments_, _ in run_ranks(load_toy, 2 if after.num_replicas is None else 4, after, tmp_path):
        assert (weights, moments_) == saved


def test_uneven_cuts_and_empty_shards_restore_every_bit(tmp_path: Path) -> None:
    """3 columns or rows over 4 ranks leave one rank with nothing."""
    saved = run_ranks(save_odd, 4, tmp_path)[0]
    for num_ranks in (1, 3):
        assert run_ranks(load_odd, num_ranks, tmp_path) == [saved] * num_ranks


def odd_model(mesh, seed: int) -> torch.nn.Module:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 7))
    if mesh.device_mesh is not None:
        fully_shard(model, mesh=mesh.device_mesh)
    return model


def save_odd(directory: Path) -> str:
    mesh = Layout().parallel_config().build(torch.device("cpu"))
    model = odd_model(mesh, 0)
    Checkpointer({"model": model}, directory, mesh).save(1)
    result = digest(whole_weights(model))
    mesh.stop()
    return result


def load_odd(directory: Path) -> str:
    mesh = Layout().parallel_config().build(torch.device("cpu"))
    model = odd_model(mesh, 1)
    Checkpointer({"model": model}, directory, mesh).restore_latest()
    result = digest(whole_weights(model))
    mesh.stop()
    return result


def test_another_model_is_refused_on_every_rank_and_changes_nothing(tmp_path: Path) -> None:
    run_ranks(save_toy, 2, Layout(), tmp_path, 1)
    for message, unchanged in run_ranks(load_another_model, 2, tmp_path):
        assert "another model" in message and "embed_tokens" in message
        assert unchanged


def load_another_model(directory: Path) -> tuple[str, bool]:
    layout = Layout(vocab_size=64)
    mesh = layout.parallel_config().build(torch.device("cpu"))
    model, _, optimizer = build(layout, mesh)
    before = [local_tensor(parameter).clone() for parameter in model.parameters()]
    try:
        Checkpointer({"model": model, "optimizer": optimizer}, directory, mesh).restore_latest()
    except IncompatibleCheckpoint as error:
        same = all(torch.equal(a, local_tensor(b)) for a, b in zip(before, model.parameters(), strict=True))
        mesh.stop()
        return str(error), same
    raise AssertionError("the checkpoint was taken")


def test_ranks_may_change_between_lives_and_every_sample_is_seen_once(tmp_path: Path) -> None:
    """4 -> 2 -> 3 ranks at a global batch of 12; the loss ends where that of 4 ranks throughout ends."""
    overrides = ("data.borders=none", "train.eval_every=18")
    calm = runs.undisturbed(4, "train.steps=18", "train.batch_size=3", *overrides)

    attempts = [(4, 3, 1, 6), (2, 3, 2, 12), (3, 4, 1, 18)]
    for num_ranks, batch_size, accumulation, last_step in attempts:
        config = runs.run_config(
            tmp_path,
            "changing",
            f"train.batch_size={batch_size}",
            f"train.grad_accum_steps={accumulation}",
            "train.steps=18",
            *overrides,
        )
        run_until(config, num_ranks, last_step)

    runs.assert_close_training(config, calm, atol=1e-3)
    assert samples_of(runs.checkpoints(config)) == 18 * 12 == samples_of(runs.checkpoints(calm))
    assert delivered_once(config, attempts)


def run_until(config: runs.Config, num_ranks: int, last_step: int) -> None:
    """An attempt that ends with the checkpoint of `last_step`: killed when that is there, or done."""
    config.checkpoint.keep = 0
    attempt = runs.start(config, num_ranks)
    if last_step == config.train.steps:
        assert attempt.join() == [EXIT_DONE] * num_ranks, runs.output(config)
        return
    while attempt.is_alive() and not runs.is_committed(config, last_step):
        time.sleep(0.005)
    attempt.kill()
    attempt.join()
    assert runs.is_committed(config, last_step), runs.output(config)
    for newer in runs.checkpoints(config).glob("step-????????"):  # the kill may come a few steps late
        if newer.name > step_name(last_step):
            newer.rename(newer.with_name(newer.name + ".late"))


def samples_of(directory: Path) -> int:
    newest = max(path for path in directory.glob("step-????????"))
    return json.loads((newest / "manifest.json").read_text())["body"]["objects"]["data"]["cursor"]


def delivered_once(config: runs.Config, attempts: list[tuple[int, int, int, int]]) -> bool:
    """Replays the loaders of every rank of every attempt over the steps it kept: no sample twice, none left out."""
    dataset = TokenDataset(prepared_folder(config.data, progress=False), "train")
    rows: list[bytes] = []
    cursor, step = 0, 0
    for num_ranks, batch_size, accumulation, last_step in attempts:
        steps = last_step - step
        for rank in range(num_ranks):
            loader = Loader(
                dataset,
                batch_size=batch_size,
                seq_len=config.train.seq_len,
                data_rank=rank,
                num_data_ranks=num_ranks,
                seed=config.train.seed,
                borders=config.data.borders,
                cursor=cursor,
            )
            for _ in range(steps * accumulation):
                rows += [row.tobytes() for row in next(loader).input_ids.numpy()]
            loader.close()
        cursor, step = cursor + steps * 12, last_step
    whole = Loader(
        dataset,
        batch_size=len(rows),
        seq_len=config.train.seq_len,
        data_rank=0,
        num_data_ranks=1,
        seed=config.train.seed,
    )
    undivided = [row.tobytes() for row in next(whole).input_ids.numpy()]
    whole.close()
    return np.array_equal(sorted(rows), sorted(undivided))
