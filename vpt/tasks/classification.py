"""Classification: what its tasks have in common, and the ways to adapt a backbone to one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from vpt.backbones import Backbone
from vpt.backbones.mixup import mix
from vpt.data import MaskDataModule
from vpt.data.targets import Targets
from vpt.errors import ConfigError, UnknownNameError, check_number
from vpt.metrics.logits import restrict
from vpt.models.classifier import TunedModel, ValueHead
from vpt.models.delta_file import read_head
from vpt.run_record import PROBE, global_seed
from vpt.tasks.base import Batch, TuningTask
from vpt.tasks.initialization import agree, start_at_probe
from vpt.tasks.parallel import Weighed, is_sharded
from vpt.tasks.regularization import SECOND_LOSSES, Seen, State
from vpt.tasks.targets.losses import PLAIN, check_loss, class_weights, weight_of, weighted_loss
from vpt.tasks.targets.objectives import OBJECTIVES, Objective


class ClassificationTask(TuningTask):
    """A frozen or trained backbone with a linear head, trained with cross-entropy or a variant of it.

    Metrics are logged as ``train/loss``, ``{val,test}/loss`` (the plain cross-entropy, whatever is trained with),
    ``{val,test}/acc`` (top-1), ``{val,test}/mean_per_class`` and what `metrics` names; where all validation images are
    trained on, ``trained`` stands for ``val``. A batch is a dict of ``image`` uint8 (B, 3, H, W), ``label`` int64 (B,)
    and ``index`` int64 (B,).

    The data say whether an image has one class, several or numbers (`vpt.data.targets.Targets`). With several labels,
    uint8 (B, C), the loss is the binary cross-entropy, and the scores are ``mean_ap`` and ``f1``; with numbers, float32
    (B, K), they are the squared error in units of the training labels' variance, ``mae`` and ``r2``
    (`vpt.tasks.targets.objectives`).
    """

    target = "label"
    model: TunedModel

    def __init__(
        self,
        init_head: str | None = None,
        probe_l2: float | None = None,
        loss: Literal["cross_entropy", "focal"] = "cross_entropy",
        focal_gamma: float = 2.0,
        label_smoothing: float = 0.0,
        class_weights: Literal["balanced", "inv", "inv_sqrt"] | dict[str, float] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        metrics: list[str | dict[str, Any]] | None = None,
        targets: Targets | None = None,
        keep_answers: dict[str, Any] | None = None,
        pace: dict[str, Any] | None = None,
        metric_learning: dict[str, Any] | None = None,
        **task: Any,
    ) -> None:
        """Builds the task.

        Args:
            init_head: Delta file of a linear probe on the same backbone and data, whose head initialises the head; with
                `FineTuning` that is LP-FT (Kumar et al., ICLR 2022). ``probe``: that probe is fitted exactly before
                training (`vpt.tasks.initialization`), to the frozen backbone, or to what `init_delta` makes of it. None
                for a small random head.
            probe_l2: Penalty of that ``probe``, positive; None for the best of several on validation images.
            loss: Of training: ``cross_entropy``, or ``focal`` (Lin et al., ICCV 2017).
            focal_gamma: γ of the focal loss, from 0, which makes it the cross-entropy, to 100.
            label_smoothing: Share of each target that is given to all classes alike, in [0, 1); not with ``focal``.
            class_weights: Of the training loss, whose mean over a batch is then weighted: ``balanced``, ``inv`` or
                ``inv_sqrt``, of how often classes are trained on (`vpt.tasks.targets.losses.class_weights`), or weights
                by class name, 1 for classes without.
            mixup: α of mixup of training images, from 0.001 to 1000; 0 for none.
            cutmix: α of CutMix, likewise; with both, a batch gets either with probability ½ (`vpt.backbones.mixup`).
            metrics: More to measure of validation and test: names of ``Multiclass*`` classes of
                `torchmetrics.classification`, or dicts of a ``name`` and arguments, that give a number each; of
                ``Multilabel*`` for several labels an image, of `torchmetrics.regression` for numbers.
            targets: What images are labelled with; from the data when left out, ``multiclass`` without.
            keep_answers: Options of `vpt.tasks.regularization.keep_answers.KeepAnswers`, a second loss: answers to
                corrupted training images stay near those of the untuned model.
            pace: Options of `vpt.tasks.regularization.pace.Pace`, a second loss: answers stay the same under noise on
                what LoRA or adapters add.
            metric_learning: Options of `vpt.tasks.regularization.metric_learning.MetricLearning`, a second loss: deep
                prompts stand for clusters of classes (DA-VPT).
            **task: See `TuningTask`.

        Raises:
            ConfigError: A number is out of range, torchmetrics refuses an argument, or an option is of other targets.
            UnknownNameError: A loss, rule of weights or metric does not exist.
        """
        super().__init__(**task)
        check_loss(self.hparams)
        if probe_l2 is not None:
            check_number("probe_l2", probe_l2, 0)
        if probe_l2 is not None and (init_head != PROBE or not probe_l2):
            raise ConfigError(f"probe_l2 is a positive penalty of init_head: probe, got {probe_l2}.")
        self._seconds = {
            name: kind.of(self.hparams[name]) for name, kind in SECOND_LOSSES.items() if self.hparams[name] is not None
        }
        self._remembered: dict[str, State] = {}
        self._class_weight: Tensor | None = None
        self._probed = False
        mixed = [name for name in ("mixup", "cutmix") if self.hparams[name]]
        mixed += ["init_head probe"] if init_head == PROBE else []
        mixed += self._seconds
        if self.targets != "multiclass" and (others := [*self.reshaped(), *mixed]):
            raise ConfigError(
                f"{others[0]} is of images with one class each, and the targets are {self.targets}: leave it out."
            )

    @property
    def targets(self) -> Targets:
        """What images are labelled with."""
        found: Targets = self.hparams["targets"] or "multiclass"
        return found

    @property
    def _least_classes(self) -> int:  # type: ignore[override]
        return self.objective.least

    @property
    def objective(self) -> Objective:
        """Loss and scores of such targets; an UnknownNameError where there are none of the name."""
        if self.targets not in OBJECTIVES:
            raise UnknownNameError("targets", self.targets, OBJECTIVES)
        return OBJECTIVES[self.targets]

    def _build(self, backbone: Backbone, num_classes: int) -> TunedModel:
        return TunedModel(backbone, num_classes, self.specs(), targets=self.targets)

    def _metrics(self, num_classes: int) -> dict[str, Metric | MetricCollection]:
        return self.objective.metrics(num_classes, self.hparams["metrics"] or [])

    def _tally(self, num_classes: int) -> Metric:
        return self.objective.tally(num_classes)

    def check_fit(self, data: Any) -> None:
        """Also refuses class weights that the training data have no use for."""
        super().check_fit(data)
        for name, second in self._seconds.items():
            second.check(self.hparams, self.model, data)
            if second.whole_batches and self._trainer is not None and _shared(self.trainer):
                raise ConfigError(f"{name} is of all images of a step together: train with one process (devices 1).")
        if (rule := self.hparams["class_weights"]) is not None:
            if not hasattr(data, "class_counts"):
                raise ConfigError("class_weights need a data module, whose training labels are counted.")
            self._class_weight = class_weights(rule, data.class_names, data.class_counts())

    def setup(self, stage: str) -> None:
        """Also takes the head that training starts from.

        A ConfigError where data and model differ, or `init_head` was made for another backbone or other data; a
        DeltaFileError where a file to start from is not a delta file.
        """
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, MaskDataModule):
            raise ConfigError(f"The data {data.name!r} have masks and no labels: use SegmentationTask.")
        if (theirs := getattr(data, "targets", self.targets)) != self.targets:
            raise ConfigError(f"The data have {theirs} targets, the model {self.targets}: they must agree.")
        super().setup(stage)
        if stage == "fit" and isinstance(self.model.head, ValueHead) and hasattr(data, "value_scale"):
            self._take_units(self.model.head, data)
        probe = self.hparams["init_head"]
        if stage != "fit" or probe is None:
            return
        if not hasattr(data, "class_names"):
            raise ConfigError("init_head needs a data module, whose classes and preprocessing must be the probe's.")
        if probe != PROBE:  # a checkpoint that is resumed overwrites it
            self.model.head.load_state_dict(read_head(probe, self.model, "init_head").state_dict())

    def on_fit_start(self) -> None:
        """Fits the head, too, where training is to start at the probe, unless it is resumed."""
        self._start_at_probe()  # first: deltas may start from what the head answers
        super().on_fit_start()
        if self.trainer.ckpt_path is None:
            data = cast("Any", self.trainer).datamodule
            with self.trainer.precision_plugin.forward_context():
                self._remembered = {name: each.start(self.model, data) for name, each in self._seconds.items()}

    def on_train_epoch_start(self) -> None:
        """Lets second losses begin an epoch."""
        for name, second in self._seconds.items():
            self._remembered[name] = second.begin_epoch(self.model, self._remembered.get(name, {}))

    def _start_at_probe(self) -> None:
        if self.hparams["init_head"] != PROBE or self.trainer.ckpt_path is not None or self._probed:
            return
        self._probed = True
        frozen = self.model.delta is not None and self.hparams["init_delta"] is None
        strength, data = 0.0 if frozen else self.model.strength, cast("Any", self.trainer).datamodule
        with self.trainer.precision_plugin.forward_context():
            penalty = start_at_probe(
                self.model, data, strength, self.hparams["probe_l2"], not self.trainer.is_global_zero
            )
        agree(self.model, self.trainer)
        rank_zero_info(f"The head starts at the exact probe, of l2 {penalty:.3g}.")

    def _take_units(self, head: ValueHead, data: Any) -> None:
        offset, scale = map(torch.from_numpy, data.value_scale())
        if not bool((scale > 0).all()):
            name = data.class_names[int(scale.argmin())]
            raise ConfigError(f"The {name} of all training images is the same: there is nothing to learn.")
        head.offset.copy_(offset)  # a checkpoint that is resumed overwrites them
        head.scale.copy_(scale)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean loss, a scalar, of logits (B, num_classes) with ``label``: plain cross-entropy, or as of `objective`."""
        return self.objective.loss(self.model, logits, batch["label"])

    def training_losses(self, batch: Batch) -> list[Weighed]:
        """Second losses, which may surround the forward pass, and that of the hyperparameters.

        With ``target`` (B, num_classes) where images are mixed.
        """
        with ExitStack() as surrounded:
            seen = {name: surrounded.enter_context(each.around(self.model)) for name, each in self._seconds.items()}
            logits = self._in_parts(batch)
        losses: list[Weighed] = [(self._second_losses(logits, batch, seen), len(logits))] if self._seconds else []
        if not self.reshaped():
            return [*losses, (self.loss(logits, batch), len(logits))]
        options, weight = self.hparams, self._class_weight
        gamma = options["focal_gamma"] if options["loss"] == "focal" else 0.0
        target = batch.get("target", batch["label"])
        own = weighted_loss(logits, target, weight, options["label_smoothing"], gamma)
        return [*losses, (own, len(logits) if weight is None else weight_of(target, weight))]

    def joins(self) -> bool:
        """Not where a second loss computes with the model, too."""
        return super().joins() and not self._seconds

    def _second_losses(self, logits: Tensor, batch: Batch, seen: Mapping[str, Seen]) -> Tensor:
        """Their sum, of what each has `seen`; each is a mean over images, or of `whole_batches`."""
        place = f"{global_seed()}/{self.current_epoch}"
        losses = (
            second.loss(self.model, self._remembered.get(name, {}), batch, logits, place, seen.get(name, {}))
            for name, second in self._seconds.items()
        )
        return cast("Tensor", sum(losses))

    def reshaped(self) -> list[str]:
        """The options that make the training loss another than the plain cross-entropy."""
        return [name for name, plain in PLAIN.items() if self.hparams[name] != plain]

    def mixed(self, batch: Batch, batch_idx: int) -> Batch:
        """Mixes the images where that is asked for; the draws follow from seed, process, epoch and step."""
        mixup, cutmix = self.hparams["mixup"], self.hparams["cutmix"]
        if not mixup and not cutmix:
            return batch
        seed = global_seed()
        place = None if seed is None else [seed, self.current_epoch, self.global_rank, batch_idx]
        classes, raw = len(self.model.class_names), self.model.backbone.raw
        image, target = mix(batch["image"], batch["label"], classes, mixup, cutmix, place, raw)
        return batch | {"image": image, "target": target}

    def _to_compare(self, logits: Tensor, split: str) -> Tensor:
        """Leaves the logits of the classes of a split, where the data say that not all are (ImageNet-R, ObjectNet)."""
        data: Any = getattr(self.trainer, "datamodule", None)
        groups = data.groups(split) if hasattr(data, "groups") else None
        return logits if groups is None else restrict(logits, groups)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also keeps what images are labelled with."""
        super().on_save_checkpoint(checkpoint)
        checkpoint |= {"targets": self.targets, "second_losses": self._remembered}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also refuses, by a ConfigError, a checkpoint of other targets; what the base refuses besides."""
        if (theirs := checkpoint.get("targets", "multiclass")) != self.targets:
            raise ConfigError(f"The checkpoint is of {theirs} targets, the model of {self.targets}: they must agree.")
        super().on_load_checkpoint(checkpoint)
        self._probed = True
        self._remembered = checkpoint.get("second_losses", {})

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Predicts a batch, which needs no labels: ``index`` (B,) and ``logits`` (B, num_classes)."""
        logits = self._finite_logits(self(batch["image"]), "test")
        return {"index": batch["index"], "logits": self._to_compare(logits, "test")}


def _shared(trainer: Any) -> bool:
    return trainer.world_size > 1 or is_sharded(trainer)


class PromptTuning(ClassificationTask):
    """Visual prompt tuning (Jia et al., ECCV 2022): prompts and a linear head on a frozen backbone."""

    def __init__(
        self,
        num_tokens: int = 10,
        deep: bool = True,
        dropout: float = 0.0,
        dropout_mode: Literal["sample", "shared", "key_value", "prompt"] = "sample",
        **task: Any,
    ) -> None:
        """Builds the task.

        Args:
            num_tokens: Prompts per layer.
            deep: Prompts before every block (VPT-deep) or only before the first (VPT-shallow).
            dropout: Dropout probability of the prompts, in [0, 1).
            dropout_mode: What is dropped: see `vpt.deltas.prompts.prompt.Prompt`.
            **task: See `ClassificationTask`.
        """
        given = {"num_tokens": num_tokens, "deep": deep, "dropout": dropout, "dropout_mode": dropout_mode}
        self._specs = [{"name": "prompt", **given}]
        super().__init__(**task)


class DeltaTuning(ClassificationTask):
    """Any composition of deltas and a linear head on a frozen backbone."""

    def __init__(self, deltas: list[dict[str, Any]], **task: Any) -> None:
        """Builds the task.

        Args:
            deltas: One dict per delta: its ``name`` in `vpt.deltas.DELTAS` and its arguments.
            **task: See `ClassificationTask`.
        """
        if not deltas:
            raise ConfigError("deltas is empty: name at least one, or use LinearProbe for a head alone.")
        self._specs = deltas
        super().__init__(**task)


class FineTuning(ClassificationTask):
    """Full fine-tuning: every parameter of the backbone trains, dropout and drop path as timm sets them."""

    def __init__(self, **task: Any) -> None:
        super().__init__(**task)
        self.model.backbone.unfreeze()
