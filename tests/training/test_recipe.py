"""Recipes: those that come with the package, overriding, and errors that name the file and the key."""

import dataclasses
from pathlib import Path

import pytest
import tyro

from holdfast.settings import from_mapping, to_toml
from holdfast.training import SettingsError, list_recipes, load_recipe
from holdfast.training.overrides import override
from holdfast.training.recipe import NeedleData, Recipe, TextData

MINIMAL = """
[model]
vocab_size = 83
hidden_size = 64
num_hidden_layers = 2
mixers = ["gated_deltanet"]
[model.mixer_options.gated_deltanet]
num_heads = 4
head_dim = 16
[data]
kind = "needle"
[training]
max_steps = 10
"""


def write(folder: Path, text: str, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_loads_and_builds_its_configuration(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    config = recipe.build_config()
    assert set(config.mixer_options) <= set(recipe.model["mixer_options"])
    if isinstance(recipe.data, NeedleData):
        assert recipe.data.task.vocab_size == config.vocab_size
        assert recipe.data.task.length == config.max_position_embeddings
        task = recipe.data.task
        assert not recipe.data.curriculum or recipe.data.curriculum[-1][1:] == (task.num_pairs, task.length)
    else:
        assert recipe.data.length == config.max_position_embeddings


def test_published_sizes_are_those_of_the_paper():
    small, large = load_recipe("gdn-lte-0.4b").build_config(), load_recipe("gdn-lte-1.4b").build_config()
    assert small.mixers == large.mixers == ["gated_deltanet", "learned_eviction"] * 12
    assert (small.hidden_size, small.tie_word_embeddings) == (1024, True)
    assert (large.hidden_size, large.tie_word_embeddings) == (2048, False)
    assert large.initializer_range == 0.006  # inherited from the 0.4B recipe
    heads = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 64, "window": 768, "budget": 512, "sinks": 4}
    assert heads.items() <= large.mixer_options["learned_eviction"].items()
    assert large.mixer_options["gated_deltanet"]["head_dim"] == 256
    training = load_recipe("gdn-lte-1.4b").training
    assert training.batch_size * training.accumulation * 4096 == 2**20
    assert (training.max_steps, training.warmup_steps, training.learning_rate) == (30720, 512, 3e-4)


def test_published_recipes_can_be_shared_by_many_devices():
    """Four nodes of eight devices, each with its workers, as docs/training.md starts them."""
    published = [load_recipe(name) for name in list_recipes() if name.endswith(("-0.4b", "-1.4b"))]
    assert len(published) == 14
    for recipe in published:
        assert recipe.data.lanes % (32 * recipe.training.workers) == 0
        assert recipe.training.accumulation % 32 == 0


def test_needle_baselines_differ_from_lalte_in_the_mixer_and_the_learning_rate_only():
    lalte = load_recipe("needle-lalte")
    rates = {"needle-gdn": 1e-2, "needle-gdn-swa": 1e-2, "needle-gdn-full": 5e-3, "needle-lansa": 5e-3}
    for name, rate in rates.items():
        recipe = load_recipe(name)
        assert recipe.model["mixers"] != lalte.model["mixers"]
        training = dataclasses.replace(lalte.training, learning_rate=rate)
        assert (recipe.training, recipe.data) == (training, lalte.data)
        assert recipe.model.keys() == lalte.model.keys()


def test_a_recipe_may_be_a_path_and_takes_its_name_from_the_file(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.name == "mine"
    assert recipe.training.learning_rate == 3e-4
    assert recipe.build_config().mixers == ["gated_deltanet"] * 2


def test_base_may_be_a_file_beside_and_is_overlaid_key_by_key(tmp_path):
    write(tmp_path, MINIMAL)
    text = 'base = "mine.toml"\n[model]\nhidden_size = 32\n[training]\nseed = 3\n'
    child = load_recipe(write(tmp_path, text, "child.toml"))
    assert child.name == "child"
    assert (child.model["hidden_size"], child.model["vocab_size"]) == (32, 83)
    assert (child.training.seed, child.training.max_steps) == (3, 10)
    text = 'base = "mine.toml"\n[data]\nkind = "text"\nsource = "books"\n'
    child = load_recipe(write(tmp_path, text, "text.toml"))
    assert child.data == TextData(source="books")  # another kind replaces the table


def test_base_in_a_circle_is_an_error(tmp_path):
    write(tmp_path, 'base = "b.toml"', "a.toml")
    with pytest.raises(SettingsError, match="leads back"):
        load_recipe(write(tmp_path, 'base = "a.toml"', "b.toml"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("max_steps = 10", "save_steps = 10"), r"unknown key 'training.save_steps' \(did you mean 'save_every'\?\)"),
        (("max_steps = 10", "max_step = 10"), r"unknown key 'training.max_step' \(did you mean 'max_steps'\?\)"),
        (("max_steps = 10", ""), "key 'training.max_steps' is missing"),
        (("max_steps = 10", "max_steps = 0"), r"\[training\] max_steps must be at least 1, got 0"),
        (("max_steps = 10", "max_steps = 1.5"), "training.max_steps must be an integer, got 1.5"),
        (("max_steps = 10", "max_steps = true"), "training.max_steps must be an integer, got true"),
        (("max_steps = 10", 'max_steps = 1\nbf16 = "yes"'), "training.bf16 must be true or false, got 'yes'"),
        (("max_steps = 10", "max_steps = 1\nbetas = [0.9]"), "training.betas must have 2 entries, got 1"),
        (('kind = "needle"', ""), "data.kind must be one of 'needle', 'text', got None"),
        (('kind = "needle"', 'kind = "needle"\ntask = 3'), "data.task must be a table, got 3"),
        (('kind = "needle"', 'kind = "needle"\n[data.task]\nlength = 9'), r"\[data.task\] length is 9"),
        (("hidden_size = 64", "hidden_sizes = 64"), "unknown key 'model.hidden_sizes' .did you mean 'hidden_size'"),
        (('["gated_deltanet"]', '["gated"]'), r"\[model\] no mixer is named gated"),
        (("num_heads = 4", "num_head = 4"), r"\[model\] mixer 'gated_deltanet' has no option num_head"),
        (("max_steps = 10", "max_steps = 1\n[controller]\ninterval = 0"), r"\[controller\] interval must be at least"),
        (
            ("max_steps = 10", "max_steps = 1\n[retention]\neviction_start = 1.5"),
            r"\[retention\] eviction_start must be",
        ),
        (("[data]", "[data"), "not valid TOML"),
    ],
)
def test_mistakes_are_named_with_file_and_key(tmp_path, change, message):
    text = MINIMAL.replace(*change)
    assert text != MINIMAL
    path = write(tmp_path, text)
    with pytest.raises(SettingsError, match=message) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_recipe_is_named_with_a_suggestion(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no recipe 'needle-lalt' .did you mean 'needle-lalte'"):
        load_recipe("needle-lalt")
    with pytest.raises(FileNotFoundError, match=r"no recipe file .*absent\.toml"):
        load_recipe(tmp_path / "absent.toml")


@pytest.mark.parametrize("name", ["needle-lalte", "books-lalte", "gdn-lte-1.4b"])
def test_a_recipe_written_out_reads_back_equal(name, tmp_path):
    recipe = load_recipe(name)
    assert load_recipe(write(tmp_path, to_toml(recipe))) == recipe


def test_command_line_overrides():
    overrides = "--training.max-steps 100 --training.learning-rate 1e-2 --model.hidden-size 32 --data.task.num-pairs 8"
    overrides += (
        " --model.mixer-options.learned-eviction.budget 7 --retention.eviction-start 0.25 --controller.budget 9"
    )
    recipe = tyro.cli(Recipe, default=load_recipe("needle-lalte"), args=overrides.split())
    assert (recipe.training.max_steps, recipe.training.learning_rate) == (100, 1e-2)
    assert (recipe.model["hidden_size"], recipe.data.task.num_pairs) == (32, 8)
    assert recipe.model["mixer_options"]["learned_eviction"]["budget"] == 7
    assert (recipe.retention.eviction_start, recipe.controller.budget) == (0.25, 9)
    assert tyro.cli(Recipe, default=load_recipe("needle-lalte"), args=["--retention.eviction-start", "250"]) == (
        dataclasses.replace(
            load_recipe("needle-lalte"),
            retention=dataclasses.replace(load_recipe("needle-lalte").retention, eviction_start=250),
        )
    )
    text = tyro.cli(Recipe, default=load_recipe("books-lalte"), args=["--data.source", "elsewhere"])
    assert text.data == dataclasses.replace(load_recipe("books-lalte").data, source="elsewhere")


def overridden(name: str, arguments: str) -> Recipe:
    return override(load_recipe(name), arguments.split(), tyro.cli)


def test_overrides_reach_what_the_recipe_does_not_name():
    plain = load_recipe("books-lalte")
    arguments = (
        "--model.rms-norm-eps 1e-5 --model.intermediate-size 96 --model.mixer-options.learned-eviction.threshold 0.3"
    )
    arguments += " --model.mixer-options.gated-deltanet.allow-neg-eigval --controller.sharing layer --data.split x"
    arguments += " --model.mixer-options.learned-eviction.conv-size 3 3 --model.no-tie-word-embeddings"
    arguments += " --model.mixer-options.learned-eviction.conv-dilation 2 2"
    recipe = overridden("books-lalte", arguments)
    named = plain.model["mixer_options"]
    assert recipe.model == plain.model | {
        "rms_norm_eps": 1e-5,
        "intermediate_size": 96,
        "tie_word_embeddings": False,
        "mixer_options": {
            "gated_deltanet": named["gated_deltanet"] | {"allow_neg_eigval": True},
            "learned_eviction": named["learned_eviction"]
            | {"threshold": 0.3, "conv_size": [3, 3], "conv_dilation": [2, 2]},
        },
    }
    assert (recipe.controller.sharing, recipe.data.split) == ("layer", "x")
    assert type(recipe) is Recipe
    assert override(plain, [], tyro.cli) == plain


def test_a_configuration_goes_with_its_source(tmp_path, caplog):
    plain = load_recipe("gdn-lte-0.4b").data
    assert plain.config == "sample-100BT"
    here = overridden("gdn-lte-0.4b", "--data.source corpus/ --data.length 64").data
    assert here == dataclasses.replace(plain, source="corpus/", config=None, length=64)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "'sample-100BT' is of HuggingFaceFW/fineweb-edu, so it is left out for corpus/" in message
    for named in ("--data.source o/d --data.config sample-100BT", "--data.source o/d --data.config=sample-100BT"):
        assert overridden("gdn-lte-0.4b", named).data.config == "sample-100BT"
    assert overridden("gdn-lte-0.4b", f"--data.source {plain.source} --data.split x").data.config == "sample-100BT"
    base = 'base = "gdn-lte-0.4b"\n[data]\n'
    assert load_recipe(write(tmp_path, base + 'source = "corpus/"')).data == dataclasses.replace(
        plain, source="corpus/", config=None
    )
    assert load_recipe(write(tmp_path, base + "length = 64")).data.config == "sample-100BT"
    assert load_recipe(write(tmp_path, base + 'source = "o/d"\nconfig = "c"')).data.config == "c"


def test_every_setting_of_the_model_can_be_overridden():
    plain = load_recipe("needle-lansa")
    config = plain.build_config()
    for mixer, options in config.mixer_options.items():
        for key, value in options.items():
            if isinstance(value, int) and not isinstance(value, bool):
                flag = f"--model.mixer-options.{mixer}.{key}".replace("_", "-")
                recipe = overridden("needle-lansa", f"{flag} {2 * value}")
                assert recipe.build_config().mixer_options[mixer][key] == 2 * value


def test_overrides_may_change_the_mixers():
    recipe = overridden("books-lalte", "--model.mixers gated_deltanet sliding_attention")
    assert recipe.build_config().mixers == ["gated_deltanet", "sliding_attention"] * 2
    assert list(recipe.model["mixer_options"]) == ["gated_deltanet"]
    arguments = "--model.mixers full_attention --model.mixer-options.full-attention.num-heads 4"
    recipe = overridden("books-lalte", arguments)
    assert recipe.model["mixer_options"] == {"full_attention": {"num_heads": 4}}
    with pytest.raises(ValueError, match=r"\[model\] no mixer is named gated"):
        overridden("books-lalte", "--model.mixers gated")


@dataclasses.dataclass
class Odd:
    text: str
    number: float = 1.0
    table: dict[str, int] = dataclasses.field(default_factory=lambda: {"a": 1})


@pytest.mark.parametrize("text", ['quote " and \\', "tab\tline\n", "λ 日本 😀", "\x01\x7f\x1b", ""])
@pytest.mark.parametrize("number", [1e-9, 1e20, 3.0, float("inf"), -0.0])
def test_toml_round_trip_of_odd_values(text, number):
    import tomllib

    odd = Odd(text, number, {})
    assert from_mapping(Odd, tomllib.loads(to_toml(odd)), "here") == odd


def test_a_warm_up_longer_than_the_run_is_refused_and_says_what_to_add():
    with pytest.raises(ValueError, match=r"warmup_steps is 200.* 100 steps .max_steps.*--training.warmup-steps .* 5\."):
        dataclasses.replace(load_recipe("books-lalte").training, max_steps=100)


@pytest.mark.parametrize("name", ["", ".", "..", "../esc", "a/b", "a\\b"])
def test_a_name_stays_inside_the_output_directory(name):
    with pytest.raises(ValueError, match="must be that of a directory"):
        dataclasses.replace(load_recipe("needle-gdn"), name=name)
