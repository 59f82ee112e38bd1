"""A report of preferences as text for a terminal."""

from ..runtime.messages import printable


BAR = 30  # characters


def render(report: dict) -> str:
    """The report as lines.

    Args:
        report: what `check_preferences.py` writes to report.json.
    """
    verdict = "Training would accept it." if report["accepted"] else f"Training would refuse it: {report['reason']}"
    sections = [[f"{report['data']}: {verdict}"]]
    if "rows" in report:
        sections += [_counts(report), _problems(report)]
        sections += [_histograms(report["images"])] if report["pairs"] else []
        sections.append(_scorers(report["scorers"]) if "scorers" in report else [])
        sections.append([f"! {note}" for note in report["notes"]])
        sections.append(_filtered(report["filtered"]) if "filtered" in report else [])
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _counts(report: dict) -> list[str]:
    labels, prompts, repeated = report["labels"], report["prompts"], report["repeated"]
    used = ", ".join(report["columns"]["used"])
    unused = f" (not used: {', '.join(report['columns']['unused'])})" if report["columns"]["unused"] else ""
    low = f", {labels['low_agreement']:,} of low agreement" if labels["low_agreement"] else ""
    most_used = repeated["most_used_images"]
    entries = {
        "columns": used + unused,
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
        entries["tokens"] = "not counted: give --pretrained_model_name_or_path"
    return [f"{name:<14} {text}" for name, text in entries.items()]


def _tokens(tokens: dict) -> str:
    if tokens["longest"] is None:
        return "no prompts"
    limit = f"{tokens['cut']:,} over the limit of {tokens['limit']}" if tokens["limit"] else "no limit"
    return f"median {tokens['median']:g} tokens, longest {tokens['longest']}, {limit}"


def _groups(groups: dict, sign: str) -> str:
    shown = "; ".join(sign.join(reversed(group)) for group in groups["first"][:3])
    return f"{groups['count']:,}" + (f" ({shown}{', ...' if groups['count'] > 3 else ''})" if shown else "")


def _problems(report: dict) -> list[str]:
    lines = []
    for problem in report["problems"]:
        what_to_do = f": {problem['what_to_do']}" if problem["what_to_do"] else ""
        lines.append(f"{problem['count']:,} x {problem['kind']}{what_to_do}")
        lines += [f"    {message}" for message in problem["first"]]
        rest = problem["count"] - len(problem["first"])
        lines += [f"    and {rest:,} more"] if rest else []
    return lines


def _scorers(found: dict) -> list[str]:
    lines = [f"agreement with the labels, of {found['pairs']:,} pairs (95 % interval over prompts)"]
    for name, share in found["scorers"].items():
        lines.append(f"{printable(name):<20} {share['agree']:>6.1%}  ({share['low']:.1%} to {share['high']:.1%})")
    if len(found["scorers"]) > 1:
        lines.append(f"all of them {found['all_agree']:.1%}, none of them {found['none_agrees']:.1%}")
    return lines


def _filtered(found: dict) -> list[str]:
    left_out = ", ".join(f"{number:,} {what}" for what, number in found["left_out"].items() if number) or "nothing"
    return [f"{found['file']}: {found['pairs']:,} pairs. Left out: {left_out}."]


def _histograms(images: dict) -> list[str]:
    shorter, aspect = images["shorter_side"], images["aspect"]
    bounds = [f"{bound}" for bound in shorter["bounds"]]
    side_names = [
        f"under {bounds[0]}",
        *(f"{a} to {int(b) - 1}" for a, b in zip(bounds, bounds[1:])),
        f"{bounds[-1]} on",
    ]
    aspect_names = [
        "below 1:2",
        "1:2 to 2:3",
        "2:3 to 4:5",
        "4:5 to 1:1",
        "1:1",
        "1:1 to 5:4",
        "5:4 to 3:2",
        "3:2 to 2:1",
    ]
    return [
        *_bars("shorter side, pixels", side_names, shorter),
        "",
        *_bars("width : height", [*aspect_names, "2:1 on"], aspect),
    ]


def _bars(title: str, names: list[str], histogram: dict) -> list[str]:
    """A table of winners and losers, with a bar for both together."""
    rows = [(n, w, l) for n, w, l in zip(names, histogram["winners"], histogram["losers"]) if w + l]
    most = max(winners + losers for _, winners, losers in rows)
    lines = [f"{title:<20} {'winners':>9} {'losers':>9}"]
    for name, winners, losers in rows:
        bar = "█" * max(1, round(BAR * (winners + losers) / most))
        lines.append(f"{printable(name):<20} {winners:>9,} {losers:>9,} {bar}")
    return lines
