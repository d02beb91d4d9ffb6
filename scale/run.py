"""
run.py: a training run, before its first step and after its last        (Transfusion §4.1, App. B.1)

THE IDEA    train.py shows the loop. What must exist before the loop stands here: the feed, the
            model with its first weights, its average, its optimizer, all of them divided among the
            processes. What is needed afterwards stands here, too: the whole model in one piece.
A PICTURE   Config --prepare--> Run --train.fit--> Run --gather_trained--> model.pt
                     |
                     build_feed, build_run, and on --resume the last checkpoint
READ NEXT   distributed.py      TEST  tests/test_train.py, tests/test_distributed.py
"""
from dataclasses import dataclass

import torch

import scale.feed
import sources.feed
from autoencoder.train import train_vae
from config import MAY_CHANGE_ON_RESUME, Config
from diffusion import Diffusion
from model import Transfusion
from scale import distributed
from sources import choose
from support import checkpoint, run_folder
from support.common import UserError

# For Run.explain_memory: what is going on, and the bytes per parameter that it takes (bfloat16: 2).
WHOLE_MODEL = ("a whole copy of the model is measured", 2)


@dataclass
class Run:
    """Everything that a step needs. On several processes, model and average are divided among them.

    config      every number of the run
    ranks       which processes there are, and on which device this one computes
    micros      the numbers of this process's own micro-batches of a step
    feed        where batches come from: sources/feed.py or scale/feed.py
    diffusion   the noise process
    model       the network that is trained
    average     the average of its weights over the last steps; with --ema 0 the model itself
    optimizer   AdamW
    step        how many steps have been taken
    """
    config: Config
    ranks: distributed.Ranks
    micros: range
    feed: object
    diffusion: Diffusion
    model: Transfusion
    average: Transfusion
    optimizer: torch.optim.Optimizer
    step: int = 0

    def explain_memory(self, activity="", bytes_per_parameter=0):
        """Turn "out of memory" into a sentence about this run: see distributed.explain_memory."""
        return distributed.explain_memory(self.average.config, self.config, self.ranks, activity,
                                          bytes_per_parameter)

    def gather_average(self):
        """The averaged model, whole on every process. Every process must call it."""
        def make():
            return Transfusion(self.average.config)

        with self.explain_memory(*WHOLE_MODEL):
            return distributed.gather_model(make, self.average, self.ranks.dtype).eval()

    def gather_trained(self):
        """checkpoint.Trained of the averaged model: all that sampling needs. Every process must
        call it."""
        return checkpoint.Trained(self.gather_average(), self.feed.tokenizer, self.feed.vae,
                                  self.diffusion, self.config.model, self.config.text_share)


    def not_finite(self, norm, batches, micro_losses):
        """The UserError for a step whose gradient is not finite. norm: the gradient's; batches: the
        data.Batch of each micro-batch; micro_losses: the loss of each."""
        where = "its loss is finite, its gradient is not"
        for micro, batch, loss in zip(self.micros, batches, micro_losses, strict=True):
            if not loss.isfinite():
                text = self.feed.tokenizer.decode(batch.tokens[0].tolist())
                where = f"the loss of micro-batch {micro}, \"{text[:60]} ...\", is {loss.item()}"
                break
        complete, _ = distributed.list_checkpoints(self.config.out)
        kept = "there is no checkpoint yet"
        if complete:
            kept = f"{distributed.folder_of(self.config.out, complete[-1])} is still good"
        return UserError(f"step {self.step + 1} was not taken, because the norm of its gradient is "
                         f"{norm.item()}: {where}. Lower --lr, raise --warmup, or look at these "
                         f"documents; {kept}")


# ---------------------------------------------------------------------------------- before the loop
def prepare(config, out, resume, overwrite, view):
    """The Run that a command line asks for: new, or where its last checkpoint ends. Everything that
    can be wrong is found here, before the first step.

    config, out           the run's numbers, and its folder
    resume, overwrite     whether --resume or --overwrite was given
    view                  see `build_feed`
    Raises UserError."""
    # 1. Is the folder free, or does it hold this very run?
    ranks = distributed.start(config.shard)
    distributed.micro_batches(config.accumulate)            # can they be dealt out evenly?
    complete, incomplete = distributed.list_checkpoints(out)
    run_folder.check_start(out, complete, resume, overwrite)
    if resume:
        run_folder.check_same_run(out, config, MAY_CHANGE_ON_RESUME)

    # 2. Data, then model. --init starts from a trained one: §4.5 fine-tunes it for editing.
    start = checkpoint.load_trained(config.init) if config.init else None
    if start and start.kind != config.model:
        raise UserError(f"{config.init} is a {start.kind}, not a {config.model}: --model must be "
                        f"what the checkpoint is")
    diffusion = start.diffusion if start else Diffusion(config.diffusion, shift=config.shift)
    feed = build_feed(config, out, diffusion, start, resume, view)
    run = build_run(config, ranks, feed, diffusion, start)

    # 3. Go on where the last checkpoint ends, or clear the folder.
    if resume:
        run_folder.check_same_data(out, feed.describe())
        run.step = complete[-1]
        with run.explain_memory("the checkpoint is read"):
            distributed.load(out, run.step, ranks, run.model, run.average, run.optimizer)
        skipped = [f"(step_{step:06d} was not finished: skipped)" for step in incomplete]
        distributed.say("resuming from", distributed.folder_of(out, run.step), *skipped)
    if distributed.rank() == 0:
        for step in [] if resume else complete:             # --overwrite
            distributed.remove(distributed.folder_of(out, step))
        run_folder.write_config(out, config, feed.describe())
    return run


def build_feed(config, out, diffusion, start, resume, view):
    """The feed of the data at hand: shards on disk, or pictures in memory. If there is no VAE for
    those, it is trained first.

    config      the run's numbers           out     its folder
    diffusion   its noise process           start   the checkpoint.Trained of --init, or None
    resume      whether the run goes on from a checkpoint in `out`
    view        function (first code's id) -> how the model sees a document (chameleon.view)
    Raises UserError if data, VAE, tokenizer and options do not fit together."""
    if config.data == "shards":
        return scale.feed.build_feed(config, diffusion, start, view)

    with distributed.rank_0_first():                        # it may download
        test = choose.load_source(config, "test", n=256)
    progress = distributed.rank() == 0
    vae = find_vae(config, out, start, resume)

    def train_first(pixels, vae_config):
        return train_vae_once(config, out, pixels, vae_config)

    return sources.feed.build_feed(config, test, diffusion, start, vae, train_first, view, progress)


def find_vae(config, out, start, resume):
    """The VAE, or for a Chameleon the VQ-VAE, that the run uses. None: there is none yet."""
    if start:
        return start.vae
    # --resume: reuse out/vae.pt, which this run has trained. Otherwise ignore it: it belongs to an
    # earlier run.
    own = out / "vae.pt" if resume else None
    return checkpoint.find_vae(config.data, config.vae, own, codes=config.model == "chameleon")


def train_vae_once(config, out, pixels, vae_config):
    """Train the run's VAE on pixels and keep it in out/vae.pt. Process 0 trains; the others wait,
    and read its file."""
    path = out / "vae.pt"
    with distributed.rank_0_first():
        if distributed.rank() == 0:
            vae = train_vae(pixels, vae_config, config.vae_steps, seed=config.seed)
            checkpoint.save(path, checkpoint.pack_vae(vae))
        return checkpoint.find_vae(config.data, path, codes=config.model == "chameleon")


def build_run(config, ranks, feed, diffusion, start):
    """The Run at step 0. Its model has random weights, or those of the checkpoint `start`.
    ranks: distributed.Ranks; the other arguments are those of `build_feed`."""
    torch.manual_seed(config.seed)

    def make():
        return Transfusion(feed.shape)

    def make_first():
        return start.model.train() if start else make()

    # 1. The model, and the average of its weights.
    activity = "process 0 draws the first weights in main memory"
    with distributed.explain_memory(feed.shape, config, ranks, activity, bytes_per_parameter=4):
        model = distributed.shard_model(make_first, ranks, config.checkpointing, config.compile)
        average = model                     # --ema 0 keeps no second copy: at 7B that is 27 GB
        if config.ema:
            weights = {name: w.detach().clone() for name, w in model.state_dict().items()}
            average = distributed.wrap_weights(make, weights)
    feed.vae.to(ranks.device)

    # 2. The optimizer.
    # Paper: App. B.1, AdamW with betas (0.9, 0.95), eps 1e-8, weight decay 0.1.
    # Our choice: no decay on vectors, which are norms and biases.
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.decay},
              {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

    # 3. Which micro-batches of each step are ours.
    micros = distributed.micro_batches(config.accumulate)
    return Run(config, ranks, micros, feed, diffusion, model, average, optimizer)
