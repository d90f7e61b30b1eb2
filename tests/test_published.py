"""Published checkpoints in and out: configurations, weights, and errors that name what is wrong."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig

from holdfast import HybridConfig, HybridForCausalLM
from holdfast.checkpoints import convert
from holdfast.cli import main
from holdfast.data.text import byte_tokenizer, load_tokenizer
from holdfast.published import PUBLISHED_TYPES, from_published, to_published

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A directory as published: config.json and the weights of `lte_stream`, and a tokenizer."""
    folder = tmp_path / "published"
    folder.mkdir()
    shutil.copyfile(GOLDEN / "lte_stream.config.json", folder / "config.json")
    tensors = load_file(GOLDEN / "lte_stream.safetensors")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"never copied")
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in values.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))


def assert_lte_stream(model: HybridForCausalLM) -> None:
    """The model gives the logits that the published implementation gives."""
    tensors = load_file(GOLDEN / "lte_stream.safetensors")
    expected = torch.cat([tensors["cache.prefill_logits"], tensors["cache.decode_logits"]], dim=1)
    with torch.no_grad():
        logits = model.eval()(tensors["input_ids"], use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert torch.equal(model.model.l1_lambda, tensors["state.model.l1_lambda"])


def test_a_published_directory_loads(published: Path) -> None:
    assert_lte_stream(HybridForCausalLM.from_pretrained(published))


def test_sharded_weights_load(published: Path) -> None:
    state = load_file(published / "model.safetensors")
    (published / "model.safetensors").unlink()
    shards = {f"model-{n}-of-00003.safetensors": dict(list(state.items())[n::3]) for n in range(3)}
    for name, part in shards.items():
        save_file(part, published / name, metadata={"format": "pt"})
    index = {key: name for name, part in shards.items() for key in part}
    (published / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert_lte_stream(HybridForCausalLM.from_pretrained(published))


def test_pickles_are_refused_unless_asked_for(published: Path) -> None:
    torch.save(load_file(published / "model.safetensors"), published / "pytorch_model.bin")
    (published / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"only pickled weights \(pytorch_model.bin.*use_safetensors=False"):
        HybridForCausalLM.from_pretrained(published)
    with pytest.raises(OSError, match="only pickled weights"):
        HybridForCausalLM.from_pretrained(published, use_safetensors=None)
    assert_lte_stream(HybridForCausalLM.from_pretrained(published, use_safetensors=False))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda s: s.pop("model.layers.2.mlp_norm.weight"), r"missing model\.layers\.2\.mlp_norm\.weight"),
        (lambda s: s.pop("model.l1_lambda"), r"missing model\.l1_lambda"),
        (lambda s: s.update(extra=torch.zeros(2)), "not part of the model: extra"),
        (lambda s: s.update({"model.norm.weight": torch.zeros(3)}), r"shape: model\.norm\.weight \(\[3\] instead of"),
    ],
)
def test_weights_that_do_not_fit_are_named(published: Path, change: Callable[..., Any], error: str) -> None:
    change_weights(published, change)
    with pytest.raises(ValueError, match=error):
        HybridForCausalLM.from_pretrained(published)
    relaxed = {"strict": False, "ignore_mismatched_sizes": True}
    model = HybridForCausalLM.from_pretrained(published, **relaxed)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu'; this library computes only 'swish'"),
        ({"hidden_ratio": 3}, "hidden_ratio = 3"),
        ({"use_gate": False}, "use_gate = False"),
        ({"use_short_conv": False}, "use_short_conv = False"),
        ({"attn__routing_method": "softmax"}, "routing_method = 'softmax'"),
        ({"attn__routing_grad": False}, "routing_grad = False"),
        ({"attn__routing_shared": "all"}, "routing_shared = 'all': it is not known where"),
        ({"attn__routing_shared": "some"}, "scorer_sharing must be one of 'head', 'layer', 'all', got 'some'"),
        ({"attn__attn_type": "mamba"}, "attn_type 'mamba' is not known"),
        (
            {"attn__attn_type": "nsa", "attn__block_counts": 0},
            "num_blocks must be at least 1, got 0",
        ),
        ({"attn__layers": [1, 7]}, "names layer 7, but there are 4"),
        ({"attn__layers": None}, "section 'attn' lacks layers"),
        ({"attn__num_heads": None}, "attention section lacks num_heads"),
        ({"attn__sink_size": 99}, r"'learned_eviction': sinks \(99\)"),
        ({"num_heads": None}, "'gated_deltanet' needs the option num_heads"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"model_type": "nsa", "num_heads": 4, "qk_norm": True}, "qk_norm = True"),
    ],
)
def test_settings_that_do_not_fit_are_named(published: Path, changes: dict[str, Any], error: str) -> None:
    change_config(published, **changes)
    with pytest.raises(ValueError, match=error):
        HybridForCausalLM.from_pretrained(published)


def test_other_formats_are_not_taken_for_published_ones() -> None:
    with pytest.raises(ValueError, match="'llama' is not a published format"):
        from_published({"model_type": "llama"})


def test_a_model_of_another_library_is_not_taken_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    refusal = rf"the model_type of {tmp_path} is 'llama', which this library cannot read; .* holdfast, .* nsa\.$"
    with pytest.raises(ValueError, match=refusal):
        HybridConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=refusal):
        HybridForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model_type of the configuration is 'llama'"):
        HybridConfig.from_dict(LlamaConfig().to_dict())
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LlamaConfig)
    capsys.readouterr()
    assert main(["info", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"holdfast: the model_type of {tmp_path} is 'llama'")
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("model_type", [{}, {"model_type": None}, {"model_type": "holdfast"}])
def test_what_may_be_this_library_s_is_read(model_type: dict[str, Any], tmp_path: Path) -> None:
    """A configuration that does not say what it is; one of a subclass; and a section among others."""

    class Mine(HybridConfig):
        model_type = "mine"

    values = {**model_type, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for kind in (HybridConfig, Mine):
        assert kind.from_pretrained(tmp_path).num_hidden_layers == kind.from_dict(values).num_hidden_layers == 4
    assert Mine.from_dict(Mine(num_hidden_layers=4).to_dict()).num_hidden_layers == 4
    whole = {"model_type": "llava", "text_config": {**values, "model_type": "holdfast"}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert HybridConfig.from_pretrained(tmp_path).num_hidden_layers == 4


def test_a_file_is_read_as_the_dictionary_in_it(tmp_path: Path) -> None:
    for name in ("lte_stream", "nsa"):
        path = GOLDEN / f"{name}.config.json"
        config = HybridConfig.from_json_file(path)
        assert config.to_dict() == HybridConfig.from_dict(json.loads(path.read_text())).to_dict()
        config.to_json_file(tmp_path / "ours.json")
        assert to_published(HybridConfig.from_json_file(tmp_path / "ours.json")) == to_published(config)
    LlamaConfig().to_json_file(tmp_path / "theirs.json")
    with pytest.raises(ValueError, match=rf"the model_type of {tmp_path / 'theirs.json'} is 'llama', which"):
        HybridConfig.from_json_file(tmp_path / "theirs.json")


def test_published_sparse_models_load(tmp_path: Path) -> None:
    """laNSA as published; and a pure model, whose settings stand beside those of the model itself."""
    tensors = load_file(GOLDEN / "nsa.safetensors")
    shutil.copyfile(GOLDEN / "nsa.config.json", tmp_path / "config.json")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = HybridForCausalLM.from_pretrained(tmp_path)
    prompt = tensors["input_ids"][:, : int(tensors["cache.prefill_len"])]
    with torch.no_grad():
        logits = model(prompt).logits
    torch.testing.assert_close(logits, tensors["cache.prefill_logits"], atol=1e-4, rtol=0)

    pure: dict[str, Any] = {"model_type": "nsa", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    pure |= {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "qkv_bias": False, "qk_norm": False}
    pure |= {"rope_theta": 500.0, "tie_word_embeddings": False}
    pure |= {"block_size": 4, "block_counts": 3, "window_size": None}
    model = HybridForCausalLM(HybridConfig.from_dict(pure)).eval()
    sparse = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "qkv_bias": False, "rope_theta": 500.0}
    sparse |= {"block_size": 4, "num_blocks": 3, "window": 512}
    assert model.config.mixers == ["native_sparse_attention"] * 2
    assert model.config.mixer_options == {"native_sparse_attention": sparse}
    model.save_pretrained(tmp_path / "ours")
    made = convert(tmp_path / "ours", tmp_path / "pure", format="published")
    written = json.loads((made / "config.json").read_text())
    del pure["qk_norm"]
    assert {key: written[key] for key in pure} == {**pure, "window_size": 512}
    ids = prompt % 50
    with torch.no_grad():
        assert torch.equal(HybridForCausalLM.from_pretrained(made)(ids).logits, model(ids).logits)


ATTENTION_0_4B = {"num_heads": 16, "num_kv_heads": 16, "head_dim": 64}
ATTENTION_1_4B = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 64}
SPARSE = {"num_heads": 32, "num_kv_heads": 2, "block_size": 64, "num_blocks": 16, "window": 512}
CONTROLLER = {"sharing": "head", "initial": 1e-9, "interval": 32, "tolerance": [0.95, 1.0]}


@pytest.mark.parametrize("size", ["0.4B", "1.4B"])
@pytest.mark.parametrize(
    ("mixers", "options"),
    [
        (["gated_deltanet"], {}),
        (["gated_deltanet", "full_attention"], {}),
        (["gated_deltanet", "sliding_attention"], {"window": 1024}),
        (["gated_deltanet", "learned_eviction"], {"window": 768, "budget": 512, "sinks": 4}),
        (["full_attention"], {}),
        (["gated_deltanet", "native_sparse_attention"], SPARSE),
        (["native_sparse_attention"], SPARSE),
    ],
    ids="+".join,
)
def test_published_configurations_survive_the_round_trip(size: str, mixers: list[str], options: dict[str, Any]) -> None:
    small = size == "0.4B"
    every = {mixers[-1]: (ATTENTION_0_4B if small else ATTENTION_1_4B) | options}
    if mixers[0] == "gated_deltanet":
        every["gated_deltanet"] = {"num_heads": 8, "head_dim": 128 if small else 256}
    config = HybridConfig(
        hidden_size=1024 if small else 2048,
        tie_word_embeddings=small,
        mixers=mixers,
        mixer_options=every,
        controller=CONTROLLER if "learned_eviction" in mixers else None,
    )
    there = json.loads(json.dumps(to_published(config)))
    assert HybridConfig(**from_published(there)).to_dict() == config.to_dict()
    assert to_published(HybridConfig.from_dict(there)) == there


@pytest.mark.parametrize("name", ["gdn", "gdn_full", "gdn_swa", "lte_mha", "lte_stream", "nsa"])
def test_what_is_written_says_what_was_read(name: str) -> None:
    """Every published setting that both have is equal; null means the default that is now spelled out."""
    published = json.loads((GOLDEN / f"{name}.config.json").read_text())
    written = to_published(HybridConfig.from_dict(published))
    pairs = [(published, written)]
    if published["attn"] is not None:
        pairs.append((published["attn"], written["attn"]))
        shared = {key for key in published["attn"] if key in written["attn"]}
        assert published["attn"].keys() - shared <= {"l1_warmup_steps", "routing_freeze_steps"}
    for before, after in pairs:
        for key in before.keys() & after.keys() - {"attn"}:
            assert before[key] is None or after[key] == before[key], key
    assert published.keys() - written.keys() <= {"fuse_norm", "fuse_swiglu", "fuse_cross_entropy"}


@pytest.mark.parametrize(
    ("mixers", "error"),
    [
        (["full_attention", "sliding_attention"], "one kind of attention per model"),
        (["learned_eviction"], "no pure 'learned_eviction' model"),
    ],
)
def test_what_the_published_format_cannot_say_is_refused(mixers: list[str], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        to_published(HybridConfig(mixers=mixers, num_hidden_layers=2))


def test_conversion_both_ways(published: Path, tmp_path: Path) -> None:
    ours = convert(published, tmp_path / "made" / "ours", format="holdfast")
    assert json.loads((ours / "config.json").read_text())["model_type"] == "holdfast"
    assert_lte_stream(HybridForCausalLM.from_pretrained(ours))
    back = convert(ours, tmp_path / "back", format="published")
    assert json.loads((back / "config.json").read_text())["model_type"] == "hybrid_gated_deltanet"
    assert_lte_stream(HybridForCausalLM.from_pretrained(back))
    before, after = load_file(published / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for folder in (ours, back):
        assert {"tokenizer.json", "special_tokens_map.json"} <= {path.name for path in folder.iterdir()}
        assert not list(folder.glob("*.bin"))


def warned(caplog: pytest.LogCaptureFixture) -> str:
    """The one warning of a conversion, or nothing."""
    messages = [record.getMessage() for record in caplog.records if record.name == "holdfast.checkpoints"]
    caplog.clear()
    assert len(messages) <= 1
    return "".join(messages)


def test_conversion_names_what_the_published_format_cannot_hold(
    published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rule = {"two_sided": True, "proportional": True, "damping": 2.0, "budget": 7, "increase": 1.25}
    model = HybridForCausalLM.from_pretrained(published, controller=rule, scale_residual_init=False)
    model.config.note = "mine"
    model.model.l1_lambda.copy_(torch.tensor([[-0.5, 0.25], [-1e-9, 0.0]]))
    model.save_pretrained(tmp_path / "ours")
    kept = convert(tmp_path / "ours", tmp_path / "kept", format="holdfast")
    assert warned(caplog) == ""
    assert HybridConfig.from_pretrained(kept).controller == HybridConfig.from_pretrained(tmp_path / "ours").controller

    made = convert(tmp_path / "ours", tmp_path / "made", format="published")
    told = warned(caplog)
    assert told.startswith(f"{made} is without what has no place in its format: ")
    lost = ["controller.budget = 7", "controller.damping = 2.0", "controller.proportional = true"]
    lost += ["controller.two_sided = true", 'note = "mine"', "scale_residual_init = false"]
    assert f": {'; '.join([*lost, 'λ below 0, now 0, of 2 of 4 heads'])}. The model computes the same; only" in told
    assert "increase" not in told
    again = HybridForCausalLM.from_pretrained(made).eval()
    assert again.config.controller is not None
    assert again.config.controller["increase"] == 1.25
    assert not {"two_sided", "proportional", "damping", "budget"} & again.config.controller.keys()
    assert again.model.l1_lambda.tolist() == [[0.0, 0.25], [0.0, 0.0]]
    ids = torch.randint(0, 97, (1, 40))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_conversion_names_what_this_library_does_not_take(
    published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for format in ("holdfast", "published"):
        convert(published, tmp_path / "made", format=format, overwrite=True)  # type: ignore[arg-type]
        assert warned(caplog) == ""  # speed, and a schedule that is switched off
    change_config(published, attn__l1_warmup_steps=100, attn__routing_freeze_steps=5, fuse_norm=False, norm_first=True)
    for format in ("holdfast", "published"):
        convert(published, tmp_path / "made", format=format, overwrite=True)  # type: ignore[arg-type]
        lost = "attn.l1_warmup_steps = 100; attn.routing_freeze_steps = 5; norm_first = true. The"
        assert f" in its format: {lost}" in warned(caplog)


def test_conversion_keeps_types_recipe_and_generation(published: Path, tmp_path: Path) -> None:
    (published / "recipe.toml").write_text("name = 'mine'")
    (published / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "max_new_tokens": 77}))
    source = published
    for index, format in enumerate(("holdfast", "published", "holdfast")):
        dtype = torch.float16 if index == 0 else None
        source = convert(source, tmp_path / str(index), format=format, dtype=dtype)  # type: ignore[arg-type]
        model = HybridForCausalLM.from_pretrained(source)
        assert model.dtype == torch.float16
        assert model.generation_config.eos_token_id == [2, 5]
        assert model.generation_config.max_new_tokens == 77
        assert (source / "recipe.toml").read_text() == "name = 'mine'"


def test_the_tokenizer_beside_a_published_configuration(published: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It loads without a word about the type of the model, which none of transformers' Auto classes knows."""
    byte_tokenizer().save_pretrained(published)
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    level = transformers_logger.level
    transformers_logger.setLevel(logging.WARNING)  # a command that ran before asks for errors only
    try:
        for model_type in PUBLISHED_TYPES:
            change_config(published, model_type=model_type)
            assert load_tokenizer(published)("abc").input_ids == [97, 98, 99]
            assert load_tokenizer(str(published)).eos_token_id == 258
        assert caplog.messages == []
        change_config(published, model_type="no model of transformers")
        load_tokenizer(published)
        assert "no model of transformers" in caplog.text  # what is of no published type is transformers' business
    finally:
        transformers_logger.setLevel(level)
        transformers_logger.removeHandler(caplog.handler)


def test_conversion_casts(published: Path, tmp_path: Path) -> None:
    made = convert(published, tmp_path / "half", format="published", dtype=torch.bfloat16)
    dtypes = {key: tensor.dtype for key, tensor in load_file(made / "model.safetensors").items()}
    assert {key for key, dtype in dtypes.items() if dtype != torch.bfloat16} == {"model.l1_lambda", "model.num_kept"}
    assert HybridForCausalLM.from_pretrained(made).dtype == torch.bfloat16


def test_conversion_refuses_an_existing_target(published: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert(published, target, format="holdfast")
    assert [path.name for path in target.iterdir()] == ["precious"]
    convert(published, target, format="holdfast", overwrite=True)
    assert not (target / "precious").exists()
    assert_lte_stream(HybridForCausalLM.from_pretrained(target))


def test_failed_conversion_leaves_nothing(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(HybridForCausalLM, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(published, tmp_path / "target", format="holdfast")
    assert sorted(tmp_path.iterdir()) == before


def test_conversion_refuses_pickles_and_unknown_formats(published: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format must be 'holdfast' or 'published', got 'gguf'"):
        convert(published, tmp_path / "target", format="gguf")  # type: ignore[arg-type]
    torch.save(load_file(published / "model.safetensors"), published / "pytorch_model.bin")
    (published / "model.safetensors").unlink()
    with pytest.raises(OSError, match="only pickled weights"):
        convert(published, tmp_path / "target", format="holdfast")
    made = convert(published, tmp_path / "target", format="holdfast", allow_pickle=True)
    assert (made / "model.safetensors").exists()
    assert_lte_stream(HybridForCausalLM.from_pretrained(made))
