"""The emoji: shipped images against their SVG rasterised anew, and what is said when a package is wrong."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from drawings import ARTISTS, HERE, decode, load_emoji


make_data = pytest.importorskip("make_data", reason="needs resvg-py", exc_type=ImportError)

# As the packages have them.
BODIES = {
    ("minus", "twemoji", 36): '<path fill="#31373d" d="M34 18a3 3 0 0 1-3 3H5a3 3 0 1 1 0-6h26a3 3 0 0 1 3 3"/>',
    ("play-button", "fluent", 32): (
        '<g fill="none"><path fill="#00a6ed" d="M2 6a4 4 0 0 1 4-4h20a4 4 0 0 1 4 4v20a4 4 0 0 1-4 4H6a4 4 0 0 1-4-4z"/>'
        '<path fill="#fff" d="M23.5 15.134a1 1 0 0 1 0 1.732l-12 6.928a1 1 0 0 1-1.5-.866V9.072a1 1 0 0 1 1.5-.866z"/></g>'
    ),
    ("red-square", "noto", 128): (
        '<path fill="#c33" d="M116 4H12c-4.42 0-8 3.58-8 8v104c0 4.42 3.58 8 8 8h104c4.42 0 8-3.58 8-8V12c0-4.42-3.58-8-8-8"/>'
        '<path fill="#f44336" d="M109.7 4H11.5A7.555 7.555 0 0 0 4 11.5v97.9c-.01 4.14 3.34 7.49 7.48 7.5h98.12c4.14.01 7.49-3.34 '
        '7.5-7.48V11.5c.09-4.05-3.13-7.41-7.18-7.5z"/><path fill="#ff8a80" d="M39.7 12.9c0-2.3-1.6-3-10.8-2.7c-7.7.3-11.5 1.2-13.8 '
        "4c-1.9 2.3-2.3 5.6-2.6 8.4c-.2 2.2-2.2 14.9 3.5 11.2c.68-.45 1.23-1.07 1.6-1.8c1.2-2.1 1.9-3.5 3.3-5.6c5.3-8.6 18.8-10.5 "
        '18.8-13.5"/>'
    ),
}


@pytest.fixture(scope="module")
def emoji():
    return load_emoji()


@pytest.mark.parametrize("name, artist, size", BODIES)
def test_shipped_pixels_are_those_of_the_svg(emoji, name, artist, size):
    svg = make_data.to_svg({"body": BODIES[name, artist, size]}, {"width": size, "height": size})
    shipped = emoji.images[emoji.names.index(name), ARTISTS.index(artist)].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(np.asarray(make_data.rasterise(svg)), shipped)


def test_every_subject_is_in_one_split_and_drawn_differently_by_each_artist(emoji):
    subjects = np.concatenate(list(emoji.split.values()))
    assert sorted(subjects) == list(range(len(emoji.names))) and len(emoji.names) == 1561
    assert len(emoji.split["test"]) >= 100 and len(emoji.split["pairs"]) == len(emoji.names) // 2
    first, second, third = emoji.images.float().unbind(dim=1)
    for a, b in ((first, second), (second, third), (first, third)):
        assert (a - b).abs().mean(dim=(1, 2, 3)).min() > 0.5
    assert emoji.captions[emoji.names.index("hot-dog")] == "hot dog"


def test_every_package_is_credited_with_its_version_and_licence():
    credits = (HERE / "LICENSES.md").read_text()
    for (package, version, _), licence in zip(make_data.PACKAGES.values(), ("Apache-2.0", "CC BY 4.0", "MIT")):
        (line,) = (line for line in credits.splitlines() if f"`{package}` {version}" in line)
        assert licence in line


def pack(folder: Path, monkeypatch, icons: dict[str, dict]) -> None:
    """Writes a package for each artist and makes its checksum the expected one."""
    known = {}
    for artist, (package, version, _) in make_data.PACKAGES.items():
        content = json.dumps({"width": 2, "height": 2, "icons": icons[artist]}).encode()
        file = folder / make_data.file_name(package, version)
        with tarfile.open(file, "w:gz") as tar:
            member = tarfile.TarInfo("package/icons.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        known[artist] = (package, version, hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(make_data, "PACKAGES", known)


def test_rows_are_what_all_artists_drew_and_none_hides(tmp_path, monkeypatch):
    half = {"body": '<path fill="#f00" d="M0 0h1v2h-1z"/>'}
    icons = {artist: {"left-half": half, "outdated": half, artist: half} for artist in ARTISTS}
    icons["fluent"]["outdated"] = half | {"hidden": True}
    pack(tmp_path, monkeypatch, icons)
    (row,) = make_data.make_rows(tmp_path)
    assert (row["name"], row["caption"]) == ("left-half", "left half")
    image = decode(row["noto"])
    assert (image[:, :32] == (255, 0, 0)).all() and (image[:, 32:] == 255).all()


def test_a_wrong_package_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="noto-1.2.9.tgz is missing.*npm pack"):
        make_data.make_rows(tmp_path)
    pack(tmp_path, monkeypatch, dict.fromkeys(ARTISTS, {}))
    file = tmp_path / "iconify-json-twemoji-1.2.5.tgz"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(SystemExit, match="twemoji-1.2.5.tgz has another checksum"):
        make_data.make_rows(tmp_path)
