"""Exported programs give what the model gives, without this package; what a folder states is true; or one line."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export as jax_export
from small import SIZES, forward, small_model
from trained import CLASSES, DEPTH_SIZES, make_workdir

import tosa_jax
from tosa_jax import predict
from tosa_jax.data.decoding import Preprocess
from tosa_jax.inference.export import _check_platforms, plain_function
from tosa_jax.inference.predictor import Predictor
from tosa_jax.models.factory import structure
from tosa_jax.models.method import METHODS
from tosa_jax.models.params import set_params
from tosa_jax.models.weights.digests import find_damage
from tosa_jax.ops import attention
from tosa_jax.tasks import model_config

READER = """
import json, sys
from pathlib import Path

import jax
import numpy as np

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tosa_jax", "flax", "safetensors"):
            raise ImportError(f"{name} is forbidden here")

sys.meta_path.insert(0, Forbidden())

def read_weights(path):
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__")
    kinds = {"F32": np.float32, "BF16": jax.numpy.bfloat16}
    def array(said):
        first, last = said["data_offsets"]
        return np.frombuffer(data[start + first:start + last], kinds[said["dtype"]]).reshape(said["shape"])
    return {name: array(said) for name, said in header.items()}

for folder, given, out_file in zip(*[map(Path, sys.argv[1:])] * 3):
    said = json.loads((folder / "config.json").read_text())
    program = jax.export.deserialize(bytearray((folder / said["programs"]["cpu"]).read_bytes()))
    out = program.call(read_weights(folder / said["weights"]), np.load(given))
    found = {name: x for name, x in out.items() if name != "selected"}
    found |= {f"selected{i}": x for i, x in enumerate(out.get("selected", ()))}
    np.savez(out_file, **found)
"""


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def arrays(path):
    with np.load(path) as file:
        return dict(file)


def programs(folder):
    """The exported programs of a folder, by platform."""
    said = json.loads((folder / "config.json").read_text())
    return {
        platform: jax_export.deserialize(bytearray((folder / file).read_bytes()))
        for platform, file in said["programs"].items()
    }


@pytest.fixture(scope="module")
def classifier():
    form = Preprocess(image_size=8, channels=1, resize="crop", crop_pct=0.9)
    model = small_model(keep_rate=0.5, depth=2)
    return Predictor(model, form=form, mean=0.3, std=0.4, class_names=CLASSES, batch_sizes=(3,))


@pytest.fixture(scope="module")
def depth_predictor():
    sizes = DEPTH_SIZES | {"decoder": "dpt", "decoder_widths": (4, 4, 4, 4)}
    model = tosa_jax.create_model(
        "vit", task="depth", depth_estimation_type="relative", plan="selective", keep_rate=0.5,
        rngs=nnx.Rngs(0), **sizes,
    )  # fmt: skip
    return Predictor(model, mean=0.4, std=0.3, batch_sizes=(2,))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, classifier, depth_predictor):
    """An export of a classifier for any number of images, and one of relative depth for two."""
    root = tmp_path_factory.mktemp("exports")
    jax.config.update("jax_traceback_in_locations_limit", 10)  # JAX's default; tests have 0
    try:
        tosa_jax.export(classifier, root / "digits", tokens=True)
        tosa_jax.export(depth_predictor, root / "rooms", batch=2, platforms=["cpu"])
    finally:
        jax.config.update("jax_traceback_in_locations_limit", 0)
    return root / "digits", root / "rooms"


@pytest.mark.subprocess
def test_a_program_gives_elsewhere_what_the_model_gives_here(
    folders, classifier, depth_predictor, tmp_path
):
    shapes, argv = ((3, 8, 8, 1), (2, 24, 40, 3)), []
    for i, (folder, shape) in enumerate(zip(folders, shapes, strict=True)):
        np.save(tmp_path / f"{i}.npy", pixels(*shape))
        argv += [folder, tmp_path / f"{i}.npy", tmp_path / f"{i}.npz"]
    command = [sys.executable, "-c", READER, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, expected = arrays(tmp_path / "0.npz"), classifier(pixels(*shapes[0]))
    assert set(found) == {"logits", "selected0", "tokens"}
    np.testing.assert_allclose(found["logits"], expected.logits, atol=1e-5)
    np.testing.assert_array_equal(found["selected0"], expected.selected[0])
    normal = (jnp.asarray(pixels(*shapes[0])) / 255 - 0.3) / 0.4
    np.testing.assert_allclose(found["tokens"], forward(classifier.model, normal).tokens, atol=1e-5)
    found, expected = arrays(tmp_path / "1.npz"), depth_predictor(pixels(*shapes[1]))
    np.testing.assert_allclose(found["depth"], expected.depth, atol=1e-4)


def test_the_folder_states_what_a_reader_needs(folders):
    digits, rooms = folders
    assert find_damage(digits) == find_damage(rooms) == ""
    said = json.loads((digits / "config.json").read_text())
    assert said["name"] == "digits" and said["class_names"] == list(CLASSES)
    assert said["images"] == {"shape": ["b", 8, 8, 1], "dtype": "uint8"}
    assert said["outputs"] == {
        "logits": {"shape": ["b", 10], "dtype": "float32"},
        "selected": [{"shape": ["b", 9], "dtype": "int32"}],
        "tokens": {"shape": ["b", 17, 16], "dtype": "float32"},
    }
    assert said["preprocessing"] == {
        "input_size": [1, 8, 8], "mean": [0.3], "std": [0.4], "normalised_in_program": True,
        "exif_rotate": False, "crop_mode": "center", "crop_pct": 0.9, "interpolation": "bicubic",
    }  # fmt: skip
    assert said["layers"] == [
        {"kind": "standard", "tokens_in": 17, "tokens": 17, "tokens_out": 17},
        {"kind": "selective", "tokens_in": 17, "tokens": 9, "tokens_out": 17},
    ]
    assert said["versions"]["jax"] == jax.__version__
    said = json.loads((rooms / "config.json").read_text())
    assert said["outputs"]["depth"] == {
        "shape": [2, 24, 40], "dtype": "float32", "unit": "none: relative inverse depth, larger is nearer",
    }  # fmt: skip
    assert said["preprocessing"]["crop_mode"] is None and said["class_names"] == []


def test_the_folder_is_weights_for_this_package_too(folders, classifier):
    again = tosa_jax.load(folders[0], batch_sizes=(3,))
    images = pixels(3, 8, 8, 1)
    np.testing.assert_array_equal(again(images).logits, classifier(images).logits)
    assert again.form == classifier.form and again.class_names == CLASSES


def test_every_platform_has_a_program_of_its_own(folders):
    digits, rooms = map(programs, folders)
    assert {name: p.platforms for name, p in digits.items()} == {
        "cpu": ("cpu",), "cuda": ("cuda",), "tpu": ("tpu",),
    }  # fmt: skip
    assert rooms.keys() == {"cpu"}


def test_programs_have_no_float_scatter_and_static_shapes(folders):
    _, rooms = folders
    for folder in folders:
        for program in programs(folder).values():
            text = program.mlir_module()
            # The module's arguments are what the page on export says: every weight, then the images.
            assert program.module_kept_var_idx == tuple(range(len(program.in_avals)))
            assert "stablehlo.dot_general" in text and not re.search(r"stablehlo.\w*scatter", text)
    static = programs(rooms)["cpu"].mlir_module()
    assert not re.findall(
        r"tensor<[^>]*\?|stablehlo\.(?:real_)?dynamic_(?!slice|update)\w+", static
    )


def test_programs_hold_no_paths_of_this_machine(folders):
    for path in [path for folder in folders for path in folder.glob("*.jax_export")]:
        assert b"/tosa_jax/" not in path.read_bytes() and b".py" not in path.read_bytes()


def test_kernels_for_a_tpu_go_out_and_those_for_a_gpu_do_not(tmp_path, monkeypatch):
    sizes = {"embed_dim": 64, "num_heads": 2, "depth": 1, "dtype": "bfloat16", "plan": "standard"}
    predictor = Predictor(small_model(**sizes), mean=0.3, std=0.4)
    tosa_jax.export(predictor, tmp_path / "tpu", batch=1, platforms="tpu")
    assert "tpu_custom_call" in programs(tmp_path / "tpu")["tpu"].mlir_module()

    def kernel(*_):
        raise NotImplementedError("a kernel for a GPU")

    monkeypatch.setattr(attention, "_has_cuda", lambda: True)  # as on a machine with one
    monkeypatch.setattr(attention.gpu_attention, "attention", kernel)
    images = jax.ShapeDtypeStruct((1, 8, 8, 1), np.uint8)
    with pytest.raises(NotImplementedError, match="a kernel for a GPU"):
        jax.eval_shape(predictor.output, predictor._params, images)
    tosa_jax.export(predictor, tmp_path / "cuda", batch=1, platforms="cuda")
    assert "custom_call" not in programs(tmp_path / "cuda")["cuda"].mlir_module()


def test_a_plain_function_chooses_no_platform(classifier):
    images = jnp.asarray(pixels(3, 8, 8, 1))

    def chooses(function):
        return "platform_index" in str(jax.make_jaxpr(function)(images))

    plain = plain_function(classifier)
    assert chooses(lambda x: classifier.output(classifier._params, x).logits) and not chooses(plain)
    np.testing.assert_allclose(
        jax.jit(plain)(images)["logits"], classifier(np.asarray(images)).logits, atol=1e-5
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_any_number_of_images(name):
    method, kind = METHODS[name], METHODS[name].plan
    plan = {"standard": "standard", "psvit_share": ("psvit", kind)}.get(kind, ("standard", kind))
    fields = SIZES | {"plan": plan, "depth": 2, "keep_rate": 0.7} | method.fields
    graphdef, params = structure(model_config("classification", "vit", **fields))

    def forward(params, images):
        return set_params(graphdef, params)(images, key=jax.random.key(0)).logits

    images = jax.ShapeDtypeStruct(jax_export.symbolic_shape("b, 8, 8, 1"), jnp.float32)
    assert str(jax.eval_shape(forward, params, images).shape) == "(b, 10)"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"platforms": ["cpu", "gpu"]},
            "platforms='gpu' is unknown; known: cpu, cuda (NVIDIA GPUs), tpu",
        ),
        ({"platforms": []}, "platforms is empty: name some of cpu, cuda, tpu"),
        ({"batch": 0}, "batch=0 must be at least 1, or None for any number of images"),
        ({"folder": "there"}, "there exists: name a folder that does not"),
        ({"folder": "file/x"}, "is a file"),
        ({"folder": "gs://bucket/x"}, "is in a bucket: export to a local folder, and copy it"),
    ],
)
def test_bad_input_is_one_line(fields, says, classifier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(tosa_jax.UserError, match=re.escape(says)):
        tosa_jax.export(classifier, **{"folder": "new", **fields})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "there"]


def test_float16_is_not_for_a_cpu(classifier):
    config = dataclasses.replace(classifier.config, dtype="float16")
    _check_platforms(("cuda", "tpu"), config)
    with pytest.raises(
        tosa_jax.UserError, match="'cpu', which does not multiply matrices of float16"
    ):
        _check_platforms(("cuda", "cpu"), config)


def test_a_failure_leaves_nothing(folders, depth_predictor, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tosa_jax.inference.export.write_digests", full)
    with pytest.raises(OSError, match="No space"):
        tosa_jax.export(depth_predictor, tmp_path / "x/rooms", batch=2, platforms="cpu")
    assert list((tmp_path / "x").iterdir()) == []


def test_the_command_exports(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    make_workdir(tmp_path / "run", depth=1, plan="standard")
    argv = [f"--workdir={tmp_path / 'run'}", f"--export={tmp_path / 'out'}"]
    assert predict.main([*argv, "--batch=2", "--platforms=cpu", "--image_size=4"]) == 0
    assert capsys.readouterr().err.endswith(f"written: {tmp_path / 'out'}, for cpu\n")
    program = programs(tmp_path / "out")["cpu"]
    assert str(program.in_avals[-1]) == "uint8[2,4,4,1]"
    for wrong, says in (
        (["--batch=2", "x.png"], "--batch goes with --export=DIR"),
        (["--export=a", "--image_size=1,2,3"], "--image_size"),
    ):
        assert predict.main([argv[0], *wrong]) == 2
        assert says in capsys.readouterr().err
