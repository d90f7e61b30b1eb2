"""The Trainer's own options with hybrid models: passes, losses, optimizers, intervals, what a longer run keeps."""

from itertools import pairwise

import pytest
import torch
from tiny_model import MODEL, TASK
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from holdfast import HybridConfig, HybridForCausalLM
from holdfast.data.needle import NeedleStream
from holdfast.mixers import LearnedEviction, LearnedEvictionOptions
from holdfast.training import (
    CheckpointError,
    HybridTrainer,
    RetentionCallback,
    RetentionSchedule,
    checkpointing,
    learned_eviction_layers,
)


class Samples(Dataset):
    """Eleven samples, each of one token repeated, and a note of the order in which they were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index):
        self.asked.append(int(index))
        ids = torch.full((12,), int(index))
        return {"input_ids": ids, "labels": ids.clone()}


def make_trainer(directory, *, data=None, cls=HybridTrainer, **options) -> HybridTrainer:
    torch.manual_seed(0)
    names = ("retention", "optimizer_cls_and_kwargs", "compute_loss_func", "callbacks", "model", "scorer_lr_scale")
    own = {name: options.pop(name) for name in names if name in options}
    defaults = {"per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    model = own.pop("model", None) or HybridForCausalLM(HybridConfig(**MODEL))
    data = data or NeedleStream(TASK, size=64)
    return cls(
        model=model,
        args=TrainingArguments(output_dir=str(directory), **(defaults | options)),
        train_dataset=data,
        eval_dataset=data,
        data_collator=None if isinstance(data, Samples) else NeedleStream.collate,
        **own,
    )


def test_a_pass_is_a_whole_number_of_steps(tmp_path):
    data = Samples()
    trainer = make_trainer(tmp_path, data=data, max_steps=8, gradient_accumulation_steps=2, save_strategy="no")
    trainer.train()
    passes = [data.asked[start : start + 8] for start in range(0, 32, 8)]
    assert len(data.asked) == 32
    assert all(len(set(samples)) == 8 for samples in passes)  # none twice in a pass
    assert len({index for samples in passes for index in samples}) == 11  # another three are left over in each
    assert any(one != other for one, other in pairwise(passes))


def test_evaluations_show_the_loss_of_the_text(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=64, prediction_loss_only=True)
    trainer.model.model.l1_lambda.fill_(10.0)
    batch = NeedleStream.collate([trainer.eval_dataset[index] for index in range(64)])
    with torch.no_grad():
        output = trainer.model.eval()(**{name: batch[name] for name in ("input_ids", "labels")})
    assert output.retention_loss > 0.1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(output.lm_loss.item(), rel=1e-5)


@pytest.mark.parametrize("option", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": lambda *_, **__: None}])
def test_losses_without_the_penalty_are_refused(option, tmp_path):
    with pytest.raises(ValueError, match="would leave out the penalty of learned eviction: override compute_loss"):
        make_trainer(tmp_path, **option)


def test_what_would_be_ignored_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"give yours as retention="):
        make_trainer(tmp_path, callbacks=[RetentionCallback()])
    trainer = make_trainer(
        tmp_path, max_steps=1, label_smoothing_factor=0.1, cls=Trainer, callbacks=[RetentionCallback()]
    )
    with pytest.raises(ValueError, match="would leave out the penalty of learned eviction"):
        trainer.train()
    trainer = make_trainer(tmp_path, max_steps=1, scorer_lr_scale=0.5)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="need the Trainer's own optimizer"):
        trainer.train()


def test_fewer_samples_than_a_step_takes_are_told(tmp_path, caplog):
    make_trainer(tmp_path, data=Samples(), max_steps=1, per_device_train_batch_size=16, save_strategy="no").train()
    assert "There are 11 samples, fewer than the 16 of a step" in caplog.text


def test_evaluations_leave_the_random_numbers_alone(tmp_path):
    trainer = make_trainer(tmp_path, prediction_loss_only=True)
    before = torch.random.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_optimizer_of_ones_own_choice_has_the_groups(tmp_path):
    choice = (torch.optim.SGD, {"lr": 0.5, "momentum": 0.3})
    trainer = make_trainer(tmp_path, optimizer_cls_and_kwargs=choice, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.3}
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert len(optimizer.param_groups) == 4


def test_a_resumed_run_logs_and_saves_as_often_as_it_is_asked_now(tmp_path):
    make_trainer(tmp_path, max_steps=2, save_steps=2, logging_steps=2).train()
    trainer = make_trainer(tmp_path, max_steps=6, save_steps=3, logging_steps=1)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [2, 3, 4, 5, 6]
    assert [path.name for path in checkpointing.checkpoints(tmp_path)] == [
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-6",
    ]


class Look(TrainerCallback):
    def __init__(self) -> None:
        self.evicts: list[bool] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.evicts.append(model.model.eviction_layers()[0].eviction)


def test_fractions_are_of_the_run_as_it_was_planned_first(tmp_path):
    def run(max_steps: int, **options) -> list[bool]:
        look = Look()
        retention = RetentionCallback(schedule=RetentionSchedule(eviction_start=0.5))
        trainer = make_trainer(tmp_path, max_steps=max_steps, save_steps=4, retention=retention, callbacks=[look])
        trainer.train(**options)
        return look.evicts

    assert run(4) == [False, False, True, True]
    assert run(12, resume_from_checkpoint=str(tmp_path / "checkpoint-4")) == [True] * 8  # and not off again till 6


@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_has_lost_a_file_is_not_resumed_from(lost, tmp_path):
    make_trainer(tmp_path, max_steps=2, save_steps=2).train()
    (tmp_path / "checkpoint-2" / lost).unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-2 holds no (optimizer|schedule|random) state"):
        make_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=True)


def test_where_every_checkpoint_is_damaged_none_is_lost(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(CheckpointError, match=r"No checkpoint of .* can be resumed from: .*trainer_state\.json"):
        checkpointing.last_checkpoint(tmp_path)


def test_a_frozen_scorer_lets_ddp_look_for_unused_parameters(tmp_path):
    def finds(steps: int) -> bool | None:
        retention = RetentionCallback(schedule=RetentionSchedule(scorer_freeze_steps=steps))
        return make_trainer(tmp_path, retention=retention).args.ddp_find_unused_parameters

    assert finds(0) is None
    assert finds(2) is True


def test_a_scorer_that_its_user_has_frozen_stays_so():
    model = HybridForCausalLM(HybridConfig(**MODEL))
    router = model.model.eviction_layers()[0].router.requires_grad_(False)
    RetentionSchedule(eviction_start=2).apply(model, 5, 10)
    assert not any(parameter.requires_grad for parameter in router.parameters())
    RetentionSchedule(scorer_freeze_steps=2).apply(model, 5, 10)
    assert all(parameter.requires_grad for parameter in router.parameters())


def test_layers_of_a_model_without_the_usual_names():
    options = LearnedEvictionOptions(num_heads=2, head_dim=8, window=8, budget=4, sinks=1)
    mixers = nn.ModuleList([LearnedEviction(16, 1e-5, options) for _ in range(3)])
    assert learned_eviction_layers(mixers) == dict(enumerate(mixers))
    nested = nn.ModuleDict({"tower": nn.ModuleDict({"layers": nn.ModuleList([nn.Identity(), *mixers])})})
    assert learned_eviction_layers(nested) == {index + 1: mixer for index, mixer in enumerate(mixers)}
    alone = nn.Sequential(nn.Linear(1, 1), mixers[0])
    RetentionSchedule(exploration=0.5).apply(alone, 0, 10)
    assert mixers[0].exploration == 0.5


@torch._dynamo.config.patch(error_on_recompile=True)
def test_what_changes_at_every_step_is_compiled_once():
    config = HybridConfig(**MODEL)
    config.mixer_options["learned_eviction"]["dropout"] = 0.0  # compiled, it draws other numbers
    model = HybridForCausalLM(config).train()
    schedule = RetentionSchedule(exploration=0.9, soft_gate=1.0)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    ids = torch.randint(0, TASK.vocab_size, (2, TASK.length))
    found = []
    for step in range(4):
        schedule.apply(model, step, 100)
        torch.manual_seed(0)
        loss = compiled(input_ids=ids, labels=ids).lm_loss
        torch.manual_seed(0)
        torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).lm_loss)
        found.append(loss.item())
    assert len(set(found)) == 4  # the values do change


def test_a_run_too_short_to_evict_says_so(tmp_path, caplog):
    def warnings(start) -> list[str]:
        caplog.clear()
        trained = make_trainer(
            tmp_path, max_steps=2, retention=RetentionCallback(schedule=RetentionSchedule(eviction_start=start))
        )
        trained.train()
        return [r.getMessage() for r in caplog.records if "evicted" in r.getMessage()]

    assert warnings(1) == []
    assert len(warnings(2)) == 1


def test_a_run_made_long_enough_to_evict_does_not(tmp_path, caplog):
    def run(steps: int, **options) -> None:
        callback = RetentionCallback(schedule=RetentionSchedule(eviction_start=3))
        make_trainer(tmp_path, max_steps=steps, save_steps=2, retention=callback).train(**options)

    run(2)
    assert "Nothing is evicted" in caplog.text
    caplog.clear()
    run(4, resume_from_checkpoint=True)
    assert "Nothing is evicted" not in caplog.text
