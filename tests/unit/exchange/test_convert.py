"""`windlass ckpt export` and `import` of a Llama, against transformers itself. Runs: tests/distributed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.files import disk_full_after
from support.prepared import jsonl_source, prepare_in_process

from windlass.checkpoint.durable.manifest import committed_steps, step_folder
from windlass.checkpoint.durable.reader import open_checkpoint
from windlass.checkpoint.kept_files import keep
from windlass.checkpoint.manager import Checkpointer
from windlass.cli import main
from windlass.conf.compose import compose
from windlass.data.kept_tokenizer import kept_tokenizer, tokenizer_of
from windlass.data.shards import TokenDataset
from windlass.data.tokenizer import HuggingFaceTokenizer
from windlass.errors import CorruptCheckpoint, DataError
from windlass.models.config import LlamaConfig
from windlass.models.huggingface import from_huggingface, overrides, to_huggingface
from windlass.models.huggingface_folder import CONFIG, INDEX, SINGLE
from windlass.models.llama import Llama
from windlass.parallel.mesh import Mesh

Captured = pytest.CaptureFixture[str]

CPU = torch.device("cpu")
VOCAB = 61
KINDS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "plain_heads": {"num_kv_heads": 4},
    "one_kv_head": {"num_kv_heads": 1, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5},
}


def config(**changes: Any) -> LlamaConfig:
    small = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}
    return LlamaConfig(**{**small, "num_kv_heads": 2, "init_std": 0.3, **changes})


def llama(seed: int = 0, **changes: Any) -> Llama:
    model = config(**changes).build()
    model.materialize(CPU, seed)
    return model.eval()


def run_folder(tmp_path: Path, mesh: Mesh, model: Llama, **more: Any) -> Path:
    """As a run leaves it, with a checkpoint of step 3."""
    info = {"config": {"model": asdict(model.config), "train": {"seq_len": 24}, "data": {"tokenizer": "bytes"}, **more}}
    Checkpointer({"model": model}, tmp_path / "run" / "checkpoints", mesh, info=info).save(3)
    return tmp_path / "run"


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


def command(*arguments: object) -> int:
    return main(["ckpt", *map(str, arguments)])


def export(run: Path, output: Path, *more: object) -> Path:
    assert command("export", run, "--format", "hf", "--output", output, *more) == 0
    return output


def load_in_transformers(folder: Path) -> Any:
    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()


def save_in_transformers(folder: Path, **changes: Any) -> Any:
    """A model that transformers made and saved."""
    torch.manual_seed(5)
    small = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**small, **heads, **changes})).eval()
    model.save_pretrained(folder, max_shard_size="10KB")
    return model


def restored(checkpoints: Path, mesh: Mesh, tmp_path: Path, **changes: Any) -> Llama:
    model = llama(seed=99, **changes)
    Checkpointer({"model": model}, tmp_path / "mine", mesh).restore(step_folder(checkpoints, 0))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_an_export_bit_for_bit_and_computes_alike(kind: str, tmp_path: Path, mesh: Mesh) -> None:
    ours = llama(**KINDS[kind])
    folder = export(run_folder(tmp_path, mesh, ours), tmp_path / "out", "--max-shard-bytes", 20_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    theirs = load_in_transformers(folder)
    assert theirs.dtype == torch.float32
    weights = {name.removeprefix("model."): value for name, value in theirs.state_dict().items()}
    if ours.lm_head is None:
        assert torch.equal(weights.pop("lm_head.weight"), ours.embed_tokens.weight)
    assert weights.keys() == ours.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(weights[name], value), name
    with torch.no_grad():  # norms are rounded in another order there
        torch.testing.assert_close(theirs(tokens()).logits, ours(tokens()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_transformers_is_imported_bit_for_bit_and_computes_alike(
    kind: str, tmp_path: Path, mesh: Mesh
) -> None:
    changes = dict(KINDS[kind])
    names = {"tie_embeddings": "tie_word_embeddings", "num_kv_heads": "num_key_value_heads"}
    there = {names.get(key, key): value for key, value in changes.items() if key != "rope_theta"}
    there["rope_parameters"] = {"rope_type": "default", "rope_theta": changes.get("rope_theta", 10_000.0)}
    theirs = save_in_transformers(tmp_path / "hf", **{"tie_word_embeddings": True, **there})
    assert (tmp_path / "hf" / INDEX).exists()
    assert command("import", tmp_path / "hf", "--format", "hf", "--output", tmp_path / "in") == 0
    ours = restored(tmp_path / "in", mesh, tmp_path, **changes)
    for name, value in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name if name == "lm_head.weight" else f"model.{name}"], value), name
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens()).logits, ours(tokens()), rtol=1e-4, atol=1e-4)


def test_weights_are_exported_in_another_dtype(tmp_path: Path, mesh: Mesh) -> None:
    ours = llama()
    theirs = load_in_transformers(export(run_folder(tmp_path, mesh, ours), tmp_path / "out", "--dtype", "bfloat16"))
    assert theirs.dtype == torch.bfloat16
    for name, value in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[f"model.{name}"], value.bfloat16()), name


def test_weights_of_low_precision_are_imported_as_float32(tmp_path: Path, mesh: Mesh) -> None:
    ours = llama()
    folder = export(run_folder(tmp_path, mesh, ours), tmp_path / "out", "--dtype", "bfloat16")
    assert command("import", folder, "--format", "hf", "--output", tmp_path / "in") == 0
    for name, value in restored(tmp_path / "in", mesh, tmp_path).state_dict().items():
        assert torch.equal(value, ours.state_dict()[name].bfloat16().float()), name


def test_an_import_is_exported_again_to_the_bit(tmp_path: Path, mesh: Mesh) -> None:
    first = export(run_folder(tmp_path, mesh, llama()), tmp_path / "first")
    assert command("import", first, "--format", "hf", "--output", tmp_path / "in") == 0
    second = export(tmp_path / "in", tmp_path / "second")
    (one,), (two,) = (list(folder.glob("*.safetensors")) for folder in (first, second))
    assert one.read_bytes() == two.read_bytes()
    one_config, two_config = (json.loads((folder / CONFIG).read_text()) for folder in (first, second))
    assert one_config["eos_token_id"] == 256  # of the data that was trained on
    assert one_config == two_config


def test_what_was_done_is_printed_as_json(tmp_path: Path, mesh: Mesh, capsys: Captured) -> None:
    run = run_folder(tmp_path, mesh, llama())
    export(run, tmp_path / "out", "--json")
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    num_bytes = sum(tensor.nbytes for tensor in llama().state_dict().values())
    assert document["step"] == 3
    assert document["source"] == str(run / "checkpoints" / "step-00000003")
    assert document["num_bytes"] == num_bytes
    assert f"export: 100%, {num_bytes / 1e6:.1f} of" in printed.err


def test_dcp_comes_back_with_the_configuration_and_the_step(tmp_path: Path, mesh: Mesh) -> None:
    run = run_folder(tmp_path, mesh, llama())
    assert command("export", run, "--format", "dcp", "--output", tmp_path / "dcp") == 0
    assert command("import", tmp_path / "dcp", "--format", "dcp", "--output", tmp_path / "in") == 0
    assert committed_steps(tmp_path / "in") == [3]
    before, after = (open_checkpoint(step_folder(path, 3)) for path in (run / "checkpoints", tmp_path / "in"))
    assert after.manifest.objects == before.manifest.objects
    assert after.manifest.world_size == before.manifest.world_size
    for name in before.manifest.tensors:
        assert torch.equal(after.read_whole(name), before.read_whole(name)), name
    assert command("verify", tmp_path / "in") == 0


def run_with_tokenizer(tmp_path: Path, mesh: Mesh) -> tuple[Path, bytes]:
    """A run on prepared text, and what its tokenizer.json says."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {chr(97 + i): i for i in range(20)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = [f"{chr(97 + i)} {chr(98 + i)}" for i in range(18)]
    source = jsonl_source(tmp_path / "text.jsonl", texts)
    prepare_in_process(source, tmp_path / "prepared", tokenizer=HuggingFaceTokenizer(tmp_path))
    kept, content = tokenizer_of(TokenDataset(tmp_path / "prepared", "train"))
    assert content is not None
    model = llama()
    data = {"tokenizer": "tokenizer.json"}
    info = {"config": {"model": asdict(model.config), "train": {"seq_len": 24}, "data": data}}
    checkpointer = Checkpointer(
        {"model": model}, tmp_path / "run" / "checkpoints", mesh, info={**info, "tokenizer": kept.to_json()}
    )
    checkpointer.save(3)
    keep(checkpointer.store.storage, {"tokenizer.json": content})
    return tmp_path / "run", content


def test_the_tokenizer_of_the_run_goes_with_the_weights(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """By content, from wherever the command is called, whatever has become of the file; and transformers takes it."""
    run, content = run_with_tokenizer(tmp_path, mesh)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "prepared" / "tokenizer.json").unlink()
    monkeypatch.chdir(tmp_path / "prepared")
    folder = export(Path("../run"), tmp_path / "out")
    assert "changed" not in capsys.readouterr().out
    assert (folder / "tokenizer.json").read_bytes() == content
    assert json.loads((folder / CONFIG).read_text())["eos_token_id"] == 20
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 20
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (len(tokenizer), tokenizer.eos_token, tokenizer.eos_token_id) == (21, "</s>", 20)
    assert max(tokenizer.get_vocab().values()) == 20, "no id beyond those of the training"
    assert tokenizer("c a b").input_ids == [2, 0, 1]
    monkeypatch.chdir(tmp_path)
    assert (export(run, tmp_path / "here") / "tokenizer.json").read_bytes() == content
    assert f"{tmp_path / 'tokenizer.json'} has changed or is another" in capsys.readouterr().out


def test_a_dcp_folder_takes_the_tokenizer_along(tmp_path: Path, mesh: Mesh) -> None:
    run, content = run_with_tokenizer(tmp_path, mesh)
    assert command("export", run, "--format", "dcp", "--output", tmp_path / "dcp") == 0
    assert command("import", tmp_path / "dcp", "--format", "dcp", "--output", tmp_path / "in") == 0
    assert (export(tmp_path / "in", tmp_path / "again") / "tokenizer.json").read_bytes() == content


def test_a_tokenizer_that_is_gone_or_damaged_is_told_of(tmp_path: Path, mesh: Mesh, capsys: Captured) -> None:
    run, content = run_with_tokenizer(tmp_path, mesh)
    (kept,) = (run / "checkpoints").glob("tokenizer-*.json")
    kept.write_bytes(content + b" ")
    said = refused(capsys, "export", run, "--format", "hf", "--output", tmp_path / "out")
    assert f"{kept.name} beside it is not as it was written" in said
    kept.unlink()
    folder = export(run, tmp_path / "out")
    assert f"no tokenizer is exported: {kept.name} is not beside the checkpoint" in capsys.readouterr().out
    assert json.loads((folder / CONFIG).read_text())["eos_token_id"] == 20
    assert not (folder / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("data", "says", "eos_id"),
    [
        ({"tokenizer": "bytes"}, "its tokens are UTF-8 bytes", 256),
        ({"tokenizer": "mine/tokenizer.json"}, "kept none; put the tokenizer.json of its training", None),
        ({"path": "tokens"}, "kept none; put the tokenizer.json of its training beside the weights (tokens", None),
    ],
)
def test_checkpoints_of_before_tokenizers_were_kept(
    data: dict[str, Any], says: str, eos_id: int | None, tmp_path: Path, mesh: Mesh, capsys: Captured
) -> None:
    folder = export(run_folder(tmp_path, mesh, llama(), data=data), tmp_path / "out")
    assert says in capsys.readouterr().out
    assert json.loads((folder / CONFIG).read_text())["eos_token_id"] == eos_id
    assert not (folder / "tokenizer.json").exists()


def test_a_tokenizer_that_did_not_make_the_tokens_is_not_kept(tmp_path: Path, mesh: Mesh) -> None:
    run_with_tokenizer(tmp_path, mesh)
    path = tmp_path / "prepared" / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be kept .* not the tokenizer that the text was prep"):
        tokenizer_of(TokenDataset(tmp_path / "prepared", "train"))


@pytest.mark.parametrize("sha256", ["../../../secret", "0" * 63])
def test_what_a_manifest_says_of_its_tokenizer_is_checked(sha256: str, tmp_path: Path) -> None:
    info = {"tokenizer": {"name": "x", "vocab_size": 9, "eos_id": 1, "eos_token": None, "sha256": sha256}}
    with pytest.raises(CorruptCheckpoint, match="is no SHA-256"):
        kept_tokenizer(info, tmp_path)
    with pytest.raises(CorruptCheckpoint, match=r"`tokenizer\.eos_id` is 1\.5"):
        kept_tokenizer({"tokenizer": {**info["tokenizer"], "eos_id": 1.5}}, tmp_path)


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_head_beside_a_tied_embedding(is_equal: bool, tmp_path: Path, mesh: Mesh, capsys: Captured) -> None:
    theirs = save_in_transformers(tmp_path / "hf", tie_word_embeddings=True)
    for file in (tmp_path / "hf").glob("*.safetensors*"):
        file.unlink()
    weights = {name: value.clone() for name, value in theirs.state_dict().items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + (0 if is_equal else 1e-6)
    save_file(weights, tmp_path / "hf" / SINGLE, {"format": "pt"})
    arguments = ("import", tmp_path / "hf", "--format", "hf", "--output", tmp_path / "in")
    if not is_equal:
        assert "has lm_head.weight that differs from model.embed_tokens.weight" in refused(capsys, *arguments)
        return
    assert command(*arguments) == 0
    assert "lm_head.weight equals model.embed_tokens.weight" in capsys.readouterr().out
    ours = restored(tmp_path / "in", mesh, tmp_path)
    assert ours.lm_head is None
    assert torch.equal(ours.embed_tokens.weight, theirs.model.embed_tokens.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_config_json_says_all_that_makes_the_model(kind: str, tmp_path: Path) -> None:
    model = config(**KINDS[kind])
    again = from_huggingface(to_huggingface(model, 24, "float32", None), tmp_path)
    assert {**asdict(again), "name": ""} == {**asdict(model), "name": ""}


def test_overrides_make_the_model() -> None:
    model = config(tie_embeddings=False, rms_norm_eps=1e-5)
    assert {**asdict(compose(overrides(model)).model), "name": ""} == {**asdict(model), "name": ""}


def refused(capsys: Captured, *arguments: object) -> str:
    """What is printed about a mistake, which leaves nothing behind."""
    output = Path(str(arguments[arguments.index("--output") + 1]))
    assert command(*arguments) == 2
    assert not list(output.parent.glob(f"{output.name}*"))
    printed = capsys.readouterr()
    message = printed.err[printed.err.index("windlass: error: ") :]  # after what was said of the progress
    assert "Fix: " in message and "Traceback" not in message
    return message


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({"model_type": "gpt2"}, "model_type='gpt2'"),
    "scaled_rope": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "type 'llama3'"),
    "old_scaled_rope": ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "type 'linear'"),
    "bias": ({"attention_bias": True}, "attention_bias=True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "head_dim": ({"head_dim": 64}, "head_dim=64"),
    "width": ({"hidden_size": 33}, "model.hidden_size=33"),
    "text": ({"num_hidden_layers": "two"}, "a value that is none"),
    "layers": ({"num_hidden_layers": 10**9}, "fewer than the 1000000000 layers"),
    "huge": ({"vocab_size": 2**62}, "a weight cannot be so large"),
    "null": ({"vocab_size": None}, "`vocab_size` is None"),
    "rope_text": ({"rope_parameters": "long"}, "rotary positions of 'long'"),
    "shape": ({"intermediate_size": 50}, "is [48, 32] and should be [50, 32]"),
    "missing": ({"num_hidden_layers": 3}, "it has no layers.2.input_layernorm.weight"),
    "extra": ({"num_hidden_layers": 1}, "it has layers.1.input_layernorm.weight, which this model has not"),
    "a wide embedding": (
        {"hidden_size": 2**40, "head_dim": None},
        "a weight cannot be so large",
    ),
    "a wide layer": ({"intermediate_size": 2**62}, "a weight cannot be so large"),
    "a truth value": ({"num_hidden_layers": True}, "a value that is none"),
    "rotary list": ({"rope_parameters": [1]}, "rotary positions"),
    "untied": ({"tie_word_embeddings": False}, "it has no lm_head.weight"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_another_model_is_refused(kind: str, tmp_path: Path, mesh: Mesh, capsys: Captured) -> None:
    changes, says = CONFIGS[kind]
    folder = export(run_folder(tmp_path, mesh, llama()), tmp_path / "out")
    document = {**json.loads((folder / CONFIG).read_text()), **changes}
    (folder / CONFIG).write_text(json.dumps(document))
    capsys.readouterr()
    assert says in refused(capsys, "import", folder, "--format", "hf", "--output", tmp_path / "in")


def test_a_config_that_lacks_a_field_is_refused(tmp_path: Path, mesh: Mesh, capsys: Captured) -> None:
    folder = export(run_folder(tmp_path, mesh, llama()), tmp_path / "out")
    document = json.loads((folder / CONFIG).read_text())
    del document["hidden_size"]
    (folder / CONFIG).write_text(json.dumps(document))
    capsys.readouterr()
    assert "has no hidden_size" in refused(capsys, "import", folder, "--format", "hf", "--output", tmp_path / "in")


def test_old_buffers_are_passed_over(tmp_path: Path, mesh: Mesh) -> None:
    folder = export(run_folder(tmp_path, mesh, llama()), tmp_path / "out")
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors, folder / SINGLE)
    shard.unlink()
    (folder / INDEX).unlink()
    assert command("import", folder, "--format", "hf", "--output", tmp_path / "in") == 0


def test_a_path_without_a_checkpoint_is_refused(tmp_path: Path, capsys: Captured) -> None:
    for kind in ("hf", "dcp"):
        said = refused(capsys, "export", tmp_path / "nothing", "--format", kind, "--output", tmp_path / "out")
        assert "neither a checkpoint nor a folder that holds some" in said


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, mesh: Mesh, capsys: Captured) -> None:
    Checkpointer({"model": torch.nn.Linear(2, 2)}, tmp_path / "checkpoints", mesh).save(1)
    said = refused(capsys, "export", tmp_path / "checkpoints", "--format", "hf", "--output", tmp_path / "out")
    assert "does not say which Llama it is of" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "run", "--format", "dcp", "--dtype", "float32"),
        ("export", "run", "--format", "dcp", "--max-shard-bytes", 5),
        ("export", "run", "--format", "hf", "--max-shard-bytes", 0),
        ("import", "hf", "--format", "hf", "--optimizer-class", "AdamW"),
        ("import", "hf", "--format", "hf", "--step", -1),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused(
    arguments: tuple, tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    run_folder(tmp_path, mesh, llama())
    monkeypatch.chdir(tmp_path)
    assert arguments[-2] in refused(capsys, *arguments, "--output", tmp_path / "out")


def test_an_output_in_use_is_refused(tmp_path: Path, mesh: Mesh, capsys: Captured) -> None:
    run = run_folder(tmp_path, mesh, llama())
    assert command("export", run, "--format", "hf", "--output", run) == 2
    assert "--output" in capsys.readouterr().err
    assert command("verify", run) == 0


@pytest.mark.parametrize("kind", ["hf", "dcp"])
def test_a_full_disk_leaves_nothing_of_an_import(kind: str, tmp_path: Path, mesh: Mesh, capsys: Captured) -> None:
    folder = tmp_path / "folder"
    assert command("export", run_folder(tmp_path, mesh, llama()), "--format", kind, "--output", folder) == 0
    capsys.readouterr()
    with disk_full_after(1 << 12):
        said = refused(capsys, "import", folder, "--format", kind, "--output", tmp_path / "in")
    assert f"--output={tmp_path / 'in'}: cannot be written: File too large" in said


def test_a_whole_checkpoint_keeps_its_step(tmp_path: Path, mesh: Mesh, capsys: Captured) -> None:
    run = run_folder(tmp_path, mesh, llama())
    assert command("export", run, "--format", "dcp", "--output", tmp_path / "dcp") == 0
    capsys.readouterr()
    said = refused(capsys, "import", tmp_path / "dcp", "--format", "dcp", "--output", tmp_path / "in", "--step", 7)
    assert "--step=7: the checkpoint that was exported is of step 3" in said


def test_an_unknown_dtype_is_refused(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as raised:
        command("export", "run", "--format", "hf", "--output", "out", "--dtype", "int4")
    assert raised.value.code == 2
    assert "invalid choice: 'int4'" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["export", "import"])
def test_help_of_each(action: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as raised:
        command(action, "--help")
    assert raised.value.code == 0
    printed = capsys.readouterr().out
    for flag in ("--format {hf,dcp}", "--output DIR", "--dtype {float32,bfloat16}", "--json"):
        assert flag in printed
