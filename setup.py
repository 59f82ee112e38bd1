from pathlib import Path

from setuptools import setup


TRAIN = [
    "accelerate>=1.2",  # transformers 5 imports a function that 1.1 lacks
    "datasets>=4.3",  # `from_generator` has no fingerprint before
    "diffusers>=0.40",  # `from_pretrained` has no dtype before
    "huggingface_hub>=1.23",
    "Jinja2",
    "networkx",
    "numpy",
    "packaging",
    "peft>=0.18",  # 0.17 imports a class that transformers 5 has removed
    "Pillow>=11.3",
    "safetensors>=0.8",
    "sentencepiece",
    "tensorboard",
    "tqdm",
    "transformers>=5.6.2",  # before, a CLIP saved by a later version loads with random weights and only a warning
]
EIGHT_BIT = ["bitsandbytes>=0.50"]
PRODIGY = ["prodigyopt"]
WANDB = ["wandb"]
WEBDATASET = ["braceexpand", "webdataset>=1.0", "ray[data]>=2.52"]  # 2.50 knows no token
LABEL = ["starlette>=1.0", "uvicorn>=0.30"]
DEMO = ["matplotlib", "scipy"]
BENCHMARK = [*DEMO, "resvg-py>=0.5", "scikit-learn"]

setup(
    name="diffusion_orpo_loss",
    version="0.1.0",
    description="Odds ratio preference optimization (ORPO) for diffusion models, without a reference model",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=["diffusion_orpo_loss"],
    package_data={"diffusion_orpo_loss": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.4"],
    extras_require={
        "train": TRAIN,
        "8bit": EIGHT_BIT,
        "prodigy": PRODIGY,
        "wandb": WANDB,
        "webdataset": TRAIN + WEBDATASET,
        "label": TRAIN + LABEL,
        "demo": TRAIN + DEMO,
        "benchmark": TRAIN + BENCHMARK,
        "test": TRAIN
        + EIGHT_BIT
        + PRODIGY
        + WANDB
        + WEBDATASET
        + LABEL
        + BENCHMARK
        + [
            "awscli",
            "filelock",
            "mypy",
            "hypothesis",
            "lightning",
            "markdown-it-py",
            "moto[server]",
            "mpmath",
            "PySide6-Addons[webengine]",
            "pytest",
            "pytest-xdist",
            "ruff",
            "trl>=1.0",
        ],
    },
)
