"""A Ray cluster of two nodes that ask for a token: two raylets on loopback, which know nothing of this folder."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers import face_rows, write_parquet
from orpo.store.folder import read_manifest

import convert_to_webdataset


pytestmark = pytest.mark.campaign
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("RAY_")
}
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}


def end(process: subprocess.Popen) -> None:
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> str:
    """The address; both nodes work in a folder of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder = tmp_path_factory.mktemp("ray")
    common = ["--block", "--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
    head = ["--head", f"--port={address.split(':')[1]}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    worker = [f"--address={address}", "--node-ip-address=127.0.0.2"]
    nodes = []
    try:
        for flags in ([*head, f"--temp-dir=/tmp/orpo-ray-{os.getpid()}"], worker):
            log = open(folder / f"{len(nodes)}.log", "w+")
            line = [*RAY, "start", *flags, *common]
            nodes.append(
                subprocess.Popen(
                    line, cwd=folder, env=ENVIRONMENT | TOKEN, stdout=log, stderr=log, start_new_session=True
                )
            )
            for _ in range(600):
                if "Ray runtime started" in Path(log.name).read_text():
                    break
                try:
                    nodes[-1].wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
                pytest.fail(Path(log.name).read_text())
        yield address
    finally:
        for node in reversed(nodes):
            end(node)


def convert(folder: Path, *flags: str, token: dict = TOKEN) -> subprocess.CompletedProcess:
    line = [sys.executable, convert_to_webdataset.__file__, *flags]
    return subprocess.run(line, cwd=folder, env=ENVIRONMENT | token, capture_output=True, text=True)


@pytest.mark.parametrize("encode", [False, True])
def test_both_nodes_convert_and_encode(cluster, tiny_sdxl, tmp_path, encode):
    write_parquet(tmp_path / "data", face_rows(12, ties=0))
    flags = [f"--dataset_name={tmp_path / 'data'}", f"--output_dir={tmp_path / 'out'}", "--shard_size_mb=0.005"]
    if encode:
        flags += ["--encode", f"--pretrained_model_name_or_path={tiny_sdxl}", "--resolution=64"]
    result = convert(tmp_path, *flags, f"--ray_address={cluster}")
    assert result.returncode == 0, result.stderr[-3000:]
    manifest = read_manifest(str(tmp_path / "out"))
    assert len(manifest.shards) > 2 and sum(shard.samples for shard in manifest.shards) == 12
    assert bool(manifest.encodings) == encode


def test_a_missing_token_is_explained(cluster, tmp_path):
    write_parquet(tmp_path / "data", face_rows(4, ties=0))
    flags = [f"--dataset_name={tmp_path / 'data'}", f"--output_dir={tmp_path / 'out'}", f"--ray_address={cluster}"]
    result = convert(tmp_path, *flags, token={"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"})
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and f"--ray_address={cluster} can't be used" in last and "RAY_AUTH_TOKEN" in last
