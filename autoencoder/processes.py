"""
processes.py: the VAE's training on several processes                           (Transfusion App. C)

THE IDEA    The VAE is small (86M), so every process has all of it, and takes a part of the batch.
            Gradients are averaged; then all take the same step. What looks at the batch as a whole
            must look at all parts: the discriminator's batch norms, the weight of the GAN, the
            codebook. So n processes train what one would.
A PICTURE   torchrun --nproc-per-node 2, --batch 4        pictures 7 3 | 9 1
            process 0   7 3 --> gradient --+                       noise the same four draws, cut
            process 1   9 1 --> gradient --+--> mean --> AdamW     batch norm, |d GAN|, codes: of 4
THE RULE    d (mean of L over all parts) = mean of (d L of each part), because parts are equal.
PAPER/HERE  the paper says nothing of this. Run here: CPU and gloo, 2 processes. Not run: NCCL.
            TRAP: nn.SyncBatchNorm does not run on a CPU, so nothing that uses it can be tested
            there. `WholeBatchNorm` is its rule in eight lines.
READ NEXT   train.py        TEST  tests/test_vae_processes.py
"""
import atexit
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce

from support.common import UserError
from vae import Quantiser


@dataclass(frozen=True)
class Processes:
    """Which process this is, of how many. With one, every method gives back what it is given."""
    rank: int = 0
    size: int = 1

    def share(self, items):
        """This process's part of a whole batch: n items, of which it gets n / size in a row."""
        n = len(items) // self.size
        return items[self.rank * n: (self.rank + 1) * n]

    def draw(self, shape, generator=None):
        """Normal noise for this process's part (m, ...) of a batch: what one process would draw for
        these pictures."""
        whole = torch.randn((self.size * shape[0], *shape[1:]), generator=generator)
        return self.share(whole)

    def average(self, x):
        """The mean of a tensor over the processes. Its gradient is the mean, too."""
        if self.size == 1:
            return x
        return all_reduce(x.clone()) / self.size

    def average_gradients(self, weights):
        """Put the mean over the processes in place of the gradient of each weight."""
        if self.size == 1:
            return
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        # One message for all: hundreds of small ones would wait for one another.
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))

    def gather(self, x):
        """The parts (n, ...) of all processes in the order of the batch, (size n, ...)."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def any(self, flag):
        """Whether a flag is true on any process: if one must stop, all must."""
        flags = self.gather(torch.tensor([bool(flag)]))
        return bool(flags.any())

    def join(self, *modules):
        """Let every module that looks at the whole batch see all parts of it."""
        if self.size == 1:
            return
        for module in modules:
            for part in module.modules():
                if hasattr(part, "processes"):
                    part.processes = self
                if isinstance(part, Quantiser):
                    self.join_quantiser(part)

    def join_quantiser(self, quantiser):
        """Let a quantiser place idle codes, and count, as if it saw the whole batch."""
        revive = quantiser.revive
        count = quantiser.count

        def revive_all(vectors, generator=None):
            revive(self.gather(vectors), generator)

        def count_all(codes):
            count(self.gather(codes))

        quantiser.revive = revive_all
        quantiser.count = count_all


ALONE = Processes()


def start():
    """Processes: those that torchrun has started; otherwise this one alone. Raises UserError if
    there are more than GPUs."""
    if "RANK" not in os.environ:
        return ALONE
    backend = "gloo"
    if torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"this machine has {torch.cuda.device_count()} GPUs: lower "
                            f"--nproc-per-node")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    atexit.register(dist.destroy_process_group)
    return Processes(dist.get_rank(), dist.get_world_size())


class WholeBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose mean and variance, in training, are those of all processes' parts."""

    processes = ALONE

    def forward(self, x):
        if self.processes.size == 1 or not self.training:
            return super().forward(x)
        x = x.float()                                                       # (m, c, h, w)
        mean = self.processes.average(x.mean((0, 2, 3), keepdim=True))      # (1, c, 1, 1)
        square = (x - mean).square().mean((0, 2, 3), keepdim=True)
        variance = self.processes.average(square)
        self.remember(mean.flatten(), variance.flatten(), x.numel() // x.shape[1])
        x = (x - mean) / (variance + self.eps).sqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]

    @torch.no_grad()
    def remember(self, mean, variance, n):
        """Move the running mean and variance (c,), as nn.BatchNorm2d does. n: how many numbers per
        channel this process has."""
        n *= self.processes.size
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * n / (n - 1), self.momentum)
