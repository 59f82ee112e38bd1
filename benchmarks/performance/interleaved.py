"""A run of the training loop itself, in which the variants to compare take turns.

`training.train` is handed a data source that gives batches of several sources in turn, notes when the loop comes back for
the next one, and then lets others work. So a step's time is that of all the loop does for it, loading included, and
whatever slows this machine down for a while slows all sides down.
"""

import argparse
import io
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path


import measuring  # isort: skip

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Value
from orpo.cli import encode_pairs
from orpo.config import TrainingConfig
from orpo.models.sdxl import StableDiffusionXL
from orpo.pairs.dataset import DataOptions, load_pairs
from orpo.training import run as training
from orpo.training.trainer import Trainer
from PIL import Image

import scaled_sdxl
from measuring import DEVICE, clock
from train_diffusion_orpo_sdxl_lora import parse_args


WARM_UP = 2  # rounds that are not counted
PAIRS = 32  # in the dataset


@dataclass
class Interleaved:
    """Batches of several sources in turn.

    Attributes:
        sources: what gives batches, by name: as `PreferenceData` does.
        between: is called after each step, with the source's name and the batch.
        times: seconds of each step, from asking for the batch to asking for the next one, by source.
    """

    sources: dict
    between: Callable[[str, dict], None] = lambda name, batch: None
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    num_pairs, fingerprint, position, problems = PAIRS, "", {}, {}

    def __str__(self) -> str:
        return f"{', '.join(self.sources)} in turn"

    def pairs_of(self, *args) -> int:
        return PAIRS

    def training_batches(self, *args) -> "Interleaved":
        self.batches = {name: iter(source.training_batches(*args)) for name, source in self.sources.items()}
        return self

    def __iter__(self) -> Iterator[dict]:
        for name in cycle(self.batches):
            started = clock()
            batch = next(self.batches[name])
            yield batch
            self.times[name].append(clock() - started)
            self.between(name, batch)


def photograph(size: int, rng: np.random.Generator) -> bytes:
    """A JPEG with coarse and fine detail."""
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse) * 0.8 + rng.normal(25, 8, (size, size, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_pairs(folder: Path, size: int, count: int = PAIRS) -> str:
    """Writes a dataset of pairs of photographs to a folder."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "jpg_0": photograph(size, rng),
            "jpg_1": photograph(size, rng),
            "label_0": float(i % 2),
            "caption": f"a photograph of number {i}",
        }
        for i in range(count)
    ]
    features = Features(
        jpg_0=Value("binary"), jpg_1=Value("binary"), label_0=Value("float64"), caption=Value("string")
    )
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    return str(folder)


def flags(args, work: str, **more) -> dict:
    """The flags of a run on the model and data of `work`, made where they are not there yet."""
    work = Path(work)
    model = args.pretrained_model_name_or_path or str(work / "model")
    if args.pretrained_model_name_or_path is None and not Path(model).exists():
        scaled_sdxl.save(model)
    if not (work / "pairs").exists():
        write_pairs(work / "pairs", args.resolution)
    return {
        "pretrained_model_name_or_path": model,
        "dataset_name": str(work / "pairs"),
        "output_dir": str(work / "output"),
        "cache_dir": str(work / "cache"),
        "resolution": args.resolution,
        "train_batch_size": args.train_batch_size,
        "learning_rate": 1e-5,
        "seed": 0,
        "report_to": "tensorboard",
        "mixed_precision": "bf16" if DEVICE.type == "cuda" else "no",
    } | more


def command_line(flags: dict) -> list[str]:
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]


@dataclass
class Run:
    """What a run of the loop is given.

    Attributes:
        run, model: as `train` takes them; the model has its encoders.
        data, cached: the pairs, not cached and cached.
    """

    run: training.Run
    model: StableDiffusionXL
    data: object
    cached: object

    @property
    def args(self) -> TrainingConfig:
        return self.run.config

    @property
    def accelerator(self) -> Accelerator:
        return self.run.accelerator

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.denoiser.parameters() if parameter.requires_grad]

    def train(self, source: Interleaved, rounds: int) -> dict[str, list[float]]:
        """Trains for so many rounds through the sources, and some to warm up; returns the seconds of each's steps."""
        steps = len(source.sources) * (rounds + WARM_UP) + 1  # the last step's end is not seen
        config = self.run.config.replace(max_train_steps=steps)
        Trainer(config, self.model, source, replace(self.run, config=config)).train()
        return {name: times[WARM_UP:] for name, times in source.times.items()}


@contextmanager
def start(args, **more) -> Iterator[Run]:
    """Loads model and data as the training script does, but both cached and not cached."""
    with tempfile.TemporaryDirectory() as work:
        run_args = parse_args(command_line(flags(args, work, max_train_steps=1, **more)))
        with training.start_run(run_args) as run:
            data = load_pairs(DataOptions.from_config(run_args))
            cached = encode_pairs(data, run_args, run.accelerator, StableDiffusionXL, run.dtype)
            model = StableDiffusionXL.load(run_args, run.accelerator.device, run.dtype)
            yield Run(run, model, data, cached)


def add_model_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The flags of all benchmarks that train."""
    parser.add_argument("--rounds", type=int, default=rounds, help="Timed steps of each.")
    parser.add_argument("--train_batch_size", type=int, default=1, help="Pairs a step.")
    parser.add_argument("--resolution", type=int, default=scaled_sdxl.RESOLUTION, help="Pixels a side.")
    parser.add_argument("--pretrained_model_name_or_path", help="An SDXL. Default: the scaled one, made on the spot.")
    measuring.add_output(parser)
