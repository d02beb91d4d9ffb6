"""
trial.py: one answer of a student's, tried without harm

THE IDEA    A check calls a function that somebody else has written. It may raise, loop for ever,
            change what it is given, seed the world's random numbers, print, or return a list
            where a tensor is wanted. All of these are mistakes that deserve a sentence. So a check
            never calls an answer itself: it calls a Trial of it, and a Trial raises only Advice.
A PICTURE   check -> Trial -> answer
              |       |  <- an exception, a changed input, a seed ...     becomes  Advice
              |       v
              |     result -> need_tensor, need_pair: None, a list, a shape ...    Advice, too
              v
            properties of the result: each gives a sentence, or nothing if it holds
READ NEXT   checks.py        TEST  tests/test_exercises.py
"""
import contextlib
import copy
import dataclasses
import inspect
import io
import random
import signal
import textwrap
import threading
import traceback
import warnings

import numpy as np
import torch

LIMIT = 5.0                     # seconds; a right answer to any of the exercises takes 0.05
SEED = 8191                     # of the world's random numbers during a call; any number would do


class Advice(Exception):
    """One sentence for the student. Raised anywhere in a check, it ends the check."""


class NotWritten(Exception):
    """The answer is still the stub."""


class TooLong(BaseException):
    """The answer takes too long. No Exception, or a student's `except Exception` would eat it."""


# -------------------------------------------------------------------------------- calling an answer
class Trial:
    """An answer that is called like a function, and whose faults are raised as Advice.

    answer      what the student wrote; hopefully a function
    reference   the module's own function: its parameters' names are those of the exercise
    printed     all that the answer has printed so far
    """

    def __init__(self, answer, reference):
        self.answer = answer
        self.name = reference.__name__
        self.signature = inspect.signature(reference)
        self.printed = ""
        if not callable(answer):
            raise Advice(f"`{self.name}` is not a function but {kind_of(answer)}.")

    def __call__(self, *inputs):
        """What the answer returns. Raises Advice, or NotWritten."""
        # 1. Inputs go by position, so that the student may call them something else. A copy of
        #    each tells afterwards what was changed.
        self.check_parameters(inputs)
        before = [copy_of(value) for value in inputs]
        chance = Chance()
        text = io.StringIO()

        # 2. The call.
        try:
            # Prints and warnings would drown the one line that matters.
            with contextlib.redirect_stdout(text), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = self.answer(*inputs)
        except NotImplementedError:
            raise NotWritten from None
        except (Advice, TooLong, KeyboardInterrupt):    # Advice: a scripted model has seen enough
            raise
        except BaseException as problem:                # SystemExit, and what students make up
            raise Advice(self.explain(problem)) from None
        finally:
            self.printed += text.getvalue()

        # 3. What it did besides returning something.
        chance.check_untouched()
        names = list(self.signature.parameters)
        for name, was, value in zip(names, before, inputs):
            # x *= 2 in a step of the sampler changes the x that the caller still shows.
            if not unchanged(was, value):
                raise Advice(f"Your function changes its input `{name}`. Whoever called it still "
                             f"needs that: make a new one instead of working in place (`+=`, "
                             f"`append`, a method that ends in `_`, `x[...] = ...`).")
        return result

    def raised(self, *inputs):
        """The name of the exception that the answer raises for these inputs, or "nothing"."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.answer(*inputs)
        except (TooLong, KeyboardInterrupt):
            raise
        except BaseException as problem:
            return "ValueError" if isinstance(problem, ValueError) else type(problem).__name__
        return "nothing"

    def check_parameters(self, inputs):
        """Raise Advice if the answer cannot be called with these inputs, or has other defaults."""
        try:
            signature = inspect.signature(self.answer)
            signature.bind(*inputs)
        except ValueError:                              # a built-in function does not say
            return
        except TypeError:
            raise Advice(f"The parameters must be those of the stub: "
                         f"{self.name}{self.signature}.") from None
        # A check gives most arguments itself. Whoever calls the function later may not.
        for mine, own in zip(self.signature.parameters.values(), signature.parameters.values()):
            if own.kind == own.VAR_POSITIONAL:
                return
            if mine.default is not mine.empty and repr(own.default) != repr(mine.default):
                says = "has none" if own.default is own.empty else f"says {shorten(own.default)}"
                raise Advice(f"`{own.name}` must have the default of the stub, {mine.default}; "
                             f"yours {says}: {self.name}{self.signature}.")

    def explain(self, problem):
        """One sentence about an exception, with the line of the student's code, if it is known."""
        kind = type(problem).__name__
        if isinstance(problem, SystemExit):
            return "Your function ends the whole program (exit): return the result instead."
        if isinstance(problem, RecursionError):
            return "Your function calls itself without end (RecursionError)."
        message = shorten(problem)
        what = f"{kind}: {message}" if message else kind
        code = getattr(self.answer, "__code__", None)
        return f"Your function raises {what}{place(problem, code and code.co_filename)}."


class Chance:
    """The world's random numbers: set before a call, and looked at after it."""

    # Everything that an exercise draws comes from an argument. An answer that draws by itself
    # cannot be repeated, and one that seeds makes all noise of a training run the same.
    def __init__(self):
        torch.manual_seed(SEED)
        self.torch_state = torch.get_rng_state()
        self.numpy_state = numpy_state()
        self.python_state = random.getstate()

    def check_untouched(self):
        """Raise Advice if somebody has seeded, or drawn."""
        same_torch = torch.equal(torch.get_rng_state(), self.torch_state)
        same_numpy = numpy_state() == self.numpy_state
        same_python = random.getstate() == self.python_state
        if same_torch and same_numpy and same_python:
            return
        # torch remembers its last seed. numpy and Python do not, so there both read alike.
        if torch.initial_seed() != SEED:
            raise Advice("Your function seeds the world's random numbers (torch.manual_seed): "
                         "every later draw of the program would be the same. Leave the seed alone.")
        raise Advice("Your function draws random numbers of its own, or seeds them. All chance "
                     "must come from its arguments, or nothing that uses it can be repeated.")


def numpy_state():
    """The state of numpy's random numbers, as something that can be compared."""
    _, numbers, place, *_ = np.random.get_state()
    return numbers.tobytes(), place


@contextlib.contextmanager
def chance_restored():
    """Whatever happens inside, the world's random numbers go on as before."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


@contextlib.contextmanager
def time_limit(seconds):
    """Raise TooLong inside after so many seconds."""
    # Only Unix has this alarm, and only the main thread hears it. Elsewhere a student must press
    # Stop. grade.py has a limit of its own, which no code can escape.
    on_main = threading.current_thread() is threading.main_thread()
    if not hasattr(signal, "setitimer") or not on_main:
        yield
        return

    def stop(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def copy_of(value):
    """A copy of an input, to compare with later; of what is there to be used, nothing."""
    if isinstance(value, torch.Generator) or getattr(value, "remembers", False):
        return None
    return copy.deepcopy(value)


def unchanged(before, after):
    """Whether an input is what its copy is. Looks into lists, tuples and objects."""
    if before is None:
        return True
    if isinstance(before, torch.Tensor):
        same_kind = isinstance(after, torch.Tensor) and before.shape == after.shape
        return same_kind and before.dtype == after.dtype and torch.equal(before, after)
    if isinstance(before, (list, tuple)):
        if len(before) != len(after):
            return False
        return all(unchanged(a, b) for a, b in zip(before, after))
    if not hasattr(before, "__dict__"):                 # a number, a string
        return before == after
    return all(unchanged(value, vars(after).get(name)) for name, value in vars(before).items())


# ---------------------------------------------------------------------------- reading what it says
def kind_of(value):
    """What a value is, in a few words."""
    if value is None:
        return "None"
    kind = type(value).__name__
    article = "an" if kind[0].lower() in "aeiou" else "a"
    return f"{article} {kind}"


def place(problem, filename):
    """Where in a student's file an exception was raised, " (line 3: return x + y)", or "". Of all
    its lines on the way, the deepest."""
    for frame in reversed(traceback.extract_tb(problem.__traceback__)):
        if frame.filename == filename:
            return f" (line {frame.lineno}: {shorten(frame.line, 60)})"
    return ""


def shorten(problem, width=140):
    """The first words of a message, on one line."""
    try:
        return textwrap.shorten(str(problem), width, placeholder=" ...")
    except Exception:                                   # a __str__ that raises
        return ""


def need_tensor(value, name="The result", like=""):
    """The value as a tensor without gradient. Raises Advice if it is something else, or not finite.

    name    what the advice calls it, at the start of a sentence
    like    "float", "int" or "bool"; "": any"""
    if value is None:
        raise Advice(f"{name} is None: is the `return` missing?")
    if not isinstance(value, torch.Tensor):
        raise Advice(f"{name} must be a torch tensor, but it is {kind_of(value)}.")
    if value.is_meta or value.layout != torch.strided:
        raise Advice(f"{name} must be an ordinary tensor, not a sparse one or one without numbers.")
    value = value.detach()
    is_float = value.is_floating_point()
    is_bool = value.dtype == torch.bool
    kinds = {"float": is_float, "bool": is_bool, "int": not (is_float or is_bool)}
    if like and not kinds[like]:
        raise Advice(f"{name} must have dtype {like}, but it has {value.dtype}.")
    if is_float and value.isnan().any():
        raise Advice(f"{name} contains NaN: somewhere 0 is divided by 0, or a root or a logarithm "
                     f"is taken of a negative number.")
    if is_float and value.isinf().any():
        raise Advice(f"{name} contains an infinite number: is something divided by 0?")
    return value


def need_shape(value, shape, name="The result"):
    """Raise Advice if a tensor has another shape."""
    if value.shape != torch.Size(shape):
        raise Advice(f"{name} must have shape {tuple(shape)}, not {tuple(value.shape)}.")


def need_several(value, names):
    """The value as a tuple of as many parts as there are names. Raises Advice otherwise."""
    wanted = f"({', '.join(names)})"
    if value is None:
        raise Advice(f"Your function returns None: is `return {', '.join(names)}` missing?")
    if not isinstance(value, (tuple, list)):
        raise Advice(f"Return {len(names)} things, {wanted}; you return {kind_of(value)}.")
    if len(value) != len(names):
        raise Advice(f"Return {len(names)} things, {wanted}; you return {kind_of(value)} of "
                     f"{len(value)}.")
    return tuple(value)


def near(a, b, atol=1e-6, rtol=1e-4):
    """Whether two tensors have the same shape and nearly the same numbers."""
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol)


# -------------------------------------------------------------------------------------- the verdict
@dataclasses.dataclass
class Verdict:
    """What a check says about an answer.

    status      "right", "wrong", or "not written"
    advice      one line
    failed      the property that does not hold; "" if none was reached
    printed     what the answer printed
    """
    status: str
    advice: str
    failed: str = ""
    printed: str = ""


def name_of(has):
    """The name of a property: the first line of its docstring."""
    return has.__doc__.strip().splitlines()[0]


def judge(answer, reference, try_out, properties):
    """The Verdict on an answer. Raises nothing but KeyboardInterrupt.

    reference     the module's own function
    try_out       function (trial) -> what is seen when the answer is tried
    properties    functions (seen) -> one sentence of advice, or None if the property holds.
                  The first line of each one's docstring is its name."""
    trial = None
    failed = ""
    advice = ""
    try:
        with chance_restored(), time_limit(LIMIT):
            trial = Trial(answer, reference)
            seen = try_out(trial)
            for has in properties:
                failed = name_of(has)
                advice = has(seen)
                if advice:
                    break
    except NotWritten:
        return Verdict("not written", "Not written yet: put your lines in place of "
                                      "`raise NotImplementedError`.")
    except Advice as sentence:
        advice = str(sentence)
    except TooLong:
        advice = (f"Your function does not end: {LIMIT:g} seconds have passed, and a right answer "
                  f"takes a few thousandths of one. Which loop never stops?")
    except Exception as problem:
        # What comes back can be stranger than any check foresees.
        advice = (f"What your function returns cannot be read ({type(problem).__name__}: "
                  f"{shorten(problem)}). Is it what the docstring says?")
    printed = trial.printed if trial else ""
    if advice:
        return Verdict("wrong", " ".join(advice.split()), failed, printed)
    if printed:
        return Verdict("right", "Right. (It also prints something: take that out.)", "", printed)
    return Verdict("right", "Right.", "", printed)
