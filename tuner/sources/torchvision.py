"""What torchvision knows, beside the sets that are published like MNIST."""

from typing import Any

import numpy as np
import torch

from tuner.data_spec import EmnistSpec, TorchvisionSpec
from tuner.sources.splits import Splits, hold_out, listed
from tuner.vae.data import Split
from tuner.vae.errors import Refused, one_line

CLASSES = {"qmnist": "QMNIST", "emnist": "EMNIST", "cifar10": "CIFAR10", "svhn": "SVHN"}


def read(spec: TorchvisionSpec | EmnistSpec) -> Splits:
    """Raises Refused, naming the folder, where the files are neither there nor can be downloaded, or are damaged."""
    return hold_out(_split(spec, "train"), _split(spec, "test"))


def _split(spec: TorchvisionSpec | EmnistSpec, part: str) -> Split:
    options: dict[str, Any] = {"split": part} if spec.name == "svhn" else {"train": part == "train"}
    if isinstance(spec, EmnistSpec):
        options["split"] = spec.split
    made, there = getattr(torchvision_datasets(), CLASSES[spec.name]), listed(spec.directory)
    try:
        found = made(str(spec.directory), download=spec.download, **options)
    except Exception as error:  # whatever comes of parsing damaged files
        raise Refused(
            f"no {CLASSES[spec.name]} that torchvision can read in {spec.directory}, where there is {there}"
            f"{'' if spec.download else ', and downloading is off'} ({one_line(error)})"
        ) from error
    images = torch.as_tensor(found.data)
    labels = torch.as_tensor(np.asarray(found.labels if spec.name == "svhn" else found.targets)).long()
    if spec.name == "emnist":
        images = images.transpose(1, 2)  # its files hold columns where others hold rows
        labels = labels - (1 if spec.split == "letters" else 0)  # letters are 1 to 26 in its files
    if spec.name == "qmnist":
        labels = labels[:, 0]  # beside the class stand the writer and the form
    if spec.name == "cifar10":
        images = images.permute(0, 3, 1, 2)
    return Split((images if images.dim() == 4 else images.unsqueeze(1)).contiguous(), labels)


def torchvision_datasets() -> Any:
    """torchvision.datasets, also where a CUDA build of torchvision meets a CPU build of torch.

    That mix is what package indexes hand out; `import torchvision` then dies because the schemas of its
    compiled operators are missing. Declared, they are never called: data sets and transforms need none.
    """
    try:
        from torchvision import datasets
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torchvision_datasets.library = library  # type: ignore[attr-defined]  # dropped, it would undeclare them
        from torchvision import datasets
    return datasets
