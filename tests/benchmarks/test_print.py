"""Every benchmark prints its tables from the records in the repository, and measures nothing for that."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import (
    attention,
    backbones,
    data,
    decoding,
    delta_steps,
    domains,
    examples,
    gpu,
    halving,
    large_folder,
    log_bias,
    prediction,
    prompt_recipe,
    real_costs,
    real_protocol,
    robustness_tables,
    shards,
    speed,
    strengths,
    sweep,
    test_time,
    together,
    unknown_images,
    whole_models,
)
from benchmarks.docs import SOURCES

ALL = (
    attention,
    backbones,
    data,
    delta_steps,
    examples,
    log_bias,
    real_costs,
    real_protocol,
    robustness_tables,
    speed,
    sweep,
    unknown_images,
    whole_models,
    decoding,
    prediction,
    prompt_recipe,
    strengths,
    test_time,
    gpu,
    large_folder,
    domains,
    halving,
    shards,
    together,
)


def test_every_benchmark_with_tables_is_a_source_of_the_documentation() -> None:
    assert set(SOURCES) == set(ALL)


@pytest.mark.parametrize("module", ALL, ids=lambda module: module.__name__.partition(".")[2])
def test_it_prints_what_the_records_hold(
    module: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = ["--figures", str(tmp_path)] if module is robustness_tables else []
    module.main(["--print", *figures])
    printed = capsys.readouterr().out
    made = {name: text for name, text in module.blocks().items() if name != "robustness"}
    assert made or module in (attention, gpu)
    assert [name for name, text in made.items() if text not in printed] == []
    assert len(list(tmp_path.iterdir())) == (3 if figures else 0)


@pytest.mark.parametrize("module", ALL, ids=lambda module: module.__name__.partition(".")[2])
def test_it_prints_without_any_record(module: ModuleType, tmp_path: Path) -> None:
    made = module.blocks(tmp_path)
    assert not [name for name, text in made.items() if " ± " in text.partition("\n|--")[2]]
