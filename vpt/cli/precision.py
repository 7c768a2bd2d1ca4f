"""``trainer.precision auto``, a word that Lightning does not know: the faster one on this device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, cast

import lightning as L
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

from vpt.errors import ConfigError
from vpt.experiments.precision import LEAST, measure
from vpt.tasks import RunRecord, TuningTask
from vpt.tasks.run_protocol import callbacks_of

AUTO = "auto"


class Trainer(L.Trainer):
    """Lightning's, whose `precision` may also be ``auto``: single until `choose` has chosen."""

    def __init__(self, precision: _PRECISION_INPUT | Literal["auto"] | None = None, **options: Any) -> None:
        """Builds the trainer.

        Args:
            precision: Lightning's words, or ``auto``: bf16-mixed where a step is faster in it on this device, else
                32-true.
            **options: Lightning's.
        """
        super().__init__(precision=cast("_PRECISION_INPUT | None", None if precision == AUTO else precision), **options)


def choose(trainer: L.Trainer, task: TuningTask, batch_size: int, recorded: str | None) -> str:
    """Gives a trainer the precision that a checkpoint `recorded`, or the one that is faster, and returns its name.

    What was measured is printed and goes into ``run.json``. A ConfigError with several devices or precision plugins, or
    where the recorded one is neither bf16-mixed nor 32-true.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy) or type(strategy.precision_plugin) is not Precision:
        raise ConfigError(
            "trainer.precision auto is measured on one device, without strategies and plugins: name the precision, "
            "bf16-mixed or 32-true."
        )
    if recorded not in (None, "bf16-mixed", "32-true"):
        raise ConfigError(f"The checkpoint is of precision {recorded}: name it instead of auto.")
    chosen = recorded or _measured(trainer, task, batch_size)
    if chosen == "bf16-mixed":
        strategy.precision_plugin = MixedPrecision("bf16-mixed", strategy.root_device.type)
    return chosen


def _measured(trainer: L.Trainer, task: TuningTask, batch_size: int) -> str:
    device = trainer.strategy.root_device
    found = measure(task.model, min(batch_size, task.hparams["micro_batch"] or batch_size), device)
    print(
        f"precision {found.precision}: a step in bf16-mixed is {found.speed_up:.2f} times as fast as in 32-true "
        f"(batch {found.images}, {device.type}; it is taken from {LEAST:g} on)",
        flush=True,
    )
    for each in callbacks_of(trainer):
        if isinstance(each, RunRecord):
            each.measured = asdict(found)
    return found.precision


def refuse_auto(trainer: Mapping[str, Any]) -> None:
    """Refuses it, by a ConfigError, where several runs have to share one."""
    if trainer.get("precision") == AUTO:
        raise ConfigError(
            "trainer.precision auto is of `vpt fit`: runs that are compared share one, bf16-mixed or 32-true."
        )
