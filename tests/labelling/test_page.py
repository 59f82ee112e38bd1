"""The page of label_preferences.py, served by the script itself, in a real browser with real key presses."""

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from orpo.labelling.votes import read_votes
from PIL import Image


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "diffusion_orpo" / "label_preferences.py"

SHOWN = "[state.question.prompt, [...document.querySelectorAll('#images img')].map(i => new URL(i.src).pathname)]"


@contextmanager
def serving(folder: Path, *flags: str):
    """Runs the script; gives its process and the address that it prints."""
    command = [sys.executable, str(SCRIPT), f"--images_dir={folder}", "--port=0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            seen = []
            for line in process.stdout:
                seen.append(line)
                if "http://" in line:
                    break
            else:
                pytest.fail("".join(seen))
            yield process, re.search(r"http://\S+", line)[0]
        finally:
            if process.poll() is None:
                process.terminate()


def answered(number: int) -> dict:
    return {"until": f"ready && isSeen() && state.progress.answered === {number}"}


def votes_of(folder: Path, annotator: str = "me") -> list:
    return list(read_votes(folder)[annotator].values())


def test_keys_choose_what_the_screen_shows(browse, make_images, tmp_path):
    """Twelve questions by keyboard alone; the winners on disk are those whose pixels stood on the chosen side."""
    folder = make_images(12)
    keys = [["Left", "Right", "Down", "X"][i % 4] for i in range(12)]
    colour = (
        "[...document.querySelectorAll('#images img')].map(image => {"
        " const context = Object.assign(document.createElement('canvas'), {width: 24, height: 16}).getContext('2d');"
        " context.drawImage(image, 0, 0); return [...context.getImageData(4, 4, 1, 1).data].slice(0, 2) })"
    )
    steps = [{"js": "1", **answered(0)}]
    for i, key in enumerate(keys):
        steps += [{"js": colour}, {"js": "state.question.prompt"}, {"key": key, **answered(i + 1)}]
    with serving(folder) as (_, url):
        seen = browse(url, *steps, {"js": "[document.body.innerText, document.title]"})
        host = url.split("/?")[0]
    votes = votes_of(folder)
    assert len(votes) == 12
    for i, (vote, key) in enumerate(zip(votes, keys)):
        sides, prompt = seen["values"][1 + 3 * i], seen["values"][2 + 3 * i]
        names = [f"made/{red:03d}-{green // 60}.png" for red, green in sides]
        assert list(vote.shown) == names and prompt.endswith(f" {sides[0][0]}")
        expected = {"Left": names[0], "Right": names[1]}.get(key)
        assert (vote.choice, vote.best) == ("best" if expected else {"Down": "tie", "X": "bad"}[key], expected)
        assert 0 < vote.seconds < 20
    text, title = seen["values"][-1]
    assert "All done" in text and title == "All done" and "12 of 12" in text
    assert len({vote.shown[0][-5] for vote in votes}) == 2  # both sides
    assert all(request.startswith(host) for request in seen["requests"]) and seen["console"] == []


def test_a_prompt_is_text_and_no_script_but_the_pages_runs(browse, make_images):
    folder = make_images(1)
    inject = (
        "(document.head.append(Object.assign(document.createElement('script'), {textContent: 'document.title = 1'})),"
        " document.title)"
    )
    with serving(folder) as (_, url):
        seen = browse(
            url, {"js": "1", **answered(0)}, {"js": "document.getElementById('prompt').textContent"}, {"js": inject}
        )
    prompt = json.loads((folder / "metadata.jsonl").read_text().splitlines()[0])["prompt"]
    assert seen["values"][1] == prompt and "<script>" in prompt
    assert seen["values"][2] == "1 left: which is better?" and "Content Security Policy" in seen["console"][0]


def test_a_held_key_votes_once_undo_takes_back_and_space_flickers(browse, make_images):
    folder = make_images(5)
    repeat = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft', repeat: true, bubbles: true}))"
    full = "[...document.querySelectorAll('#images button')].map(b => b.getBoundingClientRect().width === innerWidth)"
    with serving(folder) as (_, url):
        seen = browse(
            url,
            {"js": "1", **answered(0)},
            {"key": "Left", **answered(1)},
            {"js": repeat},
            {"wait": 500},
            {"js": SHOWN},
            {"js": "state.progress.answered"},
            {"key": "Right", **answered(2)},
            {"key": "Backspace", **answered(1)},
            {"js": SHOWN},
            {"key": "Down", **answered(2)},
            {"press": "Space", "until": f"{full}.join() === 'true,false'"},
            {"js": "1", "until": f"{full}.join() === 'false,true'"},
            {"release": "Space", "until": f"{full}.join() === 'false,false'"},
            {"js": "state.progress.answered"},
        )
    _, _, _, _, before, held, _, _, again, *_, given = seen["values"]
    assert held == 1 and before == again and given == 2
    assert [vote.choice for vote in votes_of(folder)] == ["best", "tie"]


# The page's clock stands still at the moment at which the first question has been seen for long enough.
STOPPED = {"js": "(stopped => { now = () => stopped; })(now())", **answered(0)}


def at(milliseconds: int) -> str:
    """Sets the clock to so long after the question on the screen was painted."""
    return f"(then => {{ now = () => then; }})(visibleSince + {milliseconds})"


@pytest.mark.parametrize(
    "twice",
    [
        {"click": "#images button", "again": 30},
        {"click": "#images button", "again": 350},
        {"click": "#keys button:nth-child(4)", "again": 100},
        {"js": "KEYS.ArrowLeft()"},
    ],
)
def test_a_second_click_or_press_in_a_hurry_votes_once(browse, make_images, twice):
    """However slow the machine is: the clock stands still, so the next question has not been seen at all."""
    folder = make_images(4)
    key = {"js": "[KEYS.ArrowLeft(), KEYS.ArrowLeft()].length", "until": "ready && state.progress.answered === 1"}
    first = key if "js" in twice else twice | {"until": "ready && state.progress.answered === 1"}
    with serving(folder) as (_, url):
        seen = browse(
            url,
            {"js": "1", **answered(0)},
            STOPPED,
            first,
            {"js": "1", "until": "visibleSince !== null"},
            {"key": "Left"},
            {"js": at(399)},
            {"key": "Left"},
            {"js": "[ready, state.progress.answered]"},
            {"js": at(400)},
            {"js": "images.children[0].dispatchEvent(new MouseEvent('click', {detail: 2}))"},
            {"js": "[ready, state.progress.answered]"},
            {"key": "Left", "until": "ready && state.progress.answered === 2"},
        )
    assert seen["values"][7] == seen["values"][10] == [True, 1]
    assert len(votes_of(folder)) == 2


def test_a_question_is_not_seen_in_a_tab_behind_and_an_undo_takes_back_one(browse, make_images):
    folder = make_images(4)
    hide = (
        "(Object.defineProperty(document, 'hidden', {value: %s, configurable: true}),"
        " document.dispatchEvent(new Event('visibilitychange')))"
    )
    with serving(folder) as (_, url):
        seen = browse(
            url,
            {"js": "1", **answered(0)},
            {"key": "Left", **answered(1)},
            {"key": "Left", **answered(2)},
            {"js": hide % "true"},
            {"js": "isSeen()"},
            {"key": "Left"},
            {"js": hide % "false", "until": "isSeen()"},
            {"js": "(stopped => { now = () => stopped; })(now())"},
            {"key": "Backspace", "until": "ready && state.progress.answered === 1"},
            {"js": "1", "until": "visibleSince !== null"},
            {"key": "Backspace"},
            {"js": "[ready, state.progress.answered]"},
            {"js": at(400)},
            {"key": "Backspace", "until": "ready && state.progress.answered === 0"},
        )
    assert seen["values"][4] is False and seen["values"][11] == [True, 1]
    assert votes_of(folder) == []


def test_a_killed_server_and_a_closed_browser_lose_nothing(browse, make_images):
    """The browser closes in mid-question, the server is killed after a vote: the same question is shown again."""
    folder = make_images(8)
    with serving(folder) as (process, url):
        first = browse(url, {"js": "1", **answered(0)}, {"key": "Left", **answered(1)}, {"js": SHOWN})["values"][-1]
        assert browse(url, {"js": SHOWN, **answered(1)})["values"] == [first]
        process.send_signal(signal.SIGKILL)
        process.wait()
    with open(folder / "votes" / "me.jsonl", "ab") as file:
        file.write(b'{"question": "abc", "cho')
    with serving(folder) as (process, url):
        seen = browse(url, {"js": SHOWN, **answered(1)}, *({"key": "Left", **answered(i)} for i in range(2, 9)))
        assert seen["values"][0] == first
        process.send_signal(signal.SIGINT)
        assert "8 of 8 answered" in process.stdout.read() and process.wait(30) == 0
    assert len(votes_of(folder)) == 8


def test_a_server_that_is_gone_is_said(browse, make_images):
    """It is killed half a second after the first vote."""
    folder = make_images(3)
    with serving(folder) as (process, url):
        watcher = f"""
import os, time
from pathlib import Path
while not Path({str(folder / "votes" / "me.jsonl")!r}).read_bytes():
    time.sleep(0.01)
time.sleep(0.5)
os.kill({process.pid}, 9)
"""
        with subprocess.Popen([sys.executable, "-c", watcher]):
            seen = browse(
                url,
                {"js": "1", **answered(0)},
                {"key": "Left", **answered(1)},
                {"wait": 1500},
                {"key": "Left", "until": "!document.getElementById('message').hidden"},
                {"js": "[document.getElementById('message').textContent, state.progress.answered]"},
            )
    message, given = seen["values"][-1]
    assert "The server does not answer. Your votes are safe." in message and given == 1
    assert len(votes_of(folder)) == 1


def test_a_page_goes_on_when_the_server_answers_again(browse, make_images):
    folder = make_images(3)
    fail = "(window.fetch_ = window.fetch, window.fetch = () => Promise.reject(new TypeError('gone')))"
    with serving(folder) as (_, url):
        seen = browse(
            url,
            {"js": "1", **answered(0)},
            {"js": f"{fail} && 1"},
            {"key": "Left", "until": "message.textContent.includes('does not answer')"},
            {"js": "(window.fetch = window.fetch_) && 1", "until": "message.hidden && isSeen()"},
            {"key": "Left", **answered(1)},
        )
    assert len(votes_of(folder)) == 1 and len(seen["values"]) == 5


def test_a_question_that_is_skipped_comes_last(browse, make_images):
    folder = make_images(3)
    with serving(folder) as (_, url):
        seen = browse(
            url,
            {"js": SHOWN, **answered(0)},
            {"js": "window.skipped = state.question.id"},
            {"key": "S", "until": "ready && isSeen() && state.question.id !== window.skipped"},
            {"js": SHOWN},
            {"key": "Left", **answered(1)},
            {"key": "Left", **answered(2)},
            {"js": SHOWN},
            {"key": "Left", "until": "ready && state.progress.answered === 3"},
            {"js": "document.querySelector('.done code').textContent"},
        )
    first, _, _, second, _, _, last, _, command = seen["values"]
    assert first == last != second and len(votes_of(folder)) == 3
    assert command == f"python label_preferences.py --images_dir={folder} --export=my_pairs"


def test_on_a_phone_images_are_stacked_and_buttons_are_under_the_thumb(browse, make_images, tmp_path):
    folder = make_images(2)
    boxes = "[...document.querySelectorAll(%r)].map(e => e.getBoundingClientRect()).map(r => [r.left, r.top, r.right, r.bottom])"
    with serving(folder) as (_, url):
        seen = browse(
            url,
            {"size": [390, 844], **answered(0)},
            {"js": boxes % "#images button"},
            {"js": boxes % "#keys button"},
            {
                "js": "[innerWidth, innerHeight, document.documentElement.scrollHeight, document.documentElement.scrollWidth]"
            },
            {"js": "[...document.querySelectorAll('#keys button')].map(b => b.lastChild.textContent)"},
            {"screenshot": str(tmp_path / "phone.png")},
            {"click": "#images button:nth-child(2)", **answered(1)},
        )
    (upper, lower), keys, (width, height, *page), names = seen["values"][1:5]
    assert upper[3] <= lower[1] and upper[2] - upper[0] > 0.9 * width and lower[3] - upper[1] > 0.5 * height
    assert page == [height, width] and names[:2] == ["upper", "lower"]
    assert all(bottom - top >= 44 and top > height / 2 and bottom <= height for _, top, _, bottom in keys)
    (vote,) = votes_of(folder)
    assert vote.best == vote.shown[1]


def test_a_ranking_takes_the_best_then_the_worst(browse, make_images):
    folder = make_images(3, k=4)
    with serving(folder, "--ranking=4") as (_, url):
        seen = browse(
            url,
            {"js": "document.getElementById('ask').textContent", **answered(0)},
            {"key": "2"},
            {"js": "document.getElementById('ask').textContent"},
            {"key": "2"},  # the best can't be the worst
            {"key": "Backspace"},
            {"key": "3"},
            {"key": "1", **answered(1)},
            {"key": "X", **answered(2)},
            {"key": "9"},
            {"js": "state.progress"},
        )
    assert seen["values"][0] == "Which is the best?" and seen["values"][2] == "And which is the worst?"
    assert seen["values"][-1]["answered"] == 2
    ranked, bad = votes_of(folder)
    assert (ranked.best, ranked.worst) == (ranked.shown[2], ranked.shown[0]) and len(set(ranked.shown)) == 4
    assert (bad.choice, bad.best, bad.worst) == ("bad", None, None)


@pytest.mark.parametrize("color_scheme, dark", [("0", True), ("1", False)])
def test_the_page_fits_the_screen_in_light_and_dark(browse, make_images, tmp_path, color_scheme, dark):
    folder = make_images(3)
    colours = (
        "[['body', 'body'], ['header', 'body'], ['#ask', 'body'], ['footer button', 'footer'], ['kbd', 'kbd']].map(([a, b]) =>"
        " [getComputedStyle(document.querySelector(a)).color, getComputedStyle(document.querySelector(b)).backgroundColor])"
    )
    fits = "[document.documentElement.scrollHeight <= innerHeight, document.documentElement.scrollWidth <= innerWidth]"
    shot = tmp_path / "page.png"
    with serving(folder) as (_, url):
        seen = browse(
            url,
            {"size": [1280, 720], **answered(0)},
            {"key": "Left", **answered(1)},
            {"js": colours},
            {"js": fits},
            {"screenshot": str(shot)},
            color_scheme=color_scheme,
        )
    for text, behind in seen["values"][2]:
        assert contrast(text, behind) >= 4.5, (text, behind)
    assert seen["values"][3] == [True, True]
    assert (np.asarray(Image.open(shot).convert("L"))[100:200, :10].mean() < 60) == dark


def contrast(a: str, b: str) -> float:
    def luminance(color: str) -> float:
        rgb = np.array([int(part) for part in re.findall(r"\d+", color)[:3]]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def request(url: str, data: dict | bytes | None = None, **headers: str) -> tuple[int, bytes, dict]:
    """Status, body and headers; redirects are not followed."""

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args):
            return None

    body = json.dumps(data).encode() if isinstance(data, dict) else data
    if isinstance(data, dict):
        headers = {"Content-Type": "application/json", **headers}
    asked = urllib.request.Request(url, body, {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.build_opener(Stay).open(asked, timeout=300) as response:
            return response.status, response.read(), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def test_only_who_has_the_token_and_asks_by_this_machines_name_gets_anything(make_images, tmp_path):
    folder = make_images(3)
    with serving(folder) as (_, url):
        host, _, token = url.partition("/?token=")
        status, _, headers = request(url)
        assert status == 303 and headers["location"] == "/"
        cookie = headers["set-cookie"].split(";")[0]
        assert "HttpOnly" in headers["set-cookie"] and "samesite=strict" in headers["set-cookie"].lower()
        state = json.loads(request(f"{host}/state", Cookie=cookie)[1])
        question, image = state["question"]["id"], state["question"]["images"][0]
        vote = {"question": question, "choice": "tie", "seconds": 1.0}

        for path in ("/", "/state", image):
            for cookies in ({}, {"Cookie": cookie[:-3]}, {"Cookie": cookie.replace(token, "")}):
                assert request(host + path, **cookies)[0] == 403, (path, cookies)
            assert request(host + path, Cookie=cookie, Host="evil.example")[0] == 400
            assert (
                request(
                    host + path, Cookie=cookie, Host=host.removeprefix("http://").replace("127.0.0.1", "localhost")
                )[0]
                == 200
            )
        assert request(f"{host}/?token=wrong")[0] == 403 and len(token) >= 32
        for path in ("/answer", "/undo"):
            assert request(host + path, vote)[0] == 403
            assert request(host + path, vote, Cookie=cookie, Content_Type="text/plain")[0] == 415
            assert request(host + path, vote, Cookie=cookie, Host="evil.example")[0] == 400
            assert request(host + path, b"{", Cookie=cookie, Content_Type="application/json")[0] == 400
            assert request(host + path, Cookie=cookie)[0] == 405
        for wrong in (
            {},
            vote | {"choice": "best"},
            vote | {"choice": "best", "best": [0], "worst": 1},
            vote | {"seconds": "x"},
        ):
            assert request(f"{host}/answer", wrong, Cookie=cookie)[0] == 400, wrong
        (tmp_path / "secret.png").write_bytes(b"x")
        for path in (
            "../../secret.png",
            "%2e%2e/secret.png",
            "made/000-0.png",
            "metadata.jsonl",
            f"image/{question}/2",
            "image/x/0",
        ):
            assert request(f"{host}/{path}", Cookie=cookie)[0] == 404, path
        assert votes_of(folder) == []

        assert json.loads(request(f"{host}/answer", vote, Cookie=cookie)[1])["taken"]
        assert not json.loads(request(f"{host}/answer", vote, Cookie=cookie)[1])["taken"]  # asked twice, counted once
        assert len(votes_of(folder)) == 1

        drawn = request(host + image, Cookie=cookie)
        assert drawn[2]["content-type"] == "image/png" and drawn[1].startswith(b"\x89PNG")
        assert (
            drawn[2]["x-content-type-options"] == "nosniff"
            and "default-src 'none'" in drawn[2]["content-security-policy"]
        )
        name = read_votes(folder)["me"][question].shown[0]
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "secret.png")  # a file that was exchanged after the start
        assert request(host + image, Cookie=cookie)[0] == 404


def test_the_port_is_on_this_machine_only_and_one_in_use_is_said(make_images):
    with serving(make_images(2)) as (process, url):
        port = re.search(r":(\d+)/", url)[1]
        listening = Path(f"/proc/{process.pid}/net/tcp").read_text()
        assert f"0100007F:{int(port):04X}" in listening and f"00000000:{int(port):04X}" not in listening
        command = [sys.executable, str(SCRIPT), f"--images_dir={make_images(2, name='others')}", f"--port={port}"]
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode == 1 and f"--port={port} can't be opened: Address already in use" in second.stderr
