"""What an evaluation found: one row per test set and strength, made of records alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from vpt.argument_types import checked
from vpt.atomic_write import write_json
from vpt.data import ImageDataModule
from vpt.data.corruptions import BASIC, CORRUPTIONS, GROUPS, PUBLISHED, SEVERITIES, title
from vpt.errors import ConfigError, DataError, RecordError
from vpt.image_size import is_size
from vpt.metrics import accuracy
from vpt.metrics.logits import predictions
from vpt.robustness import logit_records, unknown_images
from vpt.robustness.evaluation_sets import SHIFT, VAL, VAL_CORRUPTED
from vpt.robustness.logit_records import Record
from vpt.robustness.unknown_images import UnknownRecord, UnknownRow
from vpt.run_record import Form, count, identity, lacking, misfit, of, read_json, share
from vpt.screen import Table

RESULT_FILE = "robustness.json"
_FORM: Form = {
    **dict.fromkeys(("data", "data.counts", "backbone", "delta"), of(dict)),
    **dict.fromkeys(("data.name", "data.fingerprint", "data.preset"), of(str)),
    **dict.fromkeys(("backbone.name", "backbone.weights_id", "backbone.fingerprint"), of(str)),
    **dict.fromkeys(("head", "logits", "precision"), of(str)),
    "data.image_size": is_size,
    "data.complete": of(bool, None),
    "delta.specs": of(list),
    "way": lambda value: value in ("end-to-end", "head", "strength", "none"),
}
_OPTIONAL: Form = {
    "data.fingerprints": of(dict),  # version 0.1 has none
    "start": of(dict, None),
    "strengths": lambda value: isinstance(value, list) and all(map(share, value)),
    "adapt": lambda value: isinstance(value, dict) and isinstance(value.get("method"), str),
}
_OF_ROW: Form = {
    **dict.fromkeys(("set", "kind"), of(str)),
    **dict.fromkeys(("alpha", "top1", "low", "high", "mean_per_class"), share),
    "severity": lambda value: value in (None, *SEVERITIES),
    "n": lambda value: count(value) and value > 0,
    "record": of(str, None),
    "nll": lambda value: value is None or (isinstance(value, float | int) and value >= 0),
    "ends": lambda value: value is None or (len(value) == 2 and all(isinstance(each, str) for each in value)),
}
_OF_UNKNOWN: Form = {
    **dict.fromkeys(("set", "record"), of(str)),
    **dict.fromkeys(("known", "unknown"), lambda value: count(value) and value > 0),
    "alpha": share,
}
_OF_SETS = ("max_images", "seed", "corruptions")  # a record has them only where they say something of its set
FIXED_ALPHA = 0.5
"""What WiSE-FT recommends where nothing is known (Wortsman et al., CVPR 2022, section 4.1)."""


@dataclass(frozen=True)
class Row:
    """Scores of one test set at one strength; accuracies lie in [0, 1].

    `kind` is ``"clean"``, ``"val"``, ``"val-corrupted"``, ``"shift"`` or the corruption, which has a severity. A 95 %
    Wilson interval of top-1 goes from `low` to `high`; `mean_per_class` is over the classes present. `record` is the
    record's file name; None if the logits are those of α = 0 and α = 1, interpolated: then these two are the `ends`.
    `nll` is the mean negative log-likelihood in nats; None in evaluations of version 0.1.
    """

    set: str
    kind: str
    severity: int | None
    n: int
    alpha: float
    top1: float
    low: float
    high: float
    mean_per_class: float
    record: str | None
    ends: tuple[str, str] | None = None
    nll: float | None = None


def between(start: Record, end: Record, alpha: float) -> Record:
    """Interpolates the logits of two records: (1 − α)·z0 + α·z1.

    Where only the head differs this is exactly the interpolated head; elsewhere it is output ensembling, a method of
    its own (Wortsman et al., CVPR 2022, section 3). Raises a DataError if the records are not of the same images, not
    complete, or hold half-precision logits.
    """
    for record in (start, end):
        if record.logits.dtype != np.float32 or not record.complete:
            raise DataError("Logits are interpolated from complete records in float32: evaluate again without --half.")
    if not start.same_images(end):
        raise DataError("Two records are of different images: take both from one evaluation.")
    one, other = start.logits.astype(np.float64), end.logits.astype(np.float64)
    logits = ((1 - alpha) * one + alpha * other).astype(np.float32)
    return replace(end, logits=logits, protocol={**end.protocol, "alpha": float(alpha)})


def why_val_cannot_choose(infos: Sequence[Mapping[str, Any]], data: ImageDataModule) -> str | None:
    """Says why the validation split of `data` cannot choose; None if it has images that no model was trained on.

    `infos` is what each model, an anchor or start among them, says about its training (`TunedModel.info`). Where the
    data that all were trained on are these, images that are not among the training images suffice.
    """
    described = data.describe()
    n = described["counts"].get(VAL, 0)
    if n == 0:
        return f"{data.name} has no validation images."
    told = [info["data"] for info in infos if info.get("data")]
    shared = max(each.get("shared_with_train", {}).get(VAL, 0) for each in [described, *told])
    same = all(each.get("fingerprint") == described["fingerprint"] for each in told)
    if shared and (shared == n or not same):
        return f"{shared} of its {n} images were trained on; keep some out of it (train800, vpt tune --calibrate)."
    lists = [each["fingerprints"].get(VAL) for each in told if "fingerprints" in each]  # version 0.1 has none
    if any(each != described["fingerprints"][VAL] for each in lists):
        return "a model was trained beside other validation images; whether it has seen these is not known."
    return None


def check_out(out: Path, protocol: Mapping[str, Any]) -> None:
    """Refuses a folder that holds an evaluation of another protocol, with a ConfigError that says in what."""
    path = out / RESULT_FILE
    if not path.is_file():
        return
    earlier, now = read_json(path).get("protocol"), json.loads(json.dumps(protocol))
    if not isinstance(earlier, dict):
        raise RecordError(f"{path} is no evaluation (it has no protocol): repair it, or move it away.")
    if differs := sorted(key for key in earlier.keys() | now.keys() if earlier.get(key) != now.get(key)):
        raise ConfigError(f"{out} holds another evaluation ({', '.join(differs)} differ): name another --out.")


@checked
def choose_alpha(rows: Sequence[Row]) -> float:
    """Chooses α by the negative log-likelihood of validation images under corruptions; no test row has a say.

    docs/robustness.md compares the rules. Where there are none it is chosen by top-1 on validation images as they are.
    Of several best it is the one nearest to 0.5, then the smaller. Raises a ConfigError if there are no validation
    rows.
    """
    corrupted = [(row.nll, row.alpha) for row in rows if row.kind == VAL_CORRUPTED and row.nll is not None]
    plain = [(-row.top1, row.alpha) for row in rows if row.kind == VAL]
    if not (candidates := corrupted or plain):
        raise ConfigError("α is chosen on a validation set, but none was evaluated: use the fixed α = 0.5.")
    return min(candidates, key=lambda each: (each[0], abs(each[1] - FIXED_ALPHA), each[1]))[1]


def shown_alphas(alphas: Sequence[float]) -> list[float]:
    """Picks what a table on a screen has room for: up to five α as they are; of more only 0, 0.5 and 1."""
    return [alpha for alpha in alphas if len(alphas) <= 5 or alpha in (0.0, FIXED_ALPHA, 1.0)]


def score(record: Record, name: str | None, ends: tuple[str, str] | None = None) -> Row:
    """Scores a complete record, of a file name or between the two at the ends."""
    protocol, n = record.protocol, len(record.label)
    logits = record.scored
    low, high = accuracy.wilson(int(accuracy.correct(logits, record.label).sum()), n)
    return Row(
        **{key: protocol[key] for key in ("set", "kind", "severity", "alpha")},
        n=n,
        top1=accuracy.top1(logits, record.label),
        low=low,
        high=high,
        mean_per_class=accuracy.mean_per_class(logits, record.label),
        record=name,
        ends=ends,
        nll=predictions(*record.matched).nll,
    )


@dataclass(frozen=True)
class RobustnessResult:
    """All rows of an evaluation, by set, then by strength.

    `protocol` is what all rows have in common; `out` holds ``robustness.json`` and ``records/``; `not_chosen` says why
    no α is chosen on validation images, None if one is; `unknown` is what was scored of images of unknown classes.
    """

    rows: Sequence[Row]
    protocol: Mapping[str, Any]
    out: Path
    not_chosen: str | None = None
    unknown: Sequence[UnknownRow] = ()

    @classmethod
    @checked
    def read(cls, out: Path) -> RobustnessResult:
        """Reads what `write` wrote; a DataError if there is nothing, it is damaged, or another version wrote it."""
        path = out / RESULT_FILE
        if not path.is_file():
            raise DataError(f"{out} holds no evaluation: `vpt robustness run --out {out}` makes one.")
        content = read_json(path)
        try:
            rows = [Row(**row | {"ends": row.get("ends") and tuple(row["ends"])}) for row in content["rows"]]
            unknown = [UnknownRow(**row) for row in content.get("unknown", [])]
            protocol, why_not = content["protocol"], content["alpha"]["why_not"]
            faults = [misfit(asdict(row), _OF_ROW) for row in rows]
            faults += [misfit(asdict(row), _OF_UNKNOWN) for row in unknown]
            lacks = lacking(protocol, _FORM) or [] if rows else ["rows"]
            fault = next((each for each in (*faults, misfit(protocol, {**_FORM, **_OPTIONAL})) if each), None)
        except (AttributeError, KeyError, TypeError) as error:
            fault, lacks = f"{type(error).__name__}: {error}", []
        if fault or lacks:
            reason = fault or f"it has no {', '.join(lacks)}"
            raise DataError(f"{path} is no evaluation of this version ({reason}): repair it, or move it away.")
        return cls(rows, protocol, out, why_not, unknown)

    def record(self, row: Row) -> Record:
        """Reads the logits that a row was computed from, so that only a record or two are in memory.

        Where a row has no file they are the logits of α = 0 and α = 1, interpolated. Raises a DataError if a record is
        missing, damaged, unfinished, or of another evaluation.
        """
        if row.record is not None:
            return self._read_record(row, row.alpha, row.record)
        return between(*self.ends(row), row.alpha)

    def ends(self, row: Row) -> tuple[Record, Record]:
        """Reads the records at α = 0 and α = 1 of a row's set; errors as of `record`."""
        kept = {each.alpha: each.record for each in self.rows if each.set == row.set and each.record}
        names = row.ends or (kept.get(0.0), kept.get(1.0))
        start, end = (self._read_record(row, alpha, name) for alpha, name in zip((0.0, 1.0), names, strict=True))
        return start, end

    def unknown_record(self, row: UnknownRow) -> UnknownRecord:
        """Reads the scores of unknown images and of the known ones beside them; a DataError as of `record`."""
        path = self.out / "records" / Path(row.record).name
        again = f"`vpt robustness run` with the same options, --unknown and --out {self.out} writes it anew."
        if not path.is_file():
            raise DataError(f"{self.out} lacks records/{path.name}: {again}")
        record = unknown_images.read(path)
        told = record.protocol
        same = all(told.get(key) == value for key, value in self.protocol.items() if key not in _OF_SETS)
        same &= path.stem.endswith(identity(told)[:12]) and (told.get("set"), told.get("alpha")) == (row.set, row.alpha)
        if not same or (len(record.known["energy"]), len(record.unknown["energy"])) != (row.known, row.unknown):
            raise DataError(f"{path} belongs to another evaluation than robustness.json beside it: {again}")
        return record

    def _read_record(self, row: Row, alpha: float, name: str | None) -> Record:
        again = f"`vpt robustness run` with the same options and --out {self.out} completes it."
        if name is None:
            raise DataError(f"{self.out} has no record of {row.set} at α = {alpha:g}: {again}")
        path = self.out / "records" / Path(name).name
        if not path.is_file():
            raise DataError(f"{self.out} lacks records/{path.name}: {again}")
        record = logit_records.read(path)
        if not record.complete or len(record.label) != row.n:
            raise DataError(f"{path} is unfinished, {len(record.label)} of {row.n} images: {again}")
        protocol = record.protocol
        same = all(protocol.get(key) == value for key, value in self.protocol.items() if key not in _OF_SETS)
        same &= row.severity is None or protocol.get("corruptions") == self.protocol.get("corruptions")
        named = re.search(r"-([0-9a-f]{12})$", path.stem)  # by the protocol's hash; by α alone in version 0.1.0
        same &= named is None or named[1] == identity(protocol)[:12]
        if not same or (protocol.get("set"), protocol.get("alpha")) != (row.set, alpha):
            raise DataError(f"{path} belongs to another evaluation than robustness.json beside it: run it again.")
        return record

    @property
    def corruptions(self) -> str | None:
        """Whose parameters the corruptions have; None if nothing is corrupted."""
        return self.protocol.get("corruptions", "vpt 0.1") if any(row.severity for row in self.rows) else None

    @property
    def chosen_alpha(self) -> float | None:
        """The α chosen on validation images, or None."""
        return choose_alpha(self.rows) if self.not_chosen is None else None

    def write(self) -> None:
        """Writes ``robustness.json``."""
        alpha = {"fixed": FIXED_ALPHA, "chosen_on_val": self.chosen_alpha, "why_not": self.not_chosen}
        content = {"protocol": self.protocol, "alpha": alpha, "rows": [asdict(row) for row in self.rows]}
        content |= {"unknown": [asdict(row) for row in self.unknown]} if self.unknown else {}
        write_json(self.out / RESULT_FILE, content)

    def table(self) -> Table:
        """Top-1 in percent: val, clean, each shift, the mean over severities of each corruption, and over all of them.

        For `vpt.screen.show`. Beside fixed α stand the one chosen on validation images, and as "oracle" the best α of
        each line, which is selected on test labels and no result.
        """
        alphas = sorted({row.alpha for row in self.rows})
        shown = shown_alphas(alphas)
        chosen = self.chosen_alpha
        counts = {row.n for row in self.rows if row.kind not in (VAL, VAL_CORRUPTED, SHIFT)}
        what = f"Top-1 (%) on {self.protocol['data']['name']}, n = {', '.join(map(str, sorted(counts)))}"
        table = Table(title=what, caption=self._caption(), title_justify="left", caption_justify="left")
        table.add_column("test set")
        picked = [] if chosen is None else [chosen]
        headings = ["n", *(f"α = {alpha:g}" for alpha in shown), *(f"val: α = {alpha:g}" for alpha in picked)]
        for heading in headings + (["oracle"] if len(alphas) > 1 else []):
            table.add_column(heading, justify="right")
        for label, rows, ends in self.groups():
            means = {alpha: fmean(row.top1 for row in rows if row.alpha == alpha) for alpha in alphas}
            cells = [f"{100 * means[alpha]:.1f}" for alpha in [*shown, *picked]]
            if len(alphas) > 1:
                best = max(alphas, key=lambda alpha: means[alpha])
                cells.append(f"{100 * means[best]:.1f} ({best:g})")
            table.add_row(label, str(rows[0].n), *cells, end_section=ends)
        return table

    def groups(self) -> list[tuple[str, list[Row], bool]]:
        """The table's lines: label, rows to average at each strength, whether a rule follows."""
        corrupted = [row for row in self.rows if row.severity is not None]
        names = list(dict.fromkeys(row.set for row in self.rows if row.severity is None))
        kinds = list(dict.fromkeys(row.kind for row in corrupted))
        numbers = sorted({row.severity for row in corrupted if row.severity is not None})
        older = "" if self.corruptions == PUBLISHED else f", parameters of {self.corruptions}"
        strength = _severities(numbers) + older
        over = "mean of " if len(numbers) > 1 else ""
        groups = [(name, [row for row in self.rows if row.set == name], name == names[-1]) for name in names]
        parts = [(f"{title(kind)} ({over}{strength})", [kind], kind == kinds[-1]) for kind in kinds]
        means = _means(kinds)
        parts += [(f"mean of {_named(each)} ({strength})", each, each is means[-1]) for each in means]
        return groups + [(label, [row for row in corrupted if row.kind in own], ends) for label, own, ends in parts]

    def _caption(self) -> str:
        way, head = self.protocol["way"], self.protocol["head"]
        if (adapted := self.protocol.get("adapt")) is not None:
            return (
                f"Adapted to these test images while it answered ({adapted['method']}): no result of the model alone."
            )
        if way == "none":
            return "No interpolation: the trained model only."
        text = {
            "end-to-end": "All weights interpolated, head included; α = 1: tuned model.",
            "head": "α = 0: the anchor's head; α = 1: the tuned head; one backbone.",
            "strength": "α = 0: frozen backbone with the linear probe's head; α = 1: tuned model."
            if head == "interpolated"
            else "α = 0: frozen backbone; α = 1: tuned model; the tuned head at every α.",
        }[way]
        if strengths := self.protocol.get("strengths"):
            text += f" Strengths of the layers at α = 1: {' '.join(f'{each:.2g}' for each in strengths)}."
        return text + (f" No α chosen on val: {self.not_chosen}" if self.not_chosen else "")


def _severities(numbers: Sequence[int]) -> str:
    if len(numbers) < 2:
        return "".join(f"severity {number}" for number in numbers)
    whole = list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    return f"severities {f'{numbers[0]}-{numbers[-1]}' if whole else ', '.join(map(str, numbers))}"


def _means(kinds: list[str]) -> list[list[str]]:
    """The kinds that are averaged: all, and before them those of ImageNet-C where there are more."""
    published = [kind for kind in kinds if kind not in GROUPS["extra"]]
    first = [published] if len(published) == 15 < len(kinds) else []
    return [*first, kinds] if len(kinds) > 1 else []


def _named(kinds: Sequence[str]) -> str:
    known = {5: ("the basic 5", BASIC), 15: ("ImageNet-C's 15", CORRUPTIONS[:15]), 19: ("all 19", CORRUPTIONS)}
    name, members = known.get(len(kinds), ("", ()))
    if set(kinds) != set(members):
        return ", ".join(title(kind) for kind in CORRUPTIONS if kind in kinds)
    return name + (f" with {title('frost')}" if "frost" in kinds else "")
