"""
vae_losses.py: what makes a reconstruction good               (Transfusion App. C)

THE IDEA    Ask four judges how near a drawn picture is to the real one. L1 compares pixel by pixel; where it is unsure it
            likes grey blur best. LPIPS and ID compare what a trained network sees, so a texture moved by a pixel is still
            the same texture. The fourth, a discriminator that learns beside the VAE, looks at patches and says real or
            drawn: blur gives itself away.
A PICTURE             +--- L1 (pixels) ------------------------+
            x, x' ----+--- VGG16 ----- five maps -- LPIPS -----+--- near --+
                      +--- ResNet-50 - four maps -- ID --------+           +--> loss of the VAE
            x' -----------------------  PatchGAN -- -mean(D) -- GAN * w ---+    (w: both pull equally hard at the last layer)
            x, x'.detach() -----------  PatchGAN -- hinge ------------------> loss of D, in a step of its own
THE RULE    App. C:  L = L1 + LPIPS + 0.5 GAN + 0.2 ID + 1e-6 KL         (VQ-VAE: codebook + 0.25 commitment for the KL)
            D(x, y) = sum over maps of the mean over places of  sum_c  w_c (x_c / |x| - y_c / |y|)^2      LPIPS, and ID
            GAN = -mean D(x') * w,   w = |d near / d last| / (|d GAN / d last| + 1e-4), at most 1e4       Esser et al. 2021
            D:  1/2 mean max(0, 1 - D(x)) + 1/2 mean max(0, 1 + D(x'))                                    hinge
SHAPES      pictures (M, c, h, w) float32 in [-1, 1], c = 3 or 1 (grey); a distance is (M,), a loss is a scalar.
PAPER/HERE  same: the terms, their weights, GAN from step 50,000. The PatchGAN has 2,765,633 parameters; with the VAE's
            83,709,419 the sum is 86.5M, where the paper says 86M.
            our choice: ID. The paper says "a perceptual loss based on internal features of the MoCo v2 model" and no more;
            we take 1 - cosine at each place, averaged over the places and the four stages of the ResNet-50.
            our choice: every term is a mean over the elements of a picture (the KL: a sum over the latent divided by the
            pictures' elements, the reading under which Rombach et al. 2022 use the same 1e-6 and 0.5).
            our choice: D starts to learn when it starts to judge. It is neither trained nor asked before.
            not here: the weights of VGG16, LPIPS and MoCo v2; we had no network to fetch them. Their published key names
            and shapes are tested, their numbers never met this code. On the toy `SmallNet` stands in for both.
READ NEXT   train_vae.py        TRY IT  python vae_losses.py        TEST  tests/test_vae_losses.py
"""
import torch
import torch.nn.functional as F
from torch import nn

from sources import scenes
from autoencoder.perceptual import stand_ins, train_small_net

WEIGHTS = {"L1": 1.0, "LPIPS": 1.0, "ID": 0.2, "GAN": 0.5}              # Paper App. C


# ------------------------------------------------------------------------------------------------------- what networks see
# ------------------------------------------------------------------------------------------------------- published weights
# ---------------------------------------------------------------------------------------------------------- the adversary
class PatchGAN(nn.Module):
    """(M, c, h, w) -> (M, 1, about h / 2^layers, w / 2^layers): for each patch, above 0 for real, below for drawn.
    Isola et al. 2017; with the defaults each answer sees 70 x 70 pixels."""

    def __init__(self, channels=3, width=64, layers=3):
        super().__init__()
        widths = [width * min(2 ** k, 8) for k in range(layers + 1)]
        stack = [nn.Conv2d(channels, width, 4, 2, padding=1), nn.LeakyReLU(0.2)]
        for k, (a, b) in enumerate(zip(widths, widths[1:]), 1):
            conv = nn.Conv2d(a, b, 4, 2 if k < layers else 1, padding=1, bias=False)
            stack += [conv, nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        self.stack = nn.Sequential(*stack, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for name, weight in self.named_parameters():    # as Isola et al. begin: small, so that at first D has no opinion
            if weight.ndim == 4:
                nn.init.normal_(weight, std=0.02)

    def forward(self, x):
        return self.stack(x).float()


def hinge(real, drawn):
    """Loss of the discriminator, from its answers to real and to drawn patches."""
    return 0.5 * F.relu(1 - real).mean() + 0.5 * F.relu(1 + drawn).mean()


def adaptive_weight(near, gan, last):
    """The weight under which the GAN pulls at the decoder's last layer as hard as `near` does. near, gan: scalar losses;
    last: that layer's weight. Esser et al. 2021, eq. 7; 1e-4 and the bound of 1e4 are those of the code they published."""
    pull, push = (torch.autograd.grad(loss, last, retain_graph=True)[0].float().norm() for loss in (near, gan))
    return (pull / (push + 1e-4)).clamp(0, 1e4).detach()


class VAELoss(nn.Module):
    """All of App. C's loss but the KL. lpips, identity: FeatureDistance or None, for a term that is off;
    discriminator: PatchGAN or None; gan_start: the first step at which it counts; weights: of the terms."""

    def __init__(self, lpips=None, identity=None, discriminator=None, gan_start=50_000, weights=WEIGHTS):
        super().__init__()
        self.lpips, self.identity, self.discriminator = lpips, identity, discriminator
        self.gan_start, self.weights = gan_start, dict(weights)

    def describe(self):
        """The loss in words: "L1 + LPIPS + 0.2 ID + 0.5 GAN from step 50000"; terms that are off are left out."""
        on = {"L1": True, "LPIPS": self.lpips, "ID": self.identity, "GAN": self.discriminator}
        return " + ".join(f"{w:g} {name}".removeprefix("1 ") for name, w in self.weights.items() if on[name] is not None) + (
            f" from step {self.gan_start}" if self.discriminator is not None else "")

    def awake(self, step):
        """Whether the discriminator judges, and learns, at this step (counted from 0)."""
        return self.discriminator is not None and step >= self.gan_start

    def forward(self, x, drawn, last, step):
        """(loss of the VAE without its KL, {term: number} for the log). x, drawn: (M, c, h, w) in about [-1, 1];
        last: weight of the decoder's last layer."""
        drawn = drawn.float()
        terms = {"L1": (drawn - x).abs().mean()}
        if self.lpips is not None:
            terms["LPIPS"] = self.lpips(x, drawn).mean()
        if self.identity is not None:
            terms["ID"] = self.identity(x, drawn).mean()
        loss = sum(self.weights[name] * term for name, term in terms.items())
        if self.awake(step):
            gan = -self.discriminator(drawn).mean()
            terms["weight"] = adaptive_weight(loss, gan, last)
            terms["GAN"] = gan
            loss = loss + self.weights["GAN"] * terms["weight"] * gan
        return loss, {name: term.detach() for name, term in terms.items()}

    def discriminator_loss(self, x, drawn):
        """Hinge loss of the discriminator. TRAP: without detach its step would also train the VAE, to be found out."""
        return hinge(self.discriminator(x), self.discriminator(drawn.detach().float()))


if __name__ == "__main__":
    pairs = scenes.load_scenes(300, seed=0, progress=False)
    net, right = train_small_net(pairs.pixels, pairs.captions, steps=60, batch=24)
    lpips, identity = stand_ins(net)
    x = torch.from_numpy(pairs.pixels[:32]).permute(0, 3, 1, 2).float() / 127.5 - 1
    spoiled = {"itself": x, "moved by a pixel": x.roll(1, 3), "blurred": F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
               "another colour": x.roll(1, 1), "all black": torch.full_like(x, -1)}
    print(f"a small network after 60 steps tells {right:.0%} of a caption's words; what it and L1 make of changed pictures:\n"
          f"{'':18s}{'L1':>8s}{'LPIPS*':>8s}{'ID*':>8s}    (* the toy's stand-ins)")
    with torch.no_grad():
        for name, y in spoiled.items():
            print(f"{name:18s}{(x - y).abs().mean():8.3f}{lpips(x, y).mean():8.3f}{identity(x, y).mean():8.3f}")
    print(f"the paper's PatchGAN has {sum(p.numel() for p in PatchGAN().parameters()):,} parameters")
