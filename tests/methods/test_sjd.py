from itertools import product

import pytest
import torch
from contracts import decoder
from scipy.stats import chi2
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig

from methods import sjd
from methods._core import ar

PROMPT = torch.tensor([[4, 5]])
SYMBOLS = (0, 1, 2)
EOL = 3


def gpt2(vocab=6, scale=0.5, dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocab, n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=scale,
                        bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config).eval().to(dtype)


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=6, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         initializer_range=0.5, bos_token_id=None, eos_token_id=None)
    return LlamaForCausalLM(config).eval().to(dtype)


def chameleon(dtype=torch.float32):
    """Ids 0..3 are text, 4..13 image, 14 marks a row end; 15 opens the image."""
    torch.manual_seed(0)
    names = {"<pad>": 0, "<s>": 1, "</s>": 2, "<image>": 3, "<eol>": 14, "<boi>": 15}
    names |= {f"IMGIMG{chr(ord('A') + i)}Z": 4 + i for i in range(10)}
    vq = ChameleonVQVAEConfig(embed_dim=8, num_embeddings=10, latent_channels=8, resolution=16, base_channels=32,
                              channel_multiplier=[1], num_res_blocks=1)
    config = ChameleonConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, max_position_embeddings=64, vocabulary_map=names, vq_config=vq,
                             initializer_range=0.3)
    return ChameleonForConditionalGeneration(config).eval().to(dtype)


MODELS = {"gpt2": gpt2, "llama": llama, "chameleon": chameleon}


@pytest.mark.parametrize("check, case", decoder.cases(sjd, MODELS, PROMPT), ids=decoder.name)
def test_contract(check, case):
    check(case)


def law(model, tokens, config):
    """p of the last token's successor by a fresh pass and a plain loop over ids: no cache, no code of the method."""
    def logits(prompt):
        inputs = torch.cat([prompt, tokens], dim=1)
        if isinstance(model, ChameleonForConditionalGeneration):
            return model.lm_head(model.model(inputs).last_hidden_state[:, -1])
        return model(inputs).logits[:, -1]
    if config.end_of_line is not None and (tokens.shape[1] + 1) % (config.columns + 1) == 0:
        return torch.eye(model.config.vocab_size)[[config.end_of_line]].repeat(len(tokens), 1)
    prompt = PROMPT.repeat(len(tokens), 1)
    guided = logits(prompt)
    if config.guidance != 1:
        uncond = logits(prompt[:, -1:])
        guided = uncond + config.guidance * (guided - uncond)
    p = torch.zeros_like(guided)
    for row, l in zip(p, guided, strict=True):
        ids = sorted(config.image_tokens or range(4, 14), key=lambda i: -l[i].item())[:config.top_k]
        if config.temperature == 0:
            row[ids[0]] = 1
        else:
            row[ids] = (l[ids] / config.temperature).softmax(-1)
    return p


@torch.no_grad()
def ancestral(model, config):
    """Sequential sampling, one draw for each token."""
    generator, tokens = torch.Generator().manual_seed(config.seed), PROMPT[:, :0]
    for _ in range(config.tokens):
        tokens = torch.cat([tokens, torch.multinomial(law(model, tokens, config), 1, generator=generator)], dim=1)
    return tokens


@torch.no_grad()
def p_value(model, config, rows=30_000):
    """Of the chi-square test that the generated sequences have the law of sequential sampling, all sequences listed."""
    choices = [(EOL,) if config.end_of_line is not None and i % (config.columns + 1) == config.columns else SYMBOLS
               for i in range(config.tokens)]
    sequences = torch.tensor(list(product(*choices)))
    p = torch.ones(len(sequences))
    for i in range(config.tokens):
        p = p * law(model, sequences[:, :i], config).gather(1, sequences[:, i:i + 1]).squeeze(1)
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    code = 6 ** torch.arange(config.tokens)
    found = sjd.generate(model, PROMPT.repeat(rows, 1), config).tokens @ code
    counts = (found[:, None] == sequences @ code).sum(0)
    assert counts.sum() == rows and not counts[p == 0].any()
    often = rows * p >= 5
    cells = [(counts[often], rows * p[often]), (counts[~often].sum()[None], rows * p[~often].sum()[None])]
    counts, expected = (torch.cat(part) for part in zip(*cells, strict=True))
    used = expected > 0
    assert used.sum() > 10
    return chi2.sf(float(((counts - expected) ** 2 / expected)[used].sum()), int(used.sum()) - 1)


TOY = dict(tokens=5, guidance=1.0, image_tokens=SYMBOLS, columns=2, seed=3)
LAWS = [sjd.Config(window=w, init=init, **TOY) for w, init in
        [(1, "random"), (2, "random"), (3, "random"), (4, "random"), (2, "repeat"), (4, "repeat"),
         (3, "sample"), (4, "sample")]]
LAWS += [sjd.Config(window=3, **TOY | dict(guidance=2.0, temperature=0.8)),
         sjd.Config(window=4, init="repeat", **TOY | dict(guidance=2.0, top_k=2)),
         sjd.Config(window=4, init="sample", end_of_line=EOL, **TOY | dict(tokens=6))]


@pytest.mark.slow
@pytest.mark.parametrize("config", LAWS, ids=lambda c: f"{c.window}-{c.init}-s{c.guidance:g}-{c.end_of_line}")
def test_tokens_have_the_law_of_sequential_sampling(config):
    assert p_value(gpt2(), config) > 1e-3


def test_old_drafts_relabelled_with_the_new_law_are_found_out(monkeypatch):
    verify, slide, seen = sjd.verify, sjd.slide, {}

    def watch(p, q, drafts, *rest):
        seen["drafts"] = drafts
        return verify(p, q, drafts, *rest)

    def keep(fresh, p, *rest):
        return slide(torch.cat([seen["drafts"], fresh[:, -1:]], dim=1), p, *rest)
    monkeypatch.setattr(sjd, "verify", watch)
    monkeypatch.setattr(sjd, "slide", keep)
    assert p_value(gpt2(), sjd.Config(window=4, **TOY)) < 1e-6


@pytest.mark.parametrize("name, wrong", [("residual", lambda p, q: p), ("acceptance", lambda p, q, d: torch.ones(d.shape))])
def test_wrong_equations_are_found_out(monkeypatch, name, wrong):
    monkeypatch.setattr(sjd, name, wrong)
    assert p_value(gpt2(), sjd.Config(window=3, init="repeat", **TOY)) < 1e-6


@pytest.mark.parametrize("p, q, accepts, over", [
    ((.5, .3, .2), (.2, .5, .3), (1, .6, 2 / 3), (1, 0, 0)),
    ((.5, .3, .2), (0, 1, 0), (None, .3, None), (5 / 7, 0, 2 / 7))])
def test_hand_worked(p, q, accepts, over):
    p, q = torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)
    drafts = q.nonzero().squeeze(-1)
    accept = sjd.acceptance(p.expand(len(drafts), 3), q.expand(len(drafts), 3), drafts)
    torch.testing.assert_close(accept, torch.tensor([a for a in accepts if a is not None], dtype=torch.float64))
    torch.testing.assert_close(sjd.residual(p, q), torch.tensor(over, dtype=torch.float64))
    rejected = 1 - (q[drafts] * accept).sum()
    torch.testing.assert_close((q[drafts] * accept).sum(), torch.minimum(p, q).sum())
    drawn = torch.zeros(3, dtype=torch.float64).index_add(0, drafts, q[drafts] * accept)
    torch.testing.assert_close(drawn + rejected * sjd.residual(p, q), p)


def test_nothing_left_over_falls_back_on_p():
    p = torch.tensor([[.5, .3, .2]])
    assert torch.equal(sjd.residual(p, p), p)


def test_equal_laws_are_always_accepted_and_wrong_drafts_never():
    p = torch.eye(4)[None, [2, 0, 3, 1]]
    coins = torch.full((1, 3), 1 - 2 ** -24)
    right, wrong = torch.tensor([[2, 0, 3]]), torch.tensor([[2, 1, 3]])
    fresh, generator = torch.tensor([[2, 0, 3, 1]]), torch.Generator()
    tokens, final = sjd.verify(p, torch.eye(4)[right], right, fresh, coins, generator)
    assert final.tolist() == [4] and torch.equal(tokens, fresh)
    tokens, final = sjd.verify(p, torch.eye(4)[wrong], wrong, fresh, coins * 0, generator)
    assert final.tolist() == [2] and tokens[0, :2].tolist() == [2, 0]


def test_fresh_samples_become_the_drafts():
    fresh, new, p = torch.tensor([[1, 2, 0], [0, 1, 2]]), torch.tensor([[2, 0], [1, 1]]), torch.rand(2, 3, 3)
    drafts, q = sjd.slide(fresh, p, new, torch.tensor([1, 3]), 2)
    assert drafts.tolist() == [[2, 0], [1, 1]]
    torch.testing.assert_close(q, torch.stack([p[0, 1:], torch.eye(3)[[1, 1]]]))


def test_initial_tokens_follow_the_left_neighbour():
    random, positions, left = torch.arange(10, 18)[None], torch.arange(2, 10)[None], torch.tensor([7])
    config = sjd.Config(init="repeat", columns=3, end_of_line=5)
    assert sjd.initial(random, left, positions, config).tolist() == [[7, 5, 12, 12, 12, 5, 16, 16]]
    config = sjd.Config(init="repeat", columns=3)
    assert sjd.initial(random, left, positions, config).tolist() == [[7, 11, 11, 11, 14, 14, 14, 17]]
    config = sjd.Config(columns=3, end_of_line=5)
    assert sjd.initial(random, left, positions, config).tolist() == [[10, 5, 12, 13, 14, 5, 16, 17]]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", MODELS)
def test_off_is_sequential_sampling_draw_for_draw(name, guidance):
    model = MODELS[name](dtype=torch.float64)
    config = sjd.Config(window=1, tokens=15, guidance=guidance, top_k=5, temperature=0.9, columns=4, end_of_line=EOL,
                        image_tokens=None if name == "chameleon" else SYMBOLS, seed=11)
    decoded = sjd.generate(model, PROMPT, config)
    assert torch.equal(decoded.tokens, ancestral(model, config))
    assert decoded.report["forwards"] == 15 and decoded.report["compression"] == 1
    assert sjd.OFF == sjd.Config(window=1)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("init", ["random", "repeat", "sample"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_gives_the_greedy_tokens(name, init, guidance):
    model = MODELS[name](dtype=torch.float64)
    config = sjd.Config(window=7, init=init, tokens=40, guidance=guidance, temperature=0, columns=8,
                        image_tokens=None if name == "chameleon" else SYMBOLS)
    decoded = sjd.generate(model, PROMPT, config)
    assert torch.equal(decoded.tokens, ancestral(model, config))
    assert decoded.report["forwards"] < 40


def test_greedy_equals_the_library():
    model = gpt2(dtype=torch.float64)
    theirs = model.generate(PROMPT, do_sample=False, max_new_tokens=40, pad_token_id=0)[:, PROMPT.shape[1]:]
    config = sjd.Config(window=5, tokens=40, guidance=1, temperature=0)
    assert torch.equal(sjd.generate(model, PROMPT, config).tokens, theirs)


def test_rows_of_a_batch_advance_separately():
    model, prompts = gpt2(dtype=torch.float64), torch.tensor([[4, 5], [0, 1], [2, 2], [5, 3]])
    config = sjd.Config(window=6, tokens=30, guidance=2.0, temperature=0, image_tokens=(0, 1, 2, 3))
    together = sjd.generate(model, prompts, config)
    alone = torch.cat([sjd.generate(model, prompt[None], config).tokens for prompt in prompts])
    assert torch.equal(together.tokens, alone)
    assert len(set(map(tuple, together.report["advances"].tolist()))) > 1


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("tokens, window", [(1, 4), (3, 16), (20, 4), (33, 16)])
def test_advances_add_up(tokens, window, rows):
    config = sjd.Config(window=window, tokens=tokens, image_tokens=SYMBOLS, seed=1)
    decoded = sjd.generate(gpt2(), PROMPT.repeat(rows, 1), config)
    advances, forwards = decoded.report["advances"], decoded.report["forwards"]
    assert decoded.tokens.shape == (rows, tokens) and decoded.report["tokens"] == tokens
    assert advances.shape == (rows, forwards) and advances.sum(1).tolist() == [tokens] * rows
    assert (advances[:, 0] == 1).all() and advances.max() <= window and forwards <= tokens
    unfinished = advances.cumsum(1) - advances < tokens
    assert (advances[unfinished] >= 1).all() and (advances[~unfinished] == 0).all()
    assert decoded.report["compression"] == tokens / forwards


def test_without_a_prefix_every_kept_draft_is_accepted():
    """A model that ignores its prefix has q = p for a draft drawn in the pass before."""
    model = gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.normal_()
    config = sjd.Config(window=6, tokens=60, guidance=1, image_tokens=SYMBOLS)
    advances = sjd.generate(model, PROMPT, config).report["advances"][0].tolist()
    inner = advances[1:-1]
    assert inner and all(now > 6 - before for before, now in zip(inner, inner[1:], strict=False))


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_after_rollback_is_that_of_a_fresh_pass(monkeypatch, name):
    caches, dynamic = [], ar.DynamicCache
    monkeypatch.setattr(ar, "DynamicCache", lambda: caches.append(dynamic()) or caches[0])
    model, config = MODELS[name](dtype=torch.float64), sjd.Config(window=5, tokens=30, guidance=1, image_tokens=(4, 5, 0))
    decoded = sjd.generate(model, PROMPT, config)
    assert decoded.report["forwards"] > 7
    fresh = dynamic()
    with torch.no_grad():
        model(torch.cat([PROMPT, decoded.tokens[:, :-1]], dim=1), past_key_values=fresh, use_cache=True)
    for kept, new in zip(caches[0].layers, fresh.layers, strict=True):
        torch.testing.assert_close(kept.keys, new.keys, atol=1e-10, rtol=0)
        torch.testing.assert_close(kept.values, new.values, atol=1e-10, rtol=0)


@pytest.mark.parametrize("init", ["random", "repeat", "sample"])
@pytest.mark.parametrize("window", [1, 8])
def test_chameleon_draws_image_tokens_in_rows(window, init):
    model, prompt = chameleon(), torch.tensor([[1, 0, 15], [1, 2, 15]])
    config = sjd.Config(window=window, init=init, tokens=42, columns=6, end_of_line=14)
    tokens = sjd.generate(model, prompt, config).tokens.view(2, 6, 7)
    assert (tokens[..., 6] == 14).all()
    assert ((tokens[..., :6] >= 4) & (tokens[..., :6] < 14)).all() and len(tokens.unique()) > 8


def test_chameleon_logits_are_those_of_the_library_but_for_image_tokens():
    model, tokens = chameleon(), torch.tensor([[1, 15, 4, 9]])
    with torch.no_grad():
        ours, theirs = ar.describe(model).logits(tokens, 4), model(tokens).logits
    text = [0, 1, 2, 3, 14, 15]
    assert torch.equal(ours[..., text], theirs[..., text])
    assert ours.min() > -1e4 and ar.describe(model).image_tokens == tuple(range(4, 14))


@pytest.mark.parametrize("wrong, named", [
    (dict(window=0), "window=0"), (dict(tokens=0), "tokens=0"), (dict(top_k=0), "top_k=0"), (dict(columns=0), "columns=0"),
    (dict(init="left"), "init='left'"), (dict(temperature=-1.0), "temperature=-1.0"), (dict(guidance=-2.0), "guidance=-2.0"),
    (dict(temperature=float("nan")), "temperature=nan"), (dict(init="repeat"), "set columns"),
    (dict(end_of_line=3), "end_of_line=3"), (dict(image_tokens=()), "image_tokens=")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        sjd.Config(**wrong)


def test_bad_inputs_are_named():
    model = gpt2()
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        sjd.generate(model, PROMPT[0])
    with pytest.raises(ValueError, match=r"image_tokens names id 6, outside of the vocabulary 0\.\.5"):
        sjd.generate(model, PROMPT, sjd.Config(image_tokens=(1, 6)))
    with pytest.raises(ValueError, match="end_of_line names id 9"):
        sjd.generate(model, PROMPT, sjd.Config(columns=2, end_of_line=9))
    with pytest.raises(TypeError, match="Linear is not an autoregressive image model this library knows; it knows Cham"):
        sjd.generate(torch.nn.Linear(2, 2), PROMPT)
