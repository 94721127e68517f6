"""PyTorch as a candidate: what is asked of it, and one line where it cannot take part.

Most tests need no PyTorch; those that do are skipped without it.
"""

import math
import os
import re
import sys
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest
from small import SIZES

from tosa_jax import bench
from tosa_jax.errors import ConfigError, DeviceError
from tosa_jax.models import cost
from tosa_jax.models.factory import abstract_model
from tosa_jax.models.variants import VARIANTS, variant_config
from tosa_jax.performance import benchmark, torch_baselines
from tosa_jax.performance.candidates import Candidate

OTHERS = {name for name in VARIANTS if re.search("clip|siglip|dinov3|eva02|lemevit", name)}
NAMES = sorted(VARIANTS.keys() - {"vit"} - OTHERS)


def failure(argv, capsys):
    """The one line with which `bench` refuses its arguments."""
    assert bench.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "name", ["vit_base_patch32_clip_224", "vit_base_patch16_siglip_224", "vit_small_patch16_dinov3"]
)
def test_a_network_that_transformers_parts_do_not_make_is_not_compared_with_another(name, capsys):
    line = failure([f"--model={name}", "--against=transformers"], capsys)
    assert f"has no network like {name!r}" in line


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_package_is_one_line_that_says_what_to_install(missing, monkeypatch, capsys):
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else ModuleType(name))
    says = f'transformers: {missing} is missing; pip install "tosa-jax[compare]"'
    assert says in failure(["--against=transformers"], capsys)


@pytest.mark.parametrize(
    "raised", ["RuntimeError('operator torchvision::nms does not exist')", "ImportError('nms')"]
)
def test_a_timm_without_its_torchvision_names_the_other_way(raised, monkeypatch, tmp_path, capsys):
    (tmp_path / "timm.py").write_text(f"raise {raised}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    line = failure(["--against=timm"], capsys)
    assert "nms" in line and "--against=transformers needs no torchvision" in line


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--against=tim"], "--against='tim' is unknown; did you mean 'timm'"),
        (["--against=timm", "--task=depth"], "--against=timm has no network for --task=depth"),
        (["--torch_compile=fast"], "--torch_compile='fast' is unknown"),
    ],
)
def test_bad_arguments_are_one_line(argv, says, capsys):
    assert says in failure(argv, capsys)


@pytest.mark.parametrize("already", [None, "true"])
def test_jax_leaves_memory_to_the_other_framework(already, monkeypatch):
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    monkeypatch.setenv(name, already or "")
    if already is None:
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch_baselines, "load", lambda *_: None)
    assert torch_baselines.check_arguments(["none"], "classification", "") == []
    assert os.environ.get(name) == already
    assert torch_baselines.check_arguments(["timm", "timm"], "classification", "") == ["timm"]
    assert os.environ[name] == (already or "false")


def test_its_record_has_the_same_fields_beside_our_dense(monkeypatch):
    def candidate(library, model, config, batch_size, *, train, mode):
        assert (model, batch_size, train, mode) == ("vit", 2, False, "none")
        return Candidate(library, None, config, lambda: None, lambda _: None)

    def uncompiled(name, keep_rate, config, batch_size, *, train, task):
        return Candidate(name, keep_rate, config, lambda: None, lambda _: None)

    monkeypatch.setattr(benchmark, "candidate", uncompiled)
    monkeypatch.setattr(torch_baselines, "candidate", candidate)
    monkeypatch.setattr(torch_baselines, "load", lambda *_: None)
    seconds = np.array([[0.5, 0.25, 1.0]])
    monkeypatch.setattr(benchmark, "seconds_of", lambda *_: seconds)
    dense, tosa, other = bench.measure(
        "vit", [0.5], batch_size=2, train=False, rounds=1, against=["transformers"],
        torch_compile="none", **SIZES,
    )  # fmt: skip
    assert other.keys() == dense.keys() == tosa.keys()
    assert (other["name"], other["keep_rate"], other["temp_bytes"]) == ("transformers", None, None)
    assert (other["speedup"], other["gmac_ratio"], other["realised"]) == (0.5, 1.0, 0.5)
    assert other["gmacs"] == dense["gmacs"] != tosa["gmacs"]


class FakeTorch(SimpleNamespace):
    """Notes the threads and the precision that it is told."""

    def __init__(self, has_gpu):
        super().__init__(cuda=SimpleNamespace(is_available=lambda: has_gpu), told=[])
        self.set_num_threads = self.set_float32_matmul_precision = self.told.append


def test_precision_on_a_gpu_is_that_of_jax(monkeypatch):
    monkeypatch.setattr(torch_baselines, "_device_type", lambda: "gpu")
    torch = FakeTorch(has_gpu=True)
    assert torch_baselines._device(torch, "timm") == "cuda"
    with jax.default_matmul_precision("highest"):
        torch_baselines._device(torch, "timm")
        settings = torch_baselines.settings(["timm"], "float32", "", train=False)
    assert torch.told == ["high", "highest"]
    assert settings == {"torch_compile": "reduce-overhead", "float32_products": "float32"}
    assert torch_baselines.settings(["timm"], "bfloat16", "", train=True) == {
        "torch_compile": "default"
    }


def test_a_cpu_gets_a_thread_for_each_core_and_a_gpu_must_be_there(monkeypatch):
    torch = FakeTorch(has_gpu=False)
    assert torch_baselines._device(torch, "timm") == "cpu"
    assert torch.told == [len(os.sched_getaffinity(0))]
    for platform in ("gpu", "tpu"):
        monkeypatch.setattr(torch_baselines, "_device_type", lambda platform=platform: platform)
        with pytest.raises(DeviceError, match=f"JAX runs on a {platform}"):
            torch_baselines._device(torch, "timm")


def test_a_network_of_another_size_is_refused():
    network = SimpleNamespace(parameters=lambda: [SimpleNamespace(numel=lambda: 1000)])
    with pytest.raises(ConfigError, match="0.00 M parameters and ours 0.01 M"):
        torch_baselines._check_same("timm", network, variant_config("vit", **SIZES))


def test_timm_is_asked_for_the_network_by_name_at_the_same_size(monkeypatch):
    asked = {}
    timm = SimpleNamespace(
        is_model=lambda name: name != "vit",
        create_model=lambda name, **fields: asked.update(fields, name=name),
    )
    monkeypatch.setattr(torch_baselines, "load", lambda *_: timm)
    config = variant_config("deit_tiny_patch16_224", image_size=(32, 64), num_classes=10)
    torch_baselines._timm_network("deit_tiny_patch16_224", config)
    name = asked.pop("name")
    assert (name, asked) == (
        "deit_tiny_patch16_224", {"img_size": (32, 64), "num_classes": 10, "in_chans": 3}
    )  # fmt: skip
    with pytest.raises(ConfigError, match="timm has no model 'vit'"):
        torch_baselines._timm_network("vit", variant_config("vit", **SIZES))


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_has_its_like_in_transformers(name):
    config = variant_config(name)
    family, fields = torch_baselines.transformers_fields(config)
    expected = "ViT"
    expected = "DeiT" if "distilled" in name else expected
    expected = "Dinov2" if "dinov2" in name or "deit3" in name else expected
    expected = "Dinov2WithRegisters" if "reg4" in name else expected
    assert family == expected
    if "mlp_ratio" in fields:
        hidden = fields["mlp_ratio"] * config.embed_dim
        # What Dinov2 makes of it: two matrices in, each two thirds as wide, to a multiple of 8.
        hidden = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8) if fields["use_swiglu_ffn"] else hidden
        assert hidden == config.mlp_dim
    else:
        assert fields["intermediate_size"] == config.mlp_dim


pytorch = pytest.mark.filterwarnings("ignore")


@pytorch
@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_transformers_are_as_many(name):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = variant_config(name)
    with torch.device("meta"):
        network = torch_baselines._transformers_network(name, config)
    theirs = sum(p.numel() for p in network.parameters())
    assert theirs == pytest.approx(cost.num_params(abstract_model(config)), rel=2e-3)


@pytorch
@pytest.mark.parametrize("fields", [{}, {"reg_tokens": 2, "layer_scale": 1.0}, {"distilled": True}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_runs_and_trains(fields, dtype):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    sizes = SIZES | {"mlp_ratio": 4.0, "dtype": dtype} | fields
    config = variant_config("vit", param_dtype=dtype, **sizes)
    one = torch_baselines.candidate("transformers", "vit", config, 3, train=False)
    logits = one.run()
    assert tuple(logits.shape) == (3, 10) and str(logits.dtype) == f"torch.{dtype}"
    assert not logits.requires_grad and logits.float().std() > 0
    config = variant_config("vit", **sizes)
    one = torch_baselines.candidate("transformers", "vit", config, 3, train=True)
    losses = [one.run().item() for _ in range(8)]
    assert losses[-1] < losses[0] < 2 * math.log(10)
