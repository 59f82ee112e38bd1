"""What several tests need: preference rows, files of them, runs of the script, and what the runs logged."""

import io
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset, Features, Value
from PIL import Image
from safetensors.torch import load_file, save_file
from webdataset import TarWriter

from faces import ALL_KINDS, draw_face


FEATURES = Features(jpg_0=Value("binary"), jpg_1=Value("binary"), label_0=Value("float64"), caption=Value("string"))


def encode(image: Image.Image, format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def face_rows(count: int, ties: int = 4) -> list[dict]:
    """Rows with a smiling winner, on either side in turn; the last ones are ties. Sizes differ within a pair."""
    rows = []
    for i in range(count):
        kind = ALL_KINDS[i % len(ALL_KINDS)]
        smile, frown = draw_face(kind, 0.9).resize((96, 80)), draw_face(kind, -0.9).resize((64, 72))
        label = 0.5 if i >= count - ties else float(i % 2)
        images = (smile, frown) if label else (frown, smile)
        rows.append({"jpg_0": encode(images[0]), "jpg_1": encode(images[1]), "label_0": label, "caption": kind.prompt})
    return rows


def shaped_rows(count: int) -> list[dict]:
    """The same, in turn wide, tall, square, and a wide one beside a tall one; the sixth pair of each six is very wide."""
    shapes = [((80, 48), (120, 72)), ((48, 80), (60, 100)), ((64, 64), (90, 90)), ((80, 48), (80, 48))]
    shapes += [((80, 48), (48, 80)), ((160, 40), (160, 40))]  # width and height of winner and loser
    rows = []
    for i in range(count):
        kind, label = ALL_KINDS[i % len(ALL_KINDS)], float(i % 2)
        smile, frown = (draw_face(kind, mood).resize(size) for mood, size in zip((0.9, -0.9), shapes[i % len(shapes)]))
        images = (smile, frown) if label else (frown, smile)
        # Every prompt is another, so that tests can tell pairs apart.
        rows.append(
            {"jpg_0": encode(images[0]), "jpg_1": encode(images[1]), "label_0": label, "caption": f"{kind.prompt} {i}"}
        )
    return rows


def swap_labels(rows: list[dict]) -> list[dict]:
    return [row | {"label_0": 1 - row["label_0"]} for row in rows]


def write_parquet(folder: Path, rows: list[dict], split: str = "train", features: Features | None = FEATURES) -> str:
    Path(folder).mkdir(exist_ok=True, parents=True)
    Dataset.from_list(rows, features=features).to_parquet(Path(folder) / f"{split}.parquet")
    return str(folder)


def write_shards(
    folder: Path,
    rows: list[dict],
    per_shard: int,
    first_shard: int = 0,
    leave_out: dict[int, str] | None = None,
    manifest: bool = True,
) -> Path:
    """Writes `train-00000.tar` and so on with webdataset's own writer, and a manifest; leaves out members by row."""
    Path(folder).mkdir(exist_ok=True, parents=True)
    written = []
    for i in range(0, len(rows), per_shard):
        name = f"train-{first_shard + i // per_shard:05d}.tar"
        with TarWriter(str(Path(folder) / name)) as writer:
            for j, row in enumerate(rows[i : i + per_shard]):
                sample = {
                    "__key__": f"{first_shard}-{i + j:06d}",
                    "original_prompt.txt": row["caption"],
                    "jpg_0.jpg": row["jpg_0"],
                    "jpg_1.jpg": row["jpg_1"],
                    "label_0.txt": str(row["label_0"]),
                    "label_1.txt": str(1 - row["label_0"]),
                }
                sample.pop((leave_out or {}).get(i + j), None)
                writer.write(sample)
        written.append(str(Path(folder) / name))
    if manifest:
        from orpo.store.folder import write_manifest
        from orpo.store.index import Manifest, scan

        with TemporaryDirectory() as cache:
            write_manifest(str(folder), Manifest([scan(path, cache) for path in written]))
    return Path(folder)


def without_weights(model: str, folder: Path) -> Path:
    """A copy of a model whose files of weights are there, and hold none."""
    shutil.copytree(model, folder)
    for file in Path(folder).glob("*/*.safetensors"):
        save_file({}, file)
    return Path(folder)


def arguments(model: str, data: str, output_dir, **flags) -> list[str]:
    """The script's command line for a short run; a flag that is True stands alone, None leaves it out."""
    defaults = {
        "pretrained_model_name_or_path": model,
        "dataset_name": data,
        "output_dir": output_dir,
        "resolution": 64,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "seed": 0,
    }
    return command_line(defaults | flags)


def command_line(flags: dict) -> list[str]:
    line = []
    for name, value in flags.items():
        if value is True:
            line.append(f"--{name}")
        elif isinstance(value, (list, tuple)):
            line += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            line.append(f"--{name}={value}")
    return line


def check(output_dir: Path, **flags) -> tuple[int, dict]:
    """Runs `check_preferences.py` in this process; returns its exit status and report."""
    import check_preferences

    defaults = {"num_workers": 1, "num_sample_pairs": 0, "output_dir": output_dir}
    status = check_preferences.main(command_line(defaults | flags))
    return status, json.loads((Path(output_dir) / "report.json").read_text())


def train(model: str, data: str | None, output_dir, **flags) -> dict[str, torch.Tensor]:
    """Runs the script in this process, or, without `data`, the one for shards; returns the trained LoRA."""
    from accelerate.state import AcceleratorState, GradientState

    import train_diffusion_orpo_sdxl_lora
    import train_diffusion_orpo_sdxl_lora_wds

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script = train_diffusion_orpo_sdxl_lora if data else train_diffusion_orpo_sdxl_lora_wds
    script.main(arguments(model, data, output_dir, **flags))
    return lora_weights(output_dir)


def lora_weights(output_dir) -> dict[str, torch.Tensor]:
    return load_file(Path(output_dir) / "pytorch_lora_weights.safetensors")


def logged(output_dir) -> dict[str, list[float]]:
    """The scalars in TensorBoard's files: name to values by rising step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(Path(output_dir).glob("logs/*/"))), size_guidance={"images": 0})
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
