"""What `codebook-build doctor` looks at: versions, FAISS, GPUs, Ray's protection and listeners, room on disk and in memory.

Linux only where it reads /proc; elsewhere those lines are left out.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from codebook_builder.listeners import listeners_of, listening
from codebook_builder.memory import free_memory
from codebook_schemas import UserError

PACKAGES = (
    "codebook-prune",
    "torch",
    "transformers",
    "ray",
    "faiss-cpu",
    "faiss-gpu",
    "pyarrow",
    "webdataset",
    "s3fs",
    "numpy",
)
LEAST_DISK_GB, LEAST_MEMORY_GB, LEAST_FILES = 2.0, 4.0, 4096
CONTROL = {
    "gcs_server": "gcs_server", "raylet": "raylet", "dashboard.py": "job server", "ray::DashboardAgent": "job agent",
    "ray.util.client.server": "client server",
}  # fmt: skip
"""Ray's processes that take commands, by their program, script or title."""
JOB_SERVERS = ("job server", "job agent")
"""Those that run what they are sent over HTTP, also when they are sent it on loopback."""


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what is so, and what is wrong with it (None: nothing)."""

    name: str
    value: str
    problem: str | None = None


def examine(folder: Path) -> list[Finding]:
    """Everything that `doctor` reports; `folder` is where output shall go. Starts nothing and connects to nothing."""
    return [*_software(), *_hardware(), *_ray(Path("/proc")), *_room(folder)]


def _software() -> Iterator[Finding]:
    yield Finding("python", platform.python_version())
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    yield Finding("packages", ", ".join(f"{name} {number}" for name, number in found.items()))
    for name, extra in (("ray", "build"), ("webdataset", "build"), ("pyarrow", "build")):
        if name not in found:
            yield Finding(name, "missing", f"{name} is not installed: pip install 'codebook-prune[{extra}]'")
    if "faiss-cpu" in found and "faiss-gpu" in found:
        yield Finding("faiss", "two builds", "faiss-cpu and faiss-gpu overwrite each other: uninstall both, then install one")


def _hardware() -> Iterator[Finding]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    yield Finding("gpus", ", ".join(gpus) or "none (torch sees none)")
    try:
        from codebook_builder.faiss_ops import build_options

        options, faiss_gpus = build_options()
    except UserError as error:
        yield Finding("faiss", "missing", str(error))
        return
    yield Finding("faiss", f"{options}; {faiss_gpus} GPUs")
    drivers = list(Path("/proc/driver/nvidia/gpus").glob("*"))
    if drivers and not gpus:
        yield Finding(
            "cuda", f"{len(drivers)} GPUs", "there are NVIDIA GPUs, but torch sees none: install a CUDA build of torch"
        )


def _ray(proc: Path) -> Iterator[Finding]:
    mode = os.environ.get("RAY_AUTH_MODE", "unset")
    token = "RAY_AUTH_TOKEN" in os.environ or Path("~/.ray/auth_token").expanduser().is_file()
    address = os.environ.get("RAY_ADDRESS")
    problem = None
    if mode == "token" and not token:
        problem = "RAY_AUTH_MODE is token, but there is none: ray get-auth-token --generate"
    elif address and mode != "token":
        problem = "RAY_ADDRESS is set without RAY_AUTH_MODE=token: whoever reaches such a cluster runs code on it"
    yield Finding("ray auth", f"mode {mode}, {'a token' if token else 'no token'}, address {address or 'unset'}", problem)
    for name, ports, reachable, protected in ray_listeners(proc):
        source = "from the network" if reachable else "from every user of this machine"
        problem = None if protected else f"{name} takes commands {source} without a token: start it with RAY_AUTH_MODE=token"
        where = "beyond loopback" if reachable else "on loopback"
        yield Finding("ray listener", f"{name} {where}: {', '.join(map(str, ports))}", problem)


def ray_listeners(proc: Path) -> Iterator[tuple[str, list[int], bool, bool]]:
    """(process, ports, reachable from elsewhere, needs a token) of Ray's processes that take commands."""
    sockets = listening(proc)
    for folder in sorted((p for p in proc.glob("[0-9]*") if p.name.isdecimal()), key=lambda p: int(p.name)):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            protected = _has_token(folder)
            if command[0].startswith(b"ray::"):  # its title is written over its environment; its parent is the raylet
                protected |= _has_token(proc / (folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # ended meanwhile, or another user's
            continue
        name = _control_process([part.decode(errors="replace") for part in command])
        mine = listeners_of(int(folder.name), sockets, proc) if name else set()
        for reachable in (True, False):
            ports = sorted({listener.port for listener in mine if listener.on_loopback != reachable})
            if ports and (reachable or name in JOB_SERVERS):
                yield f"{name} (process {folder.name})", ports, reachable, protected


def _has_token(process: Path) -> bool:
    return b"RAY_AUTH_MODE=token" in (process / "environ").read_bytes().split(b"\0")


def _control_process(command: list[str]) -> str | None:
    """What a command line is of Ray's, by its program or the script it runs; None: nothing that takes commands."""
    names = [part.rpartition("/")[2].strip() for part in command[:3]]
    return next((CONTROL[name] for name in names if name in CONTROL), None)


def _room(folder: Path) -> Iterator[Finding]:
    place = next(p for p in (folder.expanduser().absolute(), *folder.expanduser().absolute().parents) if p.is_dir())
    disk = shutil.disk_usage(place).free / 2**30
    problem = f"less than {LEAST_DISK_GB:g} GB are free below {place}" if disk < LEAST_DISK_GB else None
    yield Finding("disk", f"{disk:.1f} GB free below {place}", problem)
    if not os.access(place, os.W_OK):
        yield Finding("disk", "not writable", f"{place} cannot be written: choose another output")
    free = free_memory()
    if free is not None:
        problem = f"less than {LEAST_MEMORY_GB:g} GB of memory are available" if free < LEAST_MEMORY_GB * 2**30 else None
        yield Finding("memory", f"{free / 2**30:.1f} GB available", problem)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    problem = f"a process may open {files} files, Ray wants {LEAST_FILES}: ulimit -n 65536" if files < LEAST_FILES else None
    yield Finding("open files", str(files), problem)
