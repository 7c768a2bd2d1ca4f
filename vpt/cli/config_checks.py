"""What a configuration may not do silently: lose a value, contradict the data, or contradict a checkpoint.

jsonargparse and Lightning settle each of these by letting one side win without a word (lightning #21455). The rules
work on plain mappings: ``given`` is one section (``model`` or ``data``) of what the user wrote in files and flags,
``{"class_path": ..., "init_args": {...}}``, without defaults.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vpt.cli.arguments import read_config, read_yaml
from vpt.errors import ConfigError, UnknownNameError, check_number
from vpt.run_record import PROBE

Section = Mapping[str, Any]

# Least, most, and whether whole: what Lightning takes beyond these it ignores, or means something else by.
_TRAINER: dict[str, tuple[float, float, bool]] = {
    "max_epochs": (1, math.inf, True),
    "min_epochs": (0, math.inf, True),
    "max_steps": (-1, math.inf, True),  # -1 is Lightning's word for none
    "min_steps": (0, math.inf, True),
    "accumulate_grad_batches": (1, math.inf, True),
    "check_val_every_n_epoch": (1, math.inf, True),
    "val_check_interval": (0, math.inf, False),
    "log_every_n_steps": (0, math.inf, True),
    "num_sanity_val_steps": (-1, math.inf, True),
    "reload_dataloaders_every_n_epochs": (0, math.inf, True),
    "num_nodes": (1, math.inf, True),
    "gradient_clip_val": (0, math.inf, False),
    **{f"limit_{stage}_batches": (0, math.inf, False) for stage in ("train", "val", "test", "predict")},
}

# What a flag has no effect without.
_IDLE: dict[str, tuple[str, Callable[[Mapping[str, Any]], bool]]] = {
    "model.momentum": ("model.optimizer sgd", lambda args: args.get("optimizer") == "sgd"),
    "model.l2": ("model.solver lbfgs or ridge", lambda args: args.get("solver") in ("lbfgs", "ridge")),
    "model.head_width": ("model.head conv", lambda args: args.get("head") == "conv"),
    "model.focal_gamma": ("model.loss focal", lambda args: args.get("loss") == "focal"),
    "model.dropout_mode": ("model.dropout", lambda args: bool(args.get("dropout"))),
    "data.subset_seed": ("data.shots or data.fraction", lambda args: bool(args.keys() & {"shots", "fraction"})),
    "trainer.gradient_clip_algorithm": ("trainer.gradient_clip_val", lambda args: bool(args["gradient_clip_val"])),
}

# Weights may lie elsewhere on this machine, and the fingerprint in the checkpoint guards what is in them; metrics are
# of the evaluation, and a compiler is of the machine.
FREE_OF_CHECKPOINT = {"weights", "metrics", "compile"}


_LIGHTNING_CHECKPOINTS = ("last", "best", "hpc", "registry")  # words that Lightning resolves itself


def init_args(section: Section | None) -> dict[str, Any]:
    """The values of a section that are not null."""
    args = (section or {}).get("init_args") or {}
    return {key: value for key, value in args.items() if value is not None}


def check_files(args: list[str]) -> None:
    """Refuses, by a ConfigError that names it, a file of a command line that is to be YAML and is none."""
    for flag, value in _options(args):
        nested = flag.startswith(("--model.", "--data.", "--trainer.")) and value.endswith((".yaml", ".yml", ".json"))
        if not os.path.isfile(value):  # noqa: PTH113 - Path.is_file raises on inline YAML longer than a file name may be
            continue
        if flag in ("-c", "--config", "--model", "--data", "--trainer"):
            read_config(Path(value), "")
        elif nested:
            read_yaml(Path(value))


def check_values(config: Mapping[str, Any]) -> None:
    """Refuses, by a ConfigError, numbers of a config that mean nothing: those that are not finite, and others."""
    check_finite("", config)
    if isinstance(seed := config.get("seed_everything"), int) and not isinstance(seed, bool):
        check_number("seed_everything", seed, 0, 2**32 - 1, whole=True)
    for key, (least, most, whole) in _TRAINER.items():
        if (value := config["trainer"].get(key)) is not None:
            check_number(f"trainer.{key}", value, least, most, whole)
    devices = config["trainer"].get("devices")
    if isinstance(devices, int | str) and str(devices).isdecimal():
        check_number("trainer.devices", int(devices), 1, max(8, os.cpu_count() or 1), whole=True)  # a process for each
    for key in ("gradient_clip_val", "val_check_interval"):
        if config["trainer"].get(key) == 0:
            raise ConfigError(f"trainer.{key} is 0, which says nothing: leave it out, or give more.")


def check_run(command: str, config: Mapping[str, Any], args: list[str]) -> None:
    """Refuses, by a ConfigError, what `vpt` `command` would do nothing with, or what has no end.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        config: Of the run, with all defaults.
        args: Its command line, on which a flag that has no effect is refused.
    """
    trainer = config["trainer"]
    stage = {"fit": "train", "validate": "val"}.get(command, command)
    if trainer.get(f"limit_{stage}_batches") == 0 or (command == "fit" and trainer.get("max_steps") == 0):
        raise ConfigError(f"vpt {command} has nothing to do: the trainer's limits leave no batch.")
    home = trainer.get("default_root_dir")
    if home is not None and (not home or "://" in home or home.startswith("~")):
        raise ConfigError(f"trainer.default_root_dir is {home!r}: name a folder of this machine, written out.")
    nodes = trainer.get("num_nodes") or 1
    if nodes > 1 and not {"SLURM_JOB_ID", "MASTER_ADDR", "LSB_JOBID"} & os.environ.keys():
        raise ConfigError(
            f"trainer.num_nodes is {nodes}, but nothing says where the others are: start the run by SLURM or torchrun."
        )
    if trainer.get("barebones"):
        raise ConfigError(f"trainer.barebones leaves nothing of vpt {command}, no record and no file: leave it out.")
    sections = {name: init_args(config[name]) for name in ("model", "data")} | {"trainer": trainer}
    for key, (needed, when) in _IDLE.items():
        section, _, name = key.partition(".")
        flags = [source for found, source, _ in _written(section, args) if found == name and source.startswith("--")]
        if flags and not when(sections[section]):
            raise ConfigError(f"{flags[-1]} has no effect without {needed}: leave it out.")
    if command == "fit":
        check_end(trainer)
        for key in ("init_delta", "init_head"):
            if (path := sections["model"].get(key)) in (None, PROBE if key == "init_head" else None):
                continue
            if not os.path.isfile(path):  # noqa: PTH113
                raise ConfigError(f"model.{key}: there is no file {path:.200}.")


def check_end(trainer: Mapping[str, Any]) -> None:
    """Refuses, by a ConfigError, a training without an end, for which Lightning would take 1,000 epochs."""
    if trainer.get("max_epochs") is None and trainer.get("max_steps", -1) == -1 and not trainer.get("fast_dev_run"):
        raise ConfigError("Training needs an end, and so does its learning rate: give trainer.max_epochs or max_steps.")
    for unit in ("epochs", "steps"):
        least, most = trainer.get(f"min_{unit}"), trainer.get(f"max_{unit}")
        if least is not None and most not in (None, -1) and least > most:
            raise ConfigError(f"trainer.min_{unit} is {least}, more than trainer.max_{unit}, {most}: lower it.")


def check_finite(name: str, value: Any) -> None:
    """Refuses, by a ConfigError, a number that is not finite, in a value of a config at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name.replace('.init_args', '')} is {value}, where a finite number is wanted.")
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        check_finite(f"{name}.{key}".removeprefix("."), part)


def check_overruled(args: list[str], values: Mapping[str, Sequence[Any]]) -> None:
    """Refuses, by a ConfigError, a flag of a value that an experiment sets itself, unless to the same one."""
    for flag, value in _options(args):
        key = flag.removeprefix("--").replace(".init_args", "")
        if key in values and value not in (mine := [str(each) for each in values[key]]):
            raise ConfigError(f"{flag} {value} has no effect: the experiment sets it to {' and '.join(mine)}.")


def check_nothing_lost(name: str, args: list[str], given: Section | None, accepted: Section) -> None:
    """Refuses overlays that dropped a key which the class that is left accepts, with a ConfigError.

    Keys that only an overlaid class knew go with it; any other key that was written in the section `name` must still be
    there. `accepted` are its ``init_args`` with all defaults.
    """
    kept = (given or {}).get("init_args") or {}
    lost = {key: source for key, source, _ in _written(name, args) if key in accepted and key not in kept}
    for key, source in lost.items():
        raise ConfigError(
            f"{name}.{key} was set by {source} and lost when {name}.class_path changed and changed back: "
            f"repeat {name}.{key} after the last class_path."
        )


def check_known(name: str, args: list[str], accepted: Section) -> None:
    """Refuses, by an UnknownNameError, an option that the class which is left has not, and whose value is ``{}``.

    jsonargparse passes over such, and refuses all others. What only an overlaid class had goes with it.
    """
    written: dict[str, Any] = {}
    chosen = ""
    for key, _, value in _written(name, args):
        if key != "class_path":
            written[key] = value
        elif (now := str(value).rpartition(".")[2]) != chosen:
            written, chosen = {}, now
    for key, value in written.items():
        if key not in (*accepted, "init_args", "dict_kwargs") and str(value).replace(" ", "") == "{}":
            raise UnknownNameError(f"option of {name}", key, list(accepted))


def read_checkpoint(command: str, path: str | None, trying: bool) -> dict[str, Any]:
    """Reads the checkpoint of a run; nothing of no path, and a ConfigError where a trained model is needed."""
    import torch

    if path is None:
        if command != "fit" and not trying:
            raise ConfigError(f"vpt {command} needs a trained model: give --ckpt_path RUN/checkpoints/last.ckpt.")
        return {}
    if path.partition(":")[0] in _LIGHTNING_CHECKPOINTS:  # Lightning would go on without any where it finds none
        raise ConfigError(f"--ckpt_path {path} says of no run: give the file, such as RUN/checkpoints/last.ckpt.")
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises on a name that is too long
        raise ConfigError(f"No checkpoint {path:.200}: a run keeps its last epoch in checkpoints/last.ckpt.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes lead to
        raise ConfigError(f"{path} is not a checkpoint that torch can load safely ({type(error).__name__}).") from error
    known = checkpoint if isinstance(checkpoint, dict) else {}
    if not all(isinstance(known.get(key), dict) for key in ("state_dict", "hyper_parameters", "backbone")) or (
        "pytorch-lightning_version" not in known
    ):
        raise ConfigError(f"{path} is no checkpoint of a run: a run keeps its last epoch in checkpoints/last.ckpt.")
    return known


def check_checkpoint(
    given: Section | None, checkpoint: Mapping[str, Any], path: str, from_data: Collection[str]
) -> None:
    """Refuses a ``model`` section that differs from the hyperparameters that a checkpoint was trained with.

    Lightning keeps the class under ``_class_path``; only `FREE_OF_CHECKPOINT` may differ, else a ConfigError. Null is a
    value as any other, but for what the data say of a model, which it leaves to them.
    """
    own = (given or {}).get("init_args") or {}
    mine = {key: value for key, value in own.items() if value is not None or key not in from_data}
    theirs = {key: value for key, value in checkpoint.items() if key not in FREE_OF_CHECKPOINT}
    if given and "class_path" in given:
        mine["_class_path"] = given["class_path"]
    for key in mine.keys() & theirs.keys():
        if mine[key] != theirs[key]:
            name = "model" if key == "_class_path" else f"model.{key}"
            raise ConfigError(
                f"{name} is {mine[key]!r}, but {path} was trained with {theirs[key]!r}: leave {name} out or train anew."
            )


def whole_numbers(name: str, args: list[str]) -> dict[str, int]:
    """The values of a section that are written as whole numbers.

    Which of int and float a union tries first depends on what Python has met before: 1, one batch, may be read as 1.0,
    all of them.
    """
    last = {key: value for key, _, value in _written(name, args)}
    found = {key: int(v) if isinstance(v, str) and v.isdecimal() else v for key, v in last.items()}
    return {key: value for key, value in found.items() if type(value) is int}


def _written(name: str, args: list[str]) -> Iterator[tuple[str, str, Any]]:
    """Yields (key, where it was written, value) of one section, in order, from config files and flags of a command."""
    for flag, value in _options(args):
        if flag in ("-c", "--config"):
            section = _mapping(value).get(name)
        elif flag == f"--{name}":
            section = _mapping(value) or {"class_path": value}
        elif flag.startswith(f"--{name}."):
            section = {flag.removeprefix(f"--{name}.").removeprefix("init_args."): value}
        else:
            continue
        if isinstance(section, Mapping):
            where = value if flag in ("-c", "--config", f"--{name}") else flag
            for key, written in {**section, **(section.get("init_args") or {})}.items():
                yield str(key), where, written


def _options(args: list[str]) -> Iterator[tuple[str, str]]:
    for position, arg in enumerate(args):
        if arg.startswith("-"):
            flag, equals, value = arg.partition("=")
            if arg.startswith("-c") and len(flag) > 2:  # -cFILE
                flag, equals, value = "-c", "=", arg[2:]
            yield flag, value if equals else " ".join(args[position + 1 : position + 2])


def _mapping(text: str) -> Mapping[str, Any]:
    """Reads a file name or inline YAML; anything but a mapping, such as a class name, is empty."""
    # Not Path.is_file: that raises on inline YAML longer than a file name may be.
    content = read_yaml(Path(text) if os.path.isfile(text) else text)  # noqa: PTH113
    return content if isinstance(content, Mapping) else {}
