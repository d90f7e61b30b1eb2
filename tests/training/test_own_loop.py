"""Learned eviction in a model and a training loop of one's own: the code of docs/training.md runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from holdfast.mixers import LearnedEviction, LearnedEvictionOptions, RetentionPenalty, TokenLayout

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
OPTIONS = LearnedEvictionOptions(num_heads=4, num_kv_heads=2, head_dim=8, window=8, budget=4, sinks=1, dropout=0.0)


def code_of(section: str) -> str:
    """The Python blocks of a section of the page, one after the other."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert text is not None, f"no section {section!r}"
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text[1], re.M | re.S))


def test_the_page_trains_a_model_of_ones_own():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(100, (4, 96), generator=generator) for _ in range(200)]
    names: dict = {"batches": batches}
    exec(compile(code_of("In a model and a loop of your own"), str(PAGE), "exec"), names)
    model, controller, budget = names["model"], names["controller"], names["budget"]
    assert controller.steps == len(batches)
    assert controller.penalty.shape == (2, 2)
    assert {"penalty.l1_lambda", "penalty.num_kept"} <= model.state_dict().keys()
    assert (controller.penalty > 0).all()
    # Everything was kept at first (84 of 96 tokens and more); 200 steps bring every head to its budget or near.
    assert (controller.average_kept < 2 * budget).all()


def test_the_page_trains_with_a_trainer(small_model, tmp_path):
    ids = torch.randint(100, (8, 48))
    dataset = [{"input_ids": row, "labels": row.clone()} for row in ids]
    names: dict = {"model": small_model("learned_eviction"), "folder": str(tmp_path), "dataset": dataset}
    exec(compile(code_of("With a Trainer"), str(PAGE), "exec"), names)
    assert names["trainer"].state.global_step == 20
    assert names["trainer"].retention is names["retention"]
    assert names["retention"].controller.steps == 18  # from a tenth of the run on


def test_penalty_and_counts_are_those_of_the_hybrid_model(small_model):
    model = small_model("learned_eviction", "gated_deltanet", "learned_eviction").train()
    model.model.l1_lambda.copy_(torch.rand(2, 2, generator=torch.Generator().manual_seed(0)))
    ids = torch.randint(0, 100, (3, 41), generator=torch.Generator().manual_seed(1))
    penalty = RetentionPenalty(model)
    penalty.l1_lambda.copy_(model.model.l1_lambda)
    output = model(ids, labels=ids)
    loss = penalty(output.retention.scores, TokenLayout.whole(3, 41))
    torch.testing.assert_close(loss, output.retention_loss)
    assert torch.equal(penalty.kept, output.retention.kept)


def test_a_mixer_starts_with_the_published_scorer():
    torch.manual_seed(0)
    mixers = [LearnedEviction(32, 1e-5, OPTIONS) for _ in range(2)]
    for mixer in mixers:
        assert (mixer.router.conv_stack.proj.bias == 0.5).all()
        assert all((conv.bias == 0).all() for conv in mixer.router.conv_stack.convs)
    first, second = (mixer.router.conv_stack.convs[0].weight for mixer in mixers)
    assert abs(first.std() / (2 / (3 * 16)) ** 0.5 - 1) < 0.2
    assert not torch.equal(first, second)


def test_a_whole_layout_is_what_the_model_makes(small_model):
    mixer = small_model("learned_eviction").model.layers[0].attn
    hidden = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(2))
    layout = TokenLayout.whole(2, 30)
    assert layout.positions.tolist() == [list(range(30))] * 2
    assert layout.seen.tolist() == [0, 0]
    alone = mixer(hidden[1:], TokenLayout.whole(1, 30)).hidden
    torch.testing.assert_close(mixer(hidden, layout).hidden[1:], alone)


def test_layers_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match=r"one number of KV heads, got \[\]"):
        RetentionPenalty(nn.Linear(2, 2))
    other = LearnedEvictionOptions(num_heads=4, num_kv_heads=4, head_dim=8, window=8, budget=4, sinks=1)
    with pytest.raises(ValueError, match=r"got \[2, 4\]"):
        RetentionPenalty(nn.ModuleList([LearnedEviction(32, 1e-5, OPTIONS), LearnedEviction(32, 1e-5, other)]))


def test_layers_of_ones_own_share_a_scorer():
    options = LearnedEvictionOptions(
        num_heads=4, num_kv_heads=2, head_dim=8, window=8, budget=4, sinks=1, dropout=0.0, scorer_sharing="all"
    )
    torch.manual_seed(0)
    model = nn.Module()
    model.router = options.build_scorer()
    model.layers = nn.ModuleList(LearnedEviction(32, 1e-5, options) for _ in range(2))
    for layer in model.layers:
        layer.use_scorer(model.router)
    assert (model.router.conv_stack.proj.bias == 0.5).all()  # the published start
    assert [name for name in model.state_dict() if "router" in name] == [
        name for name in model.state_dict() if name.startswith("router.")
    ]
    hidden, layout = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(2)), TokenLayout.whole(2, 30)
    scores = [layer(hidden, layout).scores for layer in model.layers]
    RetentionPenalty(model)(scores, layout)
    torch.stack(scores).sum().backward()
    assert all(parameter.grad is not None for parameter in model.router.parameters())
