"""Makes `docs/performance.md` and its plots from the stored results. One command, no measuring.

python benchmarks/performance/report.py
"""

import matplotlib
import numpy as np

from measuring import REPOSITORY, stored
from performance_page import DOCS, MODEL_PARTS, page


matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402


FIGURES = DOCS / "performance"


def draw_growth(growth: dict) -> None:
    """Measured points, and what is linear or flat: fitted, or through the first one."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    titles = {
        "batch": "pairs a step",
        "resolution": "resolution, pixels a side",
        "processes": "processes, each its own pairs",
    }
    for axis, (name, title) in zip(axes, titles.items()):
        x, y = zip(*growth[name])
        axis.plot(x, y, "o-", label="measured")
        work = {"batch": x, "resolution": [side**2 for side in x], "processes": x}[name]
        slope, fixed = np.polyfit(work, y, 1) if name != "processes" else (0, y[0])
        label = {"batch": "linear", "resolution": "linear in pixels"}.get(name)
        label = f"{fixed:.0f} ms, and {label}" if label else "flat"
        axis.plot(x, [fixed + slope * value for value in work], "--", color="gray", label=label)
        axis.set(xlabel=title, ylabel="ms a step", xticks=x, ylim=(0, 1.1 * max(y)))
        axis.legend(fontsize=8, loc="lower right")
    for name in list(growth["data"][0])[1:-1]:
        axes[3].plot([row["pairs"] for row in growth["data"]], [row[name] for row in growth["data"]], "o-", label=name)
    axes[3].set(xscale="log", yscale="log", xlabel="pairs in the data set", ylabel="ms")
    axes[3].legend(fontsize=7)
    save(figure, "growth.png")


def draw_step(profile: dict) -> None:
    """Parts of a mean step, cached and not."""
    figure, axis = plt.subplots(figsize=(9, 3), layout="constrained")
    parts = profile["milliseconds"]
    names = [*MODEL_PARTS, "everything else"]
    rows = list(parts)[::-1]
    values = {
        row: {
            **{name: parts[row][name] for name in MODEL_PARTS},
            "everything else": sum(parts[row].values()) - sum(parts[row][name] for name in MODEL_PARTS),
        }
        for row in rows
    }
    left = dict.fromkeys(rows, 0.0)
    for name, color in zip(names, plt.get_cmap("tab10").colors):
        axis.barh(rows, [values[row][name] for row in rows], left=[left[row] for row in rows], color=color, label=name)
        for row in rows:
            left[row] += values[row][name]
    axis.set(xlabel="ms a step")
    axis.legend(fontsize=8, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, 1.2))
    save(figure, "step.png")


def save(figure, name: str) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / name, dpi=110)
    plt.close(figure)


def main() -> None:
    for draw, name in ((draw_growth, "growth"), (draw_step, "profile_step")):
        if stored(name):
            draw(stored(name))
    (DOCS / "performance.md").write_text(page())
    print(f"Wrote {(DOCS / 'performance.md').relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
