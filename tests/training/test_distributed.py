"""One process, two with DDP, two with FSDP2: the same losses, the same λ, the same model."""

import multiprocessing
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from holdfast import HybridForCausalLM
from holdfast.data.needle import NeedleTask
from holdfast.training import (
    ControllerConfig,
    HybridTrainer,
    RetentionSchedule,
    RunDirectoryError,
    read_metrics,
    train,
)
from holdfast.training.recipe import NeedleData, OutputSection, Recipe, TextData, TrainingSection

STEPS = 50
TASK = NeedleTask(length=24, num_pairs=2, num_keys=4, num_values=4, num_noise=4, window=6)


def make_recipe(directory: Path, **training) -> Recipe:
    """Nothing random but the samples: dropout would differ from process to process."""
    options = {
        "gated_deltanet": {"num_heads": 2, "head_dim": 8},
        "learned_eviction": {"num_heads": 2, "head_dim": 8, "window": 6, "budget": 4, "sinks": 1, "dropout": 0.0},
    }
    model = {"vocab_size": TASK.vocab_size, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    model |= {"initializer_range": 0.1, "mixers": list(options), "mixer_options": options}
    settings = {"max_steps": STEPS, "batch_size": 4, "accumulation": 2, "learning_rate": 3e-3, "warmup_steps": 5}
    return Recipe(
        name="run",
        model=model,
        training=TrainingSection(**(settings | {"log_every": 1, "save_every": 30} | training)),
        data=NeedleData(task=TASK, curriculum=((0, 1, 12), (10, 2, 24))),
        controller=ControllerConfig(initial=1e-2, minimum=1e-3, interval=4),
        retention=RetentionSchedule(scorer_freeze_steps=3),
        output=OutputSection(directory=str(directory)),
    )


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def in_two_processes(work, status: int = 0) -> None:
    """Run `work` twice, as torchrun would start it; both end with a status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        AcceleratorState._reset_state(reset_partial_state=True)  # of whatever ran in this process's parent
        GradientState._reset_state()
        work()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=start, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [status, status]


def train_noting_lambda(recipe: Recipe, **options) -> Path:
    """Train; every process notes λ and the average counts beside the run."""
    original = HybridTrainer.save_final

    def noting(trainer: HybridTrainer, directory: Path) -> None:
        original(trainer, directory)
        controller = trainer.retention.controller
        assert controller is not None
        assert isinstance(trainer.model, FSDPModule) == (recipe.training.parallel == "fsdp")
        assert trainer.args.world_size == int(os.environ.get("WORLD_SIZE", "1"))
        state = {"lambda": controller.penalty, "kept": controller.average_kept}
        torch.save(state, directory.parent / f"rank{trainer.args.process_index}.pt")

    HybridTrainer.save_final = noting
    try:
        return train(recipe, **options)
    finally:
        HybridTrainer.save_final = original


@pytest.fixture(autouse=True)
def sharding_on_cpus(monkeypatch):
    """accelerate takes FSDP to be for accelerators; what it does there works on CPUs as well, once it is told to."""
    original = Trainer.create_accelerator_and_postprocess

    def with_sharding(self):
        original(self)
        if self.args.fsdp:
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", with_sharding)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    return train_noting_lambda(make_recipe(tmp_path_factory.mktemp("alone")))


@pytest.mark.parametrize("options", [{}, {"parallel": "fsdp", "gradient_checkpointing": True}])
def test_two_processes_train_as_one_does(options, alone, tmp_path):
    recipe = make_recipe(tmp_path, **options)
    in_two_processes(lambda: train_noting_lambda(recipe))
    run = tmp_path / "run"
    expected, found = losses(alone), losses(run)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=1e-4)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    single = torch.load(alone.parent / "rank0.pt", weights_only=True)
    for name in ("lambda", "kept"):
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], single[name], rtol=1e-3, atol=1e-6)
    assert single["lambda"].max() > 1e-2  # it has moved
    expected, found = load_file(alone / "model.safetensors"), load_file(run / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-3)
    HybridForCausalLM.from_pretrained(run)


def test_two_processes_read_a_text_over_and_over_as_one_does(tmp_path):
    """45 blocks, of which a pass takes five steps of 8: what is left over is no half step, nor read twice."""
    (tmp_path / "text.txt").write_text("the kelp holds on to the rock and the rock to the sea. " * 20)
    recipe = make_recipe(tmp_path / "one", max_steps=12, warmup_steps=1)
    recipe = replace(
        recipe, model=recipe.model | {"vocab_size": 259}, data=TextData(str(tmp_path / "text.txt"), length=24)
    )
    expected = losses(train(recipe))
    again = replace(recipe, output=OutputSection(directory=str(tmp_path / "two")))
    in_two_processes(lambda: train(again))
    assert len(expected) == 12
    assert losses(tmp_path / "two" / "run") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_resume_what_they_began(parallel, alone, tmp_path):
    recipe = make_recipe(tmp_path, parallel=parallel, max_steps=12, save_every=7)

    def killed() -> None:
        HybridTrainer.save_final = lambda *args: os._exit(0)
        train(recipe)

    in_two_processes(killed)
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-7"]
    (run / "checkpoint-12").rename(tmp_path / "aside")
    before = losses(run)
    in_two_processes(lambda: train(recipe, resume=True))
    assert losses(run) == pytest.approx(before, rel=1e-6)


def test_both_processes_stop_where_one_is_told_to(alone, tmp_path):
    recipe = make_recipe(tmp_path)

    class Tell(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 19 and args.process_index == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def told() -> None:
        original = HybridTrainer.__init__

        def telling(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.add_callback(Tell())

        HybridTrainer.__init__ = telling
        train(recipe)

    in_two_processes(told, status=143)
    run = tmp_path / "run"
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-20"]
    in_two_processes(lambda: train(recipe, resume=True))
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)


def test_sharding_on_cpus_is_refused(tmp_path, monkeypatch):
    monkeypatch.undo()

    def refused() -> None:
        with pytest.raises(ValueError, match="on CPUs train with DDP"):
            train(make_recipe(tmp_path, parallel="fsdp"))

    in_two_processes(refused)


def test_what_one_process_refuses_all_refuse(tmp_path):
    recipe = make_recipe(tmp_path, max_steps=1, warmup_steps=0)
    train(recipe)

    def refused() -> None:
        with pytest.raises(RunDirectoryError, match=r"^(Process 0 cannot begin: )?.* holds a finished run: give"):
            train(recipe)

    in_two_processes(refused)


def test_a_model_sharded_on_the_meta_device_is_whole(tmp_path):
    """The lines of docs/training.md, in poisoned memory."""

    def build() -> None:
        PartialState(cpu=True)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        page = Path(__file__).parents[2] / "docs" / "training.md"
        code = page.read_text(encoding="utf-8").split("## From the meta device")[1].split("```python\n")[1]
        names = {"torch": torch, "HybridForCausalLM": HybridForCausalLM, "fully_shard": fully_shard}
        names |= {"dist": torch.distributed, "seed": 0, "config": make_recipe(tmp_path).build_config(), "device": "cpu"}
        exec(code.split("```")[0], names)
        model = names["model"]
        assert isinstance(model, FSDPModule)
        state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}
        assert all(tensor.isfinite().all() for tensor in state.values())
        embeddings = state["model.embeddings.weight"]
        assert abs(embeddings.std() / 0.1 - 1) < 0.2
        assert not torch.equal(embeddings[:7], embeddings[8:])  # the shards are not drawn alike
        assert state["model.layers.1.attn.router.conv_stack.proj.bias"].tolist() == [0.5, 0.5]
        assert state["model.l1_lambda"].tolist() == [[0, 0]]
        assert model(torch.arange(8).unsqueeze(0)).logits.isfinite().all()

    in_two_processes(build)


def test_what_two_processes_cannot_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"training\.accumulation is 3: 2 processes cannot share"):
        train(make_recipe(tmp_path, accumulation=3))
    assert not list(tmp_path.iterdir())
