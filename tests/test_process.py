"""The command line as a process: how little it imports, and how Ctrl-C ends it."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast import HybridForCausalLM, process
from holdfast.data.tokenizers import byte_tokenizer

HELP = """
import sys
sys.argv = sys.orig_argv = ["/usr/bin/holdfast"]
from holdfast.cli import COMMANDS, main
for command in COMMANDS:
    assert main([command, "--help"]) == 0
heavy = {"torch", "transformers", "numpy", "matplotlib", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""

NAMES = """
import sys
sys.argv = sys.orig_argv = ["/usr/bin/holdfast"]
import holdfast
assert "torch" not in sys.modules
assert set(holdfast.__all__) <= set(dir(holdfast))
print(*(getattr(holdfast, name).__name__ for name in holdfast.__all__))
from holdfast import *
assert HybridModel is holdfast.HybridModel
try:
    holdfast.HybridModels
except AttributeError as error:
    print(error)
"""

TOKENIZER = """
import sys
sys.argv = sys.orig_argv = ["/usr/bin/holdfast"]
from holdfast.data.tokenizers import load_tokenizer
print(len(load_tokenizer(DIRECTORY)))
"""

AUTO = """
import holdfast
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(DIRECTORY)).__name__)
"""


def ended(*command: str) -> str:
    """What a process wrote on standard output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def program(text: str, **values: object) -> str:
    """A Python program's standard output; the names of `values` stand for them in the text."""
    for name, value in values.items():
        text = text.replace(name, repr(str(value)))
    return ended(sys.executable, "-c", text)


def test_help_texts_import_nothing_heavy() -> None:
    assert program(HELP).count("usage: holdfast ") >= 5


@pytest.mark.parametrize("module", ["holdfast", "holdfast.cli"])
def test_as_a_module_nothing_heavy_is_imported(module: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module, "--help"], capture_output=True, text=True, timeout=200
    )
    assert "usage: holdfast COMMAND" in finished.stdout
    assert re.search(r"\| +holdfast\.cli\n", finished.stderr)
    assert not re.search(r"\| +(torch|transformers)\n", finished.stderr)


def test_all_names_are_there_where_they_are_imported_late() -> None:
    names, error = program(NAMES).splitlines()
    assert names.split() == [
        "HybridCache",
        "HybridCausalLMOutput",
        "HybridConfig",
        "HybridForCausalLM",
        "HybridModel",
        "RetentionOutput",
    ]
    assert error == "module 'holdfast' has no attribute 'HybridModels'"


@pytest.mark.parametrize(("text", "printed"), [(TOKENIZER, "259"), (AUTO, "HybridForCausalLM")])
def test_auto_classes_know_the_models(
    text: str, printed: str, small_model: Callable[..., HybridForCausalLM], tmp_path: Path
) -> None:
    """Else they would ask whether to run the code that `save_pretrained` names in the configuration."""
    small_model("full_attention").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")  # so that the configuration says whose tokenizer it is
    assert program(text, DIRECTORY=tmp_path) == printed


@pytest.mark.parametrize(
    ("arguments", "original", "expected"),
    [
        (["/usr/bin/holdfast", "info"], ["python", "/usr/bin/holdfast", "info"], True),
        (["/usr/bin/holdfast"], ["python", "-X", "dev", "/usr/bin/holdfast"], True),
        (["-m", "info"], ["python", "-m", "holdfast", "info"], True),
        (["-m"], ["python", "-u", "-mholdfast.cli"], True),
        (["-m", "holdfast"], ["python", "-m", "pytest", "holdfast"], False),
        (["-m"], ["python", "-m", "holdfast.kernels"], False),
        (["-c", "holdfast"], ["python", "-c", "import holdfast", "holdfast"], False),
        (["train.py", "holdfast"], ["python", "train.py", "holdfast"], False),
        (["/usr/bin/holdfast", "info"], ["python", "-c", "spawn_main()", "--multiprocessing-fork"], False),
        (["/usr/bin/holdfast", "info", "a", "b", "c"], ["python", "-c", "spawn_main()"], False),
        ([""], ["python"], False),
        ([], ["python"], False),
    ],
)
def test_what_the_command_line_is(
    arguments: list[str], original: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert process.is_command_line() is expected


@pytest.mark.parametrize(
    "imported", ["holdfast.cli.errors", "tyro", "numpy", "torch._C", "torch.nn", "holdfast.mixers"]
)
def test_an_interrupt_while_modules_are_imported_is_one_line(imported: str, tmp_path: Path) -> None:
    """Ctrl-C as soon as this module has been imported, however long that takes."""
    script = tmp_path / "holdfast"
    script.write_text("import sys\nfrom holdfast.cli import main\nsys.exit(main())\n")
    assert interrupted([str(script), "info", "needle-gdn"], imported) == ["holdfast: interrupted"]


def test_an_interrupt_of_a_module_run_as_a_command() -> None:
    assert interrupted(["-m", "holdfast", "info", "needle-gdn"], "torch._C") == ["holdfast: interrupted"]


def test_an_interrupt_that_is_ignored_stays_so() -> None:
    """As for jobs in the background of a shell."""
    assert interrupted(["-m", "holdfast", "--help"], "holdfast.cli.errors", ignored=True) == []


def interrupted(arguments: list[str], imported: str, *, ignored: bool = False) -> list[str]:
    """What a process that gets SIGINT once it has imported a module writes on standard error besides its imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    # The child inherits what is ignored: of these tests too, where they run in the background of a shell.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
            assert running.stderr is not None
            told: list[str] = []
            for line in running.stderr:
                if re.search(rf"\| +{re.escape(imported)}\n", line):
                    running.send_signal(signal.SIGINT)
                elif not line.startswith("import time:"):
                    told.append(line.rstrip("\n"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert running.returncode == (0 if ignored else 130), told
    return told


def test_an_interrupt_that_is_held_comes_at_the_end() -> None:
    """Also where another thread takes the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    reached = []

    def work() -> None:
        with process.holding_interrupts():
            taker = threading.Thread(target=signal.raise_signal, args=(signal.SIGINT,))
            taker.start()
            taker.join()
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("end")

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGINT, before)
    assert reached == ["end"]
