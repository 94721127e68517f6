"""`python -m tosa_jax.compare`: equal budgets, a table that says what is level, going on, and bad input."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image
from small import SIZES, random_images, small_model

from tosa_jax import compare
from tosa_jax.errors import ConfigError, NonFiniteLossError
from tosa_jax.models import cost, variants
from tosa_jax.models.plan_file import write_plan
from tosa_jax.models.weights.load import save_weights
from tosa_jax.models.weights.run_checkpoints import read_params
from tosa_jax.performance import comparison, tpu_estimate
from tosa_jax.performance.comparison import contender, solved
from tosa_jax.reporting import comparison as tables
from tosa_jax.reporting.intervals import by_picture, difference, interval
from tosa_jax.train import comparison as studies

TINY = SIZES | {"in_chans": 3, "image_size": 16}


def config_of(**fields):
    return variants.variant_config("vit", **(TINY | {"num_classes": 0} | fields))


@pytest.mark.parametrize("text", ["tome", "redundancy", "mctf:mctf_information=class", "previous"])
def test_a_row_gets_the_multiply_adds_that_were_asked_for(text):
    dense = config_of()
    config = solved(dense, contender(text), 0.8)
    assert abs(cost.gmacs(config) / cost.gmacs(dense) / 0.8 - 1) <= comparison.TOLERANCE
    assert config.plan != dense.plan


def test_where_one_rate_serves_all_layers_the_last_ones_use_up_the_rest():
    dense = config_of(depth=6)
    config = solved(dense, contender("diffrate"), 0.8)
    first, last = config.keep_rates_given[0], config.keep_rates_given[-1]
    assert last - first == pytest.approx(1 / config.num_patches)
    one_more = dataclasses.replace(config, keep_rate=last)
    assert cost.gmacs(config) <= 0.8 * cost.gmacs(dense) < cost.gmacs(one_more)


def test_fields_and_layers_of_a_row_are_those_of_its_network():
    row = contender("expedit:layers=1-2,cluster_neighbours=3,keep_rate=0.5")
    assert (row.method, row.layers) == ("expedit", (1, 2))
    dense = config_of()
    row_share = cost.gmacs(
        dataclasses.replace(
            dense, plan=("standard", "expedit", "expedit", "standard"), keep_rate=0.5
        )
    ) / cost.gmacs(dense)
    config = solved(dense, row, row_share)
    assert config.plan == ("standard", "expedit", "expedit", "standard")
    assert (config.cluster_neighbours, config.keep_rate) == (3, 0.5)


def test_removed_tokens_come_back_to_their_places_before_they_are_compared():
    model = small_model(plan="tome", keep_rate=0.6, num_classes=0)
    dense = small_model(num_classes=0)
    images = np.asarray(random_images(2))
    tokens, truth = (comparison.grid_features(m, images) for m in (model, dense))
    assert tokens.shape == truth.shape == (2, 17, 16)
    near = comparison.closeness(tokens, truth, dense.config)
    one = float(tokens[1, 3] @ truth[1, 3] / np.sqrt((tokens[1, 3] ** 2).sum() * (truth[1, 3] ** 2).sum()))  # fmt: skip
    assert comparison.cosine(tokens, truth)[1, 3] == pytest.approx(one, abs=1e-6)
    assert near["patches"][1] == pytest.approx(comparison.cosine(tokens, truth)[1, 1:].mean())
    assert near["class"][0] == comparison.cosine(tokens, truth)[0, 0] < 0.99999


def test_pictures_are_resampled_and_not_their_crops():
    values = np.array([0.0, 2.0, 1.0, 4.0, 2.0, 6.0])
    assert by_picture(values, ["b", "a", "b", "a", "b", "a"]).tolist() == [1.0, 4.0]
    low, high = interval([1.0, 4.0])
    assert (low, high) == (1.0, 4.0)  # of two pictures a quarter of all resamples have only one
    mean, bounds = difference([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])
    assert mean == 0.5 and bounds == (0.5, 0.5)


def rows(**values):
    return [
        {"name": name, "method": name.partition(":")[0], "target": 0.5, "share": 0.5, "gmacs": 1.0,
         "class": x, "patches": x[::-1]}
        for name, x in values.items()
    ]  # fmt: skip


RECORD = {
    "command": "python -m tosa_jax.compare", "device": "1 x cpu", "versions": {"jax": "1"}, "seed": 0,
    "model": "vit", "image_size": 16, "count": 4, "pictures": ["a", "b", "c", "d"], "left_out": [],
}  # fmt: skip


def test_a_row_is_level_where_the_interval_of_its_difference_has_zero_in_it():
    made = rows(
        tome=[0.9, 0.8, 0.7, 0.6], evit=[0.9, 0.8, 0.7, 0.59], redundancy=[0.8, 0.7, 0.6, 0.5]
    )
    made[1]["class"] = [0.89, 0.81, 0.69, 0.6]
    left_out = [{"name": "ats", "target": 0.5, "why": "so"}]
    text = tables.markdown("x", RECORD | {"rows": made, "left_out": left_out})
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 and len({line.count("|") for line in lines}) == 1
    cells = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in lines[2:]}
    assert cells["ToMe"][3] == "best"
    assert cells["EViT"][3] == "level"
    assert cells["redundancy"][3] == "-0.1000 [-0.1000, -0.1000]"
    assert "- ats at 0.5: so" in text


def test_the_plot_has_a_panel_for_each_part():
    one = rows(tome=[0.85] * 4, evit=[0.8] * 4)
    for row in (without := rows(tome=[0.85] * 4)):
        del row["class"]
    both, patches = (
        Image.open(io.BytesIO(tables.plot(RECORD | {"rows": x}))) for x in (one, without)
    )
    assert both.format == "PNG" and both.width > 1.4 * patches.width


def test_a_plot_is_named_by_the_file_of_its_recipe():
    record = {
        "recipe": ["--config=digits.py:a", "--config.seed=1"],
        "rows": [{"metrics": [{}, {}]}],
    }
    assert tables.title(record) == "digits.py:a, 2 seeds"
    assert tables.title(RECORD) == f"{RECORD['model']}, nothing trained"


@pytest.fixture
def argv(tmp_path, monkeypatch):
    """The arguments for a tiny network with saved weights, and three pictures; one method."""
    monkeypatch.setitem(variants.VARIANTS, "tiny", TINY)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    save_weights(small_model(**TINY), tmp_path / "w.safetensors")
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return [
        "--model=tiny", f"--weights={tmp_path / 'w.safetensors'}", f"--images={tmp_path / 'images'}",
        f"--out={tmp_path / 'out'}", "--count=6", "--target", "0.8", "--methods", "tome",
    ]  # fmt: skip


def test_a_comparison_goes_on_where_it_stopped(argv, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    argv += ["--time", "--rounds=1", "--batch_size=2"]
    assert compare.main(argv) == 0
    path = folder / "tiny.json"
    first = json.loads(path.read_text())
    (row,) = first["rows"]
    assert (row["name"], row["target"], len(row["class"])) == ("tome", 0.8, 3)
    assert abs(row["share"] / 0.8 - 1) <= 0.02 and 0.5 < np.mean(row["patches"]) < 1
    assert first["pictures"] == ["0.png", "1.png", "2.png"] and first["device"]
    assert str(tmp_path) not in path.read_text() and "--images=DIR" in first["command"]
    assert set(first["time"]["networks"]) == {"dense", "tome 0.8"}
    run, ran = comparison.grid_features, []
    monkeypatch.setattr(comparison, "grid_features", lambda m, x: ran.append(m.config.plan) or run(m, x))  # fmt: skip
    monkeypatch.setattr(comparison, "time_networks", None)
    assert compare.main(argv) == 0 and not ran
    assert json.loads(path.read_text()) == first

    times = {"ms": 2.0, "ms_iqr": 1.0}
    monkeypatch.setattr(comparison, "time_networks", lambda configs, *_: dict.fromkeys(configs, times))  # fmt: skip
    monkeypatch.setattr(tpu_estimate, "forward_mcycles", lambda configs, *_: range(len(configs)))
    capsys.readouterr()
    assert compare.main([*argv, "--methods", "tome", "random", "skip", "--estimate=v5e"]) == 0
    second = json.loads(path.read_text())
    assert second["rows"][0] == row and [x["name"] for x in second["rows"]] == ["tome", "random"]
    assert len(ran) == 2  # the dense network, and the new one
    (left_out,) = second["left_out"]
    assert left_out["name"] == "skip" and left_out["why"] in capsys.readouterr().out
    assert "--methods tome random skip" in second["command"]
    table = (folder / "tiny.md").read_text()
    (of_tome,) = (line for line in table.splitlines() if line.startswith("| ToMe"))
    assert of_tome.endswith("| 2.0 ± 0.5 | 1.00 |")
    assert compare.main([*argv, "--seed=1"]) == 2
    assert "rows with another seed: take another --name" in capsys.readouterr().err
    assert json.loads(path.read_text()) == second


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "tom"], "--methods='tom' is unknown; did you mean 'tome'?"),
        (["--methods", "tome:removed"], "has 'removed', not FIELD=VALUE"),
        (["--methods", "tome:layers=4"], "layers=4 is not FIRST-LAST"),
        (["--target", "1.5"], "--target=1.5 is not in (0, 1)"),
        (["--count=0"], "--count=0 must be at least 1"),
    ],
)
def test_a_bad_command_line_gets_one_line(argv, arguments, said, capsys):
    assert compare.main([*argv, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.fixture
def planned(tmp_path):
    """A network, its share of the multiply-adds, and the row for its plan file, which has the share in its name."""
    rates = tuple(kept / 16 for kept in (14, 12, 9, 7))
    config = config_of(plan=("redundancy",) * 4, keep_rate=rates)
    share = round(cost.gmacs(config) / cost.gmacs(config_of()), 2)
    (tmp_path / "plans").mkdir()
    write_plan(tmp_path / "plans" / f"p_{share:g}.json", config, {})
    return config, share, f"redundancy:plan={tmp_path}/plans/p_{{}}.json"


def test_a_plan_file_stands_beside_its_rivals(argv, planned, tmp_path, monkeypatch):
    config, share, row = planned
    ran = []

    def score(self, key, network):
        ran.append(network)
        return dict.fromkeys(("class", "patches"), [0.9 - 0.1 * len(ran)] * 3)

    monkeypatch.setattr(compare.Untrained, "score", score)
    argv += ["--target", f"{share:g}", "--methods", "tome", row]
    assert compare.main(argv) == 0 and ran[1] == config
    path = tmp_path / "out" / "tiny.json"
    record = json.loads(path.read_text())
    of_plan = record["rows"][1]
    assert (of_plan["name"], of_plan["method"]) == ("redundancy:plan=p_{}.json", "redundancy")
    assert of_plan["share"] == cost.gmacs(config) / cost.gmacs(config_of())
    assert str(tmp_path) not in path.read_text()
    assert "| redundancy (plan=p_{}.json) |" in path.with_suffix(".md").read_text()
    assert compare._networks(record, config_of())[f"{of_plan['name']} {share}"] == config
    assert compare.main(argv) == 0 and len(ran) == 2
    # Another plan under the same name is scored, and what was measured of the other one is forgotten.
    record["time"] = {"networks": {}}
    path.write_text(json.dumps(record))
    other = dataclasses.replace(config, keep_rate=(14 / 16, 12 / 16, 9 / 16, 6 / 16))
    write_plan(tmp_path / "plans" / f"p_{share:g}.json", other, {})
    assert compare.main(argv) == 0 and ran[2:] == [other]
    record = json.loads(path.read_text())
    assert len(record["rows"]) == 2 and "time" not in record


def test_a_plan_file_that_does_not_fit_is_told(planned, tmp_path):
    _, share, row = planned
    with pytest.raises(ConfigError, match=r"p_0\.9\.json' cannot be read"):
        solved(config_of(), contender(row), 0.9)
    one = contender(row.replace("{}", f"{share:g}"))
    with pytest.raises(
        ConfigError, match=rf"has {share:.2f}\d of the dense multiply-adds, not 0\.9 within 2%"
    ):
        solved(config_of(), one, 0.9)
    with pytest.raises(ConfigError, match="the layers of this plan are redundancy"):
        solved(config_of(), contender(row.replace("redundancy:", "tome:")), share)
    with pytest.raises(ConfigError, match="layers beside a plan file"):
        contender(f"{row},layers=1-3")


def test_a_file_that_is_no_picture_is_named(argv, tmp_path, capsys):
    (tmp_path / "images" / "z.png").write_text("no picture")
    assert compare.main(argv) == 2
    assert "z.png cannot be read as an image" in capsys.readouterr().err


def test_fields_that_a_method_lacks_are_refused():
    with pytest.raises(ConfigError, match="taw_size"):
        solved(config_of(), contender("mctf:taw_size=0"), 0.8)
    with pytest.raises(ConfigError, match="layers=2-9 are not among 0-3"):
        solved(config_of(), contender("expedit:layers=2-9"), 0.8)


RECIPE = """
from tosa_jax.config import default_config

def get_config():
    config = default_config()
    config.update(batch_size=16, log_steps=3)
    config.model.update({sizes}, depth=2)
    config.data.update(name="digits", data_dir={data!r}, in_memory=True)
    config.inputs.update(mean=(0.3,), std=(0.4,))
    for stage in ("pretrain", "selector", "finetune"):
        config[stage].update(steps=2, learning_rate=1e-3)
    config.eval.update(batch_size=120, controls=("skip",))
    return config
"""


@pytest.fixture
def recipe(tmp_path, digits_dir):
    """The arguments that train a network of two layers; ToSA has 3/4 of its multiply-adds with 8 of 16 patches."""
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(sizes=SIZES, data=digits_dir))
    return [f"--config={path}", "--seeds=1", f"--out={tmp_path / 'out'}", "--target", "0.78"]


def test_methods_are_trained_from_one_dense_network(recipe, tmp_path, one_device):
    argv = [*recipe, "--config.finetune.trainable=^head/", "--methods", "tosa"]
    assert compare.main(argv) == 0
    folder = tmp_path / "out" / "recipe" / "seed0"
    begun = json.loads((folder / "tosa_0.78" / "config.json").read_text())
    assert begun["init_from"] == str(folder / "dense" / "checkpoints" / "pretrain")
    assert (folder / "tosa_0.78" / "selectors.safetensors").exists()
    record = json.loads((tmp_path / "out" / "recipe.json").read_text())
    (row,) = record["rows"]
    assert abs(row["share"] / 0.78 - 1) <= comparison.TOLERANCE
    reports = {
        name: json.loads((folder / name / "report.json").read_text())["results"]
        for name in ("dense", "tosa_0.78")
    }
    assert [x["name"] for x in reports["dense"]] == ["dense_pretrained", "tosa"]
    assert record["dense"]["pretrained"] == [reports["dense"][0]["metrics"]]
    assert record["dense"]["finetuned"] == [reports["dense"][1]["metrics"]]
    assert row["metrics"] == [reports["tosa_0.78"][-1]["metrics"]]
    assert reports["tosa_0.78"][-1]["gmacs"] == row["gmacs"]
    assert all(x["img_per_sec"] is None for x in reports["tosa_0.78"])
    before, after = (
        read_params(folder / name / "checkpoints" / stage / "2")
        for name, stage in (("dense", "pretrain"), ("tosa_0.78", "finetune"))
    )
    moved = {path for path, x in before.items() if np.any(np.asarray(after[path]) != np.asarray(x))}
    assert moved == {"head/bias", "head/kernel"}
    assert (
        "Only parameters that match `^head/` are trained."
        in (tmp_path / "out/recipe.md").read_text()
    )


def test_a_start_without_a_head_has_no_score(recipe, tmp_path, trained, monkeypatch):
    finished = studies.run_stages

    def run_stages(run, workdir, **options):
        report = finished(run, workdir, **options)
        report["results"][0]["metrics"] = {}
        return report

    monkeypatch.setattr(studies, "run_stages", run_stages)
    start = ["--config.pretrain.steps=0", "--config.init_from=weights.safetensors"]
    assert compare.main([*recipe, *start, "--methods", "random"]) == 0
    assert [run.init_from for _, run in trained] == ["weights.safetensors"] * 2
    assert json.loads((tmp_path / "out/recipe.json").read_text())["dense"]["pretrained"] == []
    table = (tmp_path / "out/recipe.md").read_text()
    assert "as pretrained" not in table and "| dense, fine-tuned as long |" in table


@pytest.fixture
def trained(monkeypatch):
    """Runs that end at once with a score by seed, network and keep rate; [(work directory, run)] of those that ran."""
    ran = []

    def run_stages(run, workdir, **options):
        ran.append((workdir.name, run))
        score = 0.5 + run.seed / 10 + (0.2 if set(run.model.plan) == {"standard"} else 0)
        if run.model.plan[-1] == "random" and run.seed == 1:
            raise NonFiniteLossError("the loss of step 1 is nan")
        before = {"metrics": {"acc1": score - 0.1}, "split": "test", "count": 360}
        return {"results": [before, {"metrics": {"acc1": score}}]}

    monkeypatch.setattr("tosa_jax.train.comparison.run_stages", run_stages)
    return ran


def test_more_seeds_are_added_to_a_comparison(recipe, tmp_path, trained, capsys):
    path = tmp_path / "out" / "recipe.json"
    both = [*recipe, "--methods", "tosa", "random"]
    assert compare.main(both) == 0
    assert [name for name, _ in trained] == ["dense", "tosa_0.78", "random_0.78"]
    dense, tosa, random = (run for _, run in trained)
    assert dense.has_stage("pretrain") and not dense.has_stage("selector")
    assert tosa.has_stage("selector") and not tosa.has_stage("pretrain")
    assert not random.has_stage("selector") and random.eval.controls == ()
    first = json.loads(path.read_text())
    assert str(tmp_path) not in path.read_text() and first["command"].startswith(
        "python -m tosa_jax.compare --config=DIR/recipe.py --seeds=1 --methods tosa random --target 0.78"
    )
    trained.clear()
    assert compare.main(both) == 0 and not trained
    assert json.loads(path.read_text()) == first

    assert compare.main([*both, "--seeds=3"]) == 0
    second = json.loads(path.read_text())
    rows = {row["name"]: row for row in second["rows"]}
    assert rows["tosa"]["metrics"] == [{"acc1": 0.5}, {"acc1": 0.6}, {"acc1": 0.7}]
    assert rows["random"] == first["rows"][1]  # seed 1 did not come to its end
    (left_out,) = second["left_out"]
    assert (left_out["name"], left_out["why"]) == ("random", "the loss of step 1 is nan")
    lines = path.with_suffix(".md").read_text().splitlines()
    (of_tosa,) = (line for line in lines if line.startswith("| ToSA"))
    # Student's t at two degrees of freedom: .1 / sqrt(3) * 4.303
    assert "0.6000 [0.3516, 0.8484] | best | -0.2000 [-0.2000, -0.2000] |" in of_tosa
    assert "| dense, as pretrained | 0.7000 [0.4516, 0.9484] |" in lines


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model=vit"], "--model does not go with --config"),
        (["--seeds=0"], "--seeds=0 must be at least 1"),
        (["--config.finetune.steps=0"], "the recipe must fine-tune"),
        (["--config.pretrain.steps=0"], "there is nothing to start from"),
        (["--config.no_such_field=0"], "config has no field 'no_such_field'"),
    ],
)
def test_what_a_recipe_cannot_be_compared_with_gets_one_line(recipe, arguments, said, capsys):
    assert compare.main([*recipe, "--methods", "tosa", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_what_is_missing_without_a_recipe_is_named(argv, capsys):
    assert compare.main([x for x in argv if not x.startswith("--weights")]) == 2
    assert "--weights is missing (or --config, to train)" in capsys.readouterr().err
    assert compare.main([*argv, "--config.seed=1"]) == 2
    assert "unrecognized arguments: --config.seed=1" in capsys.readouterr().err
