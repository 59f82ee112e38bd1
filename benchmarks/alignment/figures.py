"""The page's figures."""

import matplotlib
import numpy as np

import paths
from comparison import TITLES, Comparison
from compass import points
from objectives import OBJECTIVES
from plan import LONG_MARK
from search import FINAL_MARKS
from store import Run


matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402


FIGURES = paths.REPOSITORY / "docs" / "results"
COLORS = dict(zip(OBJECTIVES, ("#7f7f7f", "#2ca02c", "#1f77b4", "#9467bd", "#ff7f0e")))


def draw_frontier(worlds: dict[str, Comparison]) -> None:
    """Every setting of the search at every step: gain against prompt-following, and against distance."""
    figure, axes = plt.subplots(2, len(worlds), figsize=(5.5 * len(worlds), 7.5), layout="constrained", squeeze=False)
    for (above, below), c in zip(axes.T, worlds.values()):
        base = c.base["splits"]["validation"]
        for name in OBJECTIVES:
            found = [(run, step) for run in c.settings(name) for step in run.evaluations]
            gains = [c.gain(run, step) for run, step in found]
            style = {
                "color": COLORS[name],
                "s": 40 if name == "orpo" else 22,
                "marker": "*" if name == "orpo" else "o",
            }
            above.scatter(
                [run.mean(step, "follows") for run, step in found], gains, label=OBJECTIVES[name].label, **style
            )
            below.scatter([run.evaluations[step]["distance"] for run, step in found], gains, **style)
        above.scatter(np.mean(base["follows"]), 0, color="black", marker="x", label="base")
        below.scatter(base["distance"], 0, color="black", marker="x")
        above.axvline(c.needed, color="black", linewidth=0.7, linestyle=":")
        above.set(title=TITLES[c.world], xlabel="share of images that show what was asked", ylabel="gain in reward")
        below.set(xlabel="distance to real images", ylabel="gain in reward", xscale="log")
    axes[0, 0].legend(fontsize=8)
    save(figure, "frontier.png")


def draw_curves(worlds: dict[str, Comparison]) -> None:
    """Gain, prompt-following, distance and held-out accuracy by step: each objective at its own best, test images."""
    fields = {
        "rewards": "gain in reward",
        "follows": "follows prompt",
        "distance": "distance",
        "accuracy": "held-out accuracy",
    }
    figure, axes = plt.subplots(
        len(worlds), len(fields), figsize=(11, 3.2 * len(worlds)), layout="constrained", squeeze=False
    )
    for row, c in zip(axes, worlds.values()):
        for name in OBJECTIVES:
            runs = c.tests(name)
            marks = (
                (*FINAL_MARKS, LONG_MARK) if runs and all(LONG_MARK in r.evaluations for r in runs) else FINAL_MARKS
            )
            for axis, field in zip(row, fields):
                if runs:
                    axis.plot(
                        marks,
                        [mean_of_tests(c, runs, s, field) for s in marks],
                        color=COLORS[name],
                        marker=".",
                        label=OBJECTIVES[name].label,
                    )
        for axis, text in zip(row, fields.values()):
            axis.set(title=text, xscale="log", xlabel="steps of 16 pairs")
        row[0].set(ylabel=TITLES[c.world])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    save(figure, "curves.png")


def mean_of_tests(c: Comparison, runs: list[Run], step: int, field: str) -> float:
    """Of what is measured by image over the images that count, of what is measured by run over the runs."""
    if field in ("rewards", "follows"):
        return c.estimate(runs, step, field).mean
    return float(np.mean([run.evaluations[step][field] for run in runs]))


def draw_compass(worlds: dict[str, Comparison]) -> None:
    """Held-out accuracy against gain: every setting and step of the search."""
    figure, axes = plt.subplots(1, len(worlds), figsize=(5 * len(worlds), 4), layout="constrained", squeeze=False)
    for axis, c in zip(axes[0], worlds.values()):
        for name in OBJECTIVES:
            found = points(c, name)
            axis.scatter(
                [p.accuracy for p in found],
                [p.gain for p in found],
                color=COLORS[name],
                s=18,
                label=OBJECTIVES[name].label,
            )
        axis.set(title=TITLES[c.world], xlabel="held-out accuracy", ylabel="gain in reward")
    axes[0, 0].legend(fontsize=8)
    save(figure, "compass.png")


def save(figure, name: str) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / name, dpi=100)
    plt.close(figure)
