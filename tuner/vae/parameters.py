"""The parameters of one trial, by who reads them: every one can be searched or fixed by a spec.

A spec's YAML is flat, and so is `Parameters`, which is all three at once: whoever takes a part takes no notice of the
rest. They stand apart from their readers so that a spec is checked without importing torch.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Strict(BaseModel):
    # strict: true is no number of images
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), strict=True)


class ModelParameters(_Strict):
    """What the network is: read by `model.build`."""

    model: Literal["vae", "autoencoder"] = Field(
        "vae", description="autoencoder: no sampling, no KL term; what the VAE is taught against"
    )
    latent_dim: int = Field(16, ge=1, le=512, description="size of the latent vector")
    width: int = Field(
        32, ge=1, le=512, description="channels after the first convolution; twice as many after the second"
    )


class TrainingParameters(_Strict):
    """How weights are trained: read by `train`, its steps and `Fused`."""

    likelihood: Literal["gaussian", "bernoulli"] = Field(
        "gaussian", description="gaussian: summed squared error; bernoulli: summed binary cross-entropy"
    )
    pixels: Literal["grey", "binary"] = Field(
        "grey", description="binary: each pixel drawn anew at every step, white with its grey value's probability"
    )
    learning_rate: float = Field(1e-3, gt=0, description="Adam's step size at the top of the schedule")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="cosine: from learning_rate to zero over the trial's max_epochs"
    )
    warmup_steps: int = Field(
        0, ge=0, description="steps over which the learning rate rises linearly to its full value"
    )
    batch_size: int = Field(128, ge=1, description="images a step")
    kl_weight: float = Field(1.0, ge=0, description="factor on the KL term against the summed reconstruction error")
    kl_warmup_epochs: float = Field(0.0, ge=0, description="epochs over which the KL factor rises linearly from 0")


class SamplingParameters(_Strict):
    """What is fitted after training, to sample from: read by `Fitter`."""

    prior: Literal["standard_normal", "gaussian_mixture", "matched_mixture", "flow"] = Field(
        "standard_normal",
        description="where sampled latents come from; the others are fitted on encoded images: a mixture, one moved "
        "until what is drawn from it looks like training images, or one bent by a flow",
    )
    prior_components: int = Field(10, ge=1, le=1000, description="Gaussians in the mixture")
    temperature: Literal["one", "fitted"] = Field(
        "one",
        description="what logits are divided by where images are drawn; fitted: so that as many pixels are grey as in "
        "training images; one: they stay as blurred as the average over what the decoder can't know",
    )


class Parameters(SamplingParameters, TrainingParameters, ModelParameters):
    """One trial's parameters; the defaults are the classic settings of the MNIST tutorials.

    Raises `pydantic.ValidationError` on unknown names and on values out of range.
    """


CLASSIC = Parameters()
