"""
run.py: a training run, before its first step and after its last        (Transfusion §4.1, App. B.1)

THE IDEA    train.py shows the loop. What must exist before the loop stands here: the feed, the
            model with its first weights, its average, its optimizer, all of them divided among the
            processes. What is needed afterwards stands here, too: the whole model in one piece.
A PICTURE   Config --prepare--> Run --train.fit--> Run --gather_trained--> model.pt
                     |
                     build_feed, build_run, and on --resume the last checkpoint
THE RULE    A step with a number that is not finite is not taken, and what is saved is finite.
READ NEXT   distributed.py
TEST        tests/test_train.py, tests/test_train_runs.py, tests/test_distributed.py,
            tests/test_not_finite.py
"""
import contextlib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

import scale.feed
import sources.feed
from autoencoder import quality
from autoencoder.train import train_vae
from config import MAY_CHANGE_ON_RESUME, Config
from diffusion import Diffusion
from model import Transfusion
from scale import distributed, plan
from scale.shards import same_in_16_bits
from sources import choose
from support import checkpoint, run_folder
from support.checkpoint import ANY_VAE
from support.common import Stopped, UserError, finish_step_first
from support.origin import Origin, begin
from support.start import DECIDED_BY_INIT, take_over

# For Run.explain_memory: what is going on, and the bytes per parameter that it takes (bfloat16: 2).
WHOLE_MODEL = ("a whole copy of the model is measured", 2)

# Of a run that trains its own VAE: the VAE, and the state of its training.
VAE_FILES = ("vae.pt", "vae/last.pt")


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
    end         the step after which it ends: config.steps, or an earlier one
    step        how many steps have been taken
    origin      where its model comes from: command, commit, device
    """
    config: Config
    ranks: distributed.Ranks
    micros: range
    feed: object
    diffusion: Diffusion
    model: Transfusion
    average: Transfusion
    optimizer: torch.optim.Optimizer
    end: int
    step: int = 0
    origin: Origin = field(default_factory=Origin)

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
        return self.trained(self.gather_average())

    def trained(self, model):
        """checkpoint.Trained of a model and what goes with it."""
        return checkpoint.Trained(model, self.feed.tokenizer, self.feed.vae, self.diffusion,
                                  self.config.model, self.config.text_share,
                                  self.origin.until_now())

    def drawing(self):
        """How the run's own pictures are drawn: options of `sample.draw`."""
        options = {"steps": self.config.sample_steps, "guidance": self.config.guidance,
                   "sampler": self.config.sampler}
        if self.config.data == "edits":
            options["over"] = "both"                    # words, and the picture before them
        return options

    def how_to_use(self):
        """The command that uses the run's model.pt."""
        programs = {"transfusion": 'sample.py "..."', "chameleon": 'chameleon.py "..."',
                    "llama": "-m metrics.likelihood perplexity text.jsonl"}
        program = programs[self.config.model]
        if self.config.data == "edits":
            program = 'sample.py --image in.png --edit "..."'
        if self.config.data == "documents":
            program = 'sample.py --open "..."'
        return f"python {program} --checkpoint {self.config.out}/model.pt"

    def not_finite(self, norm, batches, losses):
        """The UserError for a step that must not be taken: the norm of its gradient, or a loss of
        some process, is not finite. Every process must call it, and all say the same.

        norm      float, of the whole gradient
        batches   the data.Batch of each of this process's micro-batches
        losses    the loss of each, floats"""
        culprit = ""
        for micro, batch, loss in zip(self.micros, batches, losses, strict=True):
            if not math.isfinite(loss):
                words = words_of_culprit(batch, self.feed.tokenizer)
                culprit = f"the loss of micro-batch {micro} is {loss}, in \"{words}\""
                break
        culprits = distributed.split_work(lambda *_: culprit, range(distributed.size()))
        named = [name for name in culprits if name] or ["its losses are finite"]
        return UserError(f"step {self.step + 1} was not taken: {named[0]}; the norm of its "
                         f"gradient is {norm}; lower --lr, raise --warmup, or look at these "
                         f"documents; {last_good(self.config.out, self.step)}")


def words_of_culprit(batch, tokenizer):
    """The words of the first document of a batch that has a latent that is not finite; otherwise
    those of the first document."""
    row = 0
    position = 0
    broken = ~batch.latents.flatten(1).isfinite().all(1)                        # (M,)
    if broken.any():
        picture = broken.nonzero()[0]
        row, position = (batch.image_id == picture).nonzero()[0].tolist()
    same_document = batch.doc_id[row] == batch.doc_id[row, position]            # (T,)
    ids = batch.tokens[row][same_document].tolist()
    words = tokenizer.decode([k for k in ids if k < len(tokenizer)])            # no codes
    return words if len(words) <= 60 else f"{words[:60]} ..."


def last_good(out, step):
    """Which checkpoint there is to go on from, in words. step: that of the run. A checkpoint that
    is being written at this moment counts: the run waits for it before it ends."""
    complete, incomplete = distributed.list_checkpoints(out)
    steps = [number for number in complete + incomplete if number <= step]
    if steps:
        return f"{distributed.folder_of(out, max(steps))} is still good"
    return "there is no checkpoint yet"


# ---------------------------------------------------------------------------------- before the loop
@contextlib.contextmanager
def sole_run(config):
    """Inside, no other training writes to the run's folder, and whoever is stopped between two
    steps (Ctrl-C, SIGTERM) is told how to go on."""
    out = Path(config.out)
    with contextlib.ExitStack() as stack:
        if os.environ.get("RANK", "0") == "0":          # torchrun's; one process locks for all
            stack.enter_context(run_folder.lock(out))
        try:
            yield
        except KeyboardInterrupt as stop:
            if str(stop):                               # it has been said
                raise
            raise Stopped(how_to_go_on(out), getattr(stop, "signals", ())) from None


def how_to_go_on(out):
    """What the user can do after a stop, in words."""
    complete, _ = distributed.list_checkpoints(out)
    if complete:
        return f"the same command with --resume goes on from step {complete[-1]}"
    if run_folder.has_begun_vae(out):
        return "the same command with --resume goes on with the VAE"
    return "nothing was learned yet; the same command starts again"


def prepare(config, out, resume, overwrite, view, command=""):
    """The Run that a command line asks for: new, or where its last checkpoint ends. Everything that
    can be wrong is found here, before the first step.

    config, out           the run's numbers, and its folder
    resume, overwrite     whether --resume or --overwrite was given
    view                  see `build_feed`
    command               what its model.pt says of where it comes from
    Raises UserError."""
    # 1. Is the folder free, or does it hold this very run?
    ranks = distributed.start(config.shard)
    origin = begin(command, ranks.device, distributed.size())
    complete, incomplete = distributed.from_rank_0(lambda: distributed.list_checkpoints(out))
    run_folder.check_start(out, complete, resume, overwrite)
    divide_step(config, out, ranks, resume)
    distributed.micro_batches(config.accumulate)            # can they be dealt out evenly?
    end = config.steps
    if resume:
        # What --init decides is in config.json, but not yet in these options.
        decided = DECIDED_BY_INIT if config.init else set()
        run_folder.check_same_run(out, config, MAY_CHANGE_ON_RESUME | decided)
        config.steps = run_folder.read_config(out, config)["steps"]     # the rate falls as planned
    if complete and resume and end < complete[-1]:
        raise UserError(f"{out} has already taken {complete[-1]} steps, so it cannot end at "
                        f"--steps {end}: give --steps {complete[-1]} to end it here, or make a "
                        f"model of an earlier checkpoint with python -m scale.export")

    # 2. Data, then model. --init starts from a trained one: §4.5 fine-tunes it for editing.
    start = checkpoint.load_trained(config.init) if config.init else None
    if start and start.kind != config.model:
        raise UserError(f"{config.init} is a {start.kind}, not a {config.model}: --model must be "
                        f"what the checkpoint is")
    if start:
        take_over(config, start)
    diffusion = start.diffusion if start else Diffusion(
        config.diffusion, shift=config.shift, noise_skip=config.noise_skip)
    feed = build_feed(config, out, diffusion, start, resume, view)
    if ranks.device.type == "cuda":                         # a CPU's cores are busy with the step
        feed = scale.feed.Ahead(feed)
    run = build_run(config, ranks, feed, diffusion, start)
    run.end = end
    run.origin = origin

    # 3. Go on where the last checkpoint ends, or clear the folder.
    if resume and complete:
        run_folder.check_same_data(out, feed.describe(), feed.describe_as_before)
        with run.explain_memory("the checkpoint is read"):
            run.step = distributed.load_newest(out, ranks, run.model, run.average, run.optimizer)
        skipped = [f"(step_{step:06d} was not finished: skipped)" for step in incomplete]
        distributed.say("resuming from", distributed.folder_of(out, run.step), *skipped)
    if distributed.rank() == 0:
        if not resume:
            clear(config, out)
        run_folder.write_config(out, config, feed.describe())
        # scale/export.py adds the weights of a checkpoint, while the run goes on.
        checkpoint.save(out / "parts.pt", checkpoint.parts_of(run.trained(run.average)))
    return run


def divide_step(config, out, ranks, resume):
    """Set how a step is divided into micro-batches, where the command line leaves it open:
    --accumulate 0, and --auto. The step stays as large as it is. The arguments are those of
    `prepare`; ranks: distributed.Ranks. Raises UserError if nothing fits in memory."""
    processes = distributed.size()
    if config.accumulate == 0:
        before = run_folder.read_config(out, config) if resume else {}
        if before and before["documents"] * before["accumulate"] == config.documents:
            config.documents = before["documents"]          # divided as it was
            config.accumulate = before["accumulate"]
        else:
            config.documents = math.ceil(config.documents / processes)
            config.accumulate = processes
    if not config.auto:
        return

    model = plan.model_of(config, "--auto")
    if ranks.device.type != "cuda":
        raise UserError("--auto looks at a GPU's memory, and there is none here: leave it out")
    name = plan.device_name(ranks.device)
    _, memory = torch.cuda.mem_get_info(ranks.device)
    memory, = distributed.total([memory / processes])       # all must choose the same
    rows = config.documents * config.accumulate
    owners = distributed.ranks_per_copy(config.shard, processes)
    chosen = plan.choose(model, rows, processes, owners, memory, plan.peak(name) or 1e15,
                         config.ema > 0, config.model == "transfusion", config.compile)
    if chosen is None:
        raise UserError(f"nothing fits in the {memory / 1e9:.0f} GB of a {name}: take more GPUs, a "
                        f"larger --shard, or --ema 0")
    config.documents, config.checkpointing, used = chosen
    config.accumulate = rows // config.documents
    distributed.say(f"--auto: {config.documents} rows per micro-batch, "
                    f"{'with' if config.checkpointing else 'without'} checkpointing; about "
                    f"{used / 1e9:.0f} of {memory / 1e9:.0f} GB")


def clear(config, out):
    """Delete what an earlier run has left in the folder: --overwrite. Mixed with it, the new one
    could be taken for the other."""
    complete, _ = distributed.list_checkpoints(out)
    for step in complete:
        distributed.remove(distributed.folder_of(out, step))
    delete_files(config, out, ("model.pt", "report.json"))


def delete_files(config, out, names):
    """Delete an earlier run's files, except those that this run is made of: --vae, --init."""
    given = [Path(path).resolve() for path in (config.vae, config.init) if path]
    for name in names:
        if (out / name).resolve() not in given:
            (out / name).unlink(missing_ok=True)


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
        unseen = test.pixels if len(test.pixels) else pixels        # of documents, perhaps none
        return train_vae_once(config, out, pixels, unseen[:256], vae_config, resume)

    feed = sources.feed.build_feed(config, test, diffusion, start, vae, train_first, view, progress)
    if vae and not resume and distributed.rank() == 0:
        delete_files(config, out, VAE_FILES)                # --resume would take it for this run's
    return feed


def find_vae(config, out, start, resume):
    """The VAE, or for a Chameleon the VQ-VAE, that the run uses. None: there is none yet."""
    if start:
        if config.vae and not same_in_16_bits(checkpoint.load_vae(config.vae, ANY_VAE), start.vae):
            raise UserError(f"{config.init} has learned with another VAE than {config.vae}: leave "
                            f"--vae out, or train a new model without --init")
        return start.vae
    # --resume: reuse out/vae.pt, which this run has trained. Otherwise ignore it: it belongs to an
    # earlier run.
    own = out / "vae.pt" if resume else None
    return checkpoint.find_vae(config.data, config.vae, own, codes=config.model == "chameleon")


def train_vae_once(config, out, pixels, unseen, vae_config, resume):
    """Train the run's VAE on pixels and keep it in out/vae.pt. Process 0 trains; the others wait,
    and read its file. Ctrl-C finishes a step and saves: --resume goes on from there. unseen:
    pictures that out/reconstructions.png shows, at every save."""
    path = out / "vae.pt"

    def show(vae, n=quality.COLUMNS):
        return quality.show(vae, unseen[:n], out / "reconstructions.png")

    with distributed.rank_0_first():
        if distributed.rank() == 0:
            if not resume:
                clear(config, out)
                delete_files(config, out, VAE_FILES)
                run_folder.write_config(out, config, {})    # --resume compares it
            state = out / "vae/last.pt"
            with finish_step_first(alone=distributed.size() == 1) as signals:
                vae = train_vae(pixels, vae_config, config.vae_steps, lr=config.vae_lr,
                                seed=config.seed, out=state.parent,
                                resume=resume and state.exists(), save_every=config.save_every,
                                stop=signals, on_save=show, balance=config.vae_balance)
            if vae is None:
                raise Stopped(f"the VAE's training is saved in {state}; the same command with "
                              f"--resume goes on; look at {out}/reconstructions.png", signals)
            checkpoint.save(path, checkpoint.pack_vae(vae))
            reached = show(vae, len(unseen))
            distributed.say(f"the VAE is trained; on unseen pictures {reached.describe()}; look at "
                            f"{out}/reconstructions.png")
            if reached.bottleneck():
                distributed.say(reached.bottleneck())
            state.unlink(missing_ok=True)
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

    # 2. The optimizer, and which micro-batches of each step are ours.
    optimizer = make_optimizer(model, config)
    micros = distributed.micro_batches(config.accumulate)
    return Run(config, ranks, micros, feed, diffusion, model, average, optimizer, config.steps)


def make_optimizer(model, config):
    """AdamW over the weights of a model. Its rate is set anew at every step, see train.py."""
    # Paper: App. B.1, AdamW with betas (0.9, 0.95), eps 1e-8, weight decay 0.1.
    # Our choice: no decay on vectors, which are norms and biases.
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
