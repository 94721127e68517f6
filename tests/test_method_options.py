"""The options of a method: declared beside its layer kind, set and read like the fields of `ViTConfig`."""

import dataclasses
import json
from dataclasses import dataclass
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import SIZES, forward, random_images, small_model

import tosa_jax
from tosa_jax import bench, inference
from tosa_jax import config as config_lib
from tosa_jax.cli.flags import parse
from tosa_jax.config import from_json, make_run_config, to_json
from tosa_jax.errors import ConfigError
from tosa_jax.models.factory import control_config
from tosa_jax.models.method import METHODS, Method, register
from tosa_jax.models.methods.selective import SelectiveLayer, SelectiveOptions
from tosa_jax.models.options import OPTIONS, Options
from tosa_jax.models.vit_config import ViTConfig, check


@dataclass(frozen=True, kw_only=True)
class NormOptions(Options):
    """`norm_order` of the norm that tokens are chosen by, at least 1."""

    norm_order: float = 2.0

    def __post_init__(self):
        check(self.norm_order >= 1, f"norm_order={self.norm_order} must be at least 1")


class LargestNorm(SelectiveLayer):
    """Selects the tokens with the largest norm of an order."""

    options = (*SelectiveLayer.options, NormOptions)

    def __init__(self, config, spec, *, rngs):
        super().__init__(config, spec, rngs=rngs)
        self.order = config.options_of(NormOptions).norm_order

    def scores(self, state, context):
        return jnp.linalg.norm(state.tokens, ord=self.order, axis=-1)


@pytest.fixture(autouse=True)
def registered():
    """The method above, for one test."""
    with mock.patch.dict(METHODS), mock.patch.dict(OPTIONS):
        register(Method(name="norm_of_order", kind=LargestNorm, fields={"head_pool": "max"}))
        yield


def write_recipe(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from tosa_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.data.name = 'digits'\n"
        "    config.inputs.update(mean=(.5,), std=(.5,))\n"
        f"    config.model.update(plan='norm_of_order', norm_order=3.0, **{SIZES!r})\n"
        "    return config\n"
    )
    return f"--config={path}"


def test_a_recipe_the_command_line_and_config_json_set_it(tmp_path):
    recipe = write_recipe(tmp_path)

    def run(*argv):
        return make_run_config(parse("", [recipe, *argv])[0])

    assert run().model.options == (NormOptions(norm_order=3.0),)
    changed = run("--config.model.norm_order=4", "--config.model.bypass=shared")
    assert (changed.model.norm_order, changed.model.bypass) == (4.0, "shared")
    values = json.loads(json.dumps(to_json(changed)))
    assert (values["model"]["norm_order"], values["model"]["bypass"]) == (4.0, "shared")
    assert "options" not in values["model"] and from_json(values) == changed
    # A run that began before there was such a method.
    del values["model"]["norm_order"]
    assert from_json(values).model.norm_order == 2.0
    assert config_lib.differences(to_json(run()), to_json(changed)) == [
        "model.bypass:  -> shared",
        "model.norm_order: 3.0 -> 4.0",
    ]
    with pytest.raises(ConfigError, match=r"^config.model: norm_order=0.5 must be at least 1$"):
        run("--config.model.norm_order=0.5")
    with pytest.raises(ConfigError, match="norm_order"):
        run("--config.model.norm_ordr=4")


def test_the_benchmark_has_a_flag_for_it(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(bench, "measure", lambda *_, **fields: seen.update(fields) or [{}])
    assert bench.main(["--norm_order=3", "--no-bypass_pool", "--json"]) == 0
    assert (seen["norm_order"], seen["bypass_pool"], seen["bypass"]) == (3.0, False, "")
    assert bench.main(["--norm_order=x"]) == 2
    assert "argument --norm_order: invalid float value: 'x'" in capsys.readouterr().err


def test_it_reaches_the_layer_and_a_saved_predictor_has_it(tmp_path):
    model = small_model(plan="norm_of_order", keep_rate=0.5, norm_order=1.0)
    tokens = model.blocks[0](model.embed(random_images()))[0]
    wanted = 1 + np.argsort(-np.abs(tokens[:, 1:]).sum(axis=-1), axis=1)[:, :8]
    np.testing.assert_array_equal(
        forward(model, random_images()).selected[0][:, 1:], np.sort(wanted, axis=1)
    )
    predictor = tosa_jax.Predictor(model, mean=(0.5,), std=(0.5,))
    predictor.save(tmp_path / "p.safetensors")
    loaded = inference.loading.from_weights(tmp_path / "p.safetensors", None, print)["model"]
    assert loaded.config == model.config and loaded.config.norm_order == 1.0


def test_what_is_wrong_is_one_line():
    for fields, says in (
        ({"norm_order": 0.0}, "norm_order=0.0 must be at least 1"),
        ({"norm_ordr": 2.0}, "model field='norm_ordr' is unknown; did you mean 'norm_order'?"),
        ({"bypas": "shared"}, "did you mean 'bypass'?"),
    ):
        for make in (ViTConfig, lambda **x: tosa_jax.create_model("vit", rngs=nnx.Rngs(0), **x)):
            with pytest.raises(ConfigError) as error:
                make(**fields)
            assert says in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(AttributeError, match="ViTConfig has no field 'norm_ordr'"):
        ViTConfig().norm_ordr  # noqa: B018


def test_configurations_are_equal_if_their_options_are():
    config = ViTConfig(bypass="shared", norm_order=3.0)
    assert config == dataclasses.replace(ViTConfig(norm_order=3.0), bypass="shared")
    assert (
        hash(config) == hash(ViTConfig(norm_order=3.0, bypass="shared")) and config != ViTConfig()
    )
    assert dataclasses.replace(config, bypass="", norm_order=2.0) == ViTConfig()
    assert ViTConfig(**config.to_fields()) == config
    assert config.options_of(SelectiveOptions) == SelectiveOptions()
    control = control_config(dataclasses.replace(config, plan=("standard",) * 12), "norm_of_order")
    assert (control.head_pool, control.norm_order) == ("max", 3.0)


def test_names_are_taken_once():
    def declaring(name):
        options = dataclasses.make_dataclass(
            "MyOptions", [(name, int, 1)], bases=(Options,), frozen=True, kw_only=True
        )
        return Method(name="mine", kind=type("Mine", (LargestNorm,), {"options": (options,)}))

    with pytest.raises(ConfigError, match="MyOptions declares the option 'bypass', which BypassOp"):
        register(declaring("bypass"))
    with pytest.raises(ConfigError, match="MyOptions declares 'embed_dim', a field of ViTConfig"):
        register(declaring("embed_dim"))
    assert "mine" not in METHODS
