"""Rows of conversations, in each format and each kind of file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from windlass.data.chat import chat_source
from windlass.data.chat_rows import conversation_of_row
from windlass.data.config import ChatFormat
from windlass.data.tally import Tally
from windlass.errors import DataError

QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"maximum": 10}}}]
ROWS: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"messages": [QUESTION, ANSWER]}, [QUESTION, ANSWER]),
    ({"messages": [{**QUESTION, "name": None}, ANSWER], "prompt": "Q", "id": 3}, [QUESTION, ANSWER]),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, [QUESTION, ANSWER]),
    ({"conversations": [QUESTION, ANSWER]}, [QUESTION, ANSWER]),
    (
        {"system": "S", "conversations": [{"from": "tool", "value": "T"}, {"from": "gpt", "value": "A"}]},
        [{"role": "system", "content": "S"}, {"role": "tool", "content": "T"}, ANSWER],
    ),
    ({"instruction": "Q", "input": "", "output": "A"}, [QUESTION, ANSWER]),
    ({"instruction": "Q", "input": "I", "output": "A"}, [{"role": "user", "content": "Q\n\nI"}, ANSWER]),
    ({"instruction": "Q", "output": "A", "history": [["Q", "A"]]}, [QUESTION, ANSWER, QUESTION, ANSWER]),
    ({"prompt": "Q", "completion": "A"}, [QUESTION, ANSWER]),
    ({"prompt": [QUESTION], "completion": [ANSWER]}, [QUESTION, ANSWER]),
]


def refused(rule: str, fix: str) -> DataError:
    return DataError("row", "here", rule, fix)


@pytest.mark.parametrize(("row", "messages"), ROWS)
def test_each_format_becomes_messages(row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert conversation_of_row(row, ChatFormat.auto, refused) == {"messages": messages}
    for tools in (TOOLS, json.dumps(TOOLS)):
        made = conversation_of_row({**row, "tools": tools}, ChatFormat.auto, refused)
        assert made == {"messages": messages, "tools": TOOLS}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "must be a JSON object, not an array"),
        ("text", "must be a JSON object, not a string"),
        ({"text": "A"}, "has the keys of no format .*its keys are: text"),
        ({"messages": []}, "has no answer"),
        ({"messages": [QUESTION]}, "has no answer"),
        ({"messages": [QUESTION, {"role": "bot", "content": "A"}]}, r"unknown role: `messages\[1\].role` is 'bot'"),
        ({"messages": [QUESTION, {"content": "A"}]}, "unknown role.*is None"),
        ({"messages": [QUESTION, {"role": ["user"], "content": "A"}]}, "unknown role"),
        ({"messages": [QUESTION, {"role": "assistant"}]}, r"a string under 'messages\[1\].content', not null"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "must hold a string"),
        ({"messages": "A"}, "must hold a list of objects under 'messages'"),
        ({"conversations": [{"from": "bing", "value": "A"}]}, r"unknown role: `conversations\[0\].from` is 'bing'"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "must hold a string"),
        ({"instruction": "Q", "output": None}, "has the keys of no format"),
        ({"instruction": "Q", "output": "A", "history": [["Q"]]}, "pairs of a question"),
        ({"messages": [ANSWER], "tools": "["}, "`tools`: it is not JSON"),
        ({"messages": [ANSWER], "tools": {"a": 1}}, "list of objects under 'tools'"),
    ],
)
def test_rows_that_are_no_conversations_are_refused(row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        conversation_of_row(row, ChatFormat.auto, refused)


def test_a_format_that_is_named_is_asked_for() -> None:
    row = {"messages": [QUESTION, ANSWER], "prompt": "Q", "completion": "B"}
    made = conversation_of_row(row, ChatFormat.prompt_completion, refused)
    assert made["messages"][1]["content"] == "B"
    with pytest.raises(
        DataError, match=r"no key 'conversations', as data\.format=sharegpt asks; its keys are: messages"
    ):
        conversation_of_row(row, ChatFormat.sharegpt, refused)


def conversations(path: Path) -> list[Any]:
    source = chat_source([path])
    return [json.loads(document.text) for unit in source.units for document in unit.documents(Tally())]


def test_files_of_every_kind_give_the_same(tmp_path: Path) -> None:
    rows = [{"messages": [{**QUESTION, "content": f"Q{i} åä\u2028"}, ANSWER], "tools": TOOLS} for i in range(50)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text("\ufeff" + lines + "\n")
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet", row_group_size=20)
    for path in sorted(tmp_path.iterdir()):
        assert conversations(path) == rows, path.name
    assert conversations(tmp_path) == rows * 4


def test_columns_of_parquet(tmp_path: Path) -> None:
    """A struct has the fields of all its rows; where a row has none it is as if the key were not there."""
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "Q", "weight": None},
                {"from": "gpt", "value": "A", "weight": 1},
            ]
        },
        {"conversations": [{"from": "human", "value": "Q2"}, {"from": "gpt", "value": "A2"}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [c["messages"][1]["content"] for c in conversations(tmp_path / "a.parquet")] == ["A", "A2"]
    pq.write_table(pa.table({"instruction": ["Q"], "output": ["A"], "other": [b"\xff"]}), tmp_path / "b.parquet")
    assert conversations(tmp_path / "b.parquet") == [{"messages": [QUESTION, ANSWER]}]
    pq.write_table(pa.table({"text": ["A"]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet: has the columns of no format .*; it has: text"):
        chat_source([tmp_path / "c.parquet"])
    pq.write_table(pa.table({"messages": pa.array([None], pa.list_(pa.string()))}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet: row 0 has the keys of no format"):
        conversations(tmp_path / "d.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "Q", "completion": "A"}\n\n[1]\n', r"a\.jsonl:3: must be a JSON object, not an array"),
        ("a.jsonl", '{"prompt": "Q"}\n', r"a\.jsonl:1: has the keys of no format"),
        ("a.jsonl", "{\n", r"a\.jsonl:1: is not JSON"),
        ("a.jsonl", "", "all 1 files are empty"),
        ("a.json", '[{"prompt": "Q", "completion": "A"}, 3]', r"a\.json\[1\]: must be a JSON object, not a number"),
        ("a.json", '{"data": []}\n', r"has the keys of no format"),
        ("a.txt", "User: Q\n", "has no conversations: it is neither JSON Lines"),
        ("a.jsonl", '{"prompt": "\\ud800", "completion": "A"}\n', "half of a surrogate pair"),
    ],
)
def test_files_that_hold_no_conversations_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        conversations(tmp_path / name)
