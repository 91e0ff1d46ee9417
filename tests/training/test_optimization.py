import copy
import math

import pytest
import torch
from torch import nn

from attncap import Captioner
from attncap.config import ModelConfig
from attncap.data.vocabulary import Vocabulary
from attncap.errors import CallError
from attncap.models.losses import caption_losses
from attncap.training.config import EncoderConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from attncap.training.optimization import Schedule, clip_gradients, make_optimizer, update_average

SMALL = ModelConfig(
    encoder="resnet18",
    encoder_layer="layer2",
    image_size=32,
    attention_size=4,
    embedding_size=4,
    hidden_size=4,
    dropout=0.0,
)


@pytest.fixture(scope="module")
def model():
    return Captioner(SMALL, Vocabulary([*Vocabulary.SPECIALS, "a", "b"]))


@pytest.mark.parametrize("first, count", [("none", 0), ("layer2", 15), ("layer2.1", 6)])
def test_two_groups(model, first, count):
    config = TrainConfig(
        encoder=EncoderConfig(fine_tune_from=first, learning_rate=0.2), optimizer=OptimizerConfig(learning_rate=0.3)
    )
    optimizer = make_optimizer(config, model)
    decoder, encoder = optimizer.param_groups
    assert list(map(id, decoder["params"])) == list(map(id, model.decoder.parameters()))
    assert len(encoder["params"]) == count and all(p.requires_grad for p in encoder["params"])
    assert (decoder["peak"], encoder["peak"]) == (decoder["lr"], encoder["lr"]) == (0.3, 0.2)


def test_no_such_layer(model):
    with pytest.raises(CallError, match='fine_tune_from="layer9": no such layer'):
        make_optimizer(TrainConfig(encoder=EncoderConfig(fine_tune_from="layer9")), model)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_two_steps_by_hand(model, kind):
    """Adam with its usual constants; weight decay in the gradient (adam) or beside it (adamw)."""
    config = TrainConfig(optimizer=OptimizerConfig(name=kind, learning_rate=0.01, weight_decay=0.1))
    model = copy.deepcopy(model)
    optimizer = make_optimizer(config, model)
    weight = model.decoder.attention.score_weight
    expected, m, v = weight.detach().double(), 0, 0
    key = model.decoder.attention.key.weight.detach().clone()
    for step, gradient in enumerate(([0.5, -1.0, 2.0, 0.1], [-0.5, -2.0, 1.0, 0.3]), start=1):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        gradient = torch.tensor(gradient, dtype=torch.float64)
        if kind == "adam":
            gradient = gradient + 0.1 * expected
        else:
            expected = expected - 0.01 * 0.1 * expected
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        expected = expected - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert key.equal(model.decoder.attention.key.weight)  # no gradient: no step, no decay


def test_parameters_that_are_frozen_at_first_are_in_the_optimizer(model):
    """An encoder that is trained from the second epoch on: its weights do not change before, and an optimizer state
    saved before loads after."""
    config = TrainConfig(encoder=EncoderConfig(fine_tune_from="layer2", fine_tune_after=1))
    model = copy.deepcopy(model)
    optimizer = make_optimizer(config, model)
    model.encoder.fine_tune("none")
    before = copy.deepcopy(model.encoder.state_dict())
    images, tokens = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8), torch.tensor([[1, 4, 2], [1, 5, 2]])

    def step(model, optimizer):
        optimizer.zero_grad(set_to_none=True)
        caption_losses(model.decoder, model.encoder(images), tokens[:, :-1], tokens[:, 1:]).words.backward()
        optimizer.step()

    step(model, optimizer)
    assert all(value.equal(before[name]) for name, value in model.encoder.state_dict().items())
    other = copy.deepcopy(model)
    resumed = make_optimizer(config, other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.encoder.fine_tune("layer2")
    for one, its in ((model, optimizer), (other, resumed)):
        step(one, its)
    after = model.encoder.state_dict()
    assert all(value.equal(after[name]) for name, value in other.encoder.state_dict().items())
    moved = {name.split(".")[1] for name, value in after.items() if not value.equal(before[name])}
    assert moved == {"layer2"}


def test_cosine_after_a_warm_up():
    schedule = Schedule(ScheduleConfig(warmup=0.1), epochs=10, steps_per_epoch=20)  # 20 steps up, 180 down
    rates = [schedule.factor(step) for step in range(200)]
    assert rates[:21] == pytest.approx([(step + 1) / 21 for step in range(21)])
    assert rates[20:] == pytest.approx([(1 + math.cos(math.pi * step / 180)) / 2 for step in range(180)])
    assert rates[110] == pytest.approx(0.5) and 0 < rates[199] < 1e-4
    without = Schedule(ScheduleConfig(warmup=0.0), epochs=10, steps_per_epoch=20)
    assert without.factor(0) == 1 and without.factor(100) == pytest.approx(0.5)


def test_constant():
    config = ScheduleConfig(name="constant", warmup=0.05, plateau_patience=1)
    schedule = Schedule(config, epochs=10, steps_per_epoch=20)
    rates = [schedule.factor(step) for step in (0, 4, 9, 10, 150, 199)]
    assert rates == pytest.approx([1 / 11, 5 / 11, 10 / 11, 1, 1, 1])
    for rating in (3.0, 1.0, 2.0):
        schedule.epoch_ended(rating)
    assert schedule.factor(60) == 1 and not schedule.should_stop


def ratings(seed: int) -> list[float]:
    """60 epochs with long stretches without improvement, and with equal ratings."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 6, (60,), generator=generator)
    return [1 + int(n) + (epoch // 25) * 2 for epoch, n in enumerate(noise.tolist())]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("patience", [1, 3, 8])
def test_plateau_is_that_of_torch(seed, patience):
    """`ReduceLROnPlateau` waits one epoch longer than its patience."""
    config = ScheduleConfig(name="plateau", warmup=0.0, plateau_patience=patience, plateau_factor=0.7)
    schedule = Schedule(config, epochs=60, steps_per_epoch=3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.7, patience=patience - 1, threshold=0.0, eps=0.0
    )
    for epoch, rating in enumerate(ratings(seed)):
        assert schedule.factor(3 * epoch) == schedule.factor(3 * epoch + 2) == optimizer.param_groups[0]["lr"]
        schedule.epoch_ended(float(rating))
        plateau.step(float(rating))
    assert schedule.factor(179) < 1


@pytest.mark.parametrize("seed", range(10))
def test_plateau_and_early_stopping_are_those_of_the_tutorial(seed):
    """Its train.py decides before each epoch whether to stop (20 epochs without gain), and to lower the rates."""
    config = ScheduleConfig(name="plateau", warmup=0.0, plateau_patience=8, plateau_factor=0.8, patience=20)
    schedule = Schedule(config, epochs=60, steps_per_epoch=1)
    best, since, rate, stopped = 0.0, 0, 1.0, False
    for epoch, rating in enumerate(ratings(seed)):
        stopped = since == 20
        assert schedule.should_stop == stopped
        if stopped:
            break
        if since > 0 and since % 8 == 0:
            rate *= 0.8
        assert schedule.factor(epoch) == pytest.approx(rate, rel=1e-12)
        since = 0 if rating > best else since + 1
        best = max(rating, best)
        schedule.epoch_ended(float(rating))
    assert seed != 0 or stopped


def test_plateau_by_hand():
    """Lowered before the 10th and the 18th epoch, ended after the 21st."""
    schedule = Schedule(ScheduleConfig(name="plateau", warmup=0.0, patience=20), epochs=120, steps_per_epoch=1)
    rates = []
    for epoch in range(120):
        rates.append(schedule.factor(epoch))
        schedule.epoch_ended([1.0, 0.5])
        if schedule.should_stop:
            break
    assert rates == pytest.approx([1.0] * 9 + [0.8] * 8 + [0.64] * 4)


def test_ratings_of_several_metrics():
    schedule = Schedule(ScheduleConfig(patience=2), epochs=10, steps_per_epoch=1)
    for rating, without in (([0.0, 0.1], 0), ([0.0, 0.2], 0), ([0.0, 0.2], 1), ([0.1, 0.0], 0), ([0.0, 0.9], 1)):
        schedule.epoch_ended(rating)
        assert schedule.epochs_without_gain == without and not schedule.should_stop
    assert schedule.best == [0.1, 0.0]
    schedule.epoch_ended([0.1, 0.0])
    assert schedule.should_stop


def test_a_schedule_continues_from_its_state():
    config = ScheduleConfig(name="plateau", plateau_patience=2, patience=9)
    whole = Schedule(config, epochs=60, steps_per_epoch=2)
    for epoch, rating in enumerate(ratings(1)):
        resumed = Schedule(config, epochs=60, steps_per_epoch=2)
        resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
        for schedule in (whole, resumed):
            schedule.epoch_ended(rating)
        assert resumed.state_dict() == whole.state_dict() and resumed.should_stop == whole.should_stop
        assert resumed.factor(2 * epoch) == whole.factor(2 * epoch)


@pytest.mark.parametrize(
    "clip_norm, clip_value, expected",
    [
        (0.0, 0.0, [[6.0, 0.0], [-8.0]]),
        (5.0, 0.0, [[3.0, 0.0], [-4.0]]),
        (20.0, 0.0, [[6.0, 0.0], [-8.0]]),
        (0.0, 7.0, [[6.0, 0.0], [-7.0]]),
        (0.0, 2.0, [[2.0, 0.0], [-2.0]]),
        (5.0, 3.5, [[3.0, 0.0], [-3.5]]),
    ],
)
def test_clipping_by_hand(clip_norm, clip_value, expected):
    """Gradients with a total norm of 10; a third parameter has none."""
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
    parameters[0].grad, parameters[1].grad = torch.tensor([6.0, 0.0]), torch.tensor([-8.0])
    norm = clip_gradients(iter(parameters), OptimizerConfig(clip_norm=clip_norm, clip_value=clip_value))
    assert norm.item() == pytest.approx(10.0)
    for parameter, values in zip(parameters, expected, strict=False):
        torch.testing.assert_close(parameter.grad, torch.tensor(values))
    assert parameters[2].grad is None


def test_moving_average_by_hand():
    """At step 0 the average becomes the weights; at step 10 it moves half of the way to them, at step 5,000 a 200th."""
    model, average = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    for step, value, expected in ((0, 8.0, 8.0), (10, 4.0, 6.0), (5000, 206.0, 7.0)):
        nn.init.constant_(model.weight, value)
        model.running_mean.fill_(value)
        model.num_batches_tracked.fill_(step)
        update_average(average, model, step)
        assert average.weight.item() == pytest.approx(expected)
        assert average.running_mean.item() == pytest.approx(expected)
        assert average.num_batches_tracked.item() == step


def test_moving_average_of_a_whole_model(model):
    """The same as averaging every value by itself; frozen weights stay the same, bit for bit."""
    config = TrainConfig(encoder=EncoderConfig(fine_tune_from="layer2.1"))
    model = copy.deepcopy(model)
    make_optimizer(config, model)
    average = copy.deepcopy(model).eval()
    start = copy.deepcopy(model.state_dict())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {name: value.double() for name, value in start.items()}
    for step in range(3):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in trained:
                    parameter.add_(torch.randn_like(parameter))
        update_average(average, model, step)
        share = 10 / (10 + step)
        for name in trained:
            expected[name] += share * (model.state_dict()[name].double() - expected[name])
    for name, value in average.state_dict().items():
        if name in trained:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)
        else:
            assert value.equal(start[name]), name
    assert len(trained) == 6 + len(list(model.decoder.parameters()))
    assert not any(parameter.requires_grad for parameter in average.encoder.backbone.layer1.parameters())
