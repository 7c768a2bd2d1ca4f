"""Reports are of small runs, as experiments are."""

from tests.experiments.conftest import _seed_stays_here, config, root

__all__ = ["_seed_stays_here", "config", "root"]
