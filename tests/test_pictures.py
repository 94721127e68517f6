"""Whatever holds an image, a predictor gives what a file of the same pixels gives, or one line that says what to do."""

import dataclasses
import io
import json
import pickle

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import SIZES, small_model
from trained import CLASSES, make_depth_workdir, make_pictures, make_workdir

from tosa_jax import predict
from tosa_jax.data.class_names import read_names
from tosa_jax.data.decoding import BadImageError
from tosa_jax.data.image_files import find_images
from tosa_jax.errors import ConfigError, DataError, NonFiniteOutputError, WeightsError
from tosa_jax.inference import predictor as predictors
from tosa_jax.inference.predictor import Predictor
from tosa_jax.models.weights.load import save_weights
from tosa_jax.tasks.predictions import Prediction
from tosa_jax.tasks.registry import create_model


@pytest.fixture
def unchecked():
    """Types are checked as for users: by the package itself, and not by the tests' hook."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


GREY = np.random.default_rng(1).integers(0, 256, (11, 9), np.uint8)
COLOUR = np.random.default_rng(2).integers(0, 256, (11, 9, 3), np.uint8)


@pytest.fixture(scope="module")
def grey():
    return Predictor(small_model(), mean=0.3, std=0.4, class_names=CLASSES, batch_sizes=(1,))


@pytest.fixture(scope="module")
def colour():
    return Predictor(small_model(in_chans=3), batch_sizes=(1,))


def test_sixteen_bits_are_the_same_from_everywhere(grey, tmp_path):
    wide = GREY.astype(np.uint16) * 257
    path = tmp_path / "wide.png"
    Image.fromarray(wide).save(path)
    with Image.open(path) as opened:
        held = [path, wide, wide[..., None], opened, Image.fromarray(wide), jnp.asarray(wide)]
        for picture in held:
            np.testing.assert_array_equal(grey.prepare(picture), grey.prepare(GREY))
    with pytest.raises(BadImageError, match="mode F has pixels without a known range"):
        grey.prepare(Image.fromarray(GREY.astype(np.float32)))


def test_arrays_of_every_kind_are_the_same_picture(colour, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(COLOUR).save(path)
    expected = colour.prepare(path)
    alpha = np.full((11, 9, 1), 7, np.uint8)
    for picture in (
        COLOUR, COLOUR.astype(np.int64), COLOUR.astype(np.float32) / 255, COLOUR.astype(np.float64) / 255,
        COLOUR.astype(np.uint16) * 257, jnp.asarray(COLOUR), io.BytesIO(path.read_bytes()),
        bytearray(path.read_bytes()),
        np.concatenate([COLOUR, alpha], axis=2), COLOUR[::1, ::1], str(path),
    ):  # fmt: skip
        np.testing.assert_array_equal(colour.prepare(picture), expected)
    repeated = colour.prepare(np.repeat(GREY[..., None], 3, 2))
    for picture in (GREY, GREY[..., None], np.stack([GREY, GREY], axis=2), Image.fromarray(GREY)):
        np.testing.assert_array_equal(colour.prepare(picture), repeated)
    masked = GREY > 99
    np.testing.assert_array_equal(
        colour.prepare(masked), colour.prepare(masked.astype(np.uint8) * 255)
    )


@pytest.mark.parametrize(("picture", "says"), [
    (None, "a NoneType is no image: give a path"),
    ([[1, 2], [3, 4]], "a list is no image"),
    (np.zeros((2, 3, 4, 3), np.uint8), r"an array \[2, 3, 4, 3\] is no image"),
    (np.zeros((2, 3, 5), np.uint8), r"an array \[2, 3, 5\] is no image"),
    (np.zeros((0, 3, 3), np.uint8), "has no pixels"),
    (np.full((2, 2), 300), "int64 pixels from 300 to 300: give uint8, or uint16"),
    (np.full((2, 2), -0.5), "float64 pixels from -0.5 to -0.5: floats are in"),
    (np.full((2, 2), np.nan, np.float32), "float32 pixels from nan"),
    (np.full((2, 2), 1j), "an array of complex128 is no image"),
    (np.full((2, 2), "a"), "an array of <U1 is no image"),
    (io.StringIO("text"), "a stream of text is no image"),
    (b"", "not the bytes of an image"),
])  # fmt: skip
def test_what_is_no_image_is_one_line(grey, picture, says):
    with pytest.raises(BadImageError, match=says) as caught:
        grey.prepare(picture)
    assert "\n" not in str(caught.value)


DTYPES = [np.uint8, np.uint16, np.int8, np.int32, np.bool_, np.float16, np.float32, np.complex64,
          ml_dtypes.bfloat16, "U1", "datetime64[s]", object]  # fmt: skip
MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV",
         "I", "F", "I;16", "I;16B"]  # fmt: skip
SIDES = st.integers(0, 5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(SIDES, max_size=4), st.sampled_from(DTYPES), st.integers(-2, 300))
def test_any_array_gives_pixels_or_one_line(grey, shape, dtype, value):
    with np.errstate(all="ignore"):
        array = np.full(shape, value, np.int64).astype(dtype)
    assert gives_pixels_or_one_line(grey, array)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(MODES), SIDES, SIDES, st.booleans())
def test_any_pil_image_gives_pixels_or_one_line(grey, mode, width, height, turned):
    own = dataclasses.replace(grey.form, exif_rotate=turned)
    try:
        grey.form, form = own, grey.form
        assert gives_pixels_or_one_line(grey, Image.new(mode, (width, height)))
    finally:
        grey.form = form


def gives_pixels_or_one_line(predictor, picture):
    try:
        found = predictor.prepare(picture)
    except BadImageError as error:
        return len(str(error).splitlines()) == 1
    return found.shape == (8, 8, 1) and found.dtype == np.uint8


def test_no_images_are_no_answers_and_one_image_is_not_a_list(grey, unchecked):
    assert grey.classify([]) == []
    for single in ("dog.jpg", b"bytes", Image.fromarray(GREY), io.BytesIO(b"")):
        with pytest.raises(ConfigError, match=r"for a single one write \[image\]"):
            grey.classify(single)
    with pytest.raises(ConfigError, match="k=0 must be at least 1"):
        grey.classify([GREY], k=0)
    with pytest.raises(ConfigError, match="k='3' must be a whole number"):
        grey.classify([GREY], k="3")


def test_other_shapes_and_channels_of_a_model(grey, unchecked):
    wide = Predictor(small_model(image_size=(8, 16)), mean=0.3, std=0.4)
    assert wide.prepare(GREY).shape == (8, 16, 1)
    four = Predictor(small_model(in_chans=4), mean=0.3, std=(0.4,) * 4)
    with pytest.raises(
        ConfigError, match="the model takes 4 channels: call the predictor with arrays"
    ):
        four.prepare(COLOUR)
    with pytest.raises(ConfigError, match=r"mean=.* is not one value for each of 4 channels"):
        Predictor(small_model(in_chans=4))
    with pytest.raises(ConfigError, match=r"std=\[0.4\] must be a number"):
        Predictor(grey.model, mean=0.3, std=[0.4, [0.4]])
    for sizes in (4, ("4",), (), (0,)):
        with pytest.raises(ConfigError, match="batch_sizes"):
            Predictor(grey.model, mean=0.3, std=0.4, batch_sizes=sizes)


@pytest.mark.parametrize(("fields", "says"), [
    ({"image_size": "8"}, "image_size='8' must be a whole number"),
    ({"image_size": (8, "x")}, "image_size='x' must be a whole number"),
    ({"image_size": True}, "image_size=True must be"),
    ({"image_size": (8, 8, 8)}, r"must be one number, or \(height, width\)"),
    ({"num_classes": "5"}, "num_classes='5' must be a whole number"),
    ({"depth": 2.5}, "depth=2.5 must be a whole number"),
    ({"mlp_ratio": "4"}, "mlp_ratio='4' must be a number"),
    ({"keep_rate": "0.5"}, "keep_rate='0.5' must be a number"),
    ({"keep_rate": (0.5, (0.5, 0.2))}, r"keep_rate=\(0.5, 0.2\) must be a number"),
    ({"image_size": (8, (8,))}, r"image_size=\(8,\) must be a whole number"),
    ({"dtype": np.int32}, "is no float that models have"),
    ({"dtype": "float64"}, "dtype='float64' is unknown"),
    ({"class_token": 1}, "class_token=1 must be True or False"),
])  # fmt: skip
def test_fields_of_another_type_are_one_line(fields, says, unchecked):
    with pytest.raises(ConfigError, match=says):
        create_model("vit", **(SIZES | fields))


def test_numbers_of_numpy_and_jax_are_numbers(unchecked):
    own = {"image_size": np.int64(8), "keep_rate": np.float32(0.5), "depth": jnp.int32(4), "num_heads": 2.0,
           "param_dtype": jnp.float32, "dtype": np.dtype("float32"), "class_token": np.bool_(True)}  # fmt: skip
    config = small_model(**own).config
    assert config == small_model(image_size=8, keep_rate=0.5).config
    assert small_model(image_size=np.array([8, 16])).config.image_size == (8, 16)
    assert {type(getattr(config, name)) for name in ("image_size", "depth", "num_heads")} == {int}


def test_a_dtype_that_the_device_does_not_compute_is_one_line():
    with pytest.raises(ConfigError, match="dtype='float16': a CPU does not multiply matrices"):
        Predictor(small_model(dtype="float16"), mean=0.3, std=0.4, batch_sizes=(1,))


def test_a_predictor_that_was_used_can_be_pickled(grey):
    images = np.stack([grey.prepare(GREY)])
    expected = grey(images).logits
    again = pickle.loads(pickle.dumps(grey))
    assert again._programs == {} and again.class_names == CLASSES
    np.testing.assert_array_equal(again(images).logits, expected)


def test_programs_of_many_sizes_are_bounded_and_it_is_said_once(tmp_path, monkeypatch, capsys):
    made = []
    make_depth_workdir(tmp_path)
    own = Predictor.from_workdir(tmp_path, batch_sizes=(1,), on_message=lambda line: None)
    program = jax.jit(lambda x: x).lower(0).compile()
    monkeypatch.setattr(own, "_compile", lambda *key: made.append(key) or program)
    sizes = [(16, 8 * i) for i in range(1, 21)]
    for size in sizes:
        own.program(1, size)
    assert len(own._programs) == predictors.KEPT_PROGRAMS and len(made) == 20
    (said,) = capsys.readouterr().err.splitlines()
    assert "program_sizes=[(24, 40), ...] of Predictor" in said
    own.program(1, sizes[-8])  # still there, and now the newest
    own.program(1, sizes[0])
    assert (
        len(made) == 21
        and (1, *sizes[-8]) in own._programs
        and (1, *sizes[-7]) not in own._programs
    )


def test_what_is_not_finite_is_no_answer(grey):
    with pytest.raises(NonFiniteOutputError, match="logits that are not finite"):
        grey.top(Prediction({"logits": np.full((1, 10), np.nan, np.float32)}, (), ()))


def test_json_has_no_nan(tmp_path, capsys, monkeypatch):
    make_workdir(tmp_path / "run")
    paths = make_pictures(tmp_path / "in", 2)
    nan = {"logits": np.full((1, 10), np.nan, np.float32)}
    monkeypatch.setattr(
        Predictor, "each", lambda self, images: [Prediction(nan, (), ())] * len(images)
    )
    status = predict.main([f"--workdir={tmp_path / 'run'}", "--json", *map(str, paths)])
    records = [
        json.loads(line, parse_constant=pytest.fail)
        for line in capsys.readouterr().out.splitlines()
    ]
    assert (
        status == 1
        and all("not finite" in record["error"] for record in records)
        and len(records) == 2
    )
    assert predict._as_json({"a": [1.0, float("inf")]}) == {"a": [1.0, None]}


def test_a_reader_that_goes_away_ends_it_quietly(tmp_path, capsys, monkeypatch):
    make_workdir(tmp_path / "run")
    paths = make_pictures(tmp_path / "in", 2)
    answer = Prediction({"logits": np.zeros((1, 10), np.float32)}, (), ())
    monkeypatch.setattr(Predictor, "each", lambda self, images: [answer] * len(images))

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    status = predict.main([f"--workdir={tmp_path / 'run'}", "--json", *map(str, paths)])
    assert status == predict.READER_GONE and "Error" not in capsys.readouterr().err


def test_a_folder_is_no_file_to_write(grey, tmp_path):
    with pytest.raises(WeightsError, match="is a folder: name the file to write"):
        grey.save(tmp_path)
    with pytest.raises(WeightsError, match="is a folder"):
        save_weights(grey.model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_class_names_end_with_the_last_name(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("cat\ndog\n\n \n")
    assert read_names(path) == ("cat", "dog")
    path.write_text("cat\n\ndog\n")
    with pytest.raises(DataError, match="line 2 is empty"):
        read_names(path)


def test_a_folder_says_which_files_it_leaves_out(tmp_path):
    for name in ("a.avif", "b.jfif", "c.JPG", "d.heic", "e.txt", ".f.png"):
        (tmp_path / name).write_bytes(b"")
    said = []
    assert [path.name for path in find_images([str(tmp_path)], said.append)] == [
        "a.avif",
        "b.jfif",
        "c.JPG",
    ]
    assert said == [
        f"{tmp_path}: 2 files are not taken for images (.heic, .txt); name a file itself to try it"
    ]


def test_exif_turns_an_image_where_it_is_asked_for(tmp_path, capsys):
    make_workdir(tmp_path / "run")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright, turned = tmp_path / "upright.png", tmp_path / "turned.png"
    Image.fromarray(GREY).save(turned, exif=exif)
    Image.fromarray(np.rot90(GREY, -1)).save(upright)

    def answer(*argv):
        assert predict.main([f"--workdir={tmp_path / 'run'}", "--json", *map(str, argv)]) == 0
        return json.loads(capsys.readouterr().out)["top"]

    assert answer("--exif", turned) == answer(upright) != answer(turned)
