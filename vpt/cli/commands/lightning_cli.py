"""``vpt fit|validate|test|predict``: Lightning's command line with the rules of :mod:`vpt.cli.config_checks`."""

from __future__ import annotations

import copy
import inspect
import json
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

import vpt.data
import vpt.tasks
from vpt.atomic_write import check_writable, writing
from vpt.cli import config_checks
from vpt.cli.arguments import explain, refuse_odd_yaml
from vpt.cli.precision import AUTO, Trainer, choose, refuse_auto
from vpt.cli.warning_filters import hush
from vpt.data import ImageDataModule
from vpt.errors import ConfigError
from vpt.experiments.trial import merged
from vpt.image_size import plain_size
from vpt.reports.evaluation import answer_table, class_tables, iou_table, score_lines
from vpt.run_record import CONFIG_FILE, DELTA_FILE, LAST_CHECKPOINT, RUN_FILE, global_seed, method_name
from vpt.screen import show
from vpt.tasks import DeltaWriter, RunRecord, SegmentationTask, TuningTask
from vpt.tasks.build import FROM_DATA, image_size, settle
from vpt.tasks.callbacks import EpochLines, best_checkpoints, best_delta, run_folder, run_of
from vpt.tasks.checkpoints import last_checkpoint
from vpt.tasks.optimizers import check_trainer
from vpt.tasks.parallel import check_strategy
from vpt.tasks.predictions import PredictionWriter
from vpt.visualize.callbacks import FigureLogger

_CLASSES = [*vpt.tasks.__all__, *vpt.data.__all__]


class _Closing(L.Callback):
    """Tells what was measured when all is done, even where a figure cannot be written."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.tell(stage)


class VPTCLI(LightningCLI):
    """LightningCLI that fills the model in from the data and refuses what would be settled silently.

    `args` is the command line, `given` what files and flags say, section by section, without defaults; `whole` are
    those of the trainer's values that are whole numbers; `hyperparameters` are the checkpoint's, `recorded` its
    precision.
    """

    args: list[str]
    given: dict[str, Any]
    whole: dict[str, int]
    hyperparameters: dict[str, Any]
    recorded: str | None
    _data: ImageDataModule

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offers Lightning's four commands without ``--weights_only``: checkpoints are never unpickled."""
        return {name: skip | {"weights_only"} for name, skip in LightningCLI.subcommands().items()}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and keeps apart what the user gave; a ConfigError if it lost a value or contradicts a checkpoint."""
        self.args = args
        try:
            self.config = parser.parse_args(_sized(parser, args))
        except ArgumentError as error:
            raise explain(str(error), _CLASSES, _options(parser)) from None
        command = self.config.subcommand
        self.given = parser.parse_args(args, defaults=False)[command].as_dict()
        config = self.config[command]
        if isinstance(config.trainer, list):
            raise ConfigError("trainer holds a list, where names and their values are wanted.")
        written = config_checks.whole_numbers("trainer", args).items()
        self.whole = {key: number for key, number in written if type(config.trainer.get(key)) in (int, float)}
        for key, number in self.whole.items():
            config.trainer[key] = number
        config_checks.check_values(config.as_dict())
        for name in ("model", "data"):
            config_checks.check_nothing_lost(name, args, self.given.get(name), config[name].init_args)
            config_checks.check_known(name, args, config[name].init_args.as_dict())
        checkpoint = config_checks.read_checkpoint(command, config.ckpt_path, bool(config.trainer.fast_dev_run))
        known = checkpoint.get("hyper_parameters", {})
        self.hyperparameters = {key: value for key, value in known.items() if key != "_instantiator"}
        self.recorded = (checkpoint.get("protocol") or {}).get("precision")
        given = self.given.get("model")
        config_checks.check_checkpoint(given, self.hyperparameters, str(config.ckpt_path), FROM_DATA)

    def before_instantiate_classes(self) -> None:
        """Fills in number of classes, image size and normalisation, so that the saved config is explicit.

        An OutputError, before data are read, where the run could leave nothing.
        """
        config_checks.check_run(str(self.subcommand), self.config[self.subcommand].as_dict(), self.args)
        check_writable(self._home(), folder=True)
        settled, self._data = settle(self._left_open(), bool(self.hyperparameters) and self.subcommand != "fit")
        config = self.config[self.subcommand]
        config.data.init_args.image_size = settled["data"]["init_args"]["image_size"]
        for key in (*FROM_DATA, *config_checks.FREE_OF_CHECKPOINT):
            if key in config.model.init_args:  # a segmentation has no metrics to name
                config.model.init_args[key] = settled["model"]["init_args"][key]

    def _home(self) -> Path:
        """The folder of the run that is evaluated; else the one that runs are made in."""
        config = self.config[self.subcommand]
        evaluated = None if self.subcommand == "fit" or config.ckpt_path is None else run_of(config.ckpt_path)
        return evaluated or Path(config.trainer.default_root_dir or "")

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs it, unless a new run would leave nothing, or would replace another."""
        config, folder = self.config[subcommand], run_folder(self.trainer)
        if subcommand == "fit" and not config.trainer.fast_dev_run and self.trainer.is_global_zero:
            if folder is None:
                raise ConfigError(
                    "Without a logger a run has no folder, and would leave neither delta nor record: leave "
                    "trainer.logger and trainer.barebones out, or try with --trainer.fast_dev_run true."
                )
            goes_on = config.ckpt_path is not None and run_of(config.ckpt_path) == folder.resolve()
            if (folder / RUN_FILE).exists() and not goes_on:
                raise ConfigError(f"{folder} holds a run already: name another folder, or move it.")
            if config.ckpt_path is not None and not goes_on:
                print(f"goes on from {config.ckpt_path} as a new run in {folder}", flush=True)
        if subcommand == "fit":
            self.model.trainer = self.trainer  # as Lightning does later, when several processes run
            self.model.check_fit(self.datamodule)
        place = folder or self._home()
        check_writable(place, folder=True)
        with writing(place):
            super()._run_subcommand(subcommand)

    def _left_open(self) -> dict[str, Any]:
        """The config without what the user left to backbone and data."""
        config: dict[str, Any] = copy.deepcopy(self.config[self.subcommand]).as_dict()
        given = config_checks.init_args(self.given.get("model"))
        known = config_checks.init_args({"init_args": self.hyperparameters}) | given
        # Lightning has put the checkpoint's values in place of those that are free of it.
        kept = {key: known[key] for key in (*FROM_DATA, *config_checks.FREE_OF_CHECKPOINT) if key in known}
        config["model"]["init_args"] |= kept
        if "image_size" not in config_checks.init_args(self.given.get("data")):
            del config["data"]["init_args"]["image_size"]  # the class's default knows no backbone
        return config

    def instantiate_classes(self) -> None:
        """Builds model and trainer around the data, which are there: they may have taken long to list.

        What they refuse comes without jsonargparse's wrapping.
        """
        config = self.config.clone()
        config[self.subcommand].data = self.datamodule = self._data
        try:
            self.config_init = self.parser.instantiate_classes(config)
            self.model = self._get(self.config_init, "model")
            self._add_configure_optimizers_method_to_model(self.subcommand)
            self.trainer = self.instantiate_trainer()
        except ValueError as error:
            if not str(error).startswith("Does not validate"):
                raise
            raise explain(str(error), _CLASSES) from error

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds this package's logger and callbacks wherever the user has not decided otherwise."""
        config = self.config[self.subcommand]
        kwargs |= self.whole  # jsonargparse reads them once more
        if self.subcommand != "fit":
            self.save_config_callback = None  # what is evaluated keeps the config that it was trained with
        if config.trainer.logger in (None, True):
            kwargs["logger"] = self._logger(Path(config.trainer.default_root_dir or ""), config.ckpt_path)
        callbacks: list[L.Callback] = [RunRecord(), _Closing(self._show), EpochLines(), DeltaWriter()]
        callbacks += [PredictionWriter(), FigureLogger()]
        if config.trainer.enable_checkpointing is not False and not config.trainer.fast_dev_run:
            callbacks.append(last_checkpoint())
        self.trainer_defaults["callbacks"] = callbacks
        trainer = self._trainer(kwargs)
        if config.trainer.precision == AUTO:  # what is chosen stands in the saved config
            config.trainer.precision = choose(trainer, self.model, self.datamodule.batch_size, self.recorded)
        return trainer

    def after_fit(self) -> None:
        """Says where the run lies, and how to test it."""
        folder = run_folder(self.trainer)
        fast = self.config[self.subcommand].trainer.fast_dev_run
        if folder is None or fast or not self.trainer.is_global_zero or self.trainer.state.status == "interrupted":
            return
        print(f"written to {folder}")
        if (folder / LAST_CHECKPOINT).is_file() and (folder / CONFIG_FILE).is_file():
            print(f"test it:   vpt test -c {folder / CONFIG_FILE} --ckpt_path {folder / LAST_CHECKPOINT}")
            for monitor, path in best_checkpoints(self.trainer).items():
                print(f"or its best epoch by {monitor}:   vpt test -c {folder / CONFIG_FILE} --ckpt_path {path}")
                print(f"which is the file         {folder / best_delta(monitor)}")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Lightning's own, without its table of numbers: `_show` prints them."""
        kwargs: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        return kwargs | ({"verbose": False} if "verbose" in kwargs else {})

    def _show(self, stage: str) -> None:
        """Prints what a validation or a test has measured, where it stands, and what else can be done."""
        if stage not in ("validate", "test") or not self.config[stage].verbose or not self.trainer.is_global_zero:
            return
        split = ("test/",) if stage == "test" else ("val/", "trained/")
        metrics = {key: float(value) for key, value in self.trainer.callback_metrics.items() if key.startswith(split)}
        kept, names = self.model.tally.compute(), self.model.model.class_names
        counted: Any = kept.cpu().numpy() if not isinstance(kept, tuple) else None
        if counted is None:  # torchmetrics gives an answer of one number without its dimensions
            counted = tuple(each.reshape(-1, len(names)).cpu().numpy() for each in kept)
        print(*score_lines(metrics, counted), sep="\n")
        segments = isinstance(self.model, SegmentationTask)
        if isinstance(counted, tuple):
            show(answer_table(counted, names, self.model.targets))
        else:
            for table in iou_table(metrics) if segments else class_tables(counted, names):
                show(table)
        for callback in cast("Any", self.trainer).callbacks:
            if not isinstance(callback, RunRecord) or (place := callback.kept) is None:
                continue
            print(f"written to {place}")
            if stage != "test" or place.name != RUN_FILE or segments or isinstance(counted, tuple):
                continue
            print(f"beside other runs:          vpt report {place.parent}")
            delta = place.parent / DELTA_FILE
            if delta.is_file() and Path(self.trainer.ckpt_path or "").name == LAST_CHECKPOINT.name:  # of that epoch
                print(f"under distribution shift:   vpt robustness run --delta {delta}")

    def after_predict(self) -> None:
        """Says where the predictions lie."""
        for callback in cast("Any", self.trainer).callbacks:
            if isinstance(callback, PredictionWriter) and callback.place is not None:
                print(f"written to {callback.place}")

    def _trainer(self, kwargs: dict[str, Any]) -> L.Trainer:
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:  # all that it is given is the user's
            raise ConfigError(" ".join(str(error).split())) from error
        check_strategy(trainer, self.model)
        if self.subcommand == "fit":
            check_trainer(trainer)  # before it makes a folder
        return trainer

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

    reads_data = True
    resolved: dict[str, Any]

    def before_instantiate_classes(self) -> None:
        """Keeps the config with what it leaves open, and refuses what a run would refuse."""
        self.resolved = self._left_open()
        refuse_auto(self.resolved["trainer"])
        if self.reads_data:
            settle(self.resolved)

    def instantiate_classes(self) -> None:
        """Builds nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


class _Reader(_Resolver):
    """Reads no data."""

    reads_data = False


def resolve(args: list[str], data: bool = True) -> dict[str, Any]:
    """The config that `vpt fit` would run, without what the user left to backbone and data.

    It has ``seed_everything``, ``trainer``, ``model`` and ``data``. With `data` these are read, and what a run would
    refuse is refused.
    """
    found = cast("_Resolver", _cli(_Resolver if data else _Reader, ["fit", *args])).resolved
    found["trainer"] = {key: value for key, value in found["trainer"].items() if value is not None}
    return {key: found[key] for key in ("seed_everything", "trainer", "model", "data")}


def _sized(parser: LightningArgumentParser, args: list[str]) -> list[str]:
    """A command line that prints its config, with the size of images that a run would have."""
    printing = [arg for arg in args if arg.partition("=")[0] == "--print_config"]
    if not printing:
        return args
    try:
        given = parser.parse_args([arg for arg in args if arg not in printing], defaults=False)[args[0]].as_dict()
    except ArgumentError:  # what is printed may be incomplete
        return args
    if "image_size" in config_checks.init_args(given["data"]):
        return args
    return [*args, f"--data.image_size={json.dumps(plain_size(image_size(given)))}"]


def _options(parser: LightningArgumentParser) -> list[str]:
    """The names of all flags of a command, without their dashes."""
    (command,) = cast("Any", parser)._subcommands_action.choices.values()
    names = {flag.lstrip("-") for flag in command._option_string_actions}
    for section, base, package in (("model", TuningTask, vpt.tasks), ("data", ImageDataModule, vpt.data)):
        offered = (getattr(package, name) for name in package.__all__)
        classes = (each for each in offered if isinstance(each, type) and issubclass(each, base))
        bases = {
            parent for each in classes for parent in each.__mro__ if "__init__" in vars(parent) and parent is not object
        }
        taken = (parameter for each in bases for parameter in inspect.signature(vars(each)["__init__"]).parameters)
        names |= {f"{section}.{parameter}" for parameter in taken}
    return sorted(names)


def typed(args: list[str]) -> Callable[[str, Any], Any]:
    """Reads single values as `vpt fit`, of these arguments, would read them as flags.

    What it returns takes a key such as ``model.base_lr`` and a value from YAML, and gives the value in the type of the
    key; a ConfigError for a key or a value that `vpt fit` would refuse.
    """
    parser = _cli(_Reader, ["fit", *args]).parser

    def value_of(key: str, value: Any) -> Any:
        section, _, name = key.partition(".")
        text = value if isinstance(value, str) else json.dumps(value)
        try:
            merged({section: {}}, {key: value})  # knows which keys there are
            parsed = parser.parse_args(["fit", *args, f"--{key}={text}"])["fit"].as_dict()[section]
        except ArgumentError as error:
            said = str(explain(str(error), _CLASSES, _options(parser)))
            raise ConfigError(f"{key}: {said.removeprefix(f'{key}: ')}") from None
        config_checks.check_finite(section, parsed)
        refuse_auto(parsed if section == "trainer" else {})
        return (parsed if section == "trainer" else parsed["init_args"])[name] if name else parsed

    return value_of


def run(args: list[str]) -> None:
    """Runs one of the four commands."""
    _cli(VPTCLI, args)


def _cli(cli: type[VPTCLI], args: list[str]) -> VPTCLI:
    hush()  # again: Lightning adds filters of its own when it is imported
    refuse_odd_yaml()
    config_checks.check_files(args)
    global_seed()
    command = args[0]
    # To build the parsers of all four takes longer than to read the command line with one.
    offered = {"subcommands": staticmethod(lambda: {command: VPTCLI.subcommands()[command]})}
    of_one: type[VPTCLI] = type(cli.__name__, (cli,), offered)
    parsers = {"exit_on_error": False, "allow_abbrev": False}
    try:
        return of_one(
            TuningTask,
            ImageDataModule,
            trainer_class=Trainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},  # a version folder is new, or the user named it
            # No summary: what trains is said in one line, and hundreds of frozen modules tell nobody anything.
            trainer_defaults={"default_root_dir": "runs", "log_every_n_steps": 10, "enable_model_summary": False},
            parser_kwargs={"prog": "vpt", **parsers, command: parsers},
            args=args,
        )
    except ArgumentError as error:
        raise explain(str(error), _CLASSES) from None
    except MisconfigurationException as error:
        raise ConfigError(" ".join(str(error).split())) from error
