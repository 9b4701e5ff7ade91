"""The parameters of one trial, by who reads them: every one can be searched or fixed by a spec. They stand apart from
their readers so that a spec is checked without importing torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

OPTION = "model."  # what the options of a user's own model begin with
Option = bool | int | float | str


class _Strict(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        strict=True,  # true is no number of images
        use_attribute_docstrings=True,
    )


class ModelParameters(_Strict):
    """What the network is: read by `model.Builder`.

    A user's own model may take options, each a parameter `model.NAME` here and everywhere.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Option] = Field(init=False)

    model: Literal["vae", "autoencoder", "own"] = "vae"
    """autoencoder: the plain autoencoder, its latent not sampled, without a KL term; own: that of --model"""
    latent_dim: int = Field(16, ge=1, le=512, description="numbers in the latent vector")
    width: int = Field(32, ge=1, le=512)
    """channels after the first convolution; each next has twice as many, four times width at most"""

    @model_validator(mode="after")
    def _options_alone(self) -> "ModelParameters":
        unknown = [name for name in self.model_extra or {} if not name.startswith(OPTION)]
        if unknown:
            raise ValueError(f"unknown parameters {', '.join(unknown)}")
        return self

    @property
    def options(self) -> dict[str, Option]:
        """Of a user's own model, by the names that its function gives them."""
        return {name.removeprefix(OPTION): value for name, value in (self.model_extra or {}).items()}


class TrainingParameters(_Strict):
    """How weights are trained: read by `train`, its steps and `Fused`."""

    likelihood: Literal["gaussian", "bernoulli"] = "gaussian"
    """the reconstruction error, summed over pixels; gaussian: squared error; bernoulli: binary cross-entropy"""
    pixels: Literal["grey", "binary"] = "grey"
    """grey: images as they are; binary: each pixel drawn anew at every step, ink with its grey value's probability"""
    learning_rate: float = Field(1e-3, gt=0, description="Adam's step size at the top of the schedule")
    schedule: Literal["constant", "cosine"] = "constant"
    """of the learning rate; cosine: from learning_rate to zero over budget.max_epochs"""
    warmup_steps: int = Field(0, ge=0)
    """steps over which the learning rate rises linearly to its full value"""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """of what the networks multiply in training; weights, losses and scores are float32 either way; auto: bfloat16
    where trials have no GPU and the machine that starts the run has instructions for it, and so for the whole run"""
    batch_size: int = Field(128, ge=1, description="images a step")
    kl_weight: float = Field(1.0, ge=0)
    """factor on the KL term against the summed reconstruction error of an image; 1 in the classic loss"""
    kl_unit: Literal["absolute", "calibrated"] = "absolute"
    """what kl_weight is counted in; calibrated: in twice the mean squared error a pixel, as far as training has come,
    which makes 1 the weight of a Gaussian decoder whose variance is fitted, on any images"""
    kl_warmup_epochs: float = Field(0.0, ge=0)
    """epochs over which the factor rises linearly from 0 to kl_weight"""


class SamplingParameters(_Strict):
    """What is fitted after training, to sample from: read by `Fitter`."""

    prior: Literal["standard_normal", "gaussian_mixture", "matched_mixture", "flow"] = "standard_normal"
    """where sampled latents come from; standard_normal: N(0, I); the others are fitted on the codes of training images:
    a mixture of Gaussians, one moved until what is drawn from it looks like training images, or one bent by a flow"""
    prior_components: int = Field(10, ge=1, le=1000, description="Gaussians in the fitted mixture")
    temperature: Literal["one", "fitted"] = "one"
    """what the decoder's logits are divided by where images are drawn; one: by 1; fitted: by the number at which as
    many pixels are grey as in training images"""


class Parameters(SamplingParameters, TrainingParameters, ModelParameters):
    """One trial's parameters; the defaults are the classic settings of the MNIST tutorials.

    Raises `pydantic.ValidationError` on unknown names and on values out of range.
    """


CLASSIC = Parameters()
