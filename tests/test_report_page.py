"""The page of a run: what is on it, and that it needs nothing else."""

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tosa_jax.models.method import METHODS, Method, controls
from tosa_jax.models.methods.random import Random
from tosa_jax.reporting import charts as charts
from tosa_jax.reporting.page import make_page, write_page
from tosa_jax.reporting.report import format_table

VOID = {"meta", "img", "br"}


class Outline(HTMLParser):
    """Balanced tags, their attributes, and the text outside of style and svg."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.links, self.text = [], [], []
        self.tags: list[str] = []
        self.feed(page)
        assert not [tag for tag in self.open if tag != "html"], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "svg"} & set(self.open):
            self.text.append(data)


def row(name, keep_rate, gmacs, acc1, img_per_sec=100.0):
    return {
        "name": name, "keep_rate": keep_rate, "split": "test", "count": 360, "gmacs": gmacs,
        "img_per_sec": img_per_sec, "metrics": {"acc1": acc1, "loss": 1.0},
    }  # fmt: skip


REPORT = {
    "config": {"seed": 0, "data": {"name": "<digits>"}, "model": {"keep_rate": [0.5]}},
    "device": "1 x cpu",
    "versions": {"jax": "0.10.2"},
    "stages": {"pretrain": {"steps": 40, "seconds": 75.0, "after": {"acc1": 0.9, "loss": 1.0}}},
    "results": [row("tosa", 0.5, 0.5, 0.95), row("dense", None, 1.0, 0.98)],
}


def records(stage: str, slope: float, count: int = 3) -> list[dict]:
    steps = range(10, 10 * count + 1, 10)
    train = [
        {"stage": stage, "step": s, "train/loss": slope * s, "perf/img_per_sec": None}
        for s in steps
    ]
    return [*train, {"stage": stage, "step": 10 * count, "val/acc1": 0.9, "val/loss": 1.0}]


def png() -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(data, format="png")
    return data.getvalue()


def page(**more) -> str:
    found = {"report": REPORT, "records": records("finetune", 1.0), "picture": png()} | more
    return make_page("my <run>", **found)


def test_the_page_stands_alone():
    outline = Outline(page())
    assert outline.links and all(x.startswith(("data:image/png", "#")) for x in outline.links)
    assert "script" not in outline.tags and "link" not in outline.tags


def test_results_configuration_and_versions_are_on_it_escaped():
    text = " ".join(Outline(page()).text)
    for expected in ("my <run>", "ToSA", "95.00", "98.00", "0.500", "1.00x", "test, 360 examples", "1 x cpu",
                     "0.10.2", "<digits>", "config.model.keep_rate = [0.5]", "1m15s", "top-1 90.00%"):  # fmt: skip
        assert expected in text, expected
    assert "my <run>" not in page() and "my &lt;run&gt;" in page()


def test_colours_come_from_the_page():
    drawn = page()
    assert "var(--series-tosa)" in drawn and "var(--ink)" in drawn
    assert not [stand_in for stand_in in (charts.INK, charts.MUTED, "#f000") if stand_in in drawn]
    assert "prefers-color-scheme: dark" in drawn


def test_what_is_missing_is_left_out():
    bare = {"config": "digits", "device": "cpu", "versions": {}, "stages": {}, "results": []}
    outline = Outline(page(report=bare, records=[], picture=None))
    assert not {"svg", "img", "table"} & set(outline.tags)


def test_fine_tunes_share_a_chart_and_ids_mean_one_thing():
    stages = ("pretrain", "finetune", "finetune_dense", "finetune_random_0.5")
    drawn = page(records=[r for i, stage in enumerate(stages) for r in records(stage, i + 1.0)])
    svgs = ["<svg" + part.partition("</svg>")[0] + "</svg>" for part in drawn.split("<svg")[1:]]
    losses = [
        x
        for x in svgs
        if "var(--series-dense)" in x and "var(--series-random)" in x and "step" in x
    ]
    assert len(losses) == 1 and "var(--series-tosa)" in losses[0]
    clips: dict[str, str] = {}  # ids are the page's: equal ones must mean the same
    for svg in svgs:
        for clip in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}clipPath"):
            text = ElementTree.tostring(clip[0], encoding="unicode")
            assert clips.setdefault(clip.get("id"), text) == text
    assert clips and page() == page()
    legend = " ".join(Outline(drawn).text)
    assert all(name in legend for name in ("ToSA", "dense", "random selection 0.5"))


def test_every_method_has_a_name_and_a_colour_of_its_own(monkeypatch):
    for i in range(len(METHODS), 30):
        monkeypatch.setitem(METHODS, f"method{i}", Method(name=f"method{i}", kind=Random))
    drawn = page(records=[r for name in METHODS for r in records(f"finetune_{name}", 1.0)])
    style = drawn.partition("</style>")[0]
    colours = [re.findall(rf"--series-{name}: (#[0-9a-f]{{6}});", style) for name in METHODS]
    assert all(len(both) == 2 for both in colours)  # light and dark
    assert all(len(set(theme)) == len(METHODS) == 30 for theme in zip(*colours, strict=True))
    curves = drawn.partition("</style>")[2]
    assert all(f"var(--series-{name})" in curves for name in METHODS)
    labels = [METHODS[name].label for name in ("tosa", *controls())]
    assert len(set(labels)) == len(labels) and "tosa" not in labels


def test_a_row_of_another_version_is_drawn_under_its_own_name():
    rows = [*REPORT["results"], row("from_tomorrow", 0.5, 0.4, 0.9)]
    stages = {"finetune_x": {"row": "from_tomorrow", "keep_rate": 0.5}}
    report = REPORT | {"results": rows, "stages": stages}
    drawn = page(report=report, records=records("finetune_x", 1.0) + records("finetune", 2.0))
    assert "from_tomorrow 0.5" in " ".join(Outline(drawn).text)
    assert drawn.partition("</style>")[2].count("var(--muted)") > page().count("var(--muted)")
    assert format_table(report).splitlines()[-2].startswith("from_tomorrow")


def test_a_curve_needs_two_points_and_keeps_its_values():
    assert charts.curves(records("pretrain", 1.0), ["pretrain"], "val/acc1", 100.0) == []
    (curve,) = charts.curves(records("finetune_0.25", 2.0), ["finetune_0.25"], "train/loss", 10.0)
    assert curve.points == [(10, 200.0), (20, 400.0), (30, 600.0)]
    assert (curve.label, curve.method, curve.budget) == ("ToSA 0.25", "tosa", 0)
    drawn = ElementTree.fromstring(charts.line_chart([curve]))
    path = next(x for x in drawn.iter() if x.get("id", "").startswith("line2d") and len(x)
                and "series-tosa" in (x[0].get("style") or ""))  # fmt: skip
    ys = [float(pair.split()[1]) for pair in path[0].get("d").replace("M", "L").split("L")[1:]]
    assert (
        len(ys) == 3 and ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=1e-3) and ys[0] > ys[2]
    )


def test_cost_is_drawn_against_accuracy_where_there_are_two():
    assert "Top-1 % against cost" in page()
    one = REPORT | {"results": REPORT["results"][1:]}
    assert "against cost" not in page(report=one)


def test_broken_lines_of_metrics_are_passed_over(tmp_path: Path):
    assert charts.read_metrics(tmp_path) == []
    good = {"stage": "pretrain", "step": 1, "train/loss": 2.0}
    lines = [json.dumps(good), "{", "[]", json.dumps({"step": 3}), json.dumps(good)[:-4]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert charts.read_metrics(tmp_path) == [good]


def test_the_page_is_written_beside_the_report(tmp_path: Path):
    (tmp_path / "selected_tokens.png").write_bytes(png())
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records("finetune", 1.0))
    write_page(tmp_path, REPORT)
    written = (tmp_path / "report.html").read_text()
    assert tmp_path.name in written and "data:image/png" in written and "Fine-tuning" in written
