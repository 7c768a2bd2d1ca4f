from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from vpt.cli import main
from vpt.data.corruptions import BASIC, CORRUPTIONS
from vpt.errors import DataError
from vpt.models.delta_format import read_delta, write_delta

from .conftest import CONFIGS, Run, Vpt

FEW = ["--max-images=10", "--severities", "3", "--alphas", "0", "1"]


def test_robustness_measures_a_delta_on_the_data_of_its_run(vpt: Vpt, trained: Run) -> None:
    answer = vpt("robustness", "run", "--delta", str(trained.folder / "delta.safetensors"), *FEW, "--out=result")
    assert answer.status == 0, answer.err
    assert "gaussian_noise" in answer.out
    kinds = {row["kind"] for row in json.loads(Path("result/robustness.json").read_text())["rows"]}
    assert kinds == {"clean", "gaussian_noise", "gaussian_blur", "contrast", "jpeg_compression", "pixelate"}


def test_robustness_takes_the_data_of_a_config_and_overrides(vpt: Vpt, trained: Run) -> None:
    data = [
        "--data",
        str(CONFIGS / "demo.yaml"),
        "--data.batch_size",
        "4",
        "--data.test=val200",
        "--corruptions",
        "fog",
    ]
    delta = str(trained.folder / "delta.safetensors")
    answer = vpt("robustness", "run", "--delta", delta, *data, *FEW, "--out=result")
    assert answer.status == 0, answer.err
    rows = json.loads(Path("result/robustness.json").read_text())["rows"]
    assert {row["set"] for row in rows} == {"clean", "fog-3"}


@pytest.mark.parametrize(
    ("words", "kinds"),
    [(["all", "basic"], [*CORRUPTIONS]), (["basic", "fog"], [*BASIC, "fog"]), (["basic", "contrast"], [*BASIC])],
)
def test_words_for_several_corruptions_stand_beside_names(
    vpt: Vpt, trained: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], kinds: list[str]
) -> None:
    def run(**options: Any) -> None:
        raise DataError(" ".join(options["corruptions"]))

    monkeypatch.setattr("vpt.robustness.run", run)
    delta = str(trained.folder / "delta.safetensors")
    sentence = vpt("robustness", "run", "--delta", delta, "--out", "out", "--corruptions", *words).sentence
    assert sentence == " ".join(kinds)


@pytest.fixture(scope="module")
def evaluated(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What an evaluation of the run left. Tests may read it."""
    out = str(tmp_path_factory.mktemp("evaluated") / "result")
    delta = str(trained.folder / "delta.safetensors")
    assert main(["robustness", "run", "--delta", delta, *FEW, "--out", out]) == 0
    return out


def test_robustness_compares_gate_and_ensemble(vpt: Vpt, evaluated: str) -> None:
    answer = vpt("robustness", "compare", evaluated)
    assert answer.status == 0, answer.err
    assert "gate" in answer.out
    assert "ensemble" in answer.out


def test_robustness_reports_on_the_records_of_a_run(vpt: Vpt, evaluated: str) -> None:
    answer = vpt("robustness", "report", evaluated, "--out=page")
    assert answer.out.splitlines() == [f"written to page/report.{kind}" for kind in ("json", "md", "html")]
    assert json.loads(Path("page/report.json").read_text())["models"][0]["backbone"] == "vit_nano_patch8_64"
    assert "nowhere holds no evaluation" in vpt("robustness", "report", "nowhere").sentence


def test_robustness_makes_soups_and_chooses_only_on_unseen_images(vpt: Vpt, trained: Run) -> None:
    delta = str(trained.folder / "delta.safetensors")
    answer = vpt("robustness", "soup", "--deltas", delta, delta, "--out=soup.safetensors")
    assert answer.status == 0, answer.err
    assert read_delta("soup.safetensors")[0]["info"]["soup"]["rule"] == "uniform"
    chosen = ["--out=chosen.safetensors", "--greedy", "--data", str(CONFIGS / "demo.yaml"), "--data.train=train800"]
    assert "images were trained on" in vpt("robustness", "soup", "--deltas", delta, delta, *chosen).sentence
    header, tensors = read_delta(delta)
    header["info"]["data"]["shared_with_train"]["val"] = 0
    write_delta("unseen.safetensors", header, tensors)
    answer = vpt("robustness", "soup", "--deltas", "unseen.safetensors", "unseen.safetensors", *chosen)
    assert answer.status == 0, answer.err
    assert answer.out.count("added") == 2


def test_a_soup_by_layer_says_how_often_it_asked(vpt: Vpt, trained: Run) -> None:
    header, tensors = read_delta(trained.folder / "delta.safetensors")
    header["info"]["data"]["shared_with_train"]["val"] = 0
    write_delta("one.safetensors", header, tensors)
    write_delta("two.safetensors", header, {key: tensor * 1.1 for key, tensor in tensors.items()})
    data = ["--data", str(CONFIGS / "demo.yaml"), "--data.train=train800"]
    answer = vpt(
        "robustness",
        "soup",
        "--deltas",
        "one.safetensors",
        "two.safetensors",
        "--out=s.safetensors",
        *data,
        "--greedy",
        "--by-layer",
    )
    assert answer.status == 0, answer.err
    soup = read_delta("s.safetensors")[0]["info"]["soup"]
    assert soup["rule"] == "greedy by layer"
    assert len(soup["layers"]) >= 2  # head and deltas
    assert f"{soup['evaluations']} evaluations of up to {soup['images']} validation images" in answer.out
    assert soup["evaluations"] == 2 + len(soup["layers"])
    other = header | {"info": header["info"] | {"starts": {"init_delta": "a" * 64}}}
    write_delta("three.safetensors", other, tensors)
    answer = vpt("robustness", "soup", "--deltas", "one.safetensors", "three.safetensors", "--out=no.safetensors")
    assert "start from other values of the delta" in answer.sentence


def test_a_report_knows_unknown_images(vpt: Vpt, trained: Run, tmp_path: Path) -> None:
    (tmp_path / "noise").mkdir()
    for place in range(5):
        pixels = np.random.default_rng(place).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "noise" / f"{place}.png")
    few = ["--max-images=10", "--severities", "--alphas", "1", "--out=result"]
    answer = vpt("robustness", "run", "--delta", str(trained.folder / "delta.safetensors"), *few, "--unknown", "noise")
    assert answer.status == 0, answer.err
    assert vpt("robustness", "report", "result").status == 0
    rows = json.loads(Path("result/report.json").read_text())["unknown"]
    assert [row["score"] for row in rows] == ["max softmax", "energy", "Mahalanobis", "nearest neighbour"]
    assert {(row["set"], row["known"], row["unknown"]) for row in rows} == {("noise", 10, 5)}


def test_no_command_writes_over_a_run_or_over_what_it_reads(vpt: Vpt, trained: Run, tmp_path: Path) -> None:
    """A file with `--out` is new; a figure may be drawn again, but not over its picture."""
    folder, page = shutil.copytree(trained.folder, tmp_path / "run"), tmp_path / "page.png"
    delta = str(folder / "delta.safetensors")
    Image.new("RGB", (64, 64)).save(page)
    before = {path: path.read_bytes() for path in (folder / "delta.safetensors", page)}
    head = ["--backbone=vit_nano_patch8_64", "--data", str(CONFIGS / "demo.yaml")]
    for command in (
        ["robustness", "soup", "--deltas", delta, delta, "--out", delta],
        ["robustness", "soup", "--greedy", "--deltas", delta, delta, "--out", delta],
        ["robustness", "head", *head, "--out", delta],
        ["export", "--format=onnx", "--delta", delta, "--out", delta],
        ["attention", "--delta", delta, "--images", "page.png", "--out", "./page.png"],
        ["attention", "--delta", delta, "--images", ".", "--out", str(page)],
        ["data", "corruptions", "--image", "page.png", "--out", "page.png"],
    ):
        assert "exists already: name another file, or remove it" in vpt(*command).sentence
    assert {path: path.read_bytes() for path in before} == before


def test_robustness_writes_the_head_of_the_weights_as_an_anchor(vpt: Vpt, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=30).state_dict(), "weights.safetensors")
    Path("classes.json").write_text(json.dumps([3, 1, 4, 0, 5, 9, 2, 6, 8, 7]))
    given = ["--backbone=test_vit", "--weights=weights.safetensors", "--data", str(CONFIGS / "demo.yaml")]
    answer = vpt("robustness", "head", *given, "--classes=classes.json", "--out=anchor.safetensors")
    assert answer.status == 0, answer.err
    header, tensors = read_delta("anchor.safetensors")
    assert header["info"]["head"] == "pretrained"
    assert tensors["head.weight"].shape == (10, 64)
    assert "The head is (30, 64)" in vpt("robustness", "head", *given, "--out=no.safetensors").sentence
    Path("classes.json").write_text("3")
    refused = vpt("robustness", "head", *given, "--classes=classes.json", "--out=no.safetensors").sentence
    assert "is not a JSON list" in refused


def test_several_deltas_are_written_beside_themselves(vpt: Vpt, trained: Run) -> None:
    for name in ("one", "two"):
        Path(name).mkdir()
        Path(name, "delta.safetensors").write_bytes((trained.folder / "delta.safetensors").read_bytes())
    deltas = ["--delta", "one/delta.safetensors", "two/delta.safetensors", "--data", str(CONFIGS / "demo.yaml")]
    assert vpt("robustness", "run", *deltas, "--max-images=10", "--severities", "--alphas", "1").status == 0
    assert all(Path(name, "robustness", "robustness.json").is_file() for name in ("one", "two"))
    assert "--out is for one delta" in vpt("robustness", "run", *deltas, "--out=result").sentence


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--delta=none.safetensors"], "No delta file none.safetensors"),
        ([], "--delta"),
        (["--delta={delta}", "--data=none.yaml"], "No config none.yaml"),
        (["--delta={delta}", "--data={method}"], "has no data section"),
        (["--delta={delta}", "--data.sise=3"], "'sise' is not"),
        (["--delta={delta}", "--sise=3"], "unrecognized arguments: --sise=3"),
        (["--delta={delta}", "--alphas", "2"], "is not a number from 0 to 1"),
        (["--delta={delta}", "--corruptions", "frosty"], "did you mean 'frost'"),
        (["--delta={delta}", "--anchor={delta}x"], "No delta file"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(vpt: Vpt, trained: Run, args: list[str], part: str) -> None:
    names = {"delta": trained.folder / "delta.safetensors", "method": CONFIGS / "method" / "linear.yaml"}
    assert part in vpt("robustness", "run", *(arg.format(**names) for arg in args)).sentence


def test_attention_draws_test_images_of_the_run(vpt: Vpt, trained: Run) -> None:
    answer = vpt("attention", "--delta", str(trained.folder / "delta.safetensors"), "--out=figure.png")
    assert answer.status == 0, answer.err
    assert Path("figure.png").read_bytes().startswith(b"\x89PNG")


def test_attention_draws_the_images_that_are_given(vpt: Vpt, trained: Run, task: Path) -> None:
    images = [str(path) for path in sorted(task.rglob("*.jpg"))[:2]]
    delta = str(trained.folder / "delta.safetensors")
    answer = vpt("attention", "--delta", delta, "--out=figure.svg", "--images", *images)
    assert answer.status == 0, answer.err
    assert Path("figure.svg").stat().st_size > 0


def test_runs_lists_what_was_measured_and_written(vpt: Vpt, trained: Run) -> None:
    answer = vpt("runs", str(trained.folder.parents[2]))
    assert answer.status == 0
    assert "delta.safetensors" in answer.out
    assert "No run.json below empty" in vpt("runs", "empty").sentence


def test_runs_shows_no_validation_accuracy_of_images_that_were_trained_on(vpt: Vpt, tmp_path: Path) -> None:
    for name, shared in (("honest", 0), ("trained_on", 200)):
        (tmp_path / name).mkdir()
        record = {"metrics": {"val/acc": 0.5}, "data": {"shared_with_train": {"val": shared}, "counts": {"test": 9}}}
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    lines = vpt("runs", str(tmp_path)).out.splitlines()
    shown = {name: "50.0" in line for line in lines for name in ("honest", "trained_on") if f" {name} " in line}
    assert shown == {"honest": True, "trained_on": False}


def test_runs_goes_on_with_the_others_and_names_what_is_not_in_its_table(
    vpt: Vpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["mk[", "[red]x", "[/x]", ":smile:", "caf\udce9", "cut", "locked"]
    for name in names:
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text('{"metrics": {"test/acc": 0.5}}' if name != "cut" else "{")
    (tmp_path / "runs" / "mk[" / "gone").symlink_to(tmp_path / "nowhere")
    scan = os.scandir

    def scandir(path: str) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    answer = vpt("runs")
    for name in [*names[:4], "caf\\udce9"]:
        assert re.search(rf"│ {re.escape(name)} +│.*│ 50.0 │", answer.out), name
    assert answer.sentence.startswith("Not in the table: ")
    assert "runs/cut/run.json cannot be read" in answer.sentence
    assert "runs/locked cannot be read (Permission denied)." in answer.sentence


def test_runs_whose_names_are_long_stay_apart_in_80_columns(
    vpt: Vpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"own/photos_split/vpt_deep_with_a_long_name/version_{number}" for number in range(2)]
    for name in names:
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text('{"metrics": {"test/acc": 0.5}}')
    lines = [line for line in vpt("runs").out.splitlines() if line.startswith("│")]
    assert "".join(line.split("│")[1].strip() for line in lines) == "".join(names)


def test_runs_says_where_some_of_the_test_images_were_tested(vpt: Vpt, tmp_path: Path) -> None:
    for name, read in (("all", 900), ("some", 96)):
        (tmp_path / name).mkdir()
        record = {"metrics": {"test/acc": 0.5}, "data": {"counts": {"test": 900}}, "read": {"test": read}}
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    lines = vpt("runs", str(tmp_path)).out.splitlines()
    assert [line.split("│")[-2].strip() for line in lines if " 50.0 " in line] == ["900", "96 of 900"]


def test_runs_of_one_task_under_different_presets_are_called_not_comparable(vpt: Vpt, tmp_path: Path) -> None:
    def write(folder: str, task: str, preset: str) -> None:
        home = tmp_path / "runs" / folder
        home.mkdir(parents=True)
        data = {"name": task, "preset": preset, "counts": {"train": 16, "test": 9}}
        (home / "run.json").write_text(json.dumps({"metrics": {}, "data": data}))

    for number, (task, preset) in enumerate([("dtd", "vpt"), ("dtd", "vpt"), ("sun397", "noah")]):
        write(str(number), task, preset)
    assert "Not comparable" not in vpt("runs", "runs").out
    write("3", "dtd", "noah")
    out = vpt("runs", "runs").out
    line = "Not comparable: the runs on dtd use different presets (vpt: 2, noah: 1)."
    assert out.splitlines().count(line) == 1
    assert "runs/2/ (preset noah, 16 training images)" in out
    assert "sun397" not in out


def test_runs_of_one_task_on_different_shares_of_its_images_are_called_not_comparable(vpt: Vpt, tmp_path: Path) -> None:
    def write(folder: str, subset: dict[str, Any] | None) -> None:
        home = tmp_path / "runs" / folder
        home.mkdir(parents=True)
        data = {"name": "dtd", "preset": "vpt", "counts": {"train": 16}, "subset": subset}
        (home / "run.json").write_text(json.dumps({"metrics": {}, "data": data}))

    for seed in (0, 1):
        write(str(seed), {"shots": 16, "fraction": None, "seed": seed})
    assert "Not comparable" not in vpt("runs", "runs").out
    write("2", None)
    write("3", {"shots": None, "fraction": 0.1, "seed": 0})
    line = (
        "Not comparable: the runs on dtd use different training subsets (16 shots: 2, all images: 1, fraction 0.1: 1)."
    )
    assert vpt("runs", "runs").out.splitlines().count(line) == 1


def test_configs_are_listed_and_copied_but_never_over_another(vpt: Vpt) -> None:
    answer = vpt("configs", "demo.yaml", "sweep")
    assert answer.status == 0, answer.err
    assert "demo.yaml" in answer.out
    assert "The published search for prompts" in answer.out
    assert "vtab" not in answer.out.replace("configs/vtab", "")
    answer = vpt("configs", "--copy", "mine", "method")
    assert answer.status == 0, answer.err
    copied = {path.name for path in Path("mine").rglob("*.yaml")}
    assert copied == {path.name for path in (CONFIGS / "method").glob("*.yaml")}
    assert "exists already" in vpt("configs", "--copy", "mine", "method").sentence
    assert "did you mean 'demo.yaml'?" in vpt("configs", "dem.yaml").sentence
    assert len({line.split("  ")[0] for line in vpt("configs").out.splitlines() if not line.endswith("  ")}) > 60


def test_a_config_that_is_not_here_is_named_with_the_way_to_get_it(vpt: Vpt) -> None:
    assert "`vpt configs --copy configs` copies" in vpt("fit", "-c", "configs/demo.yaml").sentence
    assert "name a file, or see `vpt configs`" in vpt("fit", "-c", "nope.yaml").sentence
    assert "`vpt configs --copy configs` copies" in vpt("fit").sentence
