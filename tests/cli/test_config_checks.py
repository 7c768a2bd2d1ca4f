"""Nothing is settled silently: lost values, contradictions with the data or with a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from tests.fakes import make_task
from vpt.cli import config_checks
from vpt.cli.config_checks import whole_numbers
from vpt.errors import ConfigError, UnknownNameError

from .conftest import CONFIGS, DEMO, QUICK, SMALL, Run, Vpt

LINEAR = ["-c", str(CONFIGS / "method" / "linear.yaml")]
FAST = ["--trainer.fast_dev_run=true", "--data.batch_size=2"]


@pytest.fixture
def colours(tmp_path: Path) -> list[str]:
    """Overrides that put a fake task of three classes in place of the digits."""
    make_task(tmp_path / "data" / "colours")
    return ["--data=VTABDataModule", "--data.task=colours", f"--data.root={tmp_path / 'data'}"]


class TestFromTheData:
    @pytest.mark.parametrize(
        ("flag", "mine", "theirs"),
        [("num_classes", "7", "10"), ("image_size", "32", "64"), ("normalization", "imagenet", "weights")],
    )
    def test_a_contradicting_value_is_refused_naming_both(self, vpt: Vpt, flag: str, mine: str, theirs: str) -> None:
        sizes = ["--data.image_size=64"] if flag == "image_size" else []
        sentence = vpt("fit", *DEMO, f"--model.{flag}={mine}", *sizes, *FAST).sentence
        assert f"model.{flag} is " in sentence
        assert mine in sentence
        assert theirs in sentence

    def test_an_agreeing_value_is_accepted(self, vpt: Vpt) -> None:
        assert vpt("fit", *DEMO, "--model.num_classes=10", "--model.normalization=weights", *FAST).status == 0

    def test_the_image_size_is_the_backbones_own(self, vpt: Vpt, colours: list[str]) -> None:
        answer = vpt("fit", *DEMO, *colours, *SMALL, *QUICK)
        assert answer.status == 0, answer.err
        config = yaml.safe_load(Path("runs/colours/vpt_deep/version_0/config.yaml").read_text())
        assert config["data"]["init_args"]["image_size"] == config["model"]["init_args"]["image_size"] == 64
        assert config["model"]["init_args"]["num_classes"] == 3

    def test_the_models_image_size_is_the_datas(self, vpt: Vpt) -> None:
        assert vpt("fit", *DEMO, "--model.image_size=32", *FAST).status == 0

    def test_a_checkpoint_of_another_task_is_refused(self, vpt: Vpt, trained: Run, colours: list[str]) -> None:
        sentence = vpt("test", *trained.config, *colours, "--ckpt_path", trained.checkpoint).sentence
        assert "does not know class 'colour 0' of colours" in sentence


class TestOverlays:
    def test_keys_that_the_new_class_has_stay_and_others_go(self, vpt: Vpt) -> None:
        model = ["--model.momentum=0.25", "--model.num_tokens=5"]
        answer = vpt("fit", *DEMO, *model, *LINEAR, "--print_config")
        args = yaml.safe_load(answer.out)["model"]["init_args"]
        assert args["momentum"] == 0.25
        assert "num_tokens" not in args

    def test_an_overlay_of_the_same_class_keeps_everything(self, vpt: Vpt, tmp_path: Path) -> None:
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text("model: {class_path: PromptTuning, init_args: {deep: false}}\ndata: DigitsDataModule\n")
        answer = vpt("fit", *DEMO, "--model.num_tokens=7", "-c", str(overlay), "--model=PromptTuning", "--print_config")
        args = yaml.safe_load(answer.out)["model"]["init_args"]
        assert (args["num_tokens"], args["deep"], args["backbone"]) == (7, False, "vit_nano_patch8_64")

    def test_a_key_lost_between_two_changes_of_class_is_refused(self, vpt: Vpt) -> None:
        back = ["--model", "LinearProbe", "--model", "PromptTuning"]
        sentence = vpt("fit", *DEMO, "--model.num_tokens", "7", *back, *FAST).sentence
        assert sentence.startswith("model.num_tokens was set by --model.num_tokens and lost")
        repeated = ["--model.num_tokens=7", "--model.deep=true"]
        assert vpt("fit", *DEMO, *back, *repeated, *FAST).status == 0

    def test_a_key_lost_from_a_file_names_the_file(self) -> None:
        config = str(CONFIGS / "demo.yaml")
        given = {"class_path": "PromptTuning", "init_args": {"deep": True}}
        with pytest.raises(ConfigError, match=r"model\.num_tokens was set by .*demo\.yaml"):
            config_checks.check_nothing_lost("model", ["fit", "-c", config], given, {"num_tokens": 10, "deep": True})

    def test_a_key_that_the_class_does_not_have_is_refused(self, vpt: Vpt, tmp_path: Path) -> None:
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text("model: {class_path: LinearProbe, init_args: {num_tokens: 2}}\n")
        assert "'num_tokens' is not" in vpt("fit", *DEMO, "-c", str(overlay)).sentence

    @pytest.mark.parametrize("flag", ["--model.metric_learning={}", "--model.init_args.metric_learning={ }", "file"])
    def test_so_is_one_without_values_unless_it_belongs_to_an_overlaid_class(
        self, vpt: Vpt, tmp_path: Path, flag: str
    ) -> None:
        scenes = ["-c", str(CONFIGS / "segmentation" / "shapes.yaml"), *FAST]
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text("model: {init_args: {metric_learning: {}}}\n")
        written = ["-c", str(overlay)] if flag == "file" else [flag]
        assert vpt("fit", *scenes, *written).sentence.startswith("Unknown option of model 'metric_learning': ")

        accepted = {"backbone": "vit_nano_patch8_64"}
        overlaid = ["-c", "model: {class_path: PromptTuning, init_args: {metric_learning: {}}}"]
        config_checks.check_known("model", ["fit", *overlaid, "--model=SegmentationTask"], accepted)
        config_checks.check_known("model", ["fit", *overlaid, "-c", "model: {class_path: SegmentationTask}"], accepted)
        with pytest.raises(UnknownNameError, match="'metric_learning'"):
            config_checks.check_known("model", ["fit", *overlaid, "--model=vpt.PromptTuning"], accepted)


class TestCheckpoints:
    def test_a_contradicting_flag_is_refused_naming_both(self, vpt: Vpt, trained: Run) -> None:
        resume = ["--ckpt_path", trained.checkpoint]
        sentence = vpt("test", *trained.config, *resume, "--model.num_tokens=99").sentence
        assert sentence.startswith("model.num_tokens is 99, but ")
        assert "was trained with 10" in sentence

    def test_a_contradicting_config_is_refused(self, vpt: Vpt, trained: Run, tmp_path: Path) -> None:
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text("model: {init_args: {deep: false}}\n")
        resume = ["--ckpt_path", trained.checkpoint]
        assert "model.deep is False" in vpt("fit", *DEMO, "-c", str(overlay), *resume, *FAST).sentence

    def test_an_option_that_is_taken_away_is_refused_and_what_the_data_say_may_be_left_out(self, vpt: Vpt) -> None:
        assert vpt("fit", *DEMO, "--model.start_decay={rate: 0.5}", *SMALL, *QUICK).status == 0
        run = Run(Path("runs/digits/vpt_deep/version_0"))
        resume = [*run.config, "--ckpt_path", run.checkpoint, "--trainer.max_epochs=2"]
        sentence = vpt("fit", *resume, "--model.start_decay=null").sentence
        assert sentence.startswith("model.start_decay is None, but ")
        assert "was trained with {'rate': 0.5}" in sentence
        answer = vpt("fit", *resume, "--model.num_classes=null", "--model.image_size=null", "--model.pool=null")
        assert answer.status == 0, answer.err

    def test_another_class_is_refused(self, vpt: Vpt, trained: Run) -> None:
        sentence = vpt("test", *DEMO, "--model=LinearProbe", "--ckpt_path", trained.checkpoint).sentence
        assert "model is " in sentence
        assert "LinearProbe" in sentence
        assert "PromptTuning" in sentence

    def test_what_is_not_given_comes_from_the_checkpoint(self, vpt: Vpt) -> None:
        few = ["--model.num_tokens=3", "--model.base_lr=0.5"]
        assert vpt("fit", *DEMO, *few, *SMALL, *QUICK).status == 0
        run = Run(Path("runs/digits/vpt_deep/version_0"))
        model = ["--model=PromptTuning", "--model.backbone=vit_nano_patch8_64"]
        data = ["--data=DigitsDataModule", *SMALL]
        answer = vpt("fit", *model, *data, *QUICK, "--trainer.max_epochs=2", "--ckpt_path", run.checkpoint)
        assert answer.status == 0, answer.err
        again = Run(Path("runs/digits/vpt_deep/version_1"))
        hyperparameters = again.record["hyperparameters"]
        assert (hyperparameters["num_tokens"], hyperparameters["base_lr"]) == (3, 0.5)

    def test_weights_may_lie_elsewhere_and_the_fingerprint_guards_them(self, vpt: Vpt, trained: Run) -> None:
        shipped = Path(config_checks.__file__).parents[1] / "backbones" / "shipped" / "vit_nano_patch8_64.safetensors"
        resume = ["--ckpt_path", trained.checkpoint, *SMALL]
        assert vpt("test", *trained.config, *resume, f"--model.weights={shipped}").status == 0
        assert "fingerprint" in vpt("test", *trained.config, *resume, "--model.weights=random").sentence

    def test_a_file_that_is_no_checkpoint_is_refused(self, vpt: Vpt, tmp_path: Path) -> None:
        (tmp_path / "text.ckpt").write_text("hello")
        torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "pickle.ckpt")
        assert "No checkpoint missing.ckpt" in vpt("test", *DEMO, "--ckpt_path=missing.ckpt").sentence
        for name in ("text.ckpt", "pickle.ckpt"):
            assert "cannot" in (sentence := vpt("test", *DEMO, "--ckpt_path", name).sentence) or "not a" in sentence


class TestMistakes:
    @pytest.mark.parametrize(
        ("args", "part"),
        [
            (["-c", "nofile.yaml"], "nofile.yaml"),
            ([*DEMO, "--model.num_token=3"], "'num_token' is not accepted, did you mean num_tokens?"),
            ([*DEMO, "--model.num_tokens=many"], "Expected a whole number"),
            ([*DEMO, "--model=PromptTunning"], "Unknown class 'PromptTunning': did you mean 'PromptTuning'?"),
            ([*DEMO, "--data=DigitDataModule"], "did you mean 'DigitsDataModule'?"),
            ([*DEMO, "--foo=3"], "--foo"),
            ([*DEMO, "--trainer.max_epoch=3"], "did you mean trainer.max_epochs?"),
            ([*DEMO, "--modle.num_tokens=3"], "did you mean model.num_tokens?"),
            ([*DEMO, "--trainer.max_epochs=x"], "trainer.max_epochs"),
            ([], "-c configs/demo.yaml"),
            ([*DEMO, "--model.backbone=vit_nano_patch8"], "vit_nano_patch8_64"),
            ([*DEMO, "--model.weights=nofile.safetensors"], "nofile.safetensors"),
            ([*DEMO, "--data.train=train80"], "did you mean 'train800'?"),
            ([*DEMO, "--data.batch_size=0"], "batch_size must be a whole number of at least 1, got 0"),
            ([*DEMO, "--trainer.accelerator=abacus"], "abacus"),
        ],
    )
    def test_are_answered_in_one_sentence(self, vpt: Vpt, args: list[str], part: str) -> None:
        assert part in vpt("fit", *args, *FAST[:1]).sentence

    def test_broken_yaml(self, vpt: Vpt, tmp_path: Path) -> None:
        (tmp_path / "broken.yaml").write_text("model: {a: [")
        assert "expected" in vpt("fit", "-c", "broken.yaml").sentence

    def test_a_missing_root_shows_the_expected_tree(self, vpt: Vpt) -> None:
        answer = vpt("fit", "-c", str(CONFIGS / "vtab" / "caltech101.yaml"), "--data.root=nowhere")
        assert answer.status == 1
        assert "vpt: error: nowhere/caltech101 does not exist" in answer.err
        assert "train800val200.txt" in answer.err

    def test_a_damaged_image_is_named(self, vpt: Vpt, tmp_path: Path, colours: list[str]) -> None:
        image = next((tmp_path / "data" / "colours").rglob("*.jpg"))
        image.write_bytes(image.read_bytes()[:100])
        assert image.name in vpt("fit", *DEMO, *colours, *FAST).sentence

    def test_a_diverging_run_stops_and_says_so(self, vpt: Vpt) -> None:
        wild = ["--model.optimizer=sgd", "--model.base_lr=1e38", "--model.warmup=0"]
        assert "loss is not finite" in vpt("fit", *DEMO, *wild, *SMALL[:2], *QUICK).sentence


def test_a_whole_number_stays_one(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("trainer: {limit_val_batches: 1, limit_train_batches: 0.5, max_time: '00:01'}")
    flags = ["--trainer.limit_test_batches", "1", "--trainer.limit_predict_batches=1.0", "--model.base_lr=1"]
    assert whole_numbers("trainer", ["-c", str(file), *flags]) == {"limit_val_batches": 1, "limit_test_batches": 1}
    later = ["-c", str(file), "--trainer.limit_val_batches=0.5"]
    assert whole_numbers("trainer", later) == {}
