"""
run.py: a training run before its first step and after its last                       (Transfusion §4.1, App. B.1)

THE IDEA    train.py shows the loop. What must exist before the loop can begin stands here: the feed, the model with its first
            weights, the average, the optimizer, all of them divided among the processes; and what is needed afterwards:
            the whole model again, in one piece.
A PICTURE   Config --build_feed--> feed --build_run--> Run --train.fit--> Run --gather_trained--> model.pt
READ NEXT   distributed.py        TEST  tests/test_train.py, tests/test_distributed.py
"""
from dataclasses import dataclass

import torch

import scale.feed
import sources.feed
from autoencoder.train import train_vae
from config import Config
from diffusion import Diffusion
from model import Transfusion
from scale import distributed
from sources import choose
from support import checkpoint

WHOLE_MODEL = "a whole copy of the model is measured", 2     # what for, and bytes per parameter: distributed.explain_memory


@dataclass
class Run:
    """Everything that a step needs. On several processes, model and average are divided among them. With --ema 0 the
    average is the model itself.

    config      every number of the run
    ranks       which processes there are, and on which device this one computes
    micros      which micro-batches of a step are this process's own
    feed        where batches come from: sources/feed.py or scale/feed.py
    diffusion, model, average, optimizer
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

    def explain_memory(self, *what):
        """Turn "out of memory" into a sentence about this run: see distributed.explain_memory."""
        return distributed.explain_memory(self.average.config, self.config, self.ranks, *what)

    def gather_average(self):
        """The averaged model, whole on every process. Every process must call it."""
        def make():
            return Transfusion(self.average.config)

        with self.explain_memory(*WHOLE_MODEL):
            return distributed.gather_model(make, self.average, self.ranks.dtype).eval()

    def gather_trained(self):
        """checkpoint.Trained of the averaged model: all that sampling needs. Every process must call it."""
        config, feed = self.config, self.feed
        return checkpoint.Trained(self.gather_average(), feed.tokenizer, feed.vae, self.diffusion,
                                  config.model, config.text_share)


def build_feed(config, out, diffusion, start, resume, view):
    """The feed of the data at hand: shards on disk, or pictures in memory, whose VAE is trained first if there is none.

    config, out     the run's numbers and its folder        diffusion   its noise process
    start           the checkpoint.Trained of --init, or None        resume   whether the run goes on
    view            function (first code's id) -> how the model sees a document (chameleon.view)
    Raises UserError if data, VAE, tokenizer and options do not fit together."""
    if config.data == "shards":
        return scale.feed.build_feed(config, diffusion, start, view)
    with distributed.rank_0_first():                        # it may download
        test = choose.load_source(config, "test", n=256)

    coded = config.model == "chameleon"
    # --resume: reuse the VAE that this run has trained. Otherwise ignore it: it belongs to an earlier run.
    kept = out / "vae.pt" if resume else None
    vae = start.vae if start else checkpoint.find_vae(config.data, config.vae, kept, coded)

    def train_one(pixels, vae_config):
        """Process 0 trains the VAE; the others wait, and read its file."""
        with distributed.rank_0_first():
            if distributed.rank() == 0:
                trained = train_vae(pixels, vae_config, config.vae_steps, seed=config.seed)
                checkpoint.save(out / "vae.pt", checkpoint.pack_vae(trained))
            return checkpoint.find_vae(config.data, out / "vae.pt", codes=coded)

    progress = distributed.rank() == 0
    return sources.feed.build_feed(config, test, diffusion, start, vae, train_one, view, progress)


def build_run(config, ranks, feed, diffusion, start):
    """The Run at step 0: the model with its first weights, or those of the checkpoint `start`, its average, its
    optimizer. The arguments are those of `build_feed`, and the distributed.Ranks."""
    torch.manual_seed(config.seed)

    def make():
        return Transfusion(feed.shape)

    def make_first():
        return start.model.train() if start else make()

    with distributed.explain_memory(feed.shape, config, ranks, "process 0 draws the first weights in main memory", 4):
        model = distributed.shard_model(make_first, ranks, config.checkpointing, config.compile)
        average = model                                     # --ema 0 keeps no second copy: at 7B that is 27 GB
        if config.ema:
            weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
            average = distributed.wrap_weights(make, weights)
    feed.vae.to(ranks.device)

    # Paper App. B.1: AdamW (0.9, 0.95), decay 0.1. Our choice: no decay on vectors (norms, biases).
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    micros = distributed.micro_batches(config.accumulate)
    return Run(config, ranks, micros, feed, diffusion, model, average, optimizer)
