"""The door: what scripts do before anything heavy is imported, and what a normal start does not show."""

import importlib
import io
import logging
import re
import sys
from pathlib import Path

import pytest
from orpo.config import Setting, looks_like_a_path
from orpo.runtime import start


ROOT = Path(__file__).parents[2]


def floors(text: str) -> dict[str, str]:
    """The lowest version of each library that a file names."""
    return dict(re.findall(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", text))


def test_versions_that_work_are_the_same_everywhere():
    setup = floors((ROOT / "setup.py").read_text().split("DEMO = ")[0])
    requirements = floors((ROOT / "examples" / "diffusion_orpo" / "requirements.txt").read_text())
    assert setup == requirements and start.LOWEST.items() <= setup.items()
    single_file = floors((ROOT / "examples" / "diffusion_orpo_single_file" / "requirements.txt").read_text())
    assert single_file.items() <= (setup | {"torch": "2.4"}).items()


def test_the_libraries_here_are_new_enough():
    assert start.too_old() is None


def test_an_old_or_missing_library_is_named_with_what_to_run(monkeypatch):
    found = {"peft": "0.20.1", "diffusers": None, "accelerate": "1.10", "transformers": "5.0.0.dev0"}
    monkeypatch.setattr(start, "_installed", found.get)
    problem = start.too_old({"accelerate": "1.9", "diffusers": "0.42.1", "peft": "0.21", "transformers": "5.0"})
    assert problem == (
        "diffusers is not installed; peft 0.20.1 is older than 0.21."
        " Run `pip install -U 'diffusers>=0.42.1' 'peft>=0.21'`."
    )
    with pytest.raises(SystemExit, match="train.py: "):
        monkeypatch.setattr(start, "_installed", lambda name: "0.1")
        start.begin("train.py")


def test_without_the_parts_of_posix_one_sentence_says_where_scripts_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    sys.modules.pop("label_preferences", None)
    for script in (
        "train_diffusion_orpo_sdxl_lora",
        "check_preferences",
        "convert_to_webdataset",
        "label_preferences",
    ):
        importlib.import_module(script)
    with pytest.raises(SystemExit, match="train.py: needs Linux or macOS. On Windows, run it in WSL"):
        start.begin("train.py")


def test_a_console_that_is_not_utf8_takes_any_text(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    start.begin("x.py")
    print("a fox 🦊, 狐")
    sys.stdout.flush()
    assert written.getvalue().decode("cp1252").splitlines() == ["a fox \\U0001f98a, \\u72d0"]


def test_a_stream_that_can_not_be_reconfigured_is_left_alone(monkeypatch):
    class Notebook:
        def write(self, text):
            pass

    monkeypatch.setattr(sys, "stdout", Notebook())
    start.begin("x.py")


def test_noise_is_silenced_and_nothing_else(caplog):
    start.begin("x.py")
    start.begin("x.py")
    for name, text in start.NOISE.items():
        logger = logging.getLogger(name)
        assert len([known for known in logger.filters if isinstance(known, start.Without)]) == 1
        logger.warning(f"`X` {text}: do this")
        logger.warning("something that matters")
    assert [record.getMessage() for record in caplog.records] == ["something that matters"] * len(start.NOISE)


@pytest.mark.parametrize(
    ("source", "is_path"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", False),
        ("gpt2", False),
        ("./model", True),
        ("../model", True),
        ("/data/model", True),
        ("models/sdxl/base", True),
        ("C:\\models", True),
        ("hf://datasets/a/b/c.parquet", False),
        (None, False),
    ],
)
def test_what_looks_like_a_path(source, is_path):
    assert looks_like_a_path(source) is is_path


def test_a_path_that_does_not_exist_is_refused_before_the_hub_is_asked(tmp_path):
    declared = Setting("", path="source")
    assert declared.problem("model", str(tmp_path)) is None
    assert declared.problem("model", "owner/name") is None
    assert declared.problem("model", str(tmp_path / "no")) == f"--model={tmp_path / 'no'} does not exist."
