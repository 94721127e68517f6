"""Forms of one computation for several kinds of devices, and who gets which."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

_plain: contextvars.ContextVar[bool] = contextvars.ContextVar("plain", default=False)


def by_platform(*args: Any, default: Callable, **forms: Callable) -> Any:
    """The form for the platform that the program is compiled for, called with `args`: `jax.lax.platform_dependent`.

    forms    by JAX's name of the platform: tpu, cuda, cpu.
    default  for all others, and for all within `plain`.
    """
    if _plain.get():
        return default(*args)
    return jax.lax.platform_dependent(*args, default=default, **forms)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """What is traced in this context takes the default forms, of JAX's own operations alone: no kernels.

    For programs that are read elsewhere: kernels for NVIDIA GPUs are in Triton's and cuDNN's forms, which another
    version of JAX need not read, and converters to other formats do not know the choice between platforms.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)
