"""
losses.py: what makes a reconstruction good                                     (Transfusion App. C)

THE IDEA    Ask four judges how near a reconstruction x' is to the picture x. L1 compares pixel by
            pixel. Where it is unsure it likes grey blur best. LPIPS and ID compare what a trained
            network sees, so a texture that moved by a pixel is still the same texture. The fourth
            judge is a discriminator that learns beside the VAE. It looks at patches and says
            whether they are real. Blur gives itself away.
A PICTURE             +--- L1 (pixels) ------------------------+
            x, x' ----+--- VGG16 ----- five maps -- LPIPS -----+--- reconstruction ---+
                      +--- ResNet-50 - four maps -- ID --------+                      |
            x' ----------- PatchGAN -- -mean D(x') -- * weight ----- GAN -------------+--> L
            mean, log-variance ------------------------------------- KL --------------+
            x, x'.detach() --- PatchGAN -- hinge ---> the discriminator's own loss, in its own step
THE RULE    App. C:  L = L1 + LPIPS + 0.5 GAN + 0.2 ID + 1e-6 KL             `appendix_c`
            D(x, y) = sum over maps, mean over places of  sum_c  w_c (x_c / |x| - y_c / |y|)^2
                                                                             LPIPS, and ID
            GAN = -weight * mean D(x')                                      Esser et al. 2021, eq. 7
              weight = |d reconstruction / d last| / (|d GAN / d last| + 1e-4), at most 1e4
            discriminator: 1/2 mean max(0, 1 - D(x)) + 1/2 mean max(0, 1 + D(x'))         hinge
SHAPES      pictures (M, c, h, w) float32 in [-1, 1], c = 3 or 1 (grey); a distance is (M,), a loss
            is a scalar. `x_hat` is x'.
PAPER/HERE  same: the terms, their weights, GAN from step 50,000. The PatchGAN has 2,765,633
            parameters; with the VAE's 83,709,419 the sum is 86.5M, where the paper says 86M.
            our choice: ID. The paper says "a perceptual loss based on internal features of the
            MoCo v2 model" and no more. We take 1 - cosine at each place, averaged over the places
            and the four stages of the ResNet-50.
            our choice: every term is a mean over the elements of a picture. The KL is a sum over
            the latent, divided by the number of the picture's elements; this is the reading under
            which Rombach et al. 2022 use the same 1e-6 and 0.5.
            our choice: the discriminator starts to learn when it starts to judge. Before, it is
            neither trained nor asked.
            not here: the weights of VGG16, LPIPS and MoCo v2; we had no network to fetch them.
            Tests check their published names and shapes, but their numbers never met this code.
            On the toy `SmallNet` stands in for both.
READ NEXT   perceptual.py, train.py        TRY IT  python -m autoencoder.losses
TEST        tests/test_vae_losses.py
"""
import torch
import torch.nn.functional as F
from torch import nn

from autoencoder.perceptual import stand_ins, train_small_net
from autoencoder.processes import ALONE, WholeBatchNorm
from support.common import run_command
from vae import to_float


def appendix_c(l1, lpips, gan, identity, kl, kl_weight=1e-6):
    """The loss of the VAE, from its five terms, each a scalar; 0 for a term that is off.
    For the VQ-VAE kl is the codebook loss, and kl_weight is 1."""
    # Paper: App. C. The equation, with its weights.
    return l1 + lpips + 0.5 * gan + 0.2 * identity + kl_weight * kl


# ------------------------------------------------------------------------------------ the adversary
class PatchGAN(nn.Module):
    """(M, c, h, w) -> (M, 1, about h / 2^layers, w / 2^layers): an answer for each patch, above 0
    for real, below 0 for drawn. Isola et al. 2017; by default each answer sees 70 x 70 pixels."""

    def __init__(self, channels=3, width=64, layers=3):
        super().__init__()
        # As in Isola et al., there is no norm behind the first convolution.
        stack = [nn.Conv2d(channels, width, 4, stride=2, padding=1)]
        stack.append(nn.LeakyReLU(0.2))

        # Each level doubles the channels, up to 8 times as many, and halves the size. The last one
        # keeps the size.
        c = width
        for k in range(1, layers + 1):
            factor = min(2 ** k, 8)
            wider = width * factor
            stride = 2 if k < layers else 1
            # BatchNorm has a bias of its own: the convolution before it needs none.
            stack.append(nn.Conv2d(c, wider, 4, stride, padding=1, bias=False))
            stack.append(WholeBatchNorm(wider))
            stack.append(nn.LeakyReLU(0.2))
            c = wider

        # One number per patch. No sigmoid: the hinge wants answers that can go beyond 1.
        stack.append(nn.Conv2d(c, 1, 4, padding=1))
        self.stack = nn.Sequential(*stack)

        # As Isola et al. begin: small weights, so that at first it has no opinion.
        for weight in self.parameters():
            if weight.ndim == 4:
                nn.init.normal_(weight, std=0.02)

    def forward(self, x):
        return self.stack(x).float()


def hinge(real, drawn):
    """Loss of the discriminator, from its answers to real and to drawn patches. An answer beyond
    the margin of 1 is good enough: it has no gradient."""
    wrong_on_real = F.relu(1 - real).mean()
    wrong_on_drawn = F.relu(1 + drawn).mean()
    return 0.5 * wrong_on_real + 0.5 * wrong_on_drawn


def adaptive_weight(reconstruction, gan, last, processes=ALONE):
    """The weight with which the GAN pulls at the decoder's last layer as hard as `reconstruction`.
    reconstruction, gan: scalar losses; last: that layer's weight; processes: who has the other
    parts of the batch. Esser et al. 2021, eq. 7."""
    # Without it the discriminator's scale would decide which of the two the decoder listens to.
    pull, = torch.autograd.grad(reconstruction, last, retain_graph=True)
    push, = torch.autograd.grad(gan, last, retain_graph=True)
    # The norm of the mean, not the mean of norms.
    pull = processes.average(pull)
    push = processes.average(push)
    pull = pull.float().norm()
    push = push.float().norm()
    weight = pull / (push + 1e-4)                       # 1e-4 and 1e4 as in the code they published
    return weight.clamp(0, 1e4).detach()


# ------------------------------------------------------------------------------------ all the terms
class VAELoss(nn.Module):
    """App. C's loss, and what it needs: three networks.

    lpips, identity     FeatureDistance, or None for a term that is off
    discriminator       PatchGAN, or None
    gan_start           the first step at which the discriminator counts
    """

    def __init__(self, lpips=None, identity=None, discriminator=None, gan_start=50_000):
        super().__init__()
        self.lpips = lpips
        self.identity = identity
        self.discriminator = discriminator
        self.gan_start = gan_start                      # Paper: App. C, from step 50,000
        self.processes = ALONE

    def describe(self):
        """The loss in words, without the terms that are off:
        "L1 + LPIPS + 0.2 ID + 0.5 GAN from step 50000"."""
        terms = ["L1"]
        if self.lpips is not None:
            terms.append("LPIPS")
        if self.identity is not None:
            terms.append("0.2 ID")
        if self.discriminator is not None:
            terms.append(f"0.5 GAN from step {self.gan_start}")
        return " + ".join(terms)

    def gan_is_on(self, step):
        """Whether the discriminator judges, and learns, at this step (counted from 0)."""
        return self.discriminator is not None and step >= self.gan_start

    def forward(self, x, x_hat, kl, kl_weight, last, step):
        """(loss of the VAE, {term: number} for the log).
        x, x_hat: (M, c, h, w) in about [-1, 1]; kl, kl_weight: as in `appendix_c`;
        last: weight of the decoder's last layer; step: counted from 0."""
        x_hat = x_hat.float()
        l1 = (x_hat - x).abs().mean()
        terms = {"L1": l1}

        # What a trained network sees. A term that is off is 0, and not in the log.
        lpips = identity = gan = 0
        if self.lpips is not None:
            lpips = self.lpips(x, x_hat).mean()
            terms["LPIPS"] = lpips
        if self.identity is not None:
            identity = self.identity(x, x_hat).mean()
            terms["ID"] = identity

        # The VAE wants its reconstructions taken for real: answers far above 0. How hard this
        # pulls is measured against the other terms, at every step anew.
        if self.gan_is_on(step):
            answer = -self.discriminator(x_hat).mean()
            reconstruction = appendix_c(l1, lpips, 0, identity, 0)
            weight = adaptive_weight(reconstruction, answer, last, self.processes)
            gan = weight * answer
            terms["weight"] = weight
            terms["GAN"] = answer

        # The log's numbers are cut off from the graph, or it would be kept as long as they are.
        loss = appendix_c(l1, lpips, gan, identity, kl, kl_weight)
        numbers = {name: term.detach() for name, term in terms.items()}
        return loss, numbers

    def discriminator_loss(self, x, x_hat):
        """Hinge loss of the discriminator. x, x_hat: (M, c, h, w)."""
        # TRAP: without detach this step would also train the VAE, to be found out.
        real = self.discriminator(x)
        drawn = self.discriminator(x_hat.detach().float())
        return hinge(real, drawn)


def demo():
    """Show how far each judge finds a picture from spoiled versions of itself."""
    from sources import scenes

    # 1. The judges: a network that knows shapes and colours a little.
    pairs = scenes.load_scenes(300, seed=0, progress=False)
    net, right = train_small_net(pairs.pixels, pairs.captions,
                                 steps=60, batch=24)
    lpips, identity = stand_ins(net)

    # 2. What they judge. To our eyes a picture that moved by a pixel is the same; to L1 it is not.
    x = to_float(pairs.pixels[:32])
    spoiled = {
        "itself": x,
        "moved by a pixel": x.roll(1, 3),
        "blurred": F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        "another colour": x.roll(1, 1),
        "all black": torch.full_like(x, -1),
    }
    print(f"a small network after 60 steps tells {right:.0%} of a caption's words;")
    print("what it and L1 make of changed pictures:")
    print("                        L1  LPIPS*     ID*    (* the toy's stand-ins)")
    for name, y in spoiled.items():
        l1 = (x - y).abs().mean()
        with torch.no_grad():
            seen = lpips(x, y).mean()
            known = identity(x, y).mean()
        print(f"{name:18s}{l1:8.3f}{seen:8.3f}{known:8.3f}")
    parameters = sum(weight.numel() for weight in PatchGAN().parameters())
    print(f"the paper's PatchGAN has {parameters:,} parameters")


if __name__ == "__main__":
    run_command(lambda _: demo())
