import pytest
import torch
from contracts import decoder
from transformers import GPT2Config, GPT2LMHeadModel

from methods import toy_decoder


def gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=4, n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=0.5,
                        bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config).eval().to(dtype)


@pytest.mark.parametrize("check, case", decoder.cases(toy_decoder, {"gpt2": gpt2}, torch.tensor([[1, 2]])), ids=decoder.name)
def test_contract(check, case):
    check(case)


def test_worked_by_hand():
    found = toy_decoder.generate(gpt2(), torch.tensor([[1, 2]]), toy_decoder.OFF)
    assert found.tokens.shape == (1, 16) and found.report == {"forwards": 16}
