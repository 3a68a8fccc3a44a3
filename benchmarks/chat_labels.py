"""Claim: of real conversations exactly the answers are learned, in five families of templates.

`python benchmarks/chat_labels.py --tokenizer FOLDER ROWS.jsonl ... [--dialogues FOLDER]` takes the tokenizer of FOLDER
with each of five templates (ChatML, Llama 3, Mistral, Gemma, Qwen 3), and compares tokens and what is learned of every
conversation with an oracle: transformers' `return_assistant_tokens_mask` of the same template with {% generation %}
marks around what is to be learned. windlass gets the template without marks, and then the one with them.

`--dialogues` is a folder of the chatterbot corpus: YAML files of conversations, of which those of several turns count.

Then a small Llama's loss of a tenth of the first file's rows is compared, packed into samples against one by one.

Bars: not one conversation differs; the losses differ by no more than 1e-6. Times are printed and never asserted.
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

import numpy as np
import torch
import yaml
from common import print_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.chat import FAMILIES, Family  # pyrefly: ignore  # of the tests

from windlass.data.chat import chat_source
from windlass.data.chat_rendering import RowRefused
from windlass.data.chat_rows import Conversation
from windlass.data.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from windlass.data.config import Borders, Packing, TooLong
from windlass.data.loader import make_batch
from windlass.data.prepare import prepare
from windlass.data.samples import PackedDocuments
from windlass.data.shards import TokenDataset
from windlass.data.tally import Tally
from windlass.models.config import LlamaConfig
from windlass.train.objectives.config import NextTokenConfig


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


def packed_loss(rows: Path, tokenizer: ChatTokenizer, seq_len: int) -> dict[Packing, tuple[float, int, int]]:
    """The mean loss in nats of a small Llama, with the number of targets and of samples, packed and one by one."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    model = LlamaConfig(vocab_size=tokenizer.vocab_size, **sizes).build()
    model.materialize(torch.device("cpu"), 0)
    objective, losses = NextTokenConfig().build(), {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        prepare(chat_source([rows]), tokenizer, Path(folder), validation_fraction=0.1, num_workers=1, progress=False)
        dataset = TokenDataset(folder, "validation")  # a tenth, for the time it takes
        for packing in Packing:
            samples = PackedDocuments(dataset, seq_len, packing, TooLong.error)
            total = num_targets = 0
            for number in range(samples.num_samples):
                batch = make_batch(dataset, np.array([number]), seq_len, Borders.attention, None, samples)
                count = lambda hidden, head, batch=batch: objective.loss_sum(hidden, head, batch)  # noqa: E731
                total += model(batch.input_ids, batch.document_ids, count).item()
                num_targets += objective.num_targets(batch)
            losses[packing] = (total / num_targets, num_targets, samples.num_samples)
    return losses


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
    losses = packed_loss(args.rows[0], tokenizer_of(args.tokenizer, FAMILIES["chatml"], FAMILIES["chatml"].plain), 512)
    for packing, (loss, num_targets, num_samples) in losses.items():
        print(
            f"packing={packing}: loss {loss:.9f} nats, {num_targets:,} targets in {num_samples:,} samples of 512 tokens"
        )
    difference = abs(losses[Packing.documents][0] - losses[Packing.none][0])
    print(f"difference {difference:.1e}")
    return 1 if difference > 1e-6 or any(row[i] != "0" for row in table for i in (1, 2, 4, 5)) else 0


if __name__ == "__main__":
    sys.exit(main())
