"""How many processes are worth starting."""

import os


def num_cores() -> int:
    """Processor cores that this process may use: on a shared node, those that the job was given."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
