"""The places in a rendered conversation: what its messages say, and what of it is learned. Torch-free.

They are found by rendering a conversation again with a message's content replaced by two different characters. The two
renderings begin alike and end alike; what the whole rendering has between that beginning and that end is what the
message says in it. Text is never searched for.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from windlass.data.chat_rows import ANSWERS, Conversation

Span = tuple[int, int]
"""Characters [start, stop) of a rendering."""
VARIANTS = ("x", "y")


class RowRefused(ValueError):
    """A conversation that cannot be used: it breaks `rule`, and `fix` says what to do."""

    def __init__(self, rule: str, fix: str) -> None:
        self.rule, self.fix = rule, fix
        super().__init__(rule, fix)


@dataclass(frozen=True)
class Renderer:
    """Renders conversations, and finds what they consist of.

    Args:
        render: makes the text of a conversation, or with True of one that the model is to go on with.
        special: matches the tokens that the tokenizer takes for special; the longest of each place.
        eos_token: the one that ends a text.
    """

    render: Callable[[Conversation, bool], str]
    special: re.Pattern[str]
    eos_token: str | None

    def answers(self, conversation: Conversation, rendering: str) -> tuple[list[Span], int]:
        """What is learned of `rendering`: each answer, and the special token right behind it.

        Returns:
            The spans in their order, and how many of them no special token ends.

        Raises:
            RowRefused: the template does not show an answer at one place, as it is or as it makes it.
        """
        spans, num_unended = [], 0
        for number, message in enumerate(conversation["messages"]):
            if message["role"] == ANSWERS:
                start, stop = self.place(conversation, number, rendering)
                end = self._end_of_turn(rendering, stop)
                num_unended += end == stop
                spans.append((start, end))
        if any(first[1] > second[0] for first, second in itertools.pairwise(spans)):
            raise RowRefused("its chat template shows its answers in another order", "mend the template")
        return spans, num_unended

    def place(self, conversation: Conversation, number: int, rendering: str) -> Span:
        """The place in `rendering` of what message `number` says. Raises RowRefused where there is no one place."""
        before, after = self._around(conversation, number)
        if not rendering.startswith(before) and conversation["messages"][number]["role"] == ANSWERS:
            # What comes before the content of an answer, such as its reasoning, is said by the model, too: the answer
            # begins where the model is asked to go on.
            asked = {**conversation, "messages": conversation["messages"][:number]}
            prompt = self.render(asked, True)
            before = before if prompt == self.render(asked, False) else prompt
        stop = len(rendering) - len(after)
        if len(before) > stop or not rendering.startswith(before) or not rendering.endswith(after):
            raise RowRefused(
                f"its chat template renders the rest in another way for what messages[{number}] says",
                "mark the answers in the template with {% generation %}, or mend or remove the row",
            )
        return len(before), stop

    def _around(self, conversation: Conversation, number: int) -> tuple[str, str]:
        """The rendering before and behind what message `number` says, whatever that is."""
        messages = list(conversation["messages"])
        variants = []
        for content in VARIANTS:
            # Nothing but its content: reasoning and calls of tools are part of what it says.
            kept = {"role": messages[number]["role"], "content": content}
            if messages[number]["role"] != ANSWERS:
                kept = {**messages[number], "content": content}
            messages[number] = kept
            variants.append(self.render({**conversation, "messages": messages}, False))
        first, second = variants
        before = first[: _common_length(first, second)]
        after = first[len(before) + 1 :]
        if first != before + VARIANTS[0] + after or second != before + VARIANTS[1] + after:
            raise RowRefused(
                f"its chat template does not show what messages[{number}] says at exactly one place",
                "mark the answers in the template with {% generation %}, or mend or remove the row",
            )
        return before, after

    def _end_of_turn(self, rendering: str, stop: int) -> int:
        """The end of the special token right behind `stop`, blanks before the one that ends a text included."""
        if found := self.special.match(rendering, stop):
            return found.end()
        blanks = len(rendering) - len(rendering[stop:].lstrip())
        if self.eos_token and rendering.startswith(self.eos_token, blanks):
            return blanks + len(self.eos_token)
        return stop

    def spelled(self, conversation: Conversation) -> list[int]:
        """The messages whose content spells a special token. Raises RowRefused where something else does."""
        numbers = []
        for number, message in enumerate(conversation["messages"]):
            content = message.get("content")
            if isinstance(content, str) and self.special.search(content):
                numbers.append(number)
            others = {key: value for key, value in message.items() if key != "content"}
            self._refuse_special(others, f"messages[{number}]")
        self._refuse_special(conversation.get("tools"), "tools")
        return numbers

    def _refuse_special(self, value: Any, where: str) -> None:
        if isinstance(value, str) and (found := self.special.search(value)):
            rule = f"spells the special token {found.group()!r} in `{where}`, where it would be taken for the token"
            raise RowRefused(rule, "mend or remove the row")
        if isinstance(value, dict):
            for key, item in value.items():
                self._refuse_special(key, where)
                self._refuse_special(item, f"{where}.{key}")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                self._refuse_special(item, f"{where}[{number}]")

    def own_special(self, rendering: str, contents: Sequence[Span]) -> list[Span]:
        """The places of special tokens in `rendering` that are the template's own, and in none of `contents`."""
        own: list[Span] = []
        position = 0
        for start, stop in [*sorted(contents), (len(rendering), len(rendering))]:
            own += [found.span() for found in self.special.finditer(rendering, position, start)]
            position = stop
        for first, last in [found.span() for found in self.special.finditer(rendering)]:
            is_said = any(start <= first and last <= stop for start, stop in contents)
            if not is_said and (first, last) not in own:
                raise RowRefused("spells a part of a special token that its chat template completes", "mend the row")
        return own

    def innocent(self, rendering: str, contents: Sequence[Span]) -> str:
        """`rendering` with letters for the special tokens that `contents` spell."""
        parts, position = [], 0
        for start, stop in sorted(contents):
            parts.append(rendering[position:start])
            parts.append(self.special.sub(lambda found: "x" * len(found.group()), rendering[start:stop]))
            position = stop
        return "".join([*parts, rendering[position:]])


def _common_length(first: str, second: str) -> int:
    """The number of characters with which both begin."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def flags_of(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """The tokens that have characters of `spans`: bool [num_tokens].

    Args:
        offsets: int64 [num_tokens, 2], the characters [start, stop) of each token.
    """
    flags = np.zeros(len(offsets), dtype=bool)
    for start, stop in spans:
        inside = np.flatnonzero((offsets[:, 0] < stop) & (offsets[:, 1] > start))
        if inside.size:
            flags[inside[0] : inside[-1] + 1] = True
    return flags
