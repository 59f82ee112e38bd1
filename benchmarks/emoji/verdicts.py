"""Prints the emoji benchmark's verdicts, by the definitions of `PROTOCOL.md`, as tables in Markdown.

python benchmarks/emoji/verdicts.py
"""

import drawings  # noqa: F401, isort: skip

import numpy as np

import protocol
from intervals import estimate, holm
from objectives import OBJECTIVES
from protocol import AXES, KEPT, LONG, STEPS, TASKS, TEST_SEEDS, Run, Setting
from runs import load_results


LEAST_GAIN = 0.10


def values(runs: list[dict], base: dict, name: str, scale: float = 1.0) -> np.ndarray:
    """A measure of runs minus the base's times a scale, (runs, subjects)."""
    return np.array([run[name] for run in runs], dtype=float) - scale * np.array(base[name], dtype=float)


def rows(
    task: str, runs: dict[Run, dict], bases: dict[str, dict], steps: int
) -> dict[str, tuple[Setting, list[dict]]]:
    """Objective to its chosen setting and the runs with the test's seeds; what is not finished is left out."""
    found = {}
    for name in (*AXES, "defaults"):
        if name != "defaults" and protocol.next_tuning(task, name, runs, bases["tuning"]):
            continue
        setting = (
            protocol.DEFAULTS
            if name == "defaults"
            else protocol.choose(task, protocol.tuned(task, name, runs), bases["tuning"])
        )
        wanted = [Run(task, "test", setting, seed, steps) for seed in TEST_SEEDS]
        if all(run in runs for run in wanted):
            found[name] = setting, [runs[run] for run in wanted]
    return found


def report(task: str, runs: dict[Run, dict], bases: dict[str, dict], steps: int) -> str:
    found = rows(task, runs, bases, steps)
    if not found:
        return "Nothing is finished."
    base, gain = bases["test"], protocol.gain_of(task)
    gains = {name: values(own, base, gain) for name, (_, own) in found.items()}
    estimates = {name: estimate(each) for name, each in gains.items()}
    works = dict(zip(found, holm([each.p for each in estimates.values()])))
    kept = {name: estimate(values(own, base, "adherence", KEPT)).low > 0 for name, (_, own) in found.items()}
    over_dpo = {
        name: estimate(each - gains["dpo"]) for name, each in gains.items() if name != "dpo" and "dpo" in gains
    }
    apart = dict(zip(over_dpo, holm([each.p for each in over_dpo.values()])))

    def verdict(name: str) -> str:
        if name not in apart or apart[name] >= 0.05:
            return "" if name == "dpo" else "not distinguished"
        better = over_dpo[name].mean > 0
        ahead, behind = (name, "dpo") if better else ("dpo", name)
        return ("better" if better else "worse") if kept[ahead] or not kept[behind] else "not distinguished"

    lines = [
        f"The base: {gain} {np.mean(base[gain]):.3f}, adherence {np.mean(base['adherence']):.3f}, distance {base['distance']:.2f}.",
        "",
        "| objective | setting | gain | works | adherence | keeps | distance | minus Diffusion-DPO | draws 1, 2 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (setting, own) in found.items():
        label = "the scripts' defaults" if name == "defaults" else OBJECTIVES[name].label
        does = works[name] < 0.05 and estimates[name].mean >= LEAST_GAIN
        draws = " ".join(f"{gains[name][i::2].mean():+.3f}" for i in (0, 1))
        lines.append(
            f"| {label} | {setting.strength:g}, lr {setting.rate:g} | {estimates[name]:+.3f} | {'yes' if does else 'no'} |"
            f" {np.mean([run['adherence'] for run in own]):.3f} | {'yes' if kept[name] else 'no'} |"
            f" {np.mean([run['distance'] for run in own]):.2f} |"
            f" {format(over_dpo[name], '+.3f') if name in over_dpo else ''} {verdict(name)} | {draws} |"
        )
    return "\n".join(lines)


def main() -> None:
    for task in TASKS:
        runs, bases = load_results(task)
        if {"tuning", "test"} <= set(bases):
            for steps in (STEPS, LONG):
                print(f"\n## {task}, {steps} steps\n\n{report(task, runs, bases, steps)}")
        else:
            print(f"\n## {task}\n\nNo test image has been measured.")


if __name__ == "__main__":
    main()
