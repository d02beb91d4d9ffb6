"""
sample_options.py: the command line of `python sample.py`

THE IDEA    sample.py is read for the algorithm. What can be asked of it, and every way to ask
            wrongly, stands here.
READ NEXT   ../sample.py        TRY IT  python sample.py --help        TEST  tests/test_errors.py
"""
import argparse
import math
import re
from pathlib import Path

from PIL import Image

from diffusion import SAMPLERS
from support.common import Parser, UserError, check_seed, check_steps, check_writable


def parse_arguments(argv, guide_over):
    """The options of a command line, checked. guide_over: what guidance may leave out.
    Raises UserError."""
    parser = Parser(
        description="Words to a picture, a picture to words, or any mixture of them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    # What to do.
    add("prompts", nargs="*",
        help="what to draw, several as one batch; [file.png] puts a picture among the words")
    add("--checkpoint", help="a model.pt of train.py; without it: assets/scenes.pt, and with "
                             "--edit assets/scenes_edit.pt")
    add("--image", action="append", default=[],
        help="describe this picture, or --edit it (may be repeated)")
    add("--edit", action="append", default=[],
        help="change --image as told; repeated: one after the other")
    add("--open", action="store_true",
        help='let the model decide itself when to draw (prompts may be "")')
    add("--pictures", type=int, default=1, help="with --open: at most so many per document")
    # What to leave behind.
    add("--out", "-o", help="picture to write (several: side by side); without it: sample.png, "
                            "or sample_2.png if that exists, and so on")
    add("--film", help="also write the denoising, as .gif (a film) or .png (a strip)")
    add("--trace", action="store_true", help="print the modes and the growing cache")
    # How pictures are drawn, and words chosen.
    add("--steps", type=int, default=250,
        help="diffusion steps, 1 to 1000; 25 do for --sampler dpm++")
    add("--guidance", type=float, default=3.0,
        help="0 ignores the caption, 1 is plain, 3 is the paper's (ablations)")
    add("--guide-over", choices=guide_over,
        help="what guidance leaves out; without it: with --edit both, else words")
    add("--sampler", choices=SAMPLERS, default="ddpm", help="ddpm is the paper's")
    add("--seed", type=int, default=0, help="seed of the noise")
    add("--temperature", type=float, default=0.0, help="of the words; 0 is greedy")
    add("--top-p", type=float, default=1.0, help="keep the likeliest words up to this probability")
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def check_arguments(args):
    """Raise UserError for the first mistake in the options, before anything is loaded."""
    describes = args.image and not args.edit
    mistakes = [
        (args.edit and not args.image,
         '--edit needs the picture to change: --image in.png --edit "make the circle blue"'),
        (not args.prompts and not args.image,
         'say what to draw, e.g. python sample.py "a red circle", or give a picture with --image'),
        (args.prompts and args.image,
         '--image stands alone or with --edit; to put pictures among words, write '
         '"[in.png] make the circle blue"'),
        (args.open and args.image,
         '--open takes prompts, not --image (write "[in.png] and words")'),
        (args.pictures != 1 and not args.open,
         "--pictures belongs to --open"),
        (args.film and describes,
         "--film shows a picture being drawn; --image without --edit only describes one"),
        (not 0 <= args.guidance < math.inf,             # written so that nan is found, too
         f"--guidance must be 0 or more, got {args.guidance}"),
        (not 0 <= args.temperature < math.inf,
         f"--temperature must be 0 or more, got {args.temperature}"),
        (not 0 < args.top_p <= 1,
         f"--top-p must be above 0 and at most 1, got {args.top_p}"),
        (args.pictures < 1,
         f"--pictures must be at least 1, got {args.pictures}"),
    ]
    for wrong, sentence in mistakes:
        if wrong:
            raise UserError(sentence)
    check_steps(args.steps)
    check_seed(args.seed)
    for text in (*args.prompts, *args.edit):
        check_brackets(text)
    for path, ending in ((args.out, ".png"), (args.film, ".gif, .png")):
        if path is not None:
            check_picture_name(path, ending)


def check_brackets(text):
    """Raise UserError for words that name a picture: the model would not know such a word."""
    outside = re.sub(r"\[.*?\]", " ", text)
    for word in outside.split():
        if Path(word).suffix.lower() in Image.registered_extensions():
            raise UserError(f"{word} stands among the words: --image {word} describes a picture, "
                            f"and in brackets, [{word}], it is part of a prompt")


def check_picture_name(path, ending):
    """Raise UserError if no picture can be written there, before one is drawn. ending: the usual
    one, for the sentence."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:                          # Pillow can only read some
        raise UserError(f"cannot write {path}: its name must end in {ending} or another picture "
                        "type")
    check_writable(path)


def free_name():
    """sample.png, or sample_2.png, sample_3.png, ...: the first that does not exist. A default
    must never overwrite a picture of the user's."""
    path = Path("sample.png")
    k = 1
    while path.exists():
        k += 1
        path = Path(f"sample_{k}.png")
    return path
