"""RULER's tasks put to models that know the answers, know some, or know none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from listener import Listener

from holdfast import HybridForCausalLM
from holdfast.data.ruler import RULER_TASKS, Essays, RulerSampler
from holdfast.data.text import byte_tokenizer
from holdfast.evaluation.conversation import Conversation
from holdfast.evaluation.inference import evaluating
from holdfast.evaluation.intervals import Share
from holdfast.evaluation.ruler import (
    RulerCell,
    RulerResult,
    RulerSettings,
    evaluate_ruler,
    found_answers,
    plot_ruler,
)
from holdfast.evaluation.sample_log import SampleLog

ESSAYS = Essays(["The sea is wide. Ships cross it, and some are lost. Nobody counts them. " * 3])
SETTINGS = RulerSettings(lengths=(700, 1000), depths=(0, 50, 100), samples=2, new_tokens=60)


def evaluate(model: Listener, settings: RulerSettings = SETTINGS, **options: object):
    return evaluate_ruler(model, model.tokenizer, settings, progress=False, **options)


def test_who_knows_all_finds_all() -> None:
    settings = dataclasses.replace(
        SETTINGS, tasks=tuple(RULER_TASKS), lengths=(1200,), depths=(30,), essays=ESSAYS, new_tokens=170
    )
    model = Listener().train()
    result = evaluate(model, settings)
    assert [cell.task for cell in result.cells] == list(RULER_TASKS)
    assert all((cell.match_all.accuracy, cell.match_all.count) == (1, 2) for cell in result.cells)
    assert all((cell.match_part.accuracy, cell.match_part.count) == (1, 2) for cell in result.cells)
    assert all(share.accuracy == 1 for cell in result.cells for share in cell.by_depth.values())
    assert model.training  # put back as it was


def test_who_knows_the_end_finds_needles_there() -> None:
    for cell in evaluate(Listener(reach=300)).cells:
        assert [share.accuracy for share in cell.by_depth.values()] == [0, 0, 1]
        assert (cell.match_all.count, cell.match_all.correct) == (6, 2)
        assert cell.length - 60 - 120 < cell.tokens <= cell.length - 60


def test_part_and_all() -> None:
    """One of four values said: a quarter of them, but every sample has one."""
    settings = dataclasses.replace(
        SETTINGS, tasks=("niah_multivalue",), lengths=(1100,), essays=ESSAYS, depths=(0, 100)
    )
    (cell,) = evaluate(Listener(garble=lambda text: text.split(",")[0]), settings).cells
    assert cell.match_all.accuracy == 0.25
    assert cell.match_part.accuracy == 1
    assert {depth: share.count for depth, share in cell.by_depth.items()} == {0: 2, 100: 2}
    low, high = cell.match_all.interval
    assert low < 0.25 < high
    assert high - low > 0.5  # four samples, not sixteen independent answers


def test_by_depth_counts_the_needle_that_was_placed_there() -> None:
    """The three others of a sample lie anywhere, and whether they are found says nothing of the depth asked for."""
    settings = dataclasses.replace(
        SETTINGS, tasks=("niah_multiquery", "niah_multivalue"), lengths=(1400,), essays=ESSAYS, samples=3, new_tokens=90
    )
    for cell in evaluate(Listener(reach=450), settings).cells:
        assert [share.count for share in cell.by_depth.values()] == [3, 3, 3]
        assert [share.accuracy for share in cell.by_depth.values()] == [0, 0, 1]
        assert 0 < cell.match_all.accuracy < 1


def test_answers_are_cleaned_and_compared_without_case() -> None:
    assert found_answers(" 12, AB-c\x00d\n", ["12", "ab-C", "13"]) == [True, True, False]
    assert found_answers("", ["1"]) == [False]


def test_the_result_does_not_depend_on_the_batch_size() -> None:
    results = [evaluate(Listener(reach=450), batch_size=size) for size in (1, 4, 50)]
    assert results[0] == results[1] == results[2]
    assert evaluate(Listener(reach=450), dataclasses.replace(SETTINGS, seed=1)) != results[0]


def test_an_interrupted_run_goes_on_and_more_samples_are_only_added(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    model = Listener(reach=450)
    whole = evaluate(model)
    needed = len(model.calls)
    model.calls.clear()

    class Stopped(SampleLog):
        def append(self, records) -> None:
            if self.records:
                raise KeyboardInterrupt
            super().append(records)

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, log=Stopped(path, {}), batch_size=4)
    assert len(SampleLog(path, {}).records) == 4
    model.calls.clear()
    resumed = evaluate(model, log=SampleLog(path, {}), batch_size=4)
    assert (resumed.cells, resumed.resumed) == (whole.cells, 4)
    assert 0 < len(model.calls) < needed
    model.calls.clear()
    assert evaluate(model, log=SampleLog(path, {})).resumed == 12
    assert model.calls == []
    more = evaluate(model, dataclasses.replace(SETTINGS, samples=3), log=SampleLog(path, {}))
    assert more.resumed == 12
    assert more.cells == evaluate(model, dataclasses.replace(SETTINGS, samples=3)).cells


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("niah",)}, "there is no task 'niah' "),
        ({"tasks": ("niah_single_2",)}, "niah_single_2 hides needles in essays; give text files"),
        ({"depths": ()}, "at least one task, one length and one depth"),
        ({"depths": (-1,)}, "give 0 to 100 percent"),
        ({"depths": (0, 50, 50)}, "depths have 50 twice, and its samples would count twice"),
        ({"lengths": (700, 700)}, "lengths have 700 twice"),
        ({"samples": 0}, "must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_what_does_not_fit_is_refused_before_anything_is_asked() -> None:
    model = Listener(max_position_embeddings=999)
    with pytest.raises(ValueError, match=r"1,000 tokens are more than the 999 .*max_position_embeddings.*--beyond"):
        evaluate(model)
    small = Listener(vocab_size=104)
    with pytest.raises(ValueError, match="'h' is token 104 of the tokenizer, and the model knows tokens up to 103"):
        evaluate(small)
    tight = dataclasses.replace(SETTINGS, lengths=(900, 350))
    with pytest.raises(ValueError, match="more than the length of 350"):
        evaluate(model, tight)
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate(model, batch_size=0)
    ascii_only = Listener(vocab_size=128)
    foreign = dataclasses.replace(SETTINGS, tasks=("niah_single_2",), essays=Essays(["Käse " * 300]))
    with pytest.raises(ValueError, match="is token 195 of the tokenizer, and the model knows tokens up to 127"):
        evaluate(ascii_only, foreign)
    assert model.calls == small.calls == ascii_only.calls == []
    assert evaluate(model, beyond=True).cells[0].match_all.accuracy == 1


def test_lm_eval_gives_the_same_answers_and_scores_to_the_same_samples(
    small_model: Callable[..., HybridForCausalLM], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'holdfast[eval]'")
    from lm_eval.api.instance import Instance
    from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

    from holdfast.evaluation.harness import HoldfastLM

    model = small_model("gated_deltanet", "learned_eviction", vocab_size=259)
    model.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    harness = HoldfastLM(pretrained=str(tmp_path), batch_size=3, device="cpu", dtype="float32")
    sampler = RulerSampler(RULER_TASKS["niah_multivalue"], tokenizer, 900, essays=ESSAYS, new_tokens=12)
    samples = [sampler.sample(depth, 0) for depth in (0, 50, 90)]
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (f"{s.text} {s.prefix}", dict(settings)), i) for i, s in enumerate(samples)
    ]
    theirs = harness.generate_until(requests, disable_tqdm=True)
    with evaluating(model):
        talk = Conversation(model)
        talk.read([sample.ids for sample in samples])
        ours = tokenizer.batch_decode(talk.answer(12, {tokenizer.eos_token_id}), skip_special_tokens=True)
    assert ours == theirs
    assert len(set(ours)) > 1
    answers = list(samples[0].answers)
    for said in (*theirs, f" {answers[0].upper()}, {answers[2]}\x01", ", ".join(answers)):
        assert np.mean(found_answers(said, answers)) == string_match_all(postprocess_pred([said]), [answers])


def test_plot(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, tasks=("niah_single_1", "niah_multikey_2"))
    results = {"near": evaluate(Listener(reach=300), settings), "all": evaluate(Listener(), settings)}
    assert (
        json.loads(json.dumps(results["near"].to_dict(), allow_nan=False))["cells"][0]["by_depth"][2]["accuracy"] == 1
    )
    picture = matplotlib.image.imread(plot_ruler(results, tmp_path / "map.png"))
    colours = {tuple(colour) for colour in (picture[:, :, :3] * 255).round().astype(int).reshape(-1, 3)}
    assert {(68, 1, 84), (253, 231, 37)} <= colours  # the ends of the scale: nothing and everything found
    with pytest.raises(ValueError, match="at least one result"):
        plot_ruler({}, tmp_path / "none.png")


def test_every_depth_has_room_for_its_label(tmp_path: Path) -> None:
    share = Share(1, 1.0)
    for depths in (3, 40):
        cell = RulerCell("niah_single_1", 700, share, share, {float(depth): share for depth in range(depths)}, 700.0)
        picture = matplotlib.image.imread(plot_ruler({"near": RulerResult((cell,), 0)}, tmp_path / "map.png"))
        red, _, blue = (picture[:, :, channel] for channel in range(3))
        assert ((red > 0.98) & (blue < 0.2)).any(1).sum() > 22 * depths  # rows of yellow pixels, 160 to an inch
