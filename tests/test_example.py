"""The worked example of a user's own model, from the search to what runs without this package."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from own_models import COLOUR, DIGITS, left_out, spec_of, written
from processes import processes_of
from runs import in_the_midst_of_the_retrain

from tuner import spec as specs
from tuner.own_model import check, load
from tuner.study import BASELINE
from tuner.terminal import final_words
from tuner.vae import codec
from tuner.vae.shape import ImageShape

ROOT = Path(__file__).parents[1]
EXAMPLE = "examples.residual_vae:build"


def test_the_example_takes_images_of_any_shape_and_learns_them(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    for shape in (DIGITS, COLOUR, ImageShape(3, 64, 48)):
        spec, own = spec_of(EXAMPLE, space={"model.depth": {"type": "int", "low": 0, "high": 3}})
        check(spec, shape, own)


@pytest.mark.slow
def test_the_example_leaves_as_every_kind_of_file(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    written(EXAMPLE, tmp_path / "export", COLOUR)
    assert left_out(tmp_path / "export") == {}


ALONE = """
import sys
import numpy as np
import onnxruntime

encoder, decoder, prior = (
    onnxruntime.InferenceSession(f"export/onnx/{name}.onnx") for name in ("encoder", "decoder", "prior")
)
latents = encoder.run(["mean"], {"images": np.load("images.npy")})[0]
decoded = decoder.run(["images"], {"latents": latents})[0]
noise = np.random.default_rng(0).standard_normal((5, latents.shape[1]), np.float32)
drawn = prior.run(None, {"noise": noise, "uniform": np.random.default_rng(1).random(5, np.float32)})[0]
np.savez("result.npz", latents=latents, decoded=decoded, samples=decoder.run(None, {"latents": drawn})[0])
assert not {"tuner", "torch", "examples"} & set(sys.modules)
"""


@pytest.mark.long
def test_the_example_is_searched_killed_in_the_retrain_gone_on_with_exported_and_used_by_onnxruntime_alone(
    begin_run, small_flags, monkeypatch, tmp_path
):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    own, named = load(EXAMPLE)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    points = "[{latent_dim: 16, learning_rate: 0.004, kl_weight: 0.02, model.depth: 1}]"
    flags = ["--trials=2", "--set=budget.grace_epochs=4", "--set=space.model.depth={type: int, low: 1, high: 2}"]
    words = ["--model", EXAMPLE, "--run", "run", *small_flags, *flags, f"--set=points_to_evaluate={points}"]
    words += ["--set=fixed.model.width=32", "--set=retrain.epochs=6", "--set=retrain.finalists=1"]
    run = begin_run(tmp_path / "run", *words, own=named)
    again, mark = [sys.executable, "-m", "tuner.search", *words], uuid.uuid4().hex
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TUNER_TEST": mark}
    driver = subprocess.Popen(again, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 500
        while not in_the_midst_of_the_retrain(run):
            assert driver.poll() is None, driver.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        driver.kill()
        driver.communicate()
    finally:
        driver.kill()
        for pid in processes_of(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert not run.export.exists()
    assert run.summary().best.trial != BASELINE, "the own model draws better than the classic one"

    forgotten = subprocess.run(
        [*again[:3], "--run", "run"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert forgotten.returncode == 2
    assert forgotten.stderr == f"error: the model is a user's own: name its code with --model {EXAMPLE}\n"
    command = [*again[:3], "--run", "run", "--model", EXAMPLE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "without" not in done.stderr

    info = json.loads((run.export / "config.json").read_text())
    assert info["parameters"]["model"] == "own"
    assert info["parameters"]["model.depth"] in (1, 2)
    assert info["lineage"]["own_model"]["function"] == EXAMPLE
    assert info["left_out"] == {}
    spec, summary = specs.load(run.spec), run.summary()
    assert summary.test.retrained.frechet_distance < summary.test.best.frechet_distance
    assert "decoder.onnx, decoder.pt2, encoder.onnx, encoder.pt2" in "\n".join(map(str, final_words(run, spec)))
    shown = subprocess.run(
        [sys.executable, "-m", "tuner.report", "run", "--model", EXAMPLE], cwd=tmp_path, env=environment, check=True
    )
    assert shown.returncode == 0

    images = torch.rand(3, *DIGITS, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "images.npy", images.numpy())
    (tmp_path / "export").symlink_to(run.export)
    subprocess.run([sys.executable, "-I", "-c", ALONE], cwd=tmp_path, check=True)
    found = np.load(tmp_path / "result.npz")
    loaded = codec.load(run.export, own)
    assert np.abs(found["latents"] - loaded.encode(images).numpy()).max() < 1e-4
    assert np.abs(found["decoded"] - loaded.decode(found["latents"]).numpy()).max() < 1e-5
    assert found["samples"].shape == (5, 1, 28, 28)
