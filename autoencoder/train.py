"""
train_vae.py: the VAE learns, and its critic beside it        (Transfusion §4.1 "Latent Image Representation", App. C)

THE IDEA    Draw pictures back, be told how near they are (vae_losses.py), take a step. From some step on there is a second
            player: a discriminator takes a step of its own after each of the VAE's. The one learns to tell real from drawn,
            the other to draw what cannot be told from real.
A PICTURE   step k:   x -> VAE -> x' -> judges -> near (+ w * GAN) + KL or codebook --backward--> VAE steps
                            from gan_start on:    x, x'.detach() -> hinge         --backward--> discriminator steps
THE RULE    toy:    L = L1 + L2 + kl_weight KL                        sums over a picture's elements
            App. C: L = L1 + LPIPS + 0.5 GAN + 0.2 ID + 1e-6 KL       means over them; see vae_losses.py
            rate(k) = lr * min(k / warm-up, cosine to 0)
SHAPES      pixels (N, h, w, c) uint8, batches x (M, c, h, w) float32 in [-1, 1]
PAPER/HERE  same: `--paper` has App. C's network, loss and 1M steps with the GAN from step 50,000; `--codes 16384` its VQ-VAE.
            our choice: AdamW, its rates, the batch of 16: the paper names none of them.
            our choice: L1 + L2 on the toy. L1 alone is content with the median, and the median of a mostly black picture is
            black (whole objects stay missing for long).
            not run here: CUDA, its bf16, and the paper's size. One GPU; several are not supported, for lack of a way to test.
            Pictures are held in memory: 5 million of 256 x 256 take a terabyte, so give it a sample of your pictures.
READ NEXT   patchify.py        TRY IT  python train_vae.py, python train_vae.py --loss paper --codes 512
TEST        tests/test_train_vae.py
"""
import argparse
import json
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from autoencoder import losses as vae_losses
from autoencoder import perceptual
from sources import choose
from support.checkpoint import load, pack_vae, save
from support.common import pick_device, UserError, run_command
from support.figures import grid
from vae import VAE, VAEConfig, batches, codebook_use, encode_all, encode_all_codes, paper_config, to_float, to_pixels


def loss_terms(vae, x, generator=None):
    """(reconstruction, prior) of the toy: L1 + L2 summed over a picture's elements and averaged over pictures; and the KL
    in nats per picture, or the codebook loss."""
    drawn, prior = vae(x, generator)
    error = drawn.float() - x
    return (error.abs() + error.square()).sum() / len(x), prior


@dataclass
class Training:
    """A VAE in training and all that its next step depends on. given: the options; a resumed run must have the same."""
    vae: VAE
    judges: vae_losses.VAELoss | None
    optimizers: list                                    # the VAE's, and the discriminator's if there is one
    generator: torch.Generator                          # noise of the latents
    rng: np.random.Generator                            # choice of pictures
    given: dict
    step: int = 0
    sums: dict = field(default_factory=dict)            # term: (sum, count) since the last line of the log

    def parts(self):
        """What a checkpoint must hold. The judges' frozen networks are not among it: they come from their files, and the
        toy's is trained again, from the same seed."""
        critic = self.judges.discriminator if self.judges else None
        return [self.vae, *([critic] if critic else []), *self.optimizers]


def prepare_training(config, judges, given):
    """A Training before its first step."""
    torch.manual_seed(given["seed"])
    vae = VAE(config).train().to(pick_device())
    optimizers = [torch.optim.AdamW(vae.parameters(), lr=given["lr"], betas=(0.9, 0.95), weight_decay=0.01)]
    if judges:
        judges.to(pick_device())
        if judges.discriminator:                        # our choice: less momentum, for two nets that chase each other
            optimizers.append(torch.optim.AdamW(judges.discriminator.parameters(), lr=given["lr"], betas=(0.5, 0.9)))
    return Training(vae, judges, optimizers, torch.Generator().manual_seed(given["seed"]),
                    np.random.default_rng(given["seed"]), given)


def training_step(run, pixels):
    """One step of the VAE and, once it is awake, one of the discriminator."""
    vae, judges, given = run.vae, run.judges, run.given
    device, k, steps = vae.shift.device, run.step, given["steps"]
    rate = min((k + 1) / min(0.1 * steps, 5000), float(0.5 + 0.5 * np.cos(np.pi * k / steps)))   # warm-up, then cosine to 0
    for optimizer in run.optimizers:
        optimizer.param_groups[0]["lr"] = given["lr"] * rate
    x = to_float(pixels[run.rng.integers(len(pixels), size=given["batch"])]).contiguous(memory_format=torch.channels_last)
    x, size = x.to(device), x[0].numel()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        if judges is None:
            recon, prior = loss_terms(vae, x, run.generator)
            loss = recon + (size if vae.quantiser else given["kl_weight"]) * prior
            terms, clip = {"L1+L2": recon / size}, size
        else:
            drawn, prior = vae(x, run.generator)
            near, terms = judges(x, drawn, vae.decoder[-1].weight, k)
            loss, clip = near + (1.0 if vae.quantiser else given["kl_weight"] / size) * prior, 1.0
    run.optimizers[0].zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(vae.parameters(), clip)
    run.optimizers[0].step()
    if judges and judges.awake(k):
        # TRAP: the VAE's backward left gradients in the discriminator, with the wrong sign; and one that is never stepped
        # stays a random network that the VAE learns to please
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            terms["D"] = judges.discriminator_loss(x, drawn)
        run.optimizers[1].zero_grad(set_to_none=True)
        terms["D"].backward()
        run.optimizers[1].step()
    for name, term in {**terms, "codebook" if vae.quantiser else "KL": prior}.items():
        total, n = run.sums.get(name, (0.0, 0))
        run.sums[name] = (total + term.detach(), n + 1)
    run.step += 1


def log_line(run):
    """The mean of each loss term since the last line; for a VQ-VAE also which codes were used. Starts anew."""
    row = {"step": run.step, **{name: float(total) / n for name, (total, n) in run.sums.items()}}
    if run.vae.quantiser:
        row["codes_used"], row["perplexity"] = codebook_use(run.vae.quantiser.uses)
        run.vae.quantiser.uses.zero_()
    run.sums = {}
    return row


def save_training(run, out):
    """Write last.pt, from which `resume_training` goes on as if nothing had happened."""
    save(Path(out) / "last.pt", {"kind": "vae training", "given": run.given, "step": run.step, "sums": run.sums,
                                 "parts": [part.state_dict() for part in run.parts()],
                                 "rng": run.rng.bit_generator.state, "noise": run.generator.get_state()})


def resume_training(run, out):
    """Set a fresh Training to where last.pt was. Raises UserError if the options differ."""
    saved = load(Path(out) / "last.pt", "vae training")
    for name, value in run.given.items():
        if saved["given"].get(name) != value:
            raise UserError(f"{out} was begun with {name.replace('_', ' ')} {saved['given'].get(name)}, not {value}: "
                                 f"resume with the same options, or name another folder with --out")
    for part, state in zip(run.parts(), saved["parts"], strict=True):
        part.load_state_dict(state)
    run.step, run.sums, run.rng.bit_generator.state = saved["step"], saved["sums"], saved["rng"]
    run.generator.set_state(saved["noise"])


@contextmanager
def ctrl_c():
    """A list that is empty until Ctrl-C is pressed, so that a step is finished first. A second Ctrl-C stops at once."""
    pressed = []

    def catch(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, before)
    before = signal.signal(signal.SIGINT, catch)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def train_vae(pixels, config, steps=400, batch=32, lr=2e-3, kl_weight=1e-6, seed=0, progress=True, judges=None, out=None,
              resume=False, save_every=1000, log_every=100, stop=()):
    """A trained VAE. pixels: (N, h, w, c) uint8. judges: App. C's loss, None for the toy's. out: folder for log.jsonl and,
    every save_every steps, last.pt, from which `resume` goes on. stop: something that becomes true to stop early; then
    the state is saved and None returned. Last, shift, scale and reach are measured."""
    given = dict(steps=steps, batch=batch, lr=lr, kl_weight=kl_weight, seed=seed, pictures=list(pixels.shape),
                 network=json.dumps(asdict(config)), loss=judges.describe() if judges else "L1 + L2")
    run, log = prepare_training(config, judges, given), Path(out) / "log.jsonl" if out else None
    if resume:
        resume_training(run, out)
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
        rows = log.read_text().splitlines() if resume and log.exists() else []      # without a last one that was cut off
        log.write_text("".join(row + "\n" for row in rows if row.endswith("}") and json.loads(row)["step"] <= run.step))
    bar = tqdm(total=steps, initial=run.step, desc="training the VAE", disable=not progress)
    while run.step < steps and not stop:
        training_step(run, pixels)
        bar.update()
        if run.step % log_every == 0 or run.step == steps:
            row = log_line(run)
            bar.set_postfix({name: f"{value:.3g}" for name, value in row.items() if name != "step"})
            if log:
                with open(log, "a") as file:
                    file.write(json.dumps(row) + "\n")
        if out and (run.step % save_every == 0 or run.step == steps):
            save_training(run, out)
    bar.close()
    if run.step < steps:
        return save_training(run, out) if out else None
    return measure_latents(run.vae.eval(), pixels[:4096]).cpu()


def measure_latents(vae, pixels):
    """The same VAE with shift, scale and reach measured on pixels (N, h, w, c) uint8. A VQ-VAE has none."""
    if vae.quantiser:
        return vae
    mean, deviation = encode_all(vae, pixels, progress=False)
    # TRAP: diffusion assumes latents of about unit deviation; unscaled ones make the noise schedule wrong without a sign of it
    vae.shift.copy_(mean.mean((0, 2, 3)))
    vae.scale.copy_((mean.var((0, 2, 3)) + deviation.square().mean((0, 2, 3))).sqrt())
    vae.x0_max.fill_(encode_all(vae, pixels, progress=False)[0].abs().max().item())
    return vae


@torch.no_grad()
def show_reconstructions(vae, pixels, path, columns=16):
    """Save originals above their reconstructions, enlarged; return the mean absolute error in grey levels (0-255)."""
    drawn = np.concatenate([to_pixels(vae.reconstruct(x)) for x in batches(vae, pixels)])
    sheet = grid(np.concatenate([pixels[:columns], drawn[:columns]]), columns)
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), Image.Resampling.NEAREST).save(path)
    return float(np.abs(drawn.astype(int) - pixels).mean())


# ----------------------------------------------------------------------------------------------------------- command line
TOY = dict(image_size=32, steps=1200, batch=32, lr=2e-3, gan_start=600, loss="toy")
PAPER = dict(image_size=256, steps=1_000_000, batch=16, lr=1e-4, gan_start=50_000, loss="paper")    # batch, lr: our choice


def build_loss(args, pairs):
    """(Judges of App. C's loss, a sentence on who they are). On the toy a small network of our own stands in for VGG16 and
    MoCo v2; with --paper a term without its weights file is off."""
    lpips = perceptual.load_lpips(args.lpips_weights) if args.lpips_weights else None
    identity = perceptual.load_moco(args.moco_weights) if args.moco_weights else None
    said = [f"LPIPS from {args.lpips_weights}" if lpips else "", f"ID from {args.moco_weights}" if identity else ""]
    if not args.paper and not (lpips and identity):
        net, right = perceptual.train_small_net(pairs.pixels, pairs.captions, seed=args.seed)
        toy_lpips, toy_identity = perceptual.stand_ins(net)
        lpips, identity = lpips or toy_lpips, identity or toy_identity
        why = f"from our small network (it tells {right:.0%} of the captions' words), not the paper's"
        said = [said[0] or f"LPIPS {why}", said[1] or f"ID {why}"]
    said = [said[0] or "LPIPS is OFF: --lpips-weights names no files", said[1] or "ID is OFF: --moco-weights names no file"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        critic = vae_losses.PatchGAN(pairs.pixels.shape[-1], **({} if args.paper else dict(width=32, layers=2)))
    return vae_losses.VAELoss(lpips, identity, critic, args.gan_start), "; ".join(said)


def main(argv=None):
    """Train a VAE as the command line says; save it and a picture of its reconstructions."""
    preset = PAPER if "--paper" in (sys.argv[1:] if argv is None else argv) else TOY
    parser = argparse.ArgumentParser(description="Train the VAE or VQ-VAE and show reconstructions.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="App. C's network, size, loss and steps become the defaults")
    parser.add_argument("--data", choices=("scenes", "mnist", "folder"), default="scenes", help="what to learn from")
    parser.add_argument("--data-dir", help="folder of MNIST idx files, or of pictures with captions.jsonl")
    parser.add_argument("--image-size", type=int, help="pixels per side (scenes, folder)")
    parser.add_argument("--codes", type=int, default=0, help="codes of a VQ-VAE (App. C has 16384); 0 for a VAE")
    parser.add_argument("--loss", choices=("toy", "paper"), help="L1 + L2, or App. C's L1 + LPIPS + 0.5 GAN + 0.2 ID")
    parser.add_argument("--lpips-weights", help="with --loss paper: torchvision's VGG16 and LPIPS' vgg.pth: vgg16.pth,vgg.pth")
    parser.add_argument("--moco-weights", help="with --loss paper: a MoCo v2 checkpoint of a ResNet-50")
    parser.add_argument("--gan-start", type=int, help="with --loss paper: the step at which the discriminator comes in")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--batch", type=int, help="pictures per step")
    parser.add_argument("--lr", type=float, help="highest learning rate")
    parser.add_argument("--kl-weight", type=float, default=1e-6, help="weight of the KL term; App. C has 1e-6")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints of the training")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in the run's folder")
    parser.add_argument("--overwrite", action="store_true", help="start anew although the run's folder has a checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and noise")
    parser.add_argument("--out", default="out/vae", help="folder for vae.pt, reconstructions.png, log.jsonl and last.pt")
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    config, out = paper_config(args.codes) if args.paper else VAEConfig(codes=args.codes), Path(args.out)
    check(args, config, out)
    pairs = choose.load_pairs(args.data, args.data_dir, args.image_size, n=20000, seed=args.seed)
    test = choose.load_pairs(args.data, args.data_dir, args.image_size, split="test", n=256, seed=args.seed)
    config.image_channels = pairs.pixels.shape[-1]
    judges, said = build_loss(args, pairs) if args.loss == "paper" else (None, "the toy's loss")
    print(f"loss: {judges.describe() if judges else 'L1 + L2'} + "
          f"{'codebook' if args.codes else f'{args.kl_weight:g} KL'}  ({said})")
    began = time.time()
    with ctrl_c() as stop:
        vae = train_vae(pairs.pixels, config, args.steps, args.batch, args.lr, args.kl_weight, args.seed, judges=judges,
                        out=out, resume=args.resume, save_every=args.save_every, stop=stop)
    if vae is None:
        return print(f"stopped and saved in {out}/last.pt; the same command with --resume goes on from there")
    save(out / "vae.pt", pack_vae(vae))
    vae.to(pick_device())
    error = show_reconstructions(vae, test.pixels[:256], out / "reconstructions.png")
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {time.time() - began:.0f} s; mean error on unseen "
          f"pictures {error:.2f} of 255; wrote {out}/vae.pt and reconstructions.png")
    if args.codes:
        codes = encode_all_codes(vae, test.pixels[:256], progress=False)
        share, perplexity = codebook_use(torch.bincount(codes.flatten(), minlength=args.codes))
        print(f"codebook: {share:.0%} of {args.codes:,} codes used on {len(codes)} unseen pictures, perplexity "
              f"{perplexity:.0f}")


def check(args, config, out):
    """Raises UserError for options that cannot work, before any work is done."""
    for name in ("steps", "image_size", "batch", "save_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("kl_weight", "gan_start", "lr"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(args, name)}")
    f = 2 ** (len(config.multipliers) - 1)
    if args.image_size % f:
        raise UserError(f"--image-size must be divisible by {f}, got {args.image_size}: the latents are {f} times "
                             f"smaller")
    if args.loss == "paper" and args.image_size < 32:
        raise UserError(f"--loss paper needs pictures of at least 32 pixels, got --image-size {args.image_size}: its "
                             f"networks halve them up to five times")
    if args.loss == "toy" and (args.lpips_weights or args.moco_weights):
        raise UserError("--lpips-weights and --moco-weights are for --loss paper: add it, or leave them out")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name another folder with --out")
    if args.resume and not (out / "last.pt").exists():
        raise UserError(f"there is nothing to resume: {out}/last.pt does not exist")
    if (out / "last.pt").exists() and not (args.resume or args.overwrite):
        raise UserError(f"{out} already holds a run: add --resume to go on with it, --overwrite to start anew, or name "
                             f"another folder with --out")


if __name__ == "__main__":
    run_command(main)
