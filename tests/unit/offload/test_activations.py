from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from windlass.errors import OffloadError
from windlass.offload.activations import ActivationOffload
from windlass.offload.arena import Arena
from windlass.offload.direct_io import Engine
from windlass.offload.tier_file import HEADER_BYTES, TierFolder

CPU = torch.device("cpu")
WIDTH, ROWS = 32, 48
BLOCK = ROWS * WIDTH * 4
"""Bytes of one hidden state: 1.5 pages."""
BUFFER = 8192
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@dataclass
class Tiers:
    """Everything that moves activations, of which `offload` is what is tested."""

    engine: Engine
    folder: TierFolder
    arena: Arena
    offload: ActivationOffload
    has_failed: bool = False
    """An error of the disk keeps the frames that it went through, and with them the graph."""

    @property
    def num_files(self) -> int:
        return len(list(self.folder.path.glob("*.tier")))


Make = Callable[..., Tiers]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Tiers] = []

    def make_one(
        device: str = "cpu",
        near_bytes: int = 0,
        arena_bytes: int = 16 * BUFFER,
        min_bytes: int = 1024,
        disk: bool = True,
    ) -> Tiers:
        engine = Engine(num_threads=1)  # carries out transfers in their order, so that `settle` can wait for all
        folder = TierFolder(tmp_path, engine, "activations")
        arena = Arena(arena_bytes, pin=device == "cuda")
        offload = ActivationOffload(torch.device(device), near_bytes, arena, folder if disk else None, min_bytes)
        made.append(Tiers(engine, folder, arena, offload))
        return made[-1]

    yield make_one
    gc.collect()  # what a failed pass has left
    for tiers in made:
        tiers.offload.close()
        is_free = tiers.arena.free_bytes == tiers.arena.num_bytes
        tiers.folder.close()
        tiers.engine.close()
        tiers.arena.close()
        assert is_free or tiers.has_failed, "every buffer is given back"


def settle(tiers: Tiers) -> None:
    """Waits for all that has been submitted."""
    tiers.engine.submit(lambda: None).wait()


class Residual(nn.Module):
    """A few layers that save inputs, outputs, views and copies of weights."""

    def __init__(self, num_layers: int, dtype: torch.dtype, recompute: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.dtype, self.recompute = dtype, recompute
        self.weights = nn.ParameterList(
            torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        for weight in self.weights:
            x = checkpoint(self.layer, x, weight, use_reentrant=False) if self.recompute else self.layer(x, weight)
        return x.float().square().sum()

    def layer(self, x: Tensor, weight: Tensor) -> Tensor:
        first, second = torch.nn.functional.linear(x, weight.to(x.dtype)).chunk(2, dim=-1)
        return x + torch.cat((first * second.sigmoid(), second.exp().tanh()), dim=-1)


def example() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(4))


def gradients(
    model: nn.Module, offload: ActivationOffload | None, device: str = "cpu", passes: int = 1
) -> list[Tensor]:
    x = example().to(device)
    for _ in range(passes):
        if offload is None:
            loss = model(x)
        else:
            with offload.offloaded():
                loss = model(x)
        loss.backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("arena_buffers", [1, 4])
@pytest.mark.parametrize("near_blocks", [0, 2])
def test_gradients_have_the_same_bits(
    make: Make, device: str, dtype: torch.dtype, recompute: bool, arena_buffers: int, near_blocks: int
) -> None:
    tiers = make(device, near_bytes=near_blocks * BLOCK, arena_bytes=arena_buffers * BUFFER)
    model = Residual(6, dtype, recompute).to(device)
    expected = gradients(model, None, device, passes=2)
    found = gradients(model, tiers.offload, device, passes=2)
    assert len(found) == 6
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    moved = tiers.offload.figures.host_bytes if device == "cuda" else tiers.offload.figures.write_bytes
    assert moved > 0


def test_what_no_longer_fits_the_arena_is_read_back(make: Make) -> None:
    tiers = make(arena_bytes=2 * BUFFER)
    model = Residual(6, torch.float32)
    expected = gradients(model, None)
    found = gradients(model, tiers.offload)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert tiers.offload.figures.read_bytes > 0
    assert tiers.offload.figures.stall_s > 0


def chain(num_blocks: int) -> tuple[Tensor, Tensor]:
    """A leaf, and a graph above it that saves `num_blocks` tensors of `BLOCK` bytes, one a step."""
    x = example().requires_grad_()
    y = x
    for _ in range(num_blocks):
        y = y.exp()
        y = y - y.detach()  # keeps numbers small; saves nothing
    return x, y


def test_what_was_saved_last_stays(make: Make) -> None:
    tiers = make(near_bytes=3 * BLOCK)
    with tiers.offload.offloaded():
        x, y = chain(10)
    assert tiers.offload.figures.write_bytes == 7 * BLOCK
    settle(tiers)
    y.sum().backward()
    assert x.grad is not None
    assert tiers.offload.figures.read_bytes == 0, "the arena still had them"


def test_what_is_needed_next_is_read_ahead(make: Make) -> None:
    tiers = make(arena_bytes=2 * BUFFER)
    read: list[int] = []

    def look(_: Tensor) -> None:
        settle(tiers)
        read.append(tiers.engine.figures.read_bytes // BUFFER)

    with tiers.offload.offloaded():
        x = example().requires_grad_()
        y = x
        for _ in range(8):
            y = y.exp()
            y.register_hook(look)
            y = y - y.detach()
    y.sum().backward()
    # Each hook runs before its own block is asked for. Two buffers: one block in use, and the one after it.
    assert tiers.offload.figures.read_bytes == 6 * BLOCK, "but for the two that were still there, each once"
    assert read[-1] == 6, "the last one had been read before it was asked for"
    assert read == sorted(read) and read[0] < 6, "and not all at once"


def test_a_storage_is_moved_once_however_often_it_is_saved(make: Make) -> None:
    tiers = make()
    x = example().requires_grad_()
    with tiers.offload.offloaded():
        y = x * 2
        z = (y * y).sum() + (y.t() * y.t()).sum() + y[:, :3].square().sum() + y.exp().sum()
    assert tiers.offload.figures.write_bytes == 2 * BLOCK, "y and its exponential"
    (grad,) = torch.autograd.grad(z, x)
    plain = x * 2
    z = (plain * plain).sum() + (plain.t() * plain.t()).sum() + plain[:, :3].square().sum() + plain.exp().sum()
    assert torch.equal(grad, torch.autograd.grad(z, x)[0])


def test_a_storage_that_has_changed_in_between_is_saved_again(make: Make) -> None:
    tiers = make()
    with tiers.offload.offloaded():
        x = example().requires_grad_()
        y = x * 2
        first = (y * y).sum()
        y.add_(1)
        second = (y * y).sum()
    (grad,) = torch.autograd.grad(first + second, x)
    torch.testing.assert_close(grad, 8 * x.detach() + 4 * (2 * x.detach() + 1))


def test_a_tensor_that_was_written_to_is_not_used_for_gradients(make: Make) -> None:
    tiers = make(near_bytes=100 * BLOCK)
    x = example().requires_grad_()
    with tiers.offload.offloaded():
        y = x * 2
        z = (y * y).sum()
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match="has been written to"):
        z.backward()


def test_parameters_stay_and_their_copies_are_not_kept(make: Make) -> None:
    tiers = make()
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    x = example().requires_grad_()
    with tiers.offload.offloaded():
        y = torch.nn.functional.linear(x, weight) + x @ weight
    assert tiers.offload.figures.write_bytes == BLOCK, "x alone"
    copies: list[weakref.ref[Tensor]] = []
    with tiers.offload.offloaded():
        copy = weight.to(torch.bfloat16)
        copies.append(weakref.ref(copy))
        z = torch.nn.functional.linear(x.to(torch.bfloat16), copy)
        del copy
    assert copies[0]() is None
    assert tiers.offload.figures.write_bytes == BLOCK + BLOCK // 2, "and x in bfloat16"
    grads = torch.autograd.grad(y.sum() + z.float().sum(), (x, weight))
    y = torch.nn.functional.linear(x, weight) + x @ weight
    z = torch.nn.functional.linear(x.to(torch.bfloat16), weight.to(torch.bfloat16))
    expected = torch.autograd.grad(y.sum() + z.float().sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_a_copy_of_a_parameter_that_changed_is_not_made_again(make: Make) -> None:
    tiers = make()
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    with tiers.offload.offloaded():
        y = torch.nn.functional.linear(example().bfloat16().requires_grad_(), weight.to(torch.bfloat16))
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="has been written to"):
        y.sum().backward()


def test_small_tensors_and_those_larger_than_the_arena_stay(make: Make) -> None:
    tiers = make(arena_bytes=BUFFER, min_bytes=BLOCK)
    with tiers.offload.offloaded():
        x = example().requires_grad_()
        small, large = x[:-1].clone().exp(), torch.cat((x, x)).exp()
    assert tiers.offload.figures.write_bytes == 0
    (small.sum() + large.sum()).backward()
    expected = 2 * x.detach().exp()
    expected[:-1] += x.detach()[:-1].exp()
    torch.testing.assert_close(x.grad, expected)


def test_a_graph_without_a_backward_pass_gives_everything_back(make: Make) -> None:
    tiers = make(arena_bytes=4 * BUFFER)
    gc.collect()
    gc.disable()
    try:
        with tiers.offload.offloaded():
            x, y = chain(10)
        leaf = weakref.ref(x)
        del x, y
        assert leaf() is None, "what is saved does not keep its own graph alive"
    finally:
        gc.enable()
    tiers.offload.close()
    assert tiers.arena.free_bytes == tiers.arena.num_bytes


def test_files_are_used_again(make: Make) -> None:
    tiers = make()
    model = Residual(4, torch.float32)
    gradients(model, tiers.offload)
    num_files, written = tiers.num_files, tiers.offload.figures.write_bytes
    settle(tiers)  # a file that is still being written is not free yet
    gradients(model, tiers.offload)
    assert tiers.num_files == num_files
    assert tiers.offload.figures.write_bytes == 2 * written


def test_a_second_backward_pass_of_a_graph_finds_everything(make: Make) -> None:
    tiers = make(arena_bytes=2 * BUFFER)
    with tiers.offload.offloaded():
        x, y = chain(6)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)
    second = torch.autograd.grad(y.sum(), x)
    assert torch.equal(first[0], second[0])


def test_several_forward_passes_before_the_first_backward_pass(make: Make) -> None:
    tiers = make(arena_bytes=3 * BUFFER)
    model = Residual(4, torch.float32)
    (model(example()) + model(2 * example())).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    with tiers.offload.offloaded():
        first = model(example())
    with tiers.offload.offloaded():
        second = model(2 * example())
    (first + second).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert gradient is not None and parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_other_bytes_than_were_written_are_an_error(make: Make) -> None:
    tiers = make(arena_bytes=BUFFER)
    with tiers.offload.offloaded():
        _, y = chain(3)
    settle(tiers)
    for path in tiers.folder.path.glob("*.tier"):
        with path.open("r+b") as file:
            file.seek(HEADER_BYTES + 100)
            byte = file.read(1)
            file.seek(HEADER_BYTES + 100)
            file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(OffloadError, match="not those that were written"):
        y.sum().backward()
    tiers.has_failed = True


def test_a_folder_that_is_removed_is_an_error(make: Make) -> None:
    tiers = make(arena_bytes=BUFFER)
    model = Residual(4, torch.float32)
    gradients(model, tiers.offload)
    for path in tiers.folder.path.glob("*.tier"):
        path.unlink()
    with pytest.raises(OffloadError, match="removed"):
        gradients(model, tiers.offload)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_without_a_disk_what_does_not_fit_host_memory_stays_on_the_device(make: Make) -> None:
    tiers = make("cuda", arena_bytes=4 * BUFFER, disk=False)
    model = Residual(6, torch.float32).cuda()
    expected, found = gradients(model, None, "cuda"), gradients(model, tiers.offload, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert tiers.offload.figures.host_bytes == 4 * BLOCK
    assert tiers.offload.figures.write_bytes == 0
