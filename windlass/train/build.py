"""The parts of a run, put together."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from windlass.checkpoint.config import CheckpointKind, FailureDomain
from windlass.checkpoint.durable.locate import find_checkpoint
from windlass.checkpoint.durable.storage import Location, as_location
from windlass.checkpoint.manager import Checkpointer, Restored
from windlass.data.batch import Batch
from windlass.data.config import Borders
from windlass.data.kept_tokenizer import KEY, KeptTokenizer
from windlass.data.loader import Loader, evaluation_batches
from windlass.data.samples import Samples, build_samples
from windlass.data.shards import TokenDataset
from windlass.errors import ConfigError, require
from windlass.machine.peak_flops import peak_device_flops
from windlass.models.spec import Model
from windlass.observe.console import Console
from windlass.observe.metrics import Metrics
from windlass.offload.optimizer import OffloadedOptimizer
from windlass.offload.tiers import OffloadFigures, Tiers
from windlass.offload.weights import Weights
from windlass.optim.config import InBackward
from windlass.optim.in_backward import build_in_backward
from windlass.parallel.collectives import all_reduce
from windlass.parallel.config import ENGINES
from windlass.parallel.engine import Engine
from windlass.parallel.environment import RankEnvironment
from windlass.parallel.mesh import Mesh
from windlass.train.config import ActivationCheckpoint, Device, DType
from windlass.train.evaluate import Evaluation, evaluate
from windlass.train.objectives.objective import Objective
from windlass.untrusted import Malformed, convert

if TYPE_CHECKING:
    from windlass.conf.schema import Config
    from windlass.optim.scheduler import WarmupScheduler

_CXX = "clang++" if sys.platform == "darwin" else "g++"
"""The compiler that torch takes for the host."""


@dataclass
class TrainState:
    """How far a run is, over all its attempts."""

    step: int = 0
    tokens: int = 0
    """Label tokens trained on, over all ranks."""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    """Up to this step."""

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        before = convert(dict(state), TrainState)
        if "step" not in state or min(asdict(before).values()) < 0:
            raise Malformed("a count is missing or negative")
        vars(self).update(vars(before))  # `skipped_in_a_row` of older checkpoints is 0


@dataclass
class StepParts:
    """The parts with which forward, backward and update of a step are made."""

    config: Config
    mesh: Mesh
    model: Model
    objective: Objective
    engine: Engine
    tiers: Tiers | None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.engine.optimizer

    @property
    def mask_documents(self) -> bool:
        return self.config.data.borders == Borders.attention

    @property
    def is_fused(self) -> bool:
        """All micro-batches of a step share one pass, layer by layer, if the model can.

        So it is where weights are streamed: a step reads them twice and not twice each.
        """
        return self.model.fuses_micro_batches and self.tiers is not None and self.tiers.weights is not None

    def passes(self, batches: list[Batch]) -> list[list[Batch]]:
        """The micro-batches of a step by the forward and backward pass that they share."""
        return [batches] if self.is_fused else [[batch] for batch in batches]

    def activations_offloaded(self) -> AbstractContextManager[None]:
        """Lets what the forward pass saves leave the device's memory while it lasts."""
        return nullcontext() if self.tiers is None else self.tiers.offloaded()

    @property
    def offload_figures(self) -> OffloadFigures:
        """The costs of offloading so far."""
        return OffloadFigures() if self.tiers is None else self.tiers.figures


@dataclass
class Run(StepParts):
    """Everything that the loop uses."""

    scheduler: WarmupScheduler
    data: Loader
    validation: TokenDataset
    state: TrainState
    checkpoint: Checkpointer | None
    metrics: Metrics
    console: Console
    validation_samples: Samples | None = None
    """None: windows of its stream."""
    last_evaluation: Evaluation | None = None

    def snapshot(self) -> float:
        """Takes a snapshot of this step, in memory or on disk; returns the seconds that training stood still for it."""
        assert self.checkpoint is not None
        begin = time.perf_counter()
        self.checkpoint.snapshot(self.state.step)
        seconds = time.perf_counter() - begin
        if self.checkpoint.is_durable_only:
            self.metrics.event("persisted", self.state.step, seconds=seconds)
        return seconds

    def save(self) -> float:
        """Makes this step durable before it returns; returns the seconds that it took."""
        if self.checkpoint is None or self.checkpoint.current_step == self.state.step:
            return 0.0
        begin = time.perf_counter()
        self.checkpoint.save(self.state.step, keep_all=self.state.skipped_in_a_row > 0)
        seconds = time.perf_counter() - begin
        if self.checkpoint.is_durable_only:
            self.metrics.event("persisted", self.state.step, seconds=seconds)
        self.record_snapshots()
        return seconds

    def wait_staged(self) -> float:
        """Waits until the weights may change; returns the seconds that it took."""
        if self.checkpoint is None:
            return 0.0
        begin = time.perf_counter()
        self.checkpoint.wait_staged()
        return time.perf_counter() - begin

    def record_snapshots(self) -> None:
        """Records what has come of snapshots, which are made durable behind the training."""
        if self.checkpoint is None or self.mesh.rank != 0:
            return
        for event in self.checkpoint.poll():
            kind = event.pop("kind")
            self.metrics.event(kind, event.pop("step") or self.state.step, **event)
            if kind == "persist_failed":
                self.console.message(f"warning: a checkpoint was not written, training goes on: {event['reason']}")
            elif kind == "memory_given_up":
                self.console.message(
                    f"warning: there are no more snapshots in memory, and checkpoints are written as with "
                    f"checkpoint=durable: {event['reason']}"
                )
            elif kind == "snapshot_given_up":
                self.console.message(f"warning: a snapshot in memory was given up: {event['reason']}")

    def evaluate(self, goes_on: Callable[[], None]) -> None:
        """Measures the validation loss on the same samples as always, and records it.

        Args:
            goes_on: called after each batch.
        """
        train = self.config.train
        batches = evaluation_batches(
            self.validation,
            batch_size=train.batch_size,
            seq_len=train.seq_len,
            max_samples=train.eval_samples,
            data_rank=self.mesh.data_rank,
            num_data_ranks=self.mesh.num_data_ranks,
            borders=self.config.data.borders,
            maker=self.objective,
            samples=self.validation_samples,
        )
        result = evaluate(self.model, self.objective, batches, self.mask_documents, self.mesh, goes_on)
        self.engine.free_gathered()
        self.console.update(self.metrics.evaluated(self.state.step, result.metrics, result.seconds, result.num_targets))
        self.last_evaluation = result


def choose_device(device: Device) -> torch.device:
    """`auto` is CUDA where every rank of this host can have a GPU of its own.

    Raises:
        ConfigError: CUDA is wanted and there are too few GPUs.
    """
    num_ranks = RankEnvironment.read().local_world_size
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == Device.cuda and num_gpus < num_ranks:
        raise ConfigError(
            "train.device",
            "cuda",
            f"{num_ranks} ranks need a GPU each, and torch finds {num_gpus} here",
            "set train.device=auto, or launch.nproc_per_node to the number of GPUs",
        )
    use_cuda = device != Device.cpu and num_gpus >= num_ranks
    return torch.device("cuda" if use_cuda else "cpu")


def require_compiler(device: torch.device) -> None:
    """Raises ConfigError where `torch.compile` finds no compiler of C++, or Triton none of C."""
    variable, names = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", (_CXX,))
    names = (os.environ[variable],) if os.environ.get(variable) else names
    require(
        any(shutil.which(name) for name in names),
        "train.compile",
        True,
        f"needs a compiler, and PATH has no {' and no '.join(names)}",
        f"install one, name one in {variable}, or set train.compile=false",
    )


def resolve_vocabulary(config: Config, vocab_size: int) -> None:
    """Sets a `model.vocab_size` that was left null. Raises ConfigError as `ModelConfig.resolve_vocab_size`."""
    config.model.vocab_size = config.model.resolve_vocab_size(vocab_size)


def check_vocabulary(config: Config, dataset: TokenDataset) -> None:
    """Raises ConfigError if the vocabulary is smaller than a token id of the data."""
    vocab_size = config.model.vocab_size
    require(
        vocab_size is not None and vocab_size > dataset.max_token_id,
        "model.vocab_size",
        vocab_size,
        f"must be above the data's largest token id, {dataset.max_token_id}",
        "set model.vocab_size=null to take the tokenizer's",
    )


def build_tiers(config: Config, mesh: Mesh) -> Tiers | None:
    return config.offload.build(
        Path(config.run_dir),
        mesh.rank,
        mesh.device,
        computes_in_bfloat16=config.train.dtype == DType.bfloat16,
        is_checkpointed=config.checkpoint.name != CheckpointKind.none,
    )


def build_parts(
    config: Config,
    mesh: Mesh,
    tiers: Tiers | None,
    *,
    engine: Engine | None = None,
    device: str = "meta",
    give_weights: Callable[[Model, Weights | None], None] | None = None,
) -> StepParts:
    """Builds what a step is made with: the model, sharded and with its first weights, and what updates it.

    Args:
        engine: None: the one that is configured.
        device: where the model is built; on any but meta `give_weights` is needed.
        give_weights: gives the sharded model its weights, and those that do not stay to what takes them; None:
            `Model.materialize`.

    Raises:
        ConfigError: such a run cannot be built.
    """
    train, optim = config.train, config.optim
    dtype = getattr(torch, train.dtype.value)
    objective = config.objective.build()
    model = config.model.build(device)
    # `auto` is decided once a step has been tried with the least memory.
    recompute = train.activation_checkpoint in (ActivationCheckpoint.full, ActivationCheckpoint.auto)
    model.prepare(dtype, recompute, train.compile, train.activation_fraction)
    engine = ENGINES.build(config.parallel, mesh, train.max_norm) if engine is None else engine
    assert engine is not None
    units = model.units()
    modules = [list(unit.modules) for unit in units]
    engine.shard(model, units, dtype)
    weights = None if tiers is None else tiers.stream_weights(model, modules)
    if give_weights is None:
        model.materialize(mesh.device, train.seed, None if weights is None else weights.add)
    else:
        give_weights(model, weights)
    optimizer = optim.build(model)
    if tiers is not None:
        optimizer = tiers.take_optimizer(optimizer, modules, optim.in_backward != InBackward.none)
    buckets = optimizer.bucket_parameters() if isinstance(optimizer, OffloadedOptimizer) else ()
    engine.take_optimizer(optimizer, build_in_backward(optim, optimizer, train.max_norm, buckets))
    if tiers is not None:
        tiers.attend(model, modules, is_cut=mesh.device_mesh is not None)
    return StepParts(config, mesh, model, objective, engine, tiers)


def build_loader(config: Config, dataset: TokenDataset, mesh: Mesh, objective: Objective) -> Loader:
    train = config.train
    return Loader(
        dataset,
        batch_size=train.batch_size,
        seq_len=train.seq_len,
        data_rank=mesh.data_rank,
        num_data_ranks=mesh.num_data_ranks,
        seed=train.seed,
        shuffle=config.data.shuffle,
        borders=config.data.borders,
        prefetch=config.data.prefetch,
        pin_memory=mesh.device.type == "cuda",
        maker=objective,
        samples=build_samples(config.data, dataset, train.seq_len, objective.lookahead),
    )


def build_checkpointer(
    config: Config,
    plain_config: dict[str, Any],
    mesh: Mesh,
    engine: Engine,
    scheduler: WarmupScheduler,
    data: Loader,
    state: TrainState,
    tokenizer: KeptTokenizer,
    files: dict[str, dict[str, str]],
) -> Checkpointer | None:
    if config.checkpoint.name == CheckpointKind.none:
        return None
    objects = {**engine.checkpointed(), "scheduler": scheduler, "data": data, "train": state}
    return Checkpointer(
        objects,
        checkpoint_dir(config),
        mesh,
        kind=config.checkpoint.name,
        snapshot_every=config.checkpoint.snapshot_every,
        persist_every=config.checkpoint.persist_every,
        keep=config.checkpoint.keep,
        num_parity_shards=num_parity_shards(config, mesh),
        failure_domain=config.checkpoint.failure_domain,
        shm_dir=config.checkpoint.shm_dir,
        agent_host=config.checkpoint.agent_host,
        lease_s=config.checkpoint.lease_s,
        max_send_bytes_per_s=config.checkpoint.max_send_bytes_per_s,
        info={"config": plain_config, KEY: tokenizer.to_json(), **files},
        # The configuration decides them; after `resume=PATH` it may differ from the checkpoint's on purpose.
        restore_hyperparameters=False,
    )


def num_parity_shards(config: Config, mesh: Mesh) -> int:
    """The parity shards of snapshots now: a job that may shrink keeps as many of those it asks for as it can."""
    if config.checkpoint.name != CheckpointKind.erasure:
        return 0
    wanted = config.checkpoint.num_parity_shards
    by_rank = config.checkpoint.failure_domain == FailureDomain.rank
    num_domains = mesh.world_size if by_rank else mesh.num_nodes
    return min(wanted, num_domains - 1) if config.launch.is_elastic else wanted


def checkpoint_dir(config: Config) -> Location:
    return as_location(config.checkpoint.dir) if config.checkpoint.dir else Path(config.run_dir) / "checkpoints"


def restore(config: Config, checkpoint: Checkpointer | None, is_restart: bool) -> Restored | None:
    """Goes on from where `resume` says; returns None for a fresh run. Collective.

    A path inside the run's own folder goes back to that checkpoint, and moves newer ones aside. A path elsewhere is
    where this run begins; once it has a checkpoint of its own, it goes on from that. So does a restarted worker.

    Raises:
        ConfigError, CorruptCheckpoint, IncompatibleCheckpoint: on all ranks.
    """
    if checkpoint is None or config.resume == "never":
        return None if checkpoint is None or not is_restart else checkpoint.restore_latest()
    if config.resume != "auto":
        folder = checkpoint.mesh.agree(lambda: find_checkpoint(config.resume))
        is_own = checkpoint.owns(folder)
        if is_own and not is_restart:
            step = checkpoint.restore(folder)
            return Restored(step, folder, checkpoint.set_newer_aside(step))
        if not is_own and not checkpoint.has_any():
            return Restored(checkpoint.restore(folder), folder)
    return checkpoint.restore_latest()


def total_peak_flops(config: Config, mesh: Mesh) -> float:
    """FLOP/s of all devices together at their best. Collective: ranks that share a CPU measure at the same time."""
    peak = config.metrics.peak_flops
    if peak is None:
        mesh.barrier()
        peak = peak_device_flops(mesh.device, getattr(torch, config.train.dtype.value))
    return float(all_reduce(torch.tensor(peak, dtype=torch.float64), mesh.world))
