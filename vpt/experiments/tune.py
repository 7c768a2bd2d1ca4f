"""`tune`: the method for these images, within a time: an exact probe, then successive halving of a few recipes.

Recipes and rates are those that docs/protocol.md measured. Validation images decide, and only a gain beyond chance
makes a method worth its cost; the winner is then trained on all labelled images, and the test split is read once.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vpt.atomic_write import write_json
from vpt.backbones import create_backbone
from vpt.data import ImageDataModule
from vpt.data.targets import check_multiclass
from vpt.errors import ConfigError, VPTError
from vpt.experiments.trial import Config, Record, Trial, finished, merged, run_trial, val_score
from vpt.metrics.accuracy import Difference, difference
from vpt.models import load_classifier
from vpt.models.feature_cache import share
from vpt.models.prediction import batch_answers
from vpt.run_record import CONFIG_FILE, DELTA_FILE, ENDED, read_json
from vpt.tasks.build import build_data

TUNE_FILE = "tune.json"
MODEL_FILE = "model.safetensors"
PROBE = "linear"
BATCH = 10
_RATE = 256 / BATCH
_PROMPT = (
    {"name": "prompt", "num_tokens": 4},
    {"name": "bias"},
    {"name": "norm", "bias": False},
    {"name": "lora", "rank": 2, "targets": ["q", "v"]},
)
RECIPES: dict[str, dict[str, Any]] = {
    PROBE: {"task": "LinearProbe", "solver": "lbfgs", "l2": [0.001, 0.003, 0.01, 0.03, 0.1]},
    "bias": {"task": "DeltaTuning", "deltas": [{"name": "bias"}], "base_lr": 0.003 * _RATE},
    "ssf": {"task": "DeltaTuning", "deltas": [{"name": "ssf"}], "base_lr": 0.003 * _RATE},
    "lora": {
        "task": "DeltaTuning",
        "deltas": [{"name": "lora", "rank": 8, "targets": ["q", "v"]}],
        "base_lr": 0.002 * _RATE,
    },
    "prompt": {"task": "DeltaTuning", "deltas": list(_PROMPT), "base_lr": 0.003 * _RATE},
    "full": {"task": "FineTuning", "base_lr": 3e-5 * _RATE},
}
"""Task and hyperparameters by name; all others are the tasks' own. ``prompt`` is configs/method/prompt.yaml."""
TRAINER: dict[str, dict[str, Any]] = {"prompt": {"trainer.gradient_clip_val": 1.0}}
"""What a recipe asks of the trainer."""
STEP = 4.0
"""What an image costs in training, in forward passes of the bare backbone, at most."""
RESERVE = 0.85
"""Share of the time that is planned for."""
QUARTER = 0.25
"""Share of it for the search, all of whose runs are discarded."""


SHORTLISTS = (("bias", "ssf", "lora", "prompt", "full"), ("ssf", "lora", "prompt"), ("prompt",), ())
"""What is tried beside the probe, the longest list first that the time suffices for."""
EPOCHS = (25, 18, 12, 8, 5, 3, 2)
"""Of a run of the search."""
FINAL = 50
"""Epochs of the final training, where the time suffices."""
STEPS = 100
"""Batches that a recipe needs at least to show what it can do."""


@dataclass(frozen=True)
class Scheme:
    """What is tried: all `recipes` for a third of the `search` epochs, the better two for all of them.

    The winner trains on every labelled image for as long as the time suffices.
    """

    recipes: tuple[str, ...] = ()
    search: int = 0

    @property
    def rung(self) -> int:
        """Epochs after which the better two go on."""
        return math.ceil(self.search / 3) if len(self.recipes) > 2 else self.search

    @property
    def epochs(self) -> int:
        """Of the search, by all recipes together."""
        return len(self.recipes) * self.rung + min(2, len(self.recipes)) * (self.search - self.rung)


def choose_scheme(affordable: float, train: int, every: int) -> Scheme:
    """The largest scheme within so many training passes of single images, a quarter of them for the search.

    There are `train` training images, and `every` image is trained on in the end.
    """
    for recipes in SHORTLISTS:
        for epochs in EPOCHS:
            scheme = Scheme(recipes, epochs)
            searched = scheme.epochs * train
            enough = epochs * train >= STEPS * BATCH
            if recipes and enough and searched <= QUARTER * affordable and searched + epochs * every <= affordable:
                return scheme
    return Scheme()


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Attributes:
        winner: Name of the recipe that the model is of.
        final: Folder of its run.
        probe: Folder of a probe that was trained on the same images.
        searched: Folder of the runs that the validation images chose among, each under its recipe's name.
        tried: For each recipe ``name``, ``val`` accuracy in [0, 1], ``epochs``, ``seconds``; or ``failed`` and why.
        gain: Validation accuracy of the best recipe over the probe's; None where only the probe was tried.
        best: Name of that recipe.
        seconds: Of ``all``, of what was ``discarded``, and what was ``given``.
        data: The data module.
        precision: Lightning's name of that of all training and evaluation.
        tests: How many test images there are.
    """

    winner: str
    final: Path
    probe: Path
    searched: Path
    tried: list[dict[str, Any]]
    gain: Difference | None
    best: str
    seconds: dict[str, float]
    data: ImageDataModule
    precision: str = "32-true"
    tests: int = 0


def base_config(data: Mapping[str, Any], backbone: str, weights: str, seed: int) -> Config:
    """The config that all recipes share; `data` are arguments of `vpt.data.FolderDataModule`, its batch size none."""
    return {
        "seed_everything": seed,
        "trainer": {"max_epochs": 1},
        "model": {"class_path": "vpt.tasks.LinearProbe", "init_args": {"backbone": backbone, "weights": weights}},
        "data": {"class_path": "vpt.data.FolderDataModule", "init_args": {**data, "batch_size": BATCH}},
    }


def recipe_config(config: Config, name: str, epochs: int, known: bool = True) -> Config:
    """The shared config with a recipe in it; of a backbone whose blocks are not `known` prompts alone."""
    own = dict(RECIPES[name])
    if name == "prompt" and not known:
        own |= {"deltas": [{"name": "prompt", "num_tokens": 10}]}
    model = {"class_path": f"vpt.tasks.{own.pop('task')}", "init_args": {**config["model"]["init_args"], **own}}
    values = {"trainer.max_epochs": 1 if name == PROBE else epochs} | TRAINER.get(name, {})
    return merged({**config, "model": model}, values)


def tune(
    config: Config, minutes: float, out: Path, calibrate: bool = False, say: Callable[[str], None] = print
) -> Tuned:
    """Finds and trains the model in about `minutes`, or goes on with what was begun in `out`.

    Args:
        config: As `base_config` makes it.
        minutes: For everything; the best model so far is taken where they end.
        out: Folder of the experiment: the runs, ``tune.json`` and ``model.safetensors``.
        calibrate: Leave the validation images out of the final training, so that they can calibrate the model.
        say: Is told what happens, in lines.

    Raises:
        ConfigError: The folder holds an experiment of other images, backbone, seed or time.
        DataError: The images cannot be read.
        VPTError: Not even the probe could be trained.
    """
    search = _Search(config, minutes, out, calibrate, say)
    share()  # the probes' features
    return search.run()


def precision() -> str:
    """bfloat16 where the device computes with it, of which a search is twice as fast; else single."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    known: dict[str, Any] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # of later versions than the oldest that is allowed
    return "bf16-mixed" if known.get("amx_bf16") or known.get("avx512_bf16") else "32-true"


def computing(precision: str) -> torch.autocast:
    """Computes within it as the trainer does at a precision, on the CPU, where models are evaluated."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true")


class _Search:
    """The experiment: its plan and what it has spent lie in ``tune.json``, its runs beside it."""

    def __init__(self, config: Config, minutes: float, out: Path, calibrate: bool, say: Callable[[str], None]) -> None:
        self.config, self.out, self.say, self.calibrate = config, out, say, calibrate
        self.data = build_data(config)
        check_multiclass(self.data.targets, "vpt tune is")
        self.train, self.val = (len(self.data.split(split)) for split in ("train", "val"))
        self.tests = self.data.describe()["counts"].get("test", 0)
        told = {"config": config, "minutes": minutes, "calibrate": calibrate}
        self.kept: dict[str, Any] = {**told, "data": self.data.describe()["fingerprint"], "spent": 0.0}
        if (out / TUNE_FILE).is_file():
            found = read_json(out / TUNE_FILE)
            if differ := [key for key in (*told, "data") if found.get(key) != self.kept[key]]:
                raise ConfigError(f"{out} holds another experiment ({', '.join(differ)} differ): name another --out.")
            self.kept = found
        self.before: float = self.kept["spent"]
        self.began = time.monotonic()
        self.limit = 60 * minutes
        self.tried: dict[str, Any] = {}

    @property
    def spent(self) -> float:
        return self.before + time.monotonic() - self.began

    def keep(self, **news: Any) -> None:
        self.kept |= news | {"spent": self.spent}
        write_json(self.out / TUNE_FILE, self.kept)

    def run(self) -> Tuned:
        if "precision" not in self.kept:
            forward, known = self.timed()
            self.keep(precision=precision(), forward=forward, known=known)
        self.config = merged(self.config, {"trainer.precision": self.kept["precision"]})
        probe = self.trial(PROBE, 1)
        if probe is None:
            raise VPTError(f"Not even the probe could be trained: {self.tried[PROBE]['failed']}")
        if "scheme" not in self.kept:
            self.keep(scheme=asdict(self.scheme()))
        scheme = Scheme(tuple(self.kept["scheme"]["recipes"]), self.kept["scheme"]["search"])
        self.say(f"probe: val {100 * val_score(probe):.1f} % after {self.spent:.0f} s")
        if not scheme.recipes:
            self.say("the time suffices for the probe alone")
        best, gain = self.search(scheme)
        winner = best if gain is not None and gain.low > 0 else PROBE
        self.keep(searched={"best": best, "winner": winner})
        try:
            final, probe_folder, lost = self.finish(winner, scheme)
        finally:
            self.keep()
        for file, name in ((DELTA_FILE, MODEL_FILE), (CONFIG_FILE, CONFIG_FILE)):
            shutil.copyfile(final / file, self.out / name)
        kept = self.tried[winner]["seconds"] if final == self.folder(winner) else 0.0
        seconds = {"all": self.spent, "discarded": self.discarded - kept + lost, "given": self.limit}
        rows = [{"name": name, **row} for name, row in self.tried.items()]
        found = Tuned(winner, final, probe_folder, self.out / "search", rows, gain, best, seconds, self.data)
        return replace(found, precision=self.kept["precision"], tests=self.tests)

    def scheme(self) -> Scheme:
        """The largest that the time suffices for, by what a forward pass takes."""
        every = self.train if self.calibrate else self.train + self.val
        forward = self.kept["forward"]
        looks = forward * (self.tests + 3 * self.val + every + 1000)  # tests, validations, and the page
        return choose_scheme((RESERVE * self.limit - self.spent - looks) / (STEP * forward), self.train, every)

    def timed(self) -> tuple[float, bool]:
        """The seconds that an image takes in a forward pass of the backbone, and whether its blocks are known."""
        args = self.config["model"]["init_args"]
        own = {key: args[key] for key in ("pool", "frozen_dtype") if args.get(key) is not None}
        backbone = create_backbone(
            args["backbone"], args["weights"], self.data.image_size, self.data.normalization, **own
        )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        images = self.data.split("train").batch(range(min(BATCH, self.train)))["image"].to(device)
        backbone.to(device)
        seconds = []
        for _ in range(4):  # the first warms up
            start = time.perf_counter()
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision() != "32-true"):
                float(backbone(images).float().sum())  # waits for the device
            seconds.append((time.perf_counter() - start) / len(images))
        return min(seconds), backbone.has_layout

    def recipe(self, name: str, epochs: int) -> Config:
        return recipe_config(self.config, name, epochs, self.kept.get("known", True))

    def folder(self, name: str) -> Path:
        return self.out / "search" / name

    def trial(self, name: str, epochs: int, stop: int | None = None) -> Record | None:
        """Trains a recipe; None where that failed."""
        trial = Trial(f"search/{name}", self.recipe(name, epochs), stop=stop)
        try:
            record = finished(trial, self.out) or run_trial(trial, self.out)
        except VPTError as error:
            self.tried[name] = {"failed": str(error)}
            return None
        finally:
            self.keep()
        self.tried[name] = {"val": val_score(record), "epochs": record["epochs"], "seconds": record["seconds"]}
        return record

    def search(self, scheme: Scheme) -> tuple[str, Difference | None]:
        """The best recipe but the probe, and what it gains over that on the validation images."""
        alive = list(scheme.recipes)
        for stop in dict.fromkeys((scheme.rung, scheme.search) if alive else ()):
            for name in alive:
                if self.discarded + self.expected(name, stop) > QUARTER * self.limit:
                    self.say(f"{name}: left out, since the search has had its quarter of the time")
                    continue
                self.trial(name, scheme.search, None if stop == scheme.search else stop)
                told = self.tried[name]
                result = told.get("failed") or f"val {100 * told['val']:.1f} %"
                self.say(f"{name}: {result} after {stop} of {scheme.search} epochs, {self.spent:.0f} s")
            measured = [name for name in alive if "val" in self.tried.get(name, {})]
            alive = self._ranked(measured)[:2]
        if not alive:
            return PROBE, None
        longest = max(self.tried[name]["epochs"] for name in alive)
        best = next(name for name in self._ranked(alive) if self.tried[name]["epochs"] == longest)
        return best, difference(self.right(best), self.right(PROBE))

    def _ranked(self, names: Sequence[str]) -> list[str]:
        return sorted(names, key=lambda name: -self.tried[name]["val"])

    @property
    def discarded(self) -> float:
        """Seconds of all runs of the search, as their records have them, so that a resumed one decides the same."""
        return float(sum(row.get("seconds", 0.0) for row in self.tried.values()))

    def expected(self, name: str, stop: int) -> float:
        """Seconds that a recipe would take to an epoch from where it is."""
        told = self.tried.get(name, {})
        if "seconds" not in told:
            return STEP * float(self.kept["forward"]) * self.train * stop
        return float(told["seconds"]) / int(told["epochs"]) * (stop - int(told["epochs"]))

    def right(self, name: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which validation images a recipe has right."""
        model = load_classifier(self.folder(name) / DELTA_FILE, self.config["model"]["init_args"]["weights"])
        with computing(self.kept["precision"]):
            logits, _ = batch_answers(model, self.data.split("val"))
        return np.asarray(logits.argmax(axis=1) == np.asarray(self.data.split("val").labels))

    def finish(self, winner: str, scheme: Scheme) -> tuple[Path, Path, float]:
        """Trains winner and probe for good and tests them.

        Gives the folders of their runs, or where the time ends before that those of the search, and the seconds that
        were then lost.
        """
        epochs = self.kept.get("epochs") or self.affordable(winner, scheme)
        left = self.kept.get("left") or max(5, round(self.limit - self.spent))
        self.keep(epochs=epochs, left=left)
        values: dict[str, Any] = {} if self.calibrate else {"data.train_on_val": True, "trainer.limit_val_batches": 0}
        self.say(f"{winner}: training on {'the training' if self.calibrate else 'all'} images, {epochs} epochs")
        probe = Trial("probe", merged(self.recipe(PROBE, 1), values), test=self.tests > 0)
        run_trial(probe, self.out)
        if winner == PROBE:
            return self.out / probe.name, self.out / probe.name, 0.0
        config = merged(self.recipe(winner, epochs), values | {"trainer.max_time": {"seconds": left}})
        record = run_trial(Trial("final", config, test=self.tests > 0), self.out)
        if record["status"] in ENDED:
            return self.out / "final", self.out / probe.name, 0.0
        self.say("the time ended: the model of the search is taken")
        return self.folder(winner), self.folder(PROBE), float(record["seconds"])

    def affordable(self, winner: str, scheme: Scheme) -> int:
        if winner == PROBE:
            return 1
        told = self.tried[winner]
        share = 1.0 if self.calibrate else (self.train + self.val) / self.train
        each = float(told["seconds"]) / int(told["epochs"]) * share
        return max(1, min(FINAL, math.floor((RESERVE * self.limit - self.spent) / each)))
