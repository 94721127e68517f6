"""The table of depth networks at NYU's size: GMACs of backbone, selection and decoder, time, memory, speed-up.

    python results/depth_bench.py --name=cpu [--batch_size=1] [--rounds=5] [--dtype=float32] [--train]
    python results/depth_bench.py --name=h100 --batch_size=16 --rounds=20 --dtype=bfloat16 --train

Writes `results/depth_bench_NAME.json` and a plot of it beside it. DeiT-S at 480x640, dense and keep .7, .5, .3; with
`--train` whole training steps too.
"""

import argparse
import json
import sys
from pathlib import Path

from tosa_jax import bench
from tosa_jax.distributed.devices import describe_device, versions

FOLDER = Path(__file__).parent


def plot(record: dict, path: Path) -> None:
    """Bars of multiply-adds by part, and of time, a group for each keep rate."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    parts = {"backbone": "#4878a8", "selection": "#d07030", "head": "#70a060"}
    runs = [train for train in (False, True) if any(r["train"] is train for r in record["rows"])]
    figure, axes = pyplot.subplots(1, 1 + len(runs), figsize=(4 + 3 * len(runs), 3.2))
    for axis, train in zip(axes[1:], runs, strict=True):
        rows = [r for r in record["rows"] if r["train"] is train]
        names = ["dense" if r["keep_rate"] is None else f"keep {r['keep_rate']:g}" for r in rows]
        axis.bar(names, [r["ms"] / r["batch_size"] for r in rows], color="#707070")
        for i, row in enumerate(rows):
            text = f"{row['speedup']:.2f}x"
            axis.annotate(text, (i, row["ms"] / row["batch_size"]), ha="center", va="bottom")
        axis.set_title("training step, ms an image" if train else "forward pass, ms an image")
        axis.margins(y=0.12)
    bottom = [0.0] * len(rows)
    for part, colour in parts.items():
        heights = [row["gmacs_by_part"][part] for row in rows]
        label = "decoder" if part == "head" else part
        axes[0].bar(names, heights, bottom=bottom, color=colour, label=label)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes[0].set_title("GMACs an image")
    axes[0].set_ylim(0, 1.35 * max(bottom))
    axes[0].legend(fontsize=8, loc="upper right")
    figure.suptitle(f"DeiT-S with a depth decoder, 480x640, {record['device']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="of the device, for the file names")
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--keep_rate", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--train", action="store_true", help="training steps too")
    args = parser.parse_args()
    rows = []
    for train in [False, True] if args.train else [False]:
        rows += bench.measure(
            args.model, args.keep_rate, batch_size=args.batch_size, train=train, rounds=args.rounds,
            task="depth", image_size=(480, 640), dtype=args.dtype,
        )  # fmt: skip
        print(bench.format_records(rows), file=sys.stderr)
    record = {
        "command": "python results/depth_bench.py " + " ".join(sys.argv[1:]),
        "device": describe_device(),
        "versions": versions(),
        "model": args.model,
        "rows": rows,
    }
    path = FOLDER / f"depth_bench_{args.name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    plot(record, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
