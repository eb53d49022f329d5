"""A few of the networks of ``python -m tests.fuzz``, others at every run."""

from __future__ import annotations

import secrets

from fuzz import trial


def test_certificates_of_random_networks_hold_at_points_of_their_balls() -> None:
    first = secrets.randbits(40)
    assert sum(trial(seed) for seed in range(first, first + 20)) > 0
