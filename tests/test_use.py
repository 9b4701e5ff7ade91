"""Photos are encoded, decoded, edited and scored as the exported model would; what is wrong is told in one line."""

import csv
import json
import math
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tuner.export_files import anomalies, write_files
from tuner.run import RunFiles
from tuner.use import Export, main
from tuner.vae import codec
from tuner.vae.data import Split, as_floats
from tuner.vae.fitted import BATCH, FittedModel
from tuner.vae.image_grid import sheet
from tuner.vae.model import Builder
from tuner.vae.parameters import Parameters
from tuner.vae.prior import standard_normal
from tuner.vae.shape import ImageShape


@pytest.fixture(scope="module")
def export(finished_run: RunFiles) -> Path:
    return finished_run.export


@pytest.fixture(scope="module")
def loaded(export: Path) -> codec.Codec:
    return codec.load(export)


@pytest.fixture(scope="module")
def digits(workspace: Any) -> torch.Tensor:
    """Validation images (N, 1, 28, 28) uint8."""
    images: torch.Tensor = workspace.data.validation.images
    return images


@pytest.fixture(scope="module")
def photos(digits: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five of them as files, two in a folder below."""
    place = tmp_path_factory.mktemp("photos")
    (place / "more").mkdir()
    for name, image in zip(("a.png", "b.png", "c.bmp", "more/a.png", "more/d.png"), digits[:, 0], strict=False):
        Image.fromarray(image.numpy()).save(place / name)
    return place


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def use(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def as_bytes(images: torch.Tensor) -> np.ndarray:
    """(N, 1, H, W) in [0, 1] -> (N, H, W)."""
    return (255 * images[:, 0]).round().numpy().astype(int)


def test_photos_are_encoded_as_the_model_encodes_them(export, loaded, digits, photos):
    use(export, "encode", photos, "--out", "latents.npz")
    found = np.load("latents.npz")
    assert found["names"].tolist() == ["a.png", "b.png", "c.bmp", "more/a.png", "more/d.png"]
    mean, log_variance = loaded.fitted.model.encode(as_floats(digits[:5]))
    assert np.abs(found["latents"] - mean.numpy()).max() < 1e-4
    assert np.abs(found["log_variances"] - log_variance.numpy()).max() < 1e-4


def test_latents_are_decoded_under_the_names_of_their_photos(export, loaded, digits, photos):
    use(export, "encode", photos, "--out", "latents.npz")
    use(export, "decode", "latents.npz", "--out", "there")
    names = ("a.png", "b.png", "c.png", "more/a.png", "more/d.png")
    assert {str(path.relative_to("there")) for path in Path("there").rglob("*.*")} == set(names)
    expected = as_bytes(loaded.decode(loaded.encode(digits[:5])))
    assert (
        max(np.abs(picture(Path("there", name)) - want).max() for name, want in zip(names, expected, strict=True)) <= 1
    )


def test_photos_that_differ_in_their_endings_alone_stay_apart(export, loaded):
    latents = np.zeros((2, loaded.fitted.model.latent_dim))
    np.savez("mine.npz", latents=latents, names=["a.png", "a.jpg"])
    use(export, "decode", "mine.npz", "--out", "there")
    assert {path.name for path in Path("there").iterdir()} == {"a.png.png", "a.jpg.png"}


def test_latents_of_ones_own_need_no_names(export, loaded):
    latents = np.random.default_rng(0).standard_normal((BATCH + 2, loaded.fitted.model.latent_dim))
    np.savez("mine.npz", latents=latents)
    use(export, "decode", "mine.npz", "--out", "there")
    expected = as_bytes(loaded.decode(latents))
    assert len(list(Path("there").iterdir())) == BATCH + 2
    for index in (0, 7, BATCH + 1):
        assert np.abs(picture(Path("there", f"{index}.png")) - expected[index]).max() <= 1


def test_a_zip_is_read_as_its_folder_is_and_one_photo_alone(export, photos):
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for path in photos.rglob("*.*"):
            archive.write(path, path.relative_to(photos))
    for place in (photos, "photos.zip", photos / "more" / "a.png"):
        use(export, "encode", place, "--out", f"{Path(place).stem}.npz")
    folder, archived, one = (np.load(f"{name}.npz") for name in (photos.stem, "photos", "a"))
    assert folder["names"].tolist() == archived["names"].tolist()
    assert (folder["latents"] == archived["latents"]).all()
    assert one["names"].tolist() == ["a.png"]
    assert np.abs(one["latents"] - folder["latents"][3]).max() < 1e-5


def test_a_large_folder_is_read_in_parts(export, photos):
    with zipfile.ZipFile("many.zip", "w") as archive:
        for index in range(2 * BATCH + 1):
            archive.write(photos / "a.png", f"{index:03}.png")
    parts = list(Export(export, ["encoder"]).images(Path("many.zip")))
    assert [len(images) for _, images in parts] == [BATCH, BATCH, 1]
    assert [name for names, _ in parts for name in names] == [f"{index:03}.png" for index in range(2 * BATCH + 1)]


def test_samples_are_the_codecs_and_follow_the_seed(export, loaded):
    use(export, "sample", BATCH + 5, "--out", "drawn")
    expected = as_bytes(loaded.sample(BATCH + 5))
    found = [picture(path) for path in sorted(Path("drawn").iterdir())]
    assert np.abs(np.stack(found) - expected).max() <= 1
    use(export, "sample", 3, "--seed", 1, "--out", "other.png")
    assert np.abs(picture(Path("other.png")) - sheet_of(loaded.sample(3, seed=1), 3)).max() <= 1


def sheet_of(images: torch.Tensor, columns: int) -> np.ndarray:
    Path("expected.png").write_bytes(sheet(images, columns, ink=True))
    return picture(Path("expected.png"))


def test_an_interpolation_goes_from_one_reconstruction_to_the_other(export, loaded, digits, photos):
    use(export, "interpolate", photos / "a.png", photos / "b.png")
    first, last = loaded.encode(digits[:2])
    steps = torch.stack([first + share * (last - first) for share in torch.linspace(0, 1, 9)])
    assert np.abs(picture(Path("interpolation.png")) - sheet_of(loaded.decode(steps), 9)).max() <= 1


def test_an_edit_moves_the_named_latents_alone(export, loaded, digits, photos):
    use(export, "edit", photos / "b.png", "--latent", "3=+1.5", "--latent", "0=-2", "--out", "edited")
    latents = loaded.encode(digits[1:2])
    assert np.abs(picture(Path("edited/before.png")) - as_bytes(loaded.decode(latents))[0]).max() <= 1
    latents[0, 3] += 1.5
    latents[0, 0] -= 2
    assert np.abs(picture(Path("edited/after.png")) - as_bytes(loaded.decode(latents))[0]).max() <= 1


# Anomalies


def rows_of(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_score_is_the_negative_elbo_and_the_threshold_a_percentile_of_validation(
    export, loaded, digits, finished_run, capsys
):
    Path("seen").mkdir()
    for index, image in enumerate(digits[:, 0].numpy()):
        Image.fromarray(image).save(f"seen/{index:03}.png")
    use(export, "anomaly", "seen", "--out", "scores.csv")
    found, said = rows_of("scores.csv"), json.loads((export / "config.json").read_text())["anomaly"]
    scores = np.array([float(row["negative_elbo"]) for row in found])
    assert said["percentile"] == 99
    assert said["threshold"] == pytest.approx(np.percentile(scores, 99), abs=1e-2)
    flagged = [row["name"] for row in found if row["flagged"] == "True"]
    assert flagged == [row["name"] for row, score in zip(found, scores, strict=True) if score > said["threshold"]]
    assert len(flagged) == math.ceil(0.01 * (len(digits) - 1))
    assert f"{len(flagged)} of {len(digits)} images flagged" in capsys.readouterr().out

    # Its mean is what the model was scored by, with another draw of noise.
    validation = finished_run.summary().validation.retrained
    assert scores.mean() == pytest.approx(validation.calibrated_nll, abs=validation.rate / 2)

    images = as_floats(digits[:20]).double()
    mean, log_variance = loaded.fitted.model.encode(images.float())
    noise = torch.randn(mean.shape[1], generator=torch.Generator().manual_seed(0))
    error = torch.sigmoid(loaded.fitted.model.decode(mean + (log_variance / 2).exp() * noise)).double() - images
    normal = torch.distributions.Normal(0, math.sqrt(said["variance"]))
    prior = torch.distributions.Normal(torch.zeros_like(mean), 1)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, prior).sum(1) - normal.log_prob(error).flatten(1).sum(1)
    assert np.abs(scores[:20] - expected.detach().numpy()).max() < 0.01


def test_what_is_no_digit_is_flagged(export, digits):
    Path("odd").mkdir()
    Image.fromarray(255 - digits[0, 0].numpy()).save("odd/inverted.png")
    Image.fromarray(np.random.default_rng(0).integers(256, size=(28, 28), dtype=np.uint8)).save("odd/noise.png")
    Image.fromarray(digits[1, 0].numpy()).save("odd/digit.png")
    use(export, "anomaly", "odd", "--out", "scores.csv")
    assert {row["name"]: row["flagged"] for row in rows_of("scores.csv")} == {
        "digit.png": "False",
        "inverted.png": "True",
        "noise.png": "True",
    }


# Other models

LARGE = ImageShape(3, 32, 48)


@pytest.fixture(scope="module")
def inverted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of an untrained plain autoencoder with a Bernoulli decoder, of inverted photos that are no squares."""
    parameters = Parameters(model="autoencoder", likelihood="bernoulli", latent_dim=3, width=2)
    fitted = FittedModel(Builder(LARGE)(parameters, 0), parameters, standard_normal(3), 0.5, scores={"mse": 0.1})
    place = tmp_path_factory.mktemp("inverted")
    images = torch.randint(256, (7, *LARGE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    info = {
        "images": {"shape": LARGE, "ink": True, "invert": True},
        "parameters": parameters.model_dump(),
        "temperature": 0.5,
        "anomaly": anomalies(fitted, Split(images)),
    }
    write_files(fitted, info, place, as_floats(images))
    return place


@pytest.mark.slow
def test_photos_are_inverted_cropped_and_scaled_as_training_images_were(inverted):
    red = Image.new("RGB", (480, 400), "blue")
    red.paste("red", (0, 40, 480, 360))  # the middle, of the form of the images
    red.save("photo.png")
    ((_, images),) = Export(inverted, ["encoder"]).images(Path("photo.png"))
    assert images.shape == (1, *LARGE)
    assert (images[0, :, 2:-2, 2:-2] - torch.tensor([0, 1, 1])[:, None, None]).abs().max() < 0.02
    use(inverted, "encode", "photo.png", "--out", "latents.npz")
    loaded, found = codec.load(inverted), np.load("latents.npz")
    assert set(found.files) == {"names", "latents"}
    assert np.abs(found["latents"] - loaded.encode(images).numpy()).max() < 1e-5
    use(inverted, "decode", "latents.npz", "--out", "there")
    decoded = 255 * (1 - loaded.decode(found["latents"])[0].permute(1, 2, 0).numpy())
    assert np.abs(picture(Path("there/photo.png")) - decoded).max() <= 1


@pytest.mark.slow
def test_of_a_plain_autoencoder_the_score_is_the_likelihood_alone(inverted):
    Image.fromarray(np.random.default_rng(0).integers(256, size=(32, 48, 3), dtype=np.uint8)).save("noise.png")
    use(inverted, "anomaly", "noise.png", "--out", "scores.csv")
    ((_, images),) = Export(inverted, ["encoder"]).images(Path("noise.png"))
    model = codec.load(inverted).fitted.model
    predicted = torch.sigmoid(model.decode(model.encode(images)[0]))
    expected = torch.nn.functional.binary_cross_entropy(predicted, images, reduction="sum").item()
    assert float(rows_of("scores.csv")[0]["negative_elbo"]) == pytest.approx(expected, rel=1e-5)


# What is wrong


def test_damaged_photos_are_left_out_and_told_in_one_line(export, photos, capfd):
    shutil.copytree(photos, "mixed")
    Path("mixed/b.png").write_bytes(b"no image")
    use(export, "encode", "mixed", "--out", "latents.npz")
    assert np.load("latents.npz")["names"].tolist() == ["a.png", "c.bmp", "more/a.png", "more/d.png"]
    assert "mixed: 1 of 5 images can't be read and are left out: b.png (no image)\n" in capfd.readouterr().err


def refused(capfd: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a command ends with, having written nothing."""
    before = sorted(Path().rglob("*"))
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 2
    assert sorted(Path().rglob("*")) == before
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["encode", "missing", "--out", "x.npz"], "missing: No such file or directory"),
        (["encode", "empty", "--out", "x.npz"], "empty: no images in it"),
        (["encode", "notes.txt", "--out", "x.npz"], "notes.txt: 1 of 1 images can't be read: notes.txt (no image)"),
        (["encode", "photos", "--out", "empty"], "--out empty: is a folder"),
        (["anomaly", "notes.txt", "--out", "x.csv"], "notes.txt: 1 of 1 images can't be read"),
        (["decode", "missing.npz", "--out", "x"], "missing.npz: not readable as latents: "),
        (["decode", "notes.txt", "--out", "x"], "notes.txt: not readable as latents: "),
        (["decode", "names.npz", "--out", "x"], "names.npz: not readable as latents: "),
        (["decode", "short.npz", "--out", "x"], "short.npz: not readable as latents: (2, 1) where finite numbers (N, "),
        (["decode", "nan.npz", "--out", "x"], "nan.npz: not readable as latents: "),
        (["decode", "none.npz", "--out", "x"], "none.npz: not readable as latents: "),
        (["decode", "twice.npz", "--out", "x"], "twice.npz: not readable as latents: "),
        (["decode", "outside.npz", "--out", "x"], "outside.npz: not readable as latents: some names lead out of"),
        (["decode", "rooted.npz", "--out", "x"], "rooted.npz: not readable as latents: some names lead out of"),
        (["decode", "twice-rooted.npz", "--out", "x"], "twice-rooted.npz: not readable as latents: some names lead"),
        (["decode", "nul.npz", "--out", "x"], "nul.npz: not readable as latents: some names lead out of"),
        (["decode", "good.npz", "--out", "notes.txt"], "--out notes.txt: is a file"),
        (["sample", "0"], "sample 0: expected 1 or more"),
        (["sample", "1", "--seed", "9" * 20], "--seed 99999999999999999999: "),
        (["interpolate", "photos", "photos"], "photos: one photo is wanted here"),
        (
            ["edit", "photos/a.png", "--latent", "999=1"],
            "--latent 999=1: expected such as 3=+1.5, from 0 to ",
        ),
        (["edit", "photos/a.png", "--latent", "3+1"], "--latent 3+1: expected such as 3=+1.5, from 0 to "),
        (["edit", "photos/a.png", "--latent", "a=1"], "--latent a=1: expected such as 3=+1.5, from 0 to "),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_bad_input_is_told_in_one_line_before_anything_is_written(export, loaded, photos, capfd, words, told):
    size = loaded.fitted.model.latent_dim
    shutil.copytree(photos, "photos")
    Path("empty").mkdir()
    Path("notes.txt").write_text("mine")
    np.savez("names.npz", names=["a"])
    np.savez("short.npz", latents=np.zeros((2, 1)))
    np.savez("nan.npz", latents=np.full((2, size), np.nan))
    np.savez("none.npz", latents=np.zeros((0, size)))
    np.savez("good.npz", latents=np.zeros((1, size)))
    np.savez("twice.npz", latents=np.zeros((2, size)), names=["a", "a"])
    for name, place in {
        "outside": "a/../../b",
        "rooted": "/b",
        "twice-rooted": f"/{Path.cwd()}/b",
        "nul": "a\0b",
    }.items():
        np.savez(f"{name}.npz", latents=np.zeros((1, size)), names=[place])
    assert f"error: {told}" in refused(capfd, export, *words)


@pytest.mark.parametrize("missing", ["config.json", "onnx/encoder.onnx"])
def test_a_missing_or_damaged_file_of_the_export_is_named(run_copy, photos, capfd, missing):
    (run_copy.export / missing).write_bytes(b"{}")
    assert f"{missing}: not readable as part of an export: " in refused(
        capfd, run_copy.export, "encode", photos, "--out", "x.npz"
    )
    (run_copy.export / missing).unlink()
    assert f"{missing}: not readable as part of an export: " in refused(
        capfd, run_copy.export, "encode", photos, "--out", "x.npz"
    )


def test_why_a_program_of_a_users_own_model_is_missing_is_told(run_copy, photos, capfd):
    path, reason = run_copy.export / "config.json", "RuntimeError: a branch depends on the values of a tensor"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"left_out": {"decoder.onnx": reason}}))
    assert f"decoder.onnx: not readable as part of an export: {reason}" in refused(capfd, run_copy.export, "sample", 1)
    use(run_copy.export, "encode", photos, "--out", "latents.npz")
