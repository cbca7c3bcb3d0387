"""Statistics, against cases worked out by hand and by simulation."""

import numpy as np
import pytest

from modeling_pcm_ensemble.evaluation import adjust_p_values, bootstrap_interval, omega_squared, permutation_p_value


def test_intervals_cover_the_true_difference_as_often_as_they_say():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        differences = 0.1 + rng.normal(size=(1, 50))
        _, low, high = bootstrap_interval(differences, samples=500)
        covered += low <= 0.1 <= high
    assert 0.91 <= covered / 300 <= 0.98


def test_runs_that_differ_widen_the_interval():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, 50))
    _, low, high = bootstrap_interval(noise)
    _, wide_low, wide_high = bootstrap_interval(noise + np.array([[-1.0], [0.0], [1.0]]))
    assert wide_high - wide_low > 2 * (high - low)
    mean, _, _ = bootstrap_interval(np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert mean == 2.5


def test_the_permutation_test_counts_sign_changes_and_seldom_cries_wolf():
    # Of the 8 ways to sign 1, 2 and 3, two give a mean as far from 0 as all of one sign.
    assert permutation_p_value(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / 8)
    assert permutation_p_value(np.zeros(5)) == 1.0
    assert permutation_p_value(np.ones(1)) == 1.0
    rng = np.random.default_rng(0)
    found = [permutation_p_value(rng.normal(size=30), samples=199) <= 0.05 for _ in range(300)]
    assert 0.02 <= np.mean(found) <= 0.09
    assert permutation_p_value(0.5 + rng.normal(size=60)) < 0.01


def test_p_values_are_adjusted_in_order():
    # 0.01 · 4, 0.02 · 3, then no less than before: 0.03 · 2; 0.5 · 1
    assert adjust_p_values([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert adjust_p_values([0.6, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        pytest.param("aabb", (4 - 1 * 0) / (4 + 0), id="groups-explain-all"),
        # inside 4, error 4 / 2, total 4
        pytest.param("abab", (4 - 4 - 1 * 2) / (4 + 2), id="groups-explain-nothing"),
    ],
)
def test_omega_squared_equals_the_formula_by_hand(groups, expected):
    assert omega_squared(list(groups), [1.0, 1.0, 3.0, 3.0], [0] * 4) == pytest.approx(expected)


def test_omega_squared_takes_strata_out_first():
    """Values that differ between strata alone leave nothing to explain; noise is not taken for an effect."""
    assert omega_squared([0, 1, 2, 3], [5.0, 5.0, 9.0, 9.0], ["x", "x", "y", "y"]) == 0.0
    rng = np.random.default_rng(0)
    strata, groups = np.repeat([0, 1], 2000), np.arange(4000) % 400 + 1000 * np.repeat([0, 1], 2000)
    assert abs(omega_squared(groups.tolist(), strata + rng.normal(size=4000), strata.tolist())) < 0.03
