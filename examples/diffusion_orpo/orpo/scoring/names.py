"""Names of scorers, without loading any."""

REWARD_MODEL_NAMES = ("pickscore", "hpsv2", "imagereward", "aesthetic", "clip")
STATISTIC_NAMES = ("saturation", "high_frequency")
BUILT_IN = (*REWARD_MODEL_NAMES, *STATISTIC_NAMES)


def scorer_label(name: str) -> str:
    """A scorer's name in results: a built-in one, or the function's."""
    return name.rpartition(":")[2]
