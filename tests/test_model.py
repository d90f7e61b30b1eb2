"""The Hugging Face face of the model: arguments, outputs, initialisation, saving, checkpointing, import."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from holdfast import HybridCache, HybridConfig, HybridForCausalLM
from holdfast.cli import main
from holdfast.files import UnreadableError

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ModelFactory = Callable[..., HybridForCausalLM]
ALL = ("gated_deltanet", "full_attention", "sliding_attention", "learned_eviction", "native_sparse_attention")


def random_ids(batch: int = 2, length: int = 30, seed: int = 0) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: HybridForCausalLM, **arguments: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    model(**arguments).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(small_model: ModelFactory, reentrant: bool) -> None:
    """The scorer's too, with its dropout and exploration drawn from the same random numbers."""
    model = small_model(*ALL, options={"learned_eviction": {"dropout": 0.3}}).train()
    model.model.l1_lambda.fill_(0.5)
    for layer in model.model.eviction_layers():
        layer.exploration = 0.3
    ids = random_ids()
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    arguments = {"inputs_embeds": model.get_input_embeddings()(ids).detach().requires_grad_(), "attention_mask": mask}
    arguments["labels"] = ids
    plain = gradients(model, **arguments)
    assert any("router" in name for name in plain)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = gradients(model, **arguments)
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_refuses_a_cache(small_model: ModelFactory) -> None:
    model = small_model().train()
    model.gradient_checkpointing_enable()
    assert model(random_ids(), use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="advance past_key_values twice"):
        model(random_ids(), past_key_values=HybridCache(model.config))


def test_logits_to_keep(small_model: ModelFactory) -> None:
    model, ids = small_model(), random_ids()
    with torch.no_grad():
        every = model(ids).logits
        assert every.shape == (2, 30, 100)
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, every[:, -3:])
        chosen = torch.tensor([2, 11])
        torch.testing.assert_close(model(ids, logits_to_keep=chosen).logits, every[:, chosen])
    with pytest.raises(ValueError, match="leave logits_to_keep at 0"):
        model(ids, labels=ids, logits_to_keep=3)


def test_inputs_embeds_and_hidden_states(small_model: ModelFactory) -> None:
    model, ids = small_model(*ALL), random_ids()
    embeddings = model.get_input_embeddings()(ids)
    with torch.no_grad():
        out = model(inputs_embeds=embeddings, output_hidden_states=True)
        assert torch.equal(out.logits, model(ids).logits)
    assert len(out.hidden_states) == len(ALL) + 1
    assert torch.equal(out.hidden_states[0], embeddings)
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert model(ids).hidden_states is None
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**wrong)


def test_hidden_states_and_scores_stay_in_the_columns_of_their_tokens(small_model: ModelFactory) -> None:
    model, ids = small_model(), random_ids(1)
    mask = torch.ones_like(ids)
    mask[0, [0, 4, 5, 29]] = 0
    real = mask[0].bool()
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        alone = model(ids[:, real], output_hidden_states=True, use_cache=False)
    for with_pads, without in zip(padded.hidden_states, alone.hidden_states, strict=True):
        torch.testing.assert_close(with_pads[:, real], without, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.retention.scores[0][:, real], alone.retention.scores[0], atol=1e-5, rtol=0)
    assert torch.equal(padded.retention.penalised[:, real], alone.retention.penalised)
    assert not padded.retention.penalised[:, ~real].any()


def test_return_dict(small_model: ModelFactory) -> None:
    model, ids = small_model(), random_ids()
    out = model(ids, labels=ids)
    parts = model(ids, labels=ids, return_dict=False)
    assert isinstance(parts, tuple)
    assert [parts[0].item(), parts[1].item()] == [out.loss.item(), out.lm_loss.item()]
    assert torch.equal(parts[3], out.logits)


def test_losses_by_their_definitions(small_model: ModelFactory) -> None:
    """Cross-entropy of the next token; mean over counted positions, layers and heads of λ·ReLU(s) or −λ·ReLU(−s)."""
    model = small_model("learned_eviction", "learned_eviction").train()
    model.model.l1_lambda.copy_(torch.tensor([[0.3, 0.0], [1.0, -2.0]]))
    with torch.no_grad():  # scores on both sides of the threshold
        model.model.eviction_layers()[1].router.conv_stack.proj.bias.zero_()
    ids = random_ids()
    labels = ids.clone()
    labels[:, :10] = -100
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits[:, 9:-1].flatten(0, 1), ids[:, 10:].flatten())
    torch.testing.assert_close(out.lm_loss, expected)
    first, second = (s[:, :-6] for s in out.retention.scores)
    per_head = [0.3 * F.relu(first[..., 0]), 0 * first[..., 1], F.relu(second[..., 0]), 2 * F.relu(-second[..., 1])]
    penalty = torch.stack(per_head).mean()
    assert (second[..., 1] < 0).any()
    torch.testing.assert_close(out.retention_loss, penalty)
    torch.testing.assert_close(out.loss, expected + penalty)
    assert out.past_key_values is None


def test_a_batch_without_targets_has_zero_loss(small_model: ModelFactory) -> None:
    model, ids = small_model(), random_ids(2, 3)
    out = model(ids, labels=torch.full_like(ids, -100))
    out.loss.backward()
    assert out.loss == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"output_attentions": True}, "no attention matrix is ever formed"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask must be \[B, T\]"),
        ({"attention_mask": torch.ones(2, 1, 30, 30)}, r"attention_mask must be \[B, T\]"),
        ({"cu_seqlens": torch.tensor([0, 30])}, "a batch of one row"),
    ],
)
def test_arguments_that_do_not_fit_are_named(small_model: ModelFactory, arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        small_model()(random_ids(), **arguments)


@pytest.mark.parametrize(
    ("offsets", "error"),
    [
        ([0, 20], "rise from 0 to the length 30"),
        ([0, 20, 10, 30], "rise from 0"),
        ([5, 30], "rise"),
        ([0], "1-D tensor"),
    ],
)
def test_wrong_offsets_are_refused(small_model: ModelFactory, offsets: list[int], error: str) -> None:
    model, ids = small_model(), random_ids(1)
    with pytest.raises(ValueError, match=error):
        model(ids, cu_seqlens=torch.tensor(offsets))
    packed = torch.tensor([0, 30])
    with pytest.raises(ValueError, match="exclude each other"):
        model(ids, cu_seqlens=packed, attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="cannot be combined with past_key_values"):
        model(ids, cu_seqlens=packed, past_key_values=HybridCache(model.config))


def test_initialisation_has_the_statistics_of_the_paper() -> None:
    """From the meta device, as sharded training makes models: nothing uninitialised, nothing left at a default."""
    options = {"gated_deltanet": {"num_heads": 64, "head_dim": 4}, "learned_eviction": {"num_heads": 4, "head_dim": 64}}
    torch.manual_seed(0)
    with torch.device("meta"):
        model = HybridForCausalLM(
            HybridConfig(hidden_size=256, num_hidden_layers=2, vocab_size=500, mixer_options=options)
        )
    model.to_empty(device="cpu")
    model.init_weights()
    model.tie_weights()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    linear, eviction = (block.attn for block in model.model.layers)
    decay, step = linear.A_log.exp(), F.softplus(linear.dt_bias)
    assert 0 < decay.min() < 2 < 14 < decay.max() < 16
    assert abs(decay.mean() - 8) < 2  # uniform in (0, 16)
    assert 9e-4 < step.min() < 3e-3 < 3e-2 < step.max() < 0.101
    assert abs(step.log().mean() - math.log(1e-2)) < 0.5  # log-uniform in (0.001, 0.1)
    for weight, std in (
        (model.model.embeddings.weight, 0.006),
        (linear.q_proj.weight, 0.006),
        (linear.o_proj.weight, 0.006 / 2),  # √(2 · 2 layers)
        (model.model.layers[1].mlp.down_proj.weight, 0.006 / 2),
        (model.model.layers[1].mlp.up_proj.weight, 0.006),
        (eviction.router.conv_stack.convs[0].weight, math.sqrt(2 / (3 * 128))),
        (eviction.router.conv_stack.proj.weight, math.sqrt(2 / 16)),
    ):
        assert abs(weight.std() / std - 1) < 0.2
    assert (eviction.router.conv_stack.proj.bias == 0.5).all()
    assert all((conv.bias == 0).all() for conv in eviction.router.conv_stack.convs)
    for norm in (model.model.norm, model.model.layers[0].attn_norm, linear.o_norm):
        assert (norm.weight == 1).all()
    assert (model.model.l1_lambda == 0).all()
    assert (model.model.num_kept == 0).all()


def test_a_fresh_scorer_keeps_nearly_everything() -> None:
    torch.manual_seed(0)
    model = HybridForCausalLM(HybridConfig(hidden_size=64, num_hidden_layers=2, vocab_size=50, mixer_options={
        "gated_deltanet": {"num_heads": 2, "head_dim": 16}, "learned_eviction": {"num_heads": 2}}))  # fmt: skip
    assert all((s > 0).all() for s in model(random_ids()).retention.scores)


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"\xff" * len(content)])
def test_a_damaged_file_of_weights_is_named(
    small_model: ModelFactory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[bytes], bytes],
) -> None:
    small_model().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    whole, damaged, *_ = sorted((tmp_path / "model").glob("*.safetensors"))
    damaged.write_bytes(damage(damaged.read_bytes()))
    with pytest.raises(UnreadableError, match=rf"{damaged.name} cannot be read \(.+\); copy or download") as error:
        HybridForCausalLM.from_pretrained(tmp_path / "model")
    assert whole.name not in str(error.value)
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "published"]) == 1
    assert f"holdfast: {damaged} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_saving_and_loading_is_exact(small_model: ModelFactory, tmp_path: Path, tied: bool, shard: str) -> None:
    model = small_model(*ALL, tie_word_embeddings=tied)
    model.model.l1_lambda.uniform_()
    model.model.num_kept.uniform_()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    for load in (HybridForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        again = load(tmp_path)
        assert type(again) is HybridForCausalLM
        assert not again.training
        assert (again.lm_head.weight is again.model.embeddings.weight) == tied
        before, after = model.state_dict(), again.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lambda_stays_fp32_in_half_precision_models(
    small_model: ModelFactory, tmp_path: Path, dtype: torch.dtype
) -> None:
    """λ begins at 1e-9, which is 0 in fp16."""
    model = small_model()
    model.model.l1_lambda.fill_(1e-9)
    model.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert again.lm_head.weight.dtype == dtype
    assert torch.equal(again.model.l1_lambda, model.model.l1_lambda)
    assert again.model.num_kept.dtype == torch.float32


def test_copies_are_independent(small_model: ModelFactory, tmp_path: Path) -> None:
    model, ids = small_model(*ALL), random_ids()
    expected = model(ids).logits.detach()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, expected)
    twin.model.embeddings.weight.data.zero_()
    assert torch.equal(model(ids).logits, expected)
    with torch.no_grad():
        cache = model(ids).past_key_values
        other = copy.deepcopy(cache)
        model(ids, past_key_values=cache)
    assert (cache.get_seq_length(), other.get_seq_length()) == (60, 30)


def test_configurations_pickle(small_config: Callable[..., HybridConfig], tmp_path: Path) -> None:
    config = small_config(*ALL)
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    torch.save(config, tmp_path / "config.pt")
    assert torch.load(tmp_path / "config.pt", weights_only=False).to_dict() == config.to_dict()
    assert HybridConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_defaults_are_the_published_small_model() -> None:
    config = HybridConfig()
    assert config.mixers == ["gated_deltanet", "learned_eviction"] * 12
    assert config.options_for("learned_eviction").receptive_field == 13
    assert config.intermediate_size == 2816
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    assert 0.35e9 < model.num_parameters() < 0.45e9


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"mixers": ["mamba"]}, "no mixer is named mamba; there are gated_deltanet"),
        ({"num_hidden_layers": 3}, "2 entries, which do not divide 3 layers"),
        ({"mixer_options": {"full_attention": {}}}, "full_attention, which no layer uses"),
        ({"mixer_options": {"gated_deltanet": {"heads": 3}}}, "'gated_deltanet' has no option heads; it knows"),
        ({"mixer_options": {"gated_deltanet": {"head_dim": 3}}}, "'gated_deltanet' needs the option num_heads"),
        ({"mixer_options": {"learned_eviction": {"num_heads": 3}}}, "3 heads do not divide hidden_size 1024"),
        ({"mixer_options": {"learned_eviction": {"num_heads": 4, "window": 4}}}, r"window \(4\) is shorter"),
        ({"mixer_options": {"learned_eviction": {"num_heads": 4, "conv_size": [2, 2, 2]}}}, "must be odd"),
        ({"mixer_options": {"learned_eviction": {"num_heads": 4, "num_kv_heads": 3}}}, "multiple of num_kv_heads"),
        ({"mixer_options": {"learned_eviction": {"num_heads": 4, "sinks": 9, "budget": 8}}}, r"sinks \(9\) must lie"),
    ],
)  # fmt: skip
def test_configuration_errors_name_the_culprit(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        HybridConfig(**arguments)


def test_import_needs_neither_triton_nor_fla_and_is_quick() -> None:
    """Less than 3 s of processor time beyond torch and transformers."""
    script = """
import sys, time
for name in ("triton", "fla"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
start = time.process_time()
import holdfast
elapsed = time.process_time() - start
config = holdfast.HybridConfig(num_hidden_layers=2, hidden_size=32, vocab_size=9, mixer_options={
    "gated_deltanet": {"num_heads": 2, "head_dim": 8}, "learned_eviction": {"num_heads": 2, "budget": 5, "window": 6}})
model = holdfast.HybridForCausalLM(config).eval()
with torch.no_grad():
    assert model(torch.zeros(1, 40, dtype=torch.long)).logits.isfinite().all()
assert "datasets" not in sys.modules and "matplotlib" not in sys.modules
print(elapsed)
"""
    environment = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 3
