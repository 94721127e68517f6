"""The dense network in PyTorch, timm's or transformers', as a candidate of the benchmark on the same device.

Nothing here is imported before it is asked for. Both frameworks get what is fast for them: on a GPU the network is
compiled, attention is `scaled_dot_product_attention`, AdamW is fused; on a CPU PyTorch gets a thread for each core.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

from tosa_jax.errors import ConfigError, DeviceError
from tosa_jax.models import cost
from tosa_jax.models.vit_config import ViTConfig, check, check_choice
from tosa_jax.performance.candidates import Candidate

LIBRARIES = ("timm", "transformers")
"""Whose dense networks can be measured beside ours."""

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "none")
"""Of `torch.compile`; "none": the network is run as it is."""

INSTALL = 'pip install "tosa-jax[compare]"'
"""What is said where a library is missing."""

_OPENMP_REST = 0.05  # its threads wait for more work by spinning, which slows down who comes next
_WARM_UP_PASSES = 3  # compilation, the recording of CUDA graphs, a replay


def check_arguments(against: Sequence[str], task: str, mode: str) -> list[str]:
    """The libraries of `against`, without "none", imported; the GPU's memory is left for both frameworks.

    JAX reads `XLA_PYTHON_CLIENT_PREALLOCATE` when it first looks for devices: what is set already stays.

    Raises ConfigError for unknown names, for depth networks, and where a package is missing or broken.
    """
    for name in against:
        check_choice("--against", name, (*LIBRARIES, "none"))
    check_choice("--torch_compile", mode or "none", MODES)
    libraries = [name for name in dict.fromkeys(against) if name != "none"]
    if libraries:
        check(task == "classification",
              f"--against={libraries[0]} has no network for --task={task}; leave one of them out")  # fmt: skip
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
        # timm imports torchvision, whose build must be that of torch; this fails in several ways.
        other = "; --against=transformers needs no torchvision" if library == "timm" else ""
        raise ConfigError(
            f"--against={library}: {module} cannot be imported ({str(error)[:160]}){other}"
        ) from error


def settings(against: Sequence[str], dtype: str, mode: str, *, train: bool) -> dict[str, Any]:
    """What a reader of the numbers should know of how PyTorch ran, for the file of results."""
    if not against:
        return {}
    if _device_type() == "cpu":
        return {"torch_threads": num_cores(), "torch_compile": "none"}
    found = {"torch_compile": _mode(mode, train)}
    return found | ({"float32_products": _float32_products()} if dtype == "float32" else {})


def versions(against: Sequence[str]) -> dict[str, str]:
    """Versions of PyTorch and of these libraries."""
    names = ["torch", *against] if against else []
    return {name: load(name, name).__version__ for name in names}


def candidate(
    library: str, model: str, config: ViTConfig, batch_size: int, *, train: bool, mode: str = ""
) -> Candidate:
    """The dense network `config` of `library` with random weights, warmed up.

    A forward pass runs in inference mode; a training step is forward, backward and AdamW. Weights are stored in
    `config.param_dtype`; another `config.dtype` computes under autocast.

    Raises ConfigError if the library has no such network, DeviceError if there is no such device or it is full.
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
    """Where JAX runs: "cpu", "gpu" or "tpu"."""
    return jax.devices()[0].platform


def _device(torch: Any, library: str) -> str:
    """PyTorch's name of JAX's device, with threads and precision set as JAX has them."""
    platform = _device_type()
    if platform == "cpu":
        torch.set_num_threads(num_cores())
        return "cpu"
    if platform != "gpu" or not torch.cuda.is_available():
        raise DeviceError(
            f"--against={library}: JAX runs on a {platform}, and this PyTorch has none of its kind; install its CUDA "
            "build, or set JAX_PLATFORMS=cpu"
        )
    tf32 = _float32_products() == "TF32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    return "cuda"


def _float32_products() -> str:
    """What JAX multiplies float32 matrices in on a GPU: TF32, unless JAX_DEFAULT_MATMUL_PRECISION says otherwise."""
    exact = jax.config.jax_default_matmul_precision in ("float32", "highest", "F32_F32_F32")
    return "float32" if exact else "TF32"


def _mode(mode: str, train: bool) -> str:
    """CUDA graphs by default for a forward pass, which small networks spend on launches; not for training."""
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
    """Raise a ConfigError unless the network is as large as ours, small differences at its ends aside."""
    theirs = sum(p.numel() for p in network.parameters())
    ours = cost.num_params(cost.abstract_model(config))
    check(abs(theirs - ours) <= 0.02 * ours,
          f"--against={library}: its network has {theirs / 1e6:.2f} M parameters and ours {ours / 1e6:.2f} M: "
          "their times cannot be compared")  # fmt: skip


def _timm_network(model: str, config: ViTConfig) -> Any:
    timm = load("timm", "timm")
    check(timm.is_model(model),
          f"--against=timm: timm has no model {model!r}; --against=transformers builds any size")  # fmt: skip
    return timm.create_model(
        model,
        img_size=config.image_shape,
        num_classes=config.num_classes,
        in_chans=config.in_chans,
    )


def transformers_fields(config: ViTConfig) -> tuple[str, dict[str, Any]]:
    """The family of transformers that has this network, "ViT" say, and the fields of its configuration."""
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
    # It makes the two halves of a SwiGLU two thirds as wide as its ratio says.
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
        """Logits of the normalised class token; the mean of both with a distillation token."""

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
