from __future__ import annotations

import math

import pytest

from vpt.errors import ConfigError, UnknownNameError
from vpt.metrics.effective_robustness import BASELINES, effective_robustness

TIMM_MODELS: list[tuple[dict[str, float], dict[str, float]]] = [
    (
        {
            "imagenet_val": 0.8124,
            "imagenet_val_r": 0.9431,
            "imagenet_val_a": 0.9477,
        },
        {
            "imagenet_v2": 0.6969,
            "imagenet_sketch": 0.29641,
            "imagenet_r": 0.40417,
            "imagenet_a": 0.1584,
        },
    ),
    (
        {
            "imagenet_val": 0.85108,
            "imagenet_val_r": 0.965,
            "imagenet_val_a": 0.9716,
        },
        {
            "imagenet_v2": 0.7532,
            "imagenet_sketch": 0.45106,
            "imagenet_r": 0.59223,
            "imagenet_a": 0.49733,
        },
    ),
]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_robustness_is_a_difference_of_accuracies_in_percentage_points() -> None:
    # At 60 % the odds are 1.5.
    expected = sigmoid(0.9232 * math.log(1.5) - 0.4977)
    found = effective_robustness("imagenet_v2", 0.55, {"imagenet_val": 0.6})
    assert found == pytest.approx(100 * (0.55 - expected))


def test_a_model_of_the_population_lies_near_its_lines() -> None:
    # vgg16 in robustness_top1s.csv of the ImageNet testbed.
    references = {
        "imagenet_val": 0.71592,
        "imagenet_val_r": 0.8937,
        "imagenet_val_a": 0.8856,
        "imagenet_val_objectnet": 0.72448,
    }
    shifts = {
        "imagenet_v2": 0.5851,
        "imagenet_sketch": 0.17532,
        "imagenet_r": 0.27873,
        "imagenet_a": 0.02627,
        "objectnet": 0.27817,
    }
    assert shifts.keys() == BASELINES.keys()
    for shift, accuracy in shifts.items():
        assert abs(effective_robustness(shift, accuracy, references)) < 5, shift


def test_models_of_timm_lie_near_its_lines() -> None:
    # resnet50.a1_in1k and vit_base_patch16_224.augreg2_in21k_ft_in1k in results/results-*.csv of timm.
    population = "timm, 2025-10-30"
    for references, shifts in TIMM_MODELS:
        for shift, accuracy in shifts.items():
            assert abs(effective_robustness(shift, accuracy, references, population)) < 8, shift
    with pytest.raises(UnknownNameError, match="population of effective robustness"):
        effective_robustness("imagenet_v2", 0.5, {"imagenet_val": 0.7}, "clip")


def test_the_line_of_imagenet_a_has_a_knee() -> None:
    baseline = BASELINES["imagenet_a"]
    odds = math.log(0.9 / 0.1)
    assert baseline.predict(0.9) == pytest.approx(sigmoid(0.6894 * odds - 5.14))
    odds = math.log(0.95 / 0.05)
    assert baseline.predict(0.95) == pytest.approx(sigmoid(2.956 * odds - 10.2774))
    assert baseline.predict(0.9186) == baseline.line.predict(0.9186)


@pytest.mark.filterwarnings("ignore:Accuracy 0.0 %")
@pytest.mark.parametrize("shift", BASELINES)
@pytest.mark.parametrize("accuracy", [0.0, 1.0])
@pytest.mark.parametrize("reference", [0.0, 1.0])
def test_accuracies_of_0_and_1_survive(shift: str, accuracy: float, reference: float) -> None:
    found = effective_robustness(shift, accuracy, {BASELINES[shift].reference: reference})
    assert found == pytest.approx(100 * (accuracy - reference), abs=1e-4)


@pytest.mark.parametrize("shift", ["imagenet_r", "imagenet_a", "objectnet"])
def test_the_reference_of_the_same_classes_is_required_by_name(shift: str) -> None:
    with pytest.raises(ConfigError, match=f"compares with accuracy on {BASELINES[shift].reference}, got imagenet_val:"):
        effective_robustness(shift, 0.5, {"imagenet_val": 0.76})


def test_a_set_without_a_population_has_no_effective_robustness() -> None:
    with pytest.raises(UnknownNameError, match=r"set with a baseline population .* 'caltech101'"):
        effective_robustness("caltech101", 0.5, {"imagenet_val": 0.76})


def test_extrapolation_warns() -> None:
    with pytest.warns(UserWarning, match=r"56.4 % on imagenet_val is below 56.5 %.*extrapolated"):
        effective_robustness("imagenet_v2", 0.4, {"imagenet_val": 0.564})


@pytest.mark.parametrize(("shift", "begins"), [("imagenet_r", 0.77), ("imagenet_a", 0.76), ("objectnet", 0.57)])
def test_each_baseline_begins_at_alexnet_on_its_own_classes(shift: str, begins: float) -> None:
    baseline = BASELINES[shift]
    assert round(baseline.begins, 2) == begins  # robustness_top1s.csv of the ImageNet testbed
    effective_robustness(shift, 0.3, {baseline.reference: baseline.begins})  # a warning would be an error here
    with pytest.warns(UserWarning, match=rf"70.0 % on {baseline.reference}|50.0 %"):
        effective_robustness(shift, 0.3, {baseline.reference: 0.7 if begins > 0.7 else 0.5})


@pytest.mark.parametrize(("accuracy", "reference"), [(55, 0.7), (0.5, 76.1)])
def test_percentages_are_refused(accuracy: float, reference: float) -> None:
    with pytest.raises(ConfigError, match="share between 0 and 1"):
        effective_robustness("imagenet_v2", accuracy, {"imagenet_val": reference})
