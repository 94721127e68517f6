"""Baselines in PyTorch: the dense model of timm or transformers as a candidate of the benchmark.

It runs on the device that JAX uses, with PyTorch's fast settings: on a GPU `torch.compile`, everywhere
`scaled_dot_product_attention` and fused AdamW, on a CPU one thread a core. PyTorch is imported only if it is used.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

from tosa_jax.errors import ConfigError, DeviceError
from tosa_jax.models import cost
from tosa_jax.models.factory import abstract_model
from tosa_jax.models.vit_config import ViTConfig, check, check_choice
from tosa_jax.performance.candidates import Candidate

LIBRARIES = ("timm", "transformers")
"""Libraries that a baseline can come from."""

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "none")
"""Modes of `torch.compile`; "none": the model is not compiled."""

INSTALL = 'pip install "tosa-jax[compare]"'
"""The command that installs the libraries, for error messages."""

_OPENMP_REST = 0.05  # seconds; OpenMP's idle threads spin for a while, which would slow down the next candidate
_WARM_UP_PASSES = 3  # they compile, record CUDA graphs, and replay them once


def check_arguments(against: Sequence[str], task: str, mode: str) -> list[str]:
    """Checks the arguments, imports the libraries, and returns their names without "none".

    It also keeps JAX from reserving most of the GPU's memory (XLA_PYTHON_CLIENT_PREALLOCATE=false), unless the variable
    is set. Call it before JAX looks for devices.

    Raises ConfigError for unknown names, for depth models, and if a package is missing or broken.
    """
    for name in against:
        check_choice("--against", name, (*LIBRARIES, "none"))
    check_choice("--torch_compile", mode or "none", MODES)
    libraries = [name for name in dict.fromkeys(against) if name != "none"]
    if libraries:
        check(
            task == "classification",
            f"--against={libraries[0]} has no network for --task={task}; leave one of them out",
        )
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    for name in libraries:
        load("torch", name)
        load(name, name)
    return libraries


def load(module: str, library: str) -> Any:
    """Imports a module that `--against=<library>` needs, or raises a ConfigError that says what to do."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module
        if missing:
            raise ConfigError(f"--against={library}: {module} is missing; {INSTALL}") from error
        # timm imports torchvision. If its build does not fit that of torch, the import fails in several ways.
        other = "; --against=transformers needs no torchvision" if library == "timm" else ""
        raise ConfigError(
            f"--against={library}: {module} cannot be imported ({str(error)[:160]}){other}"
        ) from error


def settings(against: Sequence[str], dtype: str, mode: str, *, train: bool) -> dict[str, Any]:
    """How PyTorch ran: its threads, compile mode and float32 precision, for the result file."""
    if not against:
        return {}
    if _device_type() == "cpu":
        return {"torch_threads": num_cores(), "torch_compile": "none"}
    found = {"torch_compile": _mode(mode, train)}
    return found | ({"float32_products": _float32_products()} if dtype == "float32" else {})


def versions(against: Sequence[str]) -> dict[str, str]:
    """Versions of PyTorch and of the libraries; empty without libraries."""
    names = ["torch", *against] if against else []
    return {name: load(name, name).__version__ for name in names}


def candidate(
    library: str, model: str, config: ViTConfig, batch_size: int, *, train: bool, mode: str = ""
) -> Candidate:
    """The dense model of `library` that corresponds to `config`, with random weights, warmed up.

    It runs a forward pass in inference mode, or a training step: forward, backward and AdamW. Weights are stored in
    `config.param_dtype`. If `config.dtype` differs, it computes under autocast.

    Raises ConfigError if the library has no such model, DeviceError if PyTorch has no such device or it is full.
    """
    torch = load("torch", library)
    device = _device(torch, library)
    torch.manual_seed(0)
    network = {"timm": _timm_network, "transformers": _transformers_network}[library](model, config)
    _check_same(library, network, config)
    dtype, stored = (getattr(torch, str(d)) for d in (config.dtype, config.param_dtype))
    network = network.to(device, stored).train(train)
    parameters = list(network.parameters())
    if device == "cuda" and (compile_mode := _mode(mode, train)) != "none":
        network = torch.compile(network, mode=compile_mode)
    images = torch.randn(batch_size, config.in_chans, *config.image_shape).to(device, dtype)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    computing = _autocast(torch, device, dtype, stored)

    def forward():
        with torch.inference_mode(), computing():
            return network(images)

    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with computing():
            logits = network(images).float()
            loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        return loss

    run = _telling_full_memory(torch, step if train else forward, library, batch_size)
    wait = (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda out: out)
    for _ in range(_WARM_UP_PASSES):
        wait(run())
    rest = _OPENMP_REST if device == "cpu" else 0.0
    return Candidate(library, None, config, run, wait, rest=rest)


def num_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _device_type() -> str:
    """The platform that JAX runs on: "cpu", "gpu" or "tpu"."""
    return jax.devices()[0].platform


def _device(torch: Any, library: str) -> str:
    """PyTorch's name of JAX's device. Also sets PyTorch's threads and float32 precision as JAX has them."""
    platform = _device_type()
    if platform == "cpu":
        torch.set_num_threads(num_cores())
        return "cpu"
    if platform != "gpu" or not torch.cuda.is_available():
        raise DeviceError(
            f"--against={library}: JAX runs on a {platform}, which this PyTorch does not support; install its CUDA "
            "build, or set JAX_PLATFORMS=cpu"
        )
    tf32 = _float32_products() == "TF32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    return "cuda"


def _float32_products() -> str:
    """The precision of JAX's float32 matrix products on a GPU: TF32, or as JAX_DEFAULT_MATMUL_PRECISION says."""
    config: Any = jax.config  # its fields are made at run time
    exact = config.jax_default_matmul_precision in ("float32", "highest", "F32_F32_F32")
    return "float32" if exact else "TF32"


def _mode(mode: str, train: bool) -> str:
    """The compile mode; by default CUDA graphs for a forward pass (less launch overhead), not for training."""
    return mode or ("default" if train else "reduce-overhead")


def _autocast(torch: Any, device: str, dtype: Any, stored: Any) -> Callable[[], Any]:
    if dtype == stored:
        return contextlib.nullcontext
    return lambda: torch.autocast(device, dtype=dtype)


def _telling_full_memory(torch: Any, run: Callable, library: str, batch_size: int) -> Callable:
    def checked():
        try:
            return run()
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"--against={library}: PyTorch found the device's memory full at --batch_size={batch_size}; take a "
                "smaller one"
            ) from error

    return checked


def _check_same(library: str, network: Any, config: ViTConfig) -> None:
    """Raises ConfigError unless both models have the same number of parameters within 2 %."""
    theirs = sum(p.numel() for p in network.parameters())
    ours = cost.num_params(abstract_model(config))
    check(
        abs(theirs - ours) <= 0.02 * ours,
        f"--against={library}: its network has {theirs / 1e6:.2f} M parameters and ours {ours / 1e6:.2f} M: "
        "their times cannot be compared",
    )


def _timm_network(model: str, config: ViTConfig) -> Any:
    timm = load("timm", "timm")
    check(
        timm.is_model(model),
        f"--against=timm: timm has no model {model!r}; --against=transformers builds any size",
    )
    return timm.create_model(
        model,
        img_size=config.image_shape,
        num_classes=config.num_classes,
        in_chans=config.in_chans,
    )


def transformers_fields(config: ViTConfig) -> tuple[str, dict[str, Any]]:
    """The model family of transformers, for example "ViT", and its configuration fields for `config`."""
    fields = {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "image_size": list(config.image_shape),
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "qkv_bias": config.qkv_bias,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu_pytorch_tanh" if config.mlp == "gelu_tanh" else "gelu",
        "attn_implementation": "sdpa",
    }
    swiglu = config.mlp == "swiglu"
    if not (swiglu or config.layer_scale or config.reg_tokens):
        return "DeiT" if config.distilled else "ViT", fields | {"intermediate_size": config.mlp_dim}
    # transformers makes each half of a SwiGLU two thirds as wide as its ratio says.
    fields["mlp_ratio"] = round(config.mlp_ratio * (0.75 if swiglu else 1))
    fields |= {"use_swiglu_ffn": swiglu, "layerscale_value": config.layer_scale or 1.0}
    if config.reg_tokens:
        return "Dinov2WithRegisters", fields | {"num_register_tokens": config.reg_tokens}
    return "Dinov2", fields


def _transformers_network(model: str, config: ViTConfig) -> Any:
    torch, transformers = (load(name, "transformers") for name in ("torch", "transformers"))
    family, fields = transformers_fields(config)
    pooling = {"add_pooling_layer": False} if family in ("ViT", "DeiT") else {}
    settings = getattr(transformers, f"{family}Config")(**fields)
    backbone = getattr(transformers, f"{family}Model")(settings, **pooling)

    class Classifier(torch.nn.Module):
        """Logits of the class token after the final norm; with a distillation token the mean of both heads."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone
            heads = range(1 + config.distilled)
            self.heads = torch.nn.ModuleList(
                torch.nn.Linear(config.embed_dim, config.num_classes) for _ in heads
            )

        def forward(self, images):
            tokens = self.backbone(images).last_hidden_state
            logits = [head(tokens[:, i]) for i, head in enumerate(self.heads)]
            return sum(logits) / len(logits)

    return Classifier()
