"""What is pushed loads again as the same model, names no place of this machine, and says what it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import vpt
from tests.export.models import tuned
from tests.hub.fake import Hub, serving
from vpt.backbones import create_backbone
from vpt.cli import main
from vpt.data.targets import Targets
from vpt.errors import ConfigError, HubError, WeightsError
from vpt.hub.client import fetch, push
from vpt.models.classifier import TunedModel
from vpt.models.delta_file import save_delta
from vpt.models.delta_format import read_delta
from vpt.models.segmenter import DenseModel

REPO = "ann/digits"
PLACE = "/home/ann/secret"
RECORD: dict[str, Any] = {
    "task": "PromptTuning",
    "hyperparameters": {"deep": True, "num_tokens": 3, "weights": f"{PLACE}/vit.safetensors"},
    "seed": 4,
    "max_epochs": 5,
    "epochs": 5,
    "precision": "32-true",
    "epoch_rule": "last",
    "data": {
        "name": "digits",
        "preset": "square",
        "augment": "none",
        "counts": {"train": 800, "val": 200, "test": 797},
        "complete": True,
        "shared_with_train": {"val": 0, "test": 0},
    },
    "parameters": {"trainable": 4421, "total": 2720000},
    "versions": {"vpt": "0.1.0"},
    "metrics": {"train/loss": 0.1, "val/acc": 0.9, "test/loss": 0.2, "test/acc": 0.875, "test/mean_per_class": 0.75},
}
CONFIG: dict[str, Any] = {
    "seed_everything": 4,
    "trainer": {"default_root_dir": f"{PLACE}/runs", "max_epochs": 5},
    "model": {"init_args": {"weights": f"{PLACE}/vit.safetensors", "init_head": "../old/delta.safetensors"}},
    "data": {"init_args": {"root": f"{PLACE}/my data", "cache": "~/cache"}},
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client takes for the public one, with a cache of its own."""
    from huggingface_hub import constants

    with serving() as running:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield running


def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def a_run(folder: Path, weights: str = "pretrained") -> tuple[TunedModel, Path]:
    """A finished run's folder."""
    model = tuned("vit_nano_patch8_64", weights, [{"name": "prompt", "num_tokens": 3}])
    model.info = RECORD
    folder.mkdir()
    delta = save_delta(folder / "delta.safetensors", model)
    (folder / "run.json").write_text(json.dumps(RECORD))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "checkpoint.ckpt").write_bytes(b"a pickle")
    return model, delta


def front_matter(card: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return read


def test_what_is_pushed_loads_as_the_same_model(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, delta = a_run(tmp_path / "run")
    assert main(["push", "--delta", str(delta), "--repo", REPO, "--private", "--endpoint", hub.url]) == 0
    assert capsys.readouterr().out == f'pushed to {hub.url}/{REPO}\nload it with vpt.load("hf://{REPO}")\n'
    assert sorted(hub.repos[REPO]["main"]) == ["README.md", "config.yaml", "delta.safetensors", "run.json"]
    assert hub.private == {REPO}
    assert torch.equal(vpt.load(f"hf://{REPO}")(images()), model(images()))
    assert hub.downloaded == ["delta.safetensors"]


def test_an_address_may_have_been_a_path(hub: Hub, tmp_path: Path) -> None:
    model, delta = a_run(tmp_path / "run")
    push(delta, REPO)
    for address in (Path(f"hf://{REPO}"), Path(f"hf://{REPO}@{hub.last(REPO)}")):
        assert torch.equal(vpt.load(address)(images()), model(images()))
    with pytest.raises(HubError, match=r"hf://ann is no address"):
        vpt.load(Path("hf://ann"))


def test_a_segmentation_model_is_loaded_from_the_hub_and_by_load(hub: Hub, tmp_path: Path) -> None:
    model = DenseModel(create_backbone("vit_nano_patch8_64"), 3, [{"name": "prompt", "num_tokens": 2}]).eval()
    hub.add("ann/shapes", {"delta.safetensors": save_delta(tmp_path / "dense.safetensors", model).read_bytes()})
    for address in ("hf://ann/shapes", Path("hf://ann/shapes"), tmp_path / "dense.safetensors"):
        for load in (vpt.load, vpt.load_segmentation):
            assert torch.equal(load(address)(images()), model(images()))


def test_a_revision_stays_what_it_was(hub: Hub, tmp_path: Path) -> None:
    model, delta = a_run(tmp_path / "run")
    push(delta, REPO)
    first = hub.last(REPO)
    before = model(images())
    with torch.no_grad():
        model.head.weight.add_(1)
    save_delta(delta, model)
    push(delta, REPO)
    assert torch.equal(vpt.load(f"hf://{REPO}@{first}")(images()), before)
    assert torch.equal(vpt.load(f"hf://{REPO}")(images()), model(images()))


def test_no_place_of_this_machine_leaves_it(hub: Hub, tmp_path: Path) -> None:
    weights = tmp_path / "nano.safetensors"
    save_file(tuned("vit_nano_patch8_64", "pretrained", []).backbone.model.state_dict(), weights)
    model, delta = a_run(tmp_path / "run", str(weights))
    push(delta, REPO)
    for name, content in hub.repos[REPO]["main"].items():
        assert b"/home" not in content, name
        assert str(tmp_path).encode() not in content, name
    config = yaml.safe_load(hub.repos[REPO]["main"]["config.yaml"])
    assert config["trainer"] == {"default_root_dir": "runs", "max_epochs": 5}
    assert config["model"]["init_args"] == {"weights": "vit.safetensors", "init_head": "delta.safetensors"}
    assert config["data"]["init_args"] == {"root": "my data", "cache": "cache"}
    assert read_delta(fetch(f"hf://{REPO}"))[0]["backbone"]["weights"] == "nano.safetensors"
    assert read_delta(delta)[0]["backbone"]["weights"] == str(weights)  # the run itself keeps it
    with pytest.raises(WeightsError, match=r"No weights file nano\.safetensors: give an existing file"):
        vpt.load(f"hf://{REPO}")
    assert torch.equal(vpt.load(f"hf://{REPO}", str(weights))(images()), model(images()))


def test_the_card_tells_the_protocol_and_every_number_with_its_n(hub: Hub, tmp_path: Path) -> None:
    push(a_run(tmp_path / "run")[1], REPO)
    card = hub.repos[REPO]["main"]["README.md"].decode()
    front = front_matter(card)
    assert front["library_name"] == "vpt"
    assert front["datasets"] == ["digits"]
    assert "base_model" not in front  # the weights that ship with this package are no repository of the hub
    result = front["model-index"][0]["results"][0]
    assert result["dataset"]["type"] == "digits"
    assert result["metrics"] == [
        {"type": "accuracy", "value": 0.875, "name": "accuracy (n = 797)"},
        {"type": "mean_per_class", "value": 0.75, "name": "mean accuracy over classes (n = 797)"},
    ]
    for line in (
        "| test | accuracy | 0.8750 | 797 |",
        "| val | accuracy | 0.9000 | 200 |",
        "- trainable parameters: 4,421 of 2,720,000",
        "- seed: 4",
        "- epochs: 5",
        "- epoch rule: last",
        "- preset: square",
        'model = vpt.load("hf://ann/digits")  # uint8 images (B, 3, 64, 64) to logits (B, 5)',
    ):
        assert line in card.splitlines()
    assert "`vpt_deep` on vpt/vit_nano_patch8_64" in card
    assert "Code: Apache-2.0. Data: CC BY 4.0" in card
    assert "loss" not in card


def test_validation_images_that_were_trained_on_measure_nothing(hub: Hub, tmp_path: Path) -> None:
    delta = a_run(tmp_path / "run")[1]
    data = RECORD["data"] | {"shared_with_train": {"val": 200, "test": 0}}
    (delta.parent / "run.json").write_text(json.dumps(RECORD | {"data": data}))
    push(delta, REPO)
    assert "| val |" not in hub.repos[REPO]["main"]["README.md"].decode()


def test_numbers_come_as_they_were_recorded(hub: Hub, tmp_path: Path) -> None:
    """JSON is not quite YAML, which takes 1e-05 for a text and halves of a character for two."""
    delta = a_run(tmp_path / "run")[1]
    record = RECORD | {
        "metrics": {"test/gap": 2e-05},
        "hyperparameters": {"deep": True, "lr": 1e-05},
        "note": "\U0001f600",
    }
    (delta.parent / "run.json").write_text(json.dumps(record))
    push(delta, REPO)
    assert json.loads(hub.repos[REPO]["main"]["run.json"]) == record
    assert "| test | gap | 0.0000 | 797 |" in hub.repos[REPO]["main"]["README.md"].decode().splitlines()


def test_what_is_meant_to_be_private_does_not_go_to_a_public_place(hub: Hub, tmp_path: Path) -> None:
    _, delta = a_run(tmp_path / "run")
    push(delta, REPO)
    before = hub.last(REPO)
    with pytest.raises(HubError, match="is public: nothing was uploaded"):
        push(delta, REPO, private=True)
    assert hub.last(REPO) == before


def test_the_config_of_another_run_does_not_stay(hub: Hub, tmp_path: Path) -> None:
    _, delta = a_run(tmp_path / "run")
    push(delta, REPO)
    delta.with_name("config.yaml").unlink()
    push(delta, REPO)
    assert sorted(hub.repos[REPO]["main"]) == ["README.md", "delta.safetensors", "run.json"]


def test_a_card_counts_the_images_that_were_read(hub: Hub, tmp_path: Path) -> None:
    _, delta = a_run(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps(RECORD | {"read": {"train": 800, "test": 20}}))
    push(delta, REPO)
    card = hub.repos[REPO]["main"]["README.md"].decode()
    assert "| test | accuracy | 0.8750 | 20 |" in card
    assert "- read of them: test 20\n" in card
    assert front_matter(card)["model-index"][0]["results"][0]["metrics"][0]["name"] == "accuracy (n = 20)"


def test_a_run_says_nothing_on_another_file_in_its_folder(hub: Hub, tmp_path: Path) -> None:
    model, delta = a_run(tmp_path / "run")
    model.info = {"random_head": True}
    push(save_delta(delta.with_name("init.safetensors"), model), REPO)
    files = hub.repos[REPO]["main"]
    assert sorted(files) == ["README.md", "delta.safetensors", "run.json"]
    assert json.loads(files["run.json"]) == {"random_head": True}
    assert "None were recorded" in files["README.md"].decode()


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_damaged_file_beside_the_delta_is_one_sentence(tmp_path: Path, name: str, text: str) -> None:
    delta = a_run(tmp_path / "run")[1]
    (delta.parent / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=rf"{name} (cannot be read|holds no settings)"):
        push(delta, REPO)


def test_a_card_keeps_odd_names_and_says_what_little_is_known(hub: Hub, tmp_path: Path) -> None:
    _, delta = a_run(tmp_path / "run")
    record = {"data": {"name": "a|b <i>", "counts": {"test": 8}}, "metrics": {"test/acc": 0.5, "test/x|y": 0.25}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"parameters": {"trainable": 3}}))
    push(delta, REPO)
    card = hub.repos[REPO]["main"]["README.md"].decode()
    assert "trained on a\\|b \\<i>." in card
    assert "| test | x\\|y | 0.2500 | 8 |" in card
    assert "- trainable parameters: 3\n" in card
    assert front_matter(card)["model-index"][0]["results"][0]["dataset"]["name"] == "a|b <i>"


def test_a_delta_without_a_run_has_a_card_that_claims_nothing(hub: Hub, tmp_path: Path) -> None:
    delta = save_delta(tmp_path / "delta.safetensors", tuned("vit_nano_patch8_64", "pretrained", []))
    push(delta, REPO)
    assert sorted(hub.repos[REPO]["main"]) == ["README.md", "delta.safetensors", "run.json"]
    card = hub.repos[REPO]["main"]["README.md"].decode()
    assert "model-index" not in front_matter(card)
    assert "None were recorded: `vpt test` evaluates" in card
    assert "no card states their licence" in card
    assert "Written by vpt.\n" in card


@pytest.mark.parametrize(
    ("targets", "purpose", "pipeline"),
    [
        (
            "multilabel",
            "finding which of the 2 classes of its training data an image shows",
            "image-classification",
        ),
        ("regression", "estimating the numbers of its training data (age, height)", None),
    ],
)
def test_a_card_says_what_several_labels_and_numbers_are_for(
    hub: Hub, tmp_path: Path, targets: Targets, purpose: str, pipeline: str | None
) -> None:
    model = TunedModel(create_backbone("vit_nano_patch8_64"), 2, (), ["age", "height"], targets=targets)
    push(save_delta(tmp_path / "delta.safetensors", model), REPO)
    card = hub.repos[REPO]["main"]["README.md"].decode()
    assert f"Meant for {purpose}" in card
    assert "vpt robustness" not in card
    assert front_matter(card).get("pipeline_tag") == pipeline


def test_weights_of_the_hub_are_the_base_model(hub: Hub, tmp_path: Path) -> None:
    model, delta = a_run(tmp_path / "run")
    model.backbone.weights_id = "timm/vit_base_patch16_224.orig_in21k"
    push(save_delta(delta, model), REPO)
    front = front_matter(hub.repos[REPO]["main"]["README.md"].decode())
    assert front["base_model"] == "timm/vit_base_patch16_224.orig_in21k"
    assert front["base_model_relation"] == "adapter"
    (delta.parent / "run.json").write_text(json.dumps(RECORD | {"task": "FineTuning"}))
    push(delta, REPO)
    assert front_matter(hub.repos[REPO]["main"]["README.md"].decode())["base_model_relation"] == "finetune"


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("hf://ann/nothing", r"The hub has no model ann/nothing that you may read: .*HF_TOKEN\."),
        ("hf://ann/empty", r"ann/empty on the hub has no delta\.safetensors: vpt push writes it\."),
        ("hf://ann/empty@v9", r"ann/empty has no revision 'v9': give a branch, a tag or a commit\."),
        ("hf://ann", r"hf://ann is no address on the hub: write hf://user/name or"),
        ("hf://ann/empty@", r"hf://ann/empty@ is no address on the hub"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(hub: Hub, address: str, sentence: str) -> None:
    hub.add("ann/empty", {"README.md": b""})
    with pytest.raises(HubError, match=sentence):
        vpt.load(address)
    assert hub.downloaded == []


def test_a_hub_that_is_not_there_is_one_sentence(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: pytest.fail("it tries again"))
    delta = a_run(tmp_path / "run")[1]
    nowhere = "http://127.0.0.1:9"
    for call in (lambda: push(delta, REPO, endpoint=nowhere), lambda: fetch(f"hf://{REPO}", nowhere)):
        with pytest.raises(HubError, match=rf"The hub could not be reached for {REPO} \(.+\): check the network"):
            call()


def test_what_was_kept_is_there_when_the_hub_is_not(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import constants

    push(a_run(tmp_path / "run")[1], REPO)
    kept = fetch(f"hf://{REPO}")
    assert fetch(f"hf://{REPO}", "http://127.0.0.1:9") == kept
    assert not constants.HF_HUB_OFFLINE


def test_offline_mode_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"could not be reached for ann/digits .* HF_HUB_OFFLINE"):
        fetch(f"hf://{REPO}")


def test_a_cache_that_cannot_be_written_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", "/cache")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(HubError, match=r"ann/digits cannot be kept on this machine: .*Permission denied: '/cache'"):
        fetch(f"hf://{REPO}")


@pytest.mark.parametrize(("status", "advice"), [(401, "log in with"), (403, "log in with"), (500, "500")])
def test_a_refusal_is_one_sentence(hub: Hub, tmp_path: Path, status: int, advice: str) -> None:
    hub.refuses = status
    with pytest.raises(HubError, match=rf"{REPO}.*{advice}"):
        push(a_run(tmp_path / "run")[1], REPO)


def test_a_name_that_is_none_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="'digits' is no name of a repository: write user/name"):
        push(tmp_path / "delta.safetensors", "digits")
