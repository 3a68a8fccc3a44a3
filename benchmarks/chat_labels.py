"""Claim: of real conversations exactly the answers are learned, in five families of templates.

`python benchmarks/chat_labels.py --tokenizer FOLDER ROWS.jsonl ... [--dialogues FOLDER]` takes the tokenizer of FOLDER
with each of five templates (ChatML, Llama 3, Mistral, Gemma, Qwen 3), and compares tokens and what is learned of every
conversation with an oracle: transformers' `return_assistant_tokens_mask` of the same template with {% generation %}
marks around what is to be learned. windlass gets the template without marks, and then the one with them.

`--dialogues` is a folder of the chatterbot corpus: YAML files of conversations, of which those of several turns count.

Bar: not one conversation differs. Times are printed and never asserted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from common import print_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.chat import FAMILIES, Family  # pyrefly: ignore  # of the tests

from windlass.data.chat import chat_source
from windlass.data.chat_rendering import RowRefused
from windlass.data.chat_rows import Conversation
from windlass.data.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from windlass.data.tally import Tally


def conversations_of(paths: list[Path]) -> list[Conversation]:
    """The conversations of files with rows."""
    units = chat_source(paths).units
    return [json.loads(document.text) for unit in units for document in unit.documents(Tally())]


def dialogues(folder: Path) -> Iterator[Conversation]:
    """The conversations of the chatterbot corpus that have several turns."""
    for path in sorted(folder.glob("*.yml")):
        for lines in yaml.safe_load(path.read_text())["conversations"]:
            texts = [str(line) for line in lines]
            if len(texts) > 2:
                roles = ("user", "assistant")
                yield {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def tokenizer_of(folder: Path, family: Family, template: str) -> ChatTokenizer:
    """The tokenizer of `folder` with another template, whose special tokens it is given."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(family.special), "bos_token": family.bos, "eos_token": family.eos}
    )
    tokenizer.chat_template = template
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        return load_chat_tokenizer(saved)


def differs(conversation: Conversation, tokenizer: ChatTokenizer, oracle: ChatTokenizer) -> bool:
    made = oracle._tokenizer.apply_chat_template(
        conversation["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = tokenizer.encode_conversation(conversation, Tally())
    assert 0 < sum(made["assistant_masks"]) < len(made["input_ids"])
    return (ours.ids.tolist(), ours.targets.tolist()) != (made["input_ids"], made["assistant_masks"])


def compare(folder: Path, name: str, conversations: list[Conversation]) -> list[str]:
    family = FAMILIES[name]
    oracle = tokenizer_of(folder, family, family.marked)
    cells = [name]
    for template in (family.plain, family.marked):
        tokenizer = tokenizer_of(folder, family, template)
        num_different, refused = 0, 0
        for conversation in conversations:
            try:
                num_different += differs(conversation, tokenizer, oracle)
            except RowRefused:
                refused += 1
        tally, begin, num_tokens = Tally(), time.perf_counter(), 0
        for conversation in conversations:
            num_tokens += len(tokenizer.encode_conversation(conversation, tally).ids)
        seconds = time.perf_counter() - begin
        cells += [f"{num_different}", f"{refused}", f"{num_tokens / seconds:,.0f}"]
    return [*cells, f"{tally.answers:,}", f"{num_tokens:,}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path, metavar="ROWS", help="files of conversations")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--dialogues", type=Path, help="a folder of YAML files of the chatterbot corpus")
    args = parser.parse_args()
    conversations = conversations_of(args.rows)
    several = [] if args.dialogues is None else list(dialogues(args.dialogues))
    print(f"{len(conversations):,} conversations of rows, {len(several):,} dialogues of several turns")
    header = ["template", "differ", "refused", "tokens/s", "differ, marked", "refused", "tokens/s", "answers", "tokens"]
    table = [compare(args.tokenizer, name, conversations + several) for name in FAMILIES]
    print_table(header, table)
    return 1 if any(row[i] != "0" for row in table for i in (1, 2, 4, 5)) else 0


if __name__ == "__main__":
    sys.exit(main())
