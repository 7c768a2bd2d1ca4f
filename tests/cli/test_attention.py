from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from tests.robustness.fakes import write_delta
from vpt.cli.commands import attention
from vpt.visualize.figure_kinds import KINDS

from .conftest import DEMO, QUICK, SMALL, Run, Vpt


def test_kinds_are_written_with_a_page(vpt: Vpt, trained: Run) -> None:
    delta = str(trained.folder / "delta.safetensors")
    answer = vpt("attention", "--delta", delta, "--kind", "mass", "share", "--out=pictures", "--format=svg")
    assert answer.status == 0, answer.err
    names = ["mass.svg", "share.svg", "index.html"]
    assert answer.out.splitlines() == [f"written to pictures/{name}" for name in names]
    assert sorted(path.name for path in Path("pictures").iterdir()) == sorted(names)


def test_one_kind_goes_to_a_file_and_what_files_do_not_tell_is_said(vpt: Vpt, trained: Run, task: Path) -> None:
    delta = ["--delta", str(trained.folder / "delta.safetensors")]
    images = ["--images", *(str(path) for path in sorted(task.rglob("*.jpg"))[:2])]
    answer = vpt("attention", *delta, *images, "--kind", "rollout", "--out=rollout.png")
    assert answer.out.splitlines() == ["written to rollout.png"]
    assert Path("rollout.png").read_bytes().startswith(b"\x89PNG")
    answer = vpt("attention", *delta, *images, "--kind", "all", "--out=pictures")
    assert "features is left out: the classes of image files are not known" in answer.out.splitlines()[-1]


def test_the_comparison_goes_to_a_folder_too(vpt: Vpt, trained: Run, task: Path) -> None:
    image = str(next(task.rglob("*.jpg")))
    delta = str(trained.folder / "delta.safetensors")
    answer = vpt("attention", "--delta", delta, "--images", image, "--out=pictures", "--format=svg")
    assert answer.out.splitlines() == ["written to pictures/compare.svg"]
    assert Path("pictures/compare.svg").is_file()


def test_without_prompts_there_is_nothing_to_compare(vpt: Vpt, task: Path, tmp_path: Path) -> None:
    delta = str(write_delta(tmp_path / "delta.safetensors", ()))
    image = str(next(task.rglob("*.jpg")))
    sentence = vpt("attention", "--delta", delta, "--images", image).sentence
    assert f"{delta} holds no prompts, so there is nothing to compare: give a prompt run's delta file" in sentence
    assert not Path("figures").exists()


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--kind", "rolout"], "did you mean 'rollout'"),
        (["--kind", "all", "--out=a.png"], "give a folder for several"),
        (["--kind", "class", "mass", "--out=a.png"], "give a folder for several"),
        (["--kind", "class", "--out=a.bmp"], ".png, .svg or .pdf"),
        (["--format=gif"], "invalid choice"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(vpt: Vpt, trained: Run, args: list[str], part: str) -> None:
    assert part in vpt("attention", "--delta", str(trained.folder / "delta.safetensors"), *args).sentence


def test_all_kinds_hold_each_of_them() -> None:
    assert attention._kinds(Namespace(kind=["all", "share"])) == attention._kinds(Namespace(kind=["all"])) == []


def test_help_names_every_kind() -> None:
    assert attention._KINDS.split() == list(KINDS)


def test_the_logger_is_taken_from_a_config(vpt: Vpt, tmp_path: Path) -> None:
    Path("log.yaml").write_text(
        "trainer: {callbacks: [{class_path: vpt.visualize.AttentionLogger, init_args: {every_n_epochs: 1}}]}\n"
    )
    answer = vpt("fit", *DEMO, "-c", "log.yaml", *SMALL, *QUICK, f"--trainer.default_root_dir={tmp_path}")
    assert answer.status == 0, answer.err
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    assert b"attention_on_prompts/layer_6" in events.read_bytes()
    assert (events.parent / "delta.safetensors").is_file()  # the callbacks of the package are still there
