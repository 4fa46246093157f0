"""The model: what the chapter does not already show."""
import pytest
import torch

import sparsecod.moe as moe
from sparsecod.core import PRESETS, ModelConfig, Stack, Transformer, flops_per_token, next_tokens, param_counts, preset
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SMALL = ModelConfig(vocab_size=61, n_layers=3, d_model=16, n_heads=4, context_length=12)
TOKENS = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('changes', [{}, dict(tie_embeddings=True), dict(n_experts=4, d_shared_expert=8), dict(norm='layernorm_scaling'), dict(n_kv_heads=1)])
def test_saved_and_loaded_is_the_same_model(changes, tmp_path):
    torch.manual_seed(0)
    model = Transformer(SMALL.replace(**changes)).eval()
    model.save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    assert loaded.config == model.config and torch.equal(loaded(TOKENS), model(TOKENS))
    assert (loaded.head.weight is loaded.embedding.weight) == model.config.tie_embeddings


@pytest.mark.parametrize('changes', [{}, dict(n_experts=4), dict(n_experts=4, experts_per_token=3, d_expert=12, d_shared_expert=8)])
def test_flops_agree_with_pytorch(changes, monkeypatch):
    "PyTorch's counter does not know `grouped_mm`, but it knows the loop."
    monkeypatch.setattr(moe, 'run_experts', moe.experts_loop)
    model = Transformer(SMALL.replace(**changes))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(TOKENS)
    assert counter.get_total_flops() == flops_per_token(model.config, training=False) * TOKENS.numel()


def test_fields_follow_only_if_they_were_not_given():
    assert ModelConfig(d_model=64).replace(d_model=128).d_ff == 512
    assert ModelConfig(d_model=64, d_ff=256).replace(d_model=128).d_ff == 256
    assert ModelConfig(n_heads=4).replace(n_heads=8).n_kv_heads == 8
    assert preset('paper-moe-7B-A1B', experts_per_token=4).d_expert == 1024
    assert ModelConfig().replace(n_experts=8).replace(n_experts=0) == ModelConfig()
    assert ModelConfig.from_json(SMALL.to_json()) == SMALL


@pytest.mark.parametrize('field, value', [('n_layers', True), ('n_experts', 2.5), ('d_model', None), ('norm_eps', 'a'), ('init_std', 0), ('balance_weight', -1),
                                          ('d_shared_expert', 1.5), ('n_heads', 3), ('n_kv_heads', 3), ('norm', 'none')])
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f'{field}={value!r}'):
        ModelConfig(**{field: value})


def test_all_presets_are_counted_without_building_them():
    assert all(c['active'] <= c['total'] for c in map(param_counts, PRESETS.values()))


@pytest.mark.parametrize('K', [1, 2, 4])
def test_shared_heads_agree_in_both_precisions(K):
    "In 16 bits heads are shared inside the kernel, in 32 they are repeated before it."
    torch.manual_seed(0)
    model = Transformer(SMALL.replace(n_kv_heads=K, init_std=.2)).eval()
    exact = model(TOKENS)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.allclose(model(TOKENS).float(), exact, atol=.05 * exact.abs().max().item())


def test_streams_have_indices_from_0_to_L():
    stack = Stack(SMALL)
    h = stack.embed(TOKENS)
    assert torch.equal(stack.run(h, start=3), h)
    for start in (-1, 4):
        with pytest.raises(ValueError, match=f'start={start}'):
            stack.run(h, start=start)


def test_drawing_tokens_refuses_nonsense():
    model = Transformer(SMALL)
    for wrong in (dict(top_k=0), dict(temperature=-1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            next_tokens(model, TOKENS, **wrong)


def test_generation_goes_beyond_the_context_length():
    assert Transformer(SMALL).generate(TOKENS, 5, temperature=0).shape == (2, 17)
