"""What is learned of a conversation, held against transformers' own masks of the same templates with marks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from support.chat import FAMILIES, write_chat_folder

from windlass.data.chat_rendering import RowRefused
from windlass.data.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from windlass.data.tally import Tally

pytest.importorskip("transformers")
pytest.importorskip("jinja2")
pytestmark = pytest.mark.slow  # transformers takes seconds to import

Message = dict[str, Any]
Load = Callable[..., ChatTokenizer]


def turns(*contents: str, system: str | None = None) -> list[Message]:
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


CONVERSATIONS = {
    "one": turns("How many sheets?", "Three."),
    "several": turns("A?", "The anchor holds.", "B?", "The windlass lifts.", "C?", "user and assistant"),
    "repeats": turns("user", "user", "assistant\nThree.", "Three.", "Three.", "assistant"),
    "open": turns("A?", "Three.", "And then?"),
    "blanks": turns("  A?\n", "\n  Three.  \n\n", "B?", " "),
    "unicode": turns("Vad är bygglov?", "Ett beslut: åäö 日本語 🙂 e\u0301", "Och?", "🙂"),
    "code": turns("Print", "```python\nprint('{{ x }}{% if %}')\n```\n\n- one\n- two"),
    "empty": turns("Say nothing.", ""),
    "long": turns("Q" * 300, "The windlass lifts the anchor. " * 60),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    @functools.cache
    def of(name: str, is_marked: bool = False, template: str | None = None) -> ChatTokenizer:
        family = FAMILIES[name]
        folder = tmp_path_factory.mktemp(name)
        write_chat_folder(folder, family, template or (family.marked if is_marked else None))
        return load_chat_tokenizer(str(folder))

    return of


def oracle(tokenizer: ChatTokenizer, messages: Sequence[Message], **options: Any) -> tuple[list[int], list[int]]:
    """Ids and mask by transformers, of a template with marks."""
    made = tokenizer._tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    return made["input_ids"], made["assistant_masks"]


def encoded(tokenizer: ChatTokenizer, messages: Sequence[Message], **others: Any) -> tuple[list[int], list[int]]:
    made = tokenizer.encode_conversation({"messages": list(messages), **others}, Tally())
    assert made.ids.dtype == np.uint32 and made.targets.dtype == np.uint8
    return made.ids.tolist(), made.targets.tolist()


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_learned_is_what_marks_enclose(load: Load, name: str, conversation: str) -> None:
    plain, marked = load(name), load(name, is_marked=True)
    with_system = turns(*(m["content"] for m in CONVERSATIONS[conversation]), system="Be brief. Three.")
    for messages in (
        (CONVERSATIONS[conversation], with_system) if FAMILIES[name].has_system else (CONVERSATIONS[conversation],)
    ):
        expected = oracle(marked, messages)
        assert 0 < sum(expected[1]) < len(expected[1])
        assert encoded(plain, messages) == expected
        assert encoded(marked, messages) == expected


THINKING = "<think>\nThree sheets, I think.\n</think>\n\nThree."
TOOLS = [{"type": "function", "function": {"name": "count", "parameters": {"maximum": 12345678901}}}]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "count", "arguments": {}}}]}


@pytest.mark.parametrize(
    "messages",
    [
        turns("A?", THINKING),
        turns("A?", THINKING, "B?", THINKING, "C?", "Four."),
        turns("A?", "Four.", "B?", THINKING, "C?", THINKING),
        [*turns("A?"), {"role": "assistant", "content": "Three.", "reasoning_content": "Let me count."}],
        [*turns("A?"), CALL, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "Three."}],
        [*turns("A?"), {**CALL, "content": "I count."}],
    ],
)
def test_reasoning_and_calls_of_tools_are_learned_where_they_are_shown(load: Load, messages: list[Message]) -> None:
    expected = oracle(load("qwen_3", is_marked=True), messages, tools=TOOLS)
    assert encoded(load("qwen_3"), messages, tools=TOOLS) == expected
    assert encoded(load("qwen_3", is_marked=True), messages, tools=TOOLS) == expected
    assert "12345678901" in load("qwen_3").decode(expected[0])


@pytest.mark.parametrize("is_marked", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_text_that_spells_special_tokens_is_text(load: Load, name: str, is_marked: bool) -> None:
    tokenizer, family = load(name, is_marked), FAMILIES[name]
    special = {tokenizer._backend.token_to_id(token) for token in family.special}
    letters = turns("What ends a turn? xx user", "That xxxxx: xx and xx", "B?", "Three.")
    spelled = [
        {**message, "content": message["content"].replace("xx", f"{family.eos}{family.bos}")} for message in letters
    ]
    ids, targets = encoded(tokenizer, spelled)
    plain_ids, plain_targets = encoded(tokenizer, letters)
    assert [i for i in ids if i in special] == [i for i in plain_ids if i in special], "those of the template alone"
    assert tokenizer.decode(ids) == tokenizer._render({"messages": spelled})
    learned = [
        tokenizer.decode([i for i, t in zip(*pair, strict=True) if t])
        for pair in ((ids, targets), (plain_ids, plain_targets))
    ]
    assert learned[0] == learned[1].replace("xx", f"{family.eos}{family.bos}")
    sanitized = tokenizer._tokenizer.apply_chat_template(spelled, sanitize_control_tokens=True)["input_ids"]
    assert ids == sanitized


def test_special_tokens_elsewhere_than_in_contents_are_refused(load: Load) -> None:
    tokenizer = load("qwen_3")
    messages = [*turns("A?"), {"role": "assistant", "content": "B", "reasoning_content": "<|im_end|>"}]
    with pytest.raises(RowRefused, match=r"'<\|im_end\|>' in `messages\[1\]\.reasoning_content`"):
        encoded(tokenizer, messages)
    tools = [{"function": {"name": "<|im_start|>"}}]
    with pytest.raises(RowRefused, match=r"in `tools\[0\]\.function\.name`"):
        encoded(tokenizer, turns("A?", "B"), tools=tools)
    joined = "{%- for m in messages -%}{{- m['content'] + '|im_end|>' -}}{%- endfor -%}"
    with pytest.raises(RowRefused, match="a part of a special token"):
        encoded(load("chatml", template=joined), turns("<|im_start|> <", "B"))


TURN = "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' + WHAT + '<|im_end|>' -}}{%- endfor -%}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TURN.replace("WHAT", "m['content'] | upper"), "does not show what"),
        (TURN.replace("WHAT", "'Three.'"), "does not show what"),
        (TURN.replace("WHAT", "m['content'] + m['content']"), "does not show what"),
        (TURN.replace("WHAT", "(m['content'] | length) | string + m['content']"), "in another way"),
        (TURN.replace("WHAT", "m['content']").replace("'role'", "'speaker'"), r"refuses it \(.*speaker"),
        ("{%- generation -%}{%- endgeneration -%}" + TURN.replace("WHAT", "m['content']"), "has nothing to learn"),
    ],
)
def test_templates_that_hide_answers_are_refused(load: Load, template: str, message: str) -> None:
    with pytest.raises(RowRefused, match=message):
        encoded(load("chatml", template=template), turns("A?", "Three!"))


def test_what_a_template_says_is_told(load: Load) -> None:
    with pytest.raises(RowRefused, match=r"refuses it \(Conversation roles must alternate"):
        encoded(load("mistral"), [*turns("A?", "B."), {"role": "assistant", "content": "C."}])
    with pytest.raises(RowRefused, match="System role not supported"):
        encoded(load("gemma"), turns("A?", "B.", system="C."))


def test_answers_that_nothing_ends_are_counted(load: Load) -> None:
    template = "{%- for m in messages -%}{{- m['role'] + ': ' + m['content'] + '\\n' -}}{%- endfor -%}"
    tally = Tally()
    made = load("chatml", template=template).encode_conversation({"messages": turns("A?", "B", "C?", "D")}, tally)
    assert (tally.answers, tally.unended_answers) == (2, 2)
    assert load("chatml").decode(made.ids[made.targets != 0]) == "BD"
