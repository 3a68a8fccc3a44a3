"""A model that was imported is exported as it came: tensors to the bit, files byte for byte. And it is asked things."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.huggingface import write_folder, write_tokenizer

from windlass.checkpoint.durable.manifest import step_folder
from windlass.checkpoint.durable.reader import open_checkpoint
from windlass.checkpoint.kept_files import keep
from windlass.checkpoint.manager import Checkpointer
from windlass.cli import main
from windlass.conf.compose import compose
from windlass.conf.store import to_plain
from windlass.data.kept_tokenizer import KEY, KeptTokenizer
from windlass.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from windlass.models.hf_files import CARRIED
from windlass.models.huggingface_folder import HuggingFaceFolder
from windlass.models.spec import Model
from windlass.parallel.mesh import Mesh
from windlass.train.carried_files import carried_files

transformers = pytest.importorskip("transformers")

Captured = pytest.CaptureFixture[str]
BYTES = KeptTokenizer(ByteTokenizer.name, ByteTokenizer.vocab_size, ByteTokenizer.eos_id, None, None)


def command(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def refused(capsys: Captured, *arguments: object) -> str:
    assert command(*arguments) == 2
    said = capsys.readouterr().err
    *progress, said = said.splitlines()
    assert said.startswith("windlass: error: ") and not any("Traceback" in line for line in progress)
    return said


def tokenizer_in(folder: Path) -> tuple[KeptTokenizer, bytes]:
    tokenizer, content = HuggingFaceTokenizer(folder), (folder / "tokenizer.json").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    return (
        KeptTokenizer(tokenizer.name, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.eos_token, sha256),
        content,
    )


def train_nothing(
    run_dir: Path, mesh: Mesh, *overrides: str, tokenizer: tuple[KeptTokenizer, bytes | None], step: int = 4
) -> Path:
    """What a run leaves that has not changed its model: as `windlass.train.session` does it."""
    config = compose([*overrides, f"run_dir={run_dir}", "train.seq_len=48", "data=text", "data.path=unused"])
    model: Model = config.model.build()
    model.materialize(torch.device("cpu"), 0)
    files = carried_files(config, model, *tokenizer)
    info = {"config": to_plain(config), KEY: tokenizer[0].to_json(), **files.to_info()}
    checkpoint = Checkpointer({"model": model}, run_dir / "checkpoints", mesh, info=info)
    keep(checkpoint.store.storage, files.contents)
    if config.resume not in ("auto", "never") and not checkpoint.has_any():
        checkpoint.restore(step_folder(Path(config.resume), 0))
    checkpoint.save(step)
    return run_dir


def run_of(folder: Path, run_dir: Path, mesh: Mesh) -> Path:
    return train_nothing(run_dir, mesh, "model=hf", f"model.path={folder}", tokenizer=tokenizer_in(folder))


def export(run: Path, output: Path, *more: object) -> Path:
    assert command("ckpt", "export", run, "--format", "hf", "--output", output, *more) == 0
    return output


def tensors_of(folder: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    found = HuggingFaceFolder(folder)
    read = {name: found.read(name) for name in found.tensors}
    return {name: (value.dtype, value.contiguous().view(torch.uint8).numpy().tobytes()) for name, value in read.items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in CARRIED if (folder / name).exists()}


def load_in_transformers(folder: Path) -> Any:
    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_a_folder_comes_back_from_a_run_as_it_went_in(family: str, tmp_path: Path, mesh: Mesh) -> None:
    folder = write_folder(tmp_path / "hf", family)
    out = export(run_of(folder, tmp_path / "run", mesh), tmp_path / "out", "--max-shard-bytes", 20_000)
    assert tensors_of(out) == tensors_of(folder)
    assert {dtype for dtype, _ in tensors_of(out).values()} == {torch.bfloat16}
    assert files_of(out) == files_of(folder) and len(files_of(out)) == 5
    load_in_transformers(out)


@pytest.mark.slow
def test_a_llama_that_was_imported_comes_back_as_it_went_in(tmp_path: Path, mesh: Mesh) -> None:
    """Whether a run began from it or not; and a run that goes on keeps what it began with."""
    folder = write_folder(tmp_path / "hf")
    assert command("ckpt", "import", folder, "--format", "hf", "--output", tmp_path / "in") == 0
    model = ("model=tiny", "model.vocab_size=320", "model.hidden_size=32", "model.intermediate_size=48")
    model += ("model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.init_std=0.3")
    begun = (*model, f"resume={tmp_path / 'in'}")
    run = train_nothing(tmp_path / "run", mesh, *begun, tokenizer=tokenizer_in(folder))
    shutil.move(tmp_path / "in", tmp_path / "gone")
    train_nothing(tmp_path / "run", mesh, *model, tokenizer=tokenizer_in(folder), step=5)
    for source in (tmp_path / "gone", run / "checkpoints" / "step-00000004", run):
        out = export(source, tmp_path / f"out-{source.name}")
        assert files_of(out) == files_of(folder)
        if source != run:  # which has drawn its weights anew here
            assert tensors_of(out) == tensors_of(folder)


@pytest.mark.slow
def test_only_what_training_changed_is_changed(tmp_path: Path, mesh: Mesh) -> None:
    folder = write_folder(tmp_path / "hf")
    before = json.loads((folder / "config.json").read_text())
    run = run_of(folder, tmp_path / "run", mesh)
    out = export(run, tmp_path / "f32", "--dtype", "float32")
    assert json.loads((out / "config.json").read_text()) == {**before, "dtype": "float32"}
    assert {dtype for dtype, _ in tensors_of(out).values()} == {torch.float32}
    assert command("ckpt", "import", folder, "--format", "hf", "--output", tmp_path / "in") == 0
    model = ("model=tiny", "model.vocab_size=320", "model.hidden_size=32", "model.intermediate_size=48")
    model += ("model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.init_std=0.3")
    begun = (*model, "model.rope_theta=500000", f"resume={tmp_path / 'in'}")
    other = train_nothing(tmp_path / "other", mesh, *begun, tokenizer=(BYTES, None))
    out = export(other, tmp_path / "bytes")
    now = json.loads((out / "config.json").read_text())
    assert now.pop("rope_theta") == 500_000
    ids = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": None}
    assert now == {**before, **ids, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000}}
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 256}
    assert set(files_of(out)) == {"config.json", "generation_config.json"}


@pytest.mark.slow
def test_kept_files_are_checked_and_go_where_the_run_goes(tmp_path: Path, mesh: Mesh, capsys: Captured) -> None:
    folder = write_folder(tmp_path / "hf")
    expected = files_of(folder)
    run_of(folder, tmp_path / "run", mesh)
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    run = Path(shutil.move(tmp_path / "run", tmp_path / "moved"))
    assert files_of(export(run, tmp_path / "out")) == expected
    assert command("ckpt", "export", run, "--format", "dcp", "--output", tmp_path / "dcp") == 0
    assert command("ckpt", "import", tmp_path / "dcp", "--format", "dcp", "--output", tmp_path / "in") == 0
    assert files_of(export(tmp_path / "in", tmp_path / "again")) == expected
    assert command("ckpt", "verify", run) == 0
    (kept,) = (run / "checkpoints").glob("generation_config-*.json")
    kept.write_bytes(kept.read_bytes().replace(b"2", b"3", 1))
    capsys.readouterr()
    assert command("ckpt", "verify", run) == 1
    assert f"{kept.name} beside it is not as it was written" in capsys.readouterr().out
    wanted = ("ckpt", "export", run, "--format", "hf", "--output", tmp_path / "no")
    assert f"{kept.name} beside it is not as it was written" in refused(capsys, *wanted)
    kept.unlink()
    assert command("ckpt", "verify", run) == 1
    assert f"{kept.name} is not beside it any more" in refused(capsys, *wanted)
    run_of(tmp_path / "copy", run, mesh)  # a run that goes on, and has the folder, writes it again
    assert command("ckpt", "verify", run) == 0
    assert files_of(export(run, tmp_path / "healed")) == expected


def test_a_kept_file_that_is_damaged_is_written_again(tmp_path: Path, mesh: Mesh) -> None:
    storage = Checkpointer({"model": torch.nn.Linear(1, 1)}, tmp_path, mesh).store.storage
    for _ in range(2):
        keep(storage, {"config.json": b"{}"})
        (kept,) = tmp_path.glob("config-*.json")
        assert kept.read_bytes() == b"{}"
        kept.write_bytes(b"[]")


def answer(capsys: Captured, *arguments: object) -> str:
    capsys.readouterr()
    assert command("generate", *arguments) == 0
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_run_says_what_transformers_says_on_its_export(
    family: str, tmp_path: Path, mesh: Mesh, capsys: Captured
) -> None:
    folder = write_folder(tmp_path / "hf", family)
    run = run_of(folder, tmp_path / "run", mesh)
    out = export(run, tmp_path / "out")
    model, tokenizer = load_in_transformers(out), transformers.AutoTokenizer.from_pretrained(out)
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who are you?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = model.generate(**ids, do_sample=False, max_new_tokens=20)[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(expected, skip_special_tokens=True)
    asked = ("--prompt", "Who are you?", "--system", "Be kind.", "--max-new-tokens", 20)
    said = {answer(capsys, path, *asked) for path in (run, run / "checkpoints" / "step-00000004", out)}
    assert len(said) == 1 and said.pop() == "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) + "\n"
    plain = tokenizer("Who", return_tensors="pt")
    expected = model.generate(**plain, do_sample=False, max_new_tokens=5)[0, plain["input_ids"].shape[1] :]
    said_plain = answer(capsys, run, "--prompt", "Who", "--no-template", "--max-new-tokens", 5, "--step", 4)
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert said_plain == "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) + "\n"
    sampled = ("--temperature", 1.5, "--top-p", 0.95, "--max-new-tokens", 20)
    one, same, other = (answer(capsys, run, "--prompt", "Who", *sampled, "--seed", seed) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.slow
def test_runs_of_our_llama_are_asked(
    tmp_path: Path, mesh: Mesh, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of bytes, and one of a tokenizer.json that it has kept; the prompt of one is piped in."""
    sizes = ("model=tiny", "model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "model.num_kv_heads=1")
    ours = train_nothing(tmp_path / "bytes", mesh, *sizes, "model.vocab_size=320", tokenizer=(BYTES, None))
    reader = open_checkpoint(ours / "checkpoints" / "step-00000004")
    model = compose([*sizes, "model.vocab_size=320", "data=text", "data.path=x"]).model.build()
    model.load_state_dict({name: reader.read_whole(f"model.{name}") for name in model.state_dict()}, assign=True)
    ids = list(b"an anchor")
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    expected = ByteTokenizer().decode(ids[9:])
    monkeypatch.setattr("sys.stdin", io.StringIO("an anchor"))
    said = answer(capsys, ours, "--prompt", "-", "--max-new-tokens", 6)
    assert said == "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in expected) + "\n"
    write_tokenizer(tmp_path / "tokenizer")
    other = train_nothing(
        tmp_path / "tokens", mesh, *sizes, "model.vocab_size=320", tokenizer=tokenizer_in(tmp_path / "tokenizer")
    )
    assert answer(capsys, other, "--prompt", "an anchor", "--max-new-tokens", 3).endswith("\n")


@pytest.mark.slow
def test_mistakes_are_one_message_each(tmp_path: Path, mesh: Mesh, capsys: Captured) -> None:
    folder = write_folder(tmp_path / "hf")
    run = run_of(folder, tmp_path / "run", mesh)
    (tmp_path / "empty").mkdir()
    for path, says in (
        (tmp_path / "none", "is neither a checkpoint nor a folder that holds some"),
        (tmp_path / "empty", "is neither a checkpoint nor a folder that holds some"),
        (tmp_path / "model.gguf", "gguf_file="),
    ):
        assert says in refused(capsys, "generate", path, "--prompt", "Hi")
    for arguments, says in (
        (("--prompt", "  "), "is empty"),
        (("--prompt", "x" * 300), "128 positions"),
        (("--prompt", "Hi", "--step", 3), "has no checkpoint in"),
        (("--prompt", "Hi", "--max-new-tokens", 0), "must be at least 1"),
        (("--prompt", "Hi", "--temperature", 0), "must be above 0"),
        (("--prompt", "Hi", "--top-p", 0.5), "add --temperature"),
        (("--prompt", "Hi", "--no-template", "--system", "Be kind."), "needs a chat template"),
    ):
        assert says in refused(capsys, "generate", run, *arguments)
    assert "is of a run" in refused(capsys, "generate", folder, "--prompt", "Hi", "--step", 3)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no systems here') }}")
    assert "no systems here" in refused(capsys, "generate", folder, "--prompt", "Hi", "--system", "Be kind.")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "chat_template.jinja").unlink()
    assert "has no tokenizer" in refused(capsys, "generate", folder, "--prompt", "Hi")


def test_without_transformers_it_says_what_to_install(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert "pip install 'windlass[hf]'" in refused(capsys, "generate", tmp_path, "--prompt", "Hi")


def test_weights_that_float16_cannot_hold_are_not_made_infinite(tmp_path: Path, mesh: Mesh, capsys: Captured) -> None:
    folder = write_folder(tmp_path / "hf", dtype=torch.float16)
    run = run_of(folder, tmp_path / "run", mesh)
    assert tensors_of(export(run, tmp_path / "out")) == tensors_of(folder)
    config = compose(["model=hf", f"model.path={folder}", "data=text", "data.path=unused"])
    model = config.model.build()
    model.materialize(torch.device("cpu"), 0)
    with torch.no_grad():
        next(model.parameters()).fill_(1e5)
    info = open_checkpoint(run / "checkpoints" / "step-00000004").manifest.objects["info"]
    Checkpointer({"model": model}, run / "checkpoints", mesh, info=info).save(5)
    wanted = ("ckpt", "export", run, "--format", "hf", "--output", tmp_path / "no")
    assert "too large for float16" in refused(capsys, *wanted)
    export(run, tmp_path / "bf16", "--dtype", "bfloat16")
