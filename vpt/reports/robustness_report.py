"""`vpt robustness report`: all scores and figures of evaluated models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vpt.reports.page import Report
from vpt.reports.robustness_figures import CAPTIONS, figures
from vpt.reports.tables import Table, p_value, percent
from vpt.robustness.evaluation.evaluation_result import shown_alphas
from vpt.robustness.interpolation.alpha_curve import METHODS

Values = dict[str, Any]


def robustness_report(values: Values) -> Report:
    """Lays out what `vpt.reports.robustness_values.report` gave, or was read back from its JSON."""
    title = f"Robustness on {values['data']['name']}"
    return Report(values, title, notes(values), tables(values), figures(values), CAPTIONS)


def tables(report: Values) -> list[Table]:
    """All tables that a report has values for: headline first, protocol last."""
    makers: Sequence[Callable[[Values], Table]] = (
        _headline,
        _scores,
        _averages,
        _differences,
        _effective,
        _models,
    )
    return [table for table in (make(report) for make in makers) if table.rows]


def notes(report: Values) -> list[str]:
    """Says what a reader of all tables must know, in sentences."""
    return [
        "α = 0 is the model before tuning, α = 1 the tuned one. The fixed α = 0.5 and the α chosen on validation "
        "images are results; the oracle looked at the test answers and is none. Brackets hold 95 % intervals.",
        *[f"No α chosen for {m['model']}: {m['why_none_chosen']}" for m in report["models"] if m["why_none_chosen"]],
        *[
            f"No exact α curve for {model['model']}: {model['why_no_exact_curve']}"
            for model in report["models"]
            if model["way"] == "head" and not model["exact_curve"]
        ],
        *[f"Not compared: {sentence}" for sentence in report["not_compared"]],
    ]


def _interval(value: float, low: float | None, high: float | None) -> str:
    return percent(value) + ("" if low is None else f" [{percent(low)}, {percent(high)}]")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _headline(report: Values) -> Table:
    rows = []
    for name in dict.fromkeys(line["set"] for line in report["headline"]):
        for line in (line for line in report["headline"] if line["set"] == name):
            cells = [_chosen(line[key], key) for key in ("zero", "fixed", "chosen_on_val", "tuned", "oracle")]
            protocol = "; ".join([f"preset {line['preset']}", *line["marks"]])
            rows.append([name, line["model"], protocol, str(line["n"]), *cells])
    columns = ["set", "model", "protocol", "n", "α = 0", "fixed α = 0.5", "α chosen on val", "α = 1", "oracle"]
    note = "Top-1 in percent with its Wilson interval; α in parentheses where it was picked. Means have no interval."
    return Table("Accuracy", note, columns, rows, words=3)


def _chosen(cell: Values | None, key: str) -> str:
    if cell is None:
        return "–"
    text = _interval(cell["top1"], cell["low"], cell["high"])
    return text + (f" (α = {cell['alpha']:g})" if key in ("chosen_on_val", "oracle") else "")


def _shown(report: Values) -> dict[str, set[float]]:
    """The α of each model that tables have room for; the JSON has all."""
    return {
        model["model"]: {*shown_alphas(model["alphas"]), model["chosen_alpha"]} - {None} for model in report["models"]
    }


def _scores(report: Values) -> Table:
    shares = {"mean_per_class": "mean per class"}
    numbers = {
        "nll": "NLL",
        "brier": "Brier",
        "ece": "ECE",
        "ece_equal_mass": "ECE, equal mass",
        "temperature": "T",
        "nll_scaled": "NLL after T",
        "ece_scaled": "ECE after T",
        "ece_equal_mass_scaled": "ECE, equal mass, after T",
        "aurc": "AURC",
        "risk_at_80": "risk at 80 %",
    }
    shown = _shown(report)
    rows = [
        [row["set"], row["model"], f"{row['alpha']:g}", str(row["n"])]
        + [_interval(row["top1"], row["top1_low"], row["top1_high"])]
        + [percent(row[key]) for key in shares]
        + [_number(row[key]) for key in numbers]
        for row in sorted(report["rows"], key=lambda row: _order(report, row["set"]))
        if row["severity"] is None and row["alpha"] in shown[row["model"]]
    ]
    columns = ["set", "model", "α", "n", "top-1 (%)", *shares.values(), *numbers.values()]
    note = (
        "NLL in nats; ECE of 15 bins; T is the temperature fitted on validation images at the same α, a dash where "
        "there are none or no finite one fits; AURC and risk: errors among the surest images, lower is better."
    )
    return Table("Scores", note, columns, rows)


def _order(report: Values, name: str) -> int:
    return list(dict.fromkeys(row["set"] for row in report["rows"])).index(name)


def _averages(report: Values) -> Table:
    shown = _shown(report)
    keys = {"nll": "NLL", "brier": "Brier", "ece": "ECE", "ece_equal_mass": "ECE, equal mass"}
    keys |= {"aurc": "AURC", "risk_at_80": "risk at 80 %"}
    rows = [
        [row["set"], row["model"], f"{row['alpha']:g}", str(row["sets"]), str(row["n"])]
        + [percent(row["top1"]), percent(row["mean_per_class"])]
        + [_number(row[key]) for key in keys]
        for name in dict.fromkeys(row["set"] for row in report["averages"])
        for row in report["averages"]
        if row["set"] == name and row["alpha"] in shown[row["model"]]
    ]
    columns = ["corruption", "model", "α", "sets", "n each", "top-1 (%)", "mean per class", *keys.values()]
    note = "Parameters of ImageNet-C unless a name says otherwise; not its mCE, which divides by the errors of AlexNet."
    return Table("Corruptions", note, columns, rows)


def _differences(report: Values) -> Table:
    rows = [
        [
            *(row["set"], row["first"], row["second"], f"{row['alpha']:g}", str(row["n"])),
            f"{_signed(row['value'])} [{_signed(row['low'])}, {_signed(row['high'])}]",
            p_value(row["p_value"]),
        ]
        for name in dict.fromkeys(row["set"] for row in report["differences"])
        for row in sorted(report["differences"], key=lambda row: -row["alpha"])
        if row["set"] == name
    ]
    columns = ["set", "first", "second", "α", "n", "first − second (points)", "p"]
    note = "Top-1 on the same images, paired bootstrap of 10,000 resamples; p of McNemar's exact test, not corrected "
    return Table("Differences between models", note + "for the number of comparisons.", columns, rows, words=3)


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def _effective(report: Values) -> Table:
    shown = _shown(report)
    rows = [
        [
            *(row["set"], row["model"], f"{row['alpha']:g}", row["reference"]),
            *(percent(row["reference_accuracy"]), percent(row["accuracy"])),
            f"{row['points']:+.1f}" + (" (extrapolated)" if row["extrapolated"] else ""),
        ]
        for row in report["effective"]
        if row["alpha"] in shown[row["model"]]
    ]
    columns = ["set", "model", "α", "compared with", "its top-1 (%)", "top-1 (%)", "effective robustness (points)"]
    note = "Accuracy above what models trained on ImageNet alone reach (Taori et al., NeurIPS 2020)."
    return Table("Effective robustness", note, columns, rows)


def _models(report: Values) -> Table:
    rows = [
        [
            model["model"],
            model["backbone"],
            model["weights"],
            model["backbone_fingerprint"][:12],
            (model["delta_sha256"] or "–")[:12],
            ", ".join(_spec(spec) for spec in model["specs"]) or "none",
            METHODS.get(model["way"], "nothing"),
            model["head"],
            model["preset"],
            f"{model['image_size']} px",
            model["logits"],
            {True: "official", False: "partial", None: "not known"}[model["complete"]],
        ]
        for model in report["models"]
    ]
    columns = ["model", "backbone", "weights", "backbone fingerprint", "delta sha256", "delta", "α moves", "head"]
    columns += ["preset", "image size", "logits", "image counts"]
    note = f"Data fingerprint {report['data']['fingerprint'][:12]}. Hashes are cut to 12 digits; report.json has them "
    return Table("Models", note + "whole.", columns, rows, words=len(columns))


def _spec(spec: Values) -> str:
    flags = [f"{key}={value}" for key, value in spec.items() if key != "name"]
    return str(spec["name"]) + (f"({', '.join(flags)})" if flags else "")
