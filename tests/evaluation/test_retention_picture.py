"""What a model holds at the end of a sequence, against the rule of eviction; and that the picture shows it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from holdfast import HybridConfig, HybridForCausalLM
from holdfast.data.needle import NeedleTask
from holdfast.evaluation.retention import LayerRetention, plot_kept_tokens, retention_map
from holdfast.evaluation.token_rows import COLOURS, needle_kinds
from holdfast.ops.retention import streaming_retention

WINDOW, BUDGET, SINKS = 12, 7, 2


def eviction_model(seed: int = 0, scorer_bias: float = 0.0) -> HybridForCausalLM:
    """Random scorers whose scores straddle zero."""
    torch.manual_seed(seed)
    options = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window": WINDOW, "budget": BUDGET, "sinks": SINKS}
    config = HybridConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=3,
        mixers=["learned_eviction", "gated_deltanet", "learned_eviction"],
        mixer_options={"learned_eviction": options, "gated_deltanet": {"num_heads": 2, "head_dim": 8}},
        initializer_range=0.3,
    )
    model = HybridForCausalLM(config).eval()
    for layer in model.model.eviction_layers():
        torch.nn.init.constant_(layer.router.conv_stack.proj.bias, scorer_bias)
    return model


@pytest.mark.parametrize("length", [1, 5, 13, 14, 64, 129])
def test_visible_pairs_are_those_of_the_rule(length: int) -> None:
    model = eviction_model(length)
    ids = torch.randint(40, (length,), generator=torch.Generator().manual_seed(length))
    layers = retention_map(model, ids)
    with torch.no_grad():
        whole = model(input_ids=ids[None], use_cache=False).retention.scores
    assert [layer.layer for layer in layers] == [0, 2]
    for layer, scores in zip(layers, whole, strict=True):
        until = streaming_retention(scores, BUDGET, WINDOW, SINKS)[0]
        assert torch.equal(layer.visible, until >= length - 1)
        assert layer.recent.nonzero().flatten().tolist() == list(range(max(0, length - WINDOW - 1), length))
        assert not (layer.stored & layer.recent[:, None]).any()
        assert layer.stored.sum(0).max() <= BUDGET
        final = length - 6  # half the receptive field of the scorer
        torch.testing.assert_close(layer.scores[: max(0, final)], scores[0, : max(0, final)], atol=1e-5, rtol=0)
    if length == 129:
        assert all(layer.stored.sum() > 0 for layer in layers)


def test_a_model_in_training_mode_stays_in_it_and_a_single_row_may_be_given() -> None:
    model = eviction_model().train()
    ids = torch.arange(30) % 40
    one, other = retention_map(model, ids), retention_map(model, ids[None])
    assert model.training
    assert all(torch.equal(a.stored, b.stored) for a, b in zip(one, other, strict=True))


def test_errors_say_what_to_give() -> None:
    with pytest.raises(ValueError, match="2 sequences"):
        retention_map(eviction_model(), torch.zeros(2, 9, dtype=torch.long))
    plain = HybridConfig(
        vocab_size=9,
        hidden_size=16,
        num_hidden_layers=1,
        mixers=["full_attention"],
        mixer_options={"full_attention": {"num_heads": 2}},
    )
    with pytest.raises(ValueError, match="no layer of learned eviction"):
        retention_map(HybridForCausalLM(plain), torch.zeros(5, dtype=torch.long))
    layer = LayerRetention(0, torch.zeros(3, 1), torch.zeros(3, 1).bool(), torch.ones(3).bool(), 0, 2)
    with pytest.raises(ValueError, match="layers is empty"):
        plot_kept_tokens([], [], "x.png")
    with pytest.raises(ValueError, match="2 kinds for 3 tokens"):
        plot_kept_tokens([layer], ["noise"] * 2, "x.png")
    with pytest.raises(ValueError, match="no colour for salt"):
        plot_kept_tokens([layer], ["salt"] * 3, "x.png")


def test_kinds_of_a_needle_sample() -> None:
    task = NeedleTask(length=40, num_pairs=3, num_keys=5, num_values=6, num_noise=4)
    ids = task.sample(3, 1)["input_ids"][0].tolist()
    kinds = needle_kinds(task, ids)
    words = task.describe(ids).split()
    marker = words.index("?")
    first_letter = {"k": "key", "v": "value", "·": "noise", "b": "noise"}
    assert kinds[:marker] == [first_letter[word[0]] for word in words[:marker]]
    assert kinds[marker:] == ["question"] * (40 - marker)
    assert {"key", "value", "noise"} <= set(kinds)


def share_of(image: np.ndarray, colour: str) -> float:
    rgb = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return float((np.abs(image[..., :3] - rgb).max(-1) < 0.01).mean())


def test_the_picture_fills_what_is_kept(tmp_path: Path) -> None:
    length, kinds = 100, ["key"] * 50 + ["value"] * 50
    recent = torch.arange(length) >= 90

    def picture(stored: torch.Tensor, name: str) -> np.ndarray:
        layer = LayerRetention(1, torch.zeros(length, 2), stored, recent, 2, 40)
        path = plot_kept_tokens([layer], kinds, tmp_path / "new folder" / name, title="A title")
        assert path == tmp_path / "new folder" / name
        return imread(path)

    nothing = picture(torch.zeros(length, 2, dtype=torch.bool), "nothing.png")
    stored = torch.zeros(length, 2, dtype=torch.bool)
    stored[5:45] = True
    keys = picture(stored, "keys.png")
    assert keys.shape[1] >= 1200
    assert keys.std() > 0.05
    assert share_of(keys, COLOURS["key"]) > 1.8 * share_of(nothing, COLOURS["key"]) > 0
    assert share_of(keys, COLOURS["value"]) == pytest.approx(share_of(nothing, COLOURS["value"]), rel=0.05)
    assert sorted(path.name for path in (tmp_path / "new folder").iterdir()) == ["keys.png", "nothing.png"]


def test_a_failed_picture_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "kept.nonsense"
    path.write_text("old")
    layer = LayerRetention(0, torch.zeros(3, 1), torch.ones(3, 1).bool(), torch.zeros(3).bool(), 0, 3)
    layer.recent[-1] = True
    with pytest.raises(ValueError, match="nonsense"):
        plot_kept_tokens([layer], ["noise"] * 3, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
