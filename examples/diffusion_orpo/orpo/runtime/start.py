"""Every script begins with this, once its flags are good and before it imports anything heavy."""

import logging
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version


# The lowest versions that were run, as in setup.py and requirements.txt. Transformers before 5.6 finds no weights in the CLIP
# encoders that later versions save, and generates with random ones.
LOWEST = {"accelerate": "1.2", "datasets": "4.3", "diffusers": "0.40", "peft": "0.18", "transformers": "5.6.2"}

# Messages of libraries that mean nothing at a normal start: the logger, and a part of the message.
NOISE = {
    "bitsandbytes.backends.cpu.ops": "gemm_4bit_forward",
    "transformers.utils.import_utils": "requires torchvision",
    "diffusers.loaders.lora_base": "No LoRA keys associated to CLIPText",
    "diffusers.loaders.peft": "No LoRA keys associated to CLIPText",
}


def begin(script: str) -> None:
    """Makes the console accept any text, silences pointless messages of libraries, and exits on Windows or if a library is too old.

    Also makes MKL compute the same numbers in every run on a machine, or else the last digits depend on where memory happens to lie:
    must come before torch computes anything. A setting of the user's own stays.

    Args:
        script: its path, for the message.
    """
    if find_spec("fcntl") is None:  # of POSIX, like the signals and the syncing of folders that files are written with
        sys.exit(
            f"{Path(script).name}: needs Linux or macOS. On Windows, run it in WSL, the Windows Subsystem for Linux."
        )
    os.environ.setdefault("MKL_CBWR", "AUTO")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in notebooks
            stream.reconfigure(
                errors="backslashreplace"
            )  # paths and captions may hold characters that cp1252 and the like lack
    for name, text in NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, Without) for known in logger.filters):
            logger.addFilter(Without(text))
    problem = too_old()
    if problem is not None:
        sys.exit(f"{Path(script).name}: {problem}")


class Without(logging.Filter):
    """Drops messages that contain a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()


def too_old(lowest: dict[str, str] = LOWEST) -> str | None:
    """Says which libraries are missing or older than these versions, and what to do; None if all are good."""
    wrong = []
    for name, minimum in lowest.items():
        installed = _installed(name)
        if installed is None:
            wrong.append(f"{name} is not installed")
        elif _release(installed) < _release(minimum):
            wrong.append(f"{name} {installed} is older than {minimum}")
    if not wrong:
        return None
    command = " ".join(f"'{name}>={lowest[name]}'" for name in lowest if any(part.startswith(name) for part in wrong))
    return f"{'; '.join(wrong)}. Run `pip install -U {command}`."


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _release(text: str) -> Version:
    """0.43.0 of 0.43.0.dev0: what comes before a release counts as that release."""
    return Version(Version(text).base_version)
