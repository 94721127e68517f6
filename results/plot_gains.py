"""The plot of README.md: what token selection costs in accuracy, and what it gains in time.

    python results/plot_gains.py            # writes docs/gains.png

Every point is read from a record under results/; nothing is computed but ratios and means.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent
COLOURS = {
    "redundancy": "#0072b2", "ToMe": "#e69f00", "ToSA": "#d55e00", "ToSA, shared bypass": "#cc79a7",
    "random": "#777777", "layers skipped": "#aaaaaa",
}  # fmt: skip
MARKERS = dict(zip(COLOURS, "osD^xv", strict=True))


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def frozen_points() -> dict[str, list[tuple[float, float, float, float]]]:
    """Without fine-tuning: share of multiply-adds, cosine of the patches' features, and its 95 % interval."""
    budgets = read("no_finetuning")["results"]
    choices = read("selection/choices_dinov2")["results"]

    def points(rows, begins: str, ends: str = ""):
        return [
            (r["share"], r["patch_cosine"], *r["patch_interval"])
            for r in rows
            if r["name"].startswith(begins)
            and r["name"].endswith(ends)
            and "without" not in r["name"]
        ]

    return {
        "redundancy": points(budgets, "redundancy, linear"),
        "ToMe": points(budgets, "ToMe"),
        "ToSA, shared bypass": points(choices, "selective, shared"),
        "ToSA": points(choices, "selective, identity"),
        "random": points(choices, "random, identity"),
    }


def tuned_points() -> tuple[float, dict[str, list[tuple[float, float, float, float]]]]:
    """Fine-tuned on the canvases: the dense accuracy, then share, mean accuracy and the least and most of the seeds."""
    rows = read("selection/cluttered_fashion")["results"]
    dense = next(r for r in rows if r["name"] == "dense_pretrained")

    def points(rows, name: str):
        found = []
        for row in rows:
            if row["name"] == name:
                seeds = [100 * x for x in row["metrics"]["acc1"]["seeds"]]
                mean = 100 * row["metrics"]["acc1"]["mean"]
                found.append((row["gmacs"] / dense["gmacs"], mean, min(seeds), max(seeds)))
        return sorted(found)

    return 100 * dense["metrics"]["acc1"]["mean"], {
        "redundancy": points(read("selection/cluttered_fashion_redundancy")["results"], "tosa"),
        "ToSA, shared bypass": points(
            read("selection/cluttered_fashion_shared")["results"], "tosa"
        ),
        "ToSA": points(rows, "tosa"),
        "random": points(rows, "random"),
        "layers skipped": points(rows, "skip"),
    }


def speed_points() -> dict[str, list[tuple[float, float]]]:
    """On two CPU cores: times fewer multiply-adds, times faster."""
    forward = read("bench_deit_s_cpu")["rows"]
    training = read("bench_deit_s_cpu_train")["rows"]
    depth = [r for r in read("depth_bench_cpu")["rows"] if not r["train"]]

    def points(rows, name: str):
        return [(r["gmac_ratio"], r["speedup"]) for r in rows if r["name"].split()[0] == name]

    return {
        "redundancy, forward": points(forward, "redundancy"),
        "ToSA, forward": points(forward, "tosa"),
        "ToSA, training step": points(training, "tosa"),
        "ToSA, depth at 480x640, forward": points(depth, "tosa"),
    }


def curves(axes, points: dict[str, list]) -> None:
    """One line a method, with its bars."""
    for name, found in points.items():
        x, y, low, high = zip(*sorted(found), strict=True)
        below, above = ([abs(a - b) for a, b in zip(y, ends, strict=True)] for ends in (low, high))
        axes.errorbar(
            x, y, yerr=[below, above], label=name, color=COLOURS[name], marker=MARKERS[name],
            markersize=5, linewidth=1.2, capsize=2,
        )  # fmt: skip
    axes.set_xlabel("multiply-adds, dense = 1")


def main() -> None:
    figure = Figure(figsize=(13, 4.1), layout="constrained")
    frozen, tuned, speed = figure.subplots(1, 3)

    curves(frozen, frozen_points())
    frozen.set_title("No fine-tuning: DINOv2-S/14, photographs", fontsize=10)
    frozen.set_ylabel("patch features, cosine to the dense network's")
    frozen.axhline(1, color="black", linewidth=0.8, linestyle=":")

    dense, points = tuned_points()
    curves(tuned, points)
    tuned.axhline(dense, color="black", linewidth=0.8, linestyle=":")
    tuned.annotate("dense", (0.5, dense), xytext=(0, 3), textcoords="offset points", fontsize=8)
    tuned.set_title("Fine-tuned: small ViT, cluttered Fashion-MNIST", fontsize=10)
    tuned.set_ylabel("top-1 accuracy, %")

    styles = [
        (COLOURS["redundancy"], "o"),
        (COLOURS["ToSA"], "D"),
        ("#009e73", "s"),
        ("#222222", "^"),
    ]
    for (name, found), (colour, marker) in zip(speed_points().items(), styles, strict=True):
        speed.plot(
            *zip(*found, strict=True), color=colour, marker=marker, label=name, linewidth=1.2
        )
    speed.axline((1, 1), slope=1, color="black", linewidth=0.8, linestyle=":")
    speed.annotate("dotted: time falls as multiply-adds do", (1.27, 1.03), fontsize=8)
    speed.set(
        xlim=(1, 1.65), ylim=(1, 1.7), xlabel="times fewer multiply-adds", ylabel="times faster"
    )
    speed.set_title("Measured on two CPU cores: DeiT-S, float32", fontsize=10)

    for axes in (frozen, tuned, speed):
        axes.legend(fontsize=8, loc="lower right" if axes is not speed else "upper left")
        axes.grid(alpha=0.3)
    figure.savefig(RESULTS.parent / "docs/gains.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
