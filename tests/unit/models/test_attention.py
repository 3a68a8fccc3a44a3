from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from windlass.models import attention as module
from windlass.models.attention import Documents, attention

CPU = torch.device("cpu")
LENGTHS = [[5, 1, 30, 4], [40], [13, 27]]
"""One-token documents, rows without a border, and blocks that do not divide."""


def ids_of(lengths: list[list[int]]) -> Tensor:
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])


def heads(
    lengths: list[list[int]] = LENGTHS, dtype: torch.dtype = torch.float64, num_kv_heads: int = 2, head_dim: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, in memory as projections leave them."""
    generator = torch.Generator().manual_seed(0)

    def draw(num_heads: int) -> Tensor:
        shape = (len(lengths), sum(lengths[0]), num_heads, head_dim)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)

    return draw(4), draw(num_kv_heads), draw(num_kv_heads)


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ids: Tensor | None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """All pairs."""
    seq_len = query.shape[2]
    key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1) for heads in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * (scores / soft_cap).tanh()
    places = torch.arange(seq_len)
    distance = places[:, None] - places
    seen = (distance >= 0)[None] if ids is None else (distance >= 0) & (ids[:, :, None] == ids[:, None, :])
    if window is not None:
        seen = seen & (distance < window)
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)), dim=-1)
    return (scores.softmax(-1)[..., :seq_len] @ value).transpose(1, 2)


def with_gradients(run: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = run(*inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad((output * weights.to(output.dtype)).sum(), inputs)]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": 0.5},
    {"window": 1},
    {"window": 7},
    {"window": 30},
    {"window": 39},
    {"window": 100},
    {"soft_cap": 1.5},
    {"soft_cap": 1.5, "window": 6, "scale": 0.7},
    {"sinks": True},
    {"sinks": True, "window": 3, "soft_cap": 2.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_it_is_the_attention_of_all_pairs_that_are_seen(
    options: dict[str, Any], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WINDOW_BLOCK", 4)
    monkeypatch.setattr(module, "_MAX_QUERIES", 9)
    monkeypatch.setattr(module, "_MIN_QUERIES", 4)
    ids, options = ids_of(LENGTHS), dict(options)
    sinks = [torch.randn(4, dtype=torch.float64)] if options.pop("sinks", False) else []
    inputs = [*heads(), *sinks]

    def found(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
        return attention(query, key, value, Documents.of(ids) if packed else None, sinks=sinks, **options)

    def expected(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
        return dense(query, key, value, ids if packed else None, sinks=sinks, **options)

    torch.testing.assert_close(with_gradients(found, inputs), with_gradients(expected, inputs))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"window": 7}, {"soft_cap": 2.0}], ids=str)
def test_key_heads_serve_query_heads_in_order(num_kv_heads: int, options: dict[str, Any]) -> None:
    inputs, ids = heads(num_kv_heads=num_kv_heads), ids_of(LENGTHS)
    found = with_gradients(lambda *qkv: attention(*qkv, Documents.of(ids), **options), inputs)
    torch.testing.assert_close(found, with_gradients(lambda *qkv: dense(*qkv, ids, **options), inputs))


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"soft_cap": 2.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_are_near(options: dict[str, Any], dtype: torch.dtype) -> None:
    ids = ids_of(LENGTHS)
    found = with_gradients(lambda *qkv: attention(*qkv, Documents.of(ids), **options), heads(dtype=dtype))
    expected = with_gradients(lambda *qkv: dense(*qkv, ids, **options), heads())
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    assert all(tensor.dtype == dtype for tensor in found)
    for tensor, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor.double(), reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"soft_cap": 2.0}], ids=str)
def test_packed_is_one_by_one(options: dict[str, Any]) -> None:
    lengths = [[9, 1, 17, 13]]
    inputs = heads(lengths, torch.float32)
    together = with_gradients(lambda *qkv: attention(*qkv, Documents.of(ids_of(lengths)), **options), inputs)

    def apart(*qkv: Tensor) -> Tensor:
        parts = zip(*(tensor.split(lengths[0], dim=2) for tensor in qkv), strict=True)
        return torch.cat([attention(*part, None, **options) for part in parts], dim=1)

    torch.testing.assert_close(together, with_gradients(apart, inputs), rtol=0, atol=1e-6)


def test_rows_without_borders_have_the_bits_of_no_documents() -> None:
    inputs = heads(dtype=torch.float32)
    ids = torch.tensor([3, 0, 9])[:, None].expand(-1, 40)
    found = with_gradients(lambda *qkv: attention(*qkv, Documents.of(ids)), inputs)
    expected = with_gradients(lambda *qkv: attention(*qkv, None), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_documents_of_equal_length_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [[8] * 5] * 3
    calls = count_calls(lambda: attention(*heads(lengths), Documents.of(ids_of(lengths))), "flash_attention")
    assert calls == 1
    calls = count_calls(lambda: attention(*heads(), Documents.of(ids_of(LENGTHS))), "flash_attention")
    assert calls == 7


class Calls(TorchDispatchMode):
    """The operators that run, and the elements of the largest tensor that one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *(tensor.untyped_storage().nbytes() for tensor in tensors)])
        return result


def count_calls(run: Any, name: str) -> int:
    with Calls() as calls:
        run()
    return sum(name in found for found in calls.names)


@pytest.mark.parametrize("options", [{}, {"window": 64}, {"soft_cap": 2.0}, {"soft_cap": 2.0, "window": 64}], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_grows_with_the_square_of_the_length(
    options: dict[str, Any], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SCORES_BYTES", 1 << 16)
    lengths = [[300, 724]]
    inputs = heads(lengths, torch.float32, num_kv_heads=1, head_dim=4)
    documents = Documents.of(ids_of(lengths)) if packed else None
    with Calls() as calls:
        with_gradients(lambda *qkv: attention(*qkv, documents, **options), inputs)
    assert 4 * 4 * 4 * 1024 <= calls.largest < 1024**2 / 3, "a mask of bools would be as large"


def test_dropout_is_drawn_again_as_it_was() -> None:
    inputs, ids = heads(), ids_of(LENGTHS)
    for options in ({}, {"window": 6}, {"soft_cap": 2.0}):

        def run(*qkv: Tensor, options: dict[str, Any] = options) -> Tensor:
            torch.manual_seed(3)
            return attention(*qkv, Documents.of(ids), dropout=0.5, **options)

        first, second = with_gradients(run, inputs), with_gradients(run, inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        without = attention(*inputs, Documents.of(ids), **options)
        assert not torch.allclose(first[0], without)
        # Linear in the values: their gradient is the slope, whatever was dropped.
        query, key, value = (tensor.clone().requires_grad_() for tensor in inputs)
        output = run(query, key, value)
        [slope] = torch.autograd.grad(output.sum(), value)
        torch.testing.assert_close((slope * value).sum(), output.sum())


@pytest.mark.parametrize("rows", [[[1, 2, 3]], [[6]], [[2, 4], [6], [5, 1]]])
def test_documents_are_found_row_by_row(rows: list[list[int]]) -> None:
    documents = Documents.of(ids_of(rows))
    lengths = [length for row in rows for length in row]
    assert documents.lengths == lengths
    assert documents.longest == max(lengths)
    assert documents.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert documents.are_rows == all(len(row) == 1 for row in rows)


def test_a_document_does_not_go_on_behind_another() -> None:
    assert Documents.of(torch.tensor([[0, 0, 1, 0]])).lengths == [2, 1, 1]


def test_tensors_without_values_have_documents_that_are_made_up() -> None:
    assert Documents.of(torch.empty(2, 6, dtype=torch.int32, device="meta")).lengths == [6, 6]
    with FakeTensorMode():
        documents = Documents.of(torch.zeros(2, 6, dtype=torch.int32))
        query = torch.empty(2, 4, 6, 8, requires_grad=True)
        attention(query, query, query, documents, window=3).sum().backward()
    assert documents.lengths == [6, 6]
    assert query.grad is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.zeros(3, 2, 39, 8)}, "40 queries for 39 keys"),
        ({"key": torch.zeros(3, 3, 40, 8)}, "cannot be shared evenly by 3"),
        ({"window": 0}, "window=0"),
        ({"documents": Documents.whole(3, 41, CPU)}, "3 rows of 41 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    query, key, value = heads()
    with pytest.raises(ValueError, match=message):
        attention(**{"query": query, "key": key, "value": value, "documents": None, **changes})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    "options", [{}, {"window": 7, "scale": 0.5}, {"window": 7, "soft_cap": 2.0, "sinks": True}], ids=str
)
def test_flex_attention_is_asked_for_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward pass as torch writes it down, without a compiler: a CPU has no other, and no backward."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(module, "_compiled", lambda name: getattr(flex_attention, name))
    inputs, documents, options = heads(dtype=torch.float32, head_dim=16), Documents.of(ids_of(LENGTHS)), dict(options)
    sinks = torch.randn(4) if options.pop("sinks", False) else None
    every: dict[str, Any] = {"scale": None, "window": None, "soft_cap": None} | options
    with torch.no_grad():
        found = [module._flex(*inputs, documents, sinks=sinks, **every) for _ in range(2)]
    expected = dense(*inputs, ids_of(LENGTHS), sinks=sinks, **options)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0], found[1])
    assert len(documents._block_masks) == 1, "made once"


@pytest.mark.parametrize("window", [None, 3])
def test_varlen_is_asked_for_the_same(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, begins: Tensor, _: Tensor, longest: int, *__: int, **options: Any
    ) -> Tensor:
        """As torch documents it, a document at a time."""
        assert longest == int(begins.diff().max())
        assert options["enable_gqa"]
        before, after = options["window_size"]
        assert after == 0
        outputs = []
        for begin, end in pairwise(begins.tolist()):
            part = (tensor[begin:end].transpose(0, 1)[None] for tensor in (query, key, value))
            outputs.append(dense(*part, ids=None, scale=options["scale"], window=None if before < 0 else before + 1)[0])
        return torch.cat(outputs)

    monkeypatch.setattr(module, "_varlen_function", lambda: varlen_attn)
    inputs, documents = heads(), Documents.of(ids_of(LENGTHS))
    found = module._varlen(*inputs, documents, 0.3, window)
    torch.testing.assert_close(found, dense(*inputs, ids_of(LENGTHS), scale=0.3, window=window))


def test_torchs_varlen_takes_what_it_is_given() -> None:
    """Its name and its arguments; it runs on CUDA alone."""
    assert module._varlen_function() is not None


def test_halves_have_documents_of_few_lengths() -> None:
    for dtype, lengths in ((torch.bfloat16, {64, 128}), (torch.float32, {5, 64, 70})):
        parts = [module._padded(torch.ones(1, 2, length, 4, dtype=dtype)) for length in (5, 64, 70)]
        assert {part.shape[2] for [part] in parts} == lengths
        assert [int(part.sum()) for [part] in parts] == [8 * length for length in (5, 64, 70)]
