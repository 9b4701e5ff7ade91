"""The judge: good, frozen, repeatable and recognised by its hash."""

import hashlib

import pytest
import torch
import torch.nn.functional as F

from tuner.vae.data import Data, Split, pixels
from tuner.vae.judge import Judge, load_judge, to_bytes, train_judge


@pytest.fixture
def few(digits: Data) -> Data:
    return Data(Split(digits.train.images[:130], digits.train.labels[:130]), digits.validation)


def test_it_reads_more_than_95_percent_of_held_out_digits(judge, digits):
    assert judge.accuracy(pixels(digits.validation.images), digits.validation.labels) > 0.95


def test_accuracy_is_the_share_of_right_classes(judge, digits):
    images = pixels(digits.validation.images[:40])
    answers = judge.classes(judge.features(images)).argmax(1)
    assert judge.accuracy(images, answers) == 1
    answers[:10] = (answers[:10] + 1) % 10
    assert judge.accuracy(images, answers) == 0.75


def test_features_are_the_64_rectified_units_before_the_classes(judge, digits):
    images = pixels(digits.validation.images[:3])
    conv1, _, conv2, _, _, linear, _ = judge.trunk
    hidden = F.relu(conv2(F.relu(conv1(images)))).flatten(1)
    assert judge.features(images).shape == (3, 64)
    torch.testing.assert_close(judge.features(images), F.relu(linear(hidden)))


def test_more_images_than_one_batch_give_the_same_features(judge, digits):
    images = pixels(digits.train.images)  # 997: two batches, the last one short
    torch.testing.assert_close(judge.features(images)[501:503], judge.features(images[501:503]))


def test_it_is_frozen(judge, digits):
    assert not judge.training
    assert not any(weight.requires_grad for weight in judge.parameters())
    assert not judge.features(pixels(digits.train.images[:2])).requires_grad


def test_the_same_seed_gives_the_same_judge_and_leaves_the_global_random_state_alone(few):
    first = to_bytes(train_judge(few, seed=1, width=2))
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert to_bytes(train_judge(few, seed=1, width=2)) == first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert to_bytes(train_judge(few, seed=2, width=2)) != first


def test_validation_images_do_not_train_it(few, digits):
    other = Data(few.train, digits.train)
    assert to_bytes(train_judge(few, seed=1, width=2)) == to_bytes(train_judge(other, seed=1, width=2))


def test_a_deep_judge_sees_through_three_convolutions_and_the_largest_of_every_four(digits):
    judge = Judge(2, deep=True)
    images = pixels(digits.validation.images[:3])
    hidden = images
    for layer in (judge.trunk[0], judge.trunk[3], judge.trunk[6]):
        seen = F.relu(layer(hidden))
        count, channels, height, width = seen.shape
        seen = seen[:, :, : height // 2 * 2, : width // 2 * 2]
        hidden = seen.reshape(count, channels, height // 2, 2, width // 2, 2).amax((3, 5))
    assert hidden.shape == (3, 8, 3, 3)
    torch.testing.assert_close(judge.features(images), F.relu(judge.trunk[10](hidden.flatten(1))))


@pytest.mark.parametrize(("width", "deep"), [(2, False), (5, False), (3, True)])
def test_a_file_brings_the_judge_back(tmp_path, digits, width, deep):
    judge = Judge(width, deep)
    content = to_bytes(judge)
    path = tmp_path / "judge.safetensors"
    path.write_bytes(content)
    loaded = load_judge(path, hashlib.sha256(content).hexdigest())
    images = pixels(digits.validation.images[:5])
    assert (loaded.width, loaded.deep) == (width, deep)
    assert torch.equal(loaded.features(images), judge.features(images))
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_a_file_with_another_hash_is_refused_by_name(tmp_path):
    path = tmp_path / "judge.safetensors"
    content = to_bytes(Judge(2))
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one bit of one weight
    with pytest.raises(ValueError, match=r"judge\.safetensors: not the judge"):
        load_judge(path, hashlib.sha256(content).hexdigest())
