"""
export.py: a model.pt of any checkpoint of a run                     (Transfusion Fig. 5, App. B.1)

THE IDEA    A run of weeks should be scored on its way: Fig. 5 needs one model after several
            budgets. A checkpoint has the weights, in pieces and with all that a resumed run needs.
            What model.pt has beside them (tokenizer, VAE, noise process) is the same from the first
            step to the last, so the run keeps it once, in parts.pt. Both together are a model.pt.
A PICTURE   out/<name>/parts.pt -----------------------+
            out/<name>/checkpoints/step_050000/ -------+--> out/<name>/model_050000.pt
                       its averaged weights alone      |    sample.py, evaluate.py, metrics/ ...
            the run itself is left alone, also while it trains
PAPER/HERE  our choice: the averaged weights, if the run has an average. The last two checkpoints
            are there, and those of --keep-every. The rate has not fallen to its end by then: a
            run that was planned that long scores a little better.
            TRAP: torch unpickles a checkpoint's .metadata, which may run code: export only runs of
            your own.
READ NEXT   distributed.py
TRY IT      python -m scale.export out/scenes/checkpoints/step_004500
TEST        tests/test_train_runs.py, tests/test_distributed.py
"""
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from model import ModelConfig, Transfusion
from scale import distributed
from support import checkpoint
from support.common import Parser, UserError, check_writable, run_command


def read_weights(folder, config):
    """{name: float32 tensor} of a checkpoint: the average, or the model of a run without one.

    folder    out/<name>/checkpoints/step_...          config    model.ModelConfig
    Raises UserError if the checkpoint is damaged, or of another model."""
    damaged = distributed.damaged_files(folder)
    if damaged:
        raise UserError(f"{folder} is damaged: {damaged[0]} is not what was written")
    with torch.device("meta"):
        model = Transfusion(config)
    weights = model.to_empty(device="cpu").state_dict()
    try:
        entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        # The optimizer's two moments are not read: at 7B they are 54 GB.
        part = "average" if any(name.startswith("average.") for name in entries) else "model"
        dcp.load({part: weights}, checkpoint_id=folder, no_dist=True)   # fills them in place
    except (Exception, dcp.api.CheckpointException) as problem:     # the latter is no Exception
        raise UserError(f"{folder} cannot be read ({type(problem).__name__}): truncated, or of "
                        f"another model?") from None
    return weights


def read_parts(out):
    """What the run in the folder `out` has beside weights: the dict of parts.pt, or of the model.pt
    of a run from before there was one. Raises UserError if there is neither."""
    path = out / "parts.pt"
    if not path.exists():
        path = out / "model.pt"
    if not path.exists():
        raise UserError(f"{out} has no parts.pt, which has the tokenizer and the VAE: put the "
                        f"run's own there, or resume the run, which writes it again")
    return checkpoint.load(path, ("parts", "model"))


def check_checkpoint(folder):
    """Raise UserError if a folder is not a complete checkpoint of a run."""
    out = folder.parent.parent
    complete, _ = distributed.list_checkpoints(out)
    if folder in [distributed.folder_of(out, step) for step in complete]:
        return
    inside, _ = distributed.list_checkpoints(folder)        # perhaps it is the folder of a run
    names = [str(distributed.folder_of(folder, step)) for step in inside]
    there = f"; {folder} has {', '.join(names)}" if names else ""
    raise UserError(f"{folder} is not a complete checkpoint: name one like "
                    f"out/scenes/checkpoints/step_004500{there}")


def export(folder, path):
    """Write the checkpoint in a folder as a model.pt."""
    check_checkpoint(folder)
    check_writable(path, ".pt")
    parts = read_parts(folder.parent.parent)
    config = checkpoint.typed(ModelConfig, parts["config"])
    weights = checkpoint.in_16_bits(read_weights(folder, config))
    checkpoint.save(path, parts | {"kind": "model", "weights": weights})


def main(argv=None):
    """Export the checkpoint that the command line names."""
    parser = Parser(
        prog="python -m scale.export",
        description="Make a model.pt of a checkpoint of a run, which may still be training.")
    parser.add_argument("checkpoint", help="out/<name>/checkpoints/step_...")
    parser.add_argument("-o", "--out", help="the file; default: out/<name>/model_<step>.pt")
    args = parser.parse_args(argv)

    folder = Path(args.checkpoint)
    step = folder.name.removeprefix("step_")
    path = folder.parent.parent / f"model_{step}.pt" if args.out is None else Path(args.out)
    export(folder, path)
    print(f"wrote {path}: python sample.py \"...\" --checkpoint {path}")


if __name__ == "__main__":
    run_command(main)
