"""Rows of conversations: each of the usual formats becomes messages with roles. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from windlass.data.config import ChatFormat
from windlass.data.json_rows import Refusal, json_type
from windlass.data.source_files import shortened
from windlass.untrusted import Malformed, parse_json

Conversation = dict[str, Any]
"""`messages`: objects with a `role` and, as a rule, a `content`; `tools`: objects, or there is no such key."""

ROLES = ("system", "developer", "user", "assistant", "tool")
ANSWERS = "assistant"
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""The roles by their names in ShareGPT."""
KEYS: Mapping[ChatFormat, Sequence[str]] = {
    ChatFormat.messages: ("messages",),
    ChatFormat.sharegpt: ("conversations",),
    ChatFormat.alpaca: ("instruction", "output"),
    ChatFormat.prompt_completion: ("prompt", "completion"),
}
"""The keys that a row of each format has. The first format that fits is taken."""
COLUMNS = ("messages", "conversations", "instruction", "input", "output", "history", "prompt", "completion")
EXTRA_COLUMNS = ("system", "tools")
MEND = "mend or remove the row"


def conversation_of_row(value: object, chat_format: ChatFormat, refused: Refusal) -> Conversation:
    """The conversation of a row. Raises what `refused` makes of a row that is none, or has no answer."""
    if not isinstance(value, dict):
        raise refused(f"must be a JSON object, not {json_type(value)}", MEND)
    row = {key: item for key, item in value.items() if item is not None}
    if chat_format == ChatFormat.auto:
        chat_format = _format_of(row, refused)
    for key in KEYS[chat_format]:
        if key not in row:
            rule = f"has no key {key!r}, as data.format={chat_format.value} asks; its keys are: {_names(row)}"
            raise refused(rule, "set data.format=auto (--chat-format auto), or mend the row")
    messages = _READERS[chat_format](row, refused)
    system = row.get("system")
    if system and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": _text(system, "system", refused)})
    if not any(message["role"] == ANSWERS for message in messages):
        raise refused("has no answer: no message of the role assistant", MEND)
    conversation: Conversation = {"messages": messages}
    if tools := _tools(row.get("tools"), refused):
        conversation["tools"] = tools
    return conversation


def to_text(conversation: Conversation, refused: Refusal) -> str:
    """`conversation` as JSON, which `json.loads` reads back."""
    text = json.dumps(conversation, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise refused("escapes half of a surrogate pair, which no UTF-8 text can hold", MEND) from None
    return text


def _format_of(row: Mapping[str, Any], refused: Refusal) -> ChatFormat:
    for chat_format, keys in KEYS.items():
        if all(key in row for key in keys):
            return chat_format
    wanted = "; ".join(" and ".join(keys) for keys in KEYS.values())
    raise refused(f"has the keys of no format ({wanted}); its keys are: {_names(row)}", "rename its keys")


def _of_messages(row: Mapping[str, Any], refused: Refusal) -> list[dict[str, Any]]:
    return _messages(row["messages"], "messages", refused)


def _of_sharegpt(row: Mapping[str, Any], refused: Refusal) -> list[dict[str, Any]]:
    turns = _objects(row["conversations"], "conversations", refused)
    if turns and all("role" in turn for turn in turns):
        return _messages(turns, "conversations", refused)
    messages = []
    for number, turn in enumerate(turns):
        speaker = turn.get("from")
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise _unknown_role(f"conversations[{number}]", "from", speaker, sorted(SPEAKERS), refused)
        content = _text(turn.get("value"), f"conversations[{number}].value", refused)
        messages.append({"role": role, "content": content})
    return messages


def _of_alpaca(row: Mapping[str, Any], refused: Refusal) -> list[dict[str, Any]]:
    messages = []
    history = row.get("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise refused("must hold pairs of a question and an answer under 'history'", MEND)
    for number, (question, answer) in enumerate(history):
        messages += _exchange(question, answer, f"history[{number}][0]", f"history[{number}][1]", refused)
    question = _text(row["instruction"], "instruction", refused)
    if given := _text(row.get("input", ""), "input", refused):
        question = f"{question}\n\n{given}"
    return messages + _exchange(question, row["output"], "instruction", "output", refused)


def _of_prompt_completion(row: Mapping[str, Any], refused: Refusal) -> list[dict[str, Any]]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        return _messages(prompt, "prompt", refused) + _messages(completion, "completion", refused)
    return _exchange(prompt, completion, "prompt", "completion", refused)


_READERS: Mapping[ChatFormat, Callable[[Mapping[str, Any], Refusal], list[dict[str, Any]]]] = {
    ChatFormat.messages: _of_messages,
    ChatFormat.sharegpt: _of_sharegpt,
    ChatFormat.alpaca: _of_alpaca,
    ChatFormat.prompt_completion: _of_prompt_completion,
}


def _messages(value: object, where: str, refused: Refusal) -> list[dict[str, Any]]:
    messages = []
    for number, given in enumerate(_objects(value, where, refused)):
        message = {key: item for key, item in given.items() if item is not None}
        role, place = message.get("role"), f"{where}[{number}]"
        if role not in ROLES:
            raise _unknown_role(place, "role", role, ROLES, refused)
        if "content" in message or "tool_calls" not in message:
            message["content"] = _text(message.get("content"), f"{place}.content", refused)
        messages.append(message)
    return messages


def _exchange(
    question: object, answer: object, of_question: str, of_answer: str, refused: Refusal
) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": _text(question, of_question, refused)},
        {"role": ANSWERS, "content": _text(answer, of_answer, refused)},
    ]


def _objects(value: object, where: str, refused: Refusal) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise refused(f"must hold a list of objects under {where!r}, not {json_type(value)}", MEND)
    return value


def _text(value: object, where: str, refused: Refusal) -> str:
    if not isinstance(value, str):
        raise refused(f"must hold a string under {where!r}, not {json_type(value)}", MEND)
    return value


def _tools(value: object, refused: Refusal) -> list[dict[str, Any]]:
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except Malformed as error:
            raise refused(f"cannot be used: `tools`: {error}", MEND) from None
    return _objects(value, "tools", refused) if value else []


def _unknown_role(place: str, key: str, role: object, known: Sequence[str], refused: Refusal) -> Exception:
    shown = shortened(repr(role))
    return refused(f"has an unknown role: `{place}.{key}` is {shown}, not one of {', '.join(known)}", MEND)


def _names(row: Mapping[str, Any]) -> str:
    return shortened(", ".join(row) or "none").encode("utf-8", "backslashreplace").decode()
