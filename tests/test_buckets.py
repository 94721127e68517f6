"""A work directory in a bucket, and data there. The bucket is a folder that can do only what object stores can."""

import json
import signal
import time

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import register_implementation
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils
from small import small_run

from tosa_jax.data.builders import prepare
from tosa_jax.data.pipeline import DataConfig, open_dataset
from tosa_jax.distributed.preemption import Stopped
from tosa_jax.errors import ConfigError, WorkdirError
from tosa_jax.paths import Mirror, as_path
from tosa_jax.reporting.report import read_report
from tosa_jax.train import runner, workdir
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.runner import run_stages
from tosa_jax.train.workdir import lease, open_workdir

pytestmark = pytest.mark.usefixtures("one_device")


class FakeBucket(DirFileSystem):
    """gs://bucket/x is the file bucket/x of a folder; nothing is appended to, and no folder need be made."""

    protocol = ("gs", "gcs")
    root = ""

    def __init__(self, **kwargs):
        super().__init__(path="-", fs=LocalFileSystem(auto_mkdir=True))

    @property
    def path(self):
        return self.root  # not the instance's: etils keeps that for ever

    @path.setter
    def path(self, value):
        pass

    def open(self, path, mode="rb", *args, **kwargs):
        assert "a" not in mode and "+" not in mode, f"{mode} in a bucket"
        return super().open(path, mode, *args)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The address of a bucket, and the folder that it is."""
    folder = tmp_path / "buckets"
    (folder / "b").mkdir(parents=True)
    monkeypatch.setattr(FakeBucket, "root", str(folder))
    for protocol in FakeBucket.protocol:
        register_implementation(protocol, FakeBucket, clobber=True)
    FakeBucket.clear_instance_cache()
    # TensorStore has a client of its own, and Orbax asks Google what kind of bucket it is.
    monkeypatch.setattr(tensorstore_utils, "_use_gcs_driver", lambda path: False)
    monkeypatch.setattr(
        tensorstore_utils, "_normalize_path", lambda path: str(path).replace("gs:/", f"{folder}", 1)
    )
    monkeypatch.setattr(gcs_utils, "get_bucket", lambda name: object())
    return "gs://b", folder / "b"


def test_a_run_in_a_bucket_stops_and_goes_on(bucket, digits_dir, monkeypatch):
    address, folder = bucket
    steps = {"steps": 12, "checkpoint_steps": 4}
    run = small_run(digits_dir, pretrain=steps, selector={"steps": 3}, log_steps=1)
    write, count = MetricWriter.write, []

    def write_and_signal(self, *args, **kwargs):
        write(self, *args, **kwargs)
        count.append(args)
        if len(count) == 6:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MetricWriter, "write", write_and_signal)
    with open_workdir(f"{address}/run", run) as path:
        assert (folder / "run/.lease").exists()
        with pytest.raises(Stopped):
            run_stages(run, path)
    assert not (folder / "run/.lease").exists()
    before = (folder / "run/metrics.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in before.splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and 6 <= len(steps) < 12

    with open_workdir(f"{address}/run", run) as path:
        report = run_stages(run, path)
    assert (folder / "run/metrics.jsonl").read_text().startswith(before)
    assert report["stages"]["pretrain"]["steps"] == 12
    assert json.loads((folder / "run/report.json").read_text())["results"] == report["results"]
    assert (folder / "run/selected_tokens.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "run/selectors.safetensors").exists()
    assert list((folder / "run/tensorboard/pretrain").iterdir())
    assert (folder / "run/checkpoints/pretrain/12").is_dir()

    monkeypatch.setattr(runner, "Runner", None)  # a finished run trains nothing
    with open_workdir(f"{address}/run", run) as path:
        assert run_stages(run, path) == read_report(f"{address}/run")
    with pytest.raises(WorkdirError, match="seed: 0 -> 1"):
        with open_workdir(f"{address}/run", small_run(digits_dir, seed=1)):
            pass


BEAT = 0.05


def test_a_bucket_is_leased_to_one_run(bucket, capsys):
    path = as_path(f"{bucket[0]}/run")
    with lease(path, beat=BEAT):
        with pytest.raises(WorkdirError, match="in use by another run"), lease(path, beat=BEAT):
            pass
    with lease(path, beat=BEAT):  # given back
        pass
    (bucket[1] / "run/.lease").write_text('{"owner": "killed", "beat": 0}')
    start = time.monotonic()
    with lease(path, beat=BEAT):
        assert time.monotonic() - start >= 3 * BEAT
        assert json.loads((bucket[1] / "run/.lease").read_text())["owner"] != "killed"
    assert "waiting" in capsys.readouterr().err


def test_a_run_whose_lease_was_taken_stops_as_by_a_signal(bucket, monkeypatch):
    path = as_path(f"{bucket[0]}/run")
    raised = []
    monkeypatch.setattr(workdir.signal, "raise_signal", raised.append)
    with lease(path, beat=BEAT):
        (bucket[1] / "run/.lease").write_text('{"owner": "another", "beat": 0}')
        end = time.monotonic() + 10
        while not raised and time.monotonic() < end:
            time.sleep(BEAT)
    assert raised == [signal.SIGTERM]
    assert (bucket[1] / "run/.lease").exists(), "another run's lease was removed"


def test_metrics_reach_a_bucket_in_intervals_and_when_asked(bucket):
    address, folder = bucket
    mirror = Mirror(as_path(f"{address}/x"), seconds=1000)
    (mirror.folder / "a").write_text("1")
    mirror.push(now=False)
    assert not (folder / "x/a").exists()
    mirror.push()
    assert (folder / "x/a").read_text() == "1"
    mirror.close()
    every_time = Mirror(as_path(f"{address}/x"), seconds=0)
    every_time.fetch("a")
    with (every_time.folder / "a").open("a") as file:
        file.write("2")
    every_time.push(now=False)
    assert (folder / "x/a").read_text() == "12"
    every_time.close()
    assert not every_time.folder.exists()


def test_data_is_found_in_a_bucket(bucket, digits_dir):
    address, folder = bucket
    fsspec.filesystem("file").copy(
        f"{digits_dir}/digits", str(folder / "data/digits"), recursive=True
    )
    facts = open_dataset(
        DataConfig(name="digits", data_dir=f"{address}/data", image_size=8, channels=1)
    ).facts
    assert (facts.num_train, facts.num_eval, facts.num_classes) == (1437, 360, 10)
    with pytest.raises(ConfigError, match="launch/prepare_data.sh"):
        prepare("digits", f"{address}/data")


def test_what_cannot_be_read_says_so(monkeypatch):
    with pytest.raises(ConfigError, match="mount other buckets"):
        as_path("s3://bucket/run")

    def missing(protocol):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ConfigError, match=r'gcsfs; pip install "tosa-jax\[gcs\]"'):
        as_path("gs://bucket/run")
