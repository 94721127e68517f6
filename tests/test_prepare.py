"""The prepare entry: exit statuses, what it prints, and where each kind of set goes."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.test_image_folder import fill
from tests.test_imagenet import COUNTS, write_tars
from tosa_jax import prepare
from tosa_jax.data.builders import imagenet, preparing

ROOT = Path(__file__).parents[1]


def run(tmp_path: Path, *options: str) -> int:
    data_dir = f"--config.data.data_dir={tmp_path / 'tfds'}"
    return prepare.main([f"--config={ROOT / 'configs/digits.py'}", data_dir, *options])


@pytest.fixture(autouse=True)
def no_cache_of_programs(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")


def test_digits(tmp_path, capsys):
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert f"digits is in {tmp_path / 'tfds/digits/1.0.0'}" in out
    assert "train: 1437 examples" in out and "test: 360 examples" in out
    assert out.splitlines()[-1].startswith("next: python -m tosa_jax.main --config=")
    info = tmp_path / "tfds/digits/1.0.0/dataset_info.json"
    before = info.stat().st_mtime_ns
    assert run(tmp_path) == 0 and info.stat().st_mtime_ns == before
    assert run(tmp_path, "--overwrite") == 0 and info.stat().st_mtime_ns > before
    assert "--overwrite" not in capsys.readouterr().out


def test_imagenet_and_folder(tmp_path, capsys, monkeypatch):
    write_tars(tmp_path / "tars")
    source = f"--config.data.source_dir={tmp_path / 'tars'}"
    assert run(tmp_path, "--config.data.name=imagenet2012", source) == 2
    error = capsys.readouterr().err
    assert "9 images of 9 classes, but 50000 are expected" in error and error.count("\n") == 1
    monkeypatch.setitem(imagenet.EXPECTED_COUNTS, "train", COUNTS["train"])
    monkeypatch.setitem(imagenet.EXPECTED_COUNTS, "validation", COUNTS["validation"])
    assert run(tmp_path, "--config.data.name=imagenet2012", source) == 0
    out = capsys.readouterr().out
    assert "train: 30 examples" in out and "note: config.data.eval_split='test' is not there" in out
    fill(tmp_path / "raw/a", 10)
    source = f"--config.data.source_dir={tmp_path / 'raw'}"
    assert run(tmp_path, "--config.data.name=image_folder", source) == 0
    assert "validation: 1 examples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config.data.name=cifar10"], 'pip install "tosa-jax[prepare]"'),
        (["--config.data.name=fashion_mnst"], "did you mean 'fashion_mnist'?"),
        (["--config.data.name=imagenet2012"], "set source_dir to the folder of ILSVRC2012_img_val"),
        (["--config.data.name="], "config.data.name is empty"),
        (["--config.data.source_dir=x"], "digits has no files"),
        (["--config.data.name=letters", "--config.data.source_dir=x"], "no train-images-idx3"),
        (["--config.data.name=image_folder"], "set it to the folder of images"),
        (["--config.data.nam=digits"], "command line:"),
        (["--overwritten"], "command line:"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(tmp_path, capsys, options, message, monkeypatch):
    monkeypatch.setattr(preparing.importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1 or message == "command line:"
    assert not (tmp_path / "tfds").exists()


def test_a_data_dir_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "tfds").write_text("a file")
    assert run(tmp_path) == 2
    assert "cannot prepare digits there" in capsys.readouterr().err
    fill(tmp_path / "raw", 2)
    source = f"--config.data.source_dir={tmp_path / 'raw'}"
    assert run(tmp_path, "--config.data.name=image_folder", source) == 2
    assert "cannot prepare image_folder there" in capsys.readouterr().err


def test_stock_sets_are_left_to_tfds(tmp_path, capsys, monkeypatch):
    calls = []

    class Stock:
        data_path = tmp_path / "tfds/cifar10/3.0.2"

        def download_and_prepare(self, **options):
            calls.append(options)
            raise AssertionError("manual download needed")

    monkeypatch.setattr(preparing.importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(preparing.tfds, "builder", lambda name, data_dir: Stock())
    assert run(tmp_path, "--config.data.name=cifar10") == 2
    assert calls == [{"file_format": "array_record"}]
    assert "TFDS cannot prepare cifar10: manual download needed" in capsys.readouterr().err


def test_stopped_by_control_c(tmp_path, capsys, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "prepare_own", stop)
    assert run(tmp_path) == 130
    assert "start the same command again" in capsys.readouterr().err


@pytest.mark.subprocess
def test_help_needs_nothing_else():
    done = subprocess.run(
        [sys.executable, "-m", "tosa_jax.prepare", "--help"], capture_output=True, text=True,
        cwd=ROOT, check=True,
    )  # fmt: skip
    assert "--overwrite" in done.stdout
