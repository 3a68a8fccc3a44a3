"""What a refusal prints as its fix does what it says: the configuration composes then."""

from __future__ import annotations

import copy
import functools
import re
import shlex
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from windlass.conf.compose import compose
from windlass.conf.schema import GROUPS, PATH_KEYS, Config
from windlass.conf.store import _from_plain, to_plain
from windlass.errors import ConfigError

ASSIGNMENT = re.compile(r"""(?<![\w./=])([a-z_]+(?:\.[a-z_]+)*)=((?:[^\s'",;]|'[^']*'|"[^"]*"|,(?=\S))+)""")
"""KEY=VALUE in prose, with its quotes."""
PLACEHOLDERS = {"HOST:PORT", "PATH", "DIR", "FOLDER", "VALUE"}

REFUSED = [
    "model.hidden_size=7",
    "model.dropout=1.5",
    "model.num_kv_heads=4",
    "model.vocab_size=0",
    "data.prefetch=0",
    "data.validation_fraction=1.5",
    "data.num_workers=0",
    "train.max_norm=0",
    "train.activation_fraction=0.5",
    "train.activation_checkpoint=fraction",
    "train.activation_checkpoint=auto train.compile=true",
    "optim.lr=0",
    "optim.eps=0",
    "optim.betas=[0.9,1.5]",
    "optim=muon optim.momentum=1.5",
    "optim=muon optim.ns_steps=0",
    "optim=cosmos optim.rank=0",
    "optim=cosmos optim.gamma=-1",
    "optim=sgd_sai optim.momentum=1.5",
    "optim=sgd_sai optim.eps=0",
    "parallel.timeout_s=0",
    "parallel.num_replicas=2",
    "offload.max_device_bytes=-1",
    "offload.max_host_bytes=-1",
    "offload.max_host_bytes=1",
    "offload.dir=folder",
    "offload.weights=streamed",
    "offload.buffer_bytes=1",
    "offload.num_threads=0",
    "checkpoint.num_parity_shards=-1",
    "checkpoint.max_send_bytes_per_s=0",
    "checkpoint.persist_every=0",
    "checkpoint.keep=-1",
    "launch.nproc_per_node=0",
    "launch.nproc_per_node=2",
    "launch.nnodes=x",
    "launch.nnodes=2",
    "launch.max_restarts=-1",
    "launch.wait_for_nodes_s=-1",
    "launch.join_timeout_s=0",
    "launch.hang_timeout_s=0",
    "launch.cpus_per_rank=-1",
    "launch=torchrun launch.nnodes=2",
    "launch=torchrun launch.node_rank=5",
    "launch=ray launch.address=nowhere",
]


@functools.cache
def default() -> dict[str, Any]:
    return to_plain(compose())


@functools.cache
def group_of(choice: str) -> dict[str, Any]:
    return to_plain(compose([choice]))[choice.partition("=")[0]]


def composed(words: list[str]) -> Config:
    """What `compose(words)` gives, a hundred times as fast: dataclasses and their rules are the same."""
    plain = copy.deepcopy(default())
    for word in sorted(words, key=lambda word: "." in word.partition("=")[0]):
        override = OverridesParser.create().parse_override(word)
        key, value = override.key_or_group, override.value()
        if key in GROUPS:
            plain[key] = copy.deepcopy(group_of(word))
            continue
        *holders, name = key.split(".")
        owner = functools.reduce(lambda node, part: node[part], holders, plain)
        assert name in owner, f"{key} is no key"
        owner[name] = value if key not in (*PATH_KEYS, "launch.nnodes", "launch.address") else str(value)
    return _from_plain(plain)


def fixed(refused: list[str], error: ConfigError) -> list[list[str]]:
    """The command lines that the fix stands for."""
    others = [word for word in refused if word.partition("=")[0] != error.key]
    assigned = [shlex.split(match[0])[0] for match in ASSIGNMENT.finditer(error.fix)]
    ways = [[*(others if word.partition("=")[0] == error.key else refused), word] for word in assigned]
    ways = [way for way in ways if way[-1].partition("=")[2] not in PLACEHOLDERS]
    if re.search(r"leave it out|leave \S+ as it is", error.fix):
        ways.append(others)
    if (to := re.search(r"(?:leave it|set it to) (null|at )?(\d+)?", error.fix)) and (to[1] == "null" or to[2]):
        ways.append([*others, f"{error.key}={to[2] or 'null'}"])
    return ways


@pytest.mark.parametrize("refused", REFUSED)
def test_a_fix_is_taken(refused: str) -> None:
    words = refused.split()
    with pytest.raises(ConfigError) as raised:
        composed(words)
    for way in fixed(words, raised.value):
        try:  # what is refused next is another mistake
            composed(way)
        except ConfigError as error:
            assert error.rule != raised.value.rule, f"{raised.value} leads with {way} to {error}"


def test_most_fixes_are_such_orders() -> None:
    ways = 0
    for refused in REFUSED:
        try:
            composed(refused.split())
        except ConfigError as error:
            ways += bool(fixed(refused.split(), error))
    assert ways >= 0.7 * len(REFUSED)
