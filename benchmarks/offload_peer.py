"""The peer of `offload.py`: DeepSpeed ZeRO-3 with the optimizer in RAM or on NVMe, in a process of its own.

    python benchmarks/offload_peer.py --offload nvme --dir /data/swap --seq-len 1024 --steps 6

It trains windlass's Llama with AdamW and clipping at norm 1, from the weights and on the micro-batches that windlass
would use, and prints one line of JSON: seconds and CPU seconds of each step, losses, the process's peak RSS, and the
bytes that each step after the first read from disk and wrote to it. The default shape has 162M parameters: 12 layers
of width 768 and an untied vocabulary of 50,304. A process of its own, so that VmHWM is DeepSpeed's and no one else's.

DeepSpeed shall be seen at its best, and no settings are the best in all: `--settings default` are its own, whose 1e9
parameters a sub-group leave nothing to overlap in a model of this size; `overlap` reads, updates and writes sub-groups
of one layer at the same time; `lean` does that in turn, in as few buffers as there can be. The latter two keep
gradients under 8 MiB off the disk; they are in RAM in any case. Each setting can be given by itself too.

`--resume-check` saves a checkpoint in the middle, loads it in a new process, whose engine is made in the same way, and
sets the losses that follow beside those of the run that went on.

DeepSpeed is not among windlass's dependencies: `pip install setuptools ninja && pip install deepspeed`. Its C++ ops are
compiled at first use, for minutes; they need a C++ compiler and the headers of libaio (Debian: `libaio-dev`).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import describe_machine, free_port, num_cores
from loop_variants import MAX_NORM, Tokens, mean_loss, plain_adamw, real_batches, synthetic_batches, whole_model

from windlass.conf.compose import compose
from windlass.conf.schema import Config
from windlass.data.prepare import prepared_folder
from windlass.models.spec import count_parameters

CHECKPOINT_TAG = "middle"


@dataclass(frozen=True)
class NvmeSettings:
    """What a user of DeepSpeed can choose about the optimizer on NVMe; the defaults are DeepSpeed's."""

    pipeline: bool = False
    """Read the next sub-group's state and write the previous one's while one is updated."""
    sub_group_size: int = 1_000_000_000
    """Parameters that are read, updated and written at a time."""
    buffer_count: int = 4
    """Buffers of the largest sub-group's size. One that is being read, updated or written takes up to 4 of them."""
    block_size: int = 1 << 20
    """Bytes of one request; smaller gradients and sub-groups stay in RAM."""
    queue_depth: int = 8
    aio_threads: int = 1

    def apply(self, settings: dict[str, Any], folder: Path) -> None:
        """Adds them to an engine's configuration."""
        zero = settings["zero_optimization"]
        zero["sub_group_size"] = self.sub_group_size
        zero["offload_optimizer"] |= {
            "nvme_path": str(folder),
            "pipeline_read": self.pipeline,
            "pipeline_write": self.pipeline,
            "buffer_count": self.buffer_count,
        }
        settings["aio"] = {
            "block_size": self.block_size,
            "queue_depth": self.queue_depth,
            "intra_op_parallelism": self.aio_threads,
            "single_submit": False,
            "overlap_events": True,
        }


LEAN = NvmeSettings(sub_group_size=7_000_000, block_size=8 << 20, queue_depth=16)
SETTINGS = {"default": NvmeSettings(), "overlap": replace(LEAN, pipeline=True, buffer_count=12), "lean": LEAN}


@dataclass(frozen=True)
class Counters:
    """What the process has used so far."""

    wall_s: float
    cpu_s: float
    read_bytes: int
    write_bytes: int
    """Of this and `read_bytes` the kernel counts what went to a disk."""

    @staticmethod
    def now() -> Counters:
        lines = Path("/proc/self/io").read_text().splitlines()
        io = {key: int(value) for key, _, value in (line.partition(": ") for line in lines)}
        return Counters(time.perf_counter(), time.process_time(), io["read_bytes"], io["write_bytes"])

    def since(self, before: Counters) -> Counters:
        return Counters(
            self.wall_s - before.wall_s,
            self.cpu_s - before.cpu_s,
            self.read_bytes - before.read_bytes,
            self.write_bytes - before.write_bytes,
        )


def peak_rss_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


class Peer:
    """DeepSpeed's engine as its documentation has it, on one process."""

    def __init__(self, config: Config, offload: str, nvme: NvmeSettings, folder: Path) -> None:
        import deepspeed
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        self.accumulate = config.train.grad_accum_steps
        model = whole_model(config)
        self.num_parameters = count_parameters(model)
        optim: Any = config.optim
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": config.train.batch_size,
            "gradient_accumulation_steps": self.accumulate,
            "gradient_clipping": MAX_NORM,
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": config.train.dtype == "bfloat16"},
            "steps_per_print": 1_000_000_000,
        }
        if offload == "none":
            optimizer: torch.optim.Optimizer = plain_adamw(config, model)
        else:  # DeepSpeed refuses other optimizers where it offloads
            optimizer = DeepSpeedCPUAdam(
                model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
            )
            settings["zero_optimization"]["offload_optimizer"] = {"device": offload, "pin_memory": True}
        if offload == "nvme":
            nvme.apply(settings, folder)
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[
            0
        ]

    def step(self, batches: Iterator[Tokens]) -> float:
        step_loss = 0.0
        for input_ids, labels in itertools.islice(batches, self.accumulate):
            loss = mean_loss(self.engine(input_ids), labels)
            self.engine.backward(loss)
            self.engine.step()
            step_loss += loss.item() / self.accumulate
        return step_loss

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=CHECKPOINT_TAG)

    def load(self, folder: Path) -> None:
        """Raises RuntimeError where DeepSpeed found nothing to load."""
        path, _ = self.engine.load_checkpoint(str(folder), tag=CHECKPOINT_TAG)
        if path is None:
            raise RuntimeError(f"DeepSpeed loaded no checkpoint from {folder}")

    def close(self) -> None:
        self.engine.destroy()


def build_config(options: argparse.Namespace, run_dir: Path) -> Config:
    """windlass's configuration of the same run: weights, micro-batches and AdamW's settings are taken from it."""
    return compose(
        [
            f"model.hidden_size={options.hidden_size}",
            f"model.intermediate_size={options.intermediate_size}",
            f"model.num_layers={options.num_layers}",
            f"model.num_heads={options.num_heads}",
            f"model.num_kv_heads={options.num_heads}",
            f"model.vocab_size={options.vocab_size}",
            f"model.tie_embeddings={str(options.tied).lower()}",
            "parallel=none",
            "data=stdlib",
            "data.borders=none",
            "checkpoint=none",
            "optim=adamw",
            "optim.schedule=constant",
            "optim.warmup_steps=0",
            "optim.lr=1e-3",
            "optim.weight_decay=0.0",  # DeepSpeed is given one group of parameters
            "train.steps=1000000000",
            f"train.batch_size={options.batch_size}",
            f"train.seq_len={options.seq_len}",
            f"train.grad_accum_steps={options.grad_accum_steps}",
            f"train.max_norm={MAX_NORM}",
            f"train.dtype={options.dtype}",
            "train.device=cpu",
            f"run_dir={run_dir}",
        ]
    )


def measure(options: argparse.Namespace, nvme: NvmeSettings, folder: Path) -> dict[str, Any]:
    """Trains for `options.steps` steps and returns what is printed."""
    import deepspeed

    config = build_config(options, folder / "run")
    mesh = config.parallel.build(torch.device("cpu"))
    deepspeed.init_distributed("gloo", verbose=False)
    if options.data == "text":
        batches = real_batches(config, mesh, prepared_folder(config.data, progress=False))
    else:
        batches = synthetic_batches(config, mesh.rank)
    peer = Peer(config, options.offload, nvme, folder)
    if options.resume_from is not None:
        peer.load(options.resume_from)
    built_peak = peak_rss_bytes()
    losses, used = [], []
    for step in range(options.steps):
        if step < options.skip_steps:
            list(itertools.islice(batches, options.grad_accum_steps))
            continue
        if options.resume_check and step == options.steps // 2:
            peer.save(folder / "checkpoint")
        before = Counters.now()
        losses.append(peer.step(batches))
        used.append(Counters.now().since(before))
    result = {
        "machine": describe_machine(),
        "deepspeed": deepspeed.__version__,
        "threads": torch.get_num_threads(),
        "arguments": {key: getattr(options, key) for key in RUN_ARGUMENTS},
        "nvme": asdict(nvme) if options.offload == "nvme" else None,
        "num_parameters": peer.num_parameters,
        "tokens_a_step": options.batch_size * options.seq_len * options.grad_accum_steps,
        "step_s": [of_step.wall_s for of_step in used],
        "step_cpu_s": [of_step.cpu_s for of_step in used],
        "losses": losses,
        "built_peak_rss_bytes": built_peak,
        "peak_rss_bytes": peak_rss_bytes(),
        "read_bytes": [of_step.read_bytes for of_step in used[1:]],
        "write_bytes": [of_step.write_bytes for of_step in used[1:]],
    }
    peer.close()
    mesh.stop()
    return result


def check_resume(options: argparse.Namespace, arguments: Sequence[str], folder: Path, losses: list[float]) -> Any:
    """The losses after the checkpoint, of the run that went on and of a process that loaded it."""
    middle = options.steps // 2
    given = [argument for argument in arguments if argument != "--resume-check"]
    command = [sys.executable, __file__, *given, "--resume-from", str(folder / "checkpoint")]
    done = subprocess.run([*command, "--skip-steps", str(middle)], stdout=subprocess.PIPE, text=True, check=True)
    resumed = json.loads(done.stdout)["losses"]
    return {
        "uninterrupted": losses[middle:],
        "resumed": resumed,
        "largest_difference": max(abs(a - b) for a, b in zip(losses[middle:], resumed, strict=True)),
    }


RUN_ARGUMENTS = (
    *("hidden_size", "intermediate_size", "num_layers", "num_heads", "vocab_size", "tied"),
    *("seq_len", "batch_size", "grad_accum_steps", "steps", "dtype", "data", "offload"),
)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--intermediate-size", type=int, default=2048)
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--num-heads", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=50_304)
    parser.add_argument("--tied", action="store_true", help="the embedding's matrix is the output's too")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1, help="sequences a micro-step (1)")
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=num_cores(), help="that compute (one a core)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the passes")
    parser.add_argument(
        "--data",
        choices=("random", "text"),
        default="random",
        help="8 micro-batches of random tokens in turn, as loop.py's peers have, or those of windlass's loader",
    )
    parser.add_argument("--offload", choices=("none", "cpu", "nvme"), default="nvme", help="the optimizer's state")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="on a disk that takes O_DIRECT")
    parser.add_argument("--settings", choices=SETTINGS, default="default", help="of the optimizer on NVMe, see above")
    parser.add_argument("--pipeline", action=argparse.BooleanOptionalAction, default=None)
    for name in ("sub_group_size", "buffer_count", "block_size", "queue_depth", "aio_threads"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--resume-check", action="store_true")
    parser.add_argument("--resume-from", type=Path, help="a folder of checkpoints, to be loaded before the first step")
    parser.add_argument("--skip-steps", type=int, default=0, help="steps of whose tokens only are taken (0)")
    return parser.parse_args(arguments)


def nvme_settings(options: argparse.Namespace) -> NvmeSettings:
    settings = SETTINGS[options.settings]
    given = {name: getattr(options, name) for name in asdict(settings)}
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def main() -> int:
    arguments = sys.argv[1:]
    options = parse_arguments(arguments)
    if importlib.util.find_spec("deepspeed") is None:
        print(json.dumps({"not_installed": ["deepspeed"]}))
        return 0
    if os.environ.get("OMP_NUM_THREADS") != str(options.threads):  # OpenMP reads it when it is loaded
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        os.execv(sys.executable, [sys.executable, __file__, *arguments])
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja, beside this Python
    for_result = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # DeepSpeed and its compilers talk on standard output
    with tempfile.TemporaryDirectory(prefix="windlass-benchmark-", dir=options.dir) as folder:
        result = measure(options, nvme_settings(options), Path(folder))
        if options.resume_check:
            result["resume"] = check_resume(options, arguments, Path(folder), result["losses"])
    print(json.dumps(result), file=for_result, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
