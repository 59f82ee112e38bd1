"""The report of a check, as text and as a page."""

from ..pairs.image import decode_image
from ..pairs.pair import PreferencePair
from ..runtime.messages import printable
from .page import data_uri, render_page


ASPECTS = (
    "below 1:2, 1:2 to 2:3, 2:3 to 4:5, 4:5 to 1:1, 1:1, 1:1 to 5:4, 5:4 to 3:2, 3:2 to 2:1, 2:1 and above".split(", ")
)


def summary(report: dict) -> str:
    """The report for a terminal.

    Args:
        report: what `check_preferences.py` writes to report.json.
    """
    counts = [f"{name:<14} {text}" for name, text in _counts(report).items()]
    notes = [f"! {note}" for note in report.get("notes", [])]
    sections = [[f"{report['data']}: {_verdict(report)}"], counts, *_details(report).values(), notes]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def check_page(report: dict, pairs: list[tuple[str, PreferencePair]]) -> str:
    """The report and some of its pairs as HTML.

    Args:
        report: as for `summary`.
        pairs: with their names.
    """
    shown, sizes = [], []
    for where, pair in pairs:
        images = [decode_image(encoded, where) for encoded in (pair.winner, pair.loser)]
        sizes += [image.size for image in images]
        chosen, rejected = ({"source": data_uri(image), "size": "{} x {}".format(*image.size)} for image in images)
        shown.append({"where": where, "prompt": pair.prompt, "chosen": chosen, "rejected": rejected})
    return render_page(
        "check.html",
        report=report,
        verdict=_verdict(report),
        counts=_counts(report),
        details=_details(report),
        sizes=_sizes(report["images"]) if report.get("pairs") else {},
        pairs=shown,
        enlarged=bool(sizes) and max(map(max, sizes)) < 256,
    )


def _verdict(report: dict) -> str:
    return "Training would accept it." if report["accepted"] else f"Training would refuse it: {report['reason']}"


def _counts(report: dict) -> dict[str, str]:
    if "rows" not in report:
        return {}
    labels, prompts, repeated = report["labels"], report["prompts"], report["repeated"]
    used, unused = (", ".join(report["columns"][name]) for name in ("used", "unused"))
    low = f", {labels['low_agreement']:,} of low agreement" if labels["low_agreement"] else ""
    most_used = repeated["most_used_images"]
    counts = {
        "columns": used + (f" (not used: {unused})" if unused else ""),
        "rows": f"{report['rows']:,}: {report['pairs']:,} pairs, {labels['ties']:,} ties{low}, {report['bad_rows']:,} bad",
        "labels": "chosen is preferred"
        if used.startswith("chosen")
        else f"first image preferred {labels['first_preferred']:,}, second {labels['second_preferred']:,}, tie"
        f" {labels['ties']:,}, bad {labels['bad']:,}",
        "prompts": f"{prompts['different']:,} different, {prompts['empty']:,} empty",
        **{name: _tokens(tokens) for name, tokens in prompts["tokens"].items()},
        "images": f"{repeated['different_images']:,} different"
        + (f", the most used in {most_used[0]['pairs']:,} pairs ({most_used[0]['first']})" if most_used else ""),
        "formats": "; ".join(
            f"{side} " + ", ".join(f"{name} {count:,}" for name, count in formats.items())
            for side, formats in report["images"]["formats"].items()
        ),
        "cut away": "{square:.0%} of the images' area in squares, {buckets:.0%} in aspect-ratio buckets".format(
            **report["images"]["cut_away"]
        ),
        "duplicates": _groups(repeated["duplicates"], " = "),
        "contradicting": _groups(repeated["contradictions"], " against "),
    }
    if not prompts["tokens"]:
        counts["tokens"] = "not counted: give --pretrained_model_name_or_path"
    return counts


def _tokens(tokens: dict) -> str:
    if tokens["longest"] is None:
        return "no prompts"
    limit = f"{tokens['cut']:,} over the limit of {tokens['limit']}" if tokens["limit"] else "no limit"
    return f"median {tokens['median']:g} tokens, longest {tokens['longest']}, {limit}"


def _groups(groups: dict, sign: str) -> str:
    shown = "; ".join(sign.join(reversed(group)) for group in groups["first"][:3])
    return f"{groups['count']:,}" + (f" ({shown}{', ...' if groups['count'] > 3 else ''})" if shown else "")


def _details(report: dict) -> dict[str, list[str]]:
    """Sections, each of some lines."""
    problems = []
    for problem in report.get("problems", []):
        what_to_do = f": {problem['what_to_do']}" if problem["what_to_do"] else ""
        problems.append(f"{problem['count']:,} x {problem['kind']}{what_to_do}")
        problems += [f"    {message}" for message in problem["first"]]
        rest = problem["count"] - len(problem["first"])
        problems += [f"    and {rest:,} more"] if rest else []
    scorers, copy = [], []
    if found := report.get("scorers"):
        scorers.append(f"agreement with the labels, of {found['pairs']:,} pairs (95 % interval over prompts)")
        for name, share in found["scorers"].items():
            ends = f"({share['low']:.1%} to {share['high']:.1%})"
            scorers.append(f"{printable(name):<20} {share['agree']:>6.1%}  {ends}")
        if len(found["scorers"]) > 1:
            scorers.append(f"all of them {found['all_agree']:.1%}, none of them {found['none_agrees']:.1%}")
    if found := report.get("filtered"):
        skipped = ", ".join(f"{number:,} {reason}" for reason, number in found["skipped"].items() if number)
        copy.append(f"{found['file']}: {found['pairs']:,} pairs. Skipped: {skipped or 'nothing'}.")
    return {"Problems": problems, "Scorers": scorers, "Filtered copy": copy}


def _sizes(images: dict) -> dict[str, list[tuple[str, int, int]]]:
    """Tables of the chosen and the rejected images in each range."""
    bounds = images["shorter_side"]["bounds"]
    between = [f"{low} to {high - 1}" for low, high in zip(bounds, bounds[1:])]
    tables = {
        "Shorter side, pixels": ([f"below {bounds[0]}", *between, f"{bounds[-1]} and above"], images["shorter_side"]),
        "Width : height": (ASPECTS, images["aspect"]),
    }
    return {
        title: [row for row in zip(names, found["chosen"], found["rejected"]) if row[1] + row[2]]
        for title, (names, found) in tables.items()
    }
