"""A tiny SDXL with random weights and small preference sets, made once per session and offline."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_CBWR", "AUTO")  # as the scripts do, which tests run in a process that has computed already
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from helpers import face_rows, write_parquet

from tiny_sdxl import build_tiny_sdxl


torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """No test writes into the user's own cache of data sets."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets-cache")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> str:
    """Folder of the pipeline."""
    folder = tmp_path_factory.mktemp("tiny-sdxl")
    build_tiny_sdxl(["red", "ball", "face"], channels=(16, 32)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> str:
    """Folder with 24 pairs and 4 ties of smiling winners, in one parquet file."""
    folder = tmp_path_factory.mktemp("faces")
    write_parquet(folder, face_rows(28))
    return str(folder)


@pytest.fixture(scope="session")
def demo_base() -> str:
    """Folder of the demo's trained model."""
    return str(Path(__file__).parent.parent / "examples" / "demo" / "base")


@pytest.fixture
def output_dir(tmp_path) -> Path:
    return tmp_path / "lora"
