"""Every sharding trains the same model, moves the bytes it should, and is a plain loop on one rank."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.ranks import run_ranks
from support.toy import Layout, build, ragged_batch, toy_run, whole_weights

from windlass.train.objectives.cross_entropy import cross_entropy_sum

NUM_STEPS = 5
SHARDINGS = ("ddp", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def single() -> dict:
    return run_ranks(toy_run, 1, Layout("none"), NUM_STEPS)[0]


def assert_same_model(results: list[dict], reference: dict, atol: float) -> None:
    np.testing.assert_allclose(results[0]["losses"], reference["losses"], atol=atol)
    for name, weight in reference["weights"].items():
        np.testing.assert_allclose(results[0]["weights"][name], weight, atol=atol, err_msg=name)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_sharded_training_equals_one_process(sharding: str, num_ranks: int, single: dict) -> None:
    results = run_ranks(toy_run, num_ranks, Layout(sharding), NUM_STEPS)
    assert_same_model(results, single, atol=1e-5)
    assert all(result["losses"] == results[0]["losses"] for result in results)


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_hybrid_sharding_equals_one_process(num_replicas: int, single: dict) -> None:
    results = run_ranks(toy_run, 4, Layout("hsdp", num_replicas=num_replicas), NUM_STEPS)
    assert_same_model(results, single, atol=1e-5)


def test_a_dim_that_does_not_divide_still_trains_the_same_model() -> None:
    """hidden 56 over 3 ranks: uneven and, for the norms' last rank, short shards; no dim divides."""
    layout = Layout("zero3", hidden_size=56, vocab_size=97, grad_accum_steps=1)
    # 4 rows a micro-step do not divide by 3 ranks, so only the first 3 rows are used, here and there.
    results = run_ranks(toy_run_first_rows, 3, layout, 2)
    reference = run_ranks(toy_run_first_rows, 1, layout, 2)[0]
    assert_same_model(results, reference, atol=1e-5)


def toy_run_first_rows(layout: Layout, num_steps: int) -> dict:
    import support.toy as toy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "GLOBAL_ROWS", 3)
        return toy_run(layout, num_steps)


@pytest.mark.parametrize("sharding", ["zero1", "zero3"])
def test_tied_embeddings_recompute_and_rows_cut(sharding: str) -> None:
    layout = Layout(sharding, cut="dim0", tie_embeddings=True, recompute=True)
    reference = run_ranks(toy_run, 1, layout, NUM_STEPS)[0]
    assert_same_model(run_ranks(toy_run, 2, layout, NUM_STEPS), reference, atol=1e-5)


def test_bfloat16_is_close_to_one_process() -> None:
    layout = Layout("zero3", dtype="bfloat16")
    reference = run_ranks(toy_run, 1, layout, NUM_STEPS)[0]
    results = run_ranks(toy_run, 2, layout, NUM_STEPS)
    np.testing.assert_allclose(results[0]["losses"], reference["losses"], rtol=2e-2)


@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.full), 4])
@pytest.mark.parametrize("sharding", [*SHARDINGS, "hsdp"])
def test_logical_bytes_equal_the_published_volumes(sharding: str, num_ranks: int) -> None:
    """ZeRO (2020): Z3 M(2AG+RS), Z2 M(AG+RS), Z1 AG+RS, each of 4P (N-1)/N bytes in fp32.

    The last unit (norm and head) stays gathered between forward and backward in Z3, which saves one gather of it.
    Dims are multiples of 4 here, so nothing is padded.
    """
    micro_steps, replicas = 3, 2 if sharding == "hsdp" else None
    layout = Layout(sharding, num_replicas=replicas, grad_accum_steps=micro_steps)
    with torch.device("meta"):
        model = layout.model_config().build()
    total = 4 * sum(parameter.numel() for parameter in model.parameters())
    last_unit = 4 * sum(p.numel() for module in (model.norm, model.lm_head) for p in module.parameters())
    shards = num_ranks if replicas is None else num_ranks // replicas
    share = (shards - 1) / shards
    gathered = {
        "ddp": 0,
        "zero1": total * share,
        "zero2": micro_steps * total * share,
        "zero3": micro_steps * (2 * total - last_unit) * share,
        "hsdp": micro_steps * (2 * total - last_unit) * share,
    }[sharding]
    scattered = {"ddp": 0, "zero1": total * share}.get(sharding, micro_steps * total * share)
    reduced = {"ddp": 2 * total * (num_ranks - 1) / num_ranks, "hsdp": 2 * total / shards / 2}.get(sharding, 0)

    carried = run_ranks(toy_run, num_ranks, layout, 1)[0]["carried"]

    assert carried.get("all_gather", 0) == pytest.approx(gathered, rel=0.01, abs=1)
    assert carried.get("reduce_scatter", 0) == pytest.approx(scattered, rel=0.01, abs=1)
    small = 200  # token count, norm and loss: a few numbers
    assert carried.get("all_reduce", 0) == pytest.approx(reduced, rel=0.01, abs=small)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_rank_holds_its_share_and_no_more(num_ranks: int) -> None:
    layout = Layout("zero3", grad_accum_steps=1)
    with torch.device("meta"):
        model = layout.model_config().build()
    total = sum(parameter.numel() for parameter in model.parameters())
    for result in run_ranks(toy_run, num_ranks, layout, 1):
        assert result["local_numel"] == pytest.approx(total / num_ranks, rel=0.01)


def plain_loop(num_steps: int) -> dict:
    """What anyone would write with our model and loss: the model on one rank of `parallel=zero3` must equal this."""
    layout = Layout("zero3")
    mesh = layout.parallel_config().build(torch.device("cpu"))
    model, _, _ = build(layout, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    losses = []
    for step in range(num_steps):
        batches = [ragged_batch(step, i, layout.vocab_size) for i in range(layout.grad_accum_steps)]
        num_tokens = sum(int((batch.labels != -100).sum()) for batch in batches)
        total = torch.zeros(())
        for batch in batches:
            loss = model(batch.input_ids, batch.document_ids, partial(cross_entropy_sum, labels=batch.labels))
            with torch.no_grad():
                logits = model(batch.input_ids, batch.document_ids)
            theirs = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
            assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
            (loss / num_tokens).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), layout.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.double()) / num_tokens)
    return {"losses": losses, "weights": {name: value.numpy() for name, value in whole_weights(model).items()}}


@pytest.mark.parametrize("sharding", ["none", "ddp", "zero1", "zero2", "zero3", "hsdp"])
def test_one_rank_makes_no_group_and_is_the_plain_loop_to_the_bit(sharding: str) -> None:
    reference = run_ranks(plain_loop, 1, NUM_STEPS)[0]
    result = run_ranks(toy_run, 1, Layout(sharding), NUM_STEPS)[0]
    assert not result["has_group"]
    assert result["losses"] == reference["losses"]
    for name, weight in reference["weights"].items():
        assert np.array_equal(result["weights"][name], weight), name


def first_weights(layout: Layout) -> dict:
    mesh = layout.parallel_config().build(torch.device("cpu"))
    model, _, _ = build(layout, mesh, seed=7)
    weights = {name: value.numpy() for name, value in whole_weights(model).items()}
    mesh.stop()
    return weights


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_first_weights_do_not_depend_on_the_number_of_ranks(num_ranks: int) -> None:
    layout = Layout("zero3", hidden_size=56, vocab_size=97)
    reference = run_ranks(first_weights, 1, layout)[0]
    for weights in run_ranks(first_weights, num_ranks, layout):
        for name, weight in reference.items():
            assert np.array_equal(weights[name], weight), name
