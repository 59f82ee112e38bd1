"""A real browser without a window: opens a page and does what it is told. Chromium, as Qt WebEngine brings it.

    python browser.py page.html '[{"js": "document.title"}, {"key": "Tab"}, {"screenshot": "page.png"}]'

The page is a file or a URL. A step is one of

- {"js": expression}, whose value is returned;
- {"key": "Left"}, pressed and let go, or {"press": "Space"} and {"release": "Space"};
- {"click": selector}, in the middle of the first element, and a second time for {"click": selector, "again": milliseconds later};
- {"screenshot": file}; {"size": [width, height]}; {"load": URL}; {"wait": milliseconds};

and any may have {"until": expression}, which is then waited for, five minutes at most.

Prints JSON: `values`, one for each step; `requests`, every URL the page asked for; `console`, every message of level
warning or error. It runs in a process of its own, since Qt wants the main thread.
"""

import json
import os
import sys
import time
from pathlib import Path


os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
FLAGS = "--no-sandbox --disable-gpu --blink-settings=preferredColorScheme="  # no sandbox: tests may run as root

DARK, LIGHT = "0", "1"


def main(page: str, steps: list[dict], color_scheme: str = LIGHT) -> dict:
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = FLAGS + color_scheme
    from PySide6.QtCore import QEventLoop, QPoint, Qt, QTimer, QUrl
    from PySide6.QtTest import QTest
    from PySide6.QtWebEngineCore import (
        QWebEnginePage,
        QWebEngineProfile,
        QWebEngineSettings,
        QWebEngineUrlRequestInterceptor,
    )
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    app = QApplication(sys.argv[:1])
    requests, console = [], []

    class Interceptor(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info):
            requests.append(info.requestUrl().toString()[:100])

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):
            if level != QWebEnginePage.JavaScriptConsoleMessageLevel.InfoMessageLevel:
                console.append(message)

    def wait(start, milliseconds=20000):
        """Runs the event loop until `start`'s callback is called; returns what it is given."""
        loop, results = QEventLoop(), []
        QTimer.singleShot(milliseconds, loop.quit)
        start(lambda result=None: (results.append(result), loop.quit()))
        if not results:
            loop.exec()
        return results[0] if results else sys.exit("the browser did not answer")

    def settle(milliseconds=300):
        wait(lambda done: QTimer.singleShot(milliseconds, done))

    profile, interceptor, view = QWebEngineProfile(), Interceptor(), QWebEngineView()
    profile.setUrlRequestInterceptor(interceptor)
    # Qt would keep a local page from the network, as other browsers do not.
    profile.settings().setAttribute(QWebEngineSettings.WebAttribute.LocalContentCanAccessRemoteUrls, True)
    view.setPage(Page(profile, view))
    view.resize(1200, 1400)
    view.show()

    def javascript(expression):
        value = wait(lambda done: view.page().runJavaScript(f"JSON.stringify({expression})", done))
        return json.loads(value) if value else None

    def load(page):
        url = QUrl(page) if page.startswith("http") else QUrl.fromLocalFile(str(Path(page).resolve()))
        wait(lambda done: (view.loadFinished.connect(done, Qt.ConnectionType.SingleShotConnection), view.load(url)))
        settle()

    load(page)
    values = []
    for step in steps:
        value = None
        if "js" in step:
            value = javascript(step["js"])
        for action, act in (("key", QTest.keyClick), ("press", QTest.keyPress), ("release", QTest.keyRelease)):
            if action in step:
                act(view.focusProxy(), getattr(Qt.Key, f"Key_{step[action]}"))
        if "click" in step:
            middle = (
                "(e => [e.x + e.width / 2, e.y + e.height / 2])(document.querySelector(%s).getBoundingClientRect())"
            )
            x, y = javascript(middle % json.dumps(step["click"]))
            for pause in [None, *([step["again"]] if "again" in step else [])]:
                if pause is not None:
                    settle(pause)
                QTest.mouseClick(view.focusProxy(), Qt.MouseButton.LeftButton, pos=QPoint(int(x), int(y)))
        if "load" in step:
            load(step["load"])
        if "size" in step:
            view.resize(*step["size"])
        if "until" in step:
            deadline = time.monotonic() + 300
            while not javascript(step["until"]):
                if time.monotonic() > deadline:
                    sys.exit(f"never came true: {step['until']}")
                wait(lambda done: QTimer.singleShot(10, done))
        elif "js" not in step:
            settle(step.get("wait", 300))
        if "screenshot" in step:
            view.grab().save(step["screenshot"])
        values.append(value)
    view.setPage(None)
    del app
    return {"values": values, "requests": requests, "console": console}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]), *sys.argv[3:])), flush=True)
    os._exit(0)  # Qt takes its time to leave
