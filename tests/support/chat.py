"""Chat templates of five families, each with and without marks around what is learned, and tiny tokenizers for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHATML = """{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{@ {{- message['content'] + '<|im_end|>' -}} @}
{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

LLAMA_3 = """{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{%- if message['role'] == 'assistant' -%}
{@ {{- message['content'] | trim + '<|eot_id|>' -}} @}
{%- else -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""

MISTRAL = """{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] + '\\n\\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}
{{- bos_token -}}
{%- for message in turns -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' -}}
{%- else -%}
{{- ' ' -}}{@ {{- message['content'] + eos_token -}} @}
{%- endif -%}
{%- endfor -%}"""

GEMMA = """{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<start_of_turn>model\\n' -}}{@ {{- message['content'] | trim + '<end_of_turn>' -}} @}{{- '\\n' -}}
{%- else -%}
{{- '<start_of_turn>' + message['role'] + '\\n' + message['content'] | trim + '<end_of_turn>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""

QWEN_3 = """{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}
{{- '<|im_start|>system\\n# Tools\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}{{- '\\n</tools><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] != 'assistant' -%}{{- message['content'] + '<|im_end|>' -}}
{%- else -%}
{%- set content = message['content'] or '' -%}{%- set reasoning = message['reasoning_content'] or '' -%}
{%- if '</think>' in content -%}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- set calls -%}
{%- for call in message['tool_calls'] or [] -%}{{- '\\n<tool_call>' + (call['function'] | tojson) + '</tool_call>' -}}
{%- endfor -%}
{%- endset -%}
{%- if loop.index0 > ns.last and reasoning -%}
{@ {{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' + content + calls + '<|im_end|>' -}} @}
{%- elif loop.index0 > ns.last -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}{@ {{- content + calls + '<|im_end|>' -}} @}
{%- else -%}
{@ {{- content + calls + '<|im_end|>' -}} @}
{%- endif -%}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


@dataclass(frozen=True)
class Family:
    """A template, in which {@ and @} stand around what is learned, and what its tokenizer has."""

    template: str
    special: tuple[str, ...]
    bos: str
    eos: str
    has_system: bool = True

    @property
    def plain(self) -> str:
        return self.template.replace("{@", "").replace("@}", "")

    @property
    def marked(self) -> str:
        return self.template.replace("{@", "{%- generation -%}").replace("@}", "{%- endgeneration -%}")


FAMILIES = {
    "chatml": Family(CHATML, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_start|>", "<|im_end|>"),
    "llama_3": Family(
        LLAMA_3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "mistral": Family(MISTRAL, ("<s>", "</s>"), "<s>", "</s>"),
    "gemma": Family(
        GEMMA, ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<end_of_turn>", False
    ),
    "qwen_3": Family(QWEN_3, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|endoftext|>", "<|im_end|>"),
}

TEXT = ["The windlass lifts the anchor, and the anchor holds.", "How many sheets are there? Three, user and assistant."]


def tiny_tokenizer(special: tuple[str, ...], with_words: bool) -> Any:
    """A byte-pair tokenizer, of bytes; or `with_words` as SentencePiece's: with a mark for blanks, and bytes for what
    it does not know."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    if not with_words:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
        alphabet = sorted(set("".join(TEXT)) | set("\u2581[]/INST\n"))
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*(("<unk>", *(f"<0x{byte:02X}>" for byte in range(256))) if with_words else ()), *special],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 20, trainer)
    if with_words:  # they are no special tokens: the model makes them
        document = json.loads(tokenizer.to_str())
        document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in special]
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document))
    return tokenizer


def write_chat_folder(folder: Path, family: Family, template: str | None = None) -> Path:
    """A Hugging Face folder with a tiny tokenizer and a template; None: the family's without marks."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(family.special, with_words=family.bos == "<s>").save(str(folder / "tokenizer.json"))
    write_template(folder, family, template)
    return folder


def write_template(folder: Path, family: Family, template: str | None = None) -> None:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": family.bos, "eos_token": family.eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(family.plain if template is None else template)
