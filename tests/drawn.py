"""Digits that no method under test has drawn or been trained on: those of another bundled model."""
import torch

import methods
from methods import titok


@torch.no_grad()
def digits(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 1, 32, 32) in [-1, 1] and their labels."""
    model, labels = titok.build(titok.TRAINED["titok-16"]), torch.arange(n) % 10
    titok.load(model, methods.weights("titok-16"))
    return model.decode(titok.generate(model, labels, torch.Generator().manual_seed(7), steps=4)).clamp(-1, 1), labels
