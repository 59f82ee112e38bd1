"""Puts the examples on the import path: the benchmark trains with their own step and generates with their own sampler."""

import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
sys.path[:0] = [
    str(REPOSITORY),
    str(REPOSITORY / "examples" / "diffusion_orpo"),
    str(REPOSITORY / "examples" / "demo"),
]
