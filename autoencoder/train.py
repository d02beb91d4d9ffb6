"""
train.py: the VAE learns, and its critic beside it
                                      (Transfusion §4.1 "Latent Image Representation", App. C)

THE IDEA    Draw pictures back, be told how near they are (losses.py), take a step. From some step
            on there is a second player: a discriminator takes a step of its own after each of the
            VAE's. One learns to tell real from drawn. The other learns to draw what cannot be told
            from real.
A PICTURE   step k:   x -> VAE -> x' --> losses --> L  --backward-->  the VAE steps
                            +----------> KL, or codebook loss, in L
            from gan_start on:  x, x'.detach() --> hinge  --backward-->  the discriminator steps
THE RULE    toy:    L = L1 + L2 + kl_weight KL                     sums over a picture's elements
            App. C: L = L1 + LPIPS + 0.5 GAN + 0.2 ID + 1e-6 KL    means over them; see losses.py
            rate(k) = lr * min(k / warm-up, cosine to 0)
            A step with a number that is not finite is not taken.
SHAPES      pixels (N, h, w, c) uint8, batches x (M, c, h, w) float32 in [-1, 1]; `x_hat` is x'
PAPER/HERE  same: `--paper` has App. C's network, loss and 1M steps with the GAN from step 50,000;
            with `--codes 16384` it is App. C's VQ-VAE.
            our choice: AdamW, its rates, the batch of 16. The paper names none of them.
            our choice: L1 + L2 on the toy. L1 alone is content with the median, and the median of a
            mostly black picture is black: whole objects stay missing for long.
            our choice: with --stream pictures stay on disk until they are wanted, because five
            million of 256 x 256 would be a terabyte. Under torchrun each process takes a part of
            the batch.
            not run here: CUDA, its bf16, NCCL, and the paper's size.
READ NEXT   ../patchify.py
TRY IT      python -m autoencoder.train, python -m autoencoder.train --loss paper --codes 512
TEST        tests/test_train_vae.py, tests/test_stop.py
"""
import argparse
import contextlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from autoencoder import losses, perceptual, quality
from autoencoder.processes import ALONE, Processes, start
from sources import choose, on_disk
from sources.pairs import Pairs
from support.checkpoint import load, pack_vae, save
from support.common import (
    Parser,
    Stopped,
    UserError,
    check_seed,
    finish_step_first,
    pick_device,
    run_command,
)
from support.run_folder import Log, lock
from vae import (
    VAE,
    VAEConfig,
    codebook_use,
    encode_all,
    encode_all_codes,
    paper_config,
    to_float,
)

BALANCED = 1 / 3                                        # share of the steps with balanced colours


# --------------------------------------------------------------------------------- one step of each
@dataclass
class Training:
    """A VAE in training and all that its next step depends on.

    vae         the VAE, or VQ-VAE
    vae_loss    App. C's loss; None for the toy's
    optimizers  the VAE's, and the discriminator's if there is one
    generator   random numbers: the noise of the latents
    rng         random numbers: the choice of pictures
    options     {name: value}; a resumed run must have the same
    processes   who takes which part of a batch
    step        how many steps have been taken
    sums        {term: (sum, count)} since the last line of the log
    balance     of colours, (c, c), in the toy's loss of the first steps; None: none
    """
    vae: VAE
    vae_loss: losses.VAELoss | None
    optimizers: list
    generator: torch.Generator
    rng: np.random.Generator
    options: dict
    processes: Processes = ALONE
    step: int = 0
    sums: dict = field(default_factory=dict)
    balance: torch.Tensor | None = None

    def parts(self):
        """What a checkpoint must hold: everything that learns."""
        # The frozen networks are not among it. They come from their files; the toy's small network
        # is trained again, from the same seed.
        if self.vae_loss and self.vae_loss.discriminator:
            return [self.vae, self.vae_loss.discriminator, *self.optimizers]
        return [self.vae, *self.optimizers]


def prepare_training(config, vae_loss, options, processes=ALONE):
    """A Training before its first step. config: VAEConfig; the rest as in `Training`."""
    lr = options["lr"]
    torch.manual_seed(options["seed"])
    vae = VAE(config).train().to(pick_device())
    adamw = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    optimizers = [adamw]
    if vae_loss:
        vae_loss.to(pick_device())
        if vae_loss.discriminator:
            # Our choice: less momentum, because two networks chase each other.
            critic = vae_loss.discriminator.parameters()
            optimizers.append(torch.optim.AdamW(critic, lr=lr, betas=(0.5, 0.9)))
    generator = torch.Generator().manual_seed(options["seed"])
    rng = np.random.default_rng(options["seed"])
    processes.join(vae, *([vae_loss] if vae_loss else []))
    return Training(vae, vae_loss, optimizers, generator, rng, options, processes)


def training_step(run, pixels):
    """One step of the VAE and, once the GAN is on, one of the discriminator.
    pixels: (N, h, w, c) uint8, all pictures."""
    # 1. The learning rate, and a batch.
    for optimizer in run.optimizers:
        optimizer.param_groups[0]["lr"] = learning_rate(run.step, run.options)
    #    All processes draw the same batch, and each takes its part of it.
    chosen = run.rng.integers(len(pixels), size=run.options["batch"])
    chosen = run.processes.share(chosen)
    x = to_float(pixels[chosen]).contiguous(memory_format=torch.channels_last)
    x = x.to(run.vae.shift.device)                                          # (M, c, h, w)

    # 2. The VAE's step.
    with bf16(x.device):
        x_hat, prior = run.vae(x, run.generator, run.processes.draw)        # (M, c, h, w), scalar
        loss, terms, clip = whole_loss(run, x, x_hat, prior)
    vae_optimizer = run.optimizers[0]
    vae_optimizer.zero_grad(set_to_none=True)
    loss.backward()
    run.processes.average_gradients(run.vae.parameters())
    norm = nn.utils.clip_grad_norm_(run.vae.parameters(), clip)
    check_finite(run, "the VAE", loss, norm)
    vae_optimizer.step()

    # 3. The discriminator's step.
    # TRAP: the VAE's backward left gradients in the discriminator, with the wrong sign: clear them.
    # TRAP: a discriminator that is never stepped stays a random network, and the VAE learns to
    # please it.
    if run.vae_loss and run.vae_loss.gan_is_on(run.step):
        with bf16(x.device):
            terms["D"] = run.vae_loss.discriminator_loss(x, x_hat)
        critic_optimizer = run.optimizers[1]
        critic_optimizer.zero_grad(set_to_none=True)
        terms["D"].backward()
        run.processes.average_gradients(run.vae_loss.discriminator.parameters())
        critic = run.vae_loss.discriminator.parameters()
        norm = nn.utils.get_total_norm([weight.grad for weight in critic])
        check_finite(run, "the discriminator", terms["D"], norm)
        critic_optimizer.step()

    # 4. What the log will say.
    terms["codebook" if run.vae.quantiser else "KL"] = prior
    for name, term in terms.items():
        total, count = run.sums.get(name, (0.0, 0))
        run.sums[name] = (total + run.processes.average(term.detach()), count + 1)
    run.step += 1


def check_finite(run, who, loss, norm):
    """Raise UserError if a step must not be taken: its loss, or the norm of its gradient, is not
    finite, on any process."""
    if run.processes.any(not (loss.isfinite() and math.isfinite(norm))):
        raise UserError(f"step {run.step + 1} of {who} was not taken: its loss is {loss.item()}, "
                        f"the norm of its gradient {float(norm)}; lower its learning rate, now "
                        f"{run.options['lr']:g}; what was saved before is still good")


def learning_rate(step, options):
    """The rate of a step (counted from 0): warm-up, then half a cosine down to 0."""
    steps = options["steps"]
    warmup = min(0.1 * steps, 5000)
    cosine = float(0.5 + 0.5 * np.cos(np.pi * step / steps))
    return options["lr"] * min((step + 1) / warmup, cosine)


def bf16(device):
    """A context in which CUDA computes in bfloat16; elsewhere float32 is as fast."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def whole_loss(run, x, x_hat, prior):
    """(loss: a scalar, {term: number} for the log, longest gradient) of one batch.
    x, x_hat: (M, c, h, w); prior: the KL in nats per picture, or the codebook loss, a mean."""
    size = x[0].numel()                                 # elements of a picture
    kl_weight = run.options["kl_weight"]
    if run.vae_loss is None:
        # The toy's terms are sums over `size` elements, and so are its gradients.
        # Our choice: balanced first, plain afterwards. Colours that are learned once stay, and the
        # balance costs about 2 dB for as long as it is on.
        early = run.step < BALANCED * run.options["steps"]
        reconstruction = toy_reconstruction(x, x_hat, run.balance if early else None)
        loss = reconstruction + (size if run.vae.quantiser else kl_weight) * prior
        return loss, {"L1+L2": reconstruction / size}, size

    # Paper: App. C. 1e-6 KL; or the codebook loss with weight 1.0.
    # Our choice: the KL is a sum over the latent. The other terms are means over the picture, so
    # the KL is divided by the picture's size.
    prior_weight = 1.0 if run.vae.quantiser else kl_weight / size
    last = run.vae.decoder[-1].weight
    loss, terms = run.vae_loss(x, x_hat, prior, prior_weight, last, run.step)
    return loss, terms, 1.0


def toy_reconstruction(x, x_hat, balance=None):
    """The toy's L1 + L2: summed over a picture's elements, averaged over pictures.
    balance: None, or a (c, c) matrix that errors of colour are multiplied by."""
    error = x_hat.float() - x                                               # (M, c, h, w)
    if balance is not None:
        error = torch.einsum("mchw,cd->mdhw", error, balance)
    return (error.abs() + error.square()).sum() / len(x)


def colour_balance(pixels):
    """(c, c) float32: makes the rare directions of colour count as much as the common ones, nearly.
    pixels: (N, h, w, c) uint8."""
    # TRAP: of 1,769 emoji, 87% of the variance is light against dark, and 3% green against magenta.
    # A VAE that loses all green and all purple has 24.7 dB, and it learns light and dark first.
    channels = pixels.shape[-1]
    x = pixels.reshape(-1, channels) / 127.5 - 1
    variance, directions = np.linalg.eigh(np.atleast_2d(np.cov(x.T)))       # (c,), (c, c)
    # Our choice: 3/4 of the way. All the way, JPEG's noise in a grey photo would count as colour.
    gain = np.maximum(variance, 1e-3) ** (-0.75 / 2)
    gain /= np.sqrt((gain ** 2 * variance).sum() / variance.sum())          # the same sum as before
    balance = directions * gain @ directions.T
    return torch.from_numpy(balance).float()


# ------------------------------------------------------------------------------------ the whole run
def train_vae(pixels, config, steps=400, batch=32, lr=2e-3, kl_weight=1e-6, seed=0, progress=True,
              vae_loss=None, out=None, resume=False, save_every=1000, log_every=100, stop=(),
              on_save=None, balance=False, processes=None):
    """A trained VAE, with shift, scale and x0_max measured; or None if it was stopped.

    pixels      (N, h, w, c) uint8, or what looks so (sources/on_disk.py)
    config      VAEConfig
    vae_loss    App. C's loss; None for the toy's
    out         folder for log.jsonl and, every save_every steps, last.pt
    resume      whether to go on from last.pt
    stop        something that becomes true to stop early; then the state is saved
    on_save     function (vae), called whenever the state is saved: to look at it early
    balance     whether rare colours count more in the first third of the steps: see
                colour_balance. For the toy's loss
    processes   those that train together; None: this one alone, also among others
    Raises UserError, before any weight is touched, if a step's loss or gradient is not finite.
    """
    options = {
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "kl_weight": kl_weight,
        "seed": seed,
        "pictures": list(pixels.shape),
        "network": json.dumps(asdict(config)),
        "loss": vae_loss.describe() if vae_loss else "L1 + L2",
        "balance": balance,
    }
    processes = processes or ALONE
    run = prepare_training(config, vae_loss, options, processes)
    if balance:
        run.balance = colour_balance(pixels).to(pick_device())
    if resume:
        resume_training(run, out)
    log = None
    if out and processes.rank == 0:                     # one process speaks and writes for all
        log = start_log(out, run.step)

    def keep():
        save_training(run, out)
        if on_save:
            on_save(run.vae)

    bar = tqdm(total=steps, initial=run.step, desc="training the VAE", disable=not progress)
    while run.step < steps and not processes.any(stop):
        training_step(run, pixels)
        bar.update()
        if run.step % log_every == 0 or run.step == steps:
            say_terms(run, bar, log)
        if log and (run.step % save_every == 0 or run.step == steps):
            keep()
    bar.close()

    if run.step < steps:
        if log:
            keep()
        return None
    return measure_latents(run.vae.eval(), some_of(pixels, 4096, seed)).cpu()


def start_log(out, step):
    """The Log of a training that goes on at a step, in the folder `out`."""
    Path(out).mkdir(parents=True, exist_ok=True)
    log = Log(out, step)
    log.start()
    return log


def say_terms(run, bar, log):
    """Show the loss terms of the last steps beside the bar, and keep them in the log if there is
    one: only the first process writes."""
    row = log_line(run)
    texts = {}
    for name, value in row.items():
        if name != "step":                              # the bar counts them itself
            texts[name] = f"{value:.3g}"
    bar.set_postfix(texts)
    if log:
        log.add(row)


def some_of(pixels, n, seed):
    """n pictures of (N, h, w, c), drawn at random; all of them, in their order, if N <= n."""
    # TRAP: not the first n. If dark pictures come first, most of the others lie beyond the clip.
    if len(pixels) <= n:
        return pixels
    chosen = np.random.default_rng([seed, 19]).permutation(len(pixels))[:n]
    return pixels[np.sort(chosen)]


def log_line(run):
    """{name: number}: the mean of each loss term since the last line; for a VQ-VAE also which
    codes were used. The sums start anew."""
    row = {"step": run.step}
    for name, (total, count) in run.sums.items():
        row[name] = float(total) / count
    run.sums = {}
    quantiser = run.vae.quantiser
    if quantiser:
        row["codes_used"], row["perplexity"] = codebook_use(quantiser.uses)
        quantiser.uses.zero_()
    return row


def save_training(run, out):
    """Write last.pt, from which `resume_training` goes on as if nothing had happened."""
    save(Path(out) / "last.pt", {
        "kind": "vae training",
        "given": run.options,
        "step": run.step,
        "sums": run.sums,
        "parts": [part.state_dict() for part in run.parts()],
        "rng": run.rng.bit_generator.state,
        "noise": run.generator.get_state(),
    })


def resume_training(run, out):
    """Set a fresh Training to where last.pt was. Raises UserError if the options differ."""
    saved = load(Path(out) / "last.pt", "vae training")
    for name, value in run.options.items():
        before = saved["given"].get(name, False)        # an option that is newer than the file
        if before != value:
            raise UserError(f"{out} was begun with {name.replace('_', ' ')} {before}, not {value}: "
                            f"resume with the same options, or name another folder with --out")
    for part, state in zip(run.parts(), saved["parts"], strict=True):
        part.load_state_dict(state)
    run.step = saved["step"]
    run.sums = saved["sums"]
    run.rng.bit_generator.state = saved["rng"]
    run.generator.set_state(saved["noise"])


def measure_latents(vae, pixels):
    """The same VAE with shift, scale and x0_max measured on pixels (N, h, w, c) uint8. A VQ-VAE
    has none of them."""
    if vae.quantiser:
        return vae
    # TRAP: diffusion assumes latents of about unit deviation. With others the noise schedule is
    # wrong, and nothing shows it.
    mean, deviation = encode_all(vae, pixels, progress=False)               # each (N, z, h/f, w/f)
    variance = mean.var((0, 2, 3)) + deviation.square().mean((0, 2, 3))     # (z,), of q's draws
    vae.shift.copy_(mean.mean((0, 2, 3)))
    vae.scale.copy_(variance.sqrt())
    # The largest of what `encode` gives from now on: normalised.
    normalised = (mean - vae.shift[:, None, None].cpu()) / vae.scale[:, None, None].cpu()
    vae.x0_max.fill_(normalised.abs().max().item())
    return vae


# ------------------------------------------------------------------------------------- command line
TOY_DEFAULTS = {
    "image_size": 32,
    "steps": 1200,
    "batch": 32,
    "lr": 2e-3,
    "gan_start": 600,
    "loss": "toy",
}
PAPER_DEFAULTS = {
    "image_size": 256,
    "steps": 1_000_000,                                 # Paper: App. C
    "batch": 16,                                        # Our choice: App. C names none
    "lr": 1e-4,                                         # Our choice: App. C names none
    "gan_start": 50_000,                                # Paper: App. C
    "loss": "paper",
}


def build_loss(args, pairs):
    """(VAELoss, a sentence on where its networks come from). On the toy a small network of our own
    stands in for VGG16 and MoCo v2. With --paper a term without its weights file is off."""
    lpips = identity = None
    lpips_from = "LPIPS is OFF: --lpips-weights names no files"
    identity_from = "ID is OFF: --moco-weights names no file"
    if args.lpips_weights:
        lpips = perceptual.load_lpips(args.lpips_weights)
        lpips_from = f"LPIPS from {args.lpips_weights}"
    if args.moco_weights:
        identity = perceptual.load_moco(args.moco_weights)
        identity_from = f"ID from {args.moco_weights}"

    if not args.paper and not (lpips and identity):
        net, right = perceptual.train_small_net(pairs.pixels, pairs.captions, seed=args.seed)
        toy_lpips, toy_identity = perceptual.stand_ins(net)
        ours = (f"from our small network (it tells {right:.0%} of the captions' words), "
                f"not the paper's")
        if not lpips:
            lpips = toy_lpips
            lpips_from = f"LPIPS {ours}"
        if not identity:
            identity = toy_identity
            identity_from = f"ID {ours}"

    channels = pairs.pixels.shape[-1]
    with torch.random.fork_rng(devices=[]):             # the VAE's first weights stay the same
        torch.manual_seed(args.seed)
        if args.paper:
            critic = losses.PatchGAN(channels)
        else:
            critic = losses.PatchGAN(channels, width=32, layers=2)
    return losses.VAELoss(lpips, identity, critic, args.gan_start), f"{lpips_from}; {identity_from}"


def parse_arguments(argv):
    """The command line's options. --paper changes the defaults of the others."""
    parser = Parser(
        prog="python -m autoencoder.train",
        description="Train the VAE or VQ-VAE and show reconstructions.", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--paper", action="store_true",
        help="App. C's network, size, loss and steps become the defaults")
    without_captions = ("edits", "documents")
    pictures = [name for name in choose.SOURCES if name not in without_captions]
    add("--data", choices=pictures, default="scenes", help="what to learn from")
    add("--data-dir", help="folder of MNIST idx files, or of pictures with captions.jsonl")
    add("--image-size", type=int, help="pixels per side (scenes, folder)")
    add("--stream", action="store_true",
        help="read pictures when they are wanted: all those in --data-dir, its folders and tars")
    add("--codes", type=int, default=0, help="codes of a VQ-VAE (App. C has 16384); 0 for a VAE")
    add("--loss", choices=("toy", "paper"),
        help="L1 + L2, or App. C's L1 + LPIPS + 0.5 GAN + 0.2 ID")
    add("--lpips-weights", help="with --loss paper: torchvision's VGG16 and LPIPS' vgg.pth: "
        "vgg16.pth,vgg.pth")
    add("--moco-weights", help="with --loss paper: a MoCo v2 checkpoint of a ResNet-50")
    add("--gan-start", type=int,
        help="with --loss paper: the step at which the discriminator comes in")
    add("--steps", type=int, help="training steps")
    add("--batch", type=int, help="pictures per step")
    add("--lr", type=float, help="highest learning rate")
    add("--kl-weight", type=float, default=1e-6, help="weight of the KL term; App. C has 1e-6")
    add("--save-every", type=int, default=1000, help="steps between checkpoints of the training")
    add("--resume", action="store_true", help="go on from last.pt in the run's folder")
    add("--overwrite", action="store_true",
        help="start anew although the run's folder has a checkpoint")
    add("--seed", type=int, default=0, help="seed of weights, order and noise")
    add("--out", default="out/vae",
        help="folder for vae.pt, reconstructions.png, log.jsonl and last.pt")
    words = sys.argv[1:] if argv is None else argv
    parser.set_defaults(**(PAPER_DEFAULTS if "--paper" in words else TOY_DEFAULTS))
    return parser.parse_args(argv)


def check_arguments(args, config, out, processes):
    """Raise UserError for options that cannot work, before any work is done."""
    for name in ("steps", "image_size", "batch", "save_every"):
        value = getattr(args, name)
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("kl_weight", "gan_start", "lr"):
        value = getattr(args, name)
        if not 0 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more, got {value}")
    check_seed(args.seed)
    if args.image_size % config.f:
        raise UserError(f"--image-size must be divisible by {config.f}, got {args.image_size}: the "
                        f"latents are {config.f} times smaller")
    if args.loss == "paper" and args.image_size < 32:
        raise UserError(f"--loss paper needs pictures of at least 32 pixels, got --image-size "
                        f"{args.image_size}: its networks halve them up to five times")
    if args.loss == "toy" and (args.lpips_weights or args.moco_weights):
        raise UserError("--lpips-weights and --moco-weights are for --loss paper: add it, or leave "
                        "them out")
    if args.batch % processes.size:
        raise UserError(f"{processes.size} processes cannot share --batch {args.batch} evenly: "
                        f"make it a multiple of {processes.size}")
    if args.stream and not args.data_dir:
        raise UserError("--stream needs --data-dir: the folder of pictures, or of tars")
    if args.stream and args.loss == "paper" and not args.paper:
        if not (args.lpips_weights and args.moco_weights):
            raise UserError("--stream reads no captions, from which our small network would learn: "
                            "give --lpips-weights and --moco-weights")
    begun = (out / "last.pt").exists()
    if args.resume and not begun:
        raise UserError(f"there is nothing to resume: {out}/last.pt does not exist")
    if begun and not (args.resume or args.overwrite):
        raise UserError(f"{out} already holds a run: add --resume to go on with it, --overwrite to "
                        f"start anew, or name another folder with --out")
    if (out / "vae.pt").exists() and not (args.resume or args.overwrite):
        raise UserError(f"{out} already holds a vae.pt, but no training of it: add --overwrite to "
                        f"lose it, or name another folder with --out")


def main(argv=None):
    """Train a VAE as the command line says; save it and a picture of its reconstructions."""
    args = parse_arguments(argv)
    out = Path(args.out)
    config = paper_config(args.codes) if args.paper else VAEConfig(codes=args.codes)
    processes = start()
    with contextlib.ExitStack() as stack:
        if processes.rank == 0:
            stack.enter_context(lock(out))              # no other training writes there meanwhile
        check_arguments(args, config, out, processes)
        train_and_show(args, config, out, processes)


def load_pictures(args, silent):
    """(Pairs to learn from, pictures for the test (N, h, w, c) uint8) of the command line.
    silent: see `on_disk.PicturesOnDisk`."""
    if args.stream:
        pixels, test = on_disk.load_on_disk(args.data_dir, args.image_size, silent)
        return Pairs("pictures on disk", [], pixels), test[:]
    choice = {"folder": args.data_dir, "size": args.image_size, "seed": args.seed}
    # Our choice: as many scenes as fit into 256 MB, and no more than 20,000. At the paper's size
    # that is 1,365 of them.
    n = min(20_000, max(1, 2 ** 28 // (3 * args.image_size ** 2)))
    pairs = choose.load_pairs(args.data, n=n, progress=not silent, **choice)
    test = choose.load_pairs(args.data, split="test", n=256, progress=not silent, **choice)
    return pairs, test.pixels


def train_and_show(args, config, out, processes):
    """All of `main` after its checks. config: VAEConfig; out: the run's folder, a Path."""
    # 1. Data, and the loss.
    silent = processes.rank > 0
    pairs, test = load_pictures(args, silent)
    config.image_channels = pairs.pixels.shape[-1]
    vae_loss = None
    networks = "the toy's loss"
    if args.loss == "paper":
        vae_loss, networks = build_loss(args, pairs)
    terms = vae_loss.describe() if vae_loss else "L1 + L2"
    prior = "codebook" if args.codes else f"{args.kl_weight:g} KL"
    if not silent:
        print(f"loss: {terms} + {prior}  ({networks}); {len(pairs.pixels):,} pictures "
              f"on {processes.size} x {pick_device().type}")

    # 2. The training. Ctrl-C finishes a step and saves; a second one stops at once.
    began = time.time()
    unseen = test[:256]

    def show(vae, n=quality.COLUMNS):
        return quality.show(vae, unseen[:n], out / "reconstructions.png")

    with finish_step_first(alone=processes.size == 1) as signals:
        vae = train_vae(pairs.pixels, config, args.steps, args.batch, args.lr, args.kl_weight,
                        args.seed, progress=not silent, vae_loss=vae_loss, out=out,
                        resume=args.resume, save_every=args.save_every, stop=signals, on_save=show,
                        processes=processes)
    if vae is None:
        raise Stopped(f"saved in {out}/last.pt; the same command with --resume goes on from there; "
                      f"look at {out}/reconstructions.png", signals)

    if silent:
        return
    # 3. The file, and how good it is on pictures that it has not seen.
    save(out / "vae.pt", pack_vae(vae))
    vae.to(pick_device())
    reached = show(vae, len(unseen))
    parameters = sum(weight.numel() for weight in vae.parameters())
    print(f"{parameters:,} parameters, {time.time() - began:.0f} s; on unseen pictures "
          f"{reached.describe()}; wrote {out}/vae.pt and reconstructions.png")
    if args.codes:
        codes = encode_all_codes(vae, unseen, progress=False)
        uses = torch.bincount(codes.flatten(), minlength=args.codes)
        share, perplexity = codebook_use(uses)
        print(f"codebook: {share:.0%} of {args.codes:,} codes used on {len(codes)} unseen "
              f"pictures, perplexity {perplexity:.0f}")


if __name__ == "__main__":
    run_command(main, if_stopped="the same command goes on, with --resume once last.pt is there")
