"""The extractor: good, frozen, repeatable and recognised by its hash."""

import hashlib

import pytest
import torch
import torch.nn.functional as F

from tuner.vae.data import Data, Split, as_floats
from tuner.vae.extractor import FeatureExtractor, load_extractor, to_bytes, train_extractor


@pytest.fixture
def few(digits: Data) -> Data:
    return Data(Split(digits.train.images[:130], digits.train.labels[:130]), digits.validation)


def test_it_reads_more_than_95_percent_of_held_out_digits(extractor, digits):
    assert extractor.accuracy(as_floats(digits.validation.images), digits.validation.labels) > 0.95


def test_accuracy_is_the_share_of_right_classes(extractor, digits):
    images = as_floats(digits.validation.images[:40])
    answers = extractor.classes(extractor.features(images)).argmax(1)
    assert extractor.accuracy(images, answers) == 1
    answers[:10] = (answers[:10] + 1) % 10
    assert extractor.accuracy(images, answers) == 0.75


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
    first = to_bytes(train_extractor(few, seed=1, width=2))
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert to_bytes(train_extractor(few, seed=1, width=2)) == first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert to_bytes(train_extractor(few, seed=2, width=2)) != first


def test_validation_images_do_not_train_it(few, digits):
    other = Data(few.train, digits.train)
    assert to_bytes(train_extractor(few, seed=1, width=2)) == to_bytes(train_extractor(other, seed=1, width=2))


def test_a_deep_extractor_sees_through_three_convolutions_and_the_largest_of_every_four(digits):
    extractor = FeatureExtractor(2, deep=True)
    images = as_floats(digits.validation.images[:3])
    hidden = images
    for layer in (extractor.trunk[0], extractor.trunk[3], extractor.trunk[6]):
        seen = F.relu(layer(hidden))
        count, channels, height, width = seen.shape
        seen = seen[:, :, : height // 2 * 2, : width // 2 * 2]
        hidden = seen.reshape(count, channels, height // 2, 2, width // 2, 2).amax((3, 5))
    assert hidden.shape == (3, 8, 3, 3)
    torch.testing.assert_close(extractor.features(images), F.relu(extractor.trunk[10](hidden.flatten(1))))


@pytest.mark.parametrize(("width", "deep"), [(2, False), (5, False), (3, True)])
def test_a_file_brings_the_extractor_back(tmp_path, digits, width, deep):
    extractor = FeatureExtractor(width, deep)
    content = to_bytes(extractor)
    path = tmp_path / "extractor.safetensors"
    path.write_bytes(content)
    loaded = load_extractor(path, hashlib.sha256(content).hexdigest())
    images = as_floats(digits.validation.images[:5])
    assert (loaded.width, loaded.deep) == (width, deep)
    assert torch.equal(loaded.features(images), extractor.features(images))
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_a_file_with_another_hash_is_refused_by_name(tmp_path):
    path = tmp_path / "extractor.safetensors"
    content = to_bytes(FeatureExtractor(2))
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one bit of one weight
    with pytest.raises(ValueError, match=r"extractor\.safetensors: not the extractor"):
        load_extractor(path, hashlib.sha256(content).hexdigest())
