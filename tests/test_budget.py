"""Searching for the tokens that each layer keeps: running layers alone, the search itself, plan files, the command."""

import functools
import itertools
import json
import shlex

import jax
import numpy as np
import pytest
from small import SIZES, forward, random_images, small_model
from trained import make_pictures

import tosa_jax
from tosa_jax import budget, predict
from tosa_jax.errors import ConfigError
from tosa_jax.models import cost
from tosa_jax.models.budget_search import BudgetSearch
from tosa_jax.models.layer_programs import LayerPrograms, schedule_of
from tosa_jax.models.params import set_params, split
from tosa_jax.models.plan import layer_specs, selections
from tosa_jax.models.plan_file import read_plan, write_plan

NETWORKS = {
    "in pairs": {"plan": "selective", "keep_rate": (0.7, 0.4)},
    "a group": {"plan": ("standard", "previous", "previous", "standard"), "keep_rate": 0.5},
    "nested": {"plan": "redundancy", "keep_rate": 0.7, "budget": "linear", "depth": 3},
    "nested, by cost": {
        "plan": "redundancy", "keep_rate": (0.8, 0.8, 0.5), "redundancy_matching": "ward", "depth": 3,
    },
    "merged for good": {"plan": "tome", "keep_rate": 0.6, "budget": "linear", "depth": 3},
    "dropped for good": {"plan": "evit", "keep_rate": 0.7},
    "nested, rotary, sizes": {
        "plan": "redundancy", "keep_rate": (0.8, 0.8, 0.4), "bypass_size_bias": True,
        "rope": "dinov3", "pos_embed": False, "depth": 3,
    },
}  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def all_tokens(graphdef, params, images):
    """The tokens after the last layer and the norm, all of them back in their places."""
    model = set_params(graphdef, params)
    state = model.layers(model.embed(images), key=None, train=False)
    return model.norm(model.kinds[-1].restore(state).tokens)


@pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS.keys())
def test_layers_alone_compute_what_the_network_does(fields):
    model, images = small_model(**fields), random_images()
    layers = LayerPrograms(model, images)
    found = layers.tokens(schedule_of(model.config))
    np.testing.assert_allclose(found, all_tokens(*split(model), images), atol=1e-5)
    patches = 16 * 2 * 2 * SIZES["embed_dim"]
    assert layers.macs(schedule_of(model.config)) == cost.macs(model) - patches - model.head_macs()


def test_what_was_run_before_changes_nothing():
    """A schedule goes on from where it differs from the one before it; shorter and longer ones in turn."""
    model, images = small_model(plan="redundancy", keep_rate=0.8, budget="linear"), random_images(2)
    search = BudgetSearch(model, images)
    kept = [(14, 12, 10, 8), (14, 12, 9, 8), (16, 16, 16, 16), (14, 12, 9, 8)]
    schedules = [schedule_of(search.with_kept(x)) for x in kept]
    found = [search._layers.tokens(schedule) for schedule in schedules]
    fresh = LayerPrograms(model, images).tokens(schedules[1])
    np.testing.assert_array_equal(found[1], fresh)
    np.testing.assert_array_equal(found[3], fresh)
    assert np.abs(np.asarray(found[0]) - np.asarray(found[1])).max() > 1e-6
    dense = forward(small_model(), images).tokens
    np.testing.assert_allclose(found[2], dense, atol=1e-5)
    ours, theirs = (np.asarray(x, np.float64) for x in (found[0], dense))
    near = (ours * theirs).sum(2) / np.linalg.norm(ours, axis=2) / np.linalg.norm(theirs, axis=2)
    wanted = np.sqrt(2 - 2 * np.stack([near[:, 0], near[:, 1:].mean(1)]))
    np.testing.assert_allclose(search.distances(kept[0]), wanted, rtol=1e-3)
    of_class, of_patches = wanted.mean(axis=1)
    assert search.error(kept[0]) == pytest.approx(np.sqrt(of_class * of_patches), rel=1e-3)
    assert search._change(kept[0], kept[1]).mean() == pytest.approx(
        (search.distances(kept[1]).mean(1) / wanted.mean(1) - 1).mean(), abs=1e-3
    )


@pytest.mark.parametrize("plan", ["previous", "redundancy"])
def test_the_search_finds_nearly_the_best_counts(plan, monkeypatch):
    """Errors by a formula, so that every schedule can be tried: the third layer needs its tokens most."""
    budget = "linear" if plan == "redundancy" else "uniform"
    model = small_model(plan=plan, keep_rate=0.8, budget=budget, depth=6)
    search = BudgetSearch(model, random_images(1), refine=True, on_message=lambda line: None)
    weights = {3: (1, 1, 6), 6: (1, 2, 9, 1, 1, 1)}[len(search._selections)]

    def distances(self, kept):
        far = sum(w * (17 - x) ** 2 for w, x in zip(weights, self.counts(kept), strict=True))
        return np.array([[1.0 + far]])

    monkeypatch.setattr(BudgetSearch, "distances", distances)
    found = search.run(0.8)
    kept = tuple(count - 1 for count in found.counts)
    assert found.share == search.share(kept) <= 0.8
    assert found.error == search.error(kept) < found.start[0]
    assert (
        tuple(layer_specs(found.config)[i].count for i in selections(found.config)) == found.counts
    )
    if plan == "previous":
        every = itertools.product((4, 7, 10, 13, 16), repeat=3)
        assert found.error <= min(search.error(x) for x in every if search.share(x) <= 0.8)


@pytest.mark.parametrize(("wanted", "power"), [(0.6, 1.3**-2), (1.4, 1.3), (1.0, 1.0)])
def test_the_linear_schedule_is_bent_to_what_the_features_ask_for(wanted, power, monkeypatch):
    model = small_model(plan="redundancy", keep_rate=0.8, budget="linear", depth=6)
    search = BudgetSearch(model, random_images(1), on_message=lambda line: None)
    best = np.array(search._largest(0.75, wanted))

    def distances(self, kept):
        return 1 + np.abs(np.array([kept, kept]) - best).mean(axis=1, keepdims=True) / 16

    monkeypatch.setattr(BudgetSearch, "distances", distances)
    found = search.run(0.75)
    assert found.counts == search.counts(search._largest(0.75, power))
    assert found.start == (search.error(search._largest(0.75, 1.0)), "linear")
    assert 0.71 < found.share <= 0.75


@pytest.mark.parametrize(
    ("others", "taken"), [(-0.1, "ward"), (0.1, "cosine")], ids=["all images", "one image"]
)
def test_a_setting_of_the_method_is_taken_where_it_is_better(others, taken, monkeypatch):
    """One of eight images gains so much by it that the mean does too; the others gain or lose a little."""

    def distances(self, kept):
        by_cost = self.config.redundancy_matching == "ward"
        return np.array([[1 - 0.9 * by_cost, *[1 + others * by_cost] * 7]])

    monkeypatch.setattr(BudgetSearch, "distances", distances)
    model = small_model(plan="redundancy", keep_rate=0.8, budget="linear")
    search = BudgetSearch(model, random_images(1), on_message=lambda line: None)
    for share in (0.8, 0.7):
        found = search.run(share)
        assert found.config.redundancy_matching == taken
        assert found.start[0] == 1


def test_a_share_is_of_the_whole_network():
    """As `tosa_jax.compare` counts: patch projection and head cost the same in every schedule."""
    model = small_model(plan="redundancy", keep_rate=0.8, budget="linear", num_classes=1000)
    search = BudgetSearch(model, random_images(1), on_message=lambda line: None)
    found = search.run(0.95)
    dense = cost.gmacs(small_model(num_classes=1000).config)
    assert found.share == pytest.approx(cost.gmacs(found.config) / dense)
    assert 0.9 < found.share <= 0.95


@pytest.mark.parametrize(("power", "budget"), [(1.0, "linear"), (0.0, "uniform")])
def test_bent_schedules_have_the_linear_and_the_uniform_one_among_them(power, budget):
    model = small_model(plan="previous", keep_rate=0.5, depth=6)
    search = BudgetSearch(model, random_images(1), on_message=lambda line: None)
    kept = search._explicit(
        12, power
    )  # three selections, after the last of which 12 of 16 are gone
    mean = {"linear": 1 - 12 / 16 * 4 / 6, "uniform": 4 / 16}[budget]
    config = small_model(plan="previous", keep_rate=mean, budget=budget, depth=6).config
    assert search.counts(kept) == tuple(layer_specs(config)[i].count for i in selections(config))


def formula_search(monkeypatch, distances):
    """A search for three selections of 16 patches, whose images are as far as `distances(kept)` [p b] says."""
    monkeypatch.setattr(BudgetSearch, "distances", lambda self, kept: np.array(distances(kept)))
    model = small_model(plan="previous", keep_rate=0.5, depth=6)
    return BudgetSearch(model, random_images(1), refine=True, on_message=lambda line: None)


def test_the_class_token_counts_although_its_errors_are_small(monkeypatch):
    """The first selection is all that it needs, and a sum of both errors would hardly see it."""

    def distances(kept):
        return [[1e-4 * (18 - kept[0])], [20 - kept[2] / 2]]

    search = formula_search(monkeypatch, distances)
    found = search.run(0.8)
    kept = tuple(count - 1 for count in found.counts)
    every = itertools.product((4, 7, 10, 13, 16), repeat=3)
    least = min(search.error(x) for x in every if search.share(x) <= 0.8)
    assert kept[0] >= 15 and found.error <= 1.05 * least < 0.7 * found.start[0]


@pytest.mark.parametrize(("others", "moves"), [(0.1, False), (-0.1, True)])
def test_what_one_image_alone_likes_is_no_better_schedule(others, moves, monkeypatch):
    """Of eight images one gains so much where the first selection keeps more than 10 that the mean does too."""

    def distances(kept):
        gains = np.clip((kept[0] - 10) / 4, -1, 1)
        return [[1 - 0.9 * gains, *[1 + others * gains] * 7]]

    search = formula_search(monkeypatch, distances)
    monkeypatch.setattr(search, "_largest", lambda share, power: (10, 10, 10))
    assert (search.run(0.85).counts != (11, 11, 11)) == moves


def test_a_selector_that_is_not_there_is_no_place_to_choose():
    """The model's own plan merges nothing in its third layer, so that no selector was made for it."""
    model = small_model(plan="mctf_predicted", keep_rate=(0.8, 0.8, 0.6))
    search = BudgetSearch(model, random_images(1), on_message=lambda line: None)
    assert search._schedule((13, 13, 10)) is not None and search._schedule((13, 11, 10)) is None
    rates = search.run(0.9).config.keep_rate
    assert rates[1] >= rates[0]


def test_time_is_a_cost_too():
    model = small_model(plan="previous", keep_rate=0.5)
    search = BudgetSearch(model, random_images(2), cost="time", on_message=lambda line: None)
    assert search.share((16, 16)) > 0
    layers = search._layers
    schedule = schedule_of(search.with_kept((8, 8)))
    once = layers.seconds(schedule)
    assert once == layers.seconds(schedule) > 0  # measured once
    # Two layers on all tokens and two on nine: of each pair the same program.
    assert once == pytest.approx(sum(layers._seconds[x] for x in layers._pairs(schedule)))


@pytest.mark.parametrize(
    ("fields", "share", "says"),
    [
        ({}, 0.5, "selects no tokens"),
        ({"plan": "random", "keep_rate": 0.5}, 0.5, "draws its tokens"),
        ({"plan": "previous", "keep_rate": 0.5}, 0.3, "cannot be reached"),
        ({"plan": "previous", "keep_rate": 0.5}, 1.0, "not in (0, 1)"),
    ],
)
def test_what_cannot_be_searched_is_said(fields, share, says):
    with pytest.raises(ConfigError, match=says.replace("(", r"\(").replace(")", r"\)")):
        BudgetSearch(small_model(**fields), random_images(1)).run(share)


def test_a_plan_file_makes_the_same_network(tmp_path):
    fields = {"plan": "previous", "keep_rate": (0.75, 0.25), "bypass": "shared"}
    config = small_model(**fields).config
    path = tmp_path / "plan.json"
    write_plan(path, config, {"error": 0.1})
    assert small_model(plan=str(path)).config == config
    assert json.loads(path.read_text())["error"] == 0.1
    assert read_plan(path)["keep_rate"] == (0.75, 0.25)
    with pytest.raises(ConfigError, match="leave out keep_rate"):
        small_model(plan=str(path), keep_rate=0.5)
    with pytest.raises(ConfigError, match="plan has 4 layers, but depth=3"):
        small_model(plan=str(path), depth=3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "is no plan file"),
        ('{"format": "tosa_jax plan", "version": 2, "fields": {}}', "another version"),
        ('{"format": "tosa_jax plan", "version": 1, "fields": {"depth": 3}}', "another version"),
    ],
)
def test_other_files_are_no_plans(text, says, tmp_path):
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        small_model(plan=str(path))


def test_the_command_writes_a_plan_for_an_exported_network(tmp_path, capsys):
    model = small_model(seed=3)
    tosa_jax.Predictor(model, mean=(0.3,), std=(0.4,)).save(tmp_path / "small.safetensors")
    make_pictures(tmp_path / "pictures", 3)
    (tmp_path / "pictures/broken.png").write_bytes(b"\x89PNG")
    arguments = [f"--weights={tmp_path}/small.safetensors", f"--images={tmp_path}/pictures"]
    arguments += [f"--out={tmp_path}/plans", "--method=previous", "--target=.8"]
    assert budget.main(arguments) == 0
    out = capsys.readouterr().out
    assert "left out" in out and "broken.png" in out
    path = tmp_path / "plans/small_previous_0.8.json"
    said = json.loads(path.read_text())
    assert sorted(said["images"]) == ["0.png", "1.png", "2.png"] and said["share"] <= 0.8
    again = budget.parse_arguments(shlex.split(said["command"])[3:])
    assert (again.method, again.target, again.image_size) == ("previous", [0.8], [8])
    assert str(tmp_path) not in path.read_text()
    found = small_model(plan=str(path))
    specs = layer_specs(found.config)
    assert [spec.count for spec in specs if spec.opens] == said["counts"]
    assert said["gmacs"] == pytest.approx(cost.gmacs(found.config))
    assert said["error"] <= said["start"]["error"]
    # The same weights are run by that plan: from the file, and by predict.
    planned = tosa_jax.load(tmp_path / "small.safetensors", plan=str(path))
    assert planned.config == found.config
    pictures = [f"{tmp_path}/pictures/0.png", "--json"]
    arguments = [f"--weights={tmp_path}/small.safetensors", f"--plan={path}", *pictures]
    assert predict.main(arguments) == 0
    (line,) = capsys.readouterr().out.splitlines()
    wanted = planned.classify([pictures[0]])[0][0]
    assert json.loads(line)["top"][0]["probability"] == pytest.approx(wanted.probability, abs=1e-5)
    assert predict.main([*arguments, "--keep_rate=.5"]) == 2
    assert "--plan has the keep rates" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target=1.5"], "--target=1.5 is not in (0, 1)"),
        (["--target=.5", "--method=dense"], "--method=dense has no counts"),
        (["--target=.5", "--method=tossa"], "did you mean 'tosa'"),
        (["--target=.5", "--count=0"], "--count=0 must be at least 1"),
        (["--target=.5", "--model=vit", "--image_size", "8", "8", "3"], "has 3 numbers"),
    ],
)
def test_bad_arguments_are_one_line(arguments, says, capsys):
    assert budget.main(["--weights=x", "--images=y", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line
