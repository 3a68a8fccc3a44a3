"""Runs of models of transformers: over ranks, tiers and optimizers, killed and resumed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support import hf, runs

from windlass.errors import EXIT_DONE

pytest.importorskip("transformers")
STEPS = ("train.steps=6", "optim.warmup_steps=2", "optim.lr=0.003", "checkpoint.persist_every=2", "train.seq_len=64")
STREAMED = ("offload=ssd", "offload.weights=streamed")


def overrides(family: str, *others: str) -> tuple[str, ...]:
    return ("model=hf", f"model.path={hf.folder_of(family)}", "data.tokenizer=bytes", *STEPS, *others)


def losses(num_ranks: int, family: str, *others: str) -> list[float]:
    """Of a run that trained: they fall, and no step was skipped."""
    found = runs.losses(runs.undisturbed(num_ranks, *overrides(family, *others)))
    values = [found[step][0] for step in sorted(found)]
    assert len(values) == 6 and values[-1] < values[0] - 0.1
    return values


SOME = ["qwen2", "mixtral"]
EACH = [family if family in SOME else pytest.param(family, marks=pytest.mark.full) for family in hf.FAMILIES]


@pytest.mark.parametrize("family", EACH)
def test_more_ranks_have_the_losses_of_one(family: str) -> None:
    tolerance = 1e-4 if family in ("mixtral", "qwen3_moe") else 1e-5
    expected = losses(1, family, "train.batch_size=4")
    for num_ranks, sharding in ((2, "zero3"), (4, "zero2")):
        found = losses(num_ranks, family, f"train.batch_size={4 // num_ranks}", f"parallel={sharding}")
        assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("family", EACH)
def test_weights_and_state_on_a_disk_change_no_bit(family: str) -> None:
    assert losses(1, family, *STREAMED) == losses(1, family)


@pytest.mark.parametrize(
    ("family", "num_ranks", "others"),
    [
        ("gemma3", 1, (*STREAMED, "optim=apollo", "optim.rank=4", "train.activation_checkpoint=full")),
        *(
            pytest.param(family, ranks, others, marks=pytest.mark.full)
            for family in hf.FAMILIES
            for ranks, others in ((1, STREAMED), (2, ("parallel=zero3", "optim=apollo", "optim.rank=4")))
        ),
    ],
)
def test_a_killed_run_ends_with_the_same_bits(
    family: str, num_ranks: int, others: tuple[str, ...], tmp_path: Path
) -> None:
    whole = overrides(family, *others, "train.steps=12")
    calm = runs.undisturbed(num_ranks, *whole)
    killed = runs.run_config(tmp_path, "killed", *whole)
    attempt = runs.start(killed, num_ranks)
    while not any(runs.checkpoints(killed).glob("step-*/manifest.json")):
        assert attempt.is_alive()
        time.sleep(0.005)
    attempt.kill()
    attempt.join()
    assert runs.run(killed, num_ranks) == [EXIT_DONE] * num_ranks, runs.output(killed)
    runs.assert_same_training(killed, calm, f"{family} was killed")
