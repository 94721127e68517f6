"""Released weights: exactness against PyTorch (golden/), every format, every bad file."""

import io
import json
import pickle
import re
import sys
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from golden import make_pretrained as golden

from tosa_jax.cost import abstract_model
from tosa_jax.errors import WeightsError
from tosa_jax.models.networks import create_model
from tosa_jax.models.params import get_params, split
from tosa_jax.models.positions import resample_positions
from tosa_jax.models.pretrained import (
    load_pretrained,
    pretrained_params,
    save_selectors,
    save_weights,
)
from tosa_jax.models.torch_files import read_torch_file
from tosa_jax.models.vit_config import variant_config

GOLDEN = Path(__file__).parent / "golden"
LOGITS = np.load(GOLDEN / "pretrained.npz")
RESAMPLED = np.load(GOLDEN / "torch_resampled.npz")
# A network of every part that files have, small enough to load often.
TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "image_size": 32, "patch_size": 8}
TINY["num_classes"] = 5


def tiny(seed: int = 0, **fields):
    return create_model("vit", rngs=nnx.Rngs(seed), **(TINY | fields))


def tiny_weights(**fields) -> dict[str, np.ndarray]:
    """timm's state dict for `tiny(**fields)`."""
    return golden.random_weights(golden.timm_shapes(variant_config("vit", **(TINY | fields))))


def write(path: Path, arrays: dict[str, np.ndarray], **metadata: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    path.write_bytes(safetensors.numpy.save(arrays, metadata or None))
    return path


def same(a, b) -> bool:
    a, b = get_params(a), get_params(b)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a
    )


def assert_refused(model, path, match: str, **kwargs) -> None:
    """One line that matches, and the model as it was."""
    before = {name: np.asarray(x) for name, x in get_params(model).items()}
    with pytest.raises(WeightsError, match=match) as caught:
        load_pretrained(model, path, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900
    assert all(np.array_equal(x, before[name]) for name, x in get_params(model).items())


# ---- Exactness ----


@pytest.mark.parametrize("key", LOGITS.files)
def test_logits_equal_pytorchs(key: str, tmp_path: Path) -> None:
    name, way, size = key.split("/")
    fields = golden.GOLDEN[name] | {"depth": golden.GOLDEN_DEPTH}
    config = variant_config(name, **fields)
    weights = golden.random_weights(golden.timm_shapes(config))
    arrays = golden.hf_names(config, weights) if way == "transformers" else weights
    path = write(tmp_path / "weights.safetensors", arrays)
    fields |= golden.hf_fields(config) if way == "transformers" else {}
    fields.pop("image_size", None)
    found = golden.our_logits(name, int(size), path, weights, **fields)
    assert np.abs(found - LOGITS[key]).max() <= 2e-5


def test_the_measured_differences_keep_to_the_limits() -> None:
    results = Path(__file__).parents[1] / "results" / "pretrained_exactness.json"
    variants = json.loads(results.read_text())["variants"]
    for name, depths in variants.items():
        for differences in depths.values():
            assert max(differences.values()) <= (1e-4 if "giant" in name else 2e-5), name
    assert len(variants) == 23


@pytest.mark.parametrize("key", [key for key in RESAMPLED.files if "/" in key])
def test_positions_are_resampled_as_torch_does(key: str) -> None:
    how, new = key.split("/")
    out = resample_positions(RESAMPLED["before"], (int(new), int(new)), how)
    np.testing.assert_allclose(out, RESAMPLED[key], rtol=0, atol=2e-6)


def test_rows_and_columns_are_kept_apart() -> None:
    ramp = np.broadcast_to(np.arange(5, dtype=np.float32)[:, None], (5, 5)).reshape(1, 25, 1)
    out = resample_positions(ramp, (4, 7), "bicubic").reshape(4, 7)
    assert (np.diff(out[:, 0]) > 0).all() and np.ptp(out, axis=1).max() < 1e-5


# ---- Formats ----


@pytest.mark.parametrize("name", ["torch_zip.pth", "torch_legacy.pth"])
def test_torch_files_are_read_as_torch_reads_them(name: str) -> None:
    arrays, under = read_torch_file(GOLDEN / name)
    expected = np.load(GOLDEN / "torch_expected.npz")
    assert under == "model" and sorted(arrays) == sorted(expected.files)
    for key in expected.files:
        np.testing.assert_array_equal(arrays[key].astype(np.float32), expected[key])
    dtypes = {"half": np.float16, "bfloat16": ml_dtypes.bfloat16, "double": np.float64}
    for key, dtype in dtypes.items():
        assert arrays[key].dtype == dtype


class _Global:
    """Pickles as a reference to a name that need not exist here."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _TorchPickler(pickle._Pickler):
    """Writes what torch.save writes, from NumPy arrays."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, _Global):
            return self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        if isinstance(obj, np.ndarray):
            key = str(len(self.arrays))
            self.arrays.append(np.ascontiguousarray(obj))
            strides = tuple(step // obj.itemsize for step in self.arrays[-1].strides)
            self.save(_Global("torch._utils", "_rebuild_tensor_v2"))
            self.write(pickle.MARK)
            storage = ("storage", _Global("torch", "FloatStorage"), key, "cpu", obj.size)
            super().save(storage, False)
            self.write(pickle.BINPERSID)
            for part in (self.offset, obj.shape, strides, False, None):
                super().save(part)
            return self.write(pickle.TUPLE + pickle.REDUCE)
        return super().save(obj, save_persistent_id)


def write_pth(path: Path, tree, offset: int = 0) -> Path:
    """A zip as torch.save writes it."""
    stream = io.BytesIO()
    pickler = _TorchPickler(stream, 2)
    pickler.arrays, pickler.offset = [], offset
    pickler.dump(tree)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        for i, array in enumerate(pickler.arrays):
            archive.writestr(f"archive/data/{i}", array.tobytes())
    return path


@pytest.mark.parametrize("under", ["", "model", "state_dict", "model_ema"])
def test_a_pth_is_read_plain_or_wrapped(under: str, tmp_path: Path) -> None:
    weights = tiny_weights()
    tree = {under: weights, "epoch": 3} if under else weights
    if under == "model_ema":
        tree["model"] = {name: 0 * x for name, x in weights.items()}
    said = []
    model = load_pretrained(tiny(), write_pth(tmp_path / "a.pth", tree), on_message=said.append)
    straight = load_pretrained(tiny(1), write(tmp_path / "a.safetensors", weights))
    assert same(model, straight)
    assert [("averaged" in line) for line in said] == [True] * (under == "model_ema")


def test_the_table_of_transposes(tmp_path: Path) -> None:
    weights = tiny_weights()
    params = get_params(load_pretrained(tiny(), write(tmp_path / "w", weights)))
    qkv = weights["blocks.1.attn.qkv.weight"]
    np.testing.assert_array_equal(params["blocks/1/attn/qkv/kernel"], qkv.T)
    np.testing.assert_array_equal(params["blocks/0/norm2/scale"], weights["blocks.0.norm2.weight"])
    patch = weights["patch_embed.proj.weight"]
    np.testing.assert_array_equal(params["patch_embed/proj/kernel"][8 * 3 + 1], patch[:, 1, 1, 0])


def test_dinov2s_original_names_are_timms(tmp_path: Path) -> None:
    fields = {"mlp": "swiglu", "layer_scale": 1.0, "reg_tokens": 4}
    theirs = tiny_weights(**fields)
    timm = dict(theirs)
    positions = theirs["pos_embed"]
    del theirs["reg_token"]
    renamed = {
        re.sub(r"^blocks\.(\d)\.", r"backbone.blocks.0.\1.", name)
        .replace(".fc1.", ".w12.")
        .replace(".fc2.", ".w3."): x
        for name, x in theirs.items()
        if name != "pos_embed"
    }
    renamed |= {"register_tokens": timm["reg_token"], "mask_token": np.ones((1, 16), np.float32)}
    renamed |= {"dino_head.mlp.0.weight": np.ones((3, 3), np.float32)}
    # DINOv2 has a position for the class token and none for the registers.
    renamed["pos_embed"] = np.delete(positions, slice(1, 5), axis=1)
    timm["cls_token"] = timm["cls_token"] + positions[:, :1]
    timm["pos_embed"] = positions[:, 5:]
    fields["pos_embed_prefix"] = False
    a = load_pretrained(tiny(**fields), write(tmp_path / "a", renamed))
    b = load_pretrained(tiny(1, **fields), write(tmp_path / "b", timm))
    assert same(a, b)


def test_positions_without_prefix_give_a_model_with_them_zeros(tmp_path: Path) -> None:
    weights = tiny_weights(pos_embed_prefix=False)
    positions = get_params(load_pretrained(tiny(), write(tmp_path / "a", weights)))["pos_embed"]
    assert not positions[:, 0].any()
    np.testing.assert_array_equal(positions[:, 1:], weights["pos_embed"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_and_load_give_identical_parameters(dtype: str, tmp_path: Path) -> None:
    fields = {"keep_rate": 0.5, "layer_scale": 0.1, "param_dtype": dtype}
    model, said = tiny(**fields), []
    load_pretrained(model, write(tmp_path / "a", tiny_weights(**fields)))
    save_weights(model, tmp_path / "own.safetensors")
    again = load_pretrained(tiny(1, **fields), tmp_path / "own.safetensors", on_message=said.append)
    assert same(model, again) and not said
    with safetensors.safe_open(tmp_path / "own.safetensors", "numpy") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {dtype}
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a", "own.safetensors"]


def test_a_file_of_half_precision_takes_the_models_dtype(tmp_path: Path) -> None:
    weights = {name: x.astype(ml_dtypes.bfloat16) for name, x in tiny_weights().items()}
    params = get_params(load_pretrained(tiny(), write(tmp_path / "a", weights)))
    assert {x.dtype for x in params.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params["norm/bias"], weights["norm.bias"].astype(np.float32))


def test_shards_and_folders_of_transformers(tmp_path: Path) -> None:
    config = variant_config("vit", **TINY)
    arrays = golden.hf_names(config, tiny_weights())
    whole = load_pretrained(tiny(), write(tmp_path / "a" / "model.safetensors", arrays).parent)
    names = sorted(arrays)
    shards = {"x.safetensors": names[::2], "y.safetensors": names[1::2]}
    for shard, part in shards.items():
        write(tmp_path / "b" / shard, {name: arrays[name] for name in part})
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (tmp_path / "b" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(whole, load_pretrained(tiny(1), tmp_path / "b"))
    assert same(whole, load_pretrained(tiny(1), write(tmp_path / "timm", tiny_weights())))
    (tmp_path / "b" / "y.safetensors").unlink()
    assert_refused(tiny(), tmp_path / "b", "names y.safetensors, which is not beside it")


def test_a_checkpoint_gives_the_average_over_the_trained_over_the_frozen(tmp_path: Path) -> None:
    import optax

    from tosa_jax.checkpoints import Checkpoints
    from tosa_jax.steps import TrainState, trained_params

    params = get_params(tiny(3, keep_rate=0.5))
    frozen = {name: params.pop(name) for name in list(params) if name.startswith("kinds/")}
    ema = {name: x + 1 for name, x in params.items()}
    opt = optax.adamw(1e-3).init(params)
    state = TrainState(jnp.int32(7), params, frozen, opt, ema, {"a": jnp.ones(2)})
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "finetune", "acc1")
    # The best and the newest are kept: it is the newest that counts.
    checkpoints.save(4, state._replace(ema=params), {"done": False}, {"acc1": 0.9})
    checkpoints.save(7, state, {"done": True}, {"acc1": 0.1})
    checkpoints.wait()
    checkpoints.close()
    stage = tmp_path / "checkpoints" / "finetune"
    for path in (tmp_path, stage, stage / "7"):
        said = []
        model = load_pretrained(tiny(keep_rate=0.5), path, on_message=said.append)
        expected = trained_params(state)
        assert all(np.array_equal(x, expected[name]) for name, x in get_params(model).items())
        assert "stage finetune" in said[0]
    said = []
    load_pretrained(tiny(), tmp_path, on_message=said.append)
    assert any("selectors are not used" in line for line in said)


# ---- Selectors ----


def test_released_files_leave_selectors_alone(tmp_path: Path) -> None:
    model = tiny(keep_rate=0.5)
    before = {k: np.asarray(x) + 1 for k, x in get_params(model).items() if k.startswith("kinds/")}
    model.kinds[1].selector.conv1.kernel[...] = before["kinds/1/selector/conv1/kernel"]
    load_pretrained(model, write(tmp_path / "a", tiny_weights()))
    name = "kinds/1/selector/conv1/kernel"
    np.testing.assert_array_equal(get_params(model)[name], before[name])


def test_selectors_travel_alone(tmp_path: Path) -> None:
    source, path = tiny(keep_rate=0.5, plan="selective_fit"), tmp_path / "s.safetensors"
    source.kinds[1].selector.conv2.bias[...] = jnp.arange(2.0)
    save_selectors(source, path)
    assert path.stat().st_size < 2000
    assert safetensors.safe_open(path, "numpy").metadata()["kernel_size"] == "1"
    model = tiny(1, keep_rate=0.5)
    before = get_params(model)
    load_pretrained(model, selectors=path)
    np.testing.assert_array_equal(model.kinds[1].selector.conv2.bias[...], jnp.arange(2.0))
    assert np.array_equal(get_params(model)["norm/bias"], before["norm/bias"])
    both = tiny(2, keep_rate=0.5)
    load_pretrained(both, write(tmp_path / "a", tiny_weights()), selectors=path)
    np.testing.assert_array_equal(both.kinds[1].selector.conv2.bias[...], jnp.arange(2.0))


@pytest.mark.parametrize(("fields", "match"), [
    ({"keep_rate": 0.5, "kernel_size": 3}, "kernel_size is 1 in the file and 3 in the model"),
    ({"keep_rate": 0.5, "selector_hidden": 6}, "hidden is 4 in the file and 6"),
    ({"keep_rate": 0.5, "num_heads": 4}, "num_heads is 2 in the file and 4"),
    ({"keep_rate": 0.5, "depth": 4}, "layers is 1 in the file and 1,3"),
    ({}, "layers is 1 in the file and none"),
])  # fmt: skip
def test_selectors_of_another_model_are_refused(fields, match: str, tmp_path: Path) -> None:
    save_selectors(tiny(keep_rate=0.5), tmp_path / "s")
    assert_refused(tiny(**fields), None, match, selectors=tmp_path / "s")


def test_what_holds_no_selectors_is_refused(tmp_path: Path) -> None:
    weights = write(tmp_path / "a", tiny_weights())
    assert_refused(tiny(keep_rate=0.5), None, "holds no selectors", selectors=weights)
    with pytest.raises(WeightsError, match="has no selectors to save"):
        save_selectors(tiny(), tmp_path / "s")
    with pytest.raises(WeightsError, match="needs a path"):
        load_pretrained(tiny())


# ---- Heads ----


@pytest.mark.parametrize(("change", "reason"), [
    (lambda w: w | {"head.weight": np.ones((7, 16), "f4"), "head.bias": np.ones(7, "f4")},
     "the file's has 7 classes, the model 5"),
    (lambda w: {k: v for k, v in w.items() if "head" not in k}, "the file has none"),
    (lambda w: w | {"head.weight": np.ones((5, 32), np.float32)}, "class token and the mean"),
])  # fmt: skip
def test_another_head_stays_random_and_is_said_once(change, reason: str, tmp_path: Path) -> None:
    said, model = [], tiny()
    head = np.asarray(model.head.kernel[...])
    load_pretrained(model, write(tmp_path / "a", change(tiny_weights())), on_message=said.append)
    assert len(said) == 1 and reason in said[0] and "untrained" in said[0]
    np.testing.assert_array_equal(model.head.kernel[...], head)
    assert not np.array_equal(model.head.bias[...], np.ones(5))


def test_both_heads_of_a_distilled_network_stay_random_in_one_message(tmp_path: Path) -> None:
    said, weights = [], tiny_weights(distilled=True, num_classes=7)
    load_pretrained(tiny(distilled=True), write(tmp_path / "a", weights), on_message=said.append)
    assert len(said) == 1


def test_abstract_models_show_what_would_be_loaded(tmp_path: Path) -> None:
    config = variant_config("vit", **TINY, plan="selective", keep_rate=0.5)
    weights = tiny_weights(num_classes=7)
    path = write(tmp_path / "a", weights)
    params = pretrained_params(abstract_model(config), path, on_message=lambda _: None)
    own = split(abstract_model(config))[1]
    assert {x.split("/")[0] for x in own.keys() - params.keys()} == {"kinds", "head"}


def test_parameters_keep_their_sharding(tmp_path: Path) -> None:
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((8,), ("data",))
    model = tiny()
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    model.norm.bias.set_value(jax.device_put(model.norm.bias[...], sharding))
    load_pretrained(model, write(tmp_path / "a", tiny_weights()))
    assert model.norm.bias[...].sharding == sharding


# ---- What does not fit ----


def test_names_are_listed_up_to_eight(tmp_path: Path) -> None:
    weights = tiny_weights(depth=4)
    weights["extra.weight"] = np.ones((2, 2), np.float32)
    del weights["norm.bias"]
    weights["cls_token"] = np.ones((1, 1, 17), np.float32)
    model = tiny()
    match = (
        r"missing: norm/bias; left over: blocks/2.* and 17 more; "
        r"of another shape: cls_token \(file \[1, 1, 17\], model \[1, 1, 16\]\)"
    )
    assert_refused(model, write(tmp_path / "a", weights), match)


@pytest.mark.parametrize(("theirs", "ours", "match"), [
    ({"embed_dim": 32}, {}, "of another shape: blocks/0/attn/proj/bias .* and 22 more"),
    ({"depth": 3}, {}, "left over: blocks/2"),
    ({}, {"depth": 3}, "missing: blocks/2"),
    ({"distilled": True}, {}, "left over: dist_token, head_dist.* another shape: pos_embed"),
    ({}, {"distilled": True}, "missing: dist_token; of another shape: pos_embed"),
    ({"layer_scale": 1.0}, {}, "left over: blocks/0/ls1/gamma"),
    ({}, {"layer_scale": 1.0}, "missing: blocks/0/ls1/gamma"),
    ({"patch_size": 4, "image_size": 16}, {}, "another shape: patch_embed/proj/kernel"),
    ({"reg_tokens": 4, "pos_embed_prefix": False}, {}, "left over: reg_token"),
])  # fmt: skip
def test_the_wrong_variant_is_refused(theirs, ours, match: str, tmp_path: Path) -> None:
    assert_refused(tiny(**ours), write(tmp_path / "a", tiny_weights(**theirs)), match)


def damaged_pth(path: Path) -> bytes:
    data = bytearray(write_pth(path, tiny_weights()).read_bytes())
    data[len(data) // 2] ^= 1
    return bytes(data)


@pytest.mark.parametrize(("make", "match"), [
    (lambda p: (GOLDEN / "torch_zip.pth").read_bytes()[:-900], "damaged or cut short"),
    (lambda p: (GOLDEN / "torch_legacy.pth").read_bytes()[:-40], "cut short .*bytes are missing"),
    (lambda p: (GOLDEN / "torch_legacy.pth").read_bytes()[:300], "damaged or cut short"),
    (damaged_pth, "damaged or cut short .*CRC"),
    (lambda p: write(p, tiny_weights()).read_bytes()[:-1], "damaged or cut short"),
    (lambda p: write(p, tiny_weights()).read_bytes()[:40], "damaged or cut short"),
    (lambda p: b"", "is empty"),
    (lambda p: b"<!DOCTYPE html><html><body>404", "is a web page"),
    (lambda p: b"\n <html>", "is a web page"),
    (lambda p: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    (lambda p: pickle.dumps({"a": 1}), "not one that torch.save wrote"),
    (lambda p: b"\x93NUMPY\x01\x00v\x00{'descr'", "neither a .pth nor a .safetensors"),
    (lambda p: write_pth(p, [1, 2]).read_bytes(), "holds no state dict, only: list"),
    (lambda p: write_pth(p, {"epoch": 1}).read_bytes(), "holds no state dict, only: epoch"),
    (lambda p: write_pth(p, tiny_weights(), offset=1).read_bytes(), "lies outside"),
])  # fmt: skip
def test_bad_files_are_one_clear_line(make, match: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(make(tmp_path / "made"))
    assert_refused(tiny(), path, match)


def test_other_zips_and_missing_paths(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    assert_refused(tiny(), tmp_path / "a.npz", "not one that torch.save wrote")
    with zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        with zipfile.ZipFile(GOLDEN / "torch_zip.pth") as real:
            for name in real.namelist():
                bomb.writestr(name, real.read(name))
    assert_refused(tiny(), tmp_path / "b.pth", "compressed zip file")
    assert_refused(tiny(), tmp_path / "none.pth", "does not exist")
    assert_refused(tiny(), tmp_path, "without model.safetensors, pytorch_model.bin or checkpoints")


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_runs_nothing(legacy: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    data = pickle.dumps({"model": Evil(marker)}, 2)
    pickle.loads(data)["model"].close()
    assert marker.exists()  # the pickle works where it is allowed to
    marker.unlink()
    if legacy:
        from tosa_jax.models.torch_files import LEGACY_MAGIC

        facts = [LEGACY_MAGIC, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(x, 2) for x in facts) + data + pickle.dumps([], 2))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
    assert_refused(tiny(), path, r"asks to run io.open .* nothing was run")
    assert not marker.exists()


# ---- config.json, hub ----


def hf_folder(path: Path, **changes) -> Path:
    config = variant_config("vit", **TINY)
    write(path / "model.safetensors", golden.hf_names(config, tiny_weights()))
    facts = {"model_type": "vit", "num_attention_heads": 2, "hidden_act": "gelu", "patch_size": 8}
    (path / "config.json").write_text(json.dumps(facts | {"layer_norm_eps": 1e-6} | changes))
    return path


@pytest.mark.parametrize(("changes", "match"), [
    ({"num_attention_heads": 4}, r"pass num_heads=4 to create_model \(it has num_heads=2\)"),
    ({"hidden_act": "gelu_pytorch_tanh"}, "pass mlp='gelu_tanh'"),
    ({"layer_norm_eps": 1e-3}, "pass norm_eps=0.001"),
])  # fmt: skip
def test_a_config_of_another_function_names_the_field(changes, match, tmp_path: Path) -> None:
    assert_refused(tiny(), hf_folder(tmp_path / "a", **changes), match)


def test_an_epsilon_that_hardly_matters_is_a_message(tmp_path: Path) -> None:
    said, model = [], tiny()
    load_pretrained(model, hf_folder(tmp_path / "a", layer_norm_eps=1e-12), on_message=said.append)
    assert len(said) == 1 and "norm_eps=1e-12" in said[0]
    assert model.norm.epsilon == 1e-6
    said.clear()
    load_pretrained(tiny(), hf_folder(tmp_path / "a"), on_message=said.append)
    assert not said


def test_own_files_are_checked_in_the_same_way(tmp_path: Path) -> None:
    save_weights(tiny(), tmp_path / "own")
    assert_refused(tiny(num_heads=4), tmp_path / "own", "pass num_heads=2")


def test_timms_folders_are_checked_by_architecture(tmp_path: Path) -> None:
    facts = {"architecture": "deit_tiny_patch16_224", "num_classes": 1000}
    write(tmp_path / "a" / "model.safetensors", tiny_weights())
    (tmp_path / "a" / "config.json").write_text(json.dumps(facts))
    assert_refused(tiny(), tmp_path / "a", "pass num_heads=3, patch_size=16 to create_model")


def fake_hub(monkeypatch, folder: Path, error: Exception | None = None) -> list[str]:
    """A huggingface_hub that serves `folder`."""
    errors = types.ModuleType("huggingface_hub.errors")
    errors.EntryNotFoundError = type("EntryNotFoundError", (Exception,), {})
    errors.LocalEntryNotFoundError = type(
        "LocalEntryNotFoundError", (errors.EntryNotFoundError,), {}
    )
    asked = []

    def download(repository, name, revision=None):
        asked.append(f"{repository} {name} {revision}")
        if error is not None:
            raise error
        if not (folder / name).exists():
            raise errors.EntryNotFoundError(name)
        return str(folder / name)

    hub = types.ModuleType("huggingface_hub")
    hub.hf_hub_download, hub.errors = download, errors
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return asked


def test_the_hub(monkeypatch, tmp_path: Path) -> None:
    asked = fake_hub(monkeypatch, hf_folder(tmp_path / "a"))
    model = load_pretrained(tiny(), "hf:me/net@main")
    assert asked == ["me/net config.json main", "me/net model.safetensors main"]
    assert same(model, load_pretrained(tiny(1), "hf:me/net/model.safetensors"))
    assert_refused(tiny(), "hf:me/net/other.pth", "the repository holds no other.pth")
    assert_refused(tiny(), "hf:me", "is not hf:owner/name")


def test_no_hub_and_no_network_are_said(monkeypatch, tmp_path: Path) -> None:
    fake_hub(monkeypatch, tmp_path, RuntimeError("cannot reach\nthe host"))
    assert_refused(tiny(), "hf:me/net", r"cannot be had from the hub \(cannot reach\)")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_refused(tiny(), "hf:me/net", "pip install huggingface_hub")
