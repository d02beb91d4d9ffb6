"""
page.py: a page to click. A document grows while you look       (§3 "Inference"; tests/test_page.py)
"""
import base64
import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

import sample
from support.checkpoint import decode_latents, load_trained
from support.common import ASSETS, Parser, UserError, pick_device, run_command

PAGE = """<!doctype html><meta charset=utf-8><title>Transfusion</title><style>
 body {font: 17px/1.7 system-ui, sans-serif; max-width: 46em; margin: 2em auto} * {font: inherit}
 b, span, button {padding: .2em .8em; border: 0; border-radius: .5em} b {background: #eee}
 .lm b:first-child, .noise b + b {background: #ea580c; color: #fff} .error #t {color: #b91c1c}
 div {display: flex; flex-wrap: wrap; gap: .4em; align-items: center; min-height: 11em;
   margin: 1em 0; padding: 1em; border-radius: .8em; background: #f6f6f4}
 div span {background: #dbeafe} .mark {background: #fed7aa !important}
 img {width: 9em; image-rendering: pixelated} output {margin-right: 1em}</style>
<b>LM mode</b> <b>diffusion mode</b> <span id=t></span><div id=row></div>
<form oninput="g.value = guidance.value; n.value = steps.value">
<input name=text size=70 value="a red circle left of a blue square">
<p><button>draw</button> <button>edit</button> <button>write</button> <a href=/>clear</a>
<p>guidance <input name=guidance type=range max=8 step=.5 value=3> <output name=g>3</output>
steps <input name=steps type=range min=2 max=250 value=25> <output name=n>25</output>
seed <input name=seed size=3 value=0></form><script>
const form = document.forms[0]; let parts = [], image       // the document; a picture being drawn
const add = (tag, more) => row.appendChild(Object.assign(document.createElement(tag), more))
const say = text => { if (text) { parts.push(text); add('span', {textContent: text}) } }
const show = event => {
  document.body.className = event.mode || ''; t.textContent = event.t || ''
  if (event.mode == 'error') return
  say(form.text.value.trim()); form.text.value = ''         // now that the model has read it
  say(event.word); if (event.mark) add('span', {textContent: event.mark, className: 'mark'})
  if (event.image) (image ||= add('img')).src = event.image
  if (event.mark == '<eoi>') { parts.push(image.src); image = null } }
form.onsubmit = click => {
  click.preventDefault(); form.inert = true
  const ask = {what: click.submitter.textContent, parts, ...Object.fromEntries(new FormData(form))}
  const request = new XMLHttpRequest(); let seen = 0
  request.onprogress = () => { const lines = request.responseText.split('\\n')
    while (seen < lines.length - 1) show(JSON.parse(lines[seen++])) }
  request.onloadend = () => form.inert = false
  request.open('POST', '/'); request.send(JSON.stringify(ask)) }</script>"""


class Handler(BaseHTTPRequestHandler):
    """GET is answered by the page, POST by a line of JSON for each event. drawn: the latents of
    pictures, by what the page shows of them; models: one that draws and writes, one that edits."""

    def do_GET(self, content=PAGE):
        """Send the page."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content.encode())

    def do_POST(self):
        """Send what happens, and a mistake of the user's as the last event."""
        ask = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.do_GET(content="")
        try:
            self.grow(ask, edits=ask["what"] == "edit", writes=ask["what"] == "write")
        except ValueError as mistake:
            self.tell(mode="error", t=str(mistake))

    def tell(self, **event):
        """Send an event."""
        self.wfile.write(json.dumps(event).encode() + b"\n")

    def grow(self, ask, edits, writes):
        """Let the document grow: edit its last picture, or write, or draw."""
        trained = self.models[edits]
        parts = []
        for part in [*ask["parts"], ask["text"]]:       # perhaps "[my.png] and words"
            parts += [self.drawn[part]] if part in self.drawn else sample.read_prompt(part, trained)
        if edits and [isinstance(part, str) for part in parts[-2:]] != [False, True]:
            raise UserError("draw a picture first, then say how to change it")

        def watch(event):
            if event.mode == "prompt":
                self.tell(mark="" if writes else "<boi>")
            elif event.mode == "word":
                name = trained.tokenizer.vocabulary[event.tokens[0]]
                self.tell(mode="lm", **{"mark" if name.startswith("<") else "word": name})
            elif event.mode == "noise":
                pixels = decode_latents(trained, event.x)[0]
                Image.fromarray(pixels).save(file := io.BytesIO(), "png")
                url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
                self.tell(mode="noise", t=f"t = {event.t}", image=url)
            if event.t == 0:
                self.drawn[url] = event.x[0].cpu()
                self.tell(mark="<eoi>")

        document = parts[-2:] if edits else parts     # Paper: §4.5, an edit is a document
        sample.generate(trained, [document], not writes, 64 * writes, 3, [int(ask["seed"])],
                        watch=watch, over="both" if edits else "words", steps=int(ask["steps"]),
                        sampler="dpm++", guidance=float(ask["guidance"]))


def main(argv=None):
    """Serve the page until Ctrl-C."""
    parser = Parser(prog="python -m notebooks.page")
    parser.add_argument("--checkpoint", default=ASSETS / "scenes.pt", help="it draws and writes")
    parser.add_argument("--edit", default=ASSETS / "scenes_edit.pt", help="it edits")
    args = parser.parse_args(argv)
    Handler.drawn = {}
    Handler.models = [load_trained(path, pick_device()) for path in (args.checkpoint, args.edit)]
    if {trained.kind for trained in Handler.models} != {"transfusion"}:
        raise UserError("a page can show Transfusion only: the rivals have no diffusion mode")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(f"open http://127.0.0.1:{server.server_port} in a browser", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run_command(main, if_stopped="the page is closed")
