"""The evaluation's page in a real browser: what it shows, that it sorts, by keyboard too, and that it asks for nothing."""

from pathlib import Path

import numpy as np
import pytest
from orpo.drawing.images import make_requests
from orpo.evaluation.page import render_page
from orpo.evaluation.results import make_results
from PIL import Image


BROWSER = Path(__file__).parents[1] / "browser.py"
EVIL = "<script>document.title = 'evil'</script><img src=x onerror=\"document.title = 'evil'\">'\"&amp; {{ 7 * 7 }}"
PROMPTS = ["a red ball", EVIL, "a blue cat", "ünïcode 猫"]
BASE = np.array([1.0, 5.0, 3.0, 2.0])
LORA = np.array([1.5, 2.0, 3.0, 9.0])  # differences: 0.5, -3, 0, 7
SHARPNESS = np.array([4.0, 3.0, 2.0, 1.0])

FIRST = "[...document.querySelectorAll('#pairs h3')].map(h => h.textContent.split(' seed')[0].trim())"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Four pairs, the base's images red and the LoRA's blue, in a folder from which the images are gone."""
    folder = tmp_path_factory.mktemp("page")
    requests = make_requests(PROMPTS, 1, seed=0)
    for side, color in (("base", "red"), ("lora", "blue")):
        (folder / side).mkdir()
        for request in requests:
            Image.new("RGB", (640, 640), color).save(folder / side / request.name)
    settings = {"prompts": PROMPTS, "lora_weights": "my <i>lora</i>", "lora_scale": 0.5, "resolution": 640}
    settings |= {"pretrained_model_name_or_path": "some/model", "scheduler": {"_class_name": "Euler"}}
    scores = {"smile": np.stack([BASE, LORA]), "sharpness": np.stack([SHARPNESS, SHARPNESS[::-1]])}
    statistics = {
        "saturation": np.array([[0.2] * 4, [0.5] * 4]),
        "high_frequency": np.array([[0.1] * 4, [0.1] * 4]),
    }
    results = make_results(settings, requests, scores, statistics, ["half of <b>it</b> fits"])
    html = render_page(results, [(folder / "base" / r.name, folder / "lora" / r.name) for r in requests])
    (folder / "moved").mkdir()
    path = folder / "moved" / "index.html"
    path.write_text(html, encoding="utf-8")
    for side in ("base", "lora"):
        for image in (folder / side).iterdir():
            image.unlink()
    return path


def test_the_page_shows_prompts_as_text_and_images_from_itself(browse, page):
    seen = browse(
        page,
        {"js": FIRST},
        {"js": "document.title"},
        {"js": "[...document.images].map(i => [i.complete, i.naturalWidth, i.alt.slice(0, 12)])"},
        {"js": "[document.querySelector('p b').textContent, document.querySelectorAll('i').length]"},
        {
            "js": "[...document.images].slice(0, 2).map(image => {"
            " const context = Object.assign(document.createElement('canvas'), {width: 9, height: 9}).getContext('2d');"
            " context.drawImage(image, 0, 0); return [...context.getImageData(4, 4, 1, 1).data] })"
        },
    )
    prompts, title, images, (lora, italics), (red, blue) = seen["values"]
    assert prompts == PROMPTS  # the markup and the template's braces included
    assert title == "Base against LoRA"
    assert lora == "my <i>lora</i>" and italics == 2  # those of the bars
    assert [image[:2] for image in images] == [[True, 512]] * 8
    assert [image[2] for image in images[:2]] == ["Drawn by the", "Drawn with t"]
    assert red[0] > 200 > 50 > red[2] and blue[2] > 200 > 50 > blue[0]
    assert seen["console"] == []


def test_the_page_asks_for_nothing_and_a_page_that_does_is_noticed(browse, page, tmp_path):
    assert browse(page)["requests"] == [f"file://{page}"]
    other = tmp_path / "other.html"
    other.write_text("<img src='http://127.0.0.1:9/x.png'><script>undefined_name()</script>")
    seen = browse(other)
    assert any("127.0.0.1" in url for url in seen["requests"]) and "undefined_name" in seen["console"][0]


def test_no_script_runs_but_the_pages_own(browse, page, tmp_path):
    injected = tmp_path / "injected.html"
    injected.write_text(page.read_text().replace("<h1>", "<script>document.title = 'evil'</script><h1>", 1))
    seen = browse(injected, {"js": "document.title"}, {"js": "document.getElementById('first').disabled"})
    assert seen["values"] == ["Base against LoRA", True]
    assert "Content Security Policy" in seen["console"][0]


def test_pairs_sort_by_each_scorers_difference(browse, page):
    def choose(select: str, value: str) -> dict:
        element = f"document.getElementById({select!r})"
        return {"js": f"({element}.value = {value!r}, {element}.dispatchEvent(new Event('change')), {FIRST})"}

    steps = (
        choose("by", "smile"),
        choose("first", "worse"),
        choose("first", "closest"),
        choose("by", "sharpness"),
        choose("by", ""),
        {"js": "document.getElementById('status').textContent"},
    )
    best, worst, closest, sharpness, prompt, status = browse(page, *steps)["values"]
    a, b, c, d = PROMPTS
    assert best == [d, a, c, b] and worst == [b, c, a, d] and closest == [c, a, b, d]
    assert sharpness == [b, c, a, d]  # differences -3, -1, 1, 3: closest first, in the order of the prompts
    assert prompt == PROMPTS and status == "4 pairs, by prompt"


def test_the_keyboard_is_enough_to_sort(browse, page):
    active = {"js": "document.activeElement.id || document.activeElement.tagName"}
    seen = browse(
        page,
        {"key": "Tab"},
        active,
        {"key": "Tab"},
        active,
        {"key": "Down"},
        {"js": FIRST},
        {"key": "Tab"},
        active,
        {"key": "Down"},
        {"js": FIRST},
        {"js": "document.getElementById('status').textContent"},
    )
    _, summary, _, by, _, best, _, first, _, worst, status = seen["values"]
    assert (summary, by, first) == ("SUMMARY", "by", "first")
    a, b, c, d = PROMPTS
    assert best == [d, a, c, b] and worst == [b, c, a, d]
    assert status == "4 pairs, by difference in smile, the LoRA's worst first"


def test_numbers_and_warnings_are_the_results(browse, page):
    rows = (
        "[...document.querySelectorAll('#scorers tbody tr')].map(r => [...r.children].map(c => c.textContent.trim()))"
    )
    seen = browse(page, {"js": rows}, {"js": "[...document.querySelectorAll('.warning')].map(p => p.textContent)"})
    (smile, sharpness), warnings = seen["values"]
    assert smile[:2] == ["smile", "not clearly either"] and smile[2].startswith("62.5 (") and "2, 1, 1" in smile
    assert any(cell.startswith("+1.12 (") for cell in smile)
    assert sharpness[0] == "sharpness" and sharpness[2].startswith("50.0 (")
    assert [w.split(":")[0] for w in warnings] == [
        "half of <b>it</b> fits",
        "Fewer than 20 prompts",
        "Colours are much stronger than the base's (0.2 to 0.5)",
    ]


@pytest.mark.parametrize("color_scheme, dark", [("0", True), ("1", False)])
def test_text_stands_out_in_light_and_dark(browse, page, tmp_path, color_scheme, dark):
    """Contrast of at least 4.5 (WCAG AA) for every colour of text on what lies behind it."""
    colors = (
        "[['body', 'body'], ['.soft', 'body'], ['.warning', '.warning'], ['li figcaption', '#pairs > li'],"
        " ['li .higher', '#pairs > li'], ['li .lower', '#pairs > li']].map(([text, behind]) =>"
        " [getComputedStyle(document.querySelector(text)).color,"
        " getComputedStyle(document.querySelector(behind)).backgroundColor])"
    )
    seen = browse(page, {"js": colors}, {"screenshot": str(tmp_path / "page.png")}, color_scheme=color_scheme)
    for text, behind in seen["values"][0]:
        assert contrast(text, behind) >= 4.5, (text, behind)
    shot = np.asarray(Image.open(tmp_path / "page.png").convert("L"))
    assert (np.median(shot[:200]) < 60) == dark
    assert len(np.unique(shot)) > 20


def contrast(a: str, b: str) -> float:
    def luminance(color: str) -> float:
        rgb = np.array([int(part) for part in color[4:-1].split(",")]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)
