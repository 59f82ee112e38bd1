"""A tiny SDXL with random weights and small preference sets, made once per session and offline."""

import gc
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_CBWR", "AUTO")  # as the scripts do, which tests run in a process that has computed already
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from helpers import face_rows, write_parquet


torch.set_num_threads(1)


def pytest_collection_finish():
    """What is imported by now lives as long as the process: each run's `free_memory` need not walk it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """No test writes into the user's own cache of datasets."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets-cache")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)


@pytest.fixture(scope="session")
def ray() -> dict[str, str]:
    """One Ray for all conversions of a test process, and an S3 on loopback that its workers know; the variables that say so."""
    from moto.server import ThreadedMotoServer
    from orpo.store.convert import ray_session

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing")
    variables |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            stack.enter_context(ray_session(None))
        yield variables
    server.stop()


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> "TinyModels":  # noqa: F821
    """`models[name]` is the folder of a family's tiny pipeline, made at first use for all workers. Nobody writes into it."""
    from families import TinyModels  # takes seconds, and most tests need none

    folder = tmp_path_factory.getbasetemp()
    return TinyModels((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "tiny-models")


@pytest.fixture(scope="session")
def tiny_sdxl(models) -> str:
    """Folder of the pipeline."""
    return models["sdxl"]


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


@pytest.fixture(scope="session")
def browse():
    """Opens a page in a real browser, takes steps, and returns what `browser.py` prints."""
    probe = [sys.executable, "-c", "from PySide6 import QtWebEngineWidgets"]
    imported = subprocess.run(probe, capture_output=True, text=True)
    if imported.returncode != 0:
        pytest.skip(f"Qt WebEngine can't be loaded here: {imported.stderr.strip().splitlines()[-1]}")

    def browse(page: Path | str, *steps: dict, color_scheme: str = "1") -> dict:
        command = [
            sys.executable,
            str(Path(__file__).with_name("browser.py")),
            str(page),
            json.dumps(steps),
            color_scheme,
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        return json.loads(result.stdout.splitlines()[-1])

    return browse
