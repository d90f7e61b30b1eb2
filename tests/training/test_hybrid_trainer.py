"""Runs from recipes: exact resumption, the run directory, metrics, the glue to transformers' Trainer."""

import contextlib
import dataclasses
import io
import json
import math

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_model import MODEL, TASK, make_recipe, metrics_of, train_until_killed
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils
from transformers.trainer_utils import IntervalStrategy

from holdfast import HybridConfig, HybridForCausalLM
from holdfast.data.needle import NeedleStream
from holdfast.training import (
    BudgetController,
    ControllerConfig,
    HybridTrainer,
    ProgressBar,
    RetentionCallback,
    RetentionSchedule,
    TrainingDivergedError,
    parameter_groups,
    read_metrics,
    train,
)
from holdfast.training.recipe import TextData


def test_a_run_leaves_model_metrics_and_recipe(finished):
    directory, _ = finished
    assert directory.name == "run"
    model = HybridForCausalLM.from_pretrained(directory)
    assert model.config.controller["interval"] == 2
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, None, 0)
    assert (directory / "model.safetensors").stat().st_mode & 0o777 == 0o644  # others may read it
    weights = load_file(directory / "model.safetensors")
    assert weights["model.l1_lambda"].shape == weights["model.num_kept"].shape == (1, 2)
    assert json.loads((directory / "summary.json").read_text())["steps"] == 8
    lines = metrics_of(directory)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 8]  # every second step, and at every checkpoint
    for line in lines:
        assert line["loss"] == pytest.approx(line["lm_loss"] + line["retention_loss"], rel=1e-4)
        assert line["kept_mean"] == pytest.approx(sum(line["kept"][0]) / 2)
        assert line["stored_min"] == min(line["stored"][0])
        assert 1 <= line["stored_min"] <= line["stored_max"] <= 4  # the sink at least, the budget at most
        assert line["lambda_max"] == max(line["lambda"][0])
    assert len({line["lambda_max"] for line in lines}) == 4  # λ moved at every update, of which step 3 is none
    assert lines[-1]["lambda"] == weights["model.l1_lambda"].tolist()
    assert sorted(path.name for path in directory.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]


def test_a_killed_run_resumes_bit_for_bit(finished, tmp_path, monkeypatch):
    directory, _ = finished
    recipe = make_recipe(tmp_path)
    train_until_killed(recipe, 5, monkeypatch)  # two steps past the checkpoint, in the middle of a λ interval
    killed = tmp_path / "run"
    assert [line["step"] for line in metrics_of(killed)] == [2, 3, 4]
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # cut short by the kill
    (killed / "checkpoint-4").mkdir()  # and a checkpoint that was never finished
    assert train(recipe, resume=True) == killed
    whole, resumed = load_file(directory / "model.safetensors"), load_file(killed / "model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert metrics_of(killed) == metrics_of(directory)
    assert json.loads((killed / "summary.json").read_text())["resumed_from"].endswith("checkpoint-3")


def test_resuming_without_a_checkpoint_starts_over(finished, tmp_path, monkeypatch):
    directory, _ = finished
    recipe = make_recipe(tmp_path)
    train_until_killed(recipe, 2, monkeypatch)
    train(recipe, resume=True)
    whole, resumed = load_file(directory / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class PoisonAt(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 4:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = math.nan


def test_nan_stops_the_run_before_anything_is_saved(tmp_path):
    trainer = make_trainer(tmp_path, HybridTrainer, max_steps=8, save_steps=6, logging_steps=100)
    trainer.add_callback(PoisonAt())
    with pytest.raises(TrainingDivergedError, match="since step 5: lower the learning rate"):
        trainer.train()
    assert not (tmp_path / "checkpoint-6").exists()


def make_trainer(directory, cls, **arguments):
    torch.manual_seed(0)
    own = {name: arguments.pop(name) for name in ("retention", "scorer_lr_scale", "callbacks") if name in arguments}
    defaults = {"per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return cls(
        model=HybridForCausalLM(make_recipe(directory).build_config()),
        args=TrainingArguments(output_dir=str(directory), **(defaults | arguments)),
        train_dataset=NeedleStream(TASK, size=64),
        data_collator=NeedleStream.collate,
        **own,
    )


def test_the_callback_serves_a_plain_trainer_and_averages_micro_batches(tmp_path):
    callback = RetentionCallback(ControllerConfig(initial=1e-2, minimum=1e-3, interval=2))
    arguments = {"max_steps": 4, "gradient_accumulation_steps": 3, "save_strategy": "no", "logging_steps": 1}
    trainer = make_trainer(tmp_path, Trainer, callbacks=[callback], **arguments)
    seen: list[torch.Tensor] = []
    handle = trainer.model.register_forward_hook(lambda module, inputs, output: seen.append(output.retention.kept))
    trainer.train()
    handle.remove()
    assert len(seen) == 12
    twin = HybridForCausalLM(trainer.model.config)
    controller = BudgetController(twin, config=callback.controller_config)
    for step in range(4):
        controller.step(torch.stack(seen[3 * step : 3 * step + 3]).mean(0))
    torch.testing.assert_close(trainer.model.model.num_kept, twin.model.num_kept)
    assert torch.equal(trainer.model.model.l1_lambda, twin.model.l1_lambda)
    assert twin.model.num_kept.max() > 0
    before = trainer.model.model.num_kept.clone()
    trainer.model.train()(**{k: v for k, v in NeedleStream(TASK)[0].items() if k != "distance"})
    assert torch.equal(trainer.model.model.num_kept, before)  # the hook is gone


def test_lambda_is_left_alone_before_eviction_starts(tmp_path):
    callback = RetentionCallback(ControllerConfig(interval=1), RetentionSchedule(eviction_start=0.5))
    trainer = make_trainer(tmp_path, HybridTrainer, retention=callback, max_steps=6, save_strategy="no")

    steps: list[tuple[bool, bool]] = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            steps.append((model.model.eviction_layers()[0].eviction, callback.controller.steps > 0))

    trainer.add_callback(Look())
    trainer.train()
    assert steps == [(False, False)] * 3 + [(True, True)] * 3
    assert callback.controller.steps == 3


def test_a_collapsed_head_is_named_while_training(tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr("holdfast.training.controller.logger.warning", lines.append)
    callback = RetentionCallback(patience=2)
    trainer = make_trainer(tmp_path, HybridTrainer, retention=callback, max_steps=3, save_strategy="no")
    last = trainer.model.model.eviction_layers()[0].router.conv_stack.proj
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([-9.0, 9.0]))
    trainer.train()
    assert [line.split(" for ")[0] for line in lines] == [
        "Layer 1, head 0: kept nothing",
        "Layer 1, head 1: kept everything",
    ]
    assert callback.controller.config.interval == 2  # from the model's configuration


def test_the_trainer_may_rebuild_the_callback_from_a_checkpoint(tmp_path):
    def build():
        config = ControllerConfig(interval=3, tolerance=(0.8, 1.2))
        schedule = RetentionSchedule(exploration=0.25)
        return make_trainer(
            tmp_path,
            HybridTrainer,
            retention=RetentionCallback(config, schedule, patience=7),
            max_steps=4,
            save_steps=2,
            restore_callback_states_from_checkpoint=True,
        )

    first = build()
    first.train()
    second = build()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.retention.controller_config == first.retention.controller_config
    assert (second.retention.schedule, second.retention.patience) == (first.retention.schedule, 7)
    assert second.retention.controller.steps == 4
    assert torch.equal(first.model.model.num_kept, second.model.model.num_kept)


def test_parameter_groups(tmp_path):
    settings = {"learning_rate": 1e-2, "weight_decay": 0.5, "scorer_lr_scale": 0.1}
    trainer = make_trainer(tmp_path, HybridTrainer, max_steps=2, **settings)
    model = trainer.model
    RetentionSchedule(scorer_freeze_steps=1).apply(model, 0, 2)  # frozen scorers stay in the optimizer
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, **settings)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(names)
    for group in groups:
        for parameter in group["params"]:
            is_scorer = ".attn.router." in names[parameter]
            assert group["lr"] == pytest.approx(1e-3 if is_scorer else 1e-2)
            assert group["weight_decay"] == (0.5 if parameter.ndim >= 2 else 0.0)
            if names[parameter].endswith(("A_log", "dt_bias", "norm.weight", "bias")):
                assert group["weight_decay"] == 0.0
    decayed = parameter_groups(model, **settings, scorer_weight_decay=2.0)
    for group in decayed:
        for parameter in group["params"]:
            if ".attn.router." in names[parameter]:
                assert group["weight_decay"] == 2.0  # biases too
            else:
                assert group["weight_decay"] == (0.5 if parameter.ndim >= 2 else 0.0)
    optimizer = trainer.create_optimizer()
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in groups]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [group["weight_decay"] for group in groups]
    embedding = model.get_input_embeddings().weight.requires_grad_(False)
    assert not any(
        embedding is p for group in parameter_groups(model, learning_rate=1, weight_decay=0) for p in group["params"]
    )


def test_the_learning_rate_falls_to_its_share_in_every_group(finished):
    directory, _ = finished
    saved = torch.load(directory / "checkpoint-8" / "scheduler.pt", weights_only=True)
    assert saved["_last_lr"] == pytest.approx([1e-3] * 4)  # a tenth of 1e-2


def test_scorers_may_have_a_final_learning_rate_of_their_own(tmp_path):
    settings = {"max_steps": 6, "warmup_steps": 2, "scorer_lr_scale": 0.5, "save_every": 1, "keep_checkpoints": 9}
    apart = train(make_recipe(tmp_path, "apart", **settings, final_lr_share=0.0, scorer_final_lr_share=0.8))
    alike = train(make_recipe(tmp_path, "alike", **settings, final_lr_share=0.8))

    def rates(run, step):
        return torch.load(run / f"checkpoint-{step}" / "scheduler.pt", weights_only=True)["_last_lr"]

    for step in range(1, 7):
        model, scorers = rates(apart, step)[:2], rates(apart, step)[2:]
        assert scorers == pytest.approx(rates(alike, step)[2:])
        cosine = 0.5 + 0.5 * math.cos(math.pi * max(step - 2, 0) / 4)
        assert model == pytest.approx([1e-2 * (0.5 if step == 1 else cosine)] * 2, abs=1e-9)
    assert rates(apart, 6)[2:] == pytest.approx([0.5e-2 * 0.8] * 2)
    with pytest.raises(ValueError, match=r"needs lr_scheduler_type 'cosine_with_min_lr', not linear\."):
        HybridTrainer(
            HybridForCausalLM(HybridConfig(**MODEL)),
            TrainingArguments(str(tmp_path), lr_scheduler_type="linear"),
            scorer_final_lr_share=0.5,
        )
    model = HybridForCausalLM(HybridConfig(**MODEL))
    arguments = TrainingArguments(
        str(tmp_path), lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1}, use_cpu=True
    )
    own = (torch.optim.SGD(model.parameters()), None)
    with pytest.raises(ValueError, match="needs the Trainer's own optimizer and schedule"):
        HybridTrainer(model, arguments, scorer_final_lr_share=0.5, optimizers=own).create_scheduler(3)


def test_text_isolated_in_bf16_with_checkpointing_and_evaluation(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for split in ("train", "validation"):
        rows = [{"text": f"{split} {number}: " + "the kelp holds on to the rock. " * 3} for number in range(30)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"max_steps": 3, "batch_size": 2, "accumulation": 1, "bf16": True, "gradient_checkpointing": True}
    recipe = dataclasses.replace(
        make_recipe(tmp_path, "text-run", **options, eval_every=2, log_every=1),
        model=MODEL | {"vocab_size": 300},
        data=TextData(str(folder), validation_split="validation", tokenizer="train", length=64, isolate=True),
    )
    directory = train(recipe)
    model = HybridForCausalLM.from_pretrained(directory)
    assert model.config.eos_token_id == 2
    assert (directory / "tokenizer.json").exists()
    lines = read_metrics(directory / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 3]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert 0 < metrics_of(directory)[-1]["kept_mean"] <= 64


def test_broken_metrics_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_metrics(path)


def test_without_a_terminal_progress_is_one_line_per_log(tmp_path, capsys):
    trainer = make_trainer(tmp_path, HybridTrainer, max_steps=2, save_strategy="no", logging_steps=1)
    trainer.add_callback(ProgressBar())
    trainer.train()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 2
    assert lines[1].startswith("step 2/2  loss ")
    for shown in (" tokens/s  ", "utilisation ", "stored ", "kept ", "λ "):
        assert shown in lines[1]


def test_the_bar_moves_while_a_model_is_evaluated(tmp_path):
    shown = []
    bar = ProgressBar()
    bar._console = Console(file=io.StringIO(), force_terminal=True, width=80)

    class Look(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            shown.append(bar._bar.text)

    options = {"max_steps": 2, "save_strategy": "no", "eval_steps": 1}
    trainer = make_trainer(tmp_path, HybridTrainer, per_device_eval_batch_size=32, **options)
    trainer.eval_dataset, trainer.args.eval_strategy = trainer.train_dataset, IntervalStrategy.STEPS
    trainer.add_callback(bar)
    trainer.add_callback(Look())
    trainer.train()
    assert shown == [f"evaluating: batch {number}/2" for number in (1, 2)] * 2


def test_a_narrow_terminal_shows_the_bar_and_every_number(tmp_path):
    trainer = make_trainer(tmp_path, HybridTrainer, max_steps=2, save_strategy="no", logging_steps=1)
    bar = ProgressBar()
    bar._console = Console(file=io.StringIO(), force_terminal=True, width=80)
    trainer.add_callback(bar)
    trainer.train()
    last = bar._console.file.getvalue().replace("\n", " ").rsplit("2/2", 1)
    assert len(last) == 2
    for shown in ("loss ", " tokens/s", "utilisation ", "stored ", "kept ", "λ "):
        assert shown in last[1]


@pytest.mark.parametrize("tokenizer", ["byte", "train"])
def test_processes_that_cannot_share_a_stream_are_told_before_a_model_is_built(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"{row}: kelp"}) + "\n" for row in range(64)))
    data = TextData(str(tmp_path / "rows.jsonl"), tokenizer=tokenizer, length=32, in_memory=0, lanes=16)
    recipe = dataclasses.replace(make_recipe(tmp_path), model=MODEL | {"vocab_size": 300}, data=data)
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 3))
    monkeypatch.setattr(TrainingArguments, "main_process_first", lambda *args, **kwargs: contextlib.nullcontext())
    with pytest.raises(ValueError, match=r"16 lanes, which 3 processes .* \(data\.lanes of a recipe\)"):
        train(recipe)
    assert not (tmp_path / "run").exists()


def test_logs_go_where_the_recipe_reports_to(tmp_path, monkeypatch):
    received = []

    class Recorder(TrainerCallback):
        """Stands for TensorBoard, W&B or trackio, which transformers finds under their names in the same way."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            received.append((args.run_name, logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    train(make_recipe(tmp_path, max_steps=2, save_every=2, report_to=("recorder",), peak_flops=1e9))
    name, logs = next((name, logs) for name, logs in received if "loss" in logs)
    assert name == "run"
    expected = {"lm_loss", "kept_mean", "stored_mean", "stored_min", "lambda_max", "tokens_per_second", "utilisation"}
    assert expected <= logs.keys()
    assert 0 < logs["utilisation"] < 1000  # whatever this machine reaches of what was given
    with pytest.raises(ValueError, match="nowhere is not supported"):
        train(make_recipe(tmp_path, name="other", max_steps=2, report_to=("nowhere",)))
