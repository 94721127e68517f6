"""A checkpoint belongs to no number of devices, no mesh and no number of data workers."""

import dataclasses
import json
import shutil
import signal

import jax
import pytest
from small import small_run

from tosa_jax.data.pipeline import Dataset
from tosa_jax.distributed.mesh import MeshConfig, make_mesh
from tosa_jax.distributed.preemption import Stopped, StopRequest
from tosa_jax.models.weights.run_checkpoints import find_checkpoint, has_checkpoint, saved_steps
from tosa_jax.train.checkpoints import Checkpoints
from tosa_jax.train.loop import train_stage
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.runner import Runner
from tosa_jax.train.stages import plan_stages

TRAIN_BATCHES = Dataset.train_batches

STEPS, MIDDLE = 6, 3


class StopAt(StopRequest):
    """A signal that arrives before the given step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def agreed(self) -> int | None:
        self.left -= 1
        return signal.SIGTERM if self.left < 0 else None


def train_on(mesh, run, folder, monkeypatch, stop=None):
    """Losses by step, and a sum of the pixels of each batch, of the steps that were done now."""
    runner = Runner(run, folder, StopRequest())
    builder = dataclasses.replace(runner.builder, mesh=mesh)
    stage_run = builder.stage_run(plan_stages(run)[0][0], runner.params)
    seen = []

    def recorded(*args, **kwargs):
        for batch in TRAIN_BATCHES(*args, **kwargs):
            seen.append(int(batch["image"].sum(dtype=int)))
            yield batch

    monkeypatch.setattr(Dataset, "train_batches", recorded)
    with (
        Checkpoints(folder / "stage", stage_run.setup.task.best_metric) as checkpoints,
        MetricWriter(folder) as writer,
    ):
        try:
            train_stage(stage_run, run, mesh, checkpoints, writer, stop or StopRequest())
        except Stopped:
            assert stop
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}, seen


@pytest.fixture(scope="module")
def written(digits_dir, tmp_path_factory):
    """A run that eight devices did from end to end, and the folder of one that they left in the middle."""
    folder = tmp_path_factory.mktemp("eight")
    fields = {"steps": STEPS, "ema_decay": 0.9, "drop_path_rate": 0.2, "mixup": 0.8}
    run = small_run(digits_dir, pretrain=fields, log_steps=1, model={"plan": "standard"})
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    with pytest.MonkeyPatch.context() as patch:
        whole = train_on(mesh, run, folder / "whole", patch)
        half, seen = train_on(mesh, run, folder / "half", patch, StopAt(MIDDLE))
    assert list(half) == list(range(1, MIDDLE + 1)) and seen == whole[1][:MIDDLE]
    return run, folder / "half", whole


@pytest.mark.parametrize(
    ("devices", "mesh", "data"),
    [
        (1, MeshConfig(), {"workers": "processes:1"}),
        (4, MeshConfig(fsdp=2, model=2), {"workers": "threads:1", "prefetch_batches": 1}),
    ],
)
def test_eight_devices_checkpoint_goes_on_on_fewer(
    written, tmp_path, monkeypatch, devices, mesh, data
):
    run, half, (losses, seen) = written
    folder = shutil.copytree(half, tmp_path / "run")
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, **data))
    again, rest = train_on(make_mesh(mesh, jax.devices()[:devices]), run, folder, monkeypatch)
    assert rest == seen[MIDDLE:], "other examples or other draws"
    assert again.keys() == losses.keys()
    assert max(abs(again[step] - losses[step]) for step in losses) <= 1e-5


def test_only_finished_checkpoints_count(tmp_path):
    assert not has_checkpoint(tmp_path)
    for name in (
        "pretrain/40/state",
        "selector/30.orbax-checkpoint-tmp/state",
        "selector/50/facts",
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints/pretrain/40"
    for step in (9, 10):
        (tmp_path / f"checkpoints/selector/{step}/state").mkdir(parents=True)
    assert saved_steps(tmp_path / "checkpoints/selector") == [9, 10]
    for folder in (tmp_path, tmp_path / "checkpoints/selector"):
        assert find_checkpoint(folder) == tmp_path / "checkpoints/selector/10"
    assert has_checkpoint(tmp_path) and find_checkpoint(tmp_path / "checkpoints") is None
