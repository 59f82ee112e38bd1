"""Training jobs of one or two processes that can be killed at a chosen instant. What the campaigns in this folder share.

A job is forked from a process that has imported everything and done nothing yet, since importing takes ten times as
long as a job. From there on it is the real script with its real flags, in processes of its own.
"""

import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"ACCELERATE_USE_CPU": "1", "HF_DATASETS_CACHE": tempfile.mkdtemp(prefix="datasets-cache-")}
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "examples/diffusion_orpo", "examples/demo")]

from helpers import arguments, face_rows, write_parquet, write_shards  # noqa: E402
from orpo.training.checkpoint import list_checkpoints, verify  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

import train_diffusion_orpo_sdxl_lora  # noqa: E402
import train_diffusion_orpo_sdxl_lora_wds  # noqa: E402
from tiny_sdxl import build_tiny_sdxl  # noqa: E402


LIMIT = 1800  # seconds after which a job counts as hanging, also on a busy machine
# A checkpoint after every step, two kept, dropout, a schedule and validation: everything that a checkpoint must restore.
FLAGS = {
    "max_train_steps": 6,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 2,
    "lora_dropout": 0.2,
    "lr_scheduler": "cosine",
    "random_flip": True,
    "run_validation": True,
    "num_validation_pairs": 2,
    "validation_prompts": ["red"],
    "validation_inference_steps": 1,
    "validation_steps": 3,
    "report_to": "tensorboard",
    "resume_from_checkpoint": "latest",
}


@dataclass(frozen=True)
class Configuration:
    """Where pairs come from, and how many processes train."""

    source: str  # "map" or "shards"
    processes: int

    def __str__(self) -> str:
        return f"{self.source}, {self.processes} process{'es' if self.processes > 1 else ''}"


@dataclass
class Killed:
    """Kills at the `count`-th file-system call of a kind.

    Attributes:
        kind: of `kind_of`.
        count: from 1.
        rank: whose calls are counted.
        alone: whether that process dies alone, or all of the job at once.
    """

    kind: str
    count: int
    rank: int = 0
    alone: bool = False


@dataclass
class Outcome:
    """Exit statuses by rank, negative for the signal that ended a process; what was printed; kinds of calls made."""

    statuses: list[int]
    output: str
    calls: list[str]
    seconds: float = 0.0

    @property
    def was_killed(self) -> bool:
        return -signal.SIGKILL in self.statuses


def in_child(function: Callable[[], None]) -> None:
    """Runs a function in a forked process, so that this one starts no threads, and waits for it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def make_inputs(folder: Path) -> None:
    """A tiny SDXL, and the same pairs as parquet and as shards."""

    def make() -> None:
        build_tiny_sdxl(["red", "ball", "face"], channels=(16, 32)).save_pretrained(folder / "model")
        write_parquet(folder / "map", face_rows(20, ties=0))
        write_shards(folder / "shards", face_rows(20, ties=0), per_shard=5)

    in_child(make)


def command_line(configuration: Configuration, inputs: Path, output_dir: Path, **flags) -> list[str]:
    data = {"dataset_path": inputs / "shards"} if configuration.source == "shards" else {}
    pairs = None if data else inputs / "map"
    return arguments(inputs / "model", pairs, output_dir, **FLAGS | data | flags)


def start(configuration: Configuration, line: list[str], output_dir: Path, killed: Killed | None = None) -> list[int]:
    """Forks a job's processes, all in one process group, and returns their identifiers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output_dir.mkdir(parents=True, exist_ok=True)
    pids: list[int] = []
    for rank in range(configuration.processes):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": configuration.processes}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            if configuration.processes > 1:
                os.environ.update({name: str(value) for name, value in environment.items()})
            run_in_this_process(configuration, line, output_dir, killed if killed and killed.rank == rank else None)
        with suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return pids


def run_in_this_process(configuration, line: list[str], output_dir: Path, killed: Killed | None) -> None:
    log = os.open(f"{output_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    watch_calls(output_dir, killed)
    script = train_diffusion_orpo_sdxl_lora_wds if configuration.source == "shards" else train_diffusion_orpo_sdxl_lora
    status = 1
    try:
        status = script.main(line)
    except SystemExit as error:
        status = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def watch_calls(output_dir: Path, killed: Killed | None) -> None:
    """Writes the kind of each file-system call on checkpoints and output into a file, and dies at the given one.

    Audit events are raised before the call is made, so a process killed at one has made all calls before it.
    """
    seen = 0
    record = os.open(f"{output_dir}.calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        kind = kind_of(event, args, output_dir)
        if kind is None:
            return
        os.write(record, f"{kind}\n".encode())
        if killed is not None and kind == killed.kind:
            seen += 1
            if seen == killed.count:
                (os.kill if killed.alone else os.killpg)(os.getpid() if killed.alone else 0, signal.SIGKILL)
                time.sleep(60)

    sys.addaudithook(hook)


def kind_of(event: str, args: tuple, output_dir: Path) -> str | None:
    """What a file-system call does for checkpoints and output; None for all else."""
    if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") or not isinstance(args[0], str):
        return None
    path = args[0]
    if event in ("os.remove", "os.rmdir") and args[1] >= 0:  # relative to an open folder
        path = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), path)
    name = os.path.relpath(path, output_dir)
    if re.match(r"\.checkpoint-\d+\.partial", name):
        return {"os.mkdir": "begin checkpoint", "os.rename": "name checkpoint"}.get(event, "write checkpoint")
    if re.match(r"checkpoint-\d+$", name) and event == "os.rename":
        return "unname outdated"
    if ".removed" in name and event in ("os.remove", "os.rmdir"):
        return "remove outdated"
    if name.startswith(".output.partial"):
        return {"os.rename": "place output", "os.rmdir": "tidy output", "os.remove": "tidy output"}.get(
            event, "write output"
        )
    return "sync folder" if name == "." and event == "open" else None


def finish(pids: list[int], output_dir: Path) -> Outcome:
    """Waits for a job that must end by itself within `LIMIT` seconds.

    Raises:
        TimeoutError: it does not.
    """
    statuses: dict[int, int] = {}
    end = time.monotonic() + LIMIT
    while len(statuses) < len(pids):
        for pid in set(pids) - statuses.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            kill_all(pids)
            raise TimeoutError(f"The job hung; ended by then: {statuses}. See {output_dir}.log")
        time.sleep(0.01)
    output, calls = (Path(f"{output_dir}{suffix}").read_text(errors="replace") for suffix in (".log", ".calls"))
    return Outcome([statuses[pid] for pid in pids], output, calls.splitlines())


def run(
    configuration: Configuration,
    inputs: Path,
    output_dir: Path,
    killed: Killed | None = None,
    after: float | Callable[[], bool] | None = None,
    strike: Callable[[list[int]], None] | None = None,
    **flags,
) -> Outcome:
    """Runs a job to its end.

    Args:
        configuration, inputs, output_dir: the job.
        killed: at which call it kills itself.
        after: seconds, or what must have become true, until `strike` is called with the processes.
        strike: by default, kills them all.
        flags: of the script, beside `FLAGS`.
    """
    for suffix in (".log", ".calls"):
        Path(f"{output_dir}{suffix}").write_text("")
    started = time.monotonic()
    pids = start(configuration, command_line(configuration, inputs, output_dir, **flags), output_dir, killed)
    if callable(after):
        while not after() and time.monotonic() < started + LIMIT:
            time.sleep(0.005)
    elif after is not None:
        time.sleep(after)
    if after is not None:
        with suppress(ProcessLookupError):
            (strike or kill_all)(pids)
    outcome = finish(pids, output_dir)
    outcome.seconds = time.monotonic() - started
    return outcome


def kill_all(pids: list[int]) -> None:
    os.killpg(pids[0], signal.SIGKILL)


def same_tensors(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def newest_good(output_dir: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none. Every checkpoint must be whole."""
    checkpoints = list_checkpoints(output_dir)
    for checkpoint in checkpoints:
        verify(checkpoint)
    return int(checkpoints[-1].name.split("-")[1]) if checkpoints else 0
