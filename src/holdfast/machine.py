"""What numbers were measured on: the machine, the versions, the commit. No names of hosts or users."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["available_cores", "describe_machine"]

PACKAGES = ("holdfast", "torch", "transformers", "numpy", "numba", "triton", "fla-core")


def describe_machine() -> dict[str, Any]:
    """Machine, versions and commit, to stand beside numbers; ready for JSON.

    Packages that are not installed have the version None. The commit is that of the source tree, with a + where files
    differ from it; None outside of a repository.
    """
    return {
        "python": platform.python_version(),
        # PyTorch's own word says for which accelerator it was built, which its package's version may leave out.
        "packages": {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__},
        # Without the suffix, by which hosts name kernels of their own.
        "platform": f"{platform.system()} {platform.release().partition('-')[0]}",
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cores_available": available_cores(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if git("ls-files", Path(__file__).name) == "":  # installed inside a repository of something else
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", str(folder)) else "")
    except (OSError, subprocess.SubprocessError):
        return None
