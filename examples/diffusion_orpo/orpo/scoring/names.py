"""Names of scorers, without loading any."""

REWARD_MODEL_NAMES = ("pickscore", "hpsv2", "imagereward", "aesthetic", "clip")
STATISTIC_NAMES = ("saturation", "high_frequency")
BUILT_IN = (*REWARD_MODEL_NAMES, *STATISTIC_NAMES)


def scorer_label(name: str) -> str:
    """A scorer's name in results: a built-in one, or the function's."""
    return name.rpartition(":")[2]


def repeated_label(names) -> str | None:
    """A label that two of these scorers share, if any: results could not tell them apart."""
    labels = [scorer_label(name) for name in names]
    return next((label for label in labels if labels.count(label) > 1), None)
