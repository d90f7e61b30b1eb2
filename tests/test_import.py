"""What `import holdfast` needs and costs, each in a process of its own."""

import subprocess
import sys

import holdfast

BARE = """
import socket, sys
for name in ("triton", "fla"):
    sys.modules[name] = None  # importing it raises ImportError
def refuse(*args, **kwargs):
    raise AssertionError("the network was asked")
socket.socket.connect = refuse
import torch
torch.cuda.is_available = lambda: False
import holdfast
heavy = {"matplotlib", "datasets", "tyro", "rich"} & set(sys.modules)
assert not heavy, heavy
options = {"gated_deltanet": {"num_heads": 2, "head_dim": 8}, "learned_eviction": {"num_heads": 2, "window": 8}}
mixers = ["gated_deltanet", "learned_eviction"]
config = holdfast.HybridConfig(
    vocab_size=31, hidden_size=32, num_hidden_layers=2, mixers=mixers, mixer_options=options
)
model = holdfast.HybridForCausalLM(config)
ids = torch.arange(21).reshape(1, -1)
model(ids, labels=ids).loss.backward()
print(model.generate(ids, max_new_tokens=3, do_sample=False).shape[1])
"""

COST = """
import time, torch
from transformers import GenerationMixin, PreTrainedModel
before = time.process_time()
import holdfast
print(time.process_time() - before)
"""


def run(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_neither_triton_nor_a_gpu_nor_a_network_is_needed() -> None:
    assert run(BARE) == "24"


def test_importing_takes_under_a_second_beyond_the_base_classes_of_transformers() -> None:
    """Processor time, which other processes on the machine do not stretch much."""
    assert float(run(COST)) < 1


def test_dir_names_what_users_need_and_no_tools_of_the_module() -> None:
    names = run("import holdfast, holdfast.ops; print(*dir(holdfast))").split()
    public = {name for name in names if not name.startswith("_")}
    modules = set(run("import sys, holdfast, holdfast.ops; print(*sys.modules)").split())
    assert public >= {*holdfast.__all__, "ops"}
    assert {f"holdfast.{name}" for name in public - {*holdfast.__all__}} <= modules
    assert {"__doc__", "__version__"} <= set(names)
