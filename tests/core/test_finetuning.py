"""A stage of fine-tuning on labelled images."""
import pytest
import torch

import methods
from methods._core.finetuning import check_trainable, labelled, plain_loss
from methods._core.noise import Noising


def test_one_label_in_ten_is_dropped_by_the_generator_alone():
    pipe, seen = methods.tiny("dit"), []

    def loss(model, noising, x0, *, step, random, class_labels):
        seen.append(class_labels)
        return {"loss": x0.mean(), "step": torch.tensor(step)}

    stage = labelled(pipe, pipe.transformer, loss, steps=5, lr=1e-3, batch=8, rates={"pos": 2.0})
    assert (stage.steps, stage.batch, stage.lr, stage.rates) == (5, 8, 1e-3, {"pos": 2.0}) and stage.model is pipe.transformer
    images, labels = torch.zeros(2000, 1, 2, 2), torch.arange(2000) % 10
    before = torch.get_rng_state()
    for seed in (0, 0, 1):
        assert stage.loss(images, labels, 3, torch.Generator().manual_seed(seed))["step"] == 3
    dropped = seen[0] != labels
    assert (seen[0][dropped] == 1000).all() and dropped.float().mean() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2]) and torch.equal(torch.get_rng_state(), before)


def test_the_plain_loss_is_that_of_the_noise():
    pipe = methods.tiny("dit")
    noising, x0, y = Noising(pipe.scheduler), torch.rand(2, 1, 32, 32), torch.tensor([3, 4])
    found = plain_loss(pipe.transformer, noising, x0, step=0, random=torch.Generator().manual_seed(0), class_labels=y)
    noisy = noising.sample(x0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(found["loss"], noising.loss(pipe.transformer(noisy.x, noisy.t, y).sample, noisy))


def test_a_model_in_training_mode_or_with_checkpoints_is_refused():
    model = methods.tiny("dit").transformer
    check_trainable(model)
    with pytest.raises(ValueError, match="training mode"):
        check_trainable(model.train())
    model.eval().enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        check_trainable(model)
