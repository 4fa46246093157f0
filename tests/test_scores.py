"""Scores: known answers, slow references, and one test for each trap in the official code (reference:
chapter on scores)."""
import copy
import itertools
import json
import re
import math
import shutil
import weakref
from pathlib import Path

import jsonschema
import pytest
import torch
import transformers
from safetensors.torch import save_file
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import sparsecod.intervals as intervals
import sparsecod.parts as parts_module
import sparsecod.scores as scores_module
import sparsecod.windows as windows_module
import sparsecod.studies as studies
from sparsecod.adapters import adapt
from sparsecod.core import BlockOutput, ModelConfig, Transformer
from sparsecod.data import train_bpe
from sparsecod.measures import _at_length, compare_with_theory
from sparsecod.parts import Parts
from sparsecod.scores import (SCORES_SCHEMA, AffineFit, ScoreConfig, choose_pairs, fit_blocks,
                              jacobian_deviation, jacobian_estimate, _jacobian_products, n_probes,
                              needed_bytes, _pair_errors, pair_mean, _pair_weights, plan_memory,
                              _root_of_mean, score_model, scores_frame, skip_effects, swap_losses,
                              text_config, token_variances, trace, update_sizes)
from sparsecod.sparsity import measure_sparsity

SETTINGS = ScoreConfig(n_sequences=6, n_fit=40, n_jacobian=2, batch_size=4, n_bootstrap=50)


class Affine(nn.Module):
    def __init__(self, A, b=0.):
        super().__init__()
        self.A, self.b = A, b

    def forward(self, h, rope):
        u = h @ self.A.T + self.b
        return BlockOutput(h + u, u, torch.zeros_like(u))


def windows(n, seed=0, T=10, V=61):
    return torch.randint(V, (n, T + 1), generator=torch.Generator().manual_seed(seed))


def make_model():
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=61, n_layers=4, d_model=16, n_heads=2, n_kv_heads=1, context_length=10,
                         init_std=.3)
    return Transformer(config).eval()


@pytest.fixture
def model(): return make_model()


def score(model, seed=1, **changes):
    return score_model(model, windows(6, seed), windows(40, seed + 1), SETTINGS.replace(**changes),
                       progress=False)


def mean_loss(model, w):
    with torch.no_grad():
        return model(w[:, :-1], w[:, 1:]).item()


class Skip(nn.Module):
    def forward(self, h, rope):
        return BlockOutput(h, torch.zeros_like(h), torch.zeros_like(h))


def edited(model, changes):
    "A copy of the model with blocks (1-based) replaced: the slow and obvious way to intervene."
    copied = copy.deepcopy(model)
    for l, block in changes.items():
        copied.blocks[l - 1] = block
    return copied


def updates(model, w):
    "Updates of all blocks from a full forward pass."
    seen = []
    with torch.no_grad():
        model(w[:, :-1], watch=lambda l, out: seen.append(out.update))
    return seen


def test_causal_equals_full_forwards(model):
    w, got = windows(6, 1), score(model)['arrays']['causal']
    base = updates(model, w)
    for s in range(1, 5):
        skipped = updates(edited(model, {s: Skip()}), w)
        for l in range(1, 5):
            if l <= s:
                assert got[s - 1][l - 1] is None
            else:
                want = (skipped[l - 1] - base[l - 1]).norm(dim=-1).mean() / base[l - 1].norm(dim=-1).mean()
                assert got[s - 1][l - 1] == pytest.approx(want.item(), rel=1e-4)


def test_skip_loss_equals_full_forwards(model):
    w, got = windows(6, 1), score(model)['arrays']['skip_loss_increase']
    for s in range(1, 5):
        assert got[s - 1] == pytest.approx(mean_loss(edited(model, {s: Skip()}), w) - mean_loss(model, w),
                                           abs=1e-5)


class PartlySkipped(nn.Module):
    "A block that is skipped at the first five positions."
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, h, rope):
        u = self.block(h, rope).update.clone()
        u[:, :5] = 0
        return BlockOutput(h + u, u, torch.zeros_like(u))


def test_causal_at_later_tokens_equals_full_forwards(model):
    w, got = windows(6, 1), score(model)
    base, seen = updates(model, w), []
    for s, l in itertools.product(range(1, 5), range(1, 5)):
        if l <= s:
            assert got['arrays']['causal_max'][s - 1][l - 1] is None
        else:
            partly = updates(edited(model, {s: PartlySkipped(model.blocks[s - 1])}), w)
            seen.append(((partly[l - 1] - base[l - 1]).norm(dim=-1) / base[l - 1].norm(dim=-1))[:, 5:].amax(
                1).mean().item())
            assert got['arrays']['causal_max'][s - 1][l - 1] == pytest.approx(seen[-1], rel=1e-4)
    assert got['scalars']['causal_max']['value'] == pytest.approx(sum(seen) / 6, rel=1e-4)


def test_permutation_equals_full_forwards(model):
    w, got = windows(6, 1), score(model)['arrays']['permutation']
    base = mean_loss(model, w)
    for i, j in itertools.combinations(range(1, 5), 2):
        swapped = mean_loss(edited(model, {i: model.blocks[j - 1], j: model.blocks[i - 1]}), w)
        assert got[i - 1][j - 1] == got[j - 1][i - 1] == pytest.approx(abs(swapped - base) / base, rel=1e-3,
                                                                       abs=1e-6)


def test_usefulness_equals_least_squares_on_stored_states(model):
    w, fit, got = windows(6, 1), windows(40, 2), score(model)['arrays']['usefulness_ratio']
    with torch.no_grad():
        streams = [h.double() for h in trace(model, fit).streams]
    for l in range(1, 5):
        X = torch.cat([streams[l - 1].flatten(0, 1), torch.ones(streams[0].shape[:2].numel(), 1)], 1)
        solution = torch.linalg.lstsq(X, (streams[l] - streams[l - 1]).flatten(0, 1)).solution.float()
        replaced = edited(model, {l: Affine(solution[:-1].T, solution[-1])})
        assert got[l - 1] == pytest.approx(mean_loss(replaced, w) / mean_loss(model, w), rel=1e-4)


def test_scalars_are_means_of_arrays(model):
    s = score(model)
    pairs = lambda name: [x for row in s['arrays'][name] for x in row if x is not None]
    assert s['scalars']['causal']['value'] == pytest.approx(sum(pairs('causal')) / 6)
    assert s['scalars']['permutation']['value'] == pytest.approx(sum(pairs('permutation')) / 12)
    rest = [x for row in s['arrays']['causal'][1:] for x in row if x is not None]
    assert len(rest) == 3 and s['scalars']['causal_without_block_1']['value'] == pytest.approx(sum(rest) / 3)
    ratios = s['arrays']['usefulness_ratio']
    assert s['scalars']['usefulness']['value'] == sum(r > 1.10 for r in ratios) / 4
    assert s['scalars']['final_variance']['value'] == pytest.approx(s['arrays']['variance_mean'][-1])
    for estimate in s['scalars'].values():
        assert estimate['low'] <= estimate['value'] <= estimate['high']


# --- the traps, by their number in the list of the chapter on corrections

def test_trap_1_affine_block_is_not_useful(model):
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(16, 16, generator=generator)  # far from symmetric: a transposed map would show
    model.blocks[1] = Affine(A, torch.randn(16, generator=generator))
    ratio = score(model)['arrays']['usefulness_ratio']
    assert ratio[1] == pytest.approx(1, abs=1e-5)
    w = windows(6, 1)
    transposed = edited(model, {2: Affine(A.T, model.blocks[1].b)})
    assert abs(mean_loss(transposed, w) / mean_loss(model, w) - 1) > 1e-2


def test_trap_2_fit_and_evaluation_data_are_disjoint(model):
    with pytest.raises(ValueError, match='share a sequence'):
        score_model(model, windows(6), windows(6), SETTINGS, progress=False)


def test_trap_2_fitting_on_few_tokens_does_not_look_good(model):
    "With barely more tokens than channels, a map evaluated on its own data looks better than on fresh data."
    few = windows(2, 5)  # 20 tokens, 17 free numbers a channel
    with torch.no_grad():
        A, b, _ = fit_blocks(model, few)[3]
        own, fresh = trace(model, few), trace(model, windows(40, 6))
    error = lambda t: (t.streams[3] @ A + b - t.updates[3]).square().mean() / t.updates[3].var()
    assert error(own) < error(fresh) / 2


def test_trap_3_identity_block_has_causal_score_zero(model):
    model.blocks[1] = Skip()
    C = score(model)['arrays']['causal']
    assert C[1][2] == C[1][3] == 0
    assert C[0][2] > 0 and C[0][1] == 0


def test_trap_4_last_stream_is_before_the_final_norm(model):
    w = windows(6, 1)
    before = score(model)['arrays']['variance_mean']
    with torch.no_grad():
        model.final_norm.weight.mul_(7)
    after = score(model)['arrays']['variance_mean']
    assert before == after
    h = model.run(model.embed(w[:, :-1]))
    assert after[-1] == pytest.approx(h.var(-1).mean().item(), rel=1e-5)
    assert len(after) == 5


def test_trap_5_scores_of_a_16_bit_model_are_taken_in_32(model):
    rounded = copy.deepcopy(model).bfloat16()
    assert score(rounded) == score(copy.deepcopy(rounded).float())
    assert all(p.dtype == torch.bfloat16 for p in rounded.parameters())


def test_trap_9_sink_token_moves_the_mean_only(model):
    "A huge stream at position 0 dominates the mean variance, not the median nor the mean without position 0."
    class Sink(nn.Module):
        def forward(self, h, rope):
            u = torch.zeros_like(h)
            u[:, 0, 0] = 1e3
            return BlockOutput(h + u, u, torch.zeros_like(u))
    plain, sink = score(edited(model, {4: Skip()})), score(edited(model, {4: Sink()}))
    value = lambda s, name: s['scalars'][name]['value']
    assert value(sink, 'final_variance') > 100 * value(plain, 'final_variance')
    assert value(sink, 'final_variance_without_first') == pytest.approx(value(plain,
                                                                              'final_variance_without_first'))
    assert value(sink, 'final_variance_median') == pytest.approx(value(plain, 'final_variance_median'),
                                                                 rel=.2)


def test_trap_12_prefix_is_not_run_again(model):
    "Skipping block s runs only the blocks after it; swapping i and j only the blocks from i on."
    with torch.no_grad():
        t = trace(model, windows(6, 1))
        calls = []
        hooks = [b.register_forward_hook(lambda *_, l=l: calls.append(l))
                 for l, b in enumerate(model.blocks, 1)]
        skip_effects(model, t)
        assert calls == [2, 3, 4, 3, 4, 4]
        calls.clear()
        swap_losses(model, t)
        assert len(calls) == 3 * 4 + 2 * 3 + 1 * 2
    for h in hooks:
        h.remove()


# --- leaving the model alone

def test_model_is_untouched(model):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    score(model)
    assert model.training and all(b.training for b in model.blocks)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_model_is_untouched_after_a_failure(model):
    class Broken(nn.Module):
        def forward(self, h, rope):
            raise RuntimeError('broken block')
    model.train()
    model.blocks[2] = Broken()
    with pytest.raises(RuntimeError, match='broken block'):
        score(model)
    assert model.training


def test_same_seed_same_scores(model):
    assert score(model) == score(model)


def test_batch_size_does_not_matter(model):
    small, large = score(model, batch_size=2), score(model, batch_size=6)
    for name, s in small['scalars'].items():
        assert s['value'] == pytest.approx(large['scalars'][name]['value'], rel=1e-4, abs=1e-6), name


def test_one_block_has_no_pairs():
    torch.manual_seed(0)
    one = Transformer(ModelConfig(vocab_size=61, n_layers=1, d_model=16, n_heads=2, context_length=10)).eval()
    scalars = score(one)['scalars']
    assert scalars['causal']['value'] is None and scalars['permutation']['value'] is None
    assert scalars['loss']['value'] > 0


def test_undetermined_fit_reports_its_rank():
    fit = AffineFit(8)
    x = torch.randn(100, 3) @ torch.randn(3, 8)                # three directions only
    fit.add(x, x)
    A, b, rank = fit.solve()
    assert rank == 3 and torch.allclose(x @ A + b, x, atol=1e-4)


@pytest.mark.parametrize('field, value',
                         [('n_sequences', 0), ('batch_size', -1), ('threshold', 0), ('n_jacobian', 99)])
def test_config_errors_name_the_field(field, value):
    with pytest.raises(ValueError, match=f'{field}={value}'):
        ScoreConfig(**{field: value})


def test_surroundings_do_not_change_scores(model):
    "Autocast would round, inference mode would forbid Jacobians."
    want = score(model)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert score(model) == want
    with torch.inference_mode():
        assert score(model) == want
    torch.set_grad_enabled(False)
    try: assert score(model) == want and not torch.is_grad_enabled()
    finally: torch.set_grad_enabled(True)
    with torch.inference_mode(): made_within = copy.deepcopy(model)
    assert score(made_within) == want


def test_modes_of_all_parts_are_restored(model):
    model.train()
    model.blocks[1].eval()
    before = [m.training for m in model.modules()]
    score(model)
    assert [m.training for m in model.modules()] == before and len(set(before)) == 2


def test_interventions_keep_no_graph(model):
    t = trace(model, windows(4))
    change, loss = skip_effects(model, t)
    assert not any(x.requires_grad for x in (*t.streams, t.loss, change, loss, swap_losses(model, t),
                                             fit_blocks(model, windows(40, 3))[0][0]))


@pytest.mark.parametrize('changes', [dict(n_kv_heads=2), dict(n_experts=4), dict(norm='peri_ln'),
                                     dict(tie_embeddings=True), dict(context_length=2)])
def test_every_kind_of_model_is_scored(changes):
    torch.manual_seed(0)
    base = dict(vocab_size=61, n_layers=3, d_model=16, n_heads=2, context_length=10, init_std=.3)
    m = Transformer(ModelConfig(**{**base, **changes})).eval()
    T = m.config.context_length
    s = score_model(m, windows(6, 1, T), windows(60, 2, T), SETTINGS, progress=False)
    assert all(e['value'] is not None and e['low'] <= e['high'] for e in s['scalars'].values())
    assert s['settings']['n_sequences'] == 6 and s['settings']['T'] == T


# --- Jacobians from probes

def real_block(model, l):
    "Block l on a random sequence, and its exact deviation: as published and per token."
    h = torch.randn(10, 16, generator=torch.Generator().manual_seed(l))
    block = lambda x: model.run(x, start=l - 1, stop=l)
    average, per_token = jacobian_deviation(block, h)
    return block, h, (average.norm() / 16, per_token)


def test_probes_agree_with_the_exact_jacobian_and_state_their_error(model):
    "Over many seeds: no bias, and as much scatter as the standard error says."
    block, h, exact = real_block(model, 3)
    # (300, 2, 2)
    estimates = torch.tensor([jacobian_estimate(block, h, 24, seed=seed) for seed in range(300)])
    for found, true in zip(estimates.unbind(1), exact):
        z = (found[:, 0] - true) / found[:, 1]
        assert abs(found[:, 0].mean() - true) < 4 * found[:, 0].std() / 300 ** .5
        assert .8 < found[:, 1].square().mean().sqrt() / found[:, 0].std() < 1.25
        assert (z.abs() < 2).float().mean() > .88 and .02 < found[:, 0].std() / true


def test_the_root_of_few_noisy_squares_is_corrected():
    "Squares of normal numbers have mean 1; the root of the mean of 8 of them is 3 % too small on average."
    squares = torch.randn(8, 6000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).square()
    assert squares.mean(0).sqrt().mean() < .98
    assert _root_of_mean(squares)[0] == pytest.approx(1, abs=.012)
    assert _root_of_mean(torch.full((8, 3), 4.)) == (2, 0)


def test_more_probes_err_less(model):
    block, h, exact = real_block(model, 2)
    few, many = (torch.tensor([jacobian_estimate(block, h, probes, seed=seed) for seed in range(60)])[..., 0]
                 for probes in (4, 64))
    for which in (0, 1):
        assert (many[:, which] - exact[which]).square().mean() < (
            few[:, which] - exact[which]).square().mean() / 6


def test_probes_of_blocks_with_known_answers():
    h, A = torch.randn(12, 16), torch.randn(16, 16)
    sign = torch.tensor([1., -1.]).repeat(6)[:, None]
    assert jacobian_estimate(lambda x: x, h, 8) == ((0, 0), (0, 0))
    (published, published_error), (per_token, error) = jacobian_estimate(lambda x: x + x @ A.T, h, 256)
    assert published == pytest.approx(per_token.item(), rel=1e-5)  # all tokens alike: both versions agree
    assert abs(per_token - A.norm() / 16) < 5 * error < A.norm() / 16
    (published, _), (per_token, error) = jacobian_estimate(lambda x: x + sign * x, h, 8)
    # deviations cancel as published
    assert published == pytest.approx(0, abs=1e-6) and per_token == pytest.approx(1 / 4)
    assert error == pytest.approx(0, abs=1e-6)  # every sign vector has the same length


def test_products_do_not_depend_on_how_many_run_together(model):
    block, h, _ = real_block(model, 2)
    V = torch.randn(7, 16)
    want = torch.cat(list(_jacobian_products(block, h, V, 7)))
    J = torch.autograd.functional.jacobian(lambda x: block(x[None])[0], h).sum(0)          # (out, T, in)
    assert torch.allclose(want, torch.einsum('rk,ktd->rtd', V, J), atol=1e-4)
    for rows_at_once in (1, 3, 32):
        assert torch.allclose(torch.cat(list(_jacobian_products(block, h, V, rows_at_once))), want, atol=1e-5)


def test_wide_models_get_probes(model, monkeypatch):
    exact = scores_module._EXACT_WIDTH
    assert [n_probes(ScoreConfig(), D) for D in (16, exact, exact + 1)] == [0, 0, scores_module._PROBES]
    assert (n_probes(ScoreConfig(jacobian_probes=0), 4096) == 0
            and n_probes(ScoreConfig(jacobian_probes=9), 16) == 9)
    exact = score(model)
    monkeypatch.setattr(scores_module, '_EXACT_WIDTH', 15)
    probed = score(model)
    assert (exact['settings']['jacobian_probes'] == 0
            and probed['settings']['jacobian_probes'] == scores_module._PROBES)
    for kind in ('jacobian_published', 'jacobian_per_sequence', 'jacobian_per_token'):
        assert f'{kind}_error' not in exact['arrays']
        for a, b, error in zip(exact['arrays'][kind], probed['arrays'][kind],
                               probed['arrays'][f'{kind}_error']):
            assert 0 < abs(a - b) < 5 * error < a
    rest = lambda s: {k: v for k, v in s['scalars'].items() if 'jacobian' not in k}
    assert rest(exact) == rest(probed)
    # probes belong to a sequence, not to a batch
    one, two = score(model, seed=1)['arrays'], score(model, seed=1, batch_size=1)['arrays']
    assert one['jacobian_per_token'] == pytest.approx(two['jacobian_per_token'], rel=1e-5)


@pytest.mark.parametrize('n', [1, 5])
def test_the_published_jacobian_averages_over_all_tokens_of_all_sequences(model, n):
    "From whole Jacobians of PyTorch; per sequence, the norm is taken before the average over sequences."
    w, found = windows(6, 1), score(model, n_jacobian=n)['arrays']
    streams = trace(model, w).streams
    for l in range(1, 5):
        block = lambda x: model.run(x[None], start=l - 1, stop=l)[0]
        # (n, T, out, in)
        J = torch.stack([torch.autograd.functional.jacobian(block, h.detach()).sum(0).transpose(0, 1)
                         for h in streams[l - 1][:n]])
        rest = J - torch.eye(16)
        assert found['jacobian_published'][l - 1] == pytest.approx(rest.mean((0, 1)).norm().item() / 16,
                                                                   rel=1e-4)
        assert found['jacobian_per_sequence'][l - 1] == pytest.approx(
            rest.mean(1).norm(dim=(1, 2)).mean().item() / 16, rel=1e-4)
        assert found['jacobian_per_token'][l - 1] == pytest.approx(rest.norm(dim=(2, 3)).mean().item() / 16,
                                                                   rel=1e-4)
    kinds = [found[f'jacobian_{kind}'] for kind in ('published', 'per_sequence', 'per_token')]
    assert (all(a <= b * (1 + 1e-6) and b < c for a, b, c in zip(*kinds))
            and (kinds[0] == pytest.approx(kinds[1], rel=1e-6)) == (n == 1))


def test_the_interval_of_the_published_jacobian_leaves_out_one_sequence_in_turn(model):
    s = score(model, n_jacobian=3)
    alone = lambda some: score_model(model, windows(6, 1)[some], windows(40, 2),
                                     SETTINGS.replace(n_sequences=len(some), n_jacobian=len(some)),
                                     progress=False)
    low, high = leave_one_out_by_hand(
        lambda some: alone(some)['scalars']['jacobian_deviation_published']['value'], 3)
    got = s['scalars']['jacobian_deviation_published']
    assert (got['low'], got['high']) == pytest.approx((max(low, 0), high), rel=1e-3)


@pytest.mark.parametrize('probes', [1, -1, 2.5])
def test_number_of_probes_is_checked(probes):
    with pytest.raises(ValueError, match=f'jacobian_probes={probes}'):
        ScoreConfig(jacobian_probes=probes)


# --- adapted models

def tiny(family):
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
                 max_position_embeddings=32, initializer_range=.3,
                 bos_token_id=None, eos_token_id=None, pad_token_id=None)
    if family == 'Llama': sizes |= dict(intermediate_size=40, num_key_value_heads=1)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers,
                                                                 f'{family}Config')(**sizes)).eval()


def block_list(network):
    return network.model.layers if hasattr(network, 'model') else network.transformer.h


def test_adapting_first_makes_no_difference():
    assert score(tiny('GPT2')) == score(adapt(tiny('GPT2')))


# --- leaving a model alone

def state(network):
    "All that scoring must not change."
    return dict(modes=[m.training for m in network.modules()],
                wanted=[p.requires_grad for p in network.parameters()],
                grads=[None if p.grad is None else p.grad.clone().tolist() for p in network.parameters()],
                values=[(p.dtype, p.detach().float().tolist()) for p in network.state_dict().values()],
                config=str(network.config),
                hooks=[(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
                       for m in network.modules()])


def unusual(network):
    "A network with a bit of everything that has to be put back."
    network.train()
    block_list_of = network.blocks if hasattr(network, 'blocks') else block_list(network)
    block_list_of[1].eval()
    first = next(network.parameters())
    first.requires_grad_(False)
    for p in list(network.parameters())[1:3]: p.grad = torch.ones_like(p)
    block_list_of[0].register_forward_hook(lambda *_: None)
    return network


def interrupting(block, calls, error=KeyboardInterrupt):
    "A hook on a block that stops everything at some call."
    left = [calls]
    def stop(*_):
        left[0] -= 1
        if left[0] == 0: raise error('stopped')
    return block.register_forward_pre_hook(stop)


@pytest.mark.parametrize('family, dtype',
                         [('ours', torch.bfloat16), ('Llama', torch.float32), ('GPT2', torch.bfloat16)])
def test_everything_is_left_as_it_was(model, family, dtype):
    network = unusual((model if family == 'ours' else tiny(family)).to(dtype))
    before = state(network)
    result = score(network)
    assert state(network) == before
    assert result == score(copy.deepcopy(network).float())
    hook = interrupting(network.blocks[2] if family == 'ours' else block_list(network)[2], 12)
    before = state(network)
    for error in (KeyboardInterrupt, RuntimeError):
        hook.remove()
        hook = interrupting(network.blocks[2] if family == 'ours' else block_list(network)[2], 12, error)
        with pytest.raises(error): score(network)
        assert state(network) == before


# --- stopping and going on

@pytest.mark.parametrize('calls, parts', [(2, 0), (20, 24), ('last', 2 + 2 * 13 + 2 * 2)])
def test_interrupted_scoring_goes_on_with_the_same_numbers(model, tmp_path, calls, parts):
    """The parts: two sets of maps, for each of two batches a base and three pieces a block, and a Jacobian
    of each block on each of two sequences."""
    config = SETTINGS.replace(batch_size=4, jacobian_probes=4)
    options = dict(windows=windows(6, 1), fit_windows=windows(8, 2), config=config, progress=False,
                   as_published=True)
    seen = []
    hook = model.blocks[1].register_forward_pre_hook(lambda *_: seen.append(1))
    want = score_model(model, **options)
    hook.remove()
    hook = interrupting(model.blocks[1], len(seen) if calls == 'last' else calls)
    with pytest.raises(KeyboardInterrupt): score_model(model, resume=tmp_path, **options)
    hook.remove()
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob('*.safetensors')}
    assert len(kept) == parts, sorted(kept)
    assert score_model(model, resume=tmp_path, **options) == want
    # nothing is measured twice
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert not list(tmp_path.glob('*.new'))


OPTIONS = dict(windows=windows(6, 1), fit_windows=windows(40, 2), config=SETTINGS, progress=False)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A finished measurement of the model: its folder, and the scores."
    folder = tmp_path_factory.mktemp('finished')
    return folder, score_model(make_model(), resume=folder, **OPTIONS)


@pytest.fixture
def kept(finished, tmp_path):
    "A copy of it."
    return shutil.copytree(finished[0], tmp_path / 'kept'), finished[1]


def test_finished_measurements_are_only_read(model, kept):
    (folder, want), calls = kept, []
    hook = model.blocks[3].register_forward_hook(lambda *_: calls.append(1))
    other = SETTINGS.replace(threshold=1.01, n_bootstrap=60)  # what is made of measurements may change
    again = score_model(model, **OPTIONS | dict(config=other), resume=folder)
    hook.remove()
    assert calls == []
    assert again['arrays'] == want['arrays'] and again['settings']['threshold'] == 1.01


@pytest.mark.parametrize('change, named',
                         [(dict(weights=1), 'weights'), (dict(windows=windows(6, 7)), 'windows'),
                          (dict(fit_windows=windows(40, 7)), 'fit_windows'),
                                           (dict(config=SETTINGS.replace(seed=5)), 'settings'),
                                           (dict(config=SETTINGS.replace(batch_size=3)), 'plan'),
                                           (dict(as_published=True), 'as_published')])
def test_parts_of_another_measurement_are_refused(model, kept, change, named):
    folder, change = kept[0], dict(change)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    if change.pop('weights', None):
        with torch.no_grad(): model.blocks[2].feed_forward.down.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=f'with other {named};'):
        score_model(model, **OPTIONS | change, resume=folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def rewritten(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(bytes(data))


def flipped(path, at): rewritten(path, lambda data: data.__setitem__(at, data[at] ^ 64))

def cut(path): rewritten(path, lambda data: data.__delitem__(slice(-5, None)))

def in_the_way(path):
    path.unlink()
    path.mkdir()


DAMAGE = dict(
    first_byte_flipped=lambda f: flipped(f / 'batch-0-skip-1.safetensors', 0),
    header_flipped=lambda f: flipped(f / 'batch-1-swap-1.safetensors', 30),
    last_byte_flipped=lambda f: flipped(f / 'batch-0-base.safetensors', -1),
    maps_flipped=lambda f: flipped(f / 'maps.safetensors', -9),
    jacobian_flipped=lambda f: flipped(f / 'jacobian-2-1.safetensors', -9),
    truncated=lambda f: cut(f / 'batch-0-linear-2.safetensors'),
    empty=lambda f: (f / 'batch-1-base.safetensors').write_bytes(b''),
    no_tensors=lambda f: (f / 'batch-1-base.safetensors').write_bytes(b'not tensors'),
    another_batch=lambda f: (f / 'batch-0-skip-1.safetensors').write_bytes(
        (f / 'batch-1-skip-1.safetensors').read_bytes()),
    another_block=lambda f: (f / 'jacobian-1-0.safetensors').write_bytes(
        (f / 'jacobian-2-0.safetensors').read_bytes()),
    without_a_name=lambda f: save_file(dict(x=torch.zeros(3)), f / 'batch-0-skip-2.safetensors'),
    a_folder=lambda f: in_the_way(f / 'batch-0-skip-1.safetensors'),
    key_empty=lambda f: (f / 'key.json').write_text('', encoding='utf-8'),
    key_a_list=lambda f: (f / 'key.json').write_text('[]', encoding='utf-8'),
    key_changed=lambda f: rewritten(f / 'key.json',
                                    lambda data: data.__setitem__(slice(None),
                                                                  data.replace(b'windows', b'window'))))


@pytest.mark.parametrize('harm', DAMAGE)
def test_damaged_parts_are_named_set_aside_and_measured_again(model, kept, harm):
    folder, want = kept
    options, before = OPTIONS | dict(resume=folder), {path.name for path in folder.iterdir()}
    DAMAGE[harm](folder)
    with pytest.warns(UserWarning) as said: assert score_model(model, **options) == want
    aside, = {path.name for path in folder.iterdir()} - before
    assert (aside.removesuffix('.damaged') in before and len(said) == 1
            and aside.removesuffix('.damaged') in str(said[0].message) and aside in str(said[0].message))
    assert score_model(model, **options) == want  # and now all is well: a warning would be an error


def test_a_part_of_another_measurement_is_not_used(model, kept, tmp_path):
    "Both have the same name and shape; only their keys tell them apart."
    folder, want = kept
    score_model(model, **OPTIONS | dict(windows=windows(6, 9)), resume=tmp_path / 'other')
    (folder / 'batch-0-base.safetensors').write_bytes(
        (tmp_path / 'other' / 'batch-0-base.safetensors').read_bytes())
    with pytest.warns(UserWarning, match='batch-0-base'):
        assert score_model(model, **OPTIONS, resume=folder) == want


def test_a_missing_key_is_written_again(model, kept):
    folder, want = kept
    (folder / 'key.json').unlink()
    assert score_model(model, **OPTIONS, resume=folder) == want and (folder / 'key.json').is_file()


@pytest.mark.parametrize('calls', [1, 30])
def test_a_measurement_outlives_the_removal_of_its_folder(model, finished, tmp_path, calls):
    "As when another process that measured the same thing is done and tidies up."
    folder, left, want, options = tmp_path / 'parts', [calls], finished[1], OPTIONS
    def remove(*_):
        left[0] -= 1
        if left[0] == 0: shutil.rmtree(folder)
    hook = model.blocks[1].register_forward_pre_hook(remove)
    assert score_model(model, **options, resume=folder) == want
    hook.remove()
    assert left[0] < 0 and (folder / 'key.json').is_file()
    assert score_model(model, **options, resume=folder) == want


def test_a_file_in_place_of_the_folder_is_named(model, tmp_path):
    (tmp_path / 'parts').write_text('', encoding='utf-8')
    with pytest.raises(OSError, match='parts'):
        score_model(model, windows(6, 1), windows(40, 2), SETTINGS, progress=False, resume=tmp_path / 'parts')


def test_adapted_models_are_resumed_too(tmp_path):
    options = dict(windows=windows(6, 1), fit_windows=windows(40, 2), config=SETTINGS, progress=False)
    network = tiny('Llama')
    hook = interrupting(network.model.layers[1], 20)
    with pytest.raises(KeyboardInterrupt): score_model(network, resume=tmp_path, **options)
    hook.remove()
    assert score_model(tiny('Llama'), resume=tmp_path, **options) == score_model(network, **options)
    with pytest.raises(ValueError, match='architecture, config, weights'):
        score_model(tiny('GPT2'), resume=tmp_path, **options)


def test_progress_counts_all_the_work_once(model, tmp_path, monkeypatch):
    bars, make = [], scores_module.tqdm
    def keep(**options):
        bars.append(make(**options))
        return bars[-1]
    monkeypatch.setattr(scores_module, 'tqdm', keep)
    options = dict(windows=windows(6, 1), fit_windows=windows(40, 2), config=SETTINGS, resume=tmp_path)
    hook = interrupting(model.blocks[1], 25)
    with pytest.raises(KeyboardInterrupt): score_model(model, **options)
    hook.remove()
    score_model(model, **options)
    first, second = bars
    assert first.initial == 0 < second.initial < first.total == second.total == pytest.approx(second.n)
    assert second.initial == pytest.approx(first.n)  # what was shown as done is not done again
    loss = 61 / (12 * 16)  # of a sequence, in runs through a block
    read_out = 6 * (1 + 4 + 4 + 6)  # plain, skipped, replaced, swapped
    assert first.total == pytest.approx(6 * scores_module.block_runs(4) + loss * read_out + 40 * 4 * 4 / 3
                                        + 2 * 4 * 2 * 16)


def test_a_part_is_there_completely_or_not_at_all(tmp_path, monkeypatch):
    def half(tensors, path, metadata):
        path.write_bytes(b'half a file')
        raise KeyboardInterrupt
    parts = Parts(tmp_path, dict(a=1))
    with monkeypatch.context() as patched:
        patched.setattr(parts_module, 'save_file', half)
        with pytest.raises(KeyboardInterrupt): parts.get('x', lambda: dict(x=torch.ones(2)))
    assert not parts.has('x') and [p.name for p in tmp_path.iterdir()] == ['key.json']
    assert torch.equal(parts.get('x', lambda: dict(x=torch.ones(2)))['x'], torch.ones(2)) and parts.has('x')


# --- memory

class Live(TorchDispatchMode):
    "Counts the bytes of all tensors that were made within and are still alive, and remembers the most."
    def __init__(self):
        super().__init__()
        self.known, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs))
                 if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (
                key := x.untyped_storage()._cdata) not in given and key not in self.known:
                self.known[key] = size = x.untyped_storage().nbytes()
                self.now += size
                weakref.finalize(x.untyped_storage(), self.gone, key, size)
        self.most = max(self.most, self.now)
        return out

    def gone(self, key, size):
        if self.known.pop(key, None) is not None: self.now -= size


def test_live_counts_what_is_alive():
    with Live() as live:
        x = torch.ones(1000)
        y = x.view(10, 100)
        del x
        assert live.now == 4000                            # a view keeps its storage alive
        z = (y + 1).sum(0)
        assert live.now == 4400 and live.most >= 8000
        del y, z
        assert live.now == 0


KINDS = dict(experts=dict(n_experts=4), wide_vocabulary=dict(vocab_size=3001))


@pytest.mark.parametrize('kind', [*KINDS, 'GPT2'])
def test_memory_stays_within_its_bound(kind):
    torch.manual_seed(0)
    base = dict(vocab_size=61, n_layers=3, d_model=16, n_heads=2, context_length=32)
    m = (adapt(tiny(kind)) if kind == 'GPT2'
         else Transformer(ModelConfig(**{**base, **KINDS.get(kind, {})})).eval())
    w, fit, T = windows(12, 1, T=32), windows(12, 2, T=32), 32
    config, used = SETTINGS.replace(n_sequences=12, batch_size=12, n_bootstrap=10), []
    plain = score_model(m, w, fit, config, progress=False)['scalars']
    for B in (1, 12):
        memory = needed_bytes(m, B, 12, T, n_bootstrap=10, n_jacobian=2)
        plan = plan_memory(m, 12, T, config, memory)
        assert plan.sequences == B
        with scores_module.untouched(m), Live() as live:
            found = scores_module.measure(m, w, fit, config, plan=plan)
        print(f'{kind}: {B} sequences, {live.most} of {memory} bytes')
        assert live.most <= memory
        used.append(live.most)
        with Live() as live:
            scores_module._estimate_scores(*found, config, w, fit, m.config.d_model, pair_intervals=True)
        assert live.most <= memory
        held = score_model(m, w, fit, config, progress=False, memory=memory)['scalars']
        for name, s in plain.items():
            assert held[name]['value'] == pytest.approx(s['value'], rel=1e-3, abs=1e-5), name
    assert used[0] < used[1] / 2  # a small bound is no empty promise
    with pytest.raises(ValueError, match='needs at least'):
        score_model(m, w, fit, config, progress=False,
                    memory=needed_bytes(m, 1, 12, T, n_bootstrap=10, n_jacobian=2) - 1)


@pytest.mark.parametrize('family, T', [('Llama', 192), ('Gemma2', 192)])
def test_attention_that_is_written_out_is_counted(family, T):
    """Eager attention, the default of Gemma 2, holds H x T x T weights in several versions; they are most
    of what scoring takes here."""
    sizes = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    sizes |= dict(intermediate_size=32, num_key_value_heads=2, head_dim=4)
    if family == 'Gemma2': sizes |= dict(sliding_window=50)
    network = transformers.AutoModelForCausalLM.from_config(getattr(transformers,
                                                                    f'{family}Config')(**sizes)).eval()
    fused = needed_bytes(adapt(network), 1, 2, T) if family != 'Gemma2' else 0
    network.set_attn_implementation('eager')
    m, w, fit = adapt(network), windows(3, 1, T=T), windows(3, 2, T=T)
    config = SETTINGS.replace(n_sequences=3, batch_size=3, n_jacobian=1, jacobian_probes=4, n_bootstrap=10)
    assert needed_bytes(m, 1, 2, T) > 2 * fused
    for B in (1, 3):
        memory = needed_bytes(m, B, 3, T, n_bootstrap=10, n_jacobian=1, probes=4)
        plan = plan_memory(m, 3, T, config, memory)
        assert plan.sequences == B
        with scores_module.untouched(m), Live() as live: scores_module.measure(m, w, fit, config, plan=plan)
        print(f'{family}: {B} sequences, {live.most} of {memory} bytes')
        assert memory / 4 < live.most <= memory


def test_the_intervals_are_within_the_bound():
    "With many blocks, all pairs under all weights at once would take many times as much."
    torch.manual_seed(0)
    L, N, T = 24, 24, 16
    m = Transformer(ModelConfig(vocab_size=61, n_layers=L, d_model=16, n_heads=2, context_length=T)).eval()
    w, fit, config = (windows(N, 1, T=T), windows(6, 2, T=T),
                      SETTINGS.replace(n_sequences=N, n_jacobian=1, jacobian_probes=2, n_bootstrap=1000))
    memory = needed_bytes(m, 1, N, T, n_jacobian=1, probes=2)
    with scores_module.untouched(m):
        measured, *rest = scores_module.measure(m, w[:2], fit, config, swapped=choose_pairs(L))
    # as of N sequences
    many = {name: torch.cat(N // 2 * [x], 1 if name == 'variance' else -1) for name, x in measured.items()}
    with Live() as live: scores_module._estimate_scores(many, *rest, config, w, fit, 16, pair_intervals=True)
    print(f'{live.most} of {memory} bytes')
    assert live.most <= memory < 8 * 1001 * 5 * L * L


# --- intervals, ranks, usefulness as published, schema

def leave_one_out_by_hand(statistic, n):
    "Low and high ends from pseudo-values, one sequence left out in turn."
    whole, everyone = statistic(list(range(n))), range(n)
    pseudo = [n * whole - (n - 1) * statistic([k for k in everyone if k != i]) for i in everyone]
    low, high = stats.t.interval(.95, n - 1, loc=sum(pseudo) / n, scale=stats.sem(pseudo))
    return min(low, whole), max(high, whole)


@pytest.mark.parametrize('n', [2, 5, 32])
def test_the_interval_of_a_mean_is_that_of_the_textbook(n):
    data, W = (torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)),
               intervals.leave_one_out(n))
    got = intervals.jackknife_estimate(W @ data / W.sum(1))
    want = stats.t.interval(.95, n - 1, loc=data.mean().item(), scale=stats.sem(data.numpy()))
    assert ((got['low'], got['high']) == pytest.approx(want, rel=1e-6)
            and got['value'] == pytest.approx(data.mean().item()))


def test_one_sequence_has_no_interval(model):
    s = score(model, n_jacobian=1)['scalars']
    assert (s['jacobian_deviation']['value'] > 0 and s['jacobian_deviation']['low'] is None
            and s['jacobian_deviation']['high'] is None)
    assert s['loss']['low'] < s['loss']['value'] < s['loss']['high']


def skewed_pool(g):
    "Numbers of 2,000 sequences with a long tail to the right, (2000, 8 tokens), and a second kind."
    x = (torch.randn(2000, 1, dtype=torch.float64, generator=g) * .6
         + torch.randn(2000, 8, dtype=torch.float64, generator=g) * .5)
    return x.exp(), torch.rand(2000, dtype=torch.float64, generator=g) + 1


@pytest.mark.parametrize('n', [4, 32])
def test_intervals_hold_the_truth_as_often_as_they_say(n):
    "Of a ratio of means, of the norm of a mean vector, and of a median over tokens."
    g = torch.Generator().manual_seed(0)
    x, size = skewed_pool(g)
    statistics = dict(ratio=lambda W, x, size: (W @ x.mean(1)) / (W @ size),
                      norm=lambda W, x, size: ((W @ x) / W.sum(1, keepdim=True)).norm(dim=1))
    everything, W, hits = (torch.ones(1, 2000).double(), intervals.leave_one_out(n),
                           dict(ratio=0, norm=0, median=0))
    for _ in range(400):
        some = torch.randint(2000, (n,), generator=g)
        for name, f in statistics.items():
            got, truth = (intervals.jackknife_estimate(f(W, x[some], size[some])),
                          f(everything, x, size).item())
            hits[name] += got['low'] <= truth <= got['high']
        got = intervals.median_estimate(x[some])
        assert got['low'] <= got['value'] == x[some].median() <= got['high']
        hits['median'] += got['low'] <= x.median() <= got['high']
    assert all(360 <= hits[name] <= 395 for name in hits), hits


def test_a_magnitude_has_an_interval_that_holds_it_and_the_truth():
    "Pairs whose true changes are small beside the noise."
    g = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)
    W, hits, true = intervals.leave_one_out(24), dict(mean=0, single=0), .15 * normal(15)
    for _ in range(100):
        # (pairs, N + 1)
        change = (W @ (true + .6 * normal(24, 1) + .8 * normal(24, 15)) / W.sum(1, keepdim=True)).T
        ends = intervals.jackknife_estimate(change.abs().mean(0), 0.)
        assert 0 <= ends['low'] <= ends['value'] <= ends['high'] and ends['value'] == change.abs().mean(0)[0]
        hits['mean'] += ends['low'] <= true.abs().mean() <= ends['high']
        low, high = intervals.magnitude_ends(change)
        assert (low <= change[:, 0].abs()).all() and (change[:, 0].abs() <= high).all()
        hits['single'] += ((low <= true.abs()) & (true.abs() <= high)).double().mean().item()
    assert 90 <= hits['mean'] and 90 < hits['single'] <= 100


@pytest.mark.parametrize('seed', range(2))
def test_permutation_scores_lie_in_their_own_intervals(seed):
    "Random blocks: swaps hardly matter, so that all changes are within the noise."
    torch.manual_seed(seed)
    m = Transformer(ModelConfig(vocab_size=61, n_layers=6, d_model=16, n_heads=2, context_length=10)).eval()
    s = score_model(m, windows(12, seed), windows(30, 50 + seed),
                    SETTINGS.replace(n_sequences=12, n_jacobian=2), progress=False, pair_intervals=True)
    for e in s['scalars'].values(): assert e['low'] <= e['value'] <= e['high']
    assert s['scalars']['permutation']['low'] >= 0
    for name in ('causal', 'causal_max', 'permutation'):
        for values, low, high in zip(s['arrays'][name], s['intervals'][name]['low'],
                                     s['intervals'][name]['high']):
            for v, a, b in zip(values, low, high): assert (v, a, b) == (None,) * 3 or 0 <= a <= v <= b


def test_intervals_of_pairs_leave_out_one_sequence_in_turn(model):
    "The slow and obvious way."
    w = windows(6, 1)
    s = score_model(model, w, windows(40, 2), SETTINGS, progress=False, pair_intervals=True)
    plain = score(model)
    assert set(s['intervals']) - set(plain['intervals']) == {'causal', 'causal_max', 'permutation'}
    assert {**s, 'intervals': 0} == {**plain, 'intervals': 0}  # and nothing else changes
    t = trace(model, w)
    change, size, swapped = skip_effects(model, t)[0], update_sizes(t).double().sum(-1), swap_losses(model, t)
    for i, j in itertools.combinations(range(4), 2):
        low, high = leave_one_out_by_hand(lambda some: (change[i, j,
                                                               some].sum() / size[j, some].sum()).item(), 6)
        assert s['intervals']['causal']['low'][i][j] == pytest.approx(max(low, 0), rel=1e-4, abs=1e-7)
        assert s['intervals']['causal']['high'][i][j] == pytest.approx(high, rel=1e-4)
        a, b = leave_one_out_by_hand(lambda some: (swapped[i, j,
                                                           some].mean() / t.loss[some].mean() - 1).item(), 6)
        want = (0, max(-a, b)) if a < 0 < b else (min(abs(a), abs(b)), max(abs(a), abs(b)))
        got = [s['intervals']['permutation'][end][i][j] for end in ('low', 'high')]
        assert (got == pytest.approx(want, rel=1e-3, abs=1e-6)
                and got == [s['intervals']['permutation'][end][j][i] for end in ('low', 'high')])
    assert (s['intervals']['causal']['low'][2][1] is None
            and s['intervals']['permutation']['low'][1][1] is None)


def test_intervals_by_layer_leave_out_one_sequence_in_turn(model):
    w, s = windows(6, 1), score(model)
    variance = token_variances(trace(model, w)).mean(-1).detach()                  # (L + 1, N)
    for l in range(5):
        want = leave_one_out_by_hand(lambda some: variance[l, some].mean().item(), 6)
        got = s['intervals']['variance_mean']
        assert (got['low'][l], got['high'][l]) == pytest.approx((max(want[0], 0), want[1]), rel=1e-6)
    assert set(s['intervals']) >= {'usefulness_ratio', 'linear_loss_increase', 'skip_loss_increase',
                                   'variance_mean', 'jacobian_per_token', 'jacobian_published'}
    for name, ends in s['intervals'].items():
        assert len(ends['low']) == len(ends['high']) == len(s['arrays'][name])
        for low, value, high in zip(ends['low'], s['arrays'][name], ends['high']): assert low <= value <= high


def test_usefulness_as_published_is_fitted_on_the_scored_tokens_and_transposed(model):
    w, plain = windows(6, 1), score(model)
    got = score_model(model, w, windows(40, 2), SETTINGS, progress=False, as_published=True)
    with torch.no_grad(): streams = [h.double().flatten(0, 1) for h in trace(model, w).streams]
    for l in range(1, 5):
        X = torch.cat([streams[l - 1], torch.ones(60, 1)], 1)
        # whole streams: the identity is part of the map
        S = torch.linalg.lstsq(X, streams[l]).solution.float()
        wrong = edited(model, {l: Affine(S[:-1] - torch.eye(16), S[-1])})  # x S.T + b in place of x S + b
        assert got['arrays']['usefulness_ratio_as_published'][l - 1] == pytest.approx(
            mean_loss(wrong, w) / mean_loss(model, w), rel=1e-3)
    assert got['scalars'].pop('usefulness_as_published')['value'] == sum(
        r > 1.10 for r in got['arrays'].pop('usefulness_ratio_as_published')) / 4
    got['intervals'].pop('usefulness_ratio_as_published')
    assert got == plain                                                            # and nothing else changes


def test_undetermined_maps_are_reported(model):
    assert (score(model)['arrays']['fit_rank'] == [16] * 4
            and score(model)['settings']['undetermined_fits'] == [])
    model.embedding.weight.data[:, 3:] = 0
    model.blocks[0] = Skip()
    s = score(model)
    assert s['arrays']['fit_rank'] == [3, 3, 16, 16] and s['settings']['undetermined_fits'] == [1, 2]


@pytest.mark.parametrize('scale, offset', [(1e-5, 0.), (1e7, 300.)])
def test_one_channel_on_another_scale_leaves_the_maps_determined(model, scale, offset):
    "An exactly affine block stays one, whatever the scale of a channel, and far from 0."
    generator = torch.Generator().manual_seed(3)
    model.embedding.weight.data[:, 0] *= scale
    model.embedding.weight.data[:, 1] += offset
    model.blocks[0] = Skip()
    A = torch.randn(16, 16, generator=generator) / 2
    A[:, :2] = 0  # the loud channels are read by nobody
    model.blocks[1] = Affine(A)
    s = score(model)
    assert s['arrays']['fit_rank'][:2] == [16, 16] and not {1, 2} & set(s['settings']['undetermined_fits'])
    assert s['arrays']['usefulness_ratio'][1] == pytest.approx(1, abs=1e-4)


def test_the_schema_describes_every_part():
    described = SCORES_SCHEMA['properties']
    assert (all(isinstance(entry, dict) for entry in described.values())
            and SCORES_SCHEMA['$id'].endswith('/sparsecod/scores.schema.json'))
    assert all(entry['title'] and entry['description']
               for part in (described, described['sparsity']['properties'])
               for entry in part['scalars']['properties'].values())
    assert all(entry['title'] and entry['description'] for entry in described['arrays']['properties'].values()
               if 'unit' in entry)


@pytest.mark.parametrize('options', [{}, dict(as_published=True, probes=4, pair_intervals=True),
                                     dict(layers=1, pair_intervals=True)])
def test_results_satisfy_the_schema(model, options):
    if options.get('layers'): model.blocks = model.blocks[:1]
    config, more = (SETTINGS.replace(jacobian_probes=options.get('probes')),
                    {k: v for k, v in options.items() if k in ('as_published', 'pair_intervals')})
    result = score_model(model, windows(6, 1), windows(40, 2), config, progress=False, **more)
    jsonschema.Draft202012Validator.check_schema(SCORES_SCHEMA)
    check = jsonschema.Draft202012Validator(SCORES_SCHEMA)
    check.validate(json.loads(json.dumps(result)))
    described = SCORES_SCHEMA['properties']['arrays']['properties']
    assert (set(result['arrays']) <= set(described)
            and all(entry['description'] for entry in described.values()))
    for part, name in itertools.product(('scalars', 'arrays'), ('loss', 'fit_rank')):
        broken = copy.deepcopy(result)
        if broken[part].pop(name, None) is not None: assert not check.is_valid(broken)
    assert not check.is_valid(result | dict(arrays=result['arrays'] | dict(usefulness_ratio=['useful'])))
    later = {part: result[part] | dict(of_tomorrow=result[part][name])
             for part, name in (('scalars', 'loss'), ('arrays', 'fit_rank'))}
    check.validate(json.loads(json.dumps(result | later)))  # a score that is added makes no file invalid


# --- what can be given

TEXT = ' '.join(f'word{(i * k) % 97}' for i in range(1, 40) for k in range(1, 40))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A stock checkpoint with its tokenizer, and the tokenizer."
    tokenizer, folder = train_bpe([TEXT], 300), tmp_path_factory.mktemp('saved')
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32,
        bos_token_id=None, eos_token_id=0, pad_token_id=None))
    network.save_pretrained(folder)
    tokenizer.backend.save(str(folder / 'tokenizer.json'))
    return folder, tokenizer


FEW = ScoreConfig(n_sequences=6, n_fit=20, n_jacobian=1, n_bootstrap=20)


def test_a_folder_and_a_text_are_enough(saved, tmp_path):
    folder, tokenizer = saved
    (tmp_path / 'one.txt').write_text(TEXT, encoding='utf-8')
    (tmp_path / 'texts').mkdir()
    for k in range(3): (tmp_path / 'texts' / f'{k}.txt').write_text(TEXT[k * 2000:], encoding='utf-8')
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    from_text = score_model(folder, TEXT, config=FEW, progress=False)
    # all the room the model has
    assert from_text['settings']['T'] == 32 and from_text['settings']['n_sequences'] == 6
    assert from_text == score_model(str(folder), [TEXT], config=FEW,
                                    progress=False) == score_model(network, TEXT, config=FEW, progress=False)
    assert from_text == score_model(network, TEXT, config=FEW, progress=False, tokenizer=tokenizer)
    assert from_text == score_model(folder, tmp_path / 'one.txt', config=FEW,
                                    progress=False) == score_model(folder, str(tmp_path / 'one.txt'),
                                                                   config=FEW, progress=False)
    several = score_model(folder, tmp_path / 'texts', config=FEW, length=16, progress=False)
    assert several['settings']['T'] == 16 and several['scalars']['loss'] != from_text['scalars']['loss']


def test_windows_of_text_are_the_text(saved):
    _, tokenizer = saved
    strip, size = windows_module.text_tokens([TEXT, TEXT, 'something else'], tokenizer)
    assert (tokenizer.decode(strip) == TEXT + tokenizer.eos_token + 'something else' + tokenizer.eos_token
            and size == len(TEXT) + 14)
    to_score, to_fit = windows_module.text_windows(TEXT, tokenizer, 16, FEW.n_sequences, FEW.n_fit, FEW.seed)
    assert to_score.shape == (6, 17) and to_fit.shape[1] == 17 and 15 < len(to_fit) <= 20
    whole = TEXT + tokenizer.eos_token
    assert all(tokenizer.decode(w) in whole for w in torch.cat([to_score, to_fit]))
    assert not set(map(tuple, to_score.tolist())) & set(map(tuple, to_fit.tolist()))
    assert torch.equal(to_score, windows_module.text_windows(TEXT, tokenizer, 16, FEW.n_sequences, FEW.n_fit,
                                                             FEW.seed)[0])
    assert not torch.equal(to_score,
                           windows_module.text_windows(TEXT, tokenizer, 16, FEW.n_sequences, FEW.n_fit, 1)[0])


def test_too_little_text_says_how_much_it_takes(saved):
    folder, _ = saved
    with pytest.raises(ValueError,
                       match=r'the text has \d+ tokens; to score 6 sequences of 32 tokens and to fit affine '
                             r'maps on 20 others takes 833 tokens, about \d+ kB'):
        score_model(folder, TEXT[:500], config=FEW, progress=False)
    with pytest.raises(ValueError, match=r"data='no_such_file.txt' is no file or folder here"):
        score_model(folder, 'no_such_file.txt', config=FEW, progress=False)
    with pytest.raises(ValueError, match='no_such_file.txt'):
        score_model(folder, Path('no_such_file.txt'), config=FEW, progress=False)
    with pytest.raises(ValueError, match='there is no text'):
        score_model(folder, [], config=FEW, progress=False)


def test_text_needs_a_tokenizer(model, saved):
    folder, tokenizer = saved
    with pytest.raises(ValueError, match='name one with tokenizer='):
        score_model(model, TEXT, config=FEW, progress=False)
    with pytest.raises(ValueError, match='fit_windows'):
        score_model(folder, TEXT, windows(4), FEW, progress=False)
    with pytest.raises(ValueError, match='the model knows 0 to 60'):
        score_model(model, TEXT, config=FEW, length=10, tokenizer=folder, progress=False)


def test_wide_models_get_more_text_to_fit_on():
    assert (text_config(64, 128) == ScoreConfig() and text_config(4096, 256).n_fit == 64
            and text_config(4096, 128).n_fit == 128)


def test_ready_windows_are_split(model):
    both = torch.cat([windows(6, 1), windows(40, 2)])
    assert score_model(model, both, config=SETTINGS, progress=False) == score(model)
    with pytest.raises(ValueError, match='windows holds 6 sequences; n_sequences=6'):
        score_model(model, both[:6], config=SETTINGS, progress=False)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.bool, torch.int32, torch.uint8])
@pytest.mark.parametrize('name', ['windows', 'fit_windows'])
def test_sequences_of_another_dtype_are_refused(model, name, dtype):
    given = dict(windows=windows(6, 1), fit_windows=windows(40, 2))
    given[name] = given[name].to(dtype)
    with pytest.raises(ValueError, match=f'^{name} .*{dtype}.*allowed.*int64'):
        score_model(model, config=SETTINGS, progress=False, **given)


@pytest.mark.parametrize('kind', ['ours', 'GPT2'])
def test_sequences_longer_than_the_context_are_refused(model, kind):
    m, limit = (model, 10) if kind == 'ours' else (tiny(kind), 32)
    with pytest.raises(ValueError,
                       match=f'windows holds sequences of T={limit + 1} tokens; this model was made for at '
                             f'most {limit}'):
        score_model(m, windows(6, 1, T=limit + 1), windows(40, 2, T=limit + 1), SETTINGS, progress=False)
    assert score_model(m, windows(6, 1, T=limit), windows(40, 2, T=limit), SETTINGS,
                       progress=False)['settings']['T'] == limit


@pytest.mark.parametrize('kind, value', [('ours', math.nan), ('Llama', -math.inf)])
def test_a_model_that_is_not_finite_is_refused_by_the_name_of_its_weights(model, kind, value, tmp_path):
    network = model if kind == 'ours' else tiny(kind)
    name, weights = list(network.named_parameters())[-3]
    with torch.no_grad(): weights.view(-1)[5] = value
    with pytest.raises(ValueError, match=f'not finite.*{name}'):
        score_model(network, windows(6, 1), windows(40, 2), SETTINGS, progress=False,
                    resume=tmp_path / 'parts')
    assert not (tmp_path / 'parts').exists()                                       # nothing was begun
    with pytest.raises(ValueError, match=f'not finite.*{name}'): measure_sparsity(network, windows(2)[:, :-1])


@pytest.mark.parametrize('factor', [1e18, 1e30])
def test_weights_that_overflow_are_refused_by_the_block(model, factor):
    with torch.no_grad():
        for p in model.blocks[2].parameters(): p.mul_(factor)
    with pytest.raises(ValueError, match='block 3.*finite'): score(model)


@pytest.mark.parametrize('have, named', [(0, 'n_sequences=6'), (5, 'n_sequences=6'), (6, 'n_sequences=6'),
                                         (7, 'n_fit=40'), (45, 'n_fit=40'), (46, None), (99, None)])
def test_too_little_held_out_text_is_named_by_the_field(have, named):
    check = lambda: scores_module.check_held_out(have, 10, SETTINGS)
    if named is None: return check()
    with pytest.raises(ValueError, match=named) as error: check()
    assert '461' in str(error.value) and 'T=10' in str(error.value)                # (6 + 40) x 10 + 1 tokens


def test_a_study_refuses_too_little_held_out_text_before_it_trains(tmp_path, monkeypatch):
    text = tmp_path / 'text.txt'
    text.write_text('\n'.join(f'def f{i}(x): return x + {i * 37 % 101}' for i in range(300)),
                    encoding='utf-8')
    monkeypatch.setenv('SPARSECOD_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(studies, 'train', lambda *args, **options: pytest.fail('it trained'))
    config = studies.vary(studies.SCALES['tiny'], {'data.source': str(text), 'data.vocab_size': 300,
                                                   'data.max_document_bytes': 500, 'score.n_fit': 5000})
    with pytest.raises(ValueError, match='n_fit=5000|n_sequences=16'):
        studies.run(config, tmp_path / 'out', tmp_path / 'work', progress=False)


@pytest.mark.parametrize('where', ['.', 'a_file/scores.json', 'new/folder/scores.json', 'scores.json'])
def test_a_file_that_cannot_be_written_is_named_before_the_work(tmp_path, where):
    (tmp_path / 'a_file').write_text('', encoding='utf-8')
    (tmp_path / 'scores.json').write_text('old', encoding='utf-8')
    if where in ('.', 'a_file/scores.json'):
        with pytest.raises(OSError, match=re.escape(str(tmp_path))): studies.check_file(tmp_path / where)
    else: studies.check_file(tmp_path / where)
    assert (not list(tmp_path.rglob('*.draft'))
            and (tmp_path / 'scores.json').read_text(encoding='utf-8') == 'old')


class NoFp64(torch.Tensor):
    "As a tensor on a device without fp64: what is made of it is of its kind until it is brought to the CPU."
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name, options = getattr(func, '__name__', ''), kwargs or {}
        if name == 'double' or any(x is torch.float64 for x in (*args, options.get('dtype'))):
            raise TypeError('this device has no float64')
        out = super().__torch_function__(func, types, args, options)
        plain = lambda x: x.as_subclass(torch.Tensor) if isinstance(x, cls) else x
        return tree_map(plain, out) if name in ('cpu', 'tolist', 'item') else out


def on_a_device_without_fp64(network):
    moved = copy.deepcopy(network)
    for part in moved.modules():
        for name, p in part._parameters.items():
            if p is not None: part._parameters[name] = nn.Parameter(p.detach().as_subclass(NoFp64))
    with pytest.raises(TypeError): next(moved.parameters()).double()
    return moved


@pytest.mark.parametrize('options', [{}, dict(jacobian_probes=4, experts=True)])
def test_a_device_without_fp64_gives_the_same_scores(model, options):
    if options.pop('experts', False): model = Transformer(model.config.replace(n_experts=4)).eval()
    want = score(model, **options)
    w, fit = windows(6, 1).as_subclass(NoFp64), windows(40, 2).as_subclass(NoFp64)
    got = score_model(on_a_device_without_fp64(model), w, fit, SETTINGS.replace(**options), progress=False,
                      as_published=True)
    for name, s in want['scalars'].items():
        assert got['scalars'][name]['value'] == pytest.approx(s['value'], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize('experts', [0, 4])
def test_a_device_without_fp64_gives_the_same_sparsity_and_measures(model, experts):
    model = Transformer(model.config.replace(n_experts=experts)).eval()
    moved, tokens = on_a_device_without_fp64(model), windows(3)
    assert measure_sparsity(moved, tokens[:, :-1].as_subclass(NoFp64))['scalars'] == pytest.approx(
        measure_sparsity(model, tokens[:, :-1])['scalars'], rel=1e-5)
    for name, s in _at_length(model, tokens).items():
        assert _at_length(moved,
                         tokens.as_subclass(NoFp64))[name]['value'] == pytest.approx(s['value'], rel=1e-5)
    want, got = (compare_with_theory(model, tokens[:, :-1]),
                 compare_with_theory(moved, tokens[:, :-1].as_subclass(NoFp64)))
    assert want.keys() == got.keys() and got['measured'] == pytest.approx(want['measured'], rel=1e-4)


def test_new_settings_leave_names_of_old_runs_alone():
    """A run is named after the fields that differ from their defaults; results of old runs must still be
    found."""
    from sparsecod.studies import _changed_fields
    assert (_changed_fields(ScoreConfig()) == {}
            and _changed_fields(ScoreConfig(jacobian_probes=8)) == dict(jacobian_probes=8))
    assert ScoreConfig.from_dict(dict(n_sequences=32, n_fit=64, n_jacobian=4, batch_size=16, threshold=1.1,
                                      n_bootstrap=1000, seed=0)) == ScoreConfig()


# --- sampled pairs

def deep(n=9):
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=61, n_layers=n, d_model=16, n_heads=2, context_length=10,
                                   init_std=.3)).eval()


def test_up_to_16_blocks_all_pairs_are_swapped():
    for n in range(2, 17):
        assert choose_pairs(n).sum() == n * (n - 1) // 2 == choose_pairs(n, 0).sum() == choose_pairs(
            n, 10 ** 6).sum()
    for n in (17, 30, 80):
        chosen = choose_pairs(n)
        assert chosen.sum() == 2 * n and chosen.diagonal(1).all() and not chosen.tril().any()
        assert (choose_pairs(n, 0).sum() == n * (n - 1) // 2
                and not torch.equal(chosen, choose_pairs(n, seed=1)))
        for pairs in (n + 3, 2 * n + 1, n * (n - 1) // 2 - 1):
            assert choose_pairs(n, pairs).sum() == pairs and choose_pairs(n, pairs)[0, 2:].sum() >= 2
    for n, pairs in ((3, 1), (9, 11), (30, 32), (30, -1)):
        with pytest.raises(ValueError, match=f'pairs={pairs}'): choose_pairs(n, pairs)


def test_sampled_pairs_have_no_bias_and_state_their_error():
    "Over many draws, of swaps whose cost is skewed: block 1 is dear, and one other pair too."
    costs = torch.rand(20, 20, generator=torch.Generator().manual_seed(0)).double().triu(1).square()
    costs[0] *= 20
    costs[7, 15] = 9
    draws = [choose_pairs(20, 50, seed) for seed in range(1500)]
    for part in (0, 1):  # all pairs; those without block 1
        true = pair_mean(costs[part:, part:])
        found = torch.stack([(_pair_weights(c) * costs)[part:].sum() / (190, 171)[part] for c in draws])
        errors = torch.stack([_pair_errors(costs, c)[part] for c in draws])
        assert abs(found.mean() - true) < 4 * found.std() / 1500 ** .5 and found.std() > .02 * true
        assert errors.square().mean().sqrt() / found.std() == pytest.approx(1, abs=.12)
    assert ((_pair_errors(costs, choose_pairs(20, 0)) == 0).all()
            and torch.equal(_pair_weights(choose_pairs(20, 0)), choose_pairs(20, 0).double()))


def test_scores_with_some_pairs():
    model, w, fit = deep(), windows(6, 1), windows(40, 2)
    every, some = (score_model(model, w, fit, SETTINGS, progress=False, pair_intervals=True, pairs=pairs)
                   for pairs in (None, 20))
    jsonschema.validate(some, SCORES_SCHEMA)
    assert ((every['settings']['pairs'], some['settings']['pairs']) == (36, 20)
            and 'error' not in every['scalars']['permutation'])
    whole, part = every['arrays']['permutation'], some['arrays']['permutation']
    known = [(i, j) for i in range(9) for j in range(9) if part[i][j] is not None]
    assert len(known) == 40 and all(part[i][j] == whole[i][j] and part[j][i] == whole[i][j] for i, j in known)
    chosen = choose_pairs(9, 20, SETTINGS.seed)
    values = torch.tensor([[x or 0. for x in row] for row in whole]).double()
    for k, name in enumerate(('permutation', 'permutation_without_block_1')):
        got = some['scalars'][name]
        assert got['value'] == pytest.approx(((_pair_weights(chosen) * values)[k:].sum() / (36, 28)[k]).item())
        assert got['error'] == pytest.approx(_pair_errors(values, chosen)[k].item()) and got['error'] > 0
        assert (got['low'] <= max(0, got['value'] - 1.96 * got['error'])
                and got['high'] >= got['value'] + 1.96 * got['error'])
    assert {n: s for n, s in every['scalars'].items()
            if 'permutation' not in n} == {n: s for n, s in some['scalars'].items() if 'permutation' not in n}


def test_only_the_chosen_pairs_are_run(tmp_path):
    model, w, fit = deep(), windows(6, 1), windows(40, 2)
    chosen, seen = choose_pairs(9, 20), []
    hooks = [block.register_forward_hook(lambda *_: seen.append(1)) for block in model.blocks]
    maps = fit_blocks(model, fit)
    seen.clear()
    scores_module.measure_batch(model, w, maps, swapped=chosen)
    for hook in hooks: hook.remove()
    costs = scores_module._batch_costs(9, swapped=chosen)
    assert (len(seen) == sum(costs.values()) < scores_module.block_runs(9)
            and costs['swap-1'] == 9 * chosen[0].sum())
    score_model(model, w, fit, SETTINGS, progress=False, resume=tmp_path, pairs=20)
    with pytest.raises(ValueError, match='pairs'):
        score_model(model, w, fit, SETTINGS, progress=False, resume=tmp_path, pairs=21)


def test_expected_time_grows_with_the_work():
    model, w, fit = deep(12), windows(6, 1), windows(40, 2)
    for part in range(3):
        some, every = (scores_module.expected_seconds(model, w, fit, SETTINGS, pairs=pairs)
                       for pairs in (15, 0))
    assert 0 < some and 0 < every < 600
    one, costs = scores_module.measured_costs(model, w, 4)
    assert one > 0 and min(costs) > 0
    plan, work = plan_memory(model, 6, 10, SETTINGS), scores_module.planned_work
    total = lambda pairs: sum(work(model, w, fit, SETTINGS, plan, False, choose_pairs(12, pairs),
                                   costs).values())
    assert total(0) - total(15) == pytest.approx(
        sum(6 * (13 - i + costs.loss) * (12 - i - choose_pairs(12, 15)[i - 1].sum().item())
            for i in range(1, 12)))


def test_a_table_holds_every_number(model):
    found = score_model(model, windows(6, 1), windows(40, 2), SETTINGS, progress=False, pair_intervals=True)
    table = scores_frame(found)
    at = (lambda name,
          *place: table[(table.score == name) & (table.block.fillna(-1) == (place or (-1,))[0]) & (
              table.other.fillna(-1) == (*place, -1, -1)[1])])
    for name, scalar in found['scalars'].items():
        assert at(name).value.tolist() == [scalar['value']] and at(name).low.tolist() == [scalar['low']]
    for l, x in enumerate(found['arrays']['skip_loss_increase'], 1):
        assert at('skip_loss_increase', l).value.tolist() == [x]
    for l, x in enumerate(found['arrays']['variance_mean']):
        assert at('variance_mean', l).value.tolist() == [x]
    for s, row in enumerate(found['arrays']['causal'], 1):
        for l, x in enumerate(row, 1):
            assert at('causal', s, l).value.tolist() == ([] if x is None else [x])
            if x is not None:
                assert at('causal', s,
                          l).high.tolist() == [found['intervals']['causal']['high'][s - 1][l - 1]]
    numbers = sum(x is not None for a in found['arrays'].values() for row in a
                  for x in (row if isinstance(row, list) else [row]))
    assert len(table) == numbers + sum(s['value'] is not None for s in found['scalars'].values())
