"""Makes `emoji.parquet`: the subjects that three artists all drew, rasterised from the SVG that npm packages hold.

    python benchmarks/emoji/make_data.py                        # asks npm for the packages
    python benchmarks/emoji/make_data.py --packages folder      # with the .tgz files that `npm pack` left there

`LICENSES.md` says who drew them. The benchmark reads the shipped file, so this needs to run only to rebuild it.
"""

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import datasets
import resvg_py
from PIL import Image

from drawings import ARTISTS, DATA, SIZE


PACKAGES = {  # artist -> npm package, version, SHA-256 of the file that `npm pack` saves
    "noto": ("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
}  # fmt: skip


def file_name(package: str, version: str) -> str:
    return f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"


def download(folder: Path) -> None:
    """Asks npm for the packages.

    Raises:
        SystemExit: npm is missing, or can't reach them.
    """
    wanted = [f"{package}@{version}" for package, version, _ in PACKAGES.values()]
    try:
        subprocess.run(["npm", "pack", *wanted], cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit("npm is not installed: install it, or pass --packages with the files that `npm pack` saves.")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        raise SystemExit(f"npm can't fetch {', '.join(wanted)} ({lines[0]}): the shipped {DATA.name} serves instead.")


def read_icons(folder: Path, artist: str) -> dict[str, str]:
    """Name to SVG of an artist's drawings; hidden ones, which are outdated, are left out.

    Raises:
        SystemExit: the package is missing or has another checksum.
    """
    package, version, checksum = PACKAGES[artist]
    file = folder / file_name(package, version)
    if not file.exists():
        raise SystemExit(f"{file} is missing: run `npm pack {package}@{version}` there, or leave --packages out.")
    if hashlib.sha256(file.read_bytes()).hexdigest() != checksum:
        raise SystemExit(f"{file} has another checksum than {package} {version} of make_data.py: download it again.")
    with tarfile.open(file) as tar:
        icons = json.load(tar.extractfile("package/icons.json"))
    return {name: to_svg(icon, icons) for name, icon in icons["icons"].items() if not icon.get("hidden")}


def to_svg(icon: dict, icons: dict) -> str:
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{SIZE}" '
        f'height="{SIZE}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )


def rasterise(svg: str) -> Image.Image:
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGB")


def make_rows(folder: Path) -> list[dict]:
    """The subjects that all artists drew: `name`, `caption`, and by artist the image, losslessly in WebP."""
    icons = {artist: read_icons(folder, artist) for artist in ARTISTS}
    rows = []
    for name in sorted(set.intersection(*(set(icons[artist]) for artist in ARTISTS))):
        row = {"name": name, "caption": name.replace("-", " ")}
        for artist in ARTISTS:
            file = io.BytesIO()
            rasterise(icons[artist][name]).save(file, "WEBP", lossless=True)
            row[artist] = {"bytes": file.getvalue(), "path": None}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="Folder with the packages. Default: ask npm for them.")
    parser.add_argument("--output", type=Path, default=DATA, help="Parquet file to write.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if args.packages is None:
            download(Path(temporary))
        rows = make_rows(args.packages or Path(temporary))
    features = datasets.Features(
        {"name": datasets.Value("string"), "caption": datasets.Value("string")}
        | {artist: datasets.Image() for artist in ARTISTS}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(args.output)
    print(f"{len(rows)} subjects of {len(ARTISTS)} artists in {args.output}")


if __name__ == "__main__":
    main()
