"""Sparsity: known answers beyond those of the chapter."""
import copy
import math
import sys

import pytest
import torch
from torch import nn

from test_adapters import FAMILIES, TOKENS as STOCK_TOKENS, tiny

import sparsecod.sparsity as sparsity_module
from sparsecod.adapters import adapt
from sparsecod.core import ModelConfig, Transformer
from sparsecod.layers import attention_weights, rope_angles
from sparsecod.scores import scoring_model, untouched
from sparsecod.sparsity import (attention_sparsity, effective_density, expert_loads, keys_for_mass,
                                measure_sparsity,
                                participation, _routed_share, sparsity_bytes, _sparsity_of, weight_sparsity)


def model(**changes):
    torch.manual_seed(0)
    return Transformer(ModelConfig(**dict(dict(vocab_size=61, n_layers=3, d_model=16, n_heads=4,
                                               context_length=12), **changes))).eval()


TOKENS = torch.randint(61, (5, 12), generator=torch.Generator().manual_seed(0))


def test_weight_sparsity_counts_strictly_below():
    assert weight_sparsity(torch.tensor([0., -1., 2., -3.]),
                           [.5, 1., 2.5, 10.]).tolist() == [.25, .25, .75, 1.]


@pytest.mark.parametrize('factor', [1e-3, 7.])
def test_relative_measures_ignore_scale(factor):
    W = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weight_sparsity(W, [.1, 1.], relative=True),
                       weight_sparsity(factor * W, [.1, 1.], relative=True))
    assert math.isclose(participation(W), participation(factor * W), rel_tol=1e-5)


def testkeys_for_mass_of_a_hand_made_row():
    p = torch.zeros(1, 1, 4, 4)
    p[0, 0, 3] = torch.tensor([.5, .05, .3, .15])     # .5 + .3 = .8 is not enough, with .15 it is
    assert keys_for_mass(p, .9)[0, 0, 3] == 3 / 4
    assert keys_for_mass(p, .5)[0, 0, 3] == 1 / 4


def test_attention_sparsity_looks_at_the_maps_that_the_model_uses():
    "Maps taken block by block agree with those computed from the model's own streams."
    m, streams = model(n_kv_heads=2, init_std=.3), []
    with torch.no_grad():
        h0 = m.embed(TOKENS)
        m.run(h0, watch=lambda l, out: streams.append(out.stream))
        got = attention_sparsity(m, TOKENS)
        for l, (block, h) in enumerate(zip(m.blocks, [h0, *streams])):
            p = attention_weights(block.attention, block.attention_norm(h), rope_angles(12, 4))
            assert torch.allclose(got['first'][l], p[..., 1:, 0].double().mean((0, 2)), atol=1e-6)


def test_a_head_that_only_sees_itself_needs_one_key():
    m = model()
    with torch.no_grad():
        for block in m.blocks:                        # equal keys everywhere: attention is flat
            block.attention.key.weight.zero_()
        flat = attention_sparsity(m, TOKENS)
    assert torch.allclose(flat['entropy'], torch.ones(3, 4, dtype=torch.float64), atol=1e-5)
    assert (flat['keys'] >= .9).all()


def test_sharing_lowers_the_density_of_attention_only():
    full, shared = effective_density(model(), TOKENS), effective_density(model(n_kv_heads=1), TOKENS)
    assert all(s < f for s, f in zip(shared['attention'], full['attention']))
    assert shared['feed_forward'] == pytest.approx(full['feed_forward'], rel=.05)


def test_expert_loads_sum_to_k():
    loads = expert_loads(model(n_experts=4, experts_per_token=3), TOKENS)
    assert loads.shape == (3, 4) and torch.allclose(loads.sum(1), torch.full((3,), 3.)) and (loads <= 1).all()


@pytest.mark.parametrize('changes', [{}, dict(n_experts=4), dict(n_kv_heads=1), dict(norm='peri_ln')])
def test_summary_is_plain_and_complete(changes):
    import json
    s = json.loads(json.dumps(measure_sparsity(model(**changes), TOKENS)))
    assert all(0 <= v <= 1 for v in s['scalars'].values())
    assert len(s['arrays']['density_attention']) == len(s['arrays']['density_feed_forward']) == 3
    assert ('expert_load' in s['arrays']) == bool(changes.get('n_experts'))
    sweep = s['arrays']['weights_below_absolute']
    assert sweep == sorted(sweep)


@pytest.mark.parametrize('changes', [dict(), dict(n_kv_heads=2), dict(norm='layernorm_scaling'),
                                     dict(n_experts=4, experts_per_token=2, gates='renormalised'),
                                     dict(n_experts=4, experts_per_token=1, d_shared_expert=8,
                                          gates='published')], ids=str)
def test_a_stock_translation_is_as_sparse_as_ours(changes):
    """An independent reference: the transformers class with the same function returns its own maps and
    router logits."""
    from sparsecod.exchange import to_hf
    torch.manual_seed(0)
    ours = Transformer(ModelConfig(vocab_size=64, n_layers=3, d_model=32, n_heads=4, context_length=16,
                                   **changes)).eval()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if p.dim() == 1: p.uniform_(.5, 2)
            else: p.mul_(8)                                     # maps that are far from flat
    tokens = torch.randint(64, (3, 12))
    network = to_hf(ours)
    before = {name: p.clone() for name, p in network.state_dict().items()}
    a, b = measure_sparsity(ours, tokens), measure_sparsity(network, tokens)
    same = ['keys_for_90_percent', 'attention_entropy', 'mass_on_first',
            *(['expert_load'] if changes.get('n_experts') else [])]
    for name in same:
        assert torch.allclose(torch.tensor(a['arrays'][name]), torch.tensor(b['arrays'][name]),
                              atol=1e-4), name
    for name in ('kv_density', 'keys_for_90_percent',
                 'density_attention') + (() if changes.get('d_shared_expert')
                                         else ('expert_density', 'density_feed_forward')):
        assert a['scalars'][name] == pytest.approx(b['scalars'][name], abs=2e-3), name
    assert (all(torch.equal(before[name], p) for name, p in network.state_dict().items())
            and network.config._attn_implementation != 'eager')


@pytest.mark.parametrize('family', FAMILIES)
def test_every_family_can_be_measured(family):
    network = tiny(family)
    found, mode = measure_sparsity(network, STOCK_TOKENS), network.config._attn_implementation
    assert (all(0 <= v <= 1 for v in found['scalars'].values())
            and len(found['arrays']['density_attention']) == len(
                found['arrays']['density_feed_forward']) == 4)
    assert network.config._attn_implementation == mode and network.training is False
    if 'expert_load' in found['arrays']:
        assert torch.tensor(found['arrays']['expert_load']).sum(1).allclose(torch.full((4,), 2.))
    assert ('expert_load' in found['arrays']) == (family in ('Mixtral', 'Olmoe', 'Qwen3Moe'))


@pytest.mark.parametrize('family', FAMILIES)
def test_maps_seen_from_outside_are_those_that_the_network_returns(family):
    network = tiny(family)
    found = attention_sparsity(network, STOCK_TOKENS)
    network.set_attn_implementation('eager')
    with torch.no_grad(): theirs = network(STOCK_TOKENS, output_attentions=True).attentions
    for l, p in enumerate(theirs):
        assert torch.allclose(found['first'][l], p[..., 1:, 0].double().mean((0, 2)), atol=1e-5)
        assert torch.allclose(found['keys'][l], keys_for_mass(p)[..., 1:].double().mean((0, 2)), atol=1e-5)


@pytest.mark.parametrize('family', ['Llama', 'Gemma2', 'GPT2', 'Mixtral', 'Olmoe', 'Qwen3Moe'])
def test_the_head_is_never_run(family):
    "Logits would be the largest thing in memory."
    network = tiny(family)
    def stop(*_): raise AssertionError('the head was run')
    with network.get_output_embeddings().register_forward_hook(stop):
        adapted = adapt_without_check(network)
        attention_sparsity(adapted, STOCK_TOKENS)
        if family in ('Mixtral', 'Olmoe', 'Qwen3Moe'): expert_loads(adapted, STOCK_TOKENS)


def adapt_without_check(network):
    "An adapted model, without the comparison of logits."
    from sparsecod.adapters import AdaptedModel
    return AdaptedModel(network)


@pytest.mark.parametrize('family', ['Mixtral', 'Olmoe', 'Qwen3Moe'])
def test_loads_are_counts_of_the_routers_choices(family):
    "Against the router logits of one full forward pass over all sequences, and one sequence at a time."
    network, lengths = tiny(family), []
    with torch.no_grad(): logits = network(STOCK_TOKENS, output_router_logits=True).router_logits
    want = torch.stack([torch.zeros(len(x), 4).scatter(1, x.topk(2).indices, 1).double().mean(0)
                        for x in logits])
    with network.get_decoder().register_forward_pre_hook(lambda part, args, kwargs: lengths.append(
        kwargs['input_ids'].shape[0]) if 'input_ids' in kwargs else None, with_kwargs=True):
        assert torch.allclose(expert_loads(adapt_without_check(network), STOCK_TOKENS), want, atol=1e-6)
    assert lengths == [1] * len(STOCK_TOKENS)


def test_attention_is_put_back_after_an_interruption(monkeypatch):
    "Also while a traceback keeps all frames alive, as a notebook does."
    network = tiny('Llama')
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(sparsity_module, '_head_sparsity', stop)
    try: measure_sparsity(network, STOCK_TOKENS)
    except KeyboardInterrupt: kept = sys.exc_info()[2]
    assert kept is not None and network.config._attn_implementation == 'sdpa'
    assert not any(m._forward_hooks for m in network.modules())


class ListedExperts(nn.Module):
    "A mixture as many models on the Hub write it: a router, and a list of experts."
    def __init__(self, D, F, E, names=('experts',)):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        for name in names:
            setattr(self, name,
                    nn.ModuleList(nn.ModuleDict(dict(up=nn.Linear(D, F, bias=False),
                                                     down=nn.Linear(F, D, bias=False))) for _ in range(E)))


def test_experts_in_a_list_are_counted():
    stacked = tiny('Mixtral')
    listed = copy.deepcopy(stacked)
    for layer in listed.model.layers: layer.mlp = ListedExperts(32, 40, 4)
    assert _routed_share(adapt_without_check(stacked),
                        stacked.model.layers[0]) == _routed_share(adapt_without_check(listed),
                                                                 listed.model.layers[0]) == .5
    for layer in listed.model.layers: layer.mlp = ListedExperts(32, 40, 4, ['specialists'])
    with pytest.raises(ValueError, match='has a router for 4 experts, but none were found'):
        _routed_share(adapt_without_check(listed), listed.model.layers[0])
    dense = copy.deepcopy(stacked)
    dense.model.layers[0].mlp = nn.Sequential(nn.Linear(32, 40))  # some mixtures begin with a dense block
    assert _routed_share(adapt_without_check(dense), dense.model.layers[0]) == 1


def test_attention_that_cannot_be_seen_is_refused(monkeypatch):
    network = tiny('Llama')
    for layer in network.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, forward=forward, **kwargs: (forward(*args, **kwargs)[0], None)
    with pytest.raises(ValueError, match='block 1 of LlamaForCausalLM hands out no attention maps'):
        measure_sparsity(network, STOCK_TOKENS)
    assert network.config._attn_implementation == 'sdpa'


@pytest.mark.parametrize('kind', ['ours', 'experts', 'Llama', 'Gemma2', 'Qwen3Moe'])
@pytest.mark.parametrize('T', [16, 96])
def test_memory_stays_within_its_bound(kind, T):
    from test_scores import Live
    if kind in FAMILIES: m, V = adapt(tiny(kind, max_position_embeddings=128)), 61
    else: m, V = model(context_length=128, **dict(experts=dict(n_experts=4)).get(kind, {})), 61
    tokens = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1))
    with untouched(m), Live() as live: _sparsity_of(scoring_model(m), tokens)
    print(f'{kind}, T={T}: {live.most} of {sparsity_bytes(m, T)} bytes')
    assert live.most <= sparsity_bytes(m, T)
