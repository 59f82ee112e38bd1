"""The report's verdicts on results whose truth is known."""

import numpy as np

from protocol import AXES, DEFAULTS, TASKS, TEST_SEEDS, Run, next_run
from verdicts import report


def results(gains: dict[str, float], kept: dict[str, float], scatter: float = 0.02) -> tuple[dict, dict]:
    """All runs of `style` with 60 subjects, of these mean gains and shares of the base's adherence, 0.6."""
    rng = np.random.default_rng(0)
    base = {"style": [0.3] * 60, "adherence": [1] * 36 + [0] * 24, "distance": 5.0}
    runs: dict[Run, dict] = {}
    while run := next_run(runs, dict.fromkeys(TASKS, base), ("style",)):
        name = "defaults" if run.setting == DEFAULTS and run.split == "test" else run.setting.objective
        shown = round(36 * kept.get(name, 1.0))
        style = 0.3 + gains.get(name, 0.0) + scatter * rng.standard_normal(60)
        runs[run] = {"style": style.tolist(), "adherence": [1] * shown + [0] * (60 - shown), "distance": 4.0}
    return runs, {"tuning": base, "test": base}


def test_verdicts_are_the_protocols():
    gains = {"even": 0.4, "dpo": 0.3, "orpo": 0.5, "sft": 0.05, "mapo": 0.3, "scaled": 0.2}
    runs, bases = results(gains, {"orpo": 0.4})
    rows = {}
    for line in report("style", runs, bases, 1000).splitlines()[4:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[cells[0]] = cells
    assert len(rows) == len(AXES) + 1
    works, keeps, compared = ({name: cells[i] for name, cells in rows.items()} for i in (3, 5, 7))
    even, dpo, sft, orpo, mapo, scaled, defaults = rows
    assert works[even] == works[dpo] == works[orpo] == "yes" and works[sft] == works[defaults] == "no"
    assert keeps[even] == "yes" and keeps[orpo] == "no"
    assert compared[even].endswith("better") and compared[scaled].endswith("worse")
    assert compared[orpo].endswith("not distinguished")  # it gains more, and loses the subject
    assert compared[mapo].endswith("not distinguished")


def test_a_task_that_is_not_finished_has_no_row():
    runs, bases = results({"even": 0.4}, {})
    del runs[next(run for run in runs if run.split == "test" and run.seed == TEST_SEEDS[-1])]
    assert report("style", runs, bases, 1000).count("\n") == 3 + len(AXES)
    assert report("style", {}, bases, 1000) == "Nothing is finished."
