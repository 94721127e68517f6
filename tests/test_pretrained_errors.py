"""Files that do not fit, are damaged or are no weights: one clear line, and the model as it was."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from weight_samples import GOLDEN, assert_refused, tiny, tiny_weights, write, write_pth


def test_names_are_listed_up_to_eight(tmp_path: Path) -> None:
    weights = tiny_weights(depth=4)
    weights["extra.weight"] = np.ones((2, 2), np.float32)
    del weights["norm.bias"]
    weights["cls_token"] = np.ones((1, 1, 17), np.float32)
    model = tiny()
    match = (
        r"missing: norm/bias; left over: blocks/2.* and 17 more; "
        r"of another shape: cls_token \(file \[1, 1, 17\], model \[1, 1, 16\]\)"
    )
    assert_refused(model, write(tmp_path / "a", weights), match)


@pytest.mark.parametrize(("theirs", "ours", "match"), [
    ({"embed_dim": 32}, {}, "of another shape: blocks/0/attn/proj/bias .* and 22 more"),
    ({"depth": 3}, {}, "left over: blocks/2"),
    ({}, {"depth": 3}, "missing: blocks/2"),
    ({"distilled": True}, {}, "left over: dist_token, head_dist.* another shape: pos_embed"),
    ({}, {"distilled": True}, "missing: dist_token; of another shape: pos_embed"),
    ({"layer_scale": 1.0}, {}, "left over: blocks/0/ls1/gamma"),
    ({}, {"layer_scale": 1.0}, "missing: blocks/0/ls1/gamma"),
    ({"patch_size": 4, "image_size": 16}, {}, "another shape: patch_embed/proj/kernel"),
    ({"reg_tokens": 4, "pos_embed_prefix": False}, {}, "left over: reg_token"),
])  # fmt: skip
def test_the_wrong_variant_is_refused(theirs, ours, match: str, tmp_path: Path) -> None:
    assert_refused(tiny(**ours), write(tmp_path / "a", tiny_weights(**theirs)), match)


def npz(value: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, a=value)
    return file.getvalue()


def damaged_npz() -> bytes:
    data = bytearray(npz(np.ones(100)))
    data[len(data) // 2] ^= 1
    return bytes(data)


def encrypted(zipped: bytes) -> bytes:
    """As if each of its parts were encrypted."""
    data = bytearray(zipped)
    for start, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.find(start)
        while at >= 0:
            data[at + flags] |= 1
            at = data.find(start, at + 1)
    return bytes(data)


def damaged_pth(path: Path) -> bytes:
    data = bytearray(write_pth(path, tiny_weights()).read_bytes())
    data[len(data) // 2] ^= 1
    return bytes(data)


@pytest.mark.parametrize(("make", "match"), [
    (lambda p: (GOLDEN / "torch_zip.pth").read_bytes()[:-900], "damaged or cut short"),
    (lambda p: (GOLDEN / "torch_legacy.pth").read_bytes()[:-40], "cut short .*bytes are missing"),
    (lambda p: (GOLDEN / "torch_legacy.pth").read_bytes()[:300], "damaged or cut short"),
    (damaged_pth, "damaged or cut short .*CRC"),
    (lambda p: write(p, tiny_weights()).read_bytes()[:-1], "damaged or cut short"),
    (lambda p: write(p, tiny_weights()).read_bytes()[:40], "damaged or cut short"),
    (lambda p: npz(np.ones(100))[:-40], "damaged or cut short"),
    (lambda p: npz(np.ones(9)).replace(b"PK\1\2", b"PK\1\0"), "damaged or cut short .*central"),
    (lambda p: damaged_npz(), "is damaged .*CRC"),
    (lambda p: encrypted(npz(np.ones(9))), "is damaged .*encrypted"),
    (lambda p: encrypted((GOLDEN / "torch_zip.pth").read_bytes()), "is damaged .*encrypted"),
    (lambda p: npz(np.array([{"a": 1}])), "holds more than numbers .*holds objects"),
    (lambda p: b"", "is empty"),
    (lambda p: b"<!DOCTYPE html><html><body>404", "is a web page"),
    (lambda p: b"\n <html>", "is a web page"),
    (lambda p: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    (lambda p: pickle.dumps({"a": 1}), "not one that torch.save wrote"),
    (lambda p: b"\x93NUMPY\x01\x00v\x00{'descr'", "neither a .pth, a .safetensors nor an .npz"),
    (lambda p: write_pth(p, [1, 2]).read_bytes(), "holds no state dict, only: list"),
    (lambda p: write_pth(p, {"epoch": 1}).read_bytes(), "holds no state dict, only: epoch"),
    (lambda p: write_pth(p, tiny_weights(), offset=1).read_bytes(), "lies outside"),
])  # fmt: skip
def test_bad_files_are_one_clear_line(make, match: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(make(tmp_path / "made"))
    assert_refused(tiny(), path, match)


def test_other_zips_and_missing_paths(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as other:
        other.writestr("a.txt", "a")
    assert_refused(tiny(), tmp_path / "a.zip", "not one that torch.save wrote")
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    assert_refused(tiny(), tmp_path / "a.npz", "missing: .*; left over: a. Is it the right")
    with zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        with zipfile.ZipFile(GOLDEN / "torch_zip.pth") as real:
            for name in real.namelist():
                bomb.writestr(name, real.read(name))
    assert_refused(tiny(), tmp_path / "b.pth", "compressed zip file")
    assert_refused(tiny(), tmp_path / "none.pth", "does not exist; give a .pth")
    assert_refused(tiny(), tmp_path, "without model.safetensors, pytorch_model.bin or checkpoints")


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_runs_nothing(legacy: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    data = pickle.dumps({"model": Evil(marker)}, 2)
    pickle.loads(data)["model"].close()
    assert marker.exists()  # the pickle works where it is allowed to
    marker.unlink()
    if legacy:
        from tosa_jax.models.weights.torch_pickle import LEGACY_MAGIC

        facts = [LEGACY_MAGIC, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(x, 2) for x in facts) + data + pickle.dumps([], 2))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
    assert_refused(tiny(), path, r"asks to run io.open .* nothing was run")
    assert not marker.exists()
