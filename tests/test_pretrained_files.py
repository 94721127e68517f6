"""Files that weights come in: `.pth` old and new, `.npz`, `.safetensors`, folders, checkpoints."""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from golden.pretrained_cases import hf_names
from weight_samples import (
    GOLDEN,
    TINY,
    assert_refused,
    same,
    tiny,
    tiny_weights,
    write,
    write_pth,
)

from tosa_jax.models.params import get_params
from tosa_jax.models.variants import variant_config
from tosa_jax.models.weights.load import load_pretrained, save_weights
from tosa_jax.models.weights.torch_pickle import read_torch_file


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


def test_an_npz_may_hold_bfloat16(tmp_path: Path) -> None:
    weights = {name: x.astype(ml_dtypes.bfloat16) for name, x in tiny_weights().items()}
    np.savez(tmp_path / "a.npz", **weights)
    from_npz = load_pretrained(tiny(), tmp_path / "a.npz")
    assert same(from_npz, load_pretrained(tiny(1), write(tmp_path / "b", weights)))


def test_shards_and_folders_of_transformers(tmp_path: Path) -> None:
    config = variant_config("vit", **TINY)
    arrays = hf_names(config, tiny_weights())
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

    from tosa_jax.train.checkpoints import Checkpoints
    from tosa_jax.train.step import TrainState, trained_params

    params = get_params(tiny(3, keep_rate=0.5))
    frozen = {name: params.pop(name) for name in list(params) if name.startswith("kinds/")}
    ema = {name: x + 1 for name, x in params.items()}
    opt = optax.adamw(1e-3).init(params)
    state = TrainState(jnp.int32(7), params, frozen, opt, ema, {"a": jnp.ones(2)})
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "finetune", "acc1")
    # The best and the newest are kept: it is the newest that counts.
    checkpoints.save(4, state._replace(ema=params), {"done": False})
    checkpoints.score(4, {"acc1": 0.9})
    checkpoints.save(7, state, {"done": True})
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
