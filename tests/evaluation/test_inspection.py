"""The page of `holdfast inspect`: its data agree with the cache, and a browser shows them."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import HybridCache, HybridForCausalLM
from holdfast.cli import main
from holdfast.data.text import byte_tokenizer
from holdfast.evaluation.inspection import InspectedEviction, inspect_sequence, write_inspection

HOSTILE = "</script><b onclick=alert(1)>&amp; it was \u2028"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.mark.parametrize("steps", [1, 7, 29, 60])
def test_what_is_held_is_what_the_cache_holds(small_model: Callable[..., HybridForCausalLM], steps: int) -> None:
    model = small_model("gated_deltanet", "learned_eviction")
    ids = torch.randperm(100, generator=torch.Generator().manual_seed(1))[:61]
    (layer,) = inspect_sequence(model, ids)
    assert isinstance(layer, InspectedEviction)
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(ids[None, :steps], past_key_values=cache)
    for positions, until in zip(cache.layers[1].positions[0].tolist(), layer.until, strict=True):
        held = [j for j in range(steps - 1 - layer.window) if until[j] >= steps - 1]
        assert {j for j in positions if j >= 0} == set(held)


def test_selected_blocks_are_those_of_the_output(small_model: Callable[..., HybridForCausalLM]) -> None:
    model = small_model("native_sparse_attention")
    ids = torch.randint(100, (1, 25), generator=torch.Generator().manual_seed(2))
    (layer,) = inspect_sequence(model, ids)
    with torch.no_grad():
        (expected,) = model(ids, output_selection=True).selection
    assert layer.blocks[1][24] == [b for b in expected[0, 24, 1].tolist() if b >= 0]
    assert len(layer.blocks) == 2


def test_what_cannot_be_inspected_is_named(small_model: Callable[..., HybridForCausalLM], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither evicts nor selects"):
        inspect_sequence(small_model("gated_deltanet"), torch.tensor([1, 2]))
    model = small_model("learned_eviction")
    with pytest.raises(ValueError, match="empty"):
        inspect_sequence(model, torch.empty(0, dtype=torch.long))
    with pytest.raises(ValueError, match="1 texts for 2 tokens"):
        write_inspection(inspect_sequence(model, torch.tensor([1, 2])), ["a"], tmp_path / "page.html", title="t")
    assert not (tmp_path / "page.html").exists()


@pytest.fixture
def checkpoint(small_model: Callable[..., HybridForCausalLM], tmp_path: Path) -> Path:
    folder = tmp_path / "a<b>"
    small_model("learned_eviction", "native_sparse_attention", vocab_size=259).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_that_chooses_nothing_is_refused_before_its_weights_are_read(
    small_model: Callable[..., HybridForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_model("gated_deltanet", "full_attention").config.save_pretrained(tmp_path / "m")
    assert main(["inspect", str(tmp_path / "m"), "Hello"]) == 2
    error = capsys.readouterr().err
    assert "neither evicts nor selects, its layers are full_attention and gated_deltanet; give" in error
    assert error.count("\n") == 1
    assert main(["inspect", "--help"]) == 0
    assert "it is refused, exit status 2" in " ".join(capsys.readouterr().out.split())


def test_the_command_escapes_what_the_prompt_contains(checkpoint: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["inspect", str(checkpoint), HOSTILE, "--output", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "a&lt;b&gt;" in text
    assert "<b " not in text
    assert "<b>" not in text
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert not set("<>&\u2028") & set(data[1])
    shown = "".join(json.loads(data[1])["tokens"])
    assert HOSTILE[:-1] in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one thing to read"),
        (["a", "--needle"], "one thing"),
        (["--file", "nowhere.txt"], "nowhere.txt"),
        ([""], "empty"),
    ],
)
def test_wrong_calls_are_one_clear_line(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "page.html")]
    assert main(["inspect", str(checkpoint), *arguments, *output]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_is_refused_before_the_model_is_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("holdfast.cli.inspect.read_model", lambda *_: pytest.fail("the model was read"))
    assert main(["inspect", str(checkpoint), "a", "--output", str(tmp_path)]) == 2
    assert f"--output is {tmp_path}, which is a directory; give a file." in " ".join(capsys.readouterr().err.split())


def test_no_more_is_read_than_a_page_or_the_model_can_take(
    small_model: Callable[..., HybridForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_model("learned_eviction", vocab_size=259, max_position_embeddings=20).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    page = tmp_path / "page.html"
    argv = ["inspect", str(tmp_path / "m"), "It was the best of times.", "--output", str(page)]
    assert main(argv) == 0
    assert "Of 25 tokens the first 20 are read" in capsys.readouterr().out
    assert main([*argv, "--max-tokens", "24"]) == 0
    shown = capsys.readouterr().out
    assert "the first 24 are read" in shown
    assert "24 tokens are more than the 20" in " ".join(shown.split())
    for count in ("0", "65537"):
        assert main([*argv, "--max-tokens", count]) == 2
        assert "give 1 to 65,536" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_a_long_page_is_drawn(tmp_path: Path) -> None:
    """Functions of JavaScript take some 100,000 arguments at most."""
    assert CHROMIUM is not None
    count = 150_000
    layer = InspectedEviction(0, [[float(n % 7) for n in range(count)]], [[count] * count], count, 5, 0)
    page = write_inspection([layer], ["a"] * count, tmp_path / "page.html", title="long")
    shown = subprocess.run(
        [CHROMIUM, "--headless", *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert "step 150000 of 150000" in shown.stdout
    assert "retention score 0.000" in shown.stdout
    assert " 6.000</p>" in shown.stdout


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield opened
        opened.close()


def test_a_browser_shows_it(browser: Any, checkpoint: Path, tmp_path: Path) -> None:
    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    assert main(["inspect", str(checkpoint), HOSTILE, "--output", str(file)]) == 0
    page, faults = browser.new_page(), []
    page.on("pageerror", lambda error: faults.append(error))
    page.on("dialog", lambda dialog: faults.append(dialog))
    page.on("request", lambda request: None if request.url.startswith("file:") else faults.append(request.url))
    page.goto(file.as_uri())
    tokens = page.locator("#tokens span")
    assert "".join(tokens.all_inner_texts()[:9]) == HOSTILE[:9]
    page.locator("#step").fill("20")
    assert "step 21 of" in page.locator("#status").inner_text()
    assert "of 5 slots" in page.locator("#status").inner_text()
    tokens.nth(2).click()
    assert 'token 3: "s"' in page.locator("#detail").inner_text()
    before = page.locator("#tokens .window").count()
    assert before == 7  # six past tokens and the current one
    page.locator("#layer").select_option("1")
    assert "blocks of 3" in page.locator("#status").inner_text()
    page.screenshot(path=picture)
    assert picture.stat().st_size > 5_000
    assert faults == []


def test_keys_reach_every_token(browser: Any, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    assert main(["inspect", str(checkpoint), "It was the best of times.", "--output", str(file)]) == 0
    page = browser.new_page()
    page.goto(file.as_uri())
    focused, detail = page.locator("#tokens span:focus-visible"), page.locator("#detail")
    assert page.locator("#tokens span[tabindex='0']").count() == 1
    page.locator("#step").focus()
    page.keyboard.press("Tab")
    assert focused.get_attribute("title") == "token 1"
    assert focused.evaluate("token => getComputedStyle(token).outlineWidth") == "3px"
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert focused.get_attribute("title") == "token 3"
    assert detail.inner_text().startswith("Click a token, or ")  # to move is not to pick
    page.keyboard.press("Enter")
    assert detail.inner_text().startswith('token 3: " "')
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")  # there is none
    page.keyboard.press("Space")
    assert detail.inner_text().startswith('token 25: "."')
    assert page.locator("#tokens [aria-pressed='true']").get_attribute("title") == "token 25"
    assert page.locator("#tokens [aria-current]").get_attribute("title") == "token 25"
    page.locator("#step").fill("9")  # the focus would be on a token that is hidden now
    page.locator("#step").focus()
    page.keyboard.press("Tab")
    assert focused.get_attribute("title") == "token 10"
    page.keyboard.press("Tab")
    assert focused.count() == 0  # one stop for all of them


def test_the_curve_is_named_for_what_it_shows(browser: Any, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    assert main(["inspect", str(checkpoint), "It was the best of times.", "--output", str(file)]) == 0
    page = browser.new_page()
    page.goto(file.as_uri())
    curve = page.locator("#fill")
    assert curve.get_attribute("aria-label") == "tokens held outside the window, by step"
    page.locator("#layer").select_option("1")
    assert curve.get_attribute("aria-label") == "blocks read in full, by step"
