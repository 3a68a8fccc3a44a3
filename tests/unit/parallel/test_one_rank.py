"""A mesh of one rank is a plain loop: no process group, and torch's own arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from windlass.errors import ConfigError
from windlass.parallel.clip_grad import clip_grad_norm_
from windlass.parallel.collectives import COMM, CommCounter, all_gather_object, all_reduce
from windlass.parallel.config import Axis, ParallelConfig, Sharding
from windlass.parallel.mesh import Mesh, all_ranks_finite
from windlass.parallel.zero import Sharder, Unit


def with_gradients(scale: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
    model(torch.randn(4, 5)).square().sum().mul(scale).backward()
    return model


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4], ids=["within", "above", "far above"])
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_is_torchs_to_the_bit(scale: float, max_norm: float, mesh: Mesh) -> None:
    ours, theirs = with_gradients(scale), with_gradients(scale)
    norm = clip_grad_norm_(ours.parameters(), max_norm, mesh)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm))
    assert all(torch.equal(a, b) for a, b in zip(gradients(ours), gradients(theirs), strict=True))


def test_without_a_largest_norm_gradients_are_only_measured(mesh: Mesh) -> None:
    model = with_gradients(1.0)
    before = copy.deepcopy(gradients(model))
    norm = clip_grad_norm_(model.parameters(), None, mesh)
    assert torch.equal(norm, torch.nn.utils.get_total_norm(before))
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), before, strict=True))


def test_a_parameter_without_a_gradient_does_not_count(mesh: Mesh) -> None:
    model = with_gradients(1.0)
    model[0].bias.grad = None
    expected = torch.nn.utils.get_total_norm(gradients(model))
    assert torch.equal(clip_grad_norm_(model.parameters(), None, mesh), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(bad: float, mesh: Mesh) -> None:
    model = with_gradients(1.0)
    model[1].weight.grad[0, 0] = bad
    norm = clip_grad_norm_(model.parameters(), 1.0, mesh)
    assert not all_ranks_finite(norm, mesh)


@pytest.mark.parametrize(("value", "finite"), [(0.0, True), (3e38, True), (torch.inf, False), (torch.nan, False)])
def test_the_vote_on_finiteness(value: float, finite: bool, mesh: Mesh) -> None:
    assert all_ranks_finite(torch.tensor(value), mesh) is finite


@pytest.mark.parametrize("name", list(Sharding))
def test_one_rank_starts_no_process_group(name: Sharding) -> None:
    mesh = ParallelConfig(name=name).build(torch.device("cpu"))
    assert (mesh.rank, mesh.world_size, mesh.size(*Axis), mesh.coordinate(*Axis)) == (0, 1, 1, 0)
    assert mesh.world is mesh.device_mesh is mesh.fsdp_mesh is mesh.data_group is mesh.group_over(*Axis) is None
    assert (mesh.data_rank, mesh.num_data_ranks, mesh.counts_samples) == (0, 1, True)
    assert not dist.is_initialized()
    mesh.barrier()
    mesh.stop()


def test_agree_returns_what_the_action_returned(mesh: Mesh) -> None:
    assert mesh.agree(lambda: [1, 2]) == [1, 2]
    assert mesh.agree(lambda: None) is None


def test_agree_raises_the_users_mistake_as_it_was(mesh: Mesh) -> None:
    mistake = ConfigError("a", 1, "is wrong", "mend it")

    def fail() -> None:
        raise mistake

    with pytest.raises(ConfigError) as raised:
        mesh.agree(fail)
    assert raised.value is mistake


def test_agree_raises_what_else_went_wrong_and_names_it(mesh: Mesh) -> None:
    def fail() -> None:
        raise KeyError("weight")

    with pytest.raises(Exception, match=r"weight") as raised:
        mesh.agree(fail)
    chain = [raised.value, raised.value.__cause__]
    assert any(isinstance(error, KeyError) for error in chain)


def test_agree_lets_an_interrupt_through(mesh: Mesh) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mesh.agree(interrupt)


def test_collectives_of_one_rank_change_and_count_nothing(mesh: Mesh) -> None:
    before = COMM.total_bytes
    tensor = torch.arange(3.0)
    assert all_reduce(tensor, mesh.data_group) is tensor
    assert tensor.tolist() == [0, 1, 2]
    assert all_gather_object("x", mesh.world) == ["x"]
    assert COMM.total_bytes == before


def test_a_model_on_one_rank_is_not_cut(mesh: Mesh) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    sharder = Sharder(ParallelConfig(name=Sharding.zero3), mesh)
    sharder.shard(model, [Unit([model[0]])], torch.float32)
    sharder.begin_micro_step(model, is_last=True)
    sharder.free_gathered(model)
    assert type(model) is nn.Sequential
    assert type(model[0].weight) is nn.Parameter


@pytest.mark.parametrize(
    ("kind", "num_ranks", "expected"),
    [
        ("all_gather", 4, 750),
        ("reduce_scatter", 4, 750),
        ("all_reduce", 4, 1500),
        ("all_gather", 1, 0),
        ("reduce_scatter", 1, 0),
        ("all_reduce", 1, 0),
    ],
)
def test_counted_bytes_are_those_of_an_ideal_ring(kind: str, num_ranks: int, expected: int) -> None:
    counter = CommCounter()
    counter.add(kind, 1000, num_ranks)
    assert counter.bytes_by_kind[kind] == expected
    assert counter.total_bytes == expected


def test_counts_add_up() -> None:
    counter = CommCounter()
    counter.add("all_gather", 100, 2)
    counter.add("all_gather", 100, 2)
    counter.add("all_reduce", 10, 2)
    assert dict(counter.bytes_by_kind) == {"all_gather": 100, "all_reduce": 10}
    assert counter.total_bytes == 110


def test_an_unknown_collective_is_a_programming_error() -> None:
    with pytest.raises(KeyError):
        CommCounter().add("all_to_all_somehow", 1, 2)
