"""Depth networks at work: what a predictor computes, which files the command writes, what it refuses."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small import forward, small_model
from trained import DEPTH_SIZES, make_depth_workdir, make_workdir

from tosa_jax import predict
from tosa_jax.data.depth.maps import depth_of_png
from tosa_jax.errors import ConfigError
from tosa_jax.inference.predictor import Predictor
from tosa_jax.models.factory import with_image_size
from tosa_jax.models.weights.load import load_pretrained, save_weights
from tosa_jax.reporting.figures import colour_map
from tosa_jax.tasks.depth.task import DepthOptions

MEAN, STD = 0.4, 0.3
OWN, ODD = (24, 40), (21, 30)  # the patch, 8, does not divide the second


def pixels(size: tuple[int, int], count: int = 1, seed: int = 0) -> np.ndarray:
    """Smooth pictures."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 5, 3), np.uint8)
    fine = [Image.fromarray(x).resize(size[::-1], Image.Resampling.BILINEAR) for x in coarse]
    return np.stack([np.asarray(x) for x in fine])


def normalised(images: np.ndarray):
    return jnp.asarray(((images.astype(np.float32) / 255 - MEAN) / STD).astype(np.float32))


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("rooms")
    return path, make_depth_workdir(path)


@pytest.fixture(scope="module")
def workdir(made):
    return made[0]


@pytest.fixture(scope="module")
def model(made):
    return made[1]


@pytest.fixture(scope="module")
def predictor(workdir):
    return Predictor.from_workdir(workdir, batch_sizes=(2,), on_message=quiet)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """a.png and c.png of one size, b.png of another between them."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    (tmp_path / "in").mkdir()
    for seed, (name, size) in enumerate({"a": OWN, "b": ODD, "c": OWN}.items()):
        Image.fromarray(pixels(size, seed=seed)[0]).save(tmp_path / f"in/{name}.png")
    return tmp_path / "in"


def size_of(path: str | Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def run(capsys, *argv):
    status = predict.main([str(arg) for arg in argv])
    return status, *capsys.readouterr()


def test_depth_is_that_of_the_network(model, predictor):
    images = pixels(OWN, 3)
    out, expected = predictor(images), forward(model, normalised(images))
    assert out.logits is None and out.depth.dtype == np.float32
    assert np.ptp(expected.depth) > 0.5
    np.testing.assert_allclose(out.depth, expected.depth, atol=1e-4)
    for ours, theirs in zip(out.selected, expected.selected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert predictor(images[:0]).depth.shape == (0, *OWN)
    assert predictor.num_selections == 1


def test_a_picture_keeps_its_size_and_the_budget_is_a_share_of_its_own_patches(model, predictor):
    images = pixels(ODD)
    assert predictor.prepare(images[0]).shape == (*ODD, 3)
    out, expected = predictor(images), forward(with_image_size(model, ODD), normalised(images))
    np.testing.assert_allclose(out.depth, expected.depth, atol=1e-4)
    assert out.depth.shape == (1, *ODD)
    # 3 x 4 patches: half of them, and the class token.
    assert [x.shape for x in out.selected] == [(1, 7)]
    assert out.scores[0].shape == (1, 13)


def test_made_for_another_size_a_dense_network_is_the_same(tmp_path):
    dense = make_depth_workdir(tmp_path, plan="standard")
    images = normalised(pixels(ODD))
    found = forward(with_image_size(dense, ODD), images).depth
    np.testing.assert_allclose(found, forward(dense, images).depth, atol=1e-5)
    assert with_image_size(dense, OWN) is dense
    with pytest.raises(ConfigError, match="is not a multiple of patch_size=2"):
        with_image_size(small_model(), (15, 16))  # a classifier does not resize images


def test_pictures_of_several_sizes_go_in_one_call_each_as_alone(predictor, folder):
    paths = sorted(folder.iterdir())
    found = predictor.depth(paths)
    assert [x.shape for x in found] == [OWN, ODD, OWN]
    for path, depth in zip(paths, found, strict=True):
        np.testing.assert_allclose(depth, predictor.depth([path])[0], atol=1e-4)
    assert sorted(predictor._programs)[0] == (1, *ODD)  # no padding for a size of one picture


def test_pictures_of_many_sizes_run_at_a_few(model, workdir, folder, capsys):
    """Each at the size that suits it best, and its depth comes back at its own; a named size stays exact."""
    few = Predictor.from_workdir(
        workdir, batch_sizes=(2,), program_sizes=(OWN, (40, 24)), on_message=quiet
    )
    sizes = [OWN, (21, 36), (27, 44), (50, 80), (36, 21), (75, 50)]
    pictures = [pixels(size, seed=seed)[0] for seed, size in enumerate(sizes)]
    found = few.depth(pictures)
    assert [x.shape for x in found] == sizes and all(x.dtype == np.float32 for x in found)
    assert {key[1:] for key in few._programs} == {OWN, (40, 24)}
    exact = forward(model, normalised(pictures[0][None])).depth[0]
    np.testing.assert_allclose(found[0], exact, atol=1e-4)
    tall = Image.fromarray(pictures[5]).resize((24, 40), Image.Resampling.BILINEAR)
    expected = forward(with_image_size(model, (40, 24)), normalised(np.asarray(tall)[None])).depth
    back = Image.fromarray(np.asarray(expected[0])).resize((50, 75), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(found[5], np.asarray(back), atol=1e-4)
    few.warm_up()
    assert sorted(few._programs) == [(b, *size) for b in (1, 2) for size in (OWN, (40, 24))]
    argv = [f"--workdir={workdir}", "--json", "--program_sizes=24x40,40x24", folder]
    status, out, _ = run(capsys, *argv)
    assert status == 0
    for record in map(json.loads, out.splitlines()):
        own = few.depth([record["image"]])[0]
        assert record["depth"]["max"] == pytest.approx(float(own.max()), abs=1e-4)


def test_the_mirrored_image_counts_where_the_run_says_so(tmp_path):
    model = make_depth_workdir(tmp_path / "run", flip_average=True)
    images = pixels(ODD)
    own = Predictor.from_workdir(tmp_path / "run", batch_sizes=(1,), on_message=quiet)
    there = forward(with_image_size(model, ODD), normalised(images)).depth
    mirrored = forward(with_image_size(model, ODD), normalised(images[:, :, ::-1])).depth[
        :, :, ::-1
    ]
    assert jnp.abs(there - mirrored).max() > 0.1
    np.testing.assert_allclose(own(images).depth, (there + mirrored) / 2, atol=1e-4)
    own.save(tmp_path / "all.safetensors")
    again = Predictor.from_weights(tmp_path / "all.safetensors", batch_sizes=(1,))
    assert again.options == DepthOptions(flip_average=True) and again.form == own.form
    np.testing.assert_array_equal(again(images).depth, own(images).depth)


def test_depth_is_written_in_millimetres_and_in_colours(workdir, predictor, folder, capsys):
    target = folder.parent / "out"
    argv = [f"--workdir={workdir}", "--json", "--batch_size=2", f"--depth_dir={target}", folder]
    status, out, _ = run(capsys, *argv)
    assert status == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [Path(r["image"]).name for r in records] == ["a.png", "b.png", "c.png"]
    for record in records:
        depth = predictor.depth([record["image"]])[0]
        spread = [depth.min(), np.median(depth), depth.max()]
        np.testing.assert_allclose(list(record["depth"].values()), spread, atol=1e-4)
        assert list(record["depth"]) == ["min", "median", "max"]
        written = depth_of_png(Path(record["depth_png"]).read_bytes(), 1000)
        assert np.abs(written - depth).max() <= 0.0005 + 1e-4
        with Image.open(record["colours"]) as picture:
            wanted = colour_map(depth, float(depth.min()), float(depth.max()))
            assert np.abs(np.asarray(picture).astype(int) - wanted).max() <= 8
    names = {path.name for path in target.iterdir()}
    assert names == {f"{x}{y}.png" for x in "abc" for y in ("", "-colours")}


def test_truth_gives_an_error_and_a_panel(workdir, predictor, folder, capsys):
    truth, target = folder.parent / "truth", folder.parent / "out"
    truth.mkdir()
    wanted = {}
    for path in sorted(folder.iterdir()):
        depth = predictor.depth([path])[0]
        stored = np.rint(depth * 0.8 * 256).astype(np.uint16)
        stored[:3] = 0  # not measured
        measured = stored > 0
        Image.fromarray(stored).save(truth / path.name)
        metres = stored[measured] / 256
        wanted[str(path)] = np.mean(np.abs(depth[measured] - metres) / metres)
    argv = [f"--workdir={workdir}", "--json", f"--show_tokens={target}", folder]
    run(capsys, *argv)
    plain = {path.name: size_of(path) for path in target.iterdir()}
    argv += [f"--truth={truth}", "--depth_scale=256"]
    status, out, _ = run(capsys, *argv)
    assert status == 0
    for record in map(json.loads, out.splitlines()):
        assert record["abs_rel"] == pytest.approx(wanted[record["image"]], rel=1e-3)
        width, height = size_of(record["tokens"])
        # Two columns more than input, depth and the selection.
        before = plain[Path(record["tokens"]).name]
        assert (width - 10) * 3 == (before[0] - 10) * 5 and height == before[1]
    status, text, _ = run(capsys, *argv[:1], *argv[-2:], folder / "a.png")
    found = re.search(r"median [\d.]+ m, abs_rel ([\d.]+)\n", text).group(1)
    assert float(found) == pytest.approx(wanted[str(folder / "a.png")], abs=1e-3)


def test_a_truth_that_does_not_fit_is_told_and_the_rest_go_on(workdir, folder, capsys):
    truth = folder.parent / "truth"
    truth.mkdir()
    for name, size in {"a": ODD, "b": ODD, "c": OWN}.items():
        value = 0 if name == "c" else 2000
        Image.fromarray(np.full(size, value, np.uint16)).save(truth / f"{name}.png")
    status, out, err = run(capsys, f"--workdir={workdir}", "--json", f"--truth={truth}", folder)
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 1 and ["error" in r for r in records] == [True, False, True]
    assert "a.png is 21x30, the image 24x40" in records[0]["error"] and "24x40" in err
    assert "c.png has a depth that is scored" in records[2]["error"]


def test_released_weights_of_a_depth_network(model, folder, capsys, tmp_path):
    save_weights(model, tmp_path / "w.safetensors")
    own = Predictor.from_pretrained(
        "vit", tmp_path / "w.safetensors", task="depth", keep_rate=0.5, mean=(MEAN,), std=(STD,),
        on_message=quiet, **DEPTH_SIZES,
    )  # fmt: skip
    images = pixels(ODD)
    expected = forward(with_image_size(model, ODD), normalised(images))
    assert own(images).selected[0].shape == (1, 7)
    dense = Predictor.from_pretrained(
        "vit", tmp_path / "w.safetensors", task="depth", on_message=quiet, **DEPTH_SIZES
    )
    assert dense.num_selections == 0 and expected.depth.shape == dense(images).depth.shape
    said: list[str] = []
    other = make_depth_workdir(tmp_path / "far", max_depth=80.0)
    load_pretrained(other, tmp_path / "w.safetensors", on_message=said.append)
    assert any("trained with max_depth=10, the model has 80" in line for line in said)


def test_asking_for_what_a_network_has_not_is_one_line(model, predictor, folder):
    with pytest.raises(ConfigError, match="is for depth and has no classes: call Predictor.depth"):
        predictor.classify([folder / "a.png"])
    with pytest.raises(ConfigError, match="has no classes"):
        predictor.top(predictor(pixels(OWN)))
    with pytest.raises(ConfigError, match=r"must be uint8 \[b, height, width, 3\]"):
        predictor(pixels(OWN)[..., :1])
    with pytest.raises(ConfigError, match="1 class names, but the model has 0 classes"):
        Predictor(model, class_names=("a",))
    with pytest.raises(
        ConfigError, match=r"program_sizes=\[8\] is for models that take images of any"
    ):
        Predictor(small_model(), mean=(0.5,), std=(0.5,), program_sizes=[8])
    for sizes, says in (
        (((480, 640, 3),), "of height and width"),
        (480, "a list"),
        ((0,), "at least one pixel"),
    ):
        with pytest.raises(ConfigError, match=says):
            Predictor(model, program_sizes=sizes)
    with pytest.raises(ConfigError, match="has no depth: call Predictor.classify"):
        Predictor(small_model(), mean=(0.5,), std=(0.5,)).depth([folder / "a.png"])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--workdir={w}", "--top=3", "{i}"], "--top is not for this model, whose task is depth"),
        (["--workdir={c}", "--depth_dir=out", "{i}"], "--depth_dir is not for this model, whose task is class"),
        (["--workdir={c}", "--truth=out", "{i}"], "--truth is not for this model"),
        (["--workdir={w}", "--program_sizes=24x40", "--show_tokens={f}", "{i}"], "leave out --program_sizes"),
        (["--workdir={w}", "--program_sizes=24y40", "{i}"], "--program_sizes: invalid"),
        (["--workdir={w}", "--depth_scale=256", "{i}"], "--depth_scale goes with --truth"),
        (["--workdir={w}", "--truth={f}", "--depth_scale=0", "{i}"], "must be above 0"),
        (["--workdir={w}", "--truth={w}", "{i}"], "has no a.png for {i} (1 of 1 images"),
        (["--workdir={w}", "--task=depth", "{i}"], "--task goes with --model"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(argv, says, workdir, folder, capsys, tmp_path):
    names = {"w": workdir, "i": folder / "a.png", "f": folder, "c": tmp_path / "digits"}
    if "{c}" in str(argv):
        make_workdir(names["c"])
    status, out, err = run(capsys, *(arg.format(**names) for arg in argv))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and not out
    assert len(errors) == 1 and says.format(**names) in errors[0]
