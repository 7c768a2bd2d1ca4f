"""The LightningModule that every task is: a model, its training, schedule, small checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix

from vpt.argument_types import check_arguments
from vpt.backbones import Backbone, create_backbone
from vpt.backbones.block_forward import checkpointed
from vpt.backbones.compilation import compile_for
from vpt.errors import ConfigError, DeltaFileError, DivergedError, check_number
from vpt.image_size import plain_size
from vpt.models.classifier import AdaptedModel
from vpt.models.delta_file import check_fingerprint, fill, start_from
from vpt.models.delta_format import IDENTITY, identity
from vpt.tasks.checkpoints import check_classes, check_whole_epoch
from vpt.tasks.counted_images import CountedImages, all_trained
from vpt.tasks.initialization import agree, check_start, start_deltas
from vpt.tasks.kept_features import FeatureTask
from vpt.tasks.optimizers import (
    TrainingCurves,
    WeightAverage,
    check_monitors,
    check_rates,
    check_trainer,
    rate_scales,
    scheduled_optimizer,
    seed_epoch,
)
from vpt.tasks.parallel import Weighed, accompany, gathered, joint_loss
from vpt.tasks.regularization import DecayToStart, StartDecay
from vpt.tasks.relocation import relocating

Batch = dict[str, Tensor]


class TuningTask(FeatureTask):
    """A frozen or trained backbone with a head. A subclass says which head, which loss and which metrics.

    A batch is a dict of ``image`` (B, C, H, W), ``index`` int64 (B,) and what the images are to be compared with.

    Attributes:
        target: Name of what logits are compared with in a batch.
        ignored: Value of a target that does not count; None for no such value.
        model: What is trained.
        tally: What the last test, or validation that was a run of its own, keeps for tables and figures: the confusion
            matrix, (classes, classes), rows are true classes; or outputs and labels (`vpt.tasks.targets.objectives`).
    """

    target: str
    ignored: int | None = None
    _least_classes = 2
    _specs: Sequence[dict[str, Any]] = ()

    def __init__(
        self,
        backbone: str,
        weights: str = "pretrained",
        num_classes: int | None = None,
        image_size: int | list[int] | None = None,
        normalization: str | dict[str, list[float]] | None = None,
        optimizer: Literal["sgd", "adamw"] = "adamw",
        base_lr: float = 0.01,
        weight_decay: float = 1e-4,
        momentum: float = 0.9,
        warmup: float = 0.1,
        init_delta: str | None = None,
        micro_batch: int | None = None,
        pool: str | None = None,
        frozen_dtype: Literal["bfloat16"] | None = None,
        head_lr_scale: float = 1.0,
        layer_decay: float = 1.0,
        ema_decay: float = 0.0,
        start_decay: dict[str, Any] | None = None,
        compile: bool | None = False,
    ) -> None:
        """Builds backbone, delta and head. Only plain values, so that checkpoints load with ``weights_only=True``.

        Args:
            backbone: timm's name, e.g. ``vit_base_patch16_224.orig_in21k``, or ``vit_nano_patch8_64``.
            weights: ``pretrained`` (shipped, else the timm hub), ``random``, ``random:SEED`` or a path to a local file.
            num_classes: From the data when left out on the command line.
            image_size: Pixels, or [height, width]; None for the backbone's default.
            normalization: ``weights`` (of their timm config; also None), ``imagenet``, ``inception``, ``none``; where
                images have channels ``mean`` and ``std`` of each, by default of the training images.
            optimizer: ``sgd`` with momentum, or ``adamw``.
            base_lr: At batch 256; the learning rate used is base_lr · global batch / 256.
            weight_decay: On tensors of two or more dimensions (prompts and weights, not biases and norms).
            momentum: Of SGD, in [0, 1).
            warmup: Fraction of all steps of linear warm-up, in [0, 1); then the learning rate decays by a cosine to 0.
            init_delta: Delta file of the same deltas on the same backbone, of any task, that initialises the delta; its
                head is not used.
            micro_batch: Images per micro-batch: a larger batch is split, with two forward passes and the exact gradient
                of the whole batch (except batch norms, which see micro-batches). None for no split.
            pool: Of the final tokens, by timm's name: ``token`` (the class token), ``avg`` ...; None for its own.
            frozen_dtype: ``bfloat16`` keeps frozen weights in half the memory (`create_backbone`); None for fp32.
            head_lr_scale: The learning rate of the head as a multiple of that of all else, positive.
            layer_decay: Of full fine-tuning, in (0, 1]: the learning rate of layer l of L is multiplied by
                layer_decay^(L + 1 - l), 0 being the embeddings, L + 1 the head (BEiT, Bao et al., ICLR 2022).
            ema_decay: Of an exponential moving average of what is trained, in (0, 1), which is then what is validated,
                kept and tested (`WeightAverage`); 0 for none.
            start_decay: Options of `vpt.tasks.regularization.start_decay.StartDecay`: decay towards the start.
            compile: Whether the backbone with its deltas runs under `torch.compile` in a trainer; None for no.

        Raises:
            ConfigError: A value is of another type or out of range, or num_classes is missing or too small.
            UnknownNameError: A name does not exist; an UnsupportedBackboneError where the backbone has no such pool.
            WeightsError: The weights cannot be found.
        """
        super().__init__()
        self.save_hyperparameters()
        check_arguments(type(self), self.hparams)
        if num_classes is None:
            raise ConfigError("num_classes is not known: give it, or run `vpt` with a data module that has classes.")
        check_number("num_classes", num_classes, 0, 10**6, whole=True)
        if num_classes < (least := self._least_classes):
            raise ConfigError(f"num_classes is {num_classes}: it must be at least {least} for this task.")
        check_rates(self.hparams)
        self._start_decay = None if start_decay is None else StartDecay.of(start_decay)
        encoder = create_backbone(backbone, weights, image_size, normalization or "weights", pool, frozen_dtype)
        self.model = self._build(encoder, num_classes)
        # Lightning's own mean over processes with unequal shares is not that over the images.
        self.losses = nn.ModuleDict({"val": MeanMetric(), "test": MeanMetric()})
        metrics = MetricCollection(self._metrics(num_classes), compute_groups=False)
        self.val_metrics, self.test_metrics = (metrics.clone(prefix=f"{split}/") for split in ("val", "test"))
        self.tally = self._tally(num_classes)
        self._shown, self._counted = {"val": "val", "test": "test"}, CountedImages()
        self._trained_val: str | None = None
        self._limit_val: float = 1.0
        self._finite: Tensor | None = None
        self._knows_classes = False

    def specs(self) -> list[dict[str, Any]]:
        """The delta that the task trains, as for `vpt.attach`; empty for none."""
        return list(self._specs)

    def _build(self, backbone: Backbone, num_classes: int) -> AdaptedModel:
        """The model, with `specs` on its backbone."""
        raise NotImplementedError

    def _tally(self, num_classes: int) -> Metric:
        """What a test keeps for tables and figures."""
        return MulticlassConfusionMatrix(num_classes, ignore_index=self.ignored)

    def _metrics(self, num_classes: int) -> dict[str, Metric | MetricCollection]:
        """What is measured of logits and targets besides the loss, by its name behind the split."""
        raise NotImplementedError

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean loss, a scalar, of logits (B, num_classes, ...) of a batch, as validation and test measure it."""
        raise NotImplementedError

    def training_losses(self, batch: Batch) -> list[Weighed]:
        """What a step makes smaller the sum of; `loss`, a mean over images, unless a subclass says otherwise."""
        return [(self.loss(self._in_parts(batch), batch), len(batch["index"]))]

    def mixed(self, batch: Batch, batch_idx: int) -> Batch:
        """The batch that is trained on, of the one that is loaded: the same unless a subclass mixes its images."""
        return batch

    def check_fit(self, data: Any) -> None:
        """Refuses, by a ConfigError and before anything is written, options without effect; `data` is the module."""
        rate_scales(self.model, self.hparams)
        check_start(self.model, data, self.hparams["init_delta"])

    def configure_callbacks(self) -> list[L.Callback]:
        """Adds curves and the average of weights; first refuses what `check_trainer` does, and to compile in vain."""
        if self.hparams["compile"]:
            compile_for(self.model, self.trainer.strategy.root_device)
        if self.trainer.state.fn == "fit":
            check_trainer(self.trainer)
            check_monitors(self.trainer, ["val/loss", *map(str, self.val_metrics.keys())])  # with their prefix
            self.check_fit(getattr(self.trainer, "datamodule", None))
        more = relocating(self) + ([] if self._start_decay is None else [DecayToStart(self._start_decay)])
        return [TrainingCurves(), *more, *([WeightAverage(decay)] if (decay := self.hparams["ema_decay"]) else [])]

    def setup(self, stage: str) -> None:
        """Takes class names and preprocessing from the data module.

        A ConfigError where its classes or images are others, or something watches the validation, whose images are
        trained on; a DeltaFileError where `init_delta` is none of this backbone and deltas.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "class_names"):
            return
        if self._knows_classes and stage != "fit":
            data.number_classes_as(self.model.class_names)
        for what, theirs, ours in (
            ("num_classes", data.num_classes, len(self.model.class_names)),
            ("image_size", *map(plain_size, (data.image_size, self.model.backbone.image_size))),
            ("images of", data.preset.image_kind, self.model.backbone.image_kind),
        ):
            if theirs != ours and (what != "num_classes" or stage == "fit" or self._knows_classes):
                raise ConfigError(f"The data has {what} {theirs}, the model {ours}: they must agree.")
        if stage == "fit" or (not self._knows_classes and data.num_classes == len(self.model.class_names)):
            self.model.class_names = list(data.class_names)
        self._knows_classes |= stage == "fit"
        self.model.preset = data.preset.to_dict()
        if stage in ("fit", "validate"):
            self._leave_out_trained(data, stage)
        if stage == "fit" and self.hparams["init_delta"] is not None:  # a checkpoint that is resumed overwrites it
            start_from(self.hparams["init_delta"], self.model)

    def _leave_out_trained(self, data: Any, stage: str) -> None:
        """Evaluates no validation image that is trained on; where all are, all of them on request, as `trained`."""
        found = self._counted.look(data, stage == "fit", self._trained_val)
        self._shown["val"] = "trained" if self._counted.none else "val"
        self.val_metrics.prefix = f"{self._shown['val']}/"
        if not self._counted.none:
            return
        if stage == "validate":
            self.trainer.limit_val_batches = self.trainer.limit_val_batches or self._limit_val
            return
        check_monitors(self.trainer, (), f"since {found}: watch train/loss, or train on a list without them")
        if self.trainer.limit_val_batches:
            rank_zero_info(f"{found}: they are not evaluated, unless by `vpt validate`, as trained/acc and so on.")
            self._limit_val, self.trainer.limit_val_batches = self.trainer.limit_val_batches, 0

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes[, H, W]) of images (B, C, H, W), as the backbone takes them (`Backbone.normalize`)."""
        return cast("Tensor", self.model(images))

    def on_fit_start(self) -> None:
        """Takes from training images what deltas start from, unless training is resumed."""
        if self.trainer.ckpt_path is None:
            start_deltas(self.model, cast("Any", self.trainer).datamodule, not self.trainer.is_global_zero)
            agree(self.model, self.trainer)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds what an epoch draws, such as dropout."""
        if batch_idx == 0:
            seed_epoch(self)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """This process's part of the mean loss, a scalar (`joint_loss`); a DivergedError if one is not finite."""
        loss, parallel = joint_loss(self, batch, batch_idx), self.trainer.world_size > 1
        bar = self.trainer.progress_bar_callback is not None  # Lightning looks at what a bar shows after every step
        self.log("train/loss", loss, prog_bar=bar, batch_size=len(batch["index"]), sync_dist=parallel)
        self._finite = loss.detach().isfinite() & (True if self._finite is None else self._finite)
        if loss.device.type == "cpu" or batch_idx % 50 == 0:  # elsewhere looking at a number stops the device
            self._check_finite()
        return loss

    def _in_parts(self, batch: Batch) -> Tensor:
        """Training logits; of a micro-batch at a time, of which nothing but logits is kept for the backward pass."""
        size = self.hparams["micro_batch"] or len(batch["index"])
        if size >= len(batch["index"]):
            return self.logits(batch, "train")
        columns = {key: torch.split(tensor, size) for key, tensor in batch.items()}
        parts = [dict(zip(columns, part, strict=True)) for part in zip(*columns.values(), strict=True)]
        return torch.cat([checkpointed(self.logits, part, "train") for part in parts])

    def _evaluate(self, batch: Batch, split: str, metrics: MetricCollection) -> Tensor:
        """Updates the metrics of a split, and gives the logits of the batch."""
        answers, target = self._finite_logits(self.logits(batch, split), split), batch[self.target]
        logits = self._to_compare(answers, split)
        counted = len(target) if self.ignored is None else (target != self.ignored).sum()
        cast("MeanMetric", self.losses[split]).update(self.loss(logits, batch), weight=counted)
        target = target if target.is_floating_point() else target.long()
        metrics.update(logits, target)
        if self.trainer.state.fn != "fit":
            self.tally.update(logits, target)
        self._log(split, metrics)
        return logits

    def _log(self, split: str, metrics: MetricCollection) -> None:
        """Logs metrics as they are; every process does so for every batch, or the others would wait for it."""
        self.log(f"{self._shown[split]}/loss", cast("MeanMetric", self.losses[split]), on_step=False, on_epoch=True)
        for name, metric in metrics.items(keep_base=False, copy_state=False):
            # A bar in 80 columns has no room for the longer names, and would cut them.
            shown = split == "val" and name.rpartition("/")[2] in ("acc", "miou", "pixel_acc")
            self.log(name, metric, on_step=False, on_epoch=True, prog_bar=shown)

    def _finite_logits(self, logits: Tensor, split: str) -> Tensor:
        """Refuses logits that are not finite: NaN would count as the first class."""
        if not bool(logits.isfinite().all()):
            raise DivergedError(
                f"The model's logits of {split} images are not finite: its training diverged. Lower base_lr "
                f"({self.hparams['base_lr']}), or take a checkpoint of an earlier epoch."
            )
        return logits

    def _to_compare(self, logits: Tensor, split: str) -> Tensor:
        """The logits that a split is measured by."""
        return logits

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Updates the validation metrics."""
        shown, batch = batch, self._counted.of(batch)
        if len(batch["index"]):
            self._evaluate(batch, "val", self.val_metrics)
        else:
            accompany(self, shown)
            self._log("val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Updates the test metrics; returns logits, (B, num_classes, ...), for callbacks."""
        return self._evaluate(batch, "test", self.test_metrics)

    def on_test_epoch_start(self) -> None:
        """Starts anew what is kept for tables and figures."""
        self.tally.reset()

    def on_validation_epoch_start(self) -> None:
        """As that of a test; the first one that counts leaves out what is trained on, where that was not known yet."""
        self.tally.reset()
        if not self.trainer.sanity_checking:
            self._counted.read(self.trainer)

    def on_test_epoch_end(self) -> None:
        """Completes it on every process: it gathers."""
        self.tally.compute()

    def on_validation_epoch_end(self) -> None:
        """As that of a test."""
        if self.trainer.state.fn == "validate":
            self.tally.compute()

    def on_train_epoch_end(self) -> None:
        """Stops before a checkpoint of a diverged model is written, and knows the images that it is of."""
        self._check_finite()
        self._counted.read(self.trainer)

    def _check_finite(self) -> None:
        if self._finite is not None and not bool(self._finite):
            raise DivergedError(
                f"The loss is not finite in epoch {self.current_epoch} (counted from 0): lower base_lr "
                f"({self.hparams['base_lr']}). Checkpoints of whole epochs before it are kept."
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds the optimiser and the schedule per step."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return scheduled_optimizer(trained, self.hparams, self.trainer, rate_scales(self.model, self.hparams))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what belongs to the model, and the identity of the backbone that it belongs to."""
        checkpoint["state_dict"] = gathered({f"model.{key}": tensor for key, tensor in self.model.owned().items()})
        checkpoint["backbone"] = identity(self.model)
        checkpoint |= {"class_names": list(self.model.class_names), "channels": self.model.preset.get("channels")}
        checkpoint["trained_val"] = all_trained(getattr(self._trainer, "datamodule", None))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that a checkpoint is complete and belongs to this backbone, and completes it with what is frozen.

        The classes of data to test or to predict are found by their names: they may be in another order. A ConfigError
        where the data have other classes than it was trained on, or, to train on, in another order; or training would
        go on in the middle of an epoch. A DeltaFileError where it is incomplete, of another program, or of other
        weights.
        """
        if self._trainer is not None and self.trainer.state.fn == "fit":
            check_whole_epoch(checkpoint, self.trainer.max_steps)
        if not isinstance(recorded := checkpoint.get("backbone"), dict) or not recorded.keys() >= IDENTITY.keys():
            raise DeltaFileError("The checkpoint does not say on which backbone it was trained: give one of `vpt fit`.")
        check_fingerprint("The checkpoint", recorded, self.model.backbone)
        tensors = {key.removeprefix("model."): tensor for key, tensor in checkpoint["state_dict"].items()}
        data = getattr(self._trainer, "datamodule", None)
        training = data is not None and self.trainer.state.fn == "fit"
        if (names := check_classes(checkpoint, data, len(self.model.class_names), training)) is not None:
            self.model.class_names, self._knows_classes = list(names), True
        self._trained_val = checkpoint.get("trained_val")
        if self._trained_val is not None and data is not None and self.trainer.state.fn == "validate":
            self._leave_out_trained(data, "validate")  # whatever these data are trained on now
        fill(self.model, tensors, "The checkpoint")
        checkpoint["state_dict"] = self.state_dict()  # so that Lightning's own strict loading holds
