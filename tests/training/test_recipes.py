import dataclasses
import json
import math

import pytest
import torch
from conftest import TINY

from attncap.command import check_numbers
from attncap.data.vocabulary import Vocabulary
from attncap.errors import CallError
from attncap.models.decoder import Decoder
from attncap.models.losses import caption_losses
from attncap.training import recipes
from attncap.training.config import TrainConfig


def check(config: TrainConfig) -> None:
    """As the command does."""
    check_numbers(config)
    config.check()


def test_every_recipe_is_one():
    assert recipes.NAMES == ("coco", "flickr30k", "flickr8k", "shapes", "tutorial")
    for name in recipes.NAMES:
        recipe = recipes.load(name)
        assert recipe.recipe == name
        check(recipe)


@pytest.mark.parametrize(
    "settings, flag",
    [
        ({"recipe": "vgg"}, "choose one of coco, flickr30k, flickr8k, shapes, tutorial"),
        ({"fine_tune_after": -1}, "--fine-tune-after -1"),
        ({"patience": -1}, "--patience -1"),
        ({"accumulate": 0}, "--accumulate 0"),
        ({"clip_value": -0.1}, "--clip-value -0.1"),
        ({"clip_norm": math.nan}, "--clip-norm nan"),
        ({"warmup": 1.0}, "--warmup 1.0"),
        ({"warmup": -0.1}, "--warmup -0.1"),
        ({"plateau_factor": 0.0}, "--plateau-factor 0.0"),
        ({"plateau_factor": 1.0}, "--plateau-factor 1.0"),
        ({"plateau_patience": 0}, "--plateau-patience 0"),
        ({"scheduled_sampling": 1.5}, "--scheduled-sampling 1.5"),
        ({"schedule": "plateau", "patience": 8}, "--patience 8"),
        ({"cache_features": True}, "--no-augment"),
        ({"cache_features": True, "augment": False, "fine_tune_from": "layer4"}, "--fine-tune-from none"),
        ({"objective": "scst"}, "--start-from FOLDER"),
        ({"objective": "scst", "start_from": "runs/one", "samples": 1}, "--samples 1"),
    ],
)
def test_settings_that_cannot_be(settings, flag):
    with pytest.raises(CallError) as raised:
        check(TrainConfig(**settings))
    assert flag in str(raised.value)


def test_settings_at_their_limits():
    check(TrainConfig(warmup=0.0, scheduled_sampling=1.0, clip_norm=0.0, patience=0, schedule="plateau", samples=2))
    check(TrainConfig(warmup=0.99, plateau_factor=0.01, patience=9, schedule="plateau", plateau_patience=8))
    check(TrainConfig(patience=1))  # no plateau, so no patience with it
    check(TrainConfig(cache_features=True, augment=False))
    check(TrainConfig(objective="scst", start_from="runs/one"))


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
    assert f"else flickr8k. (default: {expected})" in text
    assert f"Times every training image is seen. (default: {recipe.epochs})" in text
    assert f"Words seen less often in the training captions become <unk>. (default: {recipe.min_count})" in text


def test_a_recipe_that_is_not_there(attncap, flickr8k):
    status, _, err = attncap("train", "--data", flickr8k, "--recipe", "vgg")
    assert status == 2
    assert err == (
        "attncap: error: --recipe vgg: no such recipe; choose one of coco, flickr30k, flickr8k, shapes, tutorial\n"
    )


def test_flags_go_before_the_recipe(attncap, flickr8k, tmp_path):
    arguments = ["--data", flickr8k, "--recipe", "tutorial", "--output", tmp_path, *TINY, "--epochs", 1]
    assert attncap("train", *arguments)[0] == 0
    settings = json.loads((tmp_path / "settings.json").read_text())["settings"]
    assert (settings["recipe"], settings["optimizer"], settings["clip_value"]) == ("tutorial", "adam", 5.0)
    assert settings["model"]["output_layer"] == "plain" and settings["best_by"] == "BLEU-4"
    assert (settings["epochs"], settings["min_count"], settings["model"]["hidden_size"]) == (1, 1, 32)


def tutorial_loss(p: dict[str, torch.Tensor], features: torch.Tensor, captions: list[list[int]]) -> torch.Tensor:
    """The tutorial's loss, written out: features [B,P,D], a caption for each image, <start> and <end> included."""
    words, penalty = [], []
    for image, caption in zip(features, captions, strict=True):
        mean = image.mean(dim=0)
        h = p["initial_h.weight"] @ mean + p["initial_h.bias"]
        c = p["initial_c.weight"] @ mean + p["initial_c.bias"]
        attended = torch.zeros(len(image), dtype=torch.float64)
        for word, following in zip(caption[:-1], caption[1:], strict=True):
            query = p["query.weight"] @ h + p["query.bias"]
            scores = [
                p["score_weight"] @ (p["key.weight"] @ cell + p["key.bias"] + query).clamp(min=0) for cell in image
            ]
            total = sum(score.exp() for score in scores)
            alpha = torch.stack([score.exp() / total for score in scores])
            attended = attended + alpha
            gate = 1 / (1 + (-(p["gate.weight"] @ h + p["gate.bias"])).exp())
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


@pytest.mark.parametrize("implementation", ["native", "torch"])
@pytest.mark.parametrize("seed", range(3))
def test_the_tutorial_recipe_has_the_tutorials_loss(implementation, seed):
    """Value and gradients, for captions of different lengths."""
    torch.manual_seed(seed)
    recipe = recipes.load("tutorial")
    sizes = {"attention_size": 6, "embedding_size": 5, "hidden_size": 7, "dropout": 0.0}
    decoder = Decoder(dataclasses.replace(recipe.model, **sizes), 8, 11, implementation).double()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    features = torch.randn(4, 9, 8, dtype=torch.float64)
    captions = [[Vocabulary.START, *range(4, 4 + length), Vocabulary.END] for length in (3, 7, 1, 5)]
    tokens = torch.full((4, 9), Vocabulary.PAD)
    for row, caption in zip(tokens, captions, strict=True):
        row[: len(caption)] = torch.tensor(caption)

    losses = caption_losses(decoder, features, tokens, recipe.label_smoothing)
    loss = (
        losses["words"] / (tokens[:, 1:] != Vocabulary.PAD).sum() + recipe.attention_penalty * losses["attention"] / 4
    )
    gradients = torch.autograd.grad(loss, list(decoder.parameters()))
    parameters = dict(decoder.named_parameters())
    expected = tutorial_loss(parameters, features, captions)
    assert abs(loss.item() - expected.item()) < 1e-5
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, list(parameters.values())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_tutorial_recipe_trains_as_the_tutorial():
    """Its train.py's constants, by their names there."""
    recipe = recipes.load("tutorial")
    model = recipe.model
    assert (model.embedding_size, model.attention_size, model.hidden_size, model.dropout) == (512, 512, 512, 0.5)
    assert (model.encoder, model.image_size, model.grid) == ("resnet101", 256, 14)
    assert (model.activation, model.output_layer) == ("relu", "plain")
    assert (recipe.epochs, recipe.batch_size, recipe.captions_per_image, recipe.accumulate) == (120, 32, 1, 1)
    assert (recipe.optimizer, recipe.weight_decay) == ("adam", 0.0)
    assert (recipe.learning_rate, recipe.encoder_learning_rate) == (4e-4, 1e-4)  # decoder_lr, encoder_lr
    assert (recipe.clip_value, recipe.clip_norm, recipe.attention_penalty) == (5.0, 0.0, 1.0)  # grad_clip, alpha_c
    assert (recipe.schedule, recipe.plateau_factor, recipe.plateau_patience, recipe.patience) == ("plateau", 0.8, 8, 20)
    assert (recipe.warmup, recipe.label_smoothing, recipe.scheduled_sampling) == (0.0, 0.0, 0.0)
    assert not recipe.augment and not recipe.average_weights and recipe.fine_tune_from == "none"
    assert (recipe.min_count, recipe.search.max_length, recipe.best_by) == (6, 50, "BLEU-4")
