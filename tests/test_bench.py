"""The benchmark: who takes turns, and what its records mean; speed itself is not asserted."""

import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small import SIZES as FOUR_LAYERS

from tosa_jax import bench
from tosa_jax.distributed import memory, timing
from tosa_jax.errors import DeviceError
from tosa_jax.models.cost import gmacs
from tosa_jax.models.variants import variant_config
from tosa_jax.performance import benchmark, results
from tosa_jax.performance.candidates import Candidate, candidate, check_fits, networks
from tosa_jax.tasks import TASKS, model_config
from tosa_jax.tasks.classification import Classification

SIZES = FOUR_LAYERS | {"depth": 2}
CONTRACT = {
    "name", "keep_rate", "batch_size", "image_size", "dtype", "train", "gmacs", "xla_gmacs", "ms",
    "ms_iqr", "img_per_sec", "temp_bytes", "speedup", "gmac_ratio", "realised",
}  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """Sets what the rounds measure, in seconds [rounds, candidates]; nothing is run."""

    def set_seconds(rows):
        found = np.array(rows)
        monkeypatch.setattr(benchmark, "seconds_of", lambda *_: found)

    return set_seconds


@pytest.mark.parametrize("train", [False, True])
def test_records_have_the_arithmetic_of_their_medians(clock, train):
    clock([[0.4, 0.2], [0.4, 0.2], [0.8, 0.2]])
    dense, tosa = bench.measure("vit", [0.25], batch_size=4, train=train, rounds=3, **SIZES)
    assert dense.keys() == tosa.keys() == CONTRACT | {"gmacs_by_part"}
    assert (dense["speedup"], dense["realised"], dense["ms"]) == (1.0, 1.0, 400.0)
    assert dense["ms_iqr"] == pytest.approx(200.0) and dense["img_per_sec"] == 10.0
    expected = gmacs(variant_config("vit", plan="selective", keep_rate=0.25, **SIZES))
    assert sum(tosa["gmacs_by_part"].values()) == pytest.approx(expected)
    assert tosa["gmacs"] == expected and tosa["speedup"] == 2.0
    assert tosa["realised"] == pytest.approx(2.0 * expected / dense["gmacs"])
    # XLA counts at least the matrix products; a training step has about three forward passes.
    passes = dense["xla_gmacs"] / dense["gmacs"]
    assert (2.5 < passes < 6) if train else (1 <= passes < 2)


def uncompiled(name, keep_rate, config, batch_size, *, train, task):
    return Candidate(name, keep_rate, config, lambda: None, lambda _: None)


def test_controls_have_the_same_budgets_and_random_isolates_the_selector(clock, monkeypatch):
    monkeypatch.setattr(benchmark, "candidate", uncompiled)
    clock([[1.0, 0.75, 0.5, 0.625, 0.5, 0.25]])
    rows = bench.measure(
        "vit",
        [0.5, 0.25],
        batch_size=2,
        train=False,
        rounds=1,
        controls=["random", "skip"],
        **SIZES,
    )
    assert [(r["name"], r["keep_rate"]) for r in rows] == [
        ("dense", None), ("tosa", 0.5), ("tosa", 0.25), ("random", 0.5), ("random", 0.25), ("skip", None),
    ]  # fmt: skip
    overheads = [r["selector_overhead"] for r in rows]
    assert overheads == [None, 0.125, 0.0, None, None, None]
    for tosa, drawn in zip(rows[1:3], rows[3:5], strict=True):
        assert drawn["gmacs_by_part"]["selection"] == 0 < tosa["gmacs_by_part"]["selection"]
        assert drawn["gmacs_by_part"]["backbone"] == tosa["gmacs_by_part"]["backbone"]
    table = results.format_records(rows).splitlines()
    assert len(table) == 7 and table[0].endswith("overhead") and table[2].endswith("12.5%")
    assert len(set(map(len, table))) == 1


def test_redundancy_gets_the_multiply_adds_of_tosa_and_bypasses_are_compared_alike():
    sizes = FOUR_LAYERS | {"image_size": 32, "embed_dim": 128}
    make_config = functools.partial(model_config, "classification", "vit", bypass="shared", **sizes)
    rows = list(networks(make_config, [0.75, 0.5], ["random", "redundancy"]))
    assert [(name, rate) for name, rate, _ in rows] == [
        ("dense", None), ("tosa", 0.75), ("tosa", 0.5), ("random", 0.75), ("random", 0.5),
        ("redundancy", 0.75), ("redundancy", 0.5),
    ]  # fmt: skip
    costs = [gmacs(config) for _, _, config in rows]
    for tosa, redundant in zip(costs[1:3], costs[5:], strict=True):
        assert 0.98 * tosa < redundant <= tosa
    assert {config.bypass for _, _, config in rows[:5]} == {"shared"}
    assert {config.budget for _, _, config in rows[5:]} == {"linear"}


def test_runs_take_turns_and_the_first_round_is_left_out():
    order = []
    runs = [functools.partial(order.append, name) for name in "ab"]
    seconds = timing.interleaved_seconds(runs, 2)
    assert order == ["a", "b"] * 3 and seconds.shape == (2, 2)


def test_the_result_is_waited_for_and_pauses_are_not_timed(monkeypatch):
    now, waited = [0.0], []

    def pass_time(seconds):
        now[0] += seconds

    clock = SimpleNamespace(perf_counter=lambda: now[0], sleep=pass_time)
    monkeypatch.setattr(timing, "time", clock)

    def wait(result):
        waited.append(result)
        pass_time(2.0)

    config = variant_config("vit", **SIZES)
    one = Candidate("x", None, config, lambda: pass_time(1.0) or "result", wait, rest=7.0)
    assert benchmark.seconds_of([one], 2).tolist() == [[3.0], [3.0]]
    assert waited == ["result"] * 3


def test_a_training_candidate_trains():
    config = variant_config("vit", plan="random", **SIZES)
    one = candidate("random", 0.5, config, 4, train=True)
    losses = [float(one.run()[1]) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


def test_the_task_says_what_is_minimised(monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Seven(Classification):
        def loss(self, out, batch):
            return 7 * batch["target"].sum(axis=1) + 0 * out.logits[:, 0]

    monkeypatch.setitem(TASKS, "seven", Seven)
    config = variant_config("vit", **SIZES)
    one = candidate("dense", None, config, 4, train=True, task="seven")
    assert float(one.run()[1]) == pytest.approx(7)


def test_a_training_candidate_runs_the_network_as_training_does(monkeypatch):
    """DynamicViT masks patches in training and drops them at inference; its loss of shares tells which it was."""

    @dataclass(frozen=True, kw_only=True)
    class Counted(Classification):
        def loss(self, out, batch):
            return sum(x.startswith("loss/pruning/") for x in out.aux) + 0 * out.logits[:, 0]

    monkeypatch.setitem(TASKS, "counted", Counted)
    config = variant_config("vit", plan="dynamicvit", keep_rate=0.7, **(SIZES | {"depth": 3}))
    one = candidate("dynamicvit", 0.7, config, 4, train=True, task="counted")
    assert float(one.run()[1]) >= config.plan.count("dynamicvit") == 2


def test_weights_are_stored_as_they_compute_unless_they_are_trained(clock, monkeypatch):
    stored = []

    def watch(*args, **kwargs):
        stored.append(str(args[2].param_dtype))
        return uncompiled(*args, **kwargs)

    monkeypatch.setattr(benchmark, "candidate", watch)
    clock([[1.0]])
    for train in (False, True):
        bench.measure("vit", [], batch_size=1, train=train, rounds=1, dtype="bfloat16", **SIZES)
    assert stored == ["bfloat16", "float32"]


def test_what_does_not_fit_names_a_batch_that_does(monkeypatch):
    config = variant_config("vit", **SIZES)
    monkeypatch.setattr(memory, "device_bytes", lambda device: 2_000_000)
    with pytest.raises(DeviceError, match=r"^dense at image_size=8, batch_size=999 needs") as error:
        candidate("dense", None, config, 999, train=True)
    batch_size = int(str(error.value).rpartition("--batch_size=")[2].split()[0])
    assert 8 <= batch_size < 999 and batch_size % 8 == 0
    assert candidate("dense", None, config, batch_size, train=True).config is config


def test_the_batch_that_fits_counts_the_state_once(monkeypatch):
    state = {"weights": np.zeros(100, np.float32)}
    program = jax.jit(lambda x: x + 1).lower(1.0).compile()
    for device, says in (
        (400 + 8 * 600, "--batch_size=8 probably fits"),
        (400 + 3 * 600, "--batch_size=3 probably fits"),
        (500, "not even one image fits"),
    ):
        monkeypatch.setattr(memory, "device_bytes", lambda _, device=device: device)
        monkeypatch.setattr(memory, "needed_bytes", lambda program: 400 + 10 * 600)
        with pytest.raises(DeviceError, match=says):
            check_fits(program, state, "it", 10)


@pytest.mark.subprocess
def test_it_runs_without_data_libraries_and_other_frameworks():
    code = "import sys, tosa_jax.bench; print([m for m in sys.modules if m in sys.argv])"
    absent = ["grain", "tensorflow_datasets", "torch", "timm", "transformers", "matplotlib"]
    argv = [sys.executable, "-c", code, *absent]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--keep_rate", "0"], "keep_rate=0.0 is not in (0, 1]"),
        (["--model=deit_smal_patch16_224"], "did you mean 'deit_small_patch16_224'"),
        (["--batch_size=0"], "--batch_size=0 must be at least 1"),
        (["--batch_size=many"], "argument --batch_size: invalid int value: 'many'"),
        (["--map_chunk=-2"], "map_chunk=-2 must be positive"),
        (["--remat=some"], "remat='some' is unknown"),
        (["--gather=loop"], "gather='loop' is unknown"),
        (["--controls", "randm"], "--controls='randm' is unknown; did you mean 'random'"),
        (["--data"], "--data needs --config"),
        (["--confg=x"], "unexpected argument '--confg=x'"),
    ],
)
def test_bad_input_is_one_line(argv, says, capsys):
    assert bench.main(argv) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_the_command_line_reaches_the_networks_fields(monkeypatch, capsys):
    seen = []

    def measure(model, keep_rates, **given):
        seen.append((model, keep_rates, given))
        return [{"batch_size": given["batch_size"]}]

    monkeypatch.setattr(bench, "measure", measure)
    argv = [
        "--batch_size",
        "2",
        "4",
        "--image_size",
        "32",
        "--scan_layers",
        "--remat=full",
        "--json",
    ]
    argv += ["--controls", "random", "--gather=one_hot", "--bypass=shared"]
    assert bench.main(argv) == 0
    assert [row["batch_size"] for row in json.loads(capsys.readouterr().out)] == [2, 4]
    fields = {"scan_layers": True, "remat": "full", "gather": "one_hot", "image_size": 32}
    fields["bypass"] = "shared"
    assert fields.items() <= seen[0][2].items() and seen[0][2]["controls"] == ["random"]


def test_input_speed_of_a_recipe_as_json(capsys, digits_dir):
    argv = [
        "--data",
        "--config=configs/digits.py",
        f"--config.data.data_dir={digits_dir}",
        "--json",
    ]
    assert bench.main(argv) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and all(isinstance(row, dict) for row in rows)


@pytest.mark.parametrize("train", [False, True])
def test_depth_networks_are_measured_with_their_decoder(clock, train):
    sizes = {k: x for k, x in SIZES.items() if k != "num_classes"} | {"image_size": (8, 12)}
    rates = [] if train else [0.25]
    clock([[0.4, 0.2][: 1 + len(rates)]])
    dense, *others = bench.measure(
        "vit", rates, batch_size=2, train=train, rounds=1, task="depth", decoder_dim=32, **sizes
    )
    for tosa in others:
        assert dense["gmacs_by_part"]["head"] == tosa["gmacs_by_part"]["head"] > 0
        assert dense["gmacs_by_part"]["selection"] == 0 < tosa["gmacs_by_part"]["selection"]
    assert len(others) == len(rates) and dense["image_size"] == (8, 12)
    # The decoder, here the larger part, is in the program.
    assert dense["gmacs_by_part"]["head"] > 2 * dense["gmacs_by_part"]["backbone"]
    assert dense["xla_gmacs"] > sum(dense["gmacs_by_part"].values()) * (2 if train else 0.8)
