"""The plan of the emoji benchmark: equal tuning for all, neighbours, the rule of choice, and the test only afterwards."""

from collections import Counter

import numpy as np
import pytest

from protocol import AXES, DEFAULTS, EXTRA, LONG, STEPS, TASKS, TEST_SEEDS, Run, Setting, choose, neighbours, next_run


BASE = {"style": [0.3, 0.3], "adherence": [1, 0]}


def play(measure, limit: int | None = None) -> list[Run]:
    """All runs in the plan's order, if each measures what `measure` says."""
    results: dict[Run, dict] = {}
    while len(results) != limit and (run := next_run(results, dict.fromkeys(TASKS, BASE))):
        assert run not in results
        results[run] = measure(run)
    return list(results)


def best_at(strength: float, rate: float):
    """Measures better the nearer a setting is to this one; all of SFT's settings count by their rate."""

    def measure(run: Run) -> dict:
        far = abs(np.log(run.setting.rate / rate))
        far += abs(np.log(run.setting.strength / strength)) if run.setting.strength else 0
        return {"style": [1 / (1 + far)] * 2, "adherence": [1, 0]}

    return measure


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return play(best_at(0.48, 5e-3))


def test_every_objective_is_tuned_on_a_grid_of_equal_size(runs):
    count = Counter((run.task, run.setting.objective) for run in runs if run.split == "tuning")
    assert set(count) == {(task, objective) for task in TASKS for objective in AXES}
    assert min(count.values()) >= 6 and max(count.values()) <= 6 + EXTRA
    assert count["style", "even"] == 6 + EXTRA


def test_tuning_walks_beyond_the_grid_to_where_it_is_best(runs):
    chosen = {run.setting for run in runs if run.split == "test" and run.setting.objective == "even"} - {DEFAULTS}
    assert Setting("even", 0.48, 5e-3) in chosen


def test_no_test_image_before_a_task_is_tuned_and_five_seeds_on_two_draws(runs):
    for task in TASKS:
        splits = [run.split for run in runs if run.task == task]
        assert splits == sorted(splits, key=["tuning", "test"].index)
    tests = [run for run in runs if run.split == "test"]
    assert {run.draw for run in tests} == {1, 2} and {run.seed for run in tests} == set(TEST_SEEDS)
    assert len(tests) == len(TASKS) * 7 * len(TEST_SEEDS) * len((STEPS, LONG))
    lengths = [run.steps for run in tests]
    assert lengths == sorted(lengths)


def test_what_loses_the_subject_is_not_chosen():
    keeps, loses = Setting("even", 0.25, 5e-4), Setting("even", 0.45, 5e-4)
    done = {loses: {"style": [0.9], "adherence": [0.44]}, keeps: {"style": [0.5], "adherence": [0.45]}}
    assert choose("style", done, BASE) == keeps
    done[keeps]["adherence"] = [0.449]
    assert choose("style", done, BASE) == keeps  # none keeps it: the one that loses least
    done[loses]["adherence"] = [0.8]
    assert choose("style", done, BASE) == choose("adherence", done, BASE) == loses


def test_neighbours_are_one_step_away_on_one_axis():
    corner = Setting("dpo", 20.0, 1.5e-4)
    assert set(neighbours(corner)) == {Setting("dpo", 100.0, 1.5e-4), Setting("dpo", 20.0, 5e-4)}
    assert len(neighbours(Setting("dpo", 500.0, 5e-4))) == 4
