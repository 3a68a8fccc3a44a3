"""Writes a manifest for Kubernetes: an indexed Job, whose pods run `launch=torchrun`, and the Service that names them.
A NetworkPolicy lets nobody but these pods connect with them, where the cluster's network heeds policies.

An indexed Job is in every cluster, where a JobSet needs a controller that somebody has installed; it gives each pod a
number and, with a headless Service, a name that outlives it, so that all meet at the first one. A pod that saved on
request (75) or was evicted counts as no failure and is made again, and its launcher steps in where the old one was; bad
input (2) ends the Job, as it would be refused again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from windlass.conf.schema import Config
from windlass.errors import EXIT_STOPPED, EXIT_USER_ERROR, require
from windlass.launch.script import Job, require_match
from windlass.text import override

PORT = 29400
SHM_DIR = "/dev/shm"
CONTAINER = "windlass"
LABEL = "windlass-job"
SECRET_FILE = ".windlass-secret"
"""The file on the volume by which pods know each other."""
MAX_LABEL = 63
"""The most letters of a DNS label."""
_UNITS = {
    "": 1.0,
    **{suffix: 1000.0**power for power, suffix in enumerate(("k", "M", "G", "T", "P"), 1)},
    **{suffix: 1024.0**power for power, suffix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi"), 1)},
}

Document = dict[str, Any]


@dataclass(frozen=True)
class KubernetesOptions:
    """Args:
    claim: the volume for run folders, which all pods may write.
    storage: its size, if it is to be made; else it is there.
    mount: where pods have it, and begin.
    shm: how large their shared memory is; it counts as memory of the container.
    retries: how often a job that failed is started again, beside `launch.max_restarts`.
    """

    image: str
    claim: str
    storage: str | None = None
    storage_class: str | None = None
    mount: str = "/runs"
    shm: str = "8Gi"
    namespace: str | None = None
    retries: int = 3

    def __post_init__(self) -> None:
        require(bool(self.image.strip()), "--image", self.image, "must name an image", "write --image NAME:TAG")
        require(self.retries >= 0, "--retries", self.retries, "must not be negative", "set --retries 0")
        is_path = PurePosixPath(self.mount).is_absolute() and ".." not in self.mount and ":" not in self.mount
        require(is_path, "--mount", self.mount, "must be an absolute path", "write --mount /runs")
        require(
            self.storage_class is None or self.storage is not None,
            "--storage-class",
            self.storage_class,
            "says nothing without --storage",
            "leave it out",
        )
        names = {"--claim": self.claim, "--storage-class": self.storage_class, "--namespace": self.namespace}
        for flag, name in names.items():
            _require_name(flag, name)
        for flag, value in (("--shm", self.shm), ("--storage", self.storage)):
            if value is not None:
                quantity_bytes(flag, value)


def kubernetes_manifest(job: Job, options: KubernetesOptions, config: Config) -> str:
    """Returns the manifest, for `kubectl apply`.

    Args:
        config: what the job's nodes will compose.

    Raises:
        ConfigError: a value that Kubernetes would refuse, or a run that would be lost with its pods.
    """
    _require_name("--name", job.name, MAX_LABEL - len(f"-{job.max_nodes - 1}"))
    _check_folders(config, options.mount)
    if job.memory is not None:
        require(
            quantity_bytes("--shm", options.shm) < quantity_bytes("--memory", job.memory),
            "--memory",
            job.memory,
            f"must be more than --shm={options.shm}, which counts as memory",
            "set a larger --memory or a smaller --shm",
        )
    documents = [_service(job, options), _policy(job, options), _job(job, options)]
    if options.storage is not None:
        documents.insert(0, _claim(options))
    return yaml.safe_dump_all(documents, sort_keys=False, width=120)


def quantity_bytes(flag: str, text: str) -> float:
    """Returns the bytes that Kubernetes takes a quantity for.

    Raises:
        ConfigError: it is none.
    """
    unit = text.lstrip("0123456789.")
    number = text.removesuffix(unit)
    is_quantity = re.fullmatch(r"\d+(\.\d+)?", number) is not None and unit in _UNITS
    require(is_quantity, flag, text, "must be a quantity of bytes as Kubernetes has them", "write e.g. 16Gi")
    return float(number) * _UNITS[unit]


def _check_folders(config: Config, mount: str) -> None:
    folders = {"run_dir": config.run_dir}
    if config.checkpoint.dir is not None and "://" not in config.checkpoint.dir:
        folders["checkpoint.dir"] = config.checkpoint.dir
    for key, folder in folders.items():
        path = PurePosixPath(mount) / folder  # pods begin in `mount`
        require(
            path.is_relative_to(mount) and ".." not in path.parts,
            key,
            folder,
            f"is not on the volume that the pods share, which is at --mount={mount}",
            f"set {override(key, f'{mount}/{PurePosixPath(folder).name}')}",
        )


def _require_name(flag: str, value: str | None, most: int = MAX_LABEL) -> None:
    rule = f"must be at most {most} small letters, digits and hyphens, a letter first"
    require_match(rf"(?=.{{1,{most}}}$)[a-z]([-a-z0-9]*[a-z0-9])?", flag, value, rule, f"write {flag}=my-run")


def _metadata(name: str, options: KubernetesOptions) -> Document:
    return {"name": name} if options.namespace is None else {"name": name, "namespace": options.namespace}


def _claim(options: KubernetesOptions) -> Document:
    own_class = {} if options.storage_class is None else {"storageClassName": options.storage_class}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(options.claim, options),
        "spec": {
            "accessModes": ["ReadWriteMany"],
            **own_class,
            "resources": {"requests": {"storage": options.storage}},
        },
    }


def _service(job: Job, options: KubernetesOptions) -> Document:
    """Headless: it balances nothing, and gives each pod the name POD.JOB."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job.name, options),
        "spec": {"clusterIP": "None", "selector": {LABEL: job.name}, "publishNotReadyAddresses": True},
    }


def _policy(job: Job, options: KubernetesOptions) -> Document:
    """Keeps others from ranks' ports, where they could feed them anything: gloo and NCCL ask nobody who they are."""
    pods = {"matchLabels": {LABEL: job.name}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(job.name, options),
        "spec": {
            "podSelector": pods,
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": dict(pods["matchLabels"])}}]}],
        },
    }


def _job(job: Job, options: KubernetesOptions) -> Document:
    ending: Document = {}
    if job.is_elastic:  # a pod that comes when the others are done would wait for them in vain
        ending["successPolicy"] = {"rules": [{"succeededIndexes": "0"}]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(job.name, options),
        "spec": {
            "completionMode": "Indexed",
            "completions": job.max_nodes,
            "parallelism": job.max_nodes,
            "backoffLimit": options.retries * job.max_nodes,  # a job that fails, fails on all its nodes
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {"action": "Ignore", "onExitCodes": _exit_code(EXIT_STOPPED)},
                    {"action": "FailJob", "onExitCodes": _exit_code(EXIT_USER_ERROR)},
                ]
            },
            **ending,
            "template": {"metadata": {"labels": {LABEL: job.name}}, "spec": _pod(job, options)},
        },
    }


def _exit_code(code: int) -> Document:
    return {"containerName": CONTAINER, "operator": "In", "values": [code]}


def _pod(job: Job, options: KubernetesOptions) -> Document:
    machine = {"labelSelector": {"matchLabels": {LABEL: job.name}}, "topologyKey": "kubernetes.io/hostname"}
    resources = {
        "nvidia.com/gpu": job.num_gpus,
        "cpu": None if job.num_cpus is None else str(job.num_cpus),
        "memory": job.memory,
    }
    amounts = {name: amount for name, amount in resources.items() if amount is not None}
    container: Document = {
        "name": CONTAINER,
        "image": options.image,
        "command": _command(job, options),
        "workingDir": options.mount,
        **({"resources": {"requests": amounts, "limits": dict(amounts)}} if amounts else {}),
        "volumeMounts": [{"name": "runs", "mountPath": options.mount}, {"name": "shm", "mountPath": SHM_DIR}],
    }
    return {
        "subdomain": job.name,
        "restartPolicy": "Never",  # a new pod, which the rules for failures are about
        "terminationGracePeriodSeconds": job.grace_s,
        "shareProcessNamespace": True,  # so that process 1 is one that reaps what agents and workers leave
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [machine]}},
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shm}},
        ],
    }


def _command(job: Job, options: KubernetesOptions) -> list[str]:
    """Returns the words of the command. No shell reads them, but Kubernetes puts in variables for `$(NAME)`, and has a
    `$` for `$$`."""
    address = f"launch.address={job.name}-0.{job.name}:{PORT}"
    # Pods have no home in common, where it would be.
    defaults = {"launch.secret_file": PurePosixPath(options.mount) / SECRET_FILE}
    return job.command(f"launch.nnodes={job.nnodes}", address, defaults, lambda text: text.replace("$", "$$"))
