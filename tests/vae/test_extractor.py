"""Extractors: good, frozen, repeatable and recognised by their hash; and the user's own, checked."""

import hashlib
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tuner.vae.data import Data, Split, as_floats
from tuner.vae.extractor import (
    Classifier,
    FeatureExtractor,
    HaarPackets,
    Program,
    Rotations,
    WaveletPackets,
    draw_untrained,
    fit,
    from_bytes,
    load_extractor,
    to_bytes,
    train_classifier,
    train_rotations,
)
from tuner.vae.shape import ImageShape

GREY = ImageShape(1, 28, 28)
SHAPES = [GREY, ImageShape(3, 32, 32), ImageShape(3, 64, 64), ImageShape(1, 36, 20)]


@pytest.fixture
def few(digits: Data) -> Data:
    return Data(Split(digits.train.images[:130], digits.train.labels[:130]), digits.validation)


def test_it_reads_more_than_95_percent_of_held_out_digits(extractor, digits):
    assert extractor.accuracy(digits.validation) > 0.95


def test_accuracy_is_the_share_of_right_classes(extractor, digits):
    images = digits.validation.images[:40]
    answers = extractor.classes(extractor.features(as_floats(images))).argmax(1)
    assert extractor.accuracy(Split(images, answers)) == 1
    answers[:10] = (answers[:10] + 1) % 10
    assert extractor.accuracy(Split(images, answers)) == 0.75


def test_features_are_the_64_rectified_units_before_the_classes(extractor, digits):
    images = as_floats(digits.validation.images[:3])
    conv1, _, conv2, _, _, linear, _ = extractor.trunk
    hidden = F.relu(conv2(F.relu(conv1(images)))).flatten(1)
    assert extractor.features(images).shape == (3, 64)
    torch.testing.assert_close(extractor.features(images), F.relu(linear(hidden)))


def test_more_images_than_one_batch_give_the_same_features(extractor, digits):
    images = as_floats(digits.train.images)  # 997: two batches, the last one short
    torch.testing.assert_close(extractor.features(images)[501:503], extractor.features(images[501:503]))


def test_it_is_frozen(extractor, digits):
    assert not extractor.training
    assert not any(weight.requires_grad for weight in extractor.parameters())
    assert not extractor.features(as_floats(digits.train.images[:2])).requires_grad


def test_the_same_seed_gives_the_same_extractor_and_leaves_the_global_random_state_alone(few):
    first = to_bytes(train_classifier(few, seed=1, width=2))
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert to_bytes(train_classifier(few, seed=1, width=2)) == first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert to_bytes(train_classifier(few, seed=2, width=2)) != first


def test_validation_images_do_not_train_it(few, digits):
    other = Data(few.train, digits.train)
    assert to_bytes(train_classifier(few, seed=1, width=2)) == to_bytes(train_classifier(other, seed=1, width=2))


def test_a_deep_extractor_sees_through_three_convolutions_and_the_largest_of_every_four(digits):
    extractor = Classifier(GREY, 10, 2, deep=True)
    images = as_floats(digits.validation.images[:3])
    hidden = images
    for layer in (extractor.trunk[0], extractor.trunk[3], extractor.trunk[6]):
        seen = F.relu(layer(hidden))
        count, channels, height, width = seen.shape
        seen = seen[:, :, : height // 2 * 2, : width // 2 * 2]
        hidden = seen.reshape(count, channels, height // 2, 2, width // 2, 2).amax((3, 5))
    assert hidden.shape == (3, 8, 3, 3)
    torch.testing.assert_close(extractor.features(images), F.relu(extractor.trunk[10](hidden.flatten(1))))


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("shape", "channels", "least"),
    [
        (GREY, [2, 4], (7, 3)),
        (ImageShape(3, 32, 32), [2, 4], (8, 4)),
        (ImageShape(3, 64, 64), [2, 4, 8], (8, 4)),
        (ImageShape(1, 128, 128), [2, 4, 8, 8], (8, 4)),
    ],
)
def test_a_classifier_halves_images_until_they_are_small(shape, channels, least, deep):
    extractor = Classifier(shape, 7, 2, deep)
    made = [layer.out_channels for layer in extractor.trunk if isinstance(layer, nn.Conv2d)]
    assert made == channels + ([min(2 * channels[-1], 8)] if deep else [])
    assert next(layer for layer in extractor.trunk if isinstance(layer, nn.Linear)).in_features == (
        made[-1] * least[deep] ** 2
    )
    assert extractor.classes(extractor.features(torch.zeros(3, *shape))).shape == (3, 7)


def striped(shape: ImageShape, count: int, classes: int, seed: int) -> Split:
    """Noisy stripes whose direction is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    rows, columns = torch.meshgrid(torch.arange(shape.height), torch.arange(shape.width), indexing="ij")
    angle = (torch.pi * labels / classes)[:, None, None]
    phase = 6.3 * torch.rand(count, 1, 1, generator=generator)
    stripes = 0.5 + 0.3 * torch.sin(0.8 * (rows * angle.cos() + columns * angle.sin()) + phase)
    images = stripes.unsqueeze(1) + 0.1 * torch.randn(count, *shape, generator=generator)
    return Split(images.clamp(0, 1).mul(255).to(torch.uint8), labels)


@pytest.mark.parametrize(("shape", "count"), [(ImageShape(3, 32, 32), 420), (ImageShape(3, 64, 64), 210)])
def test_seven_classes_in_colour_are_told_apart(shape, count):
    data = Data(striped(shape, count, 7, seed=0), striped(shape, 100, 7, seed=1))
    extractor = train_classifier(data, seed=0, width=4)
    assert extractor.accuracy(data.validation) > 0.9


def test_units_that_die_at_a_high_rate_are_trained_anew_at_a_lower_one():
    data = Data(striped(ImageShape(3, 32, 32), 210, 7, seed=0), striped(ImageShape(3, 32, 32), 100, 7, seed=1))
    torch.manual_seed(0)
    extractor = fit(Classifier(data.shape, 7, 4), data.train, rate=0.3)
    assert extractor.accuracy(data.validation) > 0.8


@pytest.mark.parametrize(("shape", "turns"), [(ImageShape(3, 20, 20), range(4)), (ImageShape(1, 20, 36), (0, 2))])
def test_rotations_are_told_by_the_turns_that_keep_the_shape(shape, turns):
    images = torch.randint(256, (10, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([3, 9, 1, 4, 0, 7])
    rotated, labels = Rotations(shape, 2).lesson(Split(images), index)
    assert labels.tolist() == sorted(labels.tolist())
    assert labels.unique().tolist() == list(range(len(turns)))
    for image, label, number in zip(rotated, labels, index, strict=True):
        assert torch.equal(image, as_floats(images[number]).rot90(list(turns)[label], (1, 2)))


@pytest.mark.slow
def test_rotations_of_digits_are_learned_without_their_labels(digits):
    data = Data(Split(digits.train.images), Split(digits.validation.images))
    extractor = train_rotations(data, seed=0)
    assert extractor.accuracy(data.validation) > 0.9
    few = Data(Split(digits.train.images[:200]), data.validation)
    one, again = (train_rotations(few, seed=0) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["shallow", "deep", "rotations", "untrained", "wavelets"])
def test_a_file_brings_the_extractor_back(tmp_path, shape, kind):
    made: FeatureExtractor = {
        "shallow": lambda: Classifier(shape, 7, 3).eval().requires_grad_(False),
        "deep": lambda: Classifier(shape, 7, 2, deep=True).eval().requires_grad_(False),
        "rotations": lambda: Rotations(shape, 2).eval().requires_grad_(False),
        "untrained": lambda: draw_untrained(shape, seed=1),
        "wavelets": lambda: WaveletPackets(shape),
    }[kind]()
    content = to_bytes(made)
    path = tmp_path / "extractor.safetensors"
    path.write_bytes(content)
    state = torch.get_rng_state()
    loaded = load_extractor(path, hashlib.sha256(content).hexdigest())
    assert torch.equal(torch.get_rng_state(), state)
    images = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    assert (loaded.kind, loaded.shape, loaded.options) == (made.kind, shape, made.options)
    assert torch.equal(loaded.features(images), made.features(images))
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert to_bytes(loaded) == content


def test_a_file_with_another_hash_is_refused_by_name(tmp_path):
    path = tmp_path / "extractor.safetensors"
    content = to_bytes(Classifier(GREY, 10, 2))
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one bit of one weight
    with pytest.raises(ValueError, match=r"extractor\.safetensors: not the extractor"):
        load_extractor(path, hashlib.sha256(content).hexdigest())


def test_the_same_seed_draws_the_same_untrained_networks_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    first, again, other = (to_bytes(draw_untrained(GREY, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_untrained_networks_differ_from_each_other(digits):
    extractor = draw_untrained(GREY, seed=0)
    features = extractor.features(as_floats(digits.train.images[:9]))
    assert features.shape[:2] == (9, 3)
    assert not torch.equal(features[:, 0], features[:, 1])


@pytest.mark.parametrize("shape", [GREY, ImageShape(3, 32, 32), ImageShape(3, 64, 64), ImageShape(1, 24, 60)])
def test_packets_keep_the_energy_of_an_image_and_are_small(shape):
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    packets = WaveletPackets(shape).trunk(images)
    assert packets.shape[1:] == (4 ** (len(shape.maps()) - 1), shape.numbers // 4 ** (len(shape.maps()) - 1))
    torch.testing.assert_close(packets.square().sum((1, 2)), images.square().sum((1, 2, 3)))


def test_a_constant_image_is_in_the_first_packet_alone():
    packets = HaarPackets(2)(torch.full((1, 3, 36, 20), 0.25))
    assert torch.equal(packets[0, 0], torch.full((3 * 9 * 5,), 0.25 * 4))
    assert not packets[0, 1:].any()


def test_a_level_is_sums_and_differences_of_four_neighbours_and_levels_repeat():
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sums = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    across, down = torch.tensor([[1.0, -1.0], [1.0, -1.0]]), torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    filters = torch.stack([sums, across, down, across * down]).unsqueeze(1) / 2
    level = F.conv2d(images, filters, stride=2)
    torch.testing.assert_close(HaarPackets(1)(images), level.flatten(2))
    again = F.conv2d(level.flatten(0, 1).unsqueeze(1), filters, stride=2).unflatten(0, (2, 4))
    torch.testing.assert_close(HaarPackets(2)(images), again.transpose(1, 2).flatten(1, 2).flatten(2))


def test_an_odd_side_repeats_its_last_row_or_column():
    image = torch.randn(1, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    repeated = torch.cat([image, image[:, :, -1:]], 2)
    repeated = torch.cat([repeated, repeated[..., -1:]], 3)
    assert torch.equal(HaarPackets(1)(image), HaarPackets(1)(repeated))


@pytest.mark.parametrize("kind", ["classifier", "untrained", "wavelets"])
def test_a_trunk_can_be_differentiated(extractor, kind):
    made = {"classifier": extractor, "untrained": draw_untrained(GREY, 0), "wavelets": WaveletPackets(GREY)}
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)).requires_grad_()
    made[kind].trunk(images).square().sum().backward()
    assert images.grad.abs().sum() > 0


class _Slopes(nn.Module):
    """A user's network; what it gives is told by `fault`."""

    def __init__(self, fault: str = ""):
        super().__init__()
        self.fault, self.linear = fault, nn.Linear(3 * 32 * 32, 8)

    def forward(self, images):
        features = self.linear(images.flatten(1))
        match self.fault:
            case "pairs":
                return features, features
            case "maps":
                return features.unflatten(1, (2, 2, 2))
            case "whole":
                return features.long()
            case "log":
                return (features - 100).log()
            case "mean":
                return features.mean(0, keepdim=True)
        return features


def program(network: nn.Module, free: bool = True) -> bytes:
    shapes = ({0: torch.export.Dim("batch")},) if free else None
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(network, (torch.zeros(4, 3, 32, 32),), dynamic_shapes=shapes), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def good() -> tuple[nn.Module, bytes]:
    network = _Slopes().requires_grad_(False)
    return network, program(network)


@pytest.fixture(scope="module")
def colour() -> torch.Tensor:
    return torch.rand(130, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_program_of_ones_own_gives_its_features_and_goes_where_it_is_needed(tmp_path, good, colour):
    network, content = good
    path = tmp_path / "features.pt2"
    path.write_bytes(content)
    loaded = load_extractor(path, hashlib.sha256(content).hexdigest())
    assert isinstance(loaded, Program)
    loaded.require_fit(colour)
    for found in (loaded, from_bytes(to_bytes(loaded)), pickle.loads(pickle.dumps(loaded))):
        torch.testing.assert_close(found.features(colour), network(colour))
        assert to_bytes(found) == content


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("pairs", "gives tuple for 1 images; expected floats (images, features)"),
        ("maps", "gives [1, 2, 2, 2] for 1 images; expected floats (images, features)"),
        ("whole", "gives [1, 8] for 1 images; expected floats (images, features)"),
        ("log", "gives features that are not finite"),
        ("mean", "gives 1 rows of features for 2 images"),
    ],
)
def test_a_program_whose_features_can_not_be_compared_is_refused_in_a_line(colour, fault, said):
    with pytest.raises(ValueError, match=r".+") as error:
        Program(program(_Slopes(fault))).require_fit(colour)
    assert str(error.value) == said


def test_a_program_for_other_images_or_for_one_batch_size_is_refused_in_a_line(good, colour):
    for made, images in ((good[1], colour[:, :1]), (program(good[0], free=False), colour)):
        with pytest.raises(ValueError, match=r"^takes no images 1x[13]x32x32: .+$"):
            Program(made).require_fit(images)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"PK"], ids=repr)
def test_a_file_that_is_no_program_is_refused_in_a_line(tmp_path, content, capfd):
    path = tmp_path / "features.pt2"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"features\.pt2: not readable as an extractor: .+$"):
        load_extractor(path, hashlib.sha256(content).hexdigest())
    assert capfd.readouterr().err == ""
