"""What a configuration refuses, how a saved one is changed when it is read, and what is written beside it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast import HybridConfig, HybridForCausalLM
from holdfast.cli import main
from holdfast.configuration import AUTO_FILE
from holdfast.data.text import byte_tokenizer


@pytest.fixture
def saved(small_config: Callable[..., HybridConfig], tmp_path: Path) -> Path:
    small_config(*["gated_deltanet", "learned_eviction"] * 2).save_pretrained(tmp_path)
    return tmp_path


def test_an_option_is_laid_over_the_saved_ones(saved: Path) -> None:
    before = HybridConfig.from_pretrained(saved)
    config = HybridConfig.from_pretrained(saved, mixer_options={"learned_eviction": {"budget": 9}})
    assert config.mixer_options["learned_eviction"] == before.mixer_options["learned_eviction"] | {"budget": 9}
    assert config.mixer_options["gated_deltanet"] == before.mixer_options["gated_deltanet"]


def test_the_budget_of_a_model_is_changed_when_it_is_loaded(
    small_model: Callable[..., HybridForCausalLM], tmp_path: Path
) -> None:
    small_model("gated_deltanet", "learned_eviction").save_pretrained(tmp_path)
    model = HybridForCausalLM.from_pretrained(tmp_path, mixer_options={"learned_eviction": {"budget": 9}})
    assert model.model.layers[1].attn.options.budget == 9


def test_other_numbers_of_layers_and_other_mixers_are_expanded_anew(saved: Path) -> None:
    config = HybridConfig.from_pretrained(saved, num_hidden_layers=10)
    assert config.mixers == ["gated_deltanet", "learned_eviction"] * 5
    config = HybridConfig.from_pretrained(saved, mixers=["gated_deltanet"])
    assert config.mixers == ["gated_deltanet"] * 4
    assert set(config.mixer_options) == {"gated_deltanet"}
    with pytest.raises(ValueError, match="do not divide 3 layers"):
        HybridConfig.from_pretrained(saved, num_hidden_layers=3)


def test_settings_of_the_controller_are_laid_over_the_saved_ones(
    small_config: Callable[..., HybridConfig], tmp_path: Path
) -> None:
    small_config(controller={"interval": 3}).save_pretrained(tmp_path)
    config = HybridConfig.from_pretrained(tmp_path, controller={"increase": 1.25})
    assert config.controller == {"interval": 3, "increase": 1.25}


def test_transformers_own_settings_still_pass(saved: Path) -> None:
    config, unused = HybridConfig.from_pretrained(
        saved, output_hidden_states=True, num_labels=3, vocab_size=50, device_map="cpu", return_unused_kwargs=True
    )
    assert (config.output_hidden_states, config.num_labels, config.vocab_size) == (True, 3, 50)
    assert unused == {"device_map": "cpu"}
    assert HybridConfig(sep_token_id=5, torch_dtype="float32", a_note="mine").a_note == "mine"


EVICTION = {"num_heads": 16}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"mixer_options": {"learned_eviction": {"budgt": 9}}}, "'learned_eviction' has no option budgt"),
        ({"mixer_options": {"learned_eviction": 9}}, "'learned_eviction': its options must be a mapping, got 9"),
        ({"mixer_options": {"learned_eviction": EVICTION | {"budget": 5.5}}}, "budget must be an integer, got 5.5"),
        ({"mixer_options": {"learned_eviction": EVICTION | {"window": 8.5}}}, "window must be an integer, got 8.5"),
        ({"mixer_options": {"learned_eviction": {"num_heads": "4"}}}, "num_heads must be an integer, got '4'"),
        ({"mixer_options": {"learned_eviction": {"num_heads": 4.0}}}, "num_heads must be an integer, got 4.0"),
        ({"mixer_options": {"learned_eviction": EVICTION | {"conv_dilation": [-1, -1, -1]}}}, "at least 1, got"),
        ({"mixer_options": {"learned_eviction": EVICTION | {"conv_dilation": [0, 0, 0]}}}, "at least 1, got"),
        ({"mixer_options": {"learned_eviction": EVICTION | {"conv_size": [3, -1, 3]}}}, "odd and positive"),
        ({"mixer_options": {"learned_eviction": EVICTION | {"head_dim": 2}}}, "head_dim 2 leaves none"),
        ({"num_hidden_layers": -2}, "num_hidden_layers must be at least 1, got -2"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"mixers": "learned_eviction"}, "mixers must be a list of names.*got 'learned_eviction'"),
        ({"num_hidden_layer": 3}, "no setting 'num_hidden_layer' .did you mean 'num_hidden_layers'"),
        ({"controller": {"intervall": 3}}, "unknown key 'controller.intervall' .did you mean 'interval'"),
        ({"controller": {"interval": 0}}, "interval must be at least 1 step"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_when_made_and_when_read(changes: dict[str, Any], error: str, saved: Path) -> None:
    with pytest.raises(ValueError, match=error):
        HybridConfig(**changes)
    with pytest.raises(ValueError, match=error):
        HybridConfig.from_pretrained(saved, **changes)


COMMANDS = (
    ["info"],
    ["generate"],
    ["inspect"],
    ["convert"],
    *(["evaluate", name] for name in ("needle", "recall", "turns", "perplexity", "scorers", "efficiency", "all")),
    ["evaluate", "lm-eval"],
)
ALSO = {
    "generate": ["Once"],
    "inspect": ["Once"],
    "convert": ["made", "--format", "holdfast"],
    "recall": ["--tasks", "squad"],
    "perplexity": ["--data", "texts.txt"],
    "all": ["--output", "made"],
    "lm-eval": ["--tasks", "lambada_openai"],
}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_file_without_settings_is_named_in_one_line(
    command: list[str], saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "lm-eval" in command:
        pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'holdfast[eval]'")
    monkeypatch.chdir(saved)
    byte_tokenizer().save_pretrained(saved)
    Path("texts.txt").write_text("It was the best of times.")
    before = {path.name for path in saved.iterdir()}
    for content, shown in (("[1, 2]", r"\[1, 2\]"), ('"mixers"', "'mixers'"), ("null", "None")):
        (saved / "config.json").write_text(content)
        assert main([*command, str(saved), *ALSO.get(command[-1], [])]) == 1
        error = capsys.readouterr().err
        assert re.fullmatch(rf"holdfast: {saved}/config.json must hold an object .*, got {shown}; copy .*\n", error)
    assert {path.name for path in saved.iterdir()} == before


def test_a_file_without_settings_is_no_configuration(saved: Path) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps(list(range(1000))))
    for read in (HybridConfig.from_json_file, HybridConfig.from_pretrained, HybridForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=rf"{path} must hold an object .*, got \[0, 1, 2, 3, 4, 5, \.\.\.\]; copy"):
            read(path if read == HybridConfig.from_json_file else saved)


def test_four_channels_are_enough_for_two_convolutions() -> None:
    two = {"num_heads": 2, "head_dim": 2, "conv_size": [3, 3], "conv_dilation": [1, 1]}
    assert HybridConfig(mixers=["learned_eviction"], mixer_options={"learned_eviction": two}).mixers


def test_saving_leaves_the_configuration_as_it_was(saved: Path, small_config: Callable[..., HybridConfig]) -> None:
    config = small_config()
    config.save_pretrained(saved / "again")
    assert not hasattr(config, "auto_map")
    assert "auto_map" in json.loads((saved / "again" / "config.json").read_text())


def test_the_module_beside_a_configuration_is_uploaded_too(
    small_config: Callable[..., HybridConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[set[str]] = []

    class Hub:
        repo_id = "someone/model"

        def create_repo(self, *_: Any, **__: Any) -> "Hub":
            return self

    def upload(_: Any, directory: str, repo_id: str, timestamps: dict[str, float], **__: Any) -> None:
        noted.append({path.name for path in Path(directory).iterdir()} - timestamps.keys())

    monkeypatch.setattr("transformers.configuration_utils.hf_api", Hub)
    monkeypatch.setattr(HybridConfig, "_upload_modified_files", upload)
    small_config().save_pretrained(str(tmp_path), push_to_hub=True)
    assert noted == [{"config.json", AUTO_FILE}]
