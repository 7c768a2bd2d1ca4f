from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.fakes import make_task

from .conftest import CONFIGS, Vpt

FILES = sorted((CONFIGS / "vtab").glob("*.yaml"))
# Prompts a layer of VPT-deep, by which the authors' follow-up (ICLR 2024, appendix) reports the trained parameters.
TOKENS = {
    "cifar": 10, "caltech101": 10, "dtd": 10, "oxford_flowers102": 1, "oxford_iiit_pet": 1, "svhn": 50, "sun397": 5,
    "patch_camelyon": 100, "eurosat": 100, "resisc45": 10, "diabetic_retinopathy": 1,
    "clevr_count": 50, "clevr_dist": 200, "dmlab": 100, "kitti": 50, "dsprites_loc": 10, "dsprites_ori": 50,
    "smallnorb_azi": 200, "smallnorb_ele": 200,
}  # fmt: skip


def test_every_task_has_a_config_with_its_number_of_prompts() -> None:
    configs = {file.stem: yaml.safe_load(file.read_text()) for file in FILES}
    assert {task: config["model"]["init_args"]["num_tokens"] for task, config in configs.items()} == TOKENS
    assert {task: config["data"]["init_args"]["task"] for task, config in configs.items()} == {t: t for t in TOKENS}


def test_the_configs_are_the_papers_protocol_except_for_our_own_run_on_caltech101() -> None:
    for file in FILES:
        config = yaml.safe_load(file.read_text())
        model, data = config["model"]["init_args"], config["data"]["init_args"]
        if file.stem != "caltech101":
            assert (model["backbone"], model["optimizer"], data["preset"]) == (
                "vit_base_patch16_224.orig_in21k", "sgd", "vpt",
            )  # fmt: skip
            assert data["batch_size"] == (64 if model["num_tokens"] >= 100 else 128)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_config_trains_on_a_dump_without_class_names(vpt: Vpt, tmp_path: Path, file: Path) -> None:
    task = make_task(tmp_path / "data" / file.stem, classes=2)
    (task / "classes.json").unlink()
    answer = vpt("fit", "-c", str(file), "--data.root", str(tmp_path / "data"), "--trainer.fast_dev_run=true",
                 "--model.backbone=vit_nano_patch8_64", "--data.batch_size=2")  # fmt: skip
    assert answer.status == 0, answer.err
