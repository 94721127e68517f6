"""The predict command from outside: what it prints, which files it writes, how it ends."""

import json

import numpy as np
import pytest
from PIL import Image
from small import small_model
from trained import CLASSES, make_pictures, make_workdir
from weight_samples import tiny_weights, write

from tosa_jax import predict
from tosa_jax.data.class_names import default_names, imagenet_classes, readable
from tosa_jax.data.image_files import find_images, read_ahead
from tosa_jax.errors import DataError
from tosa_jax.inference.predictor import Predictor
from tosa_jax.models.weights.load import save_weights


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    make_workdir(path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    make_pictures(tmp_path / "in")
    return tmp_path / "in"


def run(capsys, *argv):
    status = predict.main([str(arg) for arg in argv])
    return status, *capsys.readouterr()


def test_json_has_the_top_classes_of_every_image_in_order(workdir, folder, capsys):
    status, out, _ = run(
        capsys, f"--workdir={workdir}", "--json", "--top=3", "--batch_size=2", folder
    )
    assert status == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [r["image"] for r in records] == [str(folder / f"{i}.png") for i in range(3)]
    own = Predictor.from_workdir(workdir, on_message=lambda line: None, batch_sizes=(2,))
    for record, expected in zip(records, own.classify(sorted(folder.iterdir()), 3), strict=True):
        assert [(g["class"], g["name"]) for g in record["top"]] == [g[:2] for g in expected]
        values = [g["probability"] for g in record["top"]]
        np.testing.assert_allclose(values, [g.probability for g in expected], rtol=1e-5)


def test_text_is_a_table_under_each_image(workdir, folder, capsys):
    status, out, _ = run(capsys, f"--workdir={workdir}", "--top=2", folder / "0.png")
    first, *guesses = out.splitlines()
    assert status == 0 and first == str(folder / "0.png") and len(guesses) == 2
    assert all(line.split("  ")[1] in CLASSES and line.endswith("%") for line in guesses)


def test_a_file_that_is_no_image_is_told_and_the_rest_go_on(workdir, folder, capsys):
    (folder / "1.png").write_text("not a picture")
    status, out, err = run(capsys, f"--workdir={workdir}", "--json", "--batch_size=2", folder)
    assert status == 1
    records = [json.loads(line) for line in out.splitlines()]
    assert ["error" in r for r in records] == [False, True, False]
    assert f"{folder / '1.png'}: cannot be read as an image" in err
    others = [folder / "0.png", folder / "2.png"]
    alone = run(capsys, f"--workdir={workdir}", "--json", "--batch_size=2", *others)[1]
    assert [records[0], records[2]] == [json.loads(line) for line in alone.splitlines()]


def test_pictures_of_tokens_are_written_at_the_budget_asked_for(workdir, folder, capsys, tmp_path):
    other = make_pictures(tmp_path / "more", 1)[0]  # of the same name as one in the folder
    argv = [f"--workdir={workdir}", f"--show_tokens={tmp_path / 'out'}", "--json", folder, other]
    status, out, _ = run(capsys, *argv)
    assert status == 0
    names = [json.loads(line)["tokens"] for line in out.splitlines()]
    assert [name.rpartition("/")[2] for name in names] == ["0.png", "1.png", "2.png", "0-2.png"]
    with Image.open(names[0]) as picture:
        half = np.asarray(picture)
    # The picture and two selections across; below them the key and two score maps.
    assert half.shape[0] > 2 * 112 and half.shape[1] > 3 * 112
    run(capsys, *argv, "--keep_rate=.25")
    with Image.open(names[0]) as picture:
        assert (np.asarray(picture) != half).any()


def test_a_file_of_weights_alone_is_enough(workdir, folder, capsys, tmp_path):
    saved = tmp_path / "all.safetensors"
    status, *_ = run(capsys, f"--workdir={workdir}", f"--save={saved}")
    assert status == 0
    old = tmp_path / "old.safetensors"
    assert run(capsys, f"--workdir={workdir}", f"--export={old}")[0] == 0  # before there was --save
    assert old.read_bytes() == saved.read_bytes()
    alone = run(capsys, f"--weights={saved}", "--json", folder)
    assert alone[:2] == run(capsys, f"--workdir={workdir}", "--json", folder)[:2]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["x.png"], "give --workdir=DIR of a run, or --weights=FILE"),
        (["--workdir={w}", "--weights=f", "x.png"], "give --workdir=DIR of a run, or"),
        (["--workdir={w}"], "name at least one image"),
        (["--workdir={w}", "nowhere.png"], "nowhere.png: no such file or folder"),
        (["--workdir={w}", "*.nothing"], "*.nothing: no file matches"),
        (["--workdir={w}", "{empty}"], "no images in this folder"),
        (["--workdir={empty}", "{i}"], "not the work directory of a run"),
        (["--workdir={w}", "--keep_rate=2", "{i}"], "keep_rate=2.0 is not in (0, 1]"),
        (["--workdir={w}", "--keep_rate=.5,.5,.5", "{i}"], "3 values, but the plan makes 2"),
        (["--workdir={w}", "--keep_rate=x", "{i}"], "--keep_rate"),
        (["--workdir={w}", "--tops=3", "{i}"], "unexpected argument '--tops=3'"),
        (["--workdir={w}", "--top=0", "{i}"], "--top=0 must be at least 1"),
        (["--workdir={w}", "--classes=f", "{i}"], "--classes goes with --weights"),
        (["--weights=nowhere.pth", "--model=deit_tiny_patch16_224", "{i}"], "nowhere.pth does not exist"),
        (["--weights=nowhere.pth", "--model=deit_tiny", "{i}"], "known: deit_tiny_patch16_224"),
        (["--weights={f}", "--model=deit_tiny_patch16_224", "{i}"], "is for another network than the model"),
        (["--weights={bare}", "{i}"], "does not state its network: name it (--model=NAME"),
        (["--workdir={dense}", "--show_tokens={empty}", "{i}"], "selects no tokens"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(argv, says, workdir, folder, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    names = {"w": workdir, "i": folder / "0.png", "empty": tmp_path / "empty"}
    if "{f}" in str(argv):
        save_weights(small_model(), tmp_path / "w.safetensors")
        names["f"] = tmp_path / "w.safetensors"
    if "{bare}" in str(argv):
        names["bare"] = write(tmp_path / "bare", tiny_weights())
    if "{dense}" in str(argv):
        make_workdir(tmp_path / "dense", plan="standard")
        names["dense"] = tmp_path / "dense"
    status, out, err = run(capsys, *(arg.format(**names) for arg in argv))
    error = err.strip().splitlines()[-1]
    assert status == 2 and not out
    assert error.startswith("error: ") and says in error
    assert len([line for line in err.splitlines() if line.startswith("error")]) == 1


def test_files_are_found_once_in_order_and_hidden_ones_left_out(tmp_path):
    make_pictures(tmp_path / "a/deep", 2)
    make_pictures(tmp_path / "a/.hidden", 1)
    (tmp_path / "a/notes.txt").write_text("no image")
    names = [str(tmp_path / "a/deep/1.png"), str(tmp_path / "a"), str(tmp_path / "a/*/0.png")]
    found = [str(path.relative_to(tmp_path)) for path in find_images(names)]
    assert found == ["a/deep/1.png", "a/deep/0.png"]
    # A file that is named is taken, whatever it is called.
    assert find_images([str(tmp_path / "a/notes.txt")]) == [tmp_path / "a/notes.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in this folder"):
        find_images([str(tmp_path / "empty")])


def test_reading_ahead_keeps_the_order_and_a_bound(tmp_path):
    paths = [tmp_path / str(i) for i in range(9)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]))
    started: list[int] = []

    def decode(data):
        started.append(data[0])
        return np.array([data[0]])

    reader = read_ahead(paths, decode, threads=3, ahead=2)
    values = []
    for path, value in reader:
        values.append((path.name, int(value[0])))
        assert len(started) <= len(values) + 2
    assert values == [(str(i), i) for i in range(9)]


def test_a_file_that_vanished_is_an_error_of_its_own(tmp_path):
    paths = [*make_pictures(tmp_path, 1), tmp_path / "gone.png"]
    kinds = [type(x).__name__ for _, x in read_ahead(paths, lambda b: np.zeros(1), ahead=4)]
    assert kinds == ["ndarray", "BadImageError"]


def test_the_names_of_imagenet_are_in_the_order_of_its_labels():
    import tensorflow_datasets as tfds

    names = tfds.builder_cls("imagenet2012")(data_dir="/none").info.features["label"].names
    assert list(imagenet_classes()) == names
    assert readable(["n02504458", "mine"]) == ("African elephant", "mine")
    assert default_names(1000)[388] == "giant panda" and default_names(2) == ("class 0", "class 1")
