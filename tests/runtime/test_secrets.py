"""Planted tokens: none of them is found in what a run writes or prints, whether it ends well or not. And model cards."""

import logging
import os
import subprocess
import sys
import traceback
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from helpers import arguments, face_rows, train, write_parquet, write_shards
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from orpo.config import TrainingConfig
from orpo.runtime.redaction import argument_without_secrets, without_secrets
from orpo.store.folder import read_manifest
from orpo.training.model_card import save_model_card
from PIL import Image

import convert_to_webdataset


SECRET = "planted5ecret"  # part of every planted token


@pytest.fixture
def planted(monkeypatch, tmp_path) -> None:
    """Tokens in the environment, as people have them there."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, f"{name}-{SECRET}".replace("_", "-"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), face_rows(16, ties=0), per_shard=4)


@contextmanager
def web_server(folder: Path):
    """Serves a folder, whatever user, password and query it is asked with; yields host and port."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def assert_nothing_leaked(tmp_path: Path, *texts: str) -> None:
    for text in texts:
        assert SECRET not in text, text[max(0, text.index(SECRET) - 300) :][:600]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
        assert SECRET not in str(path)


def run_and_listen(tmp_path, capfd, caplog, monkeypatch, *positional, **flags) -> Exception | None:
    """A whole run in this process; returns what it raised. Fails if a planted token is found anywhere after it."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(*positional, **flags)])  # wandb records it
    error = None
    with caplog.at_level(logging.DEBUG):
        try:
            train(*positional, **flags)
        except Exception as raised:
            error = raised
    printed = capfd.readouterr()
    trace = "".join(traceback.format_exception(error)) if error else ""
    assert_nothing_leaked(tmp_path, printed.out, printed.err, caplog.text, trace)
    return error


@pytest.mark.parametrize("report_to", ["tensorboard", "wandb"])
def test_a_run_on_rows(tiny_sdxl, faces, tmp_path, planted, capfd, caplog, monkeypatch, report_to):
    flags = {"report_to": report_to, "checkpointing_steps": 1, "max_train_steps": 1}
    error = run_and_listen(tmp_path, capfd, caplog, monkeypatch, tiny_sdxl, faces, tmp_path / "lora", **flags)
    assert error is None
    assert (tmp_path / "lora" / "checkpoint-1").is_dir() and (tmp_path / "lora" / "README.md").exists()
    if report_to == "wandb":
        (recorded,) = tmp_path.rglob("offline-run-*/*.wandb")
        assert b"max_train_steps" in recorded.read_bytes()  # the command line is recorded


PATHS = {
    "a command": "pipe:TOKEN=hf_" + SECRET + " cat {folder}/train-{{00000..00003}}.tar # Bearer " + SECRET,
    "a URL": "http://somebody:" + SECRET + "@{host}/train-{{00000..00003}}.tar?X-Amz-Signature=" + SECRET,
}


@pytest.mark.parametrize("name", PATHS)
def test_a_run_on_shards(tiny_sdxl, folder, tmp_path, planted, capfd, caplog, monkeypatch, name):
    """Three runs: one that ends well, one whose shards can't be read, one with a bad sample too many."""
    go = partial(run_and_listen, tmp_path, capfd, caplog, monkeypatch, tiny_sdxl, None)
    with web_server(folder) as host:
        path = PATHS[name].format(folder=folder, host=host)
        flags = {"report_to": "wandb", "checkpointing_steps": 2}
        assert go(tmp_path / "lora", dataset_path=path, **flags) is None
    path = PATHS[name].format(folder=folder / "none", host=host)  # the server is down
    missing = go(tmp_path / "none", dataset_path=path)
    assert isinstance(missing, OSError) and "exit" in str(missing) and "train-0000" in str(missing)
    data = face_rows(8, ties=0)
    data[1]["jpg_0"] = b"no image"
    broken = write_shards(tmp_path / "broken", data, per_shard=2)
    with web_server(broken) as host:
        error = go(tmp_path / "bad", dataset_path=PATHS[name].format(folder=broken, host=host), max_train_steps=9)
    assert isinstance(error, ValueError) and "train-00000.tar: 1 undecodable image" in str(error)


@pytest.mark.parametrize("url", ["s3://key:" + SECRET + "@bucket/x.tar", "ftp://u:" + SECRET + "@host/x.tar"])
def test_urls_that_cannot_carry_credentials_are_refused_without_showing_them(
    tiny_sdxl, tmp_path, capfd, caplog, monkeypatch, url
):
    (tmp_path / "a").touch()
    error = run_and_listen(tmp_path, capfd, caplog, monkeypatch, tiny_sdxl, None, tmp_path / "lora", dataset_path=url)
    assert isinstance(error, ValueError) and url.partition("://")[0] in str(error)


def test_the_converter(tmp_path, planted, monkeypatch):
    """As a command, with Ray and its logs."""
    data = write_parquet(tmp_path / "in", face_rows(4, ties=0))

    def run(*flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, convert_to_webdataset.__file__, *flags]
        environment = os.environ | {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "RAY_TMPDIR": str(ray_logs)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert SECRET not in result.stdout + result.stderr, result.stderr[-3000:]
        assert result.returncode == 0, result.stderr[-3000:]
        return result

    ray_logs = Path("/tmp") / f"r{os.getpid()}"  # Ray needs a short path
    try:
        run(f"--dataset_name={data}", f"--output_dir={tmp_path / 'out'}")
        assert read_manifest(str(tmp_path / "out")).shards[0].samples == 4
        assert_nothing_leaked(tmp_path)
        logs = [path for path in ray_logs.rglob("*") if path.is_file()]
        assert logs and not [path for path in logs if SECRET.encode() in path.read_bytes()]
    finally:
        subprocess.run(["rm", "-rf", str(ray_logs)], check=True)


def test_the_converter_refuses_credentials_in_urls_without_showing_them(tmp_path):
    data = write_parquet(tmp_path / "in", face_rows(4))
    for flag in ("dataset_name", "output_dir"):
        flags = {"dataset_name": data, "output_dir": str(tmp_path / "x")} | {flag: f"s3://key:{SECRET}@bucket/x"}
        with pytest.raises(ValueError, match="AWS_SECRET_ACCESS_KEY") as raised:
            convert_to_webdataset.main([f"--{name}={value}" for name, value in flags.items()])
        assert SECRET not in "".join(traceback.format_exception(raised.value))
    with pytest.raises(ValueError, match="https://host/data is a URL") as raised:
        convert_to_webdataset.main([f"--dataset_name=https://u:{SECRET}@host/data?t={SECRET}", "--output_dir=x"])
    assert SECRET not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    "url, shown",
    [
        ("shards/train-00000.tar", "shards/train-00000.tar"),
        ("https://u:p@host:1/a/0.tar?sig=x#y", "https://host:1/a/0.tar"),
        ("https://u:p@ss@host/0.tar", "https://host/0.tar"),
        ("s3://bucket/a/0.tar", "s3://bucket/a/0.tar"),
        ("pipe:aws s3 cp s3://b/a/0.tar -", "pipe:aws ... 0.tar"),
        ("pipe:A=x curl -H 'Authorization: t' https://h/0.tar", "pipe: ... 0.tar"),
        ("pipe:TOKEN=x", "pipe: ..."),
        ("hf_model/name", "hf_model/name"),
        ("0.001", "0.001"),
    ],
)
def test_what_is_shown_of_a_url(url, shown):
    assert without_secrets(url) == shown
    assert argument_without_secrets(f"--dataset_path={url}") == f"--dataset_path={shown}"
    assert argument_without_secrets(url) == shown


# Model cards


class Family:
    """What the card asks of a model family."""

    name, license, tags = "Family", "mit", ["a-tag"]

    @staticmethod
    def inference_snippet(lora: str, prompt: str, steps: int, guidance_scale: float) -> str:
        return f"pipeline.load_lora_weights({lora!r})\nimage = pipeline({prompt!r}).images[0]\n"


def write_card(
    folder: Path, prompts: list[str], name: str = "lora", data: str = "data", base: str = "base/model"
) -> str:
    config = TrainingConfig(
        pretrained_model_name_or_path="base/model", dataset_path=("shards",), validation_prompts=tuple(prompts)
    )
    object.__setattr__(config, "pretrained_model_name_or_path", base)  # as no name on the Hub could be
    images = [Image.new("RGB", (8, 8))] * len(prompts)
    results = SimpleNamespace(images=images, images_without_lora=images, metrics={}, metrics_without_lora={})
    run = SimpleNamespace(config=config, hub_repository=f"somebody/{name}", output_dir=Path("out", name))
    save_model_card(run, Family, data, 3, results, folder)
    return (folder / "README.md").read_text(encoding="utf-8")


def shown(tokens: list) -> tuple[list[str], list[str]]:
    """What a reader sees, a string for each inline element, and the kinds of all tokens."""
    texts, kinds = [], []
    for token in tokens:
        kinds.append(token.type)
        if token.type == "inline":
            texts.append("".join(child.content for child in token.children if child.type != "image"))
            kinds += [child.type for child in token.children]
    return texts, kinds


def read_card(card: str) -> tuple[dict, list[str], list[str]]:
    """Front matter, as the Hub reads it, and the text below, by a Markdown parser with tables and HTML allowed."""
    parsed = ModelCard(card)
    texts, kinds = shown(
        MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(parsed.text)
    )
    return parsed.data.to_dict(), texts, kinds


INJECTIONS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](https://tracker.example/pixel.png)",
    "</td></table>",
    "a | b | c",
    "a \\| b",
    "`code` ``` \n```\n# heading",
    "---\nlicense: proprietary\n---",
    "\n---\nbase_model: other\n---\n",
    "*bold* _it_ ~~gone~~ **b**",
    "<https://evil.example>",
    "&lt;b&gt; &#60;",
    "- item\n1. item",
    "line\r\n\r\n<div>",
    "'quote\" : yaml # comment",
    "{% raw %} {{ jinja }}",
    "\u202etxt.exe\x00\x1b[31m",
    "broken \ud83d",
    "\\",
    "~" * 5 + "\n",
]


def visible(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def squeeze(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("text", INJECTIONS)
def test_prompts_names_and_paths_come_out_of_a_card_as_text(tmp_path, text):
    plain_front, plain_texts, plain_kinds = read_card(write_card(tmp_path, ["plain"], "name", "data", "base"))
    front, texts, kinds = read_card(write_card(tmp_path, [text], f"n{text}".replace("/", ""), text, text))
    assert kinds == plain_kinds  # not an element more or less: no HTML, link, heading, cell
    assert front.keys() == plain_front.keys() and front["license"] == "mit" and front["tags"] == plain_front["tags"]
    assert front["widget"][0]["text"] == visible(text) and front["base_model"] == text
    seen = [squeeze(line) for line in texts]
    assert squeeze(visible(text)) in seen  # the cell of the table
    assert any(line.startswith("data: ") and squeeze(visible(text)) in line for line in seen)
    assert any(squeeze(visible(text)) in line for line in seen if line.startswith("A LoRA for"))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    prompt=st.text(
        alphabet=st.one_of(st.sampled_from("\\`*_[]()<>&~|@#$!-+=:.\n\r{}'\" ab1/"), st.characters()), max_size=40
    )
)
def test_any_prompt_comes_out_as_text(prompt, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "cards"
    folder.mkdir(exist_ok=True)
    _, _, plain_kinds = read_card(write_card(folder, ["plain"]))
    front, texts, kinds = read_card(write_card(folder, [prompt]))
    assert front["widget"][0]["text"] == visible(prompt)
    if prompt.strip() and squeeze(visible(prompt)):
        assert kinds == plain_kinds
        assert squeeze(visible(prompt)) in map(squeeze, texts)
