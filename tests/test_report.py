"""report.json and the table made of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from tosa_jax.errors import WorkdirError
from tosa_jax.reporting.report import format_table, read_report, write_report


def row(name: str, keep_rate, gmacs: float, img_per_sec: float | None, **metrics: float) -> dict:
    return {
        "name": name,
        "keep_rate": keep_rate,
        "split": "test",
        "count": 360,
        "metrics": metrics,
        "gmacs": gmacs,
        "img_per_sec": img_per_sec,
    }


def report(*rows: dict) -> dict:
    return {
        "config": "digits",
        "device": "cpu",
        "versions": {},
        "stages": {},
        "results": list(rows),
    }


def test_a_report_survives_the_file(tmp_path: Path) -> None:
    assert read_report(tmp_path) is None
    written = report(row("tosa", 0.5, 3.425, 900.0, acc1=0.79))
    write_report(tmp_path, written)
    assert read_report(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_table_says_how_much_of_the_start_averaged_weights_hold() -> None:
    written = report(row("tosa", 0.5, 3.4, 900.0, acc1=0.79))
    assert "averaged" not in format_table(written)
    written["config"] = {"pretrain": {"ema_decay": 0.0}, "finetune": {"ema_decay": 0.99}}
    written["stages"] = {"pretrain": {"steps": 100}, "finetune": {"steps": 160}}
    lines = [line for line in format_table(written).splitlines() if "averaged" in line]
    assert lines == ["finetune: averaged weights are scored; 20 % are those it began with"]


def test_array_scalars_become_numbers(tmp_path: Path) -> None:
    write_report(tmp_path, report(row("tosa", 0.5, 1.0, 1.0, acc1=np.float32(0.5))))
    assert read_report(tmp_path)["results"][0]["metrics"] == {"acc1": 0.5}


@pytest.mark.parametrize("value", [float("nan"), np.float32("inf")])
def test_what_is_not_finite_is_refused_and_the_old_report_stays(tmp_path: Path, value) -> None:
    write_report(tmp_path, report())
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(tmp_path, report(row("tosa", 0.5, 1.0, 1.0, acc1=value)))
    assert read_report(tmp_path) == report()


@pytest.mark.parametrize("text", ["{", '["results"]', '{"other": 1}'])
def test_a_broken_report_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(WorkdirError, match="report.json is not .* remove it"):
        read_report(tmp_path)


def test_table() -> None:
    table = format_table(
        report(
            row("skip", 0.5, 2.299, None, acc1=0.6, loss=2.0),
            row("tosa", 0.5, 3.425, 1300.0, acc1=0.7912, loss=1.0),
            row("tosa", [0.9, 0.7, 0.5], 3.893, 1150.0, acc1=0.795, loss=1.0),
            row("random", 0.5, 3.425, 1290.0, acc1=0.78, loss=1.0),
            row("previous", 0.5, 3.425, 1310.0, acc1=0.785, loss=1.0),
            row("dense", 1.0, 4.599, 1000.0, acc1=0.8, loss=1.0),
            row("dense_pretrained", 1.0, 4.599, 1000.0, acc1=1.0, loss=1.0),
        )
    )
    assert table.splitlines() == [
        "model                       keep rate  top-1 %  GMACs  MACs ratio  img/s  speed-up",
        "----------------------------------------------------------------------------------",
        "dense, as pretrained                1   100.00  4.599       1.000   1000     1.00x",
        "dense, fine-tuned as long           1    80.00  4.599       1.000   1000     1.00x",
        "ToSA                       0.9 to 0.5    79.50  3.893       0.846   1150     1.15x",
        "ToSA                              0.5    79.12  3.425       0.745   1300     1.30x",
        "random selection                  0.5    78.00  3.425       0.745   1290     1.29x",
        "previous layer's map              0.5    78.50  3.425       0.745   1310     1.31x",
        "selective layers skipped          0.5    60.00  2.299       0.500      -         -",
        "split test, 360 examples",
    ]


def test_the_fine_tuned_network_is_the_reference() -> None:
    rows = [row("dense_pretrained", 1.0, 4.0, 50.0), row("tosa", 0.5, 2.0, 200.0)]
    assert format_table(report(*rows)).splitlines()[3].split()[-3:] == ["0.500", "200.0", "4.00x"]
    rows.append(row("dense", 1.0, 4.0, 100.0))
    assert format_table(report(*rows)).splitlines()[4].split()[-3:] == ["0.500", "200.0", "2.00x"]


def test_without_a_dense_network_there_are_no_ratios() -> None:
    cells = format_table(report(row("tosa", 0.5, 2.0, 200.0, acc1=0.5))).splitlines()[2].split()
    assert cells == ["ToSA", "0.5", "50.00", "2.000", "-", "200.0", "-"]


def test_small_networks_are_counted_in_mmacs() -> None:
    table = format_table(report(row("dense", 1.0, 0.0123, 5.0), row("tosa", 0.5, 0.009, 5.0)))
    assert "MMACs" in table and "GMACs" not in table
    assert [line.split()[-4] for line in table.splitlines()[2:4]] == ["12.30", "9.00"]


def test_other_metrics_are_shown_as_far_as_they_fit() -> None:
    metrics = {"abs_rel": 0.1234567, "rmse": 0.4, "delta1": 0.9, "log10": 0.05, "silog": 12.2}
    table = format_table(report(row("dense", 1.0, 39.1, 120.0, **metrics)))
    lines = table.splitlines()
    assert max(map(len, lines)) <= 100
    assert "0.1235" in lines[2] and "top-1" not in table
    shown = set(lines[0].split()) & metrics.keys()
    assert shown and lines[-1] == "report.json has also: log10, silog"
    assert shown == {"abs_rel", "rmse", "delta1"}


def test_rows_name_their_split_where_splits_differ() -> None:
    rows = [row("dense", 1.0, 1.0, 1.0), row("dense", 1.0, 1.0, 1.0) | {"split": "val"}]
    table = format_table(report(*rows))
    assert "as long (test)" in table and "as long (val)" in table
    assert "split val, 360 examples" in table


def test_a_table_of_nothing() -> None:
    assert format_table(report()) == "no results"
    assert json.dumps(report())
