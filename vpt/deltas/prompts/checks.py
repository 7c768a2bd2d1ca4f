"""Options of prompts that contradict each other, the backbone or their range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vpt.deltas.extra_key_values import ExtraKeys
from vpt.deltas.prompts.frequencies import check_windows
from vpt.deltas.prompts.initialization import INITS, transformed_prompts
from vpt.errors import ConfigError, UnknownNameError, check_number


def check_start(fourier: float, init: str, deep: bool, mapped: bool) -> None:
    """Refuses starts and shares that do not exist, by name or range, and starts that need prompts of each layer."""
    check_number("fourier", fourier, 0, 1)
    if init not in INITS:
        raise UnknownNameError("init of prompts", init, INITS)
    if init != "uniform" and (not deep or mapped):
        raise ConfigError(f"init {init} needs deep prompts of each layer's own: leave out shared and project.")


def check_pooling(part: ExtraKeys, deep: bool, last: int) -> None:
    """Refuses `reference_pooling` where no pool would read the prompts, or not as the reference does."""
    if not (part.layout.windowed and (not deep or last in part.blocks)):
        raise ConfigError("reference_pooling needs prompts in the last block of a Swin: no other pool reads them.")
    if part.backbone.pool is not None:
        raise ConfigError(
            f"reference_pooling is a mean, but the backbone pools by {part.backbone.pool!r}: leave one out."
        )
    if part.gate is not None:
        raise ConfigError("A gate is of attention, and reference_pooling reads the prompts past it: leave one out.")
    if part.dropout_mode not in ("sample", "shared"):
        raise ConfigError(f"reference_pooling takes dropout_mode 'sample' or 'shared', got {part.dropout_mode!r}.")


def check_numbers(part: ExtraKeys, fourier: float, init: str, numbers: Sequence[int], blocks: Sequence[int]) -> None:
    """Refuses numbers of prompts that Fourier share or start cannot be of."""
    if init == "frequency":
        tables = (getattr(each, "relative_position_bias_table", None) for each in part.layout.attentions)
        if part.layout.windowed or any(table is not None for table in tables):
            raise ConfigError(
                f"init frequency passes prompts alone through the blocks, and those of {part.backbone.name} have a "
                "bias for each pair of an image's tokens: take init mean."
            )
        check_windows(part.backbone.input_shape[1:], max(numbers))
    if fourier and any(transformed_prompts(fourier, number) == 0 for number in numbers):
        raise ConfigError(f"fourier {fourier} of {min(numbers)} prompts, rounded down, transforms none.")
    for number, block in zip(numbers, blocks, strict=True) if init in ("mean", "max") else ():
        tokens = part.layout.patches[block] + (0 if part.layout.windowed else part.backbone.layout.num_prefix)
        if number > tokens:
            raise ConfigError(
                f"init {init} cuts an image's tokens into as many parts as prompts: {tokens} enter block "
                f"{block}, for {number} prompts."
            )


def check_mapped(mapped: Mapping[str, bool], init: str, fourier: float, masked: bool, windowed: bool) -> None:
    """Refuses options of each layer's own free prompts with `shared`, `project`, `adaptive`; `mapped` says which."""
    if mapped["adaptive"] and (mapped["shared"] or mapped["project"] or init != "uniform" or windowed):
        raise ConfigError("adaptive prompts are of a ViT, each layer's own: leave out shared, project and init.")
    given = [name for name, there in (*mapped.items(), ("fourier", fourier > 0)) if there]
    if masked and given:
        raise ConfigError(f"mask prunes each layer's own free prompts: leave {' and '.join(given)} out.")


def check_koopman(given: bool, mapped: Mapping[str, bool], masked: bool) -> None:
    """Refuses `koopman` beside options that leave no free prompts of each layer's own, of equal number."""
    others = [name for name in ("shared", "adaptive") if mapped[name]] + (["mask"] if masked else [])
    if given and others:
        raise ConfigError(f"koopman maps each layer's own prompts to those of the next: leave {others[0]} out.")


def check_shallow(part: ExtraKeys, by_layer: Mapping[str, bool]) -> None:
    """Refuses with shallow prompts what is of deep ones; `by_layer` says which options are given."""
    if part.dropout_mode not in ("sample", "shared"):
        raise ConfigError(
            f"dropout_mode {part.dropout_mode!r} needs deep prompts; shallow ones take 'sample' or 'shared'."
        )
    if given := [name for name, there in by_layer.items() if there]:
        raise ConfigError(f"{', '.join(given)}: only with deep prompts.")
