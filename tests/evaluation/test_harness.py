"""The model in lm-evaluation-harness says what the model itself says, in batches with pads."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from templates import tokenizer_with
from torch.nn import functional as F

from holdfast import HybridForCausalLM
from holdfast.cli import main
from holdfast.data.text import byte_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'holdfast[eval]'")

ROOT = Path(__file__).parents[2]
PAIRS = [
    ("The cat sat", " on the mat"),
    ("a", "b"),
    ("Once upon a time there was", " a"),
    ("It is", " not so, he said"),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{cache_dir: {folder}/cache, data_files: {{test: {folder}/samples.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
"""
GENERATION = """doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""
CHOICE = """doc_to_choice: [" cold", " hot"]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""


@pytest.fixture
def checkpoint(small_model: Callable[..., HybridForCausalLM], tmp_path: Path) -> Path:
    model = small_model("gated_deltanet", "learned_eviction", vocab_size=259, max_position_embeddings=64)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def harness(checkpoint: Path) -> Any:
    from holdfast.evaluation.harness import HoldfastLM

    return HoldfastLM(pretrained=str(checkpoint), batch_size=3, device="cpu", dtype="float32")


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


def log_probability(model: HybridForCausalLM, before: list[int], after: list[int]) -> tuple[float, bool]:
    """Of `after`, and whether greedy search would say it, from one sequence without pads or cache."""
    ids = torch.tensor([before + after])
    with torch.no_grad():
        scores = F.log_softmax(model(ids, use_cache=False).logits[0, len(before) - 1 : -1], dim=-1)
    wanted = torch.tensor(after)
    return float(scores.gather(1, wanted[:, None]).sum()), bool((scores.argmax(-1) == wanted).all())


def test_log_likelihoods(harness: Any, checkpoint: Path) -> None:
    model, tokenizer = HybridForCausalLM.from_pretrained(checkpoint).eval(), byte_tokenizer()
    found = harness.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (log_likelihood, greedy) in zip(PAIRS, found, strict=True):
        encoded = [tokenizer.encode(text, add_special_tokens=False) for text in (context, continuation)]
        expected, likeliest = log_probability(model, *encoded)
        assert log_likelihood == pytest.approx(expected, abs=1e-3)
        assert greedy is likeliest
    texts = ["It was the best of times,", "x"]
    rolling = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in texts]), disable_tqdm=True)
    for text, log_likelihood in zip(texts, rolling, strict=True):
        encoded = tokenizer.encode(text, add_special_tokens=False)
        assert log_likelihood == pytest.approx(log_probability(model, [harness.prefix_token_id], encoded)[0], abs=1e-3)


def test_generation_in_batches_of_different_lengths(harness: Any, checkpoint: Path) -> None:
    model, tokenizer = HybridForCausalLM.from_pretrained(checkpoint).eval(), byte_tokenizer()
    settings = {"until": ["\n\n\n"], "max_gen_toks": 6, "do_sample": False}
    found = harness.generate_until(
        requests("generate_until", [(c, dict(settings)) for c, _ in PAIRS]), disable_tqdm=True
    )
    for (context, _), text in zip(PAIRS, found, strict=True):
        ids = torch.tensor([tokenizer.encode(context, add_special_tokens=False)])
        with torch.no_grad():
            new = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert text == tokenizer.decode(new, skip_special_tokens=True)


def test_a_prompt_is_encoded_once_to_be_counted_and_sorted(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness encodes it once more, in its batch."""
    encoded: list[str] = []
    encode = harness.tokenizer.encode

    def counting(text: str, **options: Any) -> list[int]:
        encoded.append(text)
        return encode(text, **options)

    monkeypatch.setattr(harness.tokenizer, "encode", counting)
    prompts = [context for context, _ in PAIRS]
    settings = {"until": ["\n\n\n"], "max_gen_toks": 6, "do_sample": False}
    asked = [(prompt, dict(settings)) for prompt in [*prompts, *prompts]]
    found = harness.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert found[:4] == found[4:]
    assert sorted(text for text in encoded if text in prompts) == sorted(prompts)
    harness.tok_encode(prompts[0])  # nothing is kept
    assert encoded.count(prompts[0]) == 2


def test_no_request_is_cut_unasked(harness: Any) -> None:
    """The model was trained on 64 tokens, which are bytes here."""
    settings = {"until": ["\n\n\n"], "max_gen_toks": 6, "do_sample": False}

    def generate(length: int) -> list[str]:
        asked = [("short", dict(settings)), ("x" * length, dict(settings))]
        return harness.generate_until(requests("generate_until", asked), disable_tqdm=True)

    def score(length: int) -> list[tuple[float, bool]]:
        asked = [("short", " one"), ("x" * length, " one")]
        return harness.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)

    assert len(generate(58)) == 2
    with pytest.raises(ValueError, match=r"65 tokens with its answer, more than the 64 .* max_length=65 or more"):
        generate(59)
    assert len(score(61)) == 2  # the last of 65 tokens is scored and not read
    with pytest.raises(ValueError, match=r"65 tokens with its answer, more than the 64 .* max_length=65 or more"):
        score(62)
    with pytest.raises(ValueError, match=r"260 tokens with its answer"):  # 256 to generate, where nothing says how many
        harness.generate_until(requests("generate_until", [("cold", {"until": []})]), disable_tqdm=True)
    rolling = requests("loglikelihood_rolling", [("x" * 300,)])
    assert harness.loglikelihood_rolling(rolling, disable_tqdm=True)[0] < 0


def test_a_length_that_was_given_is_read(checkpoint: Path) -> None:
    from holdfast.evaluation.harness import HoldfastLM

    longer = HoldfastLM(pretrained=str(checkpoint), batch_size=1, device="cpu", dtype="float32", max_length=96)
    model, tokenizer = HybridForCausalLM.from_pretrained(checkpoint).eval(), byte_tokenizer()
    context, continuation = "The key is 7. " + "x" * 70, " seven"
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in (context, continuation)]
    found = longer.loglikelihood(requests("loglikelihood", [(context, continuation)]), disable_tqdm=True)
    assert found[0][0] == pytest.approx(log_probability(model, *encoded)[0], abs=1e-3)
    settings = {"until": ["\n\n\n"], "max_gen_toks": 6, "do_sample": False}
    asked = requests("generate_until", [("x" * 95, settings)])
    assert len(longer.generate_until(asked, disable_tqdm=True)) == 1  # who gives a length has longer ones cut to it


def test_no_prompt_ends_in_a_token_of_its_end(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from holdfast.evaluation.harness import HoldfastLM

    def harness(template: str, **options: Any) -> HoldfastLM:
        tokenizer_with(template).save_pretrained(checkpoint)
        return HoldfastLM(pretrained=str(checkpoint), batch_size=3, device="cpu", dtype="float32", **options)

    asked = requests("loglikelihood", PAIRS)
    assert len(harness("END $A").loglikelihood(asked, disable_tqdm=True)) == len(PAIRS)
    plain = harness("$A").loglikelihood(asked, disable_tqdm=True)
    with pytest.raises(ValueError, match=rf"tokenizer of {checkpoint} puts '<\|eos\|>' behind every text"):
        harness("$A END")
    assert harness("$A END", add_bos_token=False).loglikelihood(asked, disable_tqdm=True) == plain
    model = HybridForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="tokenizer of the model puts"):
        HoldfastLM(pretrained=model, tokenizer=tokenizer_with("$A END"), device="cpu")

    assert main(["evaluate", "lm-eval", str(checkpoint), *local_tasks(tmp_path)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("holdfast: ")]
    assert "puts '<|eos|>' behind every text" in line
    assert not (tmp_path / "out").exists()


def test_only_requests_with_a_token_that_the_model_does_not_know_are_refused(checkpoint: Path) -> None:
    from holdfast.evaluation.harness import HoldfastLM

    more = byte_tokenizer()
    more.add_tokens(["<|call|>"])
    more.save_pretrained(checkpoint)
    harness = HoldfastLM(pretrained=str(checkpoint), device="cpu", dtype="float32", max_length=32)
    pairs = {
        "loglikelihood": [("It is", " so"), ("It", "<|call|>")],
        "generate_until": [("It is", {"max_gen_toks": 1}), ("<|call|>", {"max_gen_toks": 1})],
        "loglikelihood_rolling": [("It is",), ("It<|call|>",)],
    }
    for kind, arguments in pairs.items():
        ask = getattr(harness, kind)
        assert len(ask(requests(kind, arguments[:1]), disable_tqdm=True)) == 1
        with pytest.raises(ValueError, match=r"'<\|call\|>' is token 259 of the tokenizer, and the model knows tokens"):
            ask(requests(kind, arguments), disable_tqdm=True)


def test_a_pad_that_the_model_does_not_know_is_refused_where_there_are_pads(checkpoint: Path) -> None:
    from holdfast.evaluation.harness import HoldfastLM

    padded = byte_tokenizer()
    padded.add_special_tokens({"pad_token": "<|more|>"})
    padded.save_pretrained(checkpoint)
    asked = [("It is", {"max_gen_toks": 1}), ("It", {"max_gen_toks": 1})]
    for batch_size in (1, 2):
        harness = HoldfastLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=batch_size)
        if batch_size == 1:
            assert len(harness.generate_until(requests("generate_until", asked), disable_tqdm=True)) == 2
            continue
        with pytest.raises(ValueError, match=r"'<\|more\|>' is token 259 of the tokenizer"):
            harness.generate_until(requests("generate_until", asked), disable_tqdm=True)


def test_a_token_of_every_text_that_the_model_does_not_know_is_refused_before_the_model_is_loaded(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter is loaded into a model with embeddings for all of them."""
    from holdfast.evaluation.harness import HoldfastLM

    more = tokenizer_with("END $A", "<|more|>")
    more.save_pretrained(checkpoint)
    with monkeypatch.context() as unloaded:
        unloaded.setattr(HoldfastLM, "_create_model", lambda *_, **__: pytest.fail("loaded"))
        assert main(["evaluate", "lm-eval", str(checkpoint), *local_tasks(tmp_path)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("holdfast: ")]
    assert f"is token 259 of the tokenizer, and {checkpoint} knows tokens up to 258" in line

    monkeypatch.setattr("peft.PeftModel.from_pretrained", lambda model, *_, **__: model)
    adapted = HoldfastLM(pretrained=str(checkpoint), device="cpu", dtype="float32", peft="an adapter")
    assert adapted.model.get_input_embeddings().num_embeddings == 260
    assert len(adapted.loglikelihood(requests("loglikelihood", [("It is", "so")]), disable_tqdm=True)) == 1


def test_the_command_refuses_long_requests_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "lm-eval", str(checkpoint), *local_tasks(tmp_path, "x" * 80)]
    assert main(arguments) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("holdfast: ")]
    assert "more than the 64 that the model was trained on" in line
    assert "--model_args max_length=" in line
    assert main([*arguments, "--model_args", "max_length=128"]) == 0
    assert written(tmp_path)["n-samples"]["say"]["effective"] == 5


def test_the_command_runs_local_tasks(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["evaluate", "lm-eval", str(checkpoint), *local_tasks(tmp_path)]) == 0
    found = written(tmp_path)
    assert found["config"]["model"] == "holdfast"
    for name, metric in (("say", "exact_match,none"), ("choose", "acc,none")):
        assert 0 <= found["results"][name][metric] <= 1
        assert found["n-samples"][name]["effective"] == 4


def test_a_task_of_the_hub_fails_at_once_where_the_hub_cannot_be_reached(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.data.hub.hub_is_reachable", lambda: False)
    task = 'task: away\ndataset_path: some/where\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: ""\n'
    (tmp_path / "away.yaml").write_text(task + CHOICE)
    argv = ["evaluate", "lm-eval", str(checkpoint), "--tasks", "away", "--include_path", str(tmp_path)]
    assert main(argv) == 1
    error = capfd.readouterr().err
    assert error.splitlines()[-1].startswith("holdfast: Couldn't reach 'some/where' on the Hub")
    assert "Retrying" not in error


def test_the_harness_runs_saved_models_by_its_own_command(checkpoint: Path, tmp_path: Path) -> None:
    """In a process that does not import holdfast, with the model `hf` and the same results."""
    arguments = f"--model hf --model_args pretrained={checkpoint},trust_remote_code=True,dtype=float32".split()
    subprocess.run([sys.executable, "-m", "lm_eval", "run", *arguments, *local_tasks(tmp_path)], check=True)
    theirs = written(tmp_path)
    assert theirs["config"]["model"] == "hf"
    shutil.rmtree(tmp_path / "out")
    assert main(["evaluate", "lm-eval", str(checkpoint), *local_tasks(tmp_path)]) == 0
    ours = written(tmp_path)
    assert [ours["results"][name] for name in ("say", "choose")] == [theirs["results"][n] for n in ("say", "choose")]


def test_the_entry_point_is_the_model() -> None:
    """As lm-eval after 0.4.13 reads it: a placeholder that is loaded when the model is asked for."""
    from lm_eval.api.model import LM
    from lm_eval.api.registry import Registry, get_model

    from holdfast.evaluation.harness import HoldfastLM

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    (entry,) = (EntryPoint(name, value, "lm_eval.models") for name, value in declared["lm_eval.models"].items())
    registry: Registry[LM] = Registry("model", base_cls=LM)
    registry.register(entry.name, target=entry)
    assert registry.get("holdfast") is HoldfastLM is get_model("holdfast")


def test_the_extra_brings_what_ruler_tasks_import() -> None:
    from importlib.metadata import metadata, requires

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (asked,) = extras["eval"]
    named = set(asked.partition("[")[2].partition("]")[0].split(","))
    assert named == {"hf", "ruler"}
    assert named <= set(metadata("lm_eval").get_all("Provides-Extra") or ())
    brought = {each.partition(";")[0].strip() for each in requires("lm_eval") or () if 'extra == "ruler"' in each}
    assert brought >= {"nltk", "wonderwords", "scipy"}


def local_tasks(folder: Path, *more_words: str) -> list[str]:
    """Options for two tasks of files that are written into the folder, with a sample for each of some words."""
    (folder / "tasks").mkdir(exist_ok=True)
    for name, kind, more in (("say", "generate_until", GENERATION), ("choose", "multiple_choice", CHOICE)):
        task = TASK.format(name=name, folder=folder, kind=kind, more=more)
        (folder / f"tasks/{name}.yaml").write_text(task)
    words = ("cold", "warm", "blue", "dry", *more_words)
    samples = [{"question": f"Not {word} but", "answer": " hot"} for word in words]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    options = f"--include_path {folder}/tasks --tasks say,choose --batch_size 2 --device cpu --output_path {folder}/out"
    return options.split()


def written(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("out/**/results_*.json")
    return json.loads(path.read_text())


def test_no_model_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "lm-eval", str(tmp_path / "nowhere"), "--tasks", "opposite"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["evaluate", "lm-eval", "--tasks", "opposite"]) == 2
    assert "MODEL_DIR" in capsys.readouterr().err


def test_what_is_wrong_is_one_line_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    for options, expected in {
        "--taks opposite": "Unrecognized option: --taks; did you mean --tasks? (`holdfast evaluate lm-eval --help`",
        "--zzz": "Unrecognized option: --zzz (`holdfast evaluate lm-eval --help`",
        "--tasks opposite --limit many": "lm-eval: argument --limit/-L: invalid float value: 'many' (",
    }.items():
        assert main(["evaluate", "lm-eval", "nowhere", *options.split()]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"holdfast: {expected}")
        assert error.count("\n") == 1


@pytest.mark.parametrize("models", [(), ("nowhere",)])
def test_tasks_are_listed(models: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local_tasks(tmp_path)
    options = ["--include_path", str(tmp_path / "tasks")]
    assert main(["evaluate", "lm-eval", *models, "--tasks", "list", *options]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^\|say +\|", shown, re.MULTILINE)
    assert re.search(r"^\|lambada_openai +\|", shown, re.MULTILINE)


def test_several_models_in_one_call(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    assert main(["evaluate", "lm-eval", str(checkpoint), str(other), *local_tasks(tmp_path)]) == 0
    results = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("results_*.json")]
    assert sorted(found["config"]["model_args"]["pretrained"] for found in results) == sorted(
        map(str, (checkpoint, other))
    )
    assert results[0]["results"]["say"] == results[1]["results"]["say"]
    assert "HF model type" not in capsys.readouterr().err


LATE = """
import sys
sys.argv = sys.orig_argv = ["/usr/bin/holdfast"]
from holdfast.cli import main
assert main(["evaluate", "lm-eval", "--help"]) == 0
assert main(["evaluate", "lm-eval", "x", "--taks", "y"]) == 2
heavy = {"torch", "transformers", "datasets", "lm_eval.tasks"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_and_wrong_options_import_nothing_heavy() -> None:
    finished = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=200, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "usage: holdfast evaluate lm-eval MODEL [MODEL ...] [OPTIONS]" in finished.stdout
    assert "--num_fewshot" in finished.stdout
