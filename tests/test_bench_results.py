"""A sweep's files: whole, complete, and true to the records."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tosa_jax import bench
from tosa_jax.errors import DeviceError
from tosa_jax.models.method import METHODS
from tosa_jax.performance import results


def record(name, keep_rate, batch_size, ms, gmacs):
    """A record as `measure` makes it, with the fields that tables and plots read."""
    return {
        "name": name, "keep_rate": keep_rate, "batch_size": batch_size, "image_size": 224, "dtype": "float32",
        "train": False, "gmacs": gmacs, "ms": ms, "ms_iqr": 0.5, "img_per_sec": batch_size / ms * 1e3,
        "speedup": 10 / ms, "gmac_ratio": 4 / gmacs, "realised": 10 / ms / (4 / gmacs), "temp_bytes": None,
    }  # fmt: skip


def rows_of(batch_size):
    return [
        record("dense", None, batch_size, 10.0, 4.0),
        record("tosa", 0.5, batch_size, 8.0, 3.0),
        record("timm", None, batch_size, 20.0, 4.0),
    ]


def measure(model, keep_rates, *, batch_size, **fields):
    if batch_size > 16:
        raise DeviceError(f"batch_size={batch_size} is too large")
    return rows_of(batch_size)


@pytest.fixture
def argv(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "measure", measure)
    return ["--sweep", f"--out={tmp_path / 'results'}", "--name=x", "--keep_rate", "0.5"]


def test_files_hold_all_that_was_measured_and_why_the_rest_was_not(argv, tmp_path, capsys):
    assert bench.main([*argv, "--batch_size", "8", "16", "32"]) == 0
    assert capsys.readouterr().err.count("wrote ") == 3
    folder = tmp_path / "results"
    assert sorted(p.name for p in folder.iterdir()) == ["bench_x.json", "bench_x.md", "bench_x.png"]
    result = json.loads((folder / "bench_x.json").read_text())
    assert result["rows"] == rows_of(8) + rows_of(16)
    assert result["left_out"] == {"32": "batch_size=32 is too large"}
    assert result["command"].startswith("python -m tosa_jax.bench --sweep --out=")
    assert result["device"] and result["versions"]["jax"] and result["settings"]["rounds"] == 10
    text = (folder / "bench_x.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6 and len({line.count("|") for line in table}) == 1
    assert "| tosa | 0.5 | 16 | 3.000 | 8.0 | 0.5 | 2000.0 | 1.25x | 1.33x | 0.94 |" in table
    assert result["command"] in text and "Batch size 32 was left out" in text


def test_the_plot_shows_every_record(tmp_path):
    both = {"rows": rows_of(8) + rows_of(16), "device": "1 x cpu"}
    image = np.asarray(Image.open(io.BytesIO(results.plot(both))).convert("RGB")).astype(int)
    assert image.shape[1] > 900
    for colour in (METHODS["tosa"].colours[0], "#705030"):  # ToSA's and that of other frameworks
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(image - np.array(rgb)[None, None]).max(axis=2) < 8).sum() > 20
    fewer = results.plot(both | {"rows": rows_of(8)[:2]})
    assert fewer != results.plot(both | {"rows": rows_of(8)})


def test_nothing_is_written_if_something_goes_wrong(argv, monkeypatch, tmp_path):
    def fail(result):
        raise ZeroDivisionError

    monkeypatch.setattr(results, "plot", fail)
    with pytest.raises(ZeroDivisionError):
        bench.main([*argv, "--batch_size", "8"])
    assert not list((tmp_path / "results").iterdir())


def test_nothing_that_fits_is_an_error(argv, capsys):
    assert bench.main([*argv, "--batch_size", "32", "64"]) == 2
    assert "batch_size=64 is too large" in capsys.readouterr().err
