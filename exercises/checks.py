"""
checks.py: the eight exercises, and what is wrong with an answer

THE IDEA    Write a function of this codebase yourself. The check tries it in a few milliseconds and
            says what is wrong with it, not only that it is wrong. It does not compare noise with
            noise: it looks at properties, such as "each position sees itself", so that a right
            answer may be written in any way. After "Right." your function draws a picture with the
            shipped weights.
A PICTURE   the stub, from the module        your lines           check
              def guide(cond, uncond, w):      return ...           "One too many: at w = 0 you ..."
                  raise NotImplementedError                         "Right."  ->  eight pictures
HOW         in a notebook    exercises/exercises.ipynb: check("guide", guide)
            from a file      python exercises/stubs.py > student.py
                             python exercises/grade.py student.py
ANOTHER     A ninth exercise is a file like guidance.py, and a line of the table below.
TEST        tests/test_exercises.py: each check accepts the module's own function and another right
            one, and meets eight or more wrong ones with the advice that fits each.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from attention_mask import intervals
from data import lay_out
from diffusion import ancestral_step, cosine_alpha_bar, guide
from exercises import codes, guidance, layout, loss, mask, patches, schedule, step, writing
from exercises.trial import judge, name_of
from model import losses
from patchify import patchify


@dataclass
class Exercise:
    """One function to write.

    number       which of the eight exercises it belongs to
    reference    the module's own function, or an adapter to it: signature, docstring and solution
    minutes      how long it takes who has read the page
    difficulty   1 to 5
    paper        where the paper speaks of it
    task         what to do, in a sentence or two
    try_out      function (trial) -> what was seen
    properties   see trial.judge
    """
    number: int
    reference: Callable
    minutes: int
    difficulty: int
    paper: str
    task: str
    try_out: Callable
    properties: tuple

    @property
    def name(self):
        """The function's name, which is the exercise's."""
        return self.reference.__name__

    def property_names(self):
        """What each property says of itself, in the order in which they are looked at."""
        return [name_of(has) for has in self.properties]


TABLE = (
    Exercise(1, intervals, 20, 2, '§3 "Transfusion Attention", Fig. 4',
             "Who may look at whom, as two numbers per position. Where does a document start, and "
             "where does a picture end? No loop is needed.",
             mask.try_intervals, mask.PROPERTIES),
    Exercise(2, patchify, 15, 1, '§3 "Latent Image Representation", Fig. 3',
             "Cut a latent picture into squares of p x p, and make each a vector: channel, then "
             "row, then column. Pictures need not be square.",
             patches.try_patchify, patches.PROPERTIES),
    Exercise(3, cosine_alpha_bar, 20, 2, "§2.2; Nichol & Dhariwal 2021, eq. 17",
             "The noise schedule, with f(t) = cos^2((t/T + offset) / (1 + offset) * pi/2) and "
             "beta_t = 1 - f(t)/f(t-1), at most beta_max.",
             schedule.try_cosine, schedule.PROPERTIES),
    Exercise(4, ancestral_step, 25, 3, "§2.2, §4.1; Ho et al. 2020, eq. 6 and 7",
             "One step of the sampler, from t to any u < t. All follows from a and s at the two "
             "ends, `diffusion.at(t, xt)`, and it must hold for DDPM and for flow.",
             step.try_step, step.PROPERTIES),
    Exercise(5, guide, 5, 1, "§2.2; Ho & Salimans 2022",
             "Classifier-free guidance: one line.",
             guidance.try_guide, guidance.PROPERTIES),
    Exercise(6, losses, 30, 3, "§2, eq. 1 and eq. 3",
             "Both losses of a batch, with one forward: logits, out = model(tokens, image_id, "
             "doc_id, has_loss, xt, t). The logits, (n, V), are those of the positions with "
             "has_loss. `stable` is for a rival: leave it alone.",
             loss.try_losses, loss.PROPERTIES),
    Exercise(7, codes.quantise, 30, 4, "App. C; van den Oord et al. 2017, eq. 3",
             "A picture becomes codes: find the nearest, and lead the gradients past the rounding.",
             codes.try_quantise, codes.PROPERTIES),
    Exercise(8, lay_out, 15, 2, '§3 "Data Representation"',
             "A document becomes one row of tokens. The pieces are in data.py: `Sequence()` and "
             "its method `add`, and the ids BOS, BOI, PATCH, EOI, EOS, DROP. A position has a loss "
             "if a token follows that the model shall learn to write.",
             layout.try_lay_out, layout.PROPERTIES),
    Exercise(8, writing.write, 15, 3, '§3 "Inference"',
             "The mode switch: write words until the model says BOI, denoise a picture, write on.",
             writing.try_write, writing.PROPERTIES),
)
EXERCISES = {exercise.name: exercise for exercise in TABLE}


def verdict(name, answer):
    """The trial.Verdict on an answer. name: one of EXERCISES. Prints nothing, raises nothing."""
    exercise = EXERCISES[name]
    return judge(answer, exercise.reference, exercise.try_out, exercise.properties)


def check(name, answer, reward=True):
    """Print what is wrong with an answer, or "Right." and draw with it. For notebooks.

    name      one of EXERCISES
    answer    the student's function
    reward    whether to draw; it takes a few seconds"""
    said = verdict(name, answer)
    if said.printed and said.status == "wrong":
        first = said.printed.splitlines()[:5]           # a check calls the function many times
        print("Your function printed:", *first, sep="\n    ")
    print(said.advice)
    if said.status != "right" or not reward:
        return
    # Imported here: it needs the shipped model, and matplotlib.
    from exercises import rewards
    sentence, path = rewards.draw(name, answer, Path("out/exercises"))
    print(sentence)
    if path:
        rewards.show(path)
