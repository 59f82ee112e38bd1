"""Makes the results page, its figures and the README's table from the stored results. One command, no training.

python benchmarks/alignment/report.py
"""

import json
import re
from pathlib import Path
from string import Template

import compass
import figures
import paths
import tables
from claims import in_short, is_compared, seeds
from comparison import TITLES, Comparison
from edges import edge_table
from first import First
from objectives import OBJECTIVES
from plan import WORLDS
from rounds import load_rounds
from store import RESULTS


PAGE = paths.REPOSITORY / "docs" / "results.md"
README = paths.REPOSITORY / "README.md"
OWN = paths.REPOSITORY / "docs" / "own_preferences.md"


def readme_part(worlds: dict[str, Comparison], first: dict[str, First], cost: dict) -> str:
    """What the README shows: the comparison once it has been run in a world, until then the first one, and which it is."""
    header = ["objective", *(f"{TITLES[world]}: gain in reward" for world in WORLDS), "time of a step"]
    lines = []
    for name in ("sft", "earlier", "scaled", "mapo", "dpo", "orpo"):
        cells = []
        for world in WORLDS:
            c = worlds[world]
            if not is_compared(c):
                cells.append(f"{first[world].gain(name):+.2f}")
            elif name in OBJECTIVES:
                cells.append(f"{c.estimate(c.tests(name), c.choices[name].step):+.2f}")
            else:
                cells.append("not run")
        lines.append([tables.label(name), *cells, f"{cost[name]['time']:.2f}"])
    return f"{tables.rows(header, lines)}\n\n{readme_note(worlds)}"


def readme_note(worlds: dict[str, Comparison]) -> str:
    """Which runs the README's table shows."""
    compared = [c for c in worlds.values() if is_compared(c)]
    new = [note_on(compared)] if compared else []
    old = [TITLES[world] for world in WORLDS if not is_compared(worlds[world])]
    if not old:
        return "\n".join(new)
    where = "These are" if not new else f"On {' and '.join(old)} these are"
    first = (
        f"{where} the first comparison's numbers: five seeds, 200 steps and six settings for each objective,\n"
        "some of them best at the edge of what was tried, and on the digits ORPO's gain costs prompt-following. A search without\n"
        "these limits is under way. How far it has got, and what these numbers don't show, is in the first lines of\n"
        "[docs/results.md](docs/results.md)."
    )
    return "\n".join([*new, first])


def note_on(compared: list[Comparison]) -> str:
    """How these columns of the README's table came about."""
    ours = [
        f"{tables.setting('orpo', c.choices['orpo'])}, {c.choices['orpo'].step} steps on {TITLES[c.world]}, {seeds(c)} seeds"
        for c in compared
    ]
    return (
        f"On {' and '.join(TITLES[c.world] for c in compared)} each objective has its own strength, learning rate and number of\n"
        f"steps, found by one search (ORPO: {'; '.join(ours)})."
    )


def values_of_page(worlds: dict[str, Comparison], first: dict[str, First], cost: dict) -> dict[str, str]:
    """What the page's template asks for."""
    values = {
        "in_short": in_short(worlds, first, cost),
        "completeness": tables.completeness(worlds),
        "first": tables.first_table(first),
        "cost": tables.cost_table(cost),
        "flips": tables.flip_table(worlds["prompt"]),
        "votes": tables.vote_table(worlds["prompt"]),
        "variants": tables.variant_table(worlds["prompt"]),
        "compass": compass_table(worlds),
        "edges": edge_table(),
    }
    for world, c in worlds.items():
        values |= {
            f"test_{world}": tables.test_table(c, cost),
            f"kept_{world}": tables.kept_table(c),
            f"search_{world}": tables.search_table(c),
            f"finals_{world}": tables.finals_table(c),
            f"settings_{world}": tables.all_settings(c),
            f"noise_{world}": f"{c.base['noise']:.0%}",
            f"long_{world}": tables.long_table(c),
            f"betas_{world}": tables.beta_table(c),
        }
    return values


def compass_table(worlds: dict[str, Comparison]) -> str:
    """By world and objective: correlation, and what choosing by accuracy alone gets."""
    lines = []
    for world, c in worlds.items():
        for name in OBJECTIVES:
            found, price = compass.points(c, name), compass.price(c, name)
            if price and len(found) >= 12:
                correlation = f"{compass.correlation(found):.2f}"
                lines.append(
                    [TITLES[world], tables.label(name), str(len(found)), correlation, *(f"{p:+.2f}" for p in price)]
                )
    header = ["world", "objective", "points", "r", "gain, chosen by accuracy", "best gain"]
    return tables.rows(header, lines) if lines else tables.NOT_YET


def load() -> tuple[dict[str, Comparison], dict[str, First], dict]:
    cost = json.loads((RESULTS / "cost.json").read_text())
    return {world: Comparison(world) for world in WORLDS}, {world: First(world) for world in WORLDS}, cost


def pages() -> dict[Path, str]:
    """The current text of every page that holds results."""
    worlds, first, cost = load()
    page = Template((paths.HERE / "results_page.template").read_text()).substitute(values_of_page(worlds, first, cost))
    readme = between(README.read_text(), "alignment", readme_part(worlds, first, cost))
    rounds = tables.rounds_table(worlds["smile"], load_rounds())
    return {PAGE: page, README: readme, OWN: between(OWN.read_text(), "rounds", rounds)}


def between(text: str, name: str, part: str) -> str:
    """The text with this part between its two marks."""
    marks = rf"(<!-- {name} -->\n).*(<!-- /{name} -->)"
    return re.sub(marks, lambda m: f"{m[1]}{part}\n{m[2]}", text, flags=re.DOTALL)


def main() -> None:
    worlds, _, _ = load()
    begun = {world: c for world, c in worlds.items() if any(c.settings(name) for name in OBJECTIVES)}
    figures.draw_frontier(begun)
    figures.draw_compass(begun)
    if compared := {world: c for world, c in begun.items() if is_compared(c)}:
        figures.draw_curves(compared)
    for page, text in pages().items():
        page.write_text(text)
        print(f"Wrote {page.relative_to(paths.REPOSITORY)}")


if __name__ == "__main__":
    main()
