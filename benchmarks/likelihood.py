"""The importance-weighted bound of a finished run on the binarized test split, and its standard error.

    python -m benchmarks.likelihood RUN [--data-dir data] [--subset 500] [--samples 5000]

The protocol: each of the 10,000 test images is binarized once, pixel by pixel, white with the probability of its grey
value. Every image gets the bound of Burda et al. 2016 (eq. 8) with 64 draws; the first --subset images, which are in
no order, get it with --samples draws too. Reported is the mean over all with 64 draws plus the mean difference over
the subset: an unbiased estimate of the mean over all with --samples draws. Its standard error adds the variances of
both means. Twice: under N(0, I), as Burda et al. have it, and under the prior that was fitted on training codes alone.
"""

import math
from pathlib import Path

import torch

from benchmarks.setting import MNIST, parser, say
from tuner import sources
from tuner.data_spec import IdxSpec
from tuner.run import RunFiles
from tuner.vae import codec
from tuner.vae.data import as_floats, binarize
from tuner.vae.iwae import importance_weighted_bound
from tuner.vae.prior import standard_normal
from tuner.vae.process import settle

FEW = 64


def main() -> None:
    options = parser(__doc__, MNIST)
    options.add_argument("run", type=Path, metavar="RUN")
    options.add_argument("--subset", type=int, default=500)
    options.add_argument("--samples", type=int, default=5_000)
    arguments = options.parse_args()
    settle()
    fitted = codec.load(RunFiles(arguments.run).export).fitted
    test = sources.load_test(IdxSpec(name="mnist", directory=arguments.data_dir))
    images = as_floats(binarize(test.images, torch.Generator().manual_seed(0)))
    priors = {fitted.parameters.prior: fitted.prior, "standard_normal": standard_normal(fitted.model.latent_dim)}
    for name, prior in priors.items():
        few = importance_weighted_bound(fitted.model, prior, images, FEW, torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(2)
        part = images[: arguments.subset]
        more = importance_weighted_bound(fitted.model, prior, part, arguments.samples, generator)
        gain = more - few[: arguments.subset]
        error = math.sqrt(few.var().item() / len(few) + gain.var().item() / len(gain))
        line = {
            "prior": name,
            f"bound with {FEW} draws, nats": -few.mean().item(),
            f"bound with {arguments.samples} draws, nats": -(few.mean() + gain.mean()).item(),
            "standard error": error,
            "of the difference alone": math.sqrt(gain.var().item() / len(gain)),
        }
        say(line, 3)


if __name__ == "__main__":
    main()
