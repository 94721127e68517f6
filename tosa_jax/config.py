"""The configuration of a run: checks a recipe's ConfigDict and makes frozen dataclasses of it.

A recipe starts from `default_config()`, which has every field: so a misspelt name or a value of a wrong type is found
where it is set. A duration is given in `epochs` or in `steps`; the other of the two stays 0.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_collections

from tosa_jax.data.pipeline import DataConfig
from tosa_jax.distributed.mesh import MeshConfig
from tosa_jax.errors import ConfigError
from tosa_jax.models.method import MAIN, METHODS, controls
from tosa_jax.models.optim import PERIODS, SCHEDULES, OptimConfig
from tosa_jax.models.vit_config import STANDARD, ViTConfig, check, check_choice, check_types
from tosa_jax.models.weights.preprocessing import IMAGENET_MEAN, IMAGENET_STD, preprocessing_of
from tosa_jax.models.weights.readers import read_weights
from tosa_jax.tasks import TASKS, config_class, model_config
from tosa_jax.tasks.mixing import MixingConfig


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One training stage. A stage with neither epochs nor steps is left out. Raises ConfigError for wrong values."""

    epochs: float = 0.0
    steps: int = 0
    learning_rate: float = 1e-3
    learning_rate_batch: int = 0  # learning_rate is for this batch size; 0: for any
    warmup_epochs: float = 0.0
    warmup_steps: int = 0
    warmup_learning_rate: float = 0.0
    min_learning_rate: float = 0.0
    schedule: str = "cosine"  # or "polynomial"
    schedule_power: float = 0.9  # of the polynomial
    schedule_per: str = "update"  # or "epoch": how often the learning rate moves on
    head_lr_scale: float = 1.0  # the head's or decoder's learning rate over the backbone's
    trainable: str = ""  # regular expression of the parameters' paths; the others stay as they are
    weight_decay: float = 0.05
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    label_smoothing: float = 0.0
    drop_path_rate: float = 0.0
    distill_weight: float = 0.0
    keep_rates: tuple[float, ...] = ()  # each update draws one of these; empty: the model's
    mixup: float = 0.0  # alpha of its Beta distribution
    cutmix: float = 0.0
    switch_prob: float = 0.5
    erase_prob: float = 0.0
    align_labels: bool = False  # targets are mixed as the network mixes tokens (TL-Align)
    eval_epochs: float = 0.0  # between evaluations; 0: at the end
    eval_steps: int = 0
    checkpoint_epochs: float = 0.0  # between checkpoints; 0: at the end
    checkpoint_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("", "warmup_", "eval_", "checkpoint_"):
            given = [getattr(self, f"{name}{unit}") for unit in ("epochs", "steps")]
            check(
                min(given) >= 0 and 0 in given,
                f"set {name}epochs or {name}steps, not both and not below 0: they are {given}",
            )
        check(
            0 <= self.label_smoothing < 1,
            f"label_smoothing={self.label_smoothing} is not in [0, 1)",
        )
        check(
            0 <= self.drop_path_rate < 1, f"drop_path_rate={self.drop_path_rate} is not in [0, 1)"
        )
        check(0 <= self.ema_decay < 1, f"ema_decay={self.ema_decay} is not in [0, 1)")
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("schedule_per", self.schedule_per, PERIODS)
        check(self.head_lr_scale > 0, f"head_lr_scale={self.head_lr_scale} must be above 0")
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise ConfigError(
                f"trainable={self.trainable!r} is no regular expression: {error}"
            ) from error
        for name, value in vars(self).items():
            if isinstance(value, int | float):
                check(0 <= value < math.inf, f"{name}={value} must be finite and not below 0")
        for rate in self.keep_rates:
            check(0 < rate <= 1, f"keep_rates={self.keep_rates}: {rate} is not in (0, 1]")
        self.mixing  # noqa: B018  # its own checks

    def duration(self, name: str, steps_per_epoch: int) -> int:
        """Updates in a duration: `name` is "", "warmup", "eval" or "checkpoint"."""
        prefix = f"{name}_" if name else ""
        epochs, steps = (getattr(self, f"{prefix}{unit}") for unit in ("epochs", "steps"))
        return steps or round(epochs * steps_per_epoch)

    @property
    def mixing(self) -> MixingConfig:
        """How this stage's batches are mixed and erased."""
        names = [f.name for f in dataclasses.fields(MixingConfig)]
        return MixingConfig(**{name: getattr(self, name) for name in names})

    def optim(self, steps_per_epoch: int, batch_size: int) -> OptimConfig:
        """The optimizer's configuration: durations in updates, learning rates for this global batch size.

        Raises ConfigError: the warm-up is longer than the stage.
        """
        shared = {f.name for f in dataclasses.fields(OptimConfig)} & set(self.__dataclass_fields__)
        values = {name: getattr(self, name) for name in shared}
        values["steps"] = self.duration("", steps_per_epoch)
        values["warmup_steps"] = self.duration("warmup", steps_per_epoch)
        values["schedule_period"] = steps_per_epoch if self.schedule_per == "epoch" else 1
        if self.learning_rate_batch:
            # As in DeiT, only the peak is scaled, not the rates at the start and at the end.
            values["learning_rate"] *= batch_size / self.learning_rate_batch
        check(
            values["warmup_steps"] <= values["steps"],
            f"the warm-up has {values['warmup_steps']} steps, the stage only {values['steps']}",
        )
        return OptimConfig(**values)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What the closing evaluation compares. Raises ConfigError for wrong values.

    controls       methods (`models.method.controls`). Each is fine-tuned as long as ToSA: at each keep rate, or once if
                   it selects no tokens.
    keep_rates     the keep rates that are compared. The model is fine-tuned at each, unless fine-tuning draws its keep
                   rates. Empty: those that fine-tuning draws, else the model's.
    figure_images  number of images in the figures; 0: no figures.
    """

    batch_size: int = 256
    controls: tuple[str, ...] = ()
    keep_rates: tuple[float, ...] = ()
    figure_images: int = 6

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1")
        check(self.figure_images >= 0, f"figure_images={self.figure_images} must be 0 or more")
        for control in self.controls:
            check_choice("eval.controls", control, controls())
        for rate in self.keep_rates:
            check(0 < rate <= 1, f"eval.keep_rates={rate} is not in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Mean and standard deviation of a channel's pixels in [0, 1]; one value serves all channels.

    Raises ConfigError: a mean that is not finite, or a standard deviation that is not above 0.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        check(all(map(math.isfinite, self.mean)), f"mean={self.mean} must be finite")
        check(all(0 < x < math.inf for x in self.std), f"std={self.std} must be finite and above 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run; `batch_size` is global, and `options` holds the task's own fields.

    Raises ConfigError for values that are wrong or do not go together.
    """

    task: str = "classification"
    options: Any = None
    seed: int = 0
    batch_size: int = 256
    accumulate: int = 1  # parts of a batch, one after the other: less memory, the same result
    log_steps: int = 50
    on_nonfinite: str = "stop"  # or "skip": at an update whose loss or gradient is not finite
    max_grad_norm: float = 0.0  # a longer gradient, before clipping, counts as not finite; 0: none
    skip_at_most: int = 10  # such updates in a row; one more stops the run
    checkpoint_minutes: float = 10.0  # one is due when the last is so old; 0: time does not count
    grace_seconds: float = 120.0  # from a signal until the run has saved and ended; 0: without end
    keep_checkpoints: int = 2  # the newest ones of each stage that are kept, beside the best
    profile_steps: str = ""  # "100:105": steps of each stage whose trace goes to WORKDIR/profile
    init_from: str = ""  # weights to start from: whatever `load_pretrained` reads
    bypass_fit_images: int = 256  # a low-rank bypass is fitted on these, after the selector stage
    init_selectors: str = ""  # a file of selectors, from another run's selector stage
    model: ViTConfig
    data: DataConfig
    inputs: InputConfig = field(default_factory=InputConfig)
    pretrain: StageConfig = field(default_factory=StageConfig)
    selector: StageConfig = field(default_factory=StageConfig)
    finetune: StageConfig = field(default_factory=StageConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        counts = ("batch_size", "accumulate", "log_steps", "bypass_fit_images", "keep_checkpoints")
        for name in counts:
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check_choice("on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        # JAX's keys hold 32 bits of a seed: a larger one would draw as a smaller one does.
        check(0 <= self.seed < 2**32, f"seed={self.seed} must be from 0 to 2**32 - 1")
        channels = self.model.in_chans
        for name in ("mean", "std"):
            values = getattr(self.inputs, name)
            check(
                len(values) in (1, channels),
                f"config.inputs.{name} has {len(values)} values, which is neither 1 nor the number of channels, "
                f"model.in_chans={channels}",
            )
        for name in ("checkpoint_minutes", "grace_seconds", "max_grad_norm"):
            value = getattr(self, name)
            check(0 <= value < math.inf, f"{name}={value} must be 0 or more")
        for stage in ("pretrain", "selector"):
            check(
                not getattr(self, stage).keep_rates,
                f"{stage}.keep_rates is not read: only fine-tuning draws its keep rates",
            )
        check(
            not self.selector.trainable,
            "selector.trainable is not read: that stage trains the selectors alone",
        )
        TASKS[self.task].check_run(self)
        profile_range(self.profile_steps)

    def has_stage(self, stage: str) -> bool:
        """Whether a stage takes part in the run."""
        config = getattr(self, stage)
        return config.epochs > 0 or config.steps > 0

    @property
    def keep_rates(self) -> tuple[Any, ...]:
        """The keep rates that are compared; the first is the main one."""
        return self.eval.keep_rates or self.finetune.keep_rates or (self.model.keep_rate,)


STAGES = ("pretrain", "selector", "finetune")
"""The sections of a recipe that are stages, in their order."""

SECTIONS = {
    "inputs": InputConfig,
    "pretrain": StageConfig,
    "selector": StageConfig,
    "finetune": StageConfig,
    "eval": EvalConfig,
    "mesh": MeshConfig,
}
"""The sections of a recipe that have the same fields for every task."""


def _defaults(cls: type, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        f.name: f.default
        for f in dataclasses.fields(cls)
        if f.name not in skip and f.default is not dataclasses.MISSING
    }


def default_config(model: str = "vit", task: str = "classification", weights: str = "") -> Any:
    """Every field of a run with its default value, as a ConfigDict.

    model    a key of `VARIANTS`.
    task     a key of `TASKS`.
    weights  the file to start from, whatever `load_pretrained` reads: the value of `init_from`.

    `inputs` and the crop of evaluation are those that the weights were published with (`preprocessing_of`).

    The section `task` holds the task's own fields. `model.image_size` is (height, width) where the model takes images
    of any shape, as for depth. `model.plan` is the name of a layer kind for every second layer, or a name for each
    layer, with commas between. `model.keep_rate` is a tuple: one share, or one for each selection.

    Raises ConfigError: no such task, or no such model; WeightsError: `weights` cannot be read.
    """
    check_choice("task", task, TASKS)
    config = ml_collections.ConfigDict(_defaults(RunConfig, skip=("task", "options")))
    config.task = {"name": task} | _defaults(TASKS[task].options)
    vit = model_config(task, model)
    # The architecture is the name's.
    unread = ("architecture", *vit.unused)
    variant = {k: v for k, v in vit.to_fields().items() if k not in unread}
    plan = METHODS[MAIN].plan if vit.has_plan else STANDARD
    variant |= {"name": model, "plan": plan, "keep_rate": (0.5,)}
    variant |= {"image_size": vit.image_shape} if vit.resizes else {}
    config.model = variant
    file = read_weights(weights) if weights else None
    published = preprocessing_of(model, max(vit.image_shape), file)
    crop = {"eval_crop_pct": published.crop_pct, "eval_interpolation": published.interpolation}
    config.data = {"name": ""} | _defaults(DataConfig) | crop
    for name, cls in SECTIONS.items():
        config[name] = _defaults(cls)
    config.inputs = {"mean": published.mean, "std": published.std}
    config.init_from = weights
    return config


def profile_range(steps: str) -> range:
    """The steps that "100:105" names, without the last; none for "". Raises ConfigError for other texts."""
    match = re.fullmatch(r"(\d+):(\d+)", steps)
    if steps and (match is None or int(match.group(1)) >= int(match.group(2))):
        raise ConfigError(
            f"profile_steps={steps!r} must be FIRST:END with FIRST < END, e.g. 100:105"
        )
    return range(*map(int, match.groups())) if match else range(0)


def build_section(cls: type, section: str, values: Mapping[str, Any]) -> Any:
    """A section's dataclass; its ConfigErrors name the section."""
    try:
        check_types(cls, values)
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"config.{section}: {error}") from error


def make_run_config(config: ml_collections.ConfigDict) -> RunConfig:
    """Checks a recipe and makes a `RunConfig` of it. Raises ConfigError, which names the field."""
    values: dict[str, Any] = config.to_dict()
    name, task = (values.get(section, {}).get("name") for section in ("model", "task"))
    template = default_config(name or "vit", task or "classification")
    _check_fields("", values, template.to_dict())
    model = values.pop("model")
    name, plan = model.pop("name"), model.pop("plan")
    options = values.pop("task")
    options = build_section(TASKS[options.pop("name")].options, "task", options)
    try:
        fields = model | {"plan": tuple(plan.split(",")) if "," in plan else plan}
        vit = model_config(task, name, **fields)
    except ConfigError as error:
        raise ConfigError(f"config.model: {error}") from error
    data = values.pop("data") | {"image_size": vit.image_size, "channels": vit.in_chans}
    built = {name: build_section(cls, name, values.pop(name)) for name, cls in SECTIONS.items()}
    data = build_section(DataConfig, "data", data)
    return RunConfig(task=task, options=options, model=vit, data=data, **built, **values)


def _check_fields(where: str, values: Mapping[str, Any], template: Mapping[str, Any]) -> None:
    """Raises ConfigError for a field that is unknown, missing, or of another type than the default."""
    for name in values:
        if name not in template:
            near = difflib.get_close_matches(name, template, n=1)
            hint = f"; did you mean {where}{near[0]}?" if near else ""
            raise ConfigError(f"config has no field {where}{name}{hint}")
    for name, default in template.items():
        if name not in values:
            raise ConfigError(f"config lacks the field {where}{name}: start from default_config()")
        value = values[name]
        if isinstance(default, dict):
            check(isinstance(value, dict), f"config.{where}{name} must hold fields, not {value!r}")
            _check_fields(f"{where}{name}.", value, default)
            continue
        fits = isinstance(value, type(default)) or (
            isinstance(default, float) and isinstance(value, int)
        )
        if not fits or (isinstance(value, bool) and not isinstance(default, bool)):
            raise ConfigError(
                f"config.{where}{name}={value!r} must be of type {type(default).__name__}"
            )


MAY_CHANGE = {
    "checkpoint_minutes",
    "grace_seconds",
    "keep_checkpoints",
    "accumulate",
    "log_steps",
    "on_nonfinite",
    "max_grad_norm",
    "skip_at_most",
    "profile_steps",
    "mesh",
    "eval.batch_size",
    "eval.figure_images",
    "data.data_dir",
    "data.source_dir",
    "data.workers",
    "data.prefetch_batches",
    "data.prefetch_mib",
    "data.in_memory",
}
"""Fields that do not change what is trained. A run may go on with other values of them."""


def to_json(run: RunConfig) -> dict[str, Any]:
    """The run as plain JSON values, in sections."""
    return dataclasses.asdict(run) | {"model": run.model.to_fields()}


def from_json(values: Mapping[str, Any]) -> RunConfig:
    """The run that `to_json` wrote. Fields that are missing there get their default values.

    Raises ConfigError for values that this version does not know.
    """
    if not isinstance(values, Mapping):
        raise ConfigError("config.json holds no fields")
    rest = dict(values)
    task = rest.get("task", "classification")
    check_choice("task", task, TASKS)
    stated = rest.get("model", {})
    stated = stated if isinstance(stated, Mapping) else {}
    network = config_class(task, stated.get("architecture", ViTConfig.architecture))
    sections = SECTIONS | {"model": network, "data": DataConfig}
    sections |= {"options": TASKS[task].options}
    try:
        said = {name: as_tuples(rest.pop(name, {})) for name in sections}
        for name, section in said.items():
            check(isinstance(section, Mapping), f"config.{name} must hold fields, not {section!r}")
        built = {name: build_section(cls, name, said[name]) for name, cls in sections.items()}
        return RunConfig(**built, **rest)
    except TypeError as error:
        raise ConfigError(f"config.json is of another version of tosa_jax: {error}") from error


def as_tuples(value: Any) -> Any:
    """A JSON value with tuples for its lists, which is what configurations hold."""
    if isinstance(value, Mapping):
        return {name: as_tuples(x) for name, x in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def process_differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Lines `field: first -> other` for what two processes of a run may not set differently: all but where data is."""
    return differences(first, other, may_change={x for x in MAY_CHANGE if x.startswith("data.")})


def run_differences(
    begun: Mapping[str, Any], run: RunConfig, *, durations: bool = True
) -> list[str]:
    """What differs between the JSON of a run that was begun and a run, and may not. Nothing does if it is empty.

    durations  whether the epochs and steps of stages count.
    """
    if not begun:
        return []
    with contextlib.suppress(ConfigError):
        begun = to_json(from_json(begun))  # with the defaults of fields that are newer than it
    now = json.loads(json.dumps(to_json(run)))
    lines = differences(json.loads(json.dumps(begun)), now)
    lengths = tuple(f"{stage}.{unit}: " for stage in STAGES for unit in ("epochs", "steps"))
    return [line for line in lines if durations or not line.startswith(lengths)]


def differences(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    where: str = "",
    may_change: Collection[str] = MAY_CHANGE,
) -> list[str]:
    """Lines `field: old -> new` for what differs between two runs' JSON and may not."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        path = f"{where}{name}"
        before, after = old.get(name), new.get(name)
        if path in may_change:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{path}.", may_change)
        elif before != after:
            lines.append(f"{path}: {before} -> {after}")
    return lines
