"""How cost grows with chips, batch, tokens and model size: the tables of docs/scale.md.

    python results/scale.py > results/scale.json       measures, computes; prints the tables to standard error

Measured: collectives of training steps compiled for up to eight fake CPU devices, nothing run. Computed: arithmetic
from `models/cost.py` and the makers' figures in `distributed/devices.py`, with the assumptions that the file lists.
"""

import json
import sys
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from tosa_jax.config import default_config, make_run_config  # noqa: E402
from tosa_jax.distributed.devices import accelerator  # noqa: E402
from tosa_jax.distributed.mesh import MeshConfig, make_mesh  # noqa: E402
from tosa_jax.models import cost  # noqa: E402
from tosa_jax.models.factory import abstract_model  # noqa: E402
from tosa_jax.models.variants import variant_config  # noqa: E402
from tosa_jax.performance import aot  # noqa: E402

ASSUMED = {
    "utilisation": 0.4,  # share of the peak; a guess, until a run's perf/mfu says better
    "jpeg_bytes": 147_897_477_120 / 1_281_167,  # ImageNet's training tar by its images
    "bytes_of_state_per_parameter": 16,  # float32: itself, two moments, the average
    "chips_per_host": 8,  # v5e, docs.cloud.google.com/tpu/docs/v5e
    "slice_chips": 256,  # v5e, the same page
    "slice_network_rate": 6.4e12
    / 8,  # bytes/s of the data centre's network a v5e slice; the same page
    "host_write_rate": 2e8,  # bytes/s of one host to storage; a guess
}
BASE = {"width": 128, "depth": 4, "image": 32, "batch": 32, "keep": None}
ON_ALL = {"data": {"data": 8}, "fsdp": {"data": 1, "fsdp": 8}, "dcn": {"dcn": 2, "data": 1, "fsdp": 4},
          "model": {"data": 4, "model": 2}}  # fmt: skip


def measure(mesh: dict, **changes) -> dict:
    """The collectives of one training step of a small network on this mesh."""
    sizes = BASE | changes
    config = default_config()
    config.update(batch_size=sizes["batch"])
    config.model.update(
        embed_dim=sizes["width"], depth=sizes["depth"], num_heads=4, patch_size=4,
        image_size=sizes["image"], num_classes=10,
        plan="selective" if sizes["keep"] else "standard", keep_rate=(sizes["keep"] or 0.5,),
    )  # fmt: skip
    config.data.name = "digits"
    config.finetune.update(steps=10, ema_decay=0.99, clip_norm=1.0)
    axes = MeshConfig(**mesh)
    count = (axes.dcn or 1) * axes.data * axes.fsdp * axes.model
    on = make_mesh(axes, jax.devices()[:count])
    program = next(aot.programs(make_run_config(config), on))
    record = aot.compile_program(program, on)
    kept = {key: record[key] for key in ("state_bytes", "flops", "collectives")}
    return {"mesh": mesh, **sizes} | kept


def measured() -> list[dict]:
    """One change at a time from BASE, on each kind of mesh."""
    rows = [measure({"data": n}) for n in (2, 4)] + [
        measure({"data": 1, "fsdp": n}) for n in (2, 4)
    ]
    for mesh in ON_ALL.values():
        rows.append(measure(mesh))
        rows.append(measure(mesh, keep=0.5))
    for mesh in (ON_ALL["data"], ON_ALL["fsdp"], ON_ALL["model"]):
        rows += [measure(mesh, batch=64), measure(mesh, image=48), measure(mesh, depth=8)]
    return rows


def computed(name: str, keep: float | None, device: str, chips: int) -> dict:
    """What training this network costs on so many chips, by arithmetic."""
    plan = {"plan": "selective", "keep_rate": keep} if keep else {}
    model = abstract_model(variant_config(name, **plan))
    chip, parameters = accelerator(device), cost.num_params(model)
    flops = 2 * cost.training_macs(model)
    rate = ASSUMED["utilisation"] * chip.peak_flops / flops  # images/s of a chip
    gradients = 4 * parameters
    reduce_seconds = 2 * (chips - 1) / chips * gradients / (chip.link_rate / 2)
    state = ASSUMED["bytes_of_state_per_parameter"] * parameters
    hosts, slices = chips / ASSUMED["chips_per_host"], chips / ASSUMED["slice_chips"]
    cores = json.loads(Path("results/input_speed.json").read_text())["photographs"]
    whole = next(row for row in cores if row["step"] == "whole")["images_per_second_per_core"]
    between = 2 * max(slices - 1, 0) / slices * gradients / ASSUMED["slice_network_rate"]
    return {
        "model": name, "keep": keep, "device": chip.name, "chips": chips, "parameters": parameters,
        "gmacs": cost.macs(model) / 1e9, "training_gflops_per_image": flops / 1e9,
        "images_per_second_per_chip": rate, "images_per_second": rate * chips,
        "epoch_seconds": 1_281_167 / (rate * chips), "epoch_chip_hours": 1_281_167 / rate / 3600,
        "input_cores_per_chip": rate / whole, "input_bytes_per_second": rate * chips * ASSUMED["jpeg_bytes"],
        "gradient_bytes": gradients, "reduce_milliseconds": 1e3 * reduce_seconds,
        "between_slices_milliseconds": 1e3 * between if slices > 1 else 0.0,
        "device_batch_that_hides_it": (reduce_seconds + between * (slices > 1)) * rate,
        "checkpoint_bytes": state, "checkpoint_seconds_one_host": state / ASSUMED["host_write_rate"],
        "checkpoint_seconds_all_hosts": state / hosts / ASSUMED["host_write_rate"],
        "state_bytes_per_chip_data": state, "state_bytes_per_chip_fsdp": state / min(chips, 256),
    }  # fmt: skip


def _table(rows: list[dict], columns: dict) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(str(show(row)) for show in columns.values()) + " |")
    return "\n".join(lines)


def _mib(row: dict, kind: str) -> str:
    found = row["collectives"].get(kind)
    return f"{found['count']}: {found['bytes'] / 1e6:.2f}" if found else "-"


def tables(result: dict) -> str:
    """Markdown of what docs/scale.md shows."""
    kinds = ("all-reduce", "all-gather", "collective-permute", "all-to-all")
    names = ("width", "depth", "image", "batch", "keep")
    first = {"mesh": lambda r: " ".join(f"{a}={n}" for a, n in r["mesh"].items() if n > 1)}
    first |= {name: lambda r, n=name: "dense" if r[n] is None else r[n] for name in names}
    first |= {f"{kind} (MB)": lambda r, k=kind: _mib(r, k) for kind in kinds}
    network = {
        "network": lambda r: (
            f"{r['model'].removeprefix('vit_')} {'keep ' + str(r['keep']) if r['keep'] else 'dense'}"
        ),
        "chips": lambda r: f"{r['chips']} {r['device'].removeprefix('TPU ')}",
    }
    second = network | {
        "GMACs": lambda r: f"{r['gmacs']:.4g}",
        "img/s": lambda r: f"{r['images_per_second']:,.0f}",
        "ImageNet epoch": lambda r: f"{r['epoch_seconds']:.3g} s",
        "chip-hours": lambda r: f"{r['epoch_chip_hours']:.3g}",
        "cores a chip": lambda r: f"{r['input_cores_per_chip']:.2g}",
        "JPEG GB/s": lambda r: f"{r['input_bytes_per_second'] / 1e9:.3g}",
    }
    third = network | {
        "all-reduce ms": lambda r: f"{r['reduce_milliseconds']:.2g}",
        "between slices ms": lambda r: f"{r['between_slices_milliseconds']:.2g}",
        "hidden from batch a chip": lambda r: f"{r['device_batch_that_hides_it']:.2g}",
        "checkpoint GB": lambda r: f"{r['checkpoint_bytes'] / 1e9:.3g}",
        "written by one host s": lambda r: f"{r['checkpoint_seconds_one_host']:.2g}",
        "by all s": lambda r: f"{r['checkpoint_seconds_all_hosts']:.2g}",
        "state GB a chip, data / fsdp": lambda r: (
            f"{r['state_bytes_per_chip_data'] / 1e9:.2g} / {r['state_bytes_per_chip_fsdp'] / 1e9:.2g}"
        ),
    }
    return "\n\n".join(
        [_table(result["measured"], first), _table(result["computed"], second), _table(result["computed"], third)]
    )  # fmt: skip


def main() -> None:
    networks = [("deit_small_patch16_224", None), ("deit_small_patch16_224", 0.5)]
    networks += [("vit_giant_patch14_dinov2", None), ("vit_giant_patch14_dinov2", 0.5)]
    result = {
        "command": "python results/scale.py",
        "device": "8 fake CPU devices; nothing is run",
        "versions": {"jax": jax.__version__},
        "assumed": ASSUMED,
        "measured": measured(),
        "computed": [
            computed(name, keep, "TPU v5e", chips)
            for name, keep in networks
            for chips in (8, 256, 4096)
        ],
    }
    print(tables(result), file=sys.stderr)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
