"""A folder of images to label."""

import json
from pathlib import Path

import pytest
from PIL import Image


HOSTILE = "<script>document.title = 'evil'</script><img src=x onerror=\"document.title = 'evil'\">'\"&amp; ünïcode 猫"


@pytest.fixture
def make_images(tmp_path):
    """Writes a folder of numbered images of different colours, `k` of each prompt; returns it."""

    def make(prompts: int, k: int = 2, name: str = "images") -> Path:
        folder = tmp_path / name
        (folder / "made").mkdir(parents=True)
        lines = []
        for i in range(prompts):
            for j in range(k):
                image = f"made/{i:03d}-{j}.png"
                Image.new("RGB", (24, 16), (i % 256, 60 * j, 90)).save(folder / image)
                prompt = f"{HOSTILE} {i}" if i == 0 else f"prompt {i}"
                lines.append(json.dumps({"file_name": image, "prompt": prompt, "seed": i * k + j}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        return folder

    return make
