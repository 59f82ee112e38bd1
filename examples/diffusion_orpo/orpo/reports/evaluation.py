"""The comparison of base and LoRA by their scores: as JSON, as text, and as a page."""

from dataclasses import asdict
from pathlib import Path

from ..generation.images import Request, read_image
from ..scoring.image_statistics import warning
from ..scoring.win_rate import compare_scores
from .page import data_uri, render_page


FEW_PROMPTS = 20  # below, percentile bootstrap intervals are clearly too narrow
STATISTICS_FIELDS = ("mean_base", "mean_lora", "difference", "difference_low", "difference_high")


def make_results(settings: dict, requests: list[Request], scores: dict, statistics: dict, warnings: list[str]) -> dict:
    """The content of `results.json`.

    Args:
        settings: how images were generated; stored as they are.
        requests: the images, prompt by prompt.
        scores, statistics: name to scores of base and LoRA (2, images).
        warnings: reasons to doubt the verdicts.

    Returns:
        `settings`, `num_prompts`, `num_pairs`, `warnings`; `scorers`: name to the fields of a `Comparison`, with its verdict;
        `statistics`: name to means, differences and a warning or None; `pairs`: prompt, seed, image and all scores.
    """
    num_prompts = len(settings["prompts"])
    compared = {
        name: compare_scores(*values.reshape(2, num_prompts, -1)) for name, values in (scores | statistics).items()
    }
    return {
        "settings": settings,
        "num_prompts": num_prompts,
        "num_pairs": len(requests),
        "warnings": warnings,
        "scorers": {name: asdict(compared[name]) | {"verdict": compared[name].verdict} for name in scores},
        "statistics": {
            name: {field: getattr(compared[name], field) for field in STATISTICS_FIELDS}
            | {"warning": warning(name, compared[name].mean_base, compared[name].mean_lora)}
            for name in statistics
        },
        "pairs": [
            {
                "prompt": request.prompt,
                "seed": request.seed,
                "image": request.name,
                "base": {name: float(values[0, i]) for name, values in scores.items()},
                "lora": {name: float(values[1, i]) for name, values in scores.items()},
            }
            for i, request in enumerate(requests)
        ],
    }


def summary(results: dict) -> str:
    """The comparisons as lines of text."""
    lines = [f"{results['num_pairs']} pairs of images of {results['num_prompts']} prompts; intervals are 95 %."]
    lines += [f"Warning: {warning}" for warning in results["warnings"]]
    for name, c in results["scorers"].items():
        lines.append(
            f"{name}: win rate {c['win_rate']:.3f} ({c['win_rate_low']:.3f} to {c['win_rate_high']:.3f}), {c['wins']}"
            f" wins, {c['ties']} ties, {c['losses']} losses; mean {c['mean_base']:.4g} base, {c['mean_lora']:.4g} LoRA,"
            f" difference {c['difference']:+.4g}{_ends(c)}: {c['verdict']}"
        )
    for name, s in results["statistics"].items():
        lines.append(f"{name}: {s['mean_base']:.4g} base, {s['mean_lora']:.4g} LoRA. {s['warning'] or ''}".rstrip())
    if results["num_prompts"] < FEW_PROMPTS:
        lines.append(f"Fewer than {FEW_PROMPTS} prompts: the intervals are too narrow to rely on.")
    return "\n".join(lines)


def _ends(comparison: dict) -> str:
    """The interval of a difference in brackets, where there is one."""
    low, high = comparison["difference_low"], comparison["difference_high"]
    return "" if low is None else f" ({low:+.4g} to {high:+.4g})"


def evaluation_page(results: dict, images: list[tuple[Path, Path]]) -> str:
    """The results as HTML.

    Args:
        results: as `make_results` returns them.
        images: base's and LoRA's image file of each pair.
    """
    pairs = [
        pair | {"base_image": data_uri(read_image(base)), "lora_image": data_uri(read_image(lora))}
        for pair, (base, lora) in zip(results["pairs"], images)
    ]
    enlarged = results["settings"]["resolution"] < 256
    return render_page(
        "evaluation.html", results=results | {"pairs": pairs}, few_prompts=FEW_PROMPTS, enlarged=enlarged
    )
