"""What runs write, and the flags of a run, for `tests.hostile`: small whole texts, and how they are read."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from tests.hostile_format import DEEP, GOLDEN, VALUES, Bytes, Format, mutate_json


def run_config() -> dict[str, Any]:
    """The configuration of a small run, as config.json has it."""
    from tosa_jax.config import default_config, make_run_config, to_json

    config = default_config()
    config.model.update(
        embed_dim=16, depth=2, num_heads=2, image_size=8, patch_size=2, in_chans=1, num_classes=3
    )
    config.data.update(name="digits", data_dir="unused")
    config.inputs.update(mean=(0.3,), std=(0.4,))
    config.pretrain.update(steps=4)
    return json.loads(json.dumps(to_json(make_run_config(config))))


def config_json() -> Format:
    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.config import RunConfig
        from tosa_jax.inference.loading import read_run

        (folder / "config.json").write_bytes(content)
        assert isinstance(read_run(folder), RunConfig)

    text = json.dumps(run_config()).encode()
    return Format([text], read, 8, DEEP, is_json=True)


def report_json() -> Format:
    facts = {
        "steps": 4,
        "seconds": 1.5,
        "after": {"acc1": 0.5, "loss": 1.0},
        "row": "dense",
        "keep_rate": None,
    }
    rows = [
        {
            "name": name,
            "keep_rate": rate,
            "split": "test",
            "count": 9,
            "metrics": {"acc1": 0.5},
            "gmacs": 0.1,
        }
        for name, rate in (("dense", None), ("tosa", 0.5), ("random", [0.5, 0.25]))
    ]
    for row in rows:
        row["img_per_sec"] = 10.0
    report = {
        "config": run_config(),
        "device": "cpu",
        "versions": {"jax": "1"},
        "stages": {"pretrain": facts},
    }

    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.reporting import page, report

        (folder / "report.json").write_bytes(content)
        found = report.read_report(folder)
        assert found is not None
        table = report.format_table(found)
        assert table.count("\n") < 100
        page.write_page(folder, found)

    text = json.dumps(report | {"results": rows}).encode()
    # Read once before anything is watched: matplotlib looks for fonts the first time.
    return Format([text], read, 1, DEEP, is_json=True, start=lambda folder: read(text, folder))


def metrics_jsonl() -> Format:
    records = [
        {
            "stage": "pretrain",
            "step": i,
            "train/loss": 1.0 / (1 + i),
            "val/acc1": 0.5,
            "perf/img_per_sec": None,
        }
        for i in range(6)
    ]

    def change(data: bytes, rng: np.random.Generator, general: Bytes) -> bytes:
        lines = data.splitlines()
        i = int(rng.integers(len(lines)))
        lines[i] = mutate_json(lines[i], rng) if rng.random() < 0.7 else general(lines[i], rng)
        return b"\n".join(lines) + b"\n"

    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.reporting import page
        from tosa_jax.train.metric_writer import MetricWriter

        (folder / "metrics.jsonl").write_bytes(content)
        page.write_page(folder, {"results": [], "stages": {}})
        with MetricWriter(folder) as writer:
            writer.truncate("pretrain", 3)

    text = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    bombs = tuple(text + bomb + b"\n" for bomb in DEEP)
    start = lambda folder: read(text, folder)  # noqa: E731  # matplotlib looks for fonts
    return Format([text], read, 0.5, bombs, mutate=change, start=start)


def config_flags() -> Format:
    from tosa_jax.config import default_config
    from tosa_jax.reporting.page import flat_lines

    fields = [line.replace(" = ", "=", 1) for line in flat_lines(default_config().to_dict())]

    def change(data: bytes, rng: np.random.Generator, general: Bytes) -> bytes:
        line = fields[int(rng.integers(len(fields)))]
        name, _, value = line.partition("=")
        draw = rng.random()
        if draw < 0.4:
            value = str(VALUES[int(rng.integers(len(VALUES)))])
        elif draw < 0.6:
            value = repr(
                tuple(VALUES[int(i)] for i in rng.integers(len(VALUES), size=int(rng.integers(4))))
            )
        elif draw < 0.9:
            value = general(value.encode() or b"0", rng).decode("latin-1")
        else:
            name = general(name.encode(), rng).decode("latin-1")
        return f"{name}={value}".replace("\0", "").encode()

    def start(folder: Path) -> None:
        text = "from tosa_jax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
        text += (
            "    config.data.name = 'digits'\n    config.pretrain.steps = 4\n    return config\n"
        )
        (folder / "recipe.py").write_text(text)

    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.cli import flags
        from tosa_jax.config import make_run_config
        from tosa_jax.train.stages import plan_stages

        config, _ = flags.parse("", [f"--config={folder / 'recipe.py'}", f"--{content.decode()}"])
        run = make_run_config(config)
        stages, rows = plan_stages(run)
        assert stages and rows and run.batch_size >= 1 and run.model.num_tokens >= 1
        optim = run.pretrain.optim(10, run.batch_size)
        assert optim.steps >= optim.warmup_steps

    harm = (
        "10" * 5000,
        "(" * 5000,
        "(" * 100 + ")" * 100,
        "__import__('os').system('touch touched')",
        "1e999",
        "9" * 40,
    )
    names = (
        "model.depth",
        "seed",
        "inputs.mean",
        "model.keep_rate",
        "data.workers",
        "init_from",
        "pretrain.epochs",
    )
    bombs = tuple(f"config.{name}={value}".encode() for name in names for value in harm)
    return Format([b""], read, 5, bombs, mutate=change, start=start)


def in_child(make: Callable[[], bytes]) -> bytes:
    """What a function returns, called in another process: JAX's threads are not there in the children of this one."""
    end, pipe = os.pipe()
    if (pid := os.fork()) == 0:
        with open(pipe, "wb") as file:
            file.write(make())
        os._exit(0)
    os.close(pipe)
    with open(end, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    return data


def tiny_model() -> Any:
    """A network with selectors."""
    from flax import nnx

    from tosa_jax.tasks import create_model

    sizes = {"embed_dim": 8, "depth": 2, "num_heads": 2, "image_size": 8, "patch_size": 4}
    return create_model("vit", **sizes, num_classes=3, keep_rate=0.5, rngs=nnx.Rngs(0))


def saved_model(*, selectors: bool) -> Callable[[], Format]:
    """The format of what the project says in the header of its own weight files: of selectors, or of a `Predictor`."""

    def write(path: Path) -> None:
        from tosa_jax.data.decoding import Preprocess
        from tosa_jax.inference import loading
        from tosa_jax.models.weights.load import save_selectors

        model = tiny_model()
        if selectors:
            return save_selectors(model, path)
        form = Preprocess(image_size=8, channels=3)
        from tosa_jax.tasks.classification import Classification

        loading.save(
            loading.LoadedModel(
                model=model,
                form=form,
                mean=(0.5,),
                std=(0.5,),
                options=Classification.options(),
                task="classification",
                class_names=("a", "b", "c"),
            ),
            path,
        )
        return None

    def header() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "a.safetensors")
            with safetensors.safe_open(Path(folder) / "a.safetensors", "numpy") as file:
                metadata = dict(file.metadata())
        metadata.pop("tosa_jax.sha256")
        return json.dumps(metadata, sort_keys=True).encode()  # safetensors gives any order

    def start(folder: Path) -> None:
        write(folder / "whole.safetensors")
        read(sample, folder)

    def change(data: bytes, rng: np.random.Generator, general: Bytes) -> bytes:
        metadata = json.loads(data)
        if rng.random() < 0.5:
            name = max(metadata, key=lambda name: len(metadata[name]))
            text = metadata[name].encode()
            try:
                changed = mutate_json(text, rng) if rng.random() < 0.7 else general(text, rng)
            except ValueError:
                changed = general(text, rng)
            return json.dumps(metadata | {name: changed.decode("latin-1")}).encode()
        return mutate_json(data, rng)

    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.inference import loading
        from tosa_jax.models.weights.load import selector_params
        from tosa_jax.models.weights.readers import read_weights, write_safetensors

        metadata = {str(name): str(x) for name, x in json.loads(content).items()}
        arrays = read_weights(folder / "whole.safetensors").arrays
        write_safetensors(folder / "a.safetensors", arrays, metadata)
        if selectors:
            found = selector_params(tiny_model(), folder / "a.safetensors")
            assert found.keys() == arrays.keys()
        else:
            found = loading.from_weights(folder / "a.safetensors", None, lambda line: None)
            assert found["model"].config.num_classes == 3

    sample = b""

    def make() -> Format:
        nonlocal sample
        sample = in_child(header)
        return Format([sample], read, 0.3, mutate=change, start=start)

    return make


def checkpoint() -> Format:
    """A checkpoint without digests, as earlier versions wrote it: Orbax's own files are read as they are."""
    golden = next((GOLDEN / "old_workdir/checkpoints/pretrain").iterdir())
    files = [path for path in sorted(golden.rglob("*")) if path.is_file()]
    samples = [f"{x.relative_to(golden)}\n".encode() + x.read_bytes() for x in files]

    def start(folder: Path) -> None:
        shutil.copytree(golden, folder / "w/checkpoints/pretrain/1")
        read(samples[0], folder)

    def change(data: bytes, rng: np.random.Generator, general: Bytes) -> bytes:
        name, _, content = data.partition(b"\n")
        if content.startswith(b"{") and rng.random() < 0.7:
            try:
                return name + b"\n" + mutate_json(content, rng)
            except ValueError:
                pass
        return name + b"\n" + general(content or b"\0", rng)

    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.models.weights.readers import read_weights
        from tosa_jax.models.weights.run_checkpoints import recorded_run
        from tosa_jax.train.checkpoints import read_scores

        name, _, data = content.partition(b"\n")
        path = folder / "w/checkpoints/pretrain/1" / name.decode()
        whole = path.read_bytes()
        path.write_bytes(data)
        try:
            recorded_run(folder / "w")
            read_scores(folder / "w/checkpoints/pretrain")
            arrays = read_weights(folder / "w").arrays
            assert arrays and sum(x.nbytes for x in arrays.values()) < 2**24
        finally:
            path.write_bytes(whole)

    return Format(samples, read, 0.3, mutate=change, start=start)
