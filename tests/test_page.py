"""
test_page.py: does the page to click do what its buttons say?                    (notebooks/page.py; Transfusion §3, §4.5)

Over HTTP always; in a real headless browser, driven through chromedriver's own protocol, where chromium is installed.
"""
import base64
import io
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from http.server import ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from notebooks import page
from sources import scenes
from support import checkpoint
from support.common import ASSETS, UserError

ASK = {"parts": [], "guidance": "3", "steps": "8", "seed": "0"}
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=900,900"]


@pytest.fixture(scope="module")
def address():
    """Where the page is served, with the shipped models."""
    page.Handler.models = [checkpoint.load_trained(ASSETS / name) for name in ("scenes.pt", "scenes_edit.pt")]
    page.Handler.drawn = {}
    page.Handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), page.Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def call(url, body=None, method=None):
    """What a URL answers, as text. body: a dict to send as JSON."""
    content = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, content, {"Content-Type": "application/json"}, method=method), timeout=60) as answer:
        return answer.read().decode()


def ask(address, what, text, *parts, **options):
    """The events of a button."""
    return [json.loads(line) for line in call(address, ASK | {"what": what, "text": text, "parts": list(parts)} | options).splitlines()]


def shows(url, caption):
    """Whether a picture of the page is exactly what a caption says."""
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))
    return scenes.holds(scenes.read_caption(caption), scenes.parse(pixels))


# ----------------------------------------------------------------------------------------------------------- over HTTP
def test_draw_edit_and_write(address):
    """Catches a picture that arrives only when it is finished, a button that does another's work, an edit of anything but the last
    picture, and a document that is lost between two clicks."""
    words = "a red circle left of a blue square"
    events = ask(address, "draw", words)
    assert events[0] == {"mark": "<boi>"} and events[-1] == {"mark": "<eoi>"}
    assert [event["t"] for event in events[1:-1]] == [f"t = {t}" for t in (1000, 875, 750, 625, 500, 375, 250, 125, 0)]
    assert {event["mode"] for event in events[1:-1]} == {"noise"}
    drawn = events[-2]["image"]
    assert shows(drawn, words)

    other = ask(address, "draw", "a green triangle", seed="3")[-2]["image"]
    events = ask(address, "edit", "make the circle yellow", "a green triangle", other, words, drawn)
    edited = events[-2]["image"]
    assert shows(edited, "a yellow circle left of a blue square") and not shows(drawn, "a yellow circle left of a blue square")

    events = ask(address, "write", "", edited)
    said = [event["word"] for event in events if "word" in event]
    assert events[0] == {"mark": ""} and events[-1] == {"mode": "lm", "mark": "<eos>"}
    assert shows(edited, " ".join(said)) and {"yellow", "blue"} <= set(said)


def test_sliders_reach_the_model(address):
    """Catches a slider or a seed that changes nothing."""
    def last(**options):
        return ask(address, "draw", "a red circle", **{"steps": "2"} | options)[-2]["image"]

    pictures = {last(), last(steps="3"), last(guidance="1"), last(seed="1")}
    assert len(pictures) == 4 and last() in pictures


@pytest.mark.parametrize("what, text, options, sentence", [
    ("draw", "an elephant", {}, "'an' is not in this model's vocabulary"),
    ("edit", "make the circle blue", {}, "draw a picture first"),
    ("draw", "a red circle [absent.png]", {}, "there is no file absent.png"),
    ("draw", "a red circle", {"steps": "0"}, "steps must be between 1 and 1000"),
    ("draw", "a red circle", {"seed": "x"}, "invalid literal"),
    ("draw", "a red circle " * 40, {}, "the prompt needs")], ids=str)
def test_mistakes_are_sentences(address, what, text, options, sentence):
    """Catches a page that stands still without a word, and one that is broken afterwards."""
    *before, event = ask(address, what, text, **options)
    assert before == [] or options
    assert event["mode"] == "error" and sentence in event["t"]
    assert call(address) == page.PAGE


def test_a_rival_has_no_page(tmp_path):
    """Catches a server that starts and can do nothing."""
    content = checkpoint.load(ASSETS / "scenes.pt", "model")
    content["about"] = {"kind": "llama", "text_share": -1.0}
    checkpoint.save(tmp_path / "llama.pt", content)
    models = page.Handler.models
    with pytest.raises(UserError, match="Transfusion only"):
        page.main(["--checkpoint", str(tmp_path / "llama.pt")])
    page.Handler.models = models


# ----------------------------------------------------------------------------------------------------------- in a browser
class Browser:
    """A headless chromium, by the W3C's WebDriver protocol."""

    def __init__(self, driver):
        options = {"goog:chromeOptions": {"args": FLAGS, "binary": shutil.which("chromium")}}
        answer = self.post(f"{driver}/session", {"capabilities": {"alwaysMatch": options}})
        self.session = f"{driver}/session/{answer['sessionId']}"

    def post(self, url, body):
        return json.loads(call(url, body))["value"]

    def do(self, command, **body):
        return self.post(f"{self.session}/{command}", body)

    def run(self, script):
        return self.do("execute/sync", script=script, args=[])

    def element(self, css):
        answer = self.do("element", **{"using": "css selector", "value": css})
        return f"element/{next(iter(answer.values()))}"

    def click(self, css):
        """Click, and wait until the form can be used again."""
        self.do(f"{self.element(css)}/click")
        wait(lambda: not self.run("return document.forms[0].inert"))


def wait(ready, seconds=60):
    """Return when ready() is true, and answers."""
    for _ in range(seconds * 10):
        try:
            if ready():
                return
        except OSError:                                 # the driver does not listen yet
            pass
        time.sleep(0.1)
    raise TimeoutError


@pytest.fixture(scope="module")
def browser():
    """A Browser, if chromium and its driver are installed."""
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("apt-get install chromium chromium-driver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen([shutil.which("chromedriver"), f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        wait(lambda: call(f"http://127.0.0.1:{port}/status"))
        opened = Browser(f"http://127.0.0.1:{port}")
        yield opened
        call(opened.session, method="DELETE")
    finally:
        driver.terminate()
        driver.wait(30)


def test_click_through(address, browser):
    """Draw, edit, let the model write; then a mistake. Catches what only a browser can: a script that does not run, modes that do
    not light up, a picture that does not change while it is drawn."""
    browser.do("url", url=address)
    browser.run("""window.modes = []; window.seen = new Set()
        new MutationObserver(() => modes.push(document.body.className)).observe(document.body, {attributes: true})
        new MutationObserver(changes => changes.forEach(change => seen.add(change.oldValue)))
            .observe(row, {attributes: true, subtree: true, attributeFilter: ['src'], attributeOldValue: true})""")
    browser.do(f"{browser.element('[name=steps]')}/value", text="\ue012" * 5)            # five times: arrow to the left
    assert browser.run("return document.querySelector('[name=steps] + output').textContent") == "20"

    browser.click("button:nth-of-type(1)")
    assert browser.run("return [...new Set(modes)].filter(Boolean)") == ["noise"] and browser.run("return seen.size") == 21
    drawn = browser.run("return document.querySelector('img').src")
    assert shows(drawn, "a red circle left of a blue square")

    browser.do(f"{browser.element('[name=text]')}/value", text="make the circle yellow")
    browser.click("button:nth-of-type(2)")
    edited = browser.run("return document.querySelectorAll('img')[1].src")
    assert shows(edited, "a yellow circle left of a blue square")

    browser.run("modes.length = 0")
    browser.click("button:nth-of-type(3)")
    assert browser.run("return [...new Set(modes)].filter(Boolean)") == ["lm"]
    chips = browser.run("return [...document.querySelectorAll('#row span')].map(chip => chip.textContent)")
    assert chips == ["a red circle left of a blue square", "<boi>", "<eoi>", "make the circle yellow", "<boi>", "<eoi>", "<eos>"]

    browser.do(f"{browser.element('[name=text]')}/value", text="an elephant")
    browser.click("button:nth-of-type(1)")
    assert "vocabulary" in browser.run("return t.textContent") and browser.run("return document.forms[0].text.value") == "an elephant"
