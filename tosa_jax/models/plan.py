"""What a plan means for each layer: its place in a group, and the number of tokens that it runs on."""

from collections.abc import Sequence

from tosa_jax.models.method import layer_kinds, method_of
from tosa_jax.models.token_state import LayerSpec
from tosa_jax.models.vit_config import ViTConfig, check, check_choice


def layer_specs(config: ViTConfig) -> tuple[LayerSpec, ...]:
    """The place and the token counts of each layer of the plan.

    Raises ConfigError for an unknown kind; a first layer that would need one before it to choose tokens; two
    neighbours of different kinds that both choose tokens; a `keep_rate` with another number of values than there are
    selections; and counts that a kind cannot reach.
    """
    for kind in config.plan:
        check_choice("a layer kind of the plan", kind, layer_kinds())
        check(
            not config.max_patches or method_of(kind).takes_padding,
            f"max_patches={config.max_patches}: the layer kind {kind!r} would take padding for patches; for images of "
            "one size pass image_size=(height, width) and max_patches=0",
        )
    _check_neighbours(config)
    kinds = layer_kinds()
    rates = iter(keep_rates(config))
    specs, count, count_group = [], config.num_tokens, config.num_tokens
    for layer, name in enumerate(config.plan):
        if layer == 0 or config.plan[layer - 1] != name:
            count_group = count
        opens, closes = _opens(config, layer), _closes(config, layer)
        place = LayerSpec(layer, opens, closes, count_group, count, count, count)
        specs.append(kinds[name].counted(config, place, next(rates) if opens else None))
        count = specs[-1].count_out
    return tuple(specs)


def selections(config: ViTConfig) -> tuple[int, ...]:
    """The layers that choose tokens, from 0: each has a keep rate."""
    return tuple(i for i in range(config.depth) if _opens(config, i))


def _opens(config: ViTConfig, layer: int) -> bool:
    name = config.plan[layer]
    kind = layer_kinds()[name]
    return kind.selects and (kind.nests or layer == 0 or config.plan[layer - 1] != name)


def _closes(config: ViTConfig, layer: int) -> bool:
    last = layer == config.depth - 1 or config.plan[layer + 1] != config.plan[layer]
    return layer_kinds()[config.plan[layer]].selects and last


def _check_neighbours(config: ViTConfig) -> None:
    kinds = [layer_kinds()[name] for name in config.plan]
    check(not kinds[0].selects or kinds[0].nests,
          f"plan starts with {config.plan[0]!r}, which needs a standard layer before it")  # fmt: skip
    for i in range(1, config.depth):
        before, name = config.plan[i - 1 : i + 1]
        check(before == name or not (kinds[i - 1].selects and kinds[i].selects),
              f"plan has {name!r} right after {before!r} (layer {i}); put a standard layer between")  # fmt: skip


def keep_rates(config: ViTConfig) -> Sequence[float]:
    """The keep rate of each selection, in order. Raises ConfigError as `layer_specs`."""
    given, selections = config.keep_rates_given, sum(_opens(config, i) for i in range(config.depth))
    count = len(given)
    check(count in (1, selections) or not selections,
          f"keep_rate has {count} values, but the plan makes {selections} selections")  # fmt: skip
    if count > 1:
        return given
    mean = given[0]
    if config.budget == "uniform":
        return given * selections
    falling = [1 - (1 - mean) * 2 * (i + 1) / (selections + 1) for i in range(selections)]
    if all(layer_kinds()[name].nests for name in config.plan if layer_kinds()[name].selects):
        # Such a kind keeps more where it cannot leave as few tokens.
        return [max(rate, 1 / config.num_patches) for rate in falling]
    check(falling[-1] > 0,
          f"keep_rate={mean} with budget='linear' leaves the last of {selections} selections no patch; "
          f"the mean must be above {1 - (selections + 1) / (2 * selections):.3f}")  # fmt: skip
    return falling
