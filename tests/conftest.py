"""Strictness in one place: eight CPU devices, no silent broadcasting of ranks, every array annotation checked."""

import gc
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

# Tests compile many small programs and run each a few times: optimising them costs more than it brings.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
).strip()

import jax
import pytest
from _pytest import runner
from absl import flags
from flax import nnx
from flax.nnx import variablelib
from jax._src import compiler
from jax._src.interpreters import mlir
from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[1]

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Two programs with collectives in flight at once can starve each other of threads, and XLA then aborts.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Where in the code an operation comes from is written for each one, and nobody reads it here.
jax.config.update("jax_traceback_in_locations_limit", 0)
# What is not optimised compiles about as fast as JAX's cache writes it to a folder and reads it again.
jax.config.update("jax_enable_compilation_cache", False)
flags.FLAGS.mark_as_parsed()
# Tracing makes many objects that stay: the collector has little to find, and a tenth of the time to lose.
gc.set_threshold(200_000, 20, 20)

# JAX makes an MLIR context for each program: 4 ms, as long as it takes to lower a small one. One a thread does.
_contexts = threading.local()
_make_ir_context = getattr(mlir, "make_ir_context", None)  # not public: another JAX may have none


def _ir_context():
    if not hasattr(_contexts, "own"):
        _contexts.own = _make_ir_context()
    return _contexts.own


if _make_ir_context is not None:
    mlir.make_ir_context = _ir_context

# A run that resumes, or that is made again with one thing changed, traces programs that are compiled already.
_programs: dict[tuple, Any] = {}
_compile = getattr(compiler, "compile_or_get_cached", None)  # not public


def _compile_once(backend, module, devices, options, callbacks, *rest):
    if callbacks or backend.platform != "cpu":
        return _compile(backend, module, devices, options, callbacks, *rest)
    text = hashlib.sha256(mlir.module_to_bytecode(module)).digest()
    key = text, options.SerializeAsString(), tuple(device.id for device in devices.flat)
    if key not in _programs:
        _programs[key] = _compile(backend, module, devices, options, callbacks, *rest)
    return _programs[key]


if _compile is not None and hasattr(mlir, "module_to_bytecode"):
    compiler.compile_or_get_cached = _compile_once

# Flax asks of each value that a module gets, several times, whether it is a reference to an array. JAX answers slowly.
_NO_REFERENCES = (str, int, float, tuple, list, dict, type(None), nnx.Module, nnx.Variable)
_is_array_ref = getattr(variablelib, "is_array_ref", None)  # not public

if _is_array_ref is not None:
    variablelib.is_array_ref = lambda x: not isinstance(x, _NO_REFERENCES) and _is_array_ref(x)

# Checks shapes and dtypes of arrays in every function of the modules that annotate them, at run time. In all modules it
# would take a seventh of the time of a test that traces; their other types are pyright's.
install_import_hook(
    [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "tosa_jax").rglob("*.py")
        if "jaxtyping" in path.read_text()
    ],
    "type_checker.check",
)


def pytest_collection_finish():
    """Leaves what was imported out of all collections."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def freeze():
    """Leaves what stays of a module, most of it compiled programs, out of all later collections."""
    yield
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """Runs a test, whose calls all find room in one chunk of Python's stack."""
    return _with_room(lambda: runner.pytest_runtest_protocol(item, nextitem))


def _with_room(work):
    return work()


# Python keeps frames in chunks of 16 KiB, mapped when a call does not fit and unmapped when it returns. A loop at the
# edge of one maps memory at each call: most page faults were that. A frame of 1 MiB makes its chunk one of 2 MiB.
_with_room.__code__ = _with_room.__code__.replace(co_stacksize=2**17)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A directory with the prepared digits."""
    from tosa_jax.data.builders import prepare_own

    folder = tmp_path_factory.mktemp("tfds")
    prepare_own("digits", folder)
    return str(folder)


@pytest.fixture
def one_device():
    """Runs take one device, though there are eight."""
    from small import runs_on_one_device

    with runs_on_one_device():
        yield
