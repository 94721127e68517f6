"""Starts of a small run that can be killed at any moment, and what a run has left in its work directory."""

import contextlib
import hashlib
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tosa_jax.config import MAY_CHANGE

ROOT = Path(__file__).parents[1]

RECIPE = """
from tosa_jax.config import default_config

def get_config(stages="all"):
    config = default_config()
    config.update(batch_size=16, log_steps=1, checkpoint_minutes=0.0)
    config.model.update(
        embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0,
        image_size=8, patch_size=2, in_chans=1, num_classes=10,
    )
    config.data.update(name="digits", in_memory=True, augment="shift", workers="threads:1")
    config.inputs.update(mean=(0.3,), std=(0.4,))
    config.eval.update(batch_size=360, figure_images=2)
    config.pretrain.update(
        steps=12, ema_decay=0.9, drop_path_rate=0.2, mixup=0.8, erase_prob=0.2,
        checkpoint_steps=3, eval_steps=6,
    )
    if stages == "all":
        config.selector.update(steps=6, checkpoint_steps=2)
        config.finetune.update(steps=8, checkpoint_steps=2, eval_steps=4, ema_decay=0.5)
    else:
        config.eval.figure_images = 0
    return config
"""


def prepare(folder: Path) -> None:
    """Puts the recipe and the prepared digits into a folder, which every start of a run reads."""
    from tosa_jax.data.builders import prepare_own

    (folder / "tiny.py").write_text(RECIPE)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        prepare_own("digits", folder / "data")


def arguments(folder: Path, workdir: Path, stages: str, *more: str) -> list[str]:
    """The command line of `tosa_jax.main` that starts the run in a work directory."""
    return [
        f"--config={folder}/tiny.py:{stages}", f"--workdir={workdir}",
        f"--config.data.data_dir={folder}/data", *more,
    ]  # fmt: skip


def load_everything() -> None:
    """Imports what a run imports, so that a fork of this process need not. JAX's devices stay untouched."""
    import matplotlib.backends.backend_agg  # noqa: F401

    import tosa_jax.main
    import tosa_jax.train.runner
    import tosa_jax.train.workdir  # noqa: F401


class Start:
    """One start of a run, the leader of a process group of its own.

    forked   whether it is a fork of this process, which has imported everything, or a Python of its own.
    kill_at  a fork kills its group before so many accesses to files below the work directory; 0: never.
    """

    def __init__(
        self, argv: list[str], workdir: Path, log: Path, forked: bool = True, kill_at: int = 0
    ) -> None:
        self.log, self.began, self.status = log, time.monotonic(), None
        with log.open("wb") as file:
            if not forked:
                command = [sys.executable, "-m", "tosa_jax.main", *argv]
                streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
                child = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)
                self.pid, child.returncode = child.pid, 0  # this class waits for it
                return
            self.pid = os.fork()
            if not self.pid:
                os.setsid()
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                end_process(lambda: _run(argv, workdir, kill_at))

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def used(self) -> float:
        """Seconds of CPU time that the leader has used."""
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return math.inf

    def wait_until_used(self, seconds: float) -> bool:
        """Whether it runs on until it has used so many seconds of CPU time."""
        while self.poll() is None and self.used() < seconds:
            time.sleep(0.003)
        return self.poll() is None

    def wait(self, seconds: float) -> int | None:
        """The exit status, or None if it runs on after so many seconds."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        return self.status

    def send(self, signum: int, *, group: bool = True) -> None:
        """Sends a signal to all processes of the start, or to the leader alone, if they are there."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, signum)

    def others(self) -> int:
        """How many processes of the group there are beside the leader."""
        count = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                alive = fields[0] not in "ZX" and int(stat.parent.name) != self.pid
                count += alive and int(fields[2]) == self.pid
        return count

    def said(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace")


def _run(argv: list[str], workdir: Path, kill_at: int) -> int:
    from tosa_jax import main

    if kill_at:
        _kill_at_access(str(workdir), kill_at)
    return main.main(argv)


def end_process(work: Callable[[], int]) -> None:
    """Ends this fork with the status that `work` returns, as Python ends: threads, then what is due at exit."""
    import atexit
    import threading
    import traceback

    try:
        try:
            status = work()
        except BaseException:
            traceback.print_exc()
            status = 1
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _kill_at_access(folder: str, kill_at: int) -> None:
    """Kills this process group before the access of that number to files below a folder."""
    left = kill_at

    def count(event: str, args: tuple) -> None:
        nonlocal left
        if event in _ACCESSES and any(folder in str(x) for x in args[:2]):
            left -= 1
            if left == 0:
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(count)


_ACCESSES = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
}


def in_fork(work: Callable[[], Any]) -> Any:
    """What `work` returns, a JSON value, when a fork of this process calls it: so this one starts no devices."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)

        def write() -> int:
            with os.fdopen(writer, "w") as file:
                json.dump(work(), file)
            return 0

        end_process(write)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def end_state(workdir: Path) -> dict[str, Any]:
    """What a finished run leaves that must not depend on how often it was stopped: JSON values by name."""
    report = json.loads((workdir / "report.json").read_text())
    _what_counts(report["config"])
    for facts in report["stages"].values():
        facts.pop("seconds")
    for row in report["results"]:
        row.pop("img_per_sec")
    names = ("classes.txt", "selected_tokens.png", "selectors.safetensors")
    files = [workdir / name for name in names if (workdir / name).exists()]
    left = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    known = {
        *left,
        "config.json",
        "report.json",
        "report.html",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
    }
    hidden = {item.name for item in workdir.iterdir() if not item.name.endswith((".lock",))} - known
    return {
        "report": report,
        "page": (workdir / "report.html").read_text().rstrip().endswith("</html>"),
        "files": left,
        "config": _what_counts(json.loads((workdir / "config.json").read_text())),
        "other files": sorted(hidden),
        "arrays": {folder.name: _newest(folder) for folder in (workdir / "checkpoints").iterdir()},
        "records": _records(workdir / "metrics.jsonl"),
        "tensorboard": {
            folder.name: shown(folder) for folder in sorted((workdir / "tensorboard").iterdir())
        },
    }


def _what_counts(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration without what may change, such as the workers, which starts have different ones of."""
    for field in MAY_CHANGE:
        section, _, name = field.rpartition(".")
        (config[section] if section else config).pop(name, None)
    return config


def _newest(stage: Path) -> dict[str, Any]:
    """The newest checkpoint of a stage: its step, a digest of each array, its facts, and what lies beside it."""
    import jax
    import orbax.checkpoint as ocp

    steps = sorted(int(item.name) for item in stage.iterdir() if item.name.isdigit())
    with ocp.PyTreeCheckpointer() as reader:
        path = stage / str(steps[-1])
        tree = reader.metadata(path / "state").item_metadata.tree
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        arrays = reader.restore(path / "state", restore_args=kinds)
    facts = json.loads((path / "facts/metadata").read_text())
    facts.pop("seconds")
    if "run" in facts:
        _what_counts(facts["run"]["config"])
    digests = {
        jax.tree_util.keystr(name): hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()
        for name, x in jax.tree_util.tree_leaves_with_path(arrays)
    }
    return {
        "step": steps[-1],
        "arrays": digests,
        "facts": facts,
        "beside it": sorted(x.name for x in stage.iterdir() if not x.name.isdigit()),
        "scores": json.loads((stage / "scores.json").read_text()),
    }


def _records(path: Path) -> list[Any]:
    """The records in their order, without times."""
    lines = path.read_text().splitlines(keepends=True)
    assert all(line.endswith("\n") for line in lines), "a torn line"
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in x.items() if not k.startswith("perf/")} for x in records]


def shown(folder: Path) -> dict[str, list[Any]]:
    """What TensorBoard shows of a folder of event files: [step, value] by tag, without times.

    It reads the files in the order of their names, a file until its first torn event; an event that says that a run
    started at a step hides those from that step on.
    """
    tags: dict[str, list[Any]] = {}
    for event in events(folder):
        if event.HasField("session_log"):
            tags = {tag: [x for x in xs if x[0] < event.step] for tag, xs in tags.items()}
        for value in event.summary.value:
            shows = value.simple_value
            if value.HasField("image"):
                shows = hashlib.sha256(value.image.encoded_image_string).hexdigest()
            if not value.tag.startswith("perf/"):
                tags.setdefault(value.tag, []).append([event.step, shows])
    return dict(sorted(tags.items()))


def events(folder: Path) -> Iterator[Any]:
    """The whole events of the event files in a folder."""
    from tensorboardX.proto import event_pb2

    make: Any = event_pb2
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while len(data) >= 12:
            (size,) = struct.unpack("<Q", data[:8])
            if len(data) < size + 16:
                break
            yield make.Event.FromString(data[12 : 12 + size])
            data = data[size + 16 :]


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """Where two JSON values differ, one line each."""
    if isinstance(left, dict) and isinstance(right, dict):
        names = sorted(left.keys() | right.keys())
        return [x for n in names for x in differences(left.get(n), right.get(n), f"{where}/{n}")]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [x for i, (a, b) in pairs for x in differences(a, b, f"{where}[{i}]")]
    return [] if left == right else [f"{where}: {str(left)[:300]} -> {str(right)[:300]}"]
