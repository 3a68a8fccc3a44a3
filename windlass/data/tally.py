"""Counts of what becomes of text, so that nothing is left out unsaid. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Tally:
    """Counts of text on its way to tokens."""

    characters: int = 0
    """In documents with text."""
    empty_documents: int = 0
    """Left out: they have no text."""
    tokenless_documents: int = 0
    """Left out: the tokenizer makes no token of their text."""
    dropped_characters: int = 0
    """Left out of documents: the tokenizer has no token for them, and none for what is unknown."""
    unknown_tokens: int = 0
    """Stand for what the tokenizer does not know."""
    mended_documents: int = 0
    """Have bytes or escapes that are not UTF-8, which were replaced or left out as `encoding_errors` says."""
    separators: int = 0
    """Found between documents."""
    answers: int = 0
    """In conversations."""
    unended_answers: int = 0
    """No special token is right behind them, so that a model does not learn to end them."""

    def add(self, other: Tally) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def left_out(tally: Tally) -> list[str]:
    """A clause for each kind of text that was left out or changed."""
    clauses = (
        (tally.empty_documents, "documents without text were left out"),
        (tally.tokenless_documents, "documents were left out: the tokenizer makes no token of their text"),
        (
            tally.dropped_characters,
            f"of {tally.characters:,} characters were left out: the tokenizer has no token for them, and none for"
            " unknown ones (unk_token)",
        ),
        (tally.unknown_tokens, "tokens stand for what the tokenizer does not know (unk)"),
        (tally.mended_documents, "documents or files are not UTF-8 and were mended (data.encoding_errors)"),
        (
            tally.unended_answers,
            f"of {tally.answers:,} answers have no special token behind them in the chat template: the model does not"
            " learn to end them",
        ),
    )
    return [f"{number:,} {clause}" for number, clause in clauses if number]
