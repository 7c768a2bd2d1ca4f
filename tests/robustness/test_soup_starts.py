"""Which runs may be averaged: those of one start, as far as it is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.robustness.fakes import PROMPTS, task, write_delta
from vpt.errors import ConfigError, VPTWarning
from vpt.models.delta_format import read_delta
from vpt.models.delta_format import write_delta as write_delta_to
from vpt.robustness.soups.model_soups import greedy, stock, uniform
from vpt.run_record import INIT_FILE

A, B = "a" * 64, "b" * 64


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("starts")


def run(folder: Path, name: str, info: dict[str, Any], init: int | None = None, drawn: bool = True) -> Path:
    """A run's delta file that tells where it started, and beside it what it kept of that, values drawn by a number."""
    own = folder / name
    own.mkdir(exist_ok=True)
    header, tensors = read_delta(write_delta(folder / f"{name}.safetensors", PROMPTS, len(name)))
    if init is not None:
        first = read_delta(write_delta(folder / f"init{init}.safetensors", PROMPTS, 100 + init))[1]
        write_delta_to(own / INIT_FILE, header | {"info": {"random_head": drawn}}, first)
    return write_delta_to(own / "delta.safetensors", header | {"info": info}, tensors)


def starts(delta: str | None = None, head: str | None = None) -> dict[str, Any]:
    return {"starts": {k: v for k, v in (("init_delta", delta), ("init_head", head)) if v is not None}}


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        (starts(A), starts(B), f"the delta (the file {A[:12]} and the file {B[:12]})"),
        (starts(A), starts(), f"the delta (the file {A[:12]} and one drawn by the seed)"),
        (starts(A, A), starts(A, B), f"the head (the file {A[:12]} and the file {B[:12]})"),
        (starts(head="probe"), starts(head=A), f"the head (probe and the file {A[:12]})"),
        (starts(head=A), {"hyperparameters": {"init_delta": None, "init_head": None}}, "the head"),
    ],
)
def test_runs_of_other_starts_are_refused(
    one: dict[str, Any], other: dict[str, Any], what: str, folder: Path, tmp_path: Path
) -> None:
    files = [run(folder, "one", one), run(folder, "other", other)]
    for soup in (uniform, stock, lambda paths, out: greedy(paths, out, task())):
        with pytest.raises(ConfigError) as error:
            soup(files, tmp_path / "soup.safetensors")
        assert f"start from other values of {what}" in str(error.value)
    assert not (tmp_path / "soup.safetensors").exists()


def test_what_seeds_draw_is_no_other_start(folder: Path, tmp_path: Path) -> None:
    files = [run(folder, name, starts(), init) for init, name in enumerate(("first", "second"))]
    header, _ = read_delta(uniform(files, tmp_path / "soup.safetensors"))
    assert header["info"]["starts"] == {"init_delta": None, "init_head": None}
    again = uniform([files[0], tmp_path / "soup.safetensors"], tmp_path / "soup of a soup.safetensors")
    assert read_delta(again)[0]["info"]["starts"] == header["info"]["starts"]


def test_kept_values_decide_where_the_files_differ_or_are_not_known(folder: Path, tmp_path: Path) -> None:
    equal = [run(folder, "left", starts(A), 5), run(folder, "right", starts(B), 5)]
    assert uniform(equal, tmp_path / "equal.safetensors").is_file()
    unknown = [run(folder, "told", starts(A), 6), run(folder, "silent", {}, 7)]
    with pytest.raises(ConfigError, match=f"other values of the delta \\({INIT_FILE} and another\\)"):
        uniform(unknown, tmp_path / "soup.safetensors")
    heads = [run(folder, name, {}, 8, drawn=False) for name in ("x", "y")]
    header, tensors = read_delta(heads[1].parent / INIT_FILE)
    write_delta_to(heads[1].parent / INIT_FILE, header, tensors | {"head.bias": torch.ones(3)})
    with pytest.raises(ConfigError, match="other values of the head"):
        uniform(heads, tmp_path / "soup.safetensors")


def test_a_start_that_is_not_known_is_told(folder: Path, tmp_path: Path) -> None:
    files = [run(folder, "known", starts()), run(folder, "unknown", {"hyperparameters": {"init_delta": "/x/d"}})]
    with pytest.warns(VPTWarning, match=r"What .*unknown/delta.safetensors started from is not known"):
        header, _ = read_delta(uniform(files, tmp_path / "soup.safetensors"))
    assert header["info"]["starts"] is None


def test_a_kept_start_of_other_deltas_says_nothing(folder: Path, tmp_path: Path) -> None:
    files = [run(folder, "p", {}, 1), run(folder, "q", {}, 2)]
    shallow = read_delta(write_delta(folder / "shallow.safetensors", ({**PROMPTS[0], "deep": False},)))
    write_delta_to(files[1].parent / INIT_FILE, *shallow)
    with pytest.warns(VPTWarning, match="not known"):
        assert uniform(files, tmp_path / "soup.safetensors").is_file()
