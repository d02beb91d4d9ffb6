"""
test_page.py: does the page to click do what its buttons say?
                                                        (notebooks/page.py; Transfusion §3, §4.5)

THE IDEA    Whoever clicks "draw" must get the picture of the caption, on a page that shows how it
            comes about. So the tests click, and read the pictures that come back.
COMPARED    what is drawn with its caption, by the scenes world's own parser. Over HTTP always; in a
            real headless browser, driven through chromedriver's own protocol, where chromium is
            installed.
RUN IT      pytest -n 0 tests/test_page.py
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
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--window-size=900,900",
]


@pytest.fixture(scope="module")
def address():
    """Where the page is served, with the shipped models."""
    names = ("scenes.pt", "scenes_edit.pt")
    page.Handler.models = [checkpoint.load_trained(ASSETS / name) for name in names]
    page.Handler.drawn = {}

    def be_quiet(*_):
        pass

    page.Handler.log_message = be_quiet
    with ThreadingHTTPServer(("127.0.0.1", 0), page.Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def call(url, body=None, method=None):
    """What a URL answers, as text. body: a dict to send as JSON."""
    content = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, content, headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def ask(address, what, text, *parts, **options):
    """The events that a click causes, as dicts. what: the button; text: in the field; parts: of the
    document so far, texts and pictures; options: the sliders."""
    body = ASK | {"what": what, "text": text, "parts": list(parts)} | options
    return [json.loads(line) for line in call(address, body).splitlines()]


def shows(url, caption):
    """Whether a picture of the page is exactly what a caption says. url:
    data:image/png;base64,..."""
    _, content = url.split(",")
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(content))))
    return scenes.holds(scenes.read_caption(caption), scenes.parse(pixels))


# --------------------------------------------------------------------------------------- over HTTP
def test_draw_edit_and_write(address):
    """Catches a picture that arrives only when it is finished, a button that does another's work,
    an edit of anything but the last picture, and a document that is lost between two clicks."""
    # 1. Draw: <boi>, a picture per step, <eoi>.
    words = "a red circle left of a blue square"
    start, *steps, end = ask(address, "draw", words)
    assert start == {"mark": "<boi>"}
    assert end == {"mark": "<eoi>"}
    times = (1000, 875, 750, 625, 500, 375, 250, 125, 0)
    assert [event["t"] for event in steps] == [f"t = {t}" for t in times]
    assert {event["mode"] for event in steps} == {"noise"}
    drawn = steps[-1]["image"]
    assert shows(drawn, words)

    # 2. Edit, in a document of two pictures: the last one changes.
    *_, last, _ = ask(address, "draw", "a green triangle", seed="3")
    document = ["a green triangle", last["image"], words, drawn]
    *_, last, _ = ask(address, "edit", "make the circle yellow", *document)
    edited = last["image"]
    yellow = "a yellow circle left of a blue square"
    assert shows(edited, yellow)
    assert not shows(drawn, yellow)

    # 3. Write: what the model says of the picture is true of it.
    events = ask(address, "write", "", edited)
    said = [event["word"] for event in events if "word" in event]
    assert events[0] == {"mark": ""}
    assert events[-1] == {"mode": "lm", "mark": "<eos>"}
    assert shows(edited, " ".join(said))
    assert {"yellow", "blue"} <= set(said)


def test_sliders_reach_the_model(address):
    """Catches a slider or a seed that changes nothing."""
    def draw(**options):
        *_, last, _ = ask(address, "draw", "a red circle", **{"steps": "2"} | options)
        return last["image"]

    pictures = {draw(), draw(steps="3"), draw(guidance="1"), draw(seed="1")}
    assert len(pictures) == 4
    assert draw() in pictures                           # the same sliders, the same picture


@pytest.mark.parametrize("what, text, options, sentence", [
    ("draw", "an elephant", {}, "'an' is not in this model's vocabulary"),
    ("edit", "make the circle blue", {}, "draw a picture first"),
    ("draw", "a red circle [absent.png]", {}, "there is no file absent.png"),
    ("draw", "a red circle", {"steps": "0"}, "steps must be between 1 and 1000"),
    ("draw", "a red circle", {"seed": "x"}, "invalid literal"),
    ("draw", "a red circle " * 40, {}, "the prompt needs"),
], ids=str)
def test_mistakes_are_sentences(address, what, text, options, sentence):
    """Catches a page that stands still without a word, and one that is broken afterwards."""
    *before, event = ask(address, what, text, **options)
    assert before == [] or options
    assert event["mode"] == "error"
    assert sentence in event["t"]
    assert call(address) == page.PAGE                   # it still answers


def test_a_rival_has_no_page(tmp_path):
    """Catches a server that starts and can do nothing."""
    content = checkpoint.load(ASSETS / "scenes.pt", "model")
    content["about"] = {"kind": "llama", "text_share": -1.0}
    checkpoint.save(tmp_path / "llama.pt", content)
    models = page.Handler.models
    with pytest.raises(UserError, match="Transfusion only"):
        page.main(["--checkpoint", str(tmp_path / "llama.pt")])
    page.Handler.models = models


# ------------------------------------------------------------------------------------ in a browser
class Browser:
    """A headless chromium, by the W3C's WebDriver protocol."""

    def __init__(self, driver):
        options = {"goog:chromeOptions": {"args": FLAGS, "binary": shutil.which("chromium")}}
        answer = self.post(f"{driver}/session", {"capabilities": {"alwaysMatch": options}})
        self.session = f"{driver}/session/{answer['sessionId']}"

    def post(self, url, body):
        """The value of the driver's answer."""
        return json.loads(call(url, body))["value"]

    def do(self, command, **body):
        """One command of the protocol, such as "url"."""
        return self.post(f"{self.session}/{command}", body)

    def run(self, script):
        """What a script returns that runs in the page."""
        return self.do("execute/sync", script=script, args=[])

    def element(self, css):
        """The address of the first element that a CSS selector finds."""
        answer = self.do("element", **{"using": "css selector", "value": css})
        return f"element/{next(iter(answer.values()))}"

    def type(self, css, text):
        """Press the keys of a text in an element."""
        self.do(f"{self.element(css)}/value", text=text)

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
        free.bind(("127.0.0.1", 0))                     # 0: any port that is free
        _, port = free.getsockname()
    url = f"http://127.0.0.1:{port}"
    line = [shutil.which("chromedriver"), f"--port={port}"]
    driver = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    try:
        wait(lambda: call(f"{url}/status"))
        opened = Browser(url)
        yield opened
        call(opened.session, method="DELETE")
    finally:
        driver.terminate()
        driver.wait(30)


# Watches the page: which modes it was in, and which pictures it has shown.
WATCH = """
window.modes = []
window.seen = new Set()
const byMode = new MutationObserver(() => modes.push(document.body.className))
byMode.observe(document.body, {attributes: true})
const byPicture = new MutationObserver(
    changes => changes.forEach(change => seen.add(change.oldValue)))
byPicture.observe(row, {
    attributes: true, subtree: true, attributeFilter: ['src'], attributeOldValue: true})
"""
MODES = "return [...new Set(modes)].filter(Boolean)"
DRAW = "button:nth-of-type(1)"
EDIT = "button:nth-of-type(2)"
WRITE = "button:nth-of-type(3)"
ARROW_TO_THE_LEFT = "\ue012"                            # WebDriver's name of the key


def test_click_through(address, browser):
    """Draw, edit, let the model write; then a mistake. Catches what only a browser can: a script
    that does not run, modes that do not light up, a picture that does not change while it is
    drawn."""
    browser.do("url", url=address)
    browser.run(WATCH)
    browser.type("[name=steps]", ARROW_TO_THE_LEFT * 5)
    slider = browser.run("return document.querySelector('[name=steps] + output').textContent")
    assert slider == "20"

    # 1. Draw the caption that stands there at the beginning.
    browser.click(DRAW)
    assert browser.run(MODES) == ["noise"]
    assert browser.run("return seen.size") == 21        # the noise, and a picture per step
    drawn = browser.run("return document.querySelector('img').src")
    assert shows(drawn, "a red circle left of a blue square")

    # 2. Edit it.
    browser.type("[name=text]", "make the circle yellow")
    browser.click(EDIT)
    edited = browser.run("return document.querySelectorAll('img')[1].src")
    assert shows(edited, "a yellow circle left of a blue square")

    # 3. Write. The row shows the whole document, without pictures' insides.
    browser.run("modes.length = 0")
    browser.click(WRITE)
    assert browser.run(MODES) == ["lm"]
    row = "[...document.querySelectorAll('#row span')]"
    chips = browser.run(f"return {row}.map(chip => chip.textContent)")
    assert chips == [
        "a red circle left of a blue square",
        "<boi>",
        "<eoi>",
        "make the circle yellow",
        "<boi>",
        "<eoi>",
        "<eos>",
    ]

    # 4. A mistake: a sentence, and the field keeps what was typed.
    browser.type("[name=text]", "an elephant")
    browser.click(DRAW)
    assert "vocabulary" in browser.run("return t.textContent")
    assert browser.run("return document.forms[0].text.value") == "an elephant"
