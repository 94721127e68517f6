"""A tiny network, its weights, and files of them in released forms."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from golden.pretrained_cases import random_weights, timm_shapes

from tosa_jax.errors import WeightsError
from tosa_jax.models.params import get_params
from tosa_jax.models.variants import variant_config
from tosa_jax.models.weights.load import load_pretrained
from tosa_jax.tasks import create_model

GOLDEN = Path(__file__).parent / "golden"


# A network of every part that files have, small enough to load often.
TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "image_size": 32, "patch_size": 8}
TINY["num_classes"] = 5


def tiny(seed: int = 0, **fields):
    return create_model("vit", rngs=nnx.Rngs(seed), **(TINY | fields))


def tiny_weights(**fields) -> dict[str, np.ndarray]:
    """timm's state dict for `tiny(**fields)`."""
    return random_weights(timm_shapes(variant_config("vit", **(TINY | fields))))


def write(path: Path, arrays: dict[str, np.ndarray], **metadata: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    path.write_bytes(safetensors.numpy.save(arrays, metadata or None))
    return path


def same(a, b) -> bool:
    a, b = get_params(a), get_params(b)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a
    )


def assert_refused(model, path, match: str, **kwargs) -> None:
    """One line that matches, and the model as it was."""
    before = {name: np.asarray(x) for name, x in get_params(model).items()}
    with pytest.raises(WeightsError, match=match) as caught:
        load_pretrained(model, path, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900
    assert all(np.array_equal(x, before[name]) for name, x in get_params(model).items())


class _Global:
    """Pickles as a reference to a name that need not exist here."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _TorchPickler(pickle._Pickler):
    """Writes what torch.save writes, from NumPy arrays."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, _Global):
            return self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        if isinstance(obj, np.ndarray):
            key = str(len(self.arrays))
            self.arrays.append(np.ascontiguousarray(obj))
            strides = tuple(step // obj.itemsize for step in self.arrays[-1].strides)
            self.save(_Global("torch._utils", "_rebuild_tensor_v2"))
            self.write(pickle.MARK)
            storage = ("storage", _Global("torch", "FloatStorage"), key, "cpu", obj.size)
            super().save(storage, False)
            self.write(pickle.BINPERSID)
            for part in (self.offset, obj.shape, strides, False, None):
                super().save(part)
            return self.write(pickle.TUPLE + pickle.REDUCE)
        return super().save(obj, save_persistent_id)


def write_pth(path: Path, tree, offset: int = 0) -> Path:
    """A zip as torch.save writes it."""
    stream = io.BytesIO()
    pickler = _TorchPickler(stream, 2)
    pickler.arrays, pickler.offset = [], offset
    pickler.dump(tree)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        for i, array in enumerate(pickler.arrays):
            archive.writestr(f"archive/data/{i}", array.tobytes())
    return path
