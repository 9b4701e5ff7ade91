"""A trained model at work: `python -m tuner.use EXPORT encode PHOTOS --out latents.npz`, and so on.

Networks run as ONNX programs, a user's own too: nothing in an export is run as code, whoever it is from.
"""

import argparse
import csv
import io
import json
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuner import sources
from tuner.data_spec import FolderSpec, user_path
from tuner.exits import command, resumable
from tuner.export_files import from_onnx
from tuner.run import write_atomic
from tuner.terminal import Progress
from tuner.vae.codec import UNREADABLE, negative_elbo
from tuner.vae.data import as_floats
from tuner.vae.errors import Refused, refusing
from tuner.vae.fitted import BATCH
from tuner.vae.image_grid import STEPS, grid, png, sheet
from tuner.vae.shape import ImageShape


class Export:
    """What an export's config.json says, and its `programs` by name. Raises Refused."""

    def __init__(self, path: Path, programs: Sequence[str]):
        with refusing(f"{path / 'config.json'}: {UNREADABLE}"):
            config = json.loads((path / "config.json").read_text("utf-8"))
            images, anomaly, left_out = config["images"], config["anomaly"], config["left_out"]
            self.shape, self.invert, self.ink = ImageShape(*images["shape"]), images["invert"], images["ink"]
            self.latent_dim = int(config["parameters"]["latent_dim"])
            self.known = float(config["temperature"]), anomaly["variance"] and float(anomaly["variance"])
            self.threshold, self.percentile = float(anomaly["threshold"]), float(anomaly["percentile"])
        self.programs = {}
        for name in programs:
            file = path / "onnx" / f"{name}.onnx"
            with refusing(f"{file}: {UNREADABLE}"):
                if file.name in left_out:
                    raise ValueError(left_out[file.name])
                self.programs[name] = from_onnx(file)

    def images(self, place: Path) -> Iterator[tuple[list[str], Tensor]]:
        """Names and images (B, C, H, W) in [0, 1] of a photo, a folder or a .zip, made ready as for training.

        Damaged ones are left out and told: here no image depends on another. Raises Refused where all are.
        """
        pictures, faults = [sources.decode.Picture(place.name, place.read_bytes)], []
        if not place.is_file() or zipfile.is_zipfile(place):
            pictures = sources.folder.pictures(FolderSpec(name="folder", directory=place))
        with Progress("encode") as progress:
            for start in range(0, len(pictures), BATCH):
                if start:
                    progress.show(f"{start:,} of {len(pictures):,} images")
                part = pictures[start : start + BATCH]
                images, found = sources.decode.decode_all(part, self.shape, progress.show)
                whole = [index for index, fault in enumerate(found) if not fault]
                if whole:
                    images = 255 - images[whole] if self.invert else images[whole]
                    yield [part[index].name for index in whole], as_floats(torch.from_numpy(images))
                faults += found
        if all(faults):
            raise Refused(sources.decode.damaged_words(faults, place))
        if any(faults):
            print(sources.decode.damaged_words(faults, place, " and are left out"), file=sys.stderr)

    def latent(self, place: Path) -> Tensor:
        """Of one photo (1, Z). Raises Refused where there are more."""
        (mean, *_), *others = [self.programs["encoder"](images) for _, images in self.images(place)]
        if others or len(mean) > 1:
            raise Refused(f"{place}: one photo is wanted here")
        return mean

    def decode(self, latents: Tensor) -> Tensor:
        return self.programs["decoder"](latents)[0]

    def draw(self, latents: Tensor, names: Sequence[str], out: Path, columns: int = 10) -> None:
        """Decode latents (N, Z): as one sheet where `out` ends in .png, else into a folder, as `images` reads them."""
        batches = map(self.decode, latents.split(BATCH))
        if out.suffix == ".png":
            write_atomic(out, sheet(torch.cat([*batches]), min(columns, len(names)), self.ink))
        else:
            with Progress("decode") as progress:
                for index, image in enumerate(image for batch in batches for image in batch):
                    if index and index % BATCH == 0:
                        progress.show(f"{index:,} of {len(names):,} images")
                    path = out / f"{names[index]}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(png(grid(image.unsqueeze(0), 1, self.invert)))
        print(f"{out}: {len(names):,} images")


def encode(export: Export, asked: argparse.Namespace) -> None:
    """Photos -> an .npz of their names, latents and log_variances."""
    batches = [(names, export.programs["encoder"](images)) for names, images in export.images(asked.PHOTOS)]
    names = np.array([name for some, _ in batches for name in some])
    latents = (torch.cat(part).numpy() for part in zip(*(found for _, found in batches), strict=True))
    arrays: dict[str, Any] = dict(zip(("latents", "log_variances"), latents, strict=False))
    file = io.BytesIO()
    np.savez(file, names=names, **arrays)
    write_atomic(asked.out, file.getvalue())
    print(f"{asked.out}: {len(names):,} images, {export.latent_dim} numbers each")


def decode(export: Export, asked: argparse.Namespace) -> None:
    """The latents of an .npz, and the names if it has any -> images."""
    with refusing(f"{asked.LATENTS}: not readable as latents"):
        with np.load(asked.LATENTS, allow_pickle=False) as file:
            latents = torch.from_numpy(file["latents"]).float()
            names = [*map(str, file["names"] if "names" in file else range(len(latents)))]
        if not (names and latents.shape == (len(names), export.latent_dim) and latents.isfinite().all()):
            raise ValueError(f"{tuple(latents.shape)} where finite numbers (N, {export.latent_dim}) are wanted")
        paths = [PurePosixPath(name) for name in names]
        outside = any(path.is_absolute() or ".." in path.parts or "\0" in str(path) for path in paths)
        if outside or len({*names}) < len(names):
            raise ValueError("some names lead out of the folder, name no file, or are there twice")
        bare = [str(path.with_suffix("")) for path in paths]
    export.draw(latents, bare if len({*bare}) == len(names) else names, asked.out)


def sample(export: Export, asked: argparse.Namespace) -> None:
    """N new images."""
    if asked.N < 1:
        raise Refused(f"sample {asked.N}: expected 1 or more")
    with refusing(f"--seed {asked.seed}"):
        generator = torch.Generator().manual_seed(asked.seed)
    noise = torch.randn(asked.N, export.latent_dim, generator=generator).split(BATCH)
    uniform = torch.rand(asked.N, generator=generator).split(BATCH)
    latents = [export.programs["prior"](*pair)[0] for pair in zip(noise, uniform, strict=True)]
    export.draw(torch.cat(latents), [f"{index:06}" for index in range(asked.N)], asked.out)


def interpolate(export: Export, asked: argparse.Namespace) -> None:
    """From one photo to another in nine steps."""
    latents = torch.lerp(export.latent(asked.A), export.latent(asked.B), torch.linspace(0, 1, STEPS).unsqueeze(1))
    export.draw(latents, [*map(str, range(STEPS))], asked.out, STEPS)


def edit(export: Export, asked: argparse.Namespace) -> None:
    """A photo before and after something is added to its latents, which are counted from 0."""
    before = export.latent(asked.PHOTO)
    after = before.clone()
    for text in asked.latent:
        with refusing(f"--latent {text}: expected such as 3=+1.5, from 0 to {export.latent_dim - 1}"):
            index, change = text.split("=")
            after[0, range(export.latent_dim)[int(index)]] += float(change)
    export.draw(torch.cat([before, after]), ["before", "after"], asked.out)


def anomaly(export: Export, asked: argparse.Namespace) -> None:
    """Photos -> a .csv of how unlike the training images each is."""
    file, flags = io.StringIO(), []
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["name", "negative_elbo", "flagged"])
    for names, images in export.images(asked.PHOTOS):
        scores = negative_elbo(export.programs["encoder"], export.decode, images, *export.known)
        flags += (scores > export.threshold).tolist()
        table.writerows(zip(names, scores.tolist(), flags[-len(names) :], strict=True))
    write_atomic(asked.out, file.getvalue().encode(errors="surrogateescape"))
    share = f"above {export.threshold:.6g} nats, as {100 - export.percentile:g} % of the validation images are"
    print(f"{asked.out}: {sum(flags):,} of {len(flags):,} images flagged, {share}")


COMMANDS: tuple[tuple[Any, str, str, str | None], ...] = (
    (encode, "encoder", "PHOTOS", None),  # what it runs and takes, and where its result goes by default
    (decode, "decoder", "LATENTS", None),
    (sample, "prior decoder", "N", "samples.png"),
    (interpolate, "encoder decoder", "A B", "interpolation.png"),
    (edit, "encoder decoder", "PHOTO", "edited.png"),
    (anomaly, "encoder decoder", "PHOTOS", None),
)


LATENT = "add so much to a latent, counted from 0; can be repeated"


def main(argv: list[str] | None = None) -> int:
    words = "PHOTOS: a folder, a .zip of one, or a photo. What is drawn goes to a folder, or all to one sheet.png."
    parser = argparse.ArgumentParser(prog="python -m tuner.use", description=f"Use a trained model. {words}")
    parser.add_argument("EXPORT", type=Path, help="the export/ of a run")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for work, programs, takes, out in COMMANDS:
        one = commands.add_parser(work.__name__, help=work.__doc__, description=f"{work.__doc__} {words}")
        for name in takes.split():
            one.add_argument(name, type=int if name == "N" else Path)
        one.add_argument(
            "--out", type=Path, default=out, required=not out, metavar="PATH", help=f"default: {out}" if out else None
        )
        one.set_defaults(work=work, programs=programs.split())
    commands.choices["sample"].add_argument("--seed", type=int, default=0, help="another one draws others")
    commands.choices["edit"].add_argument("--latent", action="append", required=True, metavar="3=+1.5", help=LATENT)
    given = sys.argv[1:] if argv is None else argv
    asked = parser.parse_args(given)
    with resumable(command("tuner.use", given)):
        paths = {name: user_path(value) for name, value in vars(asked).items() if isinstance(value, Path)}
        vars(asked).update(paths)
        file = asked.work in (encode, anomaly) or asked.out.suffix == ".png"
        if asked.out.is_dir() if file else asked.out.is_file():
            raise Refused(f"--out {asked.out}: is a {'folder' if file else 'file'}")
        asked.work(Export(asked.EXPORT, asked.programs), asked)
    return 0


if __name__ == "__main__":
    sys.exit(main())
