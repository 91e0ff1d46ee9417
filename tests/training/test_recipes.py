import dataclasses
import json
import math

import pytest
import torch
from conftest import TINY

from attncap.data.vocabulary import Vocabulary
from attncap.errors import CallError
from attncap.models.decoder import LSTMDecoder
from attncap.models.losses import caption_losses
from attncap.training import recipes
from attncap.training.config import (
    DataConfig,
    EncoderConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)


def test_every_recipe_loads():
    assert recipes.NAMES == ("coco", "flickr30k", "flickr8k", "shapes", "tutorial")
    for name in recipes.NAMES:
        assert recipes.load(name).run.recipe == name


@pytest.mark.parametrize(
    "part, settings, message",
    [
        (RunConfig, {"recipe": "vgg"}, "choose one of coco, flickr30k, flickr8k, shapes, tutorial"),
        (RunConfig, {"epochs": 0}, "epochs=0: must be at least 1"),
        (RunConfig, {"seed": -1}, "seed=-1: must be at least 0"),
        (RunConfig, {"workers": -1}, "workers=-1: must be at least 0"),
        (RunConfig, {"precision": "float64"}, "precision='float64': choose float32, bfloat16 or float16"),
        (RunConfig, {"backend": "cuda"}, "backend='cuda': choose native or torch"),
        (DataConfig, {"batch_size": 0}, "batch_size=0: must be at least 1"),
        (DataConfig, {"subwords": -1}, "subwords=-1: must be at least 0"),
        (DataConfig, {"subwords": 9, "vocabulary": "vocabulary.json"}, "give only one of the two"),
        (EncoderConfig, {"fine_tune_after": -1}, "fine_tune_after=-1"),
        (EncoderConfig, {"learning_rate": -1.0}, "encoder.learning_rate=-1.0"),
        (ScheduleConfig, {"patience": -1}, "patience=-1"),
        (OptimizerConfig, {"name": "sgd"}, "name='sgd': choose adamw or adam"),
        (OptimizerConfig, {"accumulate": 0}, "accumulate=0"),
        (OptimizerConfig, {"clip_value": -0.1}, "clip_value=-0.1"),
        (OptimizerConfig, {"clip_norm": math.nan}, "clip_norm=nan"),
        (ScheduleConfig, {"warmup": 1.0}, "warmup=1.0: a share of the run, must be below 1"),
        (ScheduleConfig, {"warmup": -0.1}, "warmup=-0.1"),
        (ScheduleConfig, {"plateau_factor": 0.0}, "plateau_factor=0.0"),
        (ScheduleConfig, {"plateau_factor": 1.0}, "plateau_factor=1.0"),
        (ScheduleConfig, {"plateau_patience": 0}, "plateau_patience=0"),
        (ScheduleConfig, {"name": "plateau", "patience": 8}, "patience=8"),
        (ObjectiveConfig, {"scheduled_sampling": 1.5}, "scheduled_sampling=1.5"),
        (ObjectiveConfig, {"label_smoothing": 1.0}, "label_smoothing=1.0: must be below 1"),
        (ObjectiveConfig, {"name": "scst", "samples": 1}, "samples=1"),
        (TrainConfig, {"data": DataConfig(cache_features=True)}, "set augment=False"),
        (
            TrainConfig,
            {
                "data": DataConfig(cache_features=True, augment=False),
                "encoder": EncoderConfig(fine_tune_from="layer4"),
            },
            "set fine_tune_from='none'",
        ),
        (TrainConfig, {"objective": ObjectiveConfig(name="scst")}, "set start_from to its folder"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_settings_that_are_refused(part, settings, message):
    with pytest.raises(CallError) as raised:
        part(**settings)
    assert message in str(raised.value)


def test_settings_at_their_limits():
    ScheduleConfig(name="plateau", warmup=0.0, patience=0)
    ScheduleConfig(name="plateau", warmup=0.99, plateau_factor=0.01, plateau_patience=8, patience=9)
    ScheduleConfig(patience=1)  # no plateau, so its patience does not matter
    ObjectiveConfig(scheduled_sampling=1.0, samples=1)
    OptimizerConfig(clip_norm=0.0)
    TrainConfig(data=DataConfig(cache_features=True, augment=False))
    TrainConfig(objective=ObjectiveConfig(name="scst", samples=2), run=RunConfig(start_from="runs/one"))


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "shapes"),
        (["--data", "shapes"], "shapes"),
        (["--data", "photographs"], "flickr8k"),
        (["--data", "photographs", "--recipe", "coco"], "coco"),
        (["--recipe=tutorial"], "tutorial"),
    ],
)
def test_help_shows_the_recipe(attncap, arguments, expected):
    status, out, _ = attncap("train", *arguments, "--help")
    text = " ".join(out.replace("│", " ").split())
    recipe = recipes.load(expected)
    assert status == 0
    assert f"flickr8k for other data. (default: {expected})" in text
    assert f"Number of passes over the training images. (default: {recipe.run.epochs})" in text
    assert f"in the training captions become <unk>. (default: {recipe.data.min_count})" in text


def test_an_unknown_recipe(attncap, flickr8k):
    status, _, err = attncap("train", "--data", flickr8k, "--recipe", "vgg")
    assert status == 2
    assert err == (
        "attncap: error: recipe='vgg': no such recipe; choose one of coco, flickr30k, flickr8k, shapes, tutorial\n"
    )


def test_flags_override_the_recipe(attncap, flickr8k, tmp_path):
    arguments = ["--data", flickr8k, "--recipe", "tutorial", "--output", tmp_path, *TINY, "--epochs", 1]
    assert attncap("train", *arguments)[0] == 0
    settings = json.loads((tmp_path / "settings.json").read_text())["settings"]
    run, optimizer, model = settings["run"], settings["optimizer"], settings["model"]
    assert (run["recipe"], optimizer["name"], optimizer["clip_value"]) == ("tutorial", "adam", 5.0)
    assert model["output_layer"] == "plain" and run["best_by"] == "BLEU-4"
    assert (run["epochs"], settings["data"]["min_count"], model["hidden_size"]) == (1, 1, 32)


def tutorial_loss(p: dict[str, torch.Tensor], features: torch.Tensor, captions: list[list[int]]) -> torch.Tensor:
    """The tutorial's loss, written out: features [B,P,D], a caption for each image, <start> and <end> included."""
    words, penalty = [], []
    for image, caption in zip(features, captions, strict=True):
        mean = image.mean(dim=0)
        h = p["initial_h.weight"] @ mean + p["initial_h.bias"]
        c = p["initial_c.weight"] @ mean + p["initial_c.bias"]
        attended = torch.zeros(len(image), dtype=torch.float64)
        for word, following in zip(caption[:-1], caption[1:], strict=True):
            query = p["attention.query.weight"] @ h + p["attention.query.bias"]
            scores = [
                p["attention.score_weight"]
                @ (p["attention.key.weight"] @ cell + p["attention.key.bias"] + query).clamp(min=0)
                for cell in image
            ]
            total = sum(score.exp() for score in scores)
            alpha = torch.stack([score.exp() / total for score in scores])
            attended = attended + alpha
            gate = 1 / (1 + (-(p["attention.gate.weight"] @ h + p["attention.gate.bias"])).exp())
            context = gate * sum(a * cell for a, cell in zip(alpha, image, strict=True))
            x = torch.cat([p["embedding.weight"][word], context])
            gates = p["lstm.weight_ih"] @ x + p["lstm.bias_ih"] + p["lstm.weight_hh"] @ h + p["lstm.bias_hh"]
            i, f, g, o = gates.view(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            logits = p["word_output.weight"] @ h + p["word_output.bias"]
            words.append(logits.exp().sum().log() - logits[following])
        penalty.append(((1 - attended) ** 2).mean())
    return sum(words) / len(words) + 1.0 * sum(penalty) / len(penalty)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("seed", range(3))
def test_the_tutorial_recipe_has_the_tutorials_loss(backend, seed):
    """Value and gradients, for captions of different lengths."""
    torch.manual_seed(seed)
    recipe = recipes.load("tutorial")
    sizes = {"attention_size": 6, "embedding_size": 5, "hidden_size": 7, "dropout": 0.0}
    decoder = LSTMDecoder(dataclasses.replace(recipe.model, **sizes), 8, 11, backend).double()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    features = torch.randn(4, 9, 8, dtype=torch.float64)
    captions = [[Vocabulary.START, *range(4, 4 + length), Vocabulary.END] for length in (3, 7, 1, 5)]
    tokens = torch.full((4, 9), Vocabulary.PAD)
    for row, caption in zip(tokens, captions, strict=True):
        row[: len(caption)] = torch.tensor(caption)

    losses = caption_losses(
        decoder, features, tokens[:, :-1], tokens[:, 1:], label_smoothing=recipe.objective.label_smoothing
    )
    penalty = recipe.objective.attention_penalty * losses.attention / 4
    loss = losses.words / (tokens[:, 1:] != Vocabulary.PAD).sum() + penalty
    gradients = torch.autograd.grad(loss, list(decoder.parameters()))
    parameters = dict(decoder.named_parameters())
    expected = tutorial_loss(parameters, features, captions)
    assert abs(loss.item() - expected.item()) < 1e-5
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, list(parameters.values())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_tutorial_recipe_trains_as_the_tutorial():
    """Its train.py's constants, by their names there."""
    recipe = recipes.load("tutorial")
    model, data, optimizer, schedule = recipe.model, recipe.data, recipe.optimizer, recipe.schedule
    assert (model.embedding_size, model.attention_size, model.hidden_size, model.dropout) == (512, 512, 512, 0.5)
    assert (model.encoder, model.image_size, model.grid) == ("resnet101", 256, 14)
    assert (model.activation, model.output_layer) == ("relu", "plain")
    assert (recipe.run.epochs, data.batch_size, data.captions_per_image, optimizer.accumulate) == (120, 32, 1, 1)
    assert (optimizer.name, optimizer.weight_decay) == ("adam", 0.0)
    assert (optimizer.learning_rate, recipe.encoder.learning_rate) == (4e-4, 1e-4)  # decoder_lr, encoder_lr
    assert (optimizer.clip_value, optimizer.clip_norm) == (5.0, 0.0)  # grad_clip
    assert recipe.objective.attention_penalty == 1.0  # alpha_c
    assert (schedule.name, schedule.plateau_factor, schedule.plateau_patience) == ("plateau", 0.8, 8)
    assert (schedule.patience, schedule.warmup) == (20, 0.0)
    assert (recipe.objective.label_smoothing, recipe.objective.scheduled_sampling) == (0.0, 0.0)
    assert not data.augment and not recipe.run.average_weights and recipe.encoder.fine_tune_from == "none"
    assert (data.min_count, recipe.search.max_length, recipe.run.best_by) == (6, 50, "BLEU-4")
    assert recipe.search.suppressed == ()
