"""Every C++ source compiles: without it models still run, on slower PyTorch code, and tests of C++ are skipped."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import holdfast.ops.native as building

_COMPILER = (
    os.environ.get("CXX", "").split() or [found for name in building._COMPILERS if (found := shutil.which(name))][:1]
)
_VECTORS = [(), *(building._VECTORS.values() if platform.machine() in ("x86_64", "AMD64") else [])]
_SOURCES = sorted(Path(building.__file__).parent.rglob("*.cpp"))


@pytest.mark.skipif(not _COMPILER, reason="there is no C++ compiler")
@pytest.mark.parametrize("source", _SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
@pytest.mark.parametrize("vectors", _VECTORS, ids=lambda flags: flags[-1] if flags else "plain")
def test_it_compiles_without_a_warning(source: Path, vectors: tuple[str, ...]) -> None:
    # Vectors wider than the processor's own are no business of other libraries here: nothing is linked.
    strict = ("-Wall", "-Werror", "-Wno-psabi", "-Wno-unused-function", "-fsyntax-only")
    command = [*_COMPILER, *building._OPTIONS, *vectors, *strict, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_are_sources() -> None:
    assert len(_SOURCES) >= 5
