"""Loads released weights into a model, and saves and loads this project's own.

Loading changes parameters alone. Some facts cannot be seen in a file's shapes and are fields of the model: the
epsilon of LayerNorm (`norm_eps`: 1e-6 in timm, DeiT and DINOv2, 1e-12 in transformers' ViT and
DeiT), the variant of GELU, the number of heads, and how positions are resampled (`pos_resample`;
`models/positions.py` says which form is whose). If a config.json lies beside the file, the fields
are checked against it.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tosa_jax.errors import WeightsError
from tosa_jax.models.optim import TASK_PARTS
from tosa_jax.models.params import Params, get_params, nest
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import check_choice
from tosa_jax.models.weights import foreign, statements
from tosa_jax.models.weights import names as names_of
from tosa_jax.models.weights.checks import check_config, check_fit, stored_as
from tosa_jax.models.weights.preprocessing import Preprocessing, stated
from tosa_jax.models.weights.readers import WeightFile, read_weights, write_safetensors
from tosa_jax.models.weights.torch_pickle import EMA_KEYS
from tosa_jax.models.weights.translation import fit_channels, to_ours, with_zero_biases

Say = Callable[[str], None]
Weights = str | os.PathLike | Mapping[str, Any] | WeightFile
"""Where weights come from: a path or an address of the hub, arrays by name, or what was read already."""

_SELECTORS = "tosa_jax selectors"


def load_pretrained(
    model: VisionTransformer,
    path: Weights | None = None,
    *,
    selectors: str | Path | None = None,
    head: str | Path | None = None,
    checkpoint_key: str | None = None,
    prefix: str = "",
    on_message: Say = print,
) -> VisionTransformer:
    """Loads released weights into `model`, in place, and returns it.

    path        a `.pth` of DeiT, timm, DINO, DINOv2 or MAE (plain, or under `model`, `state_dict`,
                `model_ema`); a `.safetensors`; either with the names of Hugging Face transformers
                (ViT, DeiT, Dinov2 with registers or not, ViTMAE; DPT and Depth Anything, whose
                decoder goes into a depth network with `decoder="dpt"`), or a folder that
                `save_pretrained` wrote; an `.npz` of Google's ViT (AugReg) or of big_vision; a file of
                `save_weights`; a work directory of a run, or one of its checkpoints;
                `hf:owner/name[/file]`; or arrays by name, of NumPy, JAX or PyTorch, in place of a file.
    selectors   a file of `save_selectors`.
    head        a file with the weight and bias of a linear head alone, as DINOv2's "_linear_head.pth" for a model with
                `global_pool="token_avg"`.
    checkpoint_key  of several networks in a training checkpoint the one to take: "ema", "teacher", "student", "model"
                or another key of the file; None: averaged weights before others, a teacher before its student.
    prefix      of the names to take, such as "encoder."; other arrays are left out.
    on_message  gets a line for everything that was not copied as it is: a head that stays random
                because the file's has another number of classes, a decoder that the file lacks,
                positions that were resampled, parts that only pretraining uses. The patch projection of RGB images
                is fitted to another number of channels as timm does it.

    Parameters take the dtype and the sharding of the model's own. Released files have no selectors; the model's
    stay as they are.

    Raises WeightsError and leaves the model as it was: the file cannot be read; parameters are missing, left over or of
    another shape, or not finite; config.json describes another computation (the message names the field of
    `create_model` to pass).
    """
    if path is None and selectors is None and head is None:
        raise WeightsError(
            "load_pretrained needs a path to weights, selectors= or head=, or several"
        )
    params: Params = {}
    if path is not None:
        file = read_weights(path, checkpoint_key=checkpoint_key, prefix=prefix)
        params |= pretrained_params(model, file, on_message=on_message)
        if said := stated(file):
            model.preprocessing = (model.preprocessing or Preprocessing())._replace(**said)
    if selectors is not None:
        params |= selector_params(model, selectors)
    if head is not None:
        params |= head_params(model, head)
    _place(model, params)
    return model


def _place(model: VisionTransformer, params: Params) -> None:
    """Sets parameters of a model, each where its own was."""
    own = get_params(model)

    def place(name: str, value: Any) -> jax.Array:
        old = own[name]
        if isinstance(old, jax.Array):
            return jax.device_put(value, old.sharding)
        return jnp.asarray(value)

    nnx.update(model, nest({name: place(name, value) for name, value in params.items()}))


def pretrained_params(
    model: VisionTransformer, path: Weights, *, on_message: Say = print
) -> dict[str, np.ndarray]:
    """The parameters that `load_pretrained(model, path)` sets, by their path in the model.

    Parameters that stay as they are, such as selectors, are not among them. The model may be
    abstract (`nnx.eval_shape`), and the file may have been read already. Raises WeightsError as `load_pretrained`.
    """
    file = read_weights(path)
    messages = []
    if file.metadata.get("format") == _SELECTORS:
        raise WeightsError(
            f"{file.path} holds selectors alone: pass it as selectors, beside weights"
        )
    config, own = model.config, get_params(model)
    check_config(file, config, messages.append)
    if file.under in EMA_KEYS:
        messages.append(f"the averaged weights are taken ({file.under})")
    elif file.under in ("teacher", "student"):
        messages.append(f"the {file.under}'s weights are taken (checkpoint_key chooses)")
    elif "/" in file.under:
        messages.append(f"weights of the stage {file.under.split('/')[0]}")
    arrays, left_out = to_ours(file.arrays)
    messages += [left_out] if left_out else []
    if names_of.is_google(file.arrays) and config.mlp == "gelu":
        messages.append(
            "Google's own code computes GELU by tanh, timm and transformers do not: pass mlp='gelu_tanh' to "
            "create_model for the former"
        )
    arrays, fitted = fit_channels(with_zero_biases(arrays, config), config)
    messages += [fitted] if fitted else []
    grid = statements.stated_grid(file, config.patch_size)
    arrays, moved = names_of.fit_positions(arrays, config, grid)
    theirs, whose = names_of.resampling_of(file.arrays, vars(config)) or (config.pos_resample, "")
    if theirs != config.pos_resample and (moved or config.resizes):
        moved = moved or f"for other images positions are resampled ({config.pos_resample})"
        moved += f"; pass pos_resample={theirs!r} to create_model for what {whose} computes"
    messages += [moved] if moved else []
    kept = _kept_head(arrays, own, messages.append) | _kept_kinds(arrays, own, messages.append)
    kept |= _kept_norm(file.path, arrays, own, "head/kernel" in kept, messages.append)
    kept |= _other_heads(arrays, own, messages.append)
    arrays = {name: x for name, x in arrays.items() if name not in kept}
    check_fit(file.path, arrays, {name: x for name, x in own.items() if name not in kept})
    stored = stored_as(file.path, arrays, own)
    for message in messages:  # only now: of a file that is refused, only the error is shown
        on_message(f"{file.path}: {message}")
    return stored


def _kept_head(arrays: Mapping[str, np.ndarray], own: Params, say: Say) -> set[str]:
    """Names of the head's parameters that stay the model's own; `say` gets one message on them."""
    kept, reasons = set(), []
    for head in ("head", "head_dist"):
        kernel, bias = f"{head}/kernel", f"{head}/bias"
        if kernel not in own or own[kernel].shape == getattr(arrays.get(kernel), "shape", None):
            continue
        width, classes = own[kernel].shape
        if kernel not in arrays:
            reasons.append("the file has none")
        elif arrays[kernel].ndim != 2 or arrays[kernel].shape[0] not in (width, 2 * width):
            continue  # a network of another width, which check_fit reports
        elif arrays[kernel].shape[0] == 2 * width:
            reasons.append(
                "the file's reads the class token and the mean of the patches; pass global_pool='token_avg' to "
                "create_model for it"
            )
        else:
            reasons.append(f"the file's has {arrays[kernel].shape[1]} classes, the model {classes}")
        kept |= {kernel, bias}
    if kept:
        say(f"the head stays as the model has it, untrained: {reasons[0]}")
    return kept


def _kept_norm(
    path: str, arrays: Mapping[str, np.ndarray], own: Params, no_head: bool, say: Say
) -> set[str]:
    """Names of the last norm in file and model that are not copied: the two pool differently (`norm`, `fc_norm`).

    That is fine where the head is new too, as in MAE's fine-tuning. Raises WeightsError if the head
    would be copied: it expects the pooling of the file.
    """
    norms = ("norm/scale", "norm/bias", "fc_norm/scale", "fc_norm/bias")
    theirs, ours = ({name for name in norms if name in x} for x in (arrays, own))
    if theirs == ours or len(theirs) != 2 or len(ours) != 2:
        return set()
    if "fc_norm/scale" in theirs:
        raise WeightsError(
            f"{path} classifies the patches' mean (it has fc_norm, as MAE's fine-tuned models): "
            "pass global_pool='avg' to create_model"
        )
    if not no_head:
        raise WeightsError(
            f"{path} classifies the class token, the model the patches' mean: pass "
            "global_pool='token' to create_model"
        )
    say("fc_norm stays as the model has it, untrained: the file has none (its norm is left out)")
    return theirs | ours


def _other_heads(arrays: Mapping[str, np.ndarray], own: Params, say: Say) -> set[str]:
    """Names of the parts that only the file or only the model has, because they are for different tasks."""

    def of(names, part):
        return {name for name in names if name.startswith(f"{part}/")}

    # A head_dist that a classifier lacks is another variant, which is refused.
    heads = TASK_PARTS
    heads += () if of(own, "head") else ("head", "head_dist", "attn_pool")
    unused = {p: of(arrays, p) for p in heads if not of(own, p)}
    if named := [p for p in unused if unused[p]]:
        verb = "is" if len(named) == 1 else "are"
        say(f"its {' and '.join(named)} {verb} not used: the model has none")
    fresh = {p: of(own, p) for p in TASK_PARTS if not of(arrays, p)}
    for part in filter(fresh.get, fresh):
        say(f"the {part} stays as the model has it, untrained: the file has none")
    return set().union(*fresh.values(), *unused.values())


def _kept_kinds(arrays: Mapping[str, np.ndarray], own: Params, say: Say) -> set[str]:
    """Names under `kinds/` if only the file or only the model has any; released files have none."""
    theirs = {name for name in arrays if name.startswith("kinds/")}
    ours = {name for name in own if name.startswith("kinds/")}
    if theirs and not ours:
        say("its selectors are not used: no layer of the model has one")
    return theirs | ours if not (theirs and ours) else set()


def save_weights(
    model: VisionTransformer,
    path: str | Path,
    *,
    names: str = "tosa_jax",
    class_names: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes all parameters, selectors too, atomically to a `.safetensors` file for `load_pretrained` and `load`.

    The header states the whole configuration, with it the grid of the positions, and the preprocessing if the model
    knows it (`model.preprocessing`).

    path         the file; with the names of others the folder, which gets model.safetensors and JSON files beside it.
    names        "timm" or "hf": the names and layouts of timm or transformers. `from_pretrained(FOLDER)` and
                 `timm.create_model("local-dir:FOLDER", pretrained=True)` then read the dense network; what methods add
                 is not written.
    class_names  of the head, one a class; (): not stated.
    metadata     further texts for the header.

    Raises WeightsError: timm or transformers have no such network, as no LeMeViT; the path is a folder where it should
    be a file.
    ConfigError: another value of `names`.
    """
    config = model.config
    check_choice("names", names, ("tosa_jax", "timm", "hf"))
    if names != "tosa_jax":
        if config.architecture != "vit":
            raise WeightsError(
                f"timm and transformers have no {config.architecture!r}; leave names out to save it"
            )
        translate = foreign.to_timm if names == "timm" else foreign.to_hf
        params = _to_host(get_params(model))
        arrays, files = translate(params, config, model.preprocessing, tuple(class_names))
        write_safetensors(Path(path) / "model.safetensors", arrays, {"format": "pt"})
        foreign.write_statements(Path(path), files)
        return
    facts = {"format": statements.WEIGHTS_FORMAT, "fields": json.dumps(config.silent_fields)}
    facts |= {statements.MODEL: json.dumps(config.to_fields()), statements.TASK: config.task}
    if model.preprocessing is not None:
        facts[statements.PREPROCESSING] = json.dumps(model.preprocessing._asdict())
    if class_names:
        facts[statements.CLASS_NAMES] = json.dumps(list(class_names))
    write_safetensors(path, _to_host(get_params(model)), {**(metadata or {}), **facts})


def save_selectors(model: VisionTransformer, path: str | os.PathLike) -> None:
    """Writes the selectors and fitted bypasses alone to a `.safetensors`, with their plan and sizes as metadata.

    Raises WeightsError if the model has none.
    """
    params = _selectors_of(model)
    if not params:
        raise WeightsError(
            "the model has no selectors to save; create it with a keep_rate or a plan"
        )
    write_safetensors(
        path, _to_host(params), {"format": _SELECTORS} | _selector_facts(model, params)
    )


def selector_params(model: VisionTransformer, path: str | Path) -> dict[str, np.ndarray]:
    """The parameters of a file of `save_selectors`, checked against the model's.

    Raises WeightsError: another kind of file, or selectors at other layers, of other heads, width
    or kernel, or a bypass of another rank.
    """
    file, own = read_weights(path), _selectors_of(model)
    if file.metadata.get("format") != _SELECTORS:
        raise WeightsError(
            f"{file.path} holds no selectors (save_selectors writes them); pass it as path"
        )
    ours = _selector_facts(model, own)
    ours.pop("plan", None)
    theirs = {key: file.metadata.get(key, "none") for key in ours}
    if theirs != ours:
        faults = [
            f"{key} is {theirs[key]} in the file and {ours.get(key)} in the model"
            for key in theirs
            if theirs[key] != ours.get(key)
        ]
        raise WeightsError(
            f"{file.path} holds the selectors of another model: {'; '.join(faults)} (the file's "
            f"plan: {file.metadata.get('plan')})"
        )
    check_fit(file.path, file.arrays, own)
    return stored_as(file.path, file.arrays, own)


def head_params(model: VisionTransformer, path: str | Path) -> dict[str, np.ndarray]:
    """The parameters of a file of a linear head alone, checked against the model's.

    Raises WeightsError: another kind of file, or a head of another size.
    """
    file = read_weights(path)
    parts = {name.rpartition(".")[2]: x for name, x in file.arrays.items()}
    if parts.keys() != {"weight", "bias"} or parts["weight"].ndim != 2:
        raise WeightsError(
            f"{file.path} holds no linear head alone (weight and bias); pass it as path, beside head"
        )
    own = {name: x for name, x in get_params(model).items() if name.startswith("head/")}
    arrays = {"head/kernel": parts["weight"].T, "head/bias": parts["bias"]}
    if model.config.embed_dim * 5 == len(arrays["head/kernel"]):
        raise WeightsError(
            f"{file.path} reads four layers of the network, which no head here does; take the head of one layer "
            "(_linear_head.pth)"
        )
    check_fit(file.path, arrays, own)
    return stored_as(file.path, arrays, own)


def _selectors_of(model: VisionTransformer) -> Params:
    """The parameters of layer kinds: selectors and fitted bypasses."""
    return {name: x for name, x in get_params(model).items() if name.startswith("kinds/")}


def _selector_facts(model: VisionTransformer, params: Params) -> dict[str, str]:
    """The facts in which file and model must agree, as text; "none" where there is no such part."""
    kernel = next((x for name, x in params.items() if name.endswith("conv1/kernel")), None)
    down = next((x for name, x in params.items() if name.endswith("bypass/down/kernel")), None)
    layers = sorted({int(name.split("/")[1]) for name in params})
    return {
        "layers": ",".join(map(str, layers)) or "none",
        "plan": ",".join(model.config.plan or ()),
        "num_heads": str(model.config.num_heads),
        "kernel_size": "none" if kernel is None else str(kernel.shape[0]),
        "hidden": "none" if kernel is None else str(kernel.shape[2]),
        "bypass_rank": "none" if down is None else str(down.shape[1]),
    }


def _to_host(params: Params) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in params.items()}
