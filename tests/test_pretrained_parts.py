"""What is loaded when only a part fits: heads of other classes, selectors, abstract models."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from weight_samples import TINY, assert_refused, tiny, tiny_weights, write

from tosa_jax.errors import WeightsError
from tosa_jax.models.factory import abstract_model
from tosa_jax.models.params import get_params, split
from tosa_jax.models.variants import variant_config
from tosa_jax.models.weights.load import load_pretrained, pretrained_params, save_selectors


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


def test_released_files_leave_selectors_alone(tmp_path: Path) -> None:
    model = tiny(keep_rate=0.5)
    before = {k: np.asarray(x) + 1 for k, x in get_params(model).items() if k.startswith("kinds/")}
    model.kinds[1].selector.conv1.kernel[...] = before["kinds/1/selector/conv1/kernel"]
    load_pretrained(model, write(tmp_path / "a", tiny_weights()))
    name = "kinds/1/selector/conv1/kernel"
    np.testing.assert_array_equal(get_params(model)[name], before[name])


def test_selectors_are_no_weights(tmp_path: Path) -> None:
    model = tiny(keep_rate=0.5)
    save_selectors(model, tmp_path / "s")
    assert_refused(model, tmp_path / "s", r"holds selectors alone: pass it as selectors")


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
