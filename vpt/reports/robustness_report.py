"""`vpt robustness report`: all scores and figures of evaluated models."""

from __future__ import annotations

from collections.abc import Sequence

from vpt.reports.page import Columns, Report, Table, Values, p_value, percent, table_of
from vpt.reports.robustness_figures import CAPTIONS, figures
from vpt.reports.robustness_unknown import unknown_table
from vpt.robustness.alpha_curve import METHODS
from vpt.robustness.evaluation_result import shown_alphas

_CALIBRATION: Columns = {"NLL": "nll", "Brier": "brier", "ECE": "ece", "ECE, equal mass": "ece_equal_mass"}
_SELECTION: Columns = {"AURC": "aurc", "risk at 80 % coverage": "risk_at_80"}


def robustness_report(values: Values) -> Report:
    """Lays out what `vpt.reports.robustness_values.report` gave, or was read back from its JSON."""
    title = f"Robustness on {values['data']['name']}"
    return Report(values, title, notes(values), tables(values), figures(values), CAPTIONS)


def tables(report: Values) -> list[Table]:
    """All tables that a report has values for: headline first, protocol last."""
    makers = (_headline, _shifts, _scores, _averages, _differences, _effective, _agreement, _unknown, _models)
    return [table for table in (make(report) for make in makers) if table.rows]


def notes(report: Values) -> list[str]:
    """Says what a reader of all tables must know, in sentences."""
    return [
        "α = 0 is the model before tuning, α = 1 the tuned one. The fixed α = 0.5 and the α chosen on validation "
        "images are results; the oracle α is selected on test labels and is not. α is chosen by the likelihood of "
        "validation images under corruptions, or where there are none by their accuracy. Brackets hold 95 % intervals.",
        *(f"No α chosen for {m['model']}: {m['why_none_chosen']}" for m in report["models"] if m["why_none_chosen"]),
        *(
            f"No exact α curve for {model['model']}: {model['why_no_exact_curve']}"
            for model in report["models"]
            if model["way"] == "head" and not model["exact_curve"]
        ),
        *(f"Not compared: {sentence}" for sentence in report["not_compared"]),
        *(f"No agreement on the line: {sentence}" for sentence in report.get("no_agreement", [])),
    ]


def _interval(value: float, low: float | None, high: float | None) -> str:
    return percent(value) + ("" if low is None else f" [{percent(low)}, {percent(high)}]")


def _alpha(row: Values) -> str:
    return f"{row['alpha']:g}"


def _by_set(rows: Sequence[Values]) -> list[Values]:
    """Rows of one set beside each other, sets in the order in which they come up."""
    names = list(dict.fromkeys(row["set"] for row in rows))
    return sorted(rows, key=lambda row: names.index(row["set"]))


def _shown(report: Values, rows: Sequence[Values]) -> list[Values]:
    """The rows of the α that tables have room for; the JSON has all."""
    shown = {each["model"]: {*shown_alphas(each["alphas"]), each["chosen_alpha"]} for each in report["models"]}
    return [row for row in rows if row["alpha"] in shown[row["model"]]]


def _headline(report: Values) -> Table:
    columns: Columns = {
        "set": "set",
        "model": "model",
        "protocol": lambda line: "; ".join([f"preset {line['preset']}", *line["marks"]]),
        "n": "n",
        "α = 0": lambda line: _chosen(line["zero"]),
        "fixed α = 0.5": lambda line: _chosen(line["fixed"]),
        "α chosen on val": lambda line: _chosen(line["chosen_on_val"], picked=True),
        "α = 1": lambda line: _chosen(line["tuned"]),
        "oracle": lambda line: _chosen(line["oracle"], picked=True),
    }
    note = "Top-1 in percent with its Wilson interval; α in parentheses where it was chosen. Means have no interval."
    return table_of("Accuracy", note, columns, _by_set(report["headline"]), words=3)


def _shifts(report: Values) -> Table:
    columns: Columns = {
        "model": "model",
        "strength": "way",
        "clean": lambda row: percent(row["clean"]),
        "shifted sets": "sets",
        "their mean": lambda row: percent(row["shifts"]),
        "worst": lambda row: f"{percent(row['worst'])} ({row['worst_set']})",
        "harmonic mean of clean and shifted": lambda row: percent(row["harmonic"]),
    }
    note = (
        "Top-1 in percent; corruptions stand for shifts where the task has none. By image: both ends weighted by how "
        "sure each is (DaWin), as mixed answers, or as the measured model of the nearest α."
    )
    shown = {each["model"]: {*shown_alphas(each["alphas"]), each["chosen_alpha"]} for each in report["models"]}
    rows = [row for row in report["shifts"] if row["alpha"] is None or row["alpha"] in shown[row["model"]]]
    return table_of("Shifts together", note, columns, rows, words=2)


def _chosen(cell: Values | None, picked: bool = False) -> str:
    if cell is None:
        return "–"
    return _interval(cell["top1"], cell["low"], cell["high"]) + (f" (α = {_alpha(cell)})" if picked else "")


def _scores(report: Values) -> Table:
    columns: Columns = {
        "set": "set",
        "model": "model",
        "α": _alpha,
        "n": "n",
        "top-1 (%)": lambda row: _interval(row["top1"], row["top1_low"], row["top1_high"]),
        "mean per class": lambda row: percent(row["mean_per_class"]),
        "worst class": lambda row: percent(row["worst_class"]),
        **_CALIBRATION,
        "T": "temperature",
        "NLL after T": "nll_scaled",
        "ECE after T": "ece_scaled",
        "ECE, equal mass, after T": "ece_equal_mass_scaled",
        **_SELECTION,
    }
    note = (
        "NLL in nats; ECE of 15 bins; T is the temperature fitted on validation images at the same α, a dash where "
        "there are none or no finite one fits; AURC and selective risk (error at that coverage): lower is better."
    )
    plain = [row for row in report["rows"] if row["severity"] is None]
    return table_of("Scores", note, columns, _by_set(_shown(report, plain)))


def _averages(report: Values) -> Table:
    columns: Columns = {
        "corruption": "set",
        "model": "model",
        "α": _alpha,
        "sets": "sets",
        "n each": "n",
        "top-1 (%)": lambda row: percent(row["top1"]),
        "mean per class": lambda row: percent(row["mean_per_class"]),
        **_CALIBRATION,
        **_SELECTION,
    }
    note = "Parameters of ImageNet-C unless a name says otherwise; not its mCE, which divides by the errors of AlexNet."
    return table_of("Corruptions", note, columns, _by_set(_shown(report, report["averages"])))


def _differences(report: Values) -> Table:
    columns: Columns = {
        "set": "set",
        "first": "first",
        "second": "second",
        "α": _alpha,
        "n": "n",
        "first − second (points)": lambda row: "{:+.1f} [{:+.1f}, {:+.1f}]".format(
            *(100 * row[key] for key in ("value", "low", "high"))
        ),
        "p": lambda row: p_value(row["p_value"]),
    }
    note = "Top-1 on the same images, paired bootstrap of 10,000 resamples; p of McNemar's exact test, not corrected "
    rows = _by_set(sorted(report["differences"], key=lambda row: -row["alpha"]))
    return table_of("Differences between models", note + "for the number of comparisons.", columns, rows, words=3)


def _effective(report: Values) -> Table:
    columns: Columns = {
        "set": "set",
        "model": "model",
        "α": _alpha,
        "population": "population",
        "compared with": "reference",
        "its top-1 (%)": lambda row: percent(row["reference_accuracy"]),
        "top-1 (%)": lambda row: percent(row["accuracy"]),
        "effective robustness (points)": lambda row: (
            f"{row['points']:+.1f}" + (" (extrapolated)" if row["extrapolated"] else "")
        ),
    }
    note = (
        "Accuracy above what models trained on ImageNet alone reach (testbed; Taori et al., NeurIPS 2020), and above "
        "what timm's checkpoints of any pretraining reach."
    )
    return table_of("Effective robustness", note, columns, _shown(report, report["effective"]))


def _agreement(report: Values) -> Table:
    columns: Columns = {
        "set": "set",
        "model": "model",
        "α": _alpha,
        "top-1 on clean (%)": lambda row: percent(row["clean"]),
        "estimated: ALine-S (%)": lambda row: percent(row["aline_s"]),
        "ALine-D (%)": lambda row: "–" if row["aline_d"] is None else percent(row["aline_d"]),
        "measured (%)": lambda row: percent(row["shifted"]),
        "slope": "slope",
        "R²": "r2",
        "pairs": lambda row: f"{row['pairs']} of {row['pairs'] + row['left_out']}",
    }
    note = (
        "Top-1 under shift, estimated without labels of shifted images from how often pairs of models agree (Baek et "
        "al., NeurIPS 2022), on probit axes. R² is of the line through their agreements: its authors trust estimates "
        "from 0.95 on. Pairs that agree on more than 98 % or less than 5 % of the images are left out."
    )
    return table_of("Agreement on the line", note, columns, _by_set(report.get("agreement", [])), words=2)


def _unknown(report: Values) -> Table:
    return unknown_table(_by_set(_shown(report, report.get("unknown", []))))


def _models(report: Values) -> Table:
    columns: Columns = {
        "model": "model",
        "backbone": "backbone",
        "weights": "weights",
        "backbone fingerprint": lambda model: model["backbone_fingerprint"][:12],
        "delta sha256": lambda model: (model["delta_sha256"] or "–")[:12],
        "delta": lambda model: ", ".join(map(_spec, model["specs"])) or "none",
        "α moves": lambda model: METHODS.get(model["way"], "nothing"),
        "adapted at test time": lambda model: model["adapt"] or "no",
        "strengths of layers at α = 1": lambda model: " ".join(f"{each:.2g}" for each in model["strengths"] or [1]),
        "head": "head",
        "preset": "preset",
        "image size": lambda model: f"{model['image_size']} px",
        "logits": "logits",
        "image counts": lambda model: {True: "official", False: "partial", None: "not known"}[model["complete"]],
    }
    note = f"Data fingerprint {report['data']['fingerprint'][:12]}. Hashes are cut to 12 digits; report.json has them "
    return table_of("Models", note + "whole.", columns, report["models"], words=len(columns))


def _spec(spec: Values) -> str:
    flags = [f"{key}={value}" for key, value in spec.items() if key != "name"]
    return str(spec["name"]) + (f"({', '.join(flags)})" if flags else "")
