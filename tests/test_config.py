"""From a recipe to frozen dataclasses: every knob is live, and what is wrong is said in one line."""

import json
from pathlib import Path

import pytest
from small import SIZES, small_run

from tosa_jax import config as config_lib
from tosa_jax.cli.flags import parse
from tosa_jax.config import default_config, differences, make_run_config, to_json
from tosa_jax.errors import ConfigError, WorkdirError
from tosa_jax.train.workdir import open_workdir


def recipe(**model):
    config = default_config()
    config.model.update(SIZES | model)
    config.data.name = "digits"
    return config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(sede=1), "no field sede; did you mean seed?"),
        (
            lambda c: c.model.update(kep_rate=1),
            "no field model.kep_rate; did you mean model.keep_rate?",
        ),
        (lambda c: c.finetune.update(epoch=1), "finetune.epochs?"),
        (
            lambda c: c.model.update(keep_rate=(0.0,)),
            "config.model: keep_rate=0.0 is not in (0, 1]",
        ),
        (lambda c: c.eval.update(controls=("skipp",)), "did you mean 'skip'"),
        (lambda c: c.update(batch_size=0), "batch_size=0 must be at least 1"),
        (lambda c: c.update(seed=-1), "seed=-1 must be from 0"),
        (lambda c: c.update(seed=10**23), "below 2**32"),
        (lambda c: c.inputs.update(std=(0.0,)), "config.inputs: std=(0.0,) must be"),
        (lambda c: c.inputs.update(mean=(float("nan"),)), "config.inputs: mean=(nan,) must be"),
        (
            lambda c: c.inputs.update(mean=(0.5, 0.5)),
            "inputs.mean has 2 values, which is neither 1 nor",
        ),
        (lambda c: c.finetune.update(weight_decay=-0.1), "finetune: weight_decay=-0.1 must be"),
        (lambda c: c.finetune.update(learning_rate=float("inf")), "learning_rate=inf must be"),
        (lambda c: c.finetune.update(trainable="("), "finetune: trainable='(' is no regular"),
        (
            lambda c: c.update(
                {"selector": {"trainable": "a"}, "inputs": {"mean": (0.3,), "std": (0.4,)}}
            ),
            "selector.trainable is not read",
        ),
        (lambda c: c.finetune.update(drop_path_rate=1.0), "drop_path_rate=1.0 is not in [0, 1)"),
        (lambda c: c.eval.update(batch_size=0), "config.eval: batch_size=0 must be at least 1"),
        (lambda c: c.eval.update(figure_images=-1), "figure_images=-1 must be 0 or more"),
        (lambda c: c.data.update(augment="shfit"), "did you mean 'shift'"),
        (lambda c: c.pretrain.update(epochs=1.0, steps=3), "config.pretrain: set epochs or steps"),
    ],
)
def test_wrong_fields_are_named(change, says):
    config = recipe()
    with pytest.raises(ConfigError) as error:
        change(config)
        make_run_config(config)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_mistyped_fields_are_named():
    config = recipe().to_dict()
    config["batch_size"] = "64"
    with pytest.raises(ConfigError, match="config.batch_size='64' must be of type int"):
        make_run_config(config_lib.ml_collections.ConfigDict(config))
    with pytest.raises(ConfigError, match="--config=FILE is missing"):
        parse("", [])


def write_recipe(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from tosa_jax.config import default_config\n"
        "def get_config(variant='x'):\n"
        "    config = default_config()\n"
        "    config.data.name = variant\n"
        "    return config\n"
    )
    return path


def test_a_recipe_finds_its_neighbours_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # another folder, with another package of that name
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/__init__.py").write_text("")
    text = "from shared import fill\ndef get_config():\n    return fill()\n"
    for name in ("mine", "copied"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.py").write_text(text)
        (tmp_path / name / "shared.py").write_text(
            "from tosa_jax.config import default_config\n"
            f"def fill():\n    config = default_config()\n    config.data.name = {name!r}\n    return config\n"
        )
        assert parse("", [f"--config={name}/recipe.py"])[0].data.name == name
    repository = Path(__file__).parents[1] / "configs"
    assert parse("", [f"--config={repository}/deit_s.py"])[0].model.name == "deit_small_patch16_224"


def test_flags_may_stand_beside_their_values(tmp_path):
    path = write_recipe(tmp_path)
    config, workdir = parse("", ["--config", f"{path}:digits", "--config.seed=3"])
    assert (config.data.name, config.seed, str(workdir)) == ("digits", 3, "runs/mine_digits")
    assert str(parse("", ["--config", str(path), "--workdir", "here"])[1]) == "here"
    with pytest.raises(ConfigError, match="absent.py: no such file"):
        parse("", ["--config", "absent.py"])


@pytest.mark.parametrize("text", ["def get_config(:", "import nowhere_at_all", "x = 1 / 0"])
def test_a_recipe_that_fails_is_one_line(tmp_path, text):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ConfigError) as error:
        parse("", [f"--config={tmp_path}/bad.py"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_command_line_sets_fields_and_names_the_nearest(tmp_path):
    path = write_recipe(tmp_path)
    argv = [f"--config={path}:digits", "--config.model.keep_rate=(.5,.3)", "--config.seed=3"]
    config, workdir = parse("", argv)
    assert (config.model.keep_rate, config.seed, config.data.name) == ((0.5, 0.3), 3, "digits")
    assert str(workdir) == "runs/mine_digits"
    assert parse("", [argv[0], "--config.model.keep_rate=0.25"])[0].model.keep_rate == (0.25,)
    for wrong, says in (
        ("--config.model.kep_rate=.5", "keep_rate"),
        ("--config.batch_size=half", "batch_size"),
        ("--confg=x", "confg"),
        ("stray", "stray"),
    ):
        with pytest.raises(ConfigError, match=says):
            parse("", [*argv, wrong])
    with pytest.raises(ConfigError, match="absent.py"):
        parse("", [f"--config={tmp_path}/absent.py"])


def test_differences_name_fields_and_allow_what_changes_nothing(tmp_path):
    run = small_run("data")
    other = small_run("elsewhere", seed=1, log_steps=9, finetune={"epochs": 3.0})
    lines = differences(to_json(run), to_json(other))
    assert lines == ["finetune.epochs: 0.0 -> 3.0", "seed: 0 -> 1"]
    with open_workdir(tmp_path / "run", run):
        assert json.loads((tmp_path / "run/config.json").read_text())["seed"] == 0
        with pytest.raises(WorkdirError, match="in use by another process"):
            with open_workdir(tmp_path / "run", run):
                pass
    with open_workdir(tmp_path / "run", other):  # nothing was reached yet: the directory is free
        assert json.loads((tmp_path / "run/config.json").read_text())["seed"] == 1
    with open_workdir(tmp_path / "run", run):
        (tmp_path / "run/checkpoints/pretrain/3/state").mkdir(parents=True)
    with pytest.raises(WorkdirError, match="finetune.epochs: 0.0 -> 3.0; seed: 0 -> 1"):
        with open_workdir(tmp_path / "run", other):
            pass


def test_every_field_of_the_recipe_is_read():
    """A knob that no code reads is a lie: each field's name appears as an attribute somewhere in the package."""
    import pathlib
    import re

    import tosa_jax

    source = "\n".join(
        path.read_text() for path in pathlib.Path(tosa_jax.__path__[0]).rglob("*.py")
    )

    def leaves(values):
        for name, value in values.items():
            yield from leaves(value) if isinstance(value, dict) else [name]

    for name in set(leaves(recipe().to_dict())) - {"name"}:
        prefix = name.rpartition("_")[0]
        by_name = f'"{name}"' in source or (prefix and f'duration("{prefix}"' in source)
        assert re.search(rf"\.{name}\b", source) or by_name, name
