"""``vpt fit|validate|test|predict``: Lightning's command line with the rules of :mod:`vpt.cli.config_checks`."""

from __future__ import annotations

import copy
from argparse import ArgumentError
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, instantiate_class
from lightning.pytorch.loggers import TensorBoardLogger

import vpt.data
import vpt.tasks
from vpt.backbones import input_size
from vpt.cli import config_checks
from vpt.cli.arguments import explain
from vpt.cli.warning_filters import hush
from vpt.data import ImageDataModule
from vpt.errors import ConfigError
from vpt.run_record import CONFIG_FILE, LAST_CHECKPOINT, method_name
from vpt.tasks import DeltaWriter, RunRecord, TuningTask
from vpt.tasks.build import FROM_DATA
from vpt.tasks.callbacks import last_checkpoint, run_folder
from vpt.tasks.predictions import PredictionWriter
from vpt.visualize.callbacks import FigureLogger

_CLASSES = [*vpt.tasks.__all__, *vpt.data.__all__]
_LIGHTNING_CHECKPOINTS = ("last", "best", "hpc", "registry")  # words that Lightning resolves itself


class VPTCLI(LightningCLI):
    """LightningCLI that fills the model in from the data and refuses what would be settled silently.

    Attributes:
        given: What files and flags say, section by section, without defaults.
        hyperparameters: Those of the checkpoint, empty without one.
    """

    given: dict[str, Any]
    hyperparameters: dict[str, Any]

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offers Lightning's four commands without ``--weights_only``: checkpoints are never unpickled."""
        return {name: skip | {"weights_only"} for name, skip in LightningCLI.subcommands().items()}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses and keeps apart what the user gave.

        Args:
            parser: The parser of all commands.
            args: Command line, a list of strings.

        Raises:
            ConfigError: A value was lost between overlays, or contradicts the checkpoint.
        """
        self.config = parser.parse_args(args)
        command = self.config.subcommand
        self.given = parser.parse_args(args, defaults=False)[command].as_dict()
        config = self.config[command]
        for name in ("model", "data"):
            config_checks.check_nothing_lost(name, args, self.given.get(name), config[name].init_args)
        self.hyperparameters = _hyperparameters(command, config.ckpt_path, bool(config.trainer.fast_dev_run))
        config_checks.check_checkpoint(self.given.get("model"), self.hyperparameters, str(config.ckpt_path))

    def before_instantiate_classes(self) -> None:
        """Fills in number of classes, image size and normalisation, so that the saved config is explicit.

        Raises:
            ConfigError: The user or a checkpoint says something else than the data.
            DataError: The data cannot be found.
        """
        config = self.config[self.subcommand]
        given = config_checks.init_args(self.given.get("model"))
        for key in config_checks.FREE_OF_CHECKPOINT & given.keys():
            config.model.init_args[key] = given[key]  # Lightning has put the checkpoint's in its place
        fixed = config_checks.init_args({"init_args": self.hyperparameters}) | given
        if "image_size" not in config_checks.init_args(self.given.get("data")):
            config.data.init_args.image_size = fixed.get("image_size") or input_size(config.model.init_args.backbone)
        data: ImageDataModule = instantiate_class((), config.data.as_dict())
        for key in FROM_DATA:
            config.model.init_args[key] = config_checks.settle(
                key, fixed, getattr(data, key), f"the data {data.name!r}"
            )

    def instantiate_classes(self) -> None:
        """Builds data, model and trainer.

        Raises:
            VPTError: What they refuse, without jsonargparse's wrapping.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            if not str(error).startswith("Does not validate"):
                raise
            raise explain(str(error), _CLASSES) from error

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds this package's logger and callbacks wherever the user has not decided otherwise.

        Args:
            **kwargs: Trainer arguments that win over the config.

        Returns:
            The trainer.
        """
        config = self.config[self.subcommand]
        if self.subcommand != "fit":
            self.save_config_callback = None  # what is evaluated keeps the config that it was trained with
        if config.trainer.barebones:
            return self._trainer(kwargs)
        if config.trainer.logger in (None, True):
            kwargs["logger"] = self._logger(Path(config.trainer.default_root_dir), config.ckpt_path)
        callbacks: list[L.Callback] = [RunRecord(), DeltaWriter(), PredictionWriter(), FigureLogger()]
        if config.trainer.enable_checkpointing is not False and not config.trainer.fast_dev_run:
            callbacks.append(last_checkpoint())
        self.trainer_defaults["callbacks"] = callbacks
        return self._trainer(kwargs)

    def after_fit(self) -> None:
        """Says where the run lies, and how to test it."""
        folder = run_folder(self.trainer)
        fast = self.config[self.subcommand].trainer.fast_dev_run
        if folder is None or fast or not self.trainer.is_global_zero or self.trainer.state.status == "interrupted":
            return
        print(f"written to {folder}")
        if (folder / LAST_CHECKPOINT).is_file() and (folder / CONFIG_FILE).is_file():
            print(f"test it:   vpt test -c {folder / CONFIG_FILE} --ckpt_path {folder / LAST_CHECKPOINT}")

    def after_predict(self) -> None:
        """Says where the predictions lie."""
        for callback in cast("Any", self.trainer).callbacks:
            if isinstance(callback, PredictionWriter) and callback.place is not None:
                print(f"written to {callback.place}")

    def _trainer(self, kwargs: dict[str, Any]) -> L.Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:  # all that it is given is the user's
            raise ConfigError(" ".join(str(error).split())) from error

    def _logger(self, root: Path, checkpoint: str | None) -> TensorBoardLogger:
        """A new run folder; or, for a checkpoint that is evaluated, the one that it lies in."""
        if self.subcommand != "fit" and checkpoint is not None:
            folder = Path(checkpoint).resolve().parent.parent
            if (folder / CONFIG_FILE).is_file():
                return TensorBoardLogger(folder.parent, name="", version=folder.name, default_hp_metric=False)
        name = f"{self.datamodule.name}/{method_name(type(self.model).__name__, self.model.hparams)}"
        return TensorBoardLogger(root, name=name, default_hp_metric=False)


class _Resolver(VPTCLI):
    """Finds out what a run would be, and runs nothing."""

    resolved: dict[str, Any]

    def before_instantiate_classes(self) -> None:
        """Keeps the config with what it leaves to the data."""
        self.resolved = copy.deepcopy(self.config[self.subcommand]).as_dict()

    def instantiate_classes(self) -> None:
        """Builds nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


class _Checker(_Resolver):
    """Refuses what a run would refuse, too."""

    def before_instantiate_classes(self) -> None:
        """Settles everything with the data, once."""
        super().before_instantiate_classes()
        VPTCLI.before_instantiate_classes(self)


def resolve(args: list[str], data: bool = True) -> dict[str, Any]:
    """The config that `vpt fit` would run, for experiments of many runs.

    Args:
        args: Those of `vpt fit`.
        data: Read the data, and refuse what a run would refuse.

    Returns:
        ``seed_everything``, ``trainer``, ``model`` and ``data``; what the user left to the data is None.

    Raises:
        VPTError: The user's input is wrong.
    """
    found = cast("_Resolver", _cli(_Checker if data else _Resolver, ["fit", *args])).resolved
    found["trainer"] = {key: value for key, value in found["trainer"].items() if value is not None}
    return {key: found[key] for key in ("seed_everything", "trainer", "model", "data")}


def run(args: list[str]) -> None:
    """Runs one of the four commands."""
    _cli(VPTCLI, args)


def _cli(cli: type[VPTCLI], args: list[str]) -> VPTCLI:
    hush()  # again: Lightning adds filters of its own when it is imported
    command = args[0]
    # To build the parsers of all four takes longer than to read the command line with one.
    offered = {"subcommands": staticmethod(lambda: {command: VPTCLI.subcommands()[command]})}
    of_one: type[VPTCLI] = type(cli.__name__, (cli,), offered)
    try:
        return of_one(
            TuningTask,
            ImageDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},  # a version folder is new, or the user named it
            # No summary: what trains is said in one line, and hundreds of frozen modules tell nobody anything.
            trainer_defaults={"default_root_dir": "runs", "log_every_n_steps": 10, "enable_model_summary": False},
            parser_kwargs={"prog": "vpt", "exit_on_error": False, command: {"exit_on_error": False}},
            args=args,
        )
    except ArgumentError as error:
        raise explain(str(error), _CLASSES) from None
    except MisconfigurationException as error:
        raise ConfigError(" ".join(str(error).split())) from error


def _hyperparameters(command: str, path: str | None, trying: bool) -> dict[str, Any]:
    """Reads a checkpoint's hyperparameters; refuses to measure a model that nobody trained."""
    if path is None:
        if command != "fit" and not trying:
            raise ConfigError(f"vpt {command} needs a trained model: give --ckpt_path RUN/checkpoints/last.ckpt.")
        return {}
    if path.partition(":")[0] in _LIGHTNING_CHECKPOINTS:  # Lightning would go on without any where it finds none
        raise ConfigError(f"--ckpt_path {path} says of no run: give the file, such as RUN/checkpoints/last.ckpt.")
    try:
        there = Path(path).is_file()
    except OSError:  # such as a name that is too long
        there = False
    if not there:
        raise ConfigError(f"No checkpoint {path:.200}: a run keeps its last epoch in checkpoints/last.ckpt.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes lead to
        raise ConfigError(f"{path} is not a checkpoint that torch can load safely ({type(error).__name__}).") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= checkpoint.keys():
        raise ConfigError(f"{path} is no checkpoint of a run: a run keeps its last epoch in checkpoints/last.ckpt.")
    return {key: value for key, value in checkpoint["hyper_parameters"].items() if key != "_instantiator"}
