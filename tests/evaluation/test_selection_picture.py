"""Which blocks the last token reads, against what the model says of every token; and that the picture shows it."""

from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from holdfast import HybridConfig, HybridForCausalLM
from holdfast.evaluation.selection import LayerSelection, plot_selected_blocks, selection_map
from holdfast.evaluation.token_rows import COLOURS

SIZE, COUNT, WINDOW = 4, 5, 6


def sparse_model(*mixers: str) -> HybridForCausalLM:
    torch.manual_seed(0)
    sparse = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    sparse |= {"block_size": SIZE, "num_blocks": COUNT, "window": WINDOW}
    options = {"native_sparse_attention": sparse, "gated_deltanet": {"num_heads": 2, "head_dim": 8}}
    config = HybridConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=len(mixers),
        mixers=list(mixers),
        mixer_options={name: options[name] for name in set(mixers)},
        initializer_range=0.3,
    )
    return HybridForCausalLM(config)


@pytest.mark.parametrize("length", [1, 4, 21, 70])
def test_what_the_last_token_reads(length: int) -> None:
    model = sparse_model("native_sparse_attention", "gated_deltanet", "native_sparse_attention").train()
    ids = torch.randint(40, (length,), generator=torch.Generator().manual_seed(length))
    layers = selection_map(model, ids)
    assert model.training
    assert [layer.layer for layer in layers] == [0, 2]
    with torch.no_grad():
        whole = model(ids[None], output_selection=True).selection
    current = (length - 1) // SIZE
    for layer, blocks in zip(layers, whole, strict=True):
        assert torch.equal(layer.blocks, blocks[0, -1])
        assert layer.recent.nonzero().flatten().tolist() == list(range(max(0, length - WINDOW), length))
        for head in range(2):
            chosen = [block for block in layer.blocks[head].tolist() if block >= 0]
            assert len(chosen) == min(COUNT, current + 1)
            assert {0, current, max(0, current - 1)} <= set(chosen)
            tokens = [token for token in range(length) if token // SIZE in chosen]
            assert layer.selected[:, head].nonzero().flatten().tolist() == tokens


def test_errors_say_what_to_give() -> None:
    with pytest.raises(ValueError, match="2 sequences"):
        selection_map(sparse_model("native_sparse_attention"), torch.zeros(2, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="no layer of native sparse attention"):
        selection_map(sparse_model("gated_deltanet"), torch.zeros(9, dtype=torch.long))
    with pytest.raises(ValueError, match="layers is empty"):
        plot_selected_blocks([], [], "x.png")


def test_the_picture_fills_what_is_read(tmp_path: Path) -> None:
    length, kinds = 100, ["key"] * 48 + ["value"] * 52
    recent = torch.arange(length) >= 90
    shares = []
    for blocks in ([24], [0, 5, 24]):
        selected = torch.isin(torch.arange(length) // SIZE, torch.tensor(blocks))
        chosen = torch.tensor([[*blocks, *[-1] * (COUNT - len(blocks))]])
        layer = LayerSelection(1, chosen, selected[:, None], recent, SIZE)
        image = imread(plot_selected_blocks([layer], kinds, tmp_path / "read.png", title="A title"))
        rgb = torch.tensor([int(COLOURS["key"][at : at + 2], 16) / 255 for at in (1, 3, 5)])
        shares.append(float(((torch.tensor(image[..., :3]) - rgb).abs().amax(-1) < 0.01).float().mean()))
    assert shares[1] > 1.1 * shares[0] > 0
