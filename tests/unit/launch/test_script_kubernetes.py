"""The manifest for Kubernetes: its fields, and its command, run in the namespaces and folders that pods would have."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import nodes, runs
from support.ranks import free_port

from windlass.cli import main
from windlass.conf.compose import compose
from windlass.errors import EXIT_DONE
from windlass.launch import script_kubernetes
from windlass.launch.script_kubernetes import quantity_bytes

Captured = pytest.CaptureFixture[str]
Document = dict[str, Any]

REQUIRED = ("--image=repo/windlass:1", "--claim=runs")
CAN_ISOLATE = (
    shutil.which("unshare") is not None
    and subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True, check=False).returncode
    == 0
)
POD = """
set -e
mount --bind "$HOSTS" /etc/hosts
mount --bind "$SHM" /dev/shm
cd "$WORKING_DIR"
exec "$@"
"""
"""What the kubelet does for a container, with folders of this machine."""


def manifest_of(capsys: Captured, *arguments: str) -> dict[str, Document]:
    """The documents that are printed, by their kind."""
    assert main(["script", "kubernetes", *REQUIRED, *arguments]) == EXIT_DONE
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    found = {document["kind"]: document for document in documents}
    assert len(found) == len(documents)
    return found


def expanded(words: Sequence[str]) -> list[str]:
    """A command as the kubelet starts it, in a pod without variables: `$$` is a `$`."""
    assert not any(re.search(r"(?<!\$)(\$\$)*\$\(", word) for word in words), "a reference to a variable"
    return [word.replace("$$", "$") for word in words]


def test_all_fields_of_a_job_with_fixed_nodes(capsys: Captured) -> None:
    found = manifest_of(
        capsys,
        *("--nodes=4", "--name=mine", "--gpus=8", "--cpus=64", "--memory=500Gi", "--shm=200Gi", "--grace-s=120"),
        *("--storage=1Ti", "--storage-class=fast", "--namespace=us", "--mount=/data", "run_dir=/data/a", "model=tiny"),
    )
    assert list(found) == ["PersistentVolumeClaim", "Service", "NetworkPolicy", "Job"]
    assert found["PersistentVolumeClaim"] == {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "runs", "namespace": "us"},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "fast",
            "resources": {"requests": {"storage": "1Ti"}},
        },
    }
    assert found["Service"] == {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "mine", "namespace": "us"},
        "spec": {"clusterIP": "None", "selector": {"windlass-job": "mine"}, "publishNotReadyAddresses": True},
    }
    pods = {"matchLabels": {"windlass-job": "mine"}}
    assert found["NetworkPolicy"] == {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "mine", "namespace": "us"},
        "spec": {
            "podSelector": pods,
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": pods}]}],
        },
    }
    job = found["Job"]
    assert (job["apiVersion"], job["metadata"]) == ("batch/v1", {"name": "mine", "namespace": "us"})
    spec = job["spec"]
    template = spec.pop("template")
    assert spec == {
        "completionMode": "Indexed",
        "completions": 4,
        "parallelism": 4,
        "backoffLimit": 12,
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "Ignore", "onExitCodes": {"containerName": "windlass", "operator": "In", "values": [75]}},
                {"action": "FailJob", "onExitCodes": {"containerName": "windlass", "operator": "In", "values": [2]}},
            ]
        },
    }
    assert template["metadata"] == {"labels": {"windlass-job": "mine"}}
    amounts = {"nvidia.com/gpu": 8, "cpu": "64", "memory": "500Gi"}
    machine = {"labelSelector": {"matchLabels": {"windlass-job": "mine"}}, "topologyKey": "kubernetes.io/hostname"}
    assert template["spec"] == {
        "subdomain": "mine",
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,
        "shareProcessNamespace": True,
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [machine]}},
        "containers": [
            {
                "name": "windlass",
                "image": "repo/windlass:1",
                "command": [
                    *("windlass", "train", "launch=torchrun", "launch.nnodes=4", "launch.address=mine-0.mine:29400"),
                    *("launch.secret_file=/data/.windlass-secret", "run_dir=/data/a", "model=tiny"),
                ],
                "workingDir": "/data",
                "resources": {"requests": amounts, "limits": amounts},
                "volumeMounts": [{"name": "runs", "mountPath": "/data"}, {"name": "shm", "mountPath": "/dev/shm"}],
            }
        ],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "200Gi"}},
        ],
    }


def test_an_elastic_job_is_done_when_its_first_pod_is(capsys: Captured) -> None:
    found = manifest_of(capsys, "--nodes=2:4", "--retries=0")
    assert list(found) == ["Service", "NetworkPolicy", "Job"], "a volume that is there is not made"
    spec = found["Job"]["spec"]
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert (spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (4, 4, 0)
    (container,) = spec["template"]["spec"]["containers"]
    assert "launch.nnodes=2:4" in container["command"]
    assert "resources" not in container


@pytest.mark.slow
def test_overrides_reach_the_launcher_letter_for_letter(capsys: Captured) -> None:
    nasty = ['run_dir="a b\'$(HOME) $$(X) $ `x`"', "data=text", 'data.path="- a: [b]\n#c"', "resume=never"]
    (container,) = manifest_of(capsys, *nasty)["Job"]["spec"]["template"]["spec"]["containers"]
    assert expanded(container["command"])[-4:] == nasty
    interpolated = ["run_dir=/runs/${model.name}", "model=tiny"]
    (container,) = manifest_of(capsys, *interpolated)["Job"]["spec"]["template"]["spec"]["containers"]
    assert compose([*expanded(container["command"])[-2:]]).run_dir == "/runs/tiny"


def test_the_manifest_is_of_the_published_schema(tmp_path: Path, capsys: Captured) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate has the schemas")
    for arguments in (["--nodes=2:4", "--gpus=1", "--memory=64Gi"], ["--storage=1Gi", "--namespace=us"]):
        for document in manifest_of(capsys, *arguments).values():
            kubernetes_validate.validate(document, "1.31", strict=True)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.skipif(not CAN_ISOLATE, reason="no namespace for mounts without privileges")
def test_two_pods_train_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """Each is a process with a shared memory of its own, in which the first pod's name is loopback."""
    monkeypatch.setattr(script_kubernetes, "PORT", free_port())  # of a pod it is free, but not of this machine
    config = runs.run_config(tmp_path, "run", "train.steps=6")
    overrides = [
        *runs.TINY_MODEL,
        "data=text",
        f"data.path={runs.write_corpus(tmp_path / 'corpus')}",
        f"data.cache_dir={tmp_path / 'cache'}",
        *("data.num_workers=1", "train.batch_size=1", "train.seq_len=32", "train.log_every=1", "train.eval_every=0"),
        *("train.device=cpu", "train.steps=6", "metrics.console=plain", "metrics.peak_flops=1e12"),
        *("checkpoint=erasure", "checkpoint.snapshot_every=2", "launch.nproc_per_node=1", "run_dir=run"),
    ]
    found = manifest_of(capsys, "--nodes=2", "--name=tiny", f"--mount={tmp_path}", *overrides)
    pod = found["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    address = next(word for word in container["command"] if word.startswith("launch.address="))
    assert address == f"launch.address=tiny-0.{found['Service']['metadata']['name']}:{script_kubernetes.PORT}"
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n127.0.0.1 tiny-0.tiny\n")
    with nodes.shared_memory() as root:
        folders = [root / f"pod{number}" for number in range(2)]
        pods = [_start_pod(container, folder, tmp_path / "hosts") for folder in folders]
        try:
            printed = [pod.communicate(timeout=150)[0] for pod in pods]
        finally:
            for pod in pods:
                pod.kill()
        assert [pod.returncode for pod in pods] == [EXIT_DONE] * 2, "\n".join(printed)
        assert [list(folder.iterdir()) for folder in folders] == [[], []], "agents have left"
    assert runs.events(config, "start")[0]["world_size"] == 2
    assert max(runs.losses(config)) == 6


def _start_pod(container: Document, shm: Path, hosts: Path) -> subprocess.Popen[str]:
    shm.mkdir()
    words = expanded(container["command"])
    assert words[0] == "windlass"
    isolated = ["unshare", "--map-root-user", "--mount", "sh", "-c", POD, "pod"]
    folders = {"HOSTS": str(hosts), "SHM": str(shm), "WORKING_DIR": container["workingDir"]}
    return subprocess.Popen(
        [*isolated, sys.executable, "-m", "windlass.cli", *words[1:]],
        env=os.environ | folders | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.step=5"], "train.step=5: is no key"),
        (["launch.address=a:1"], "launch.address=a:1: is what the script sets"),
        (["run_dir=/elsewhere/x"], "run_dir=/elsewhere/x: is not on the volume"),
        (["run_dir=../x"], "run_dir=../x: is not on the volume"),
        (["checkpoint.dir=/tmp/x"], "checkpoint.dir=/tmp/x: is not on the volume"),
        (["--name=My_Run"], "--name=My_Run: must be at most 61 small letters"),
        (["--nodes=200", f"--name={'a' * 60}"], "must be at most 59 small letters"),
        (["--memory=8Gi"], "--memory=8Gi: must be more than --shm=8Gi"),
        (["--memory=lots"], "--memory=lots: must be a quantity"),
        (["--shm=8GiB"], "--shm=8GiB: must be a quantity"),
        (["--shm=8K"], "--shm=8K: must be a quantity"),
        (["--shm=.Gi"], "--shm=.Gi: must be a quantity"),
        (["--mount=runs"], "--mount=runs: must be an absolute path"),
        (["--storage-class=fast"], "--storage-class=fast: says nothing without --storage"),
        (["--retries=-1"], "--retries=-1: must not be negative"),
        (["--image= "], "--image= : must name an image"),
        (["--claim=A"], "--claim=A: must be at most 63 small letters"),
    ],
)
def test_a_mistake_is_one_message_and_no_manifest(arguments: list[str], message: str, capsys: Captured) -> None:
    assert main(["script", "kubernetes", *REQUIRED, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("windlass: error: ") and message in captured.err


def test_an_object_store_needs_no_volume_for_checkpoints(capsys: Captured) -> None:
    assert "Job" in manifest_of(capsys, "checkpoint.dir=s3://bucket/run")


@pytest.mark.parametrize(("text", "num_bytes"), [("5", 5), ("2k", 2e3), ("2Ki", 2048), ("1.5Gi", 1.5 * 2**30)])
def test_quantities(text: str, num_bytes: float) -> None:
    assert quantity_bytes("--shm", text) == num_bytes
