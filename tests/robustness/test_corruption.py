from __future__ import annotations

import pytest

from vpt.errors import ConfigError, UnknownNameError
from vpt.robustness.corruption import ALEXNET, corruption_error


def flat(errors: dict[str, float]) -> dict[str, dict[int, float]]:
    return {kind: dict.fromkeys(range(1, 6), error) for kind, error in errors.items()}


def test_alexnet_has_exactly_100() -> None:
    found = corruption_error(flat(ALEXNET))
    assert found.mce == 100.0
    assert set(found.relative.values()) == {100.0}
    assert found.error == pytest.approx(78.8993, abs=1e-4)


def test_the_mean_over_severities_comes_before_the_ratio_and_the_ratio_before_the_mean() -> None:
    errors = flat(dict.fromkeys(ALEXNET, 0.0))
    errors["fog"] = {1: 0.0, 2: 0.1, 3: 0.2, 4: 0.3, 5: 0.4}
    found = corruption_error(errors)
    assert found.relative["fog"] == pytest.approx(100 * 0.2 / 0.819324)
    assert found.mce == pytest.approx(100 * 0.2 / 0.819324 / 15)
    assert found.error == pytest.approx(100 * 0.2 / 15)


def test_names_decide_and_not_the_order() -> None:
    errors = flat({kind: error / 2 for kind, error in ALEXNET.items()})
    found = corruption_error(dict(reversed(errors.items())))
    assert list(found.relative) == list(ALEXNET)
    assert found.mce == pytest.approx(50)


def test_incomplete_or_foreign_corruptions_are_refused() -> None:
    errors = flat(ALEXNET)
    with pytest.raises(ConfigError, match="evaluate snow, fog as well"):
        corruption_error({kind: error for kind, error in errors.items() if kind not in ("fog", "snow")})
    with pytest.raises(UnknownNameError, match="did you mean 'jpeg_compression'"):
        corruption_error(errors | {"jpeg": errors["fog"]})
    with pytest.raises(ConfigError, match=r"fog has severities \[1, 2\]"):
        corruption_error(errors | {"fog": {1: 0.1, 2: 0.2}})
    with pytest.raises(ConfigError, match="Errors on fog are shares"):
        corruption_error(errors | flat({"fog": 81.9}))
