"""What lies beside weights or names them: config.json, a variant's name, the hub."""

import json
import sys
import types
from pathlib import Path

import pytest
from golden.pretrained_cases import hf_names
from weight_samples import TINY, assert_refused, same, tiny, tiny_weights, write

from tosa_jax.models.variants import variant_config
from tosa_jax.models.weights.load import load_pretrained, save_weights


def hf_folder(path: Path, **changes) -> Path:
    config = variant_config("vit", **TINY)
    write(path / "model.safetensors", hf_names(config, tiny_weights()))
    facts = {"model_type": "vit", "num_attention_heads": 2, "hidden_act": "gelu", "patch_size": 8}
    (path / "config.json").write_text(json.dumps(facts | {"layer_norm_eps": 1e-6} | changes))
    return path


@pytest.mark.parametrize(("changes", "match"), [
    ({"num_attention_heads": 4}, r"pass num_heads=4 to create_model \(it has num_heads=2\)"),
    ({"hidden_act": "gelu_pytorch_tanh"}, "pass mlp='gelu_tanh'"),
    ({"layer_norm_eps": 1e-3}, "pass norm_eps=0.001"),
    ({"hidden_act": "relu"}, "says hidden_act='relu', which no model here .*; known: gelu, "),
    ({"model_type": "vit_mae", "num_attention_heads": 4}, "pass num_heads=4"),
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
    wanted = ("config.json", "preprocessor_config.json", "model.safetensors")
    assert asked == [f"me/net {name} main" for name in wanted]
    assert same(model, load_pretrained(tiny(1), "hf:me/net/model.safetensors"))
    assert_refused(tiny(), "hf:me/net/other.pth", "the repository holds no other.pth")
    assert_refused(tiny(), "hf:me", "is not hf:owner/name")


def test_no_hub_and_no_network_are_said(monkeypatch, tmp_path: Path) -> None:
    fake_hub(monkeypatch, tmp_path, RuntimeError("cannot reach\nthe host"))
    assert_refused(tiny(), "hf:me/net", r"cannot be had from the hub \(cannot reach\)")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_refused(tiny(), "hf:me/net", "pip install huggingface_hub")
