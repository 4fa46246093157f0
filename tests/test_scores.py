"""Scores: known answers, slow references, and one test for each trap in the official code (reference: chapter on scores)."""
import copy
import itertools

import pytest
import torch
from torch import nn

from sparsecod.core import BlockOutput, ModelConfig, Transformer
from sparsecod.scores import (AffineFit, ScoreConfig, causal_ratio, fit_blocks, score_model, skip_effects, swap_losses,
                              token_variances, trace, update_sizes)

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


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=61, n_layers=4, d_model=16, n_heads=2, n_kv_heads=1, context_length=10, init_std=.3)
    return Transformer(config).eval()


def score(model, seed=1, **changes):
    return score_model(model, windows(6, seed), windows(40, seed + 1), SETTINGS.replace(**changes), progress=False)


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
        assert got[s - 1] == pytest.approx(mean_loss(edited(model, {s: Skip()}), w) - mean_loss(model, w), abs=1e-5)


def test_permutation_equals_full_forwards(model):
    w, got = windows(6, 1), score(model)['arrays']['permutation']
    base = mean_loss(model, w)
    for i, j in itertools.combinations(range(1, 5), 2):
        swapped = mean_loss(edited(model, {i: model.blocks[j - 1], j: model.blocks[i - 1]}), w)
        assert got[i - 1][j - 1] == got[j - 1][i - 1] == pytest.approx(abs(swapped - base) / base, rel=1e-3, abs=1e-6)


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
        assert estimate['low'] <= estimate['high']


# --- the traps, by their number in the list of the chapter on corrections

def test_trap_1_affine_block_is_not_useful(model):
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(16, 16, generator=generator)               # far from symmetric: a transposed map would show
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
    few = windows(2, 5)                                                   # 20 tokens, 17 free numbers a channel
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
    assert value(sink, 'final_variance_without_first') == pytest.approx(value(plain, 'final_variance_without_first'))
    assert value(sink, 'final_variance_median') == pytest.approx(value(plain, 'final_variance_median'), rel=.2)


def test_trap_12_prefix_is_not_run_again(model):
    "Skipping block s runs only the blocks after it; swapping i and j only the blocks from i on."
    with torch.no_grad():
        t = trace(model, windows(6, 1))
        calls = []
        hooks = [b.register_forward_hook(lambda *_, l=l: calls.append(l)) for l, b in enumerate(model.blocks, 1)]
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


@pytest.mark.parametrize('field, value', [('n_sequences', 0), ('batch_size', -1), ('threshold', 0), ('n_jacobian', 99)])
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


def test_modes_of_all_parts_are_restored(model):
    model.train()
    model.blocks[1].eval()
    before = [m.training for m in model.modules()]
    score(model)
    assert [m.training for m in model.modules()] == before and len(set(before)) == 2


def test_interventions_keep_no_graph(model):
    t = trace(model, windows(4))
    change, loss = skip_effects(model, t)
    assert not any(x.requires_grad for x in (*t.streams, t.loss, change, loss, swap_losses(model, t), fit_blocks(model, windows(40, 3))[0][0]))


@pytest.mark.parametrize('changes', [dict(n_kv_heads=2), dict(n_experts=4), dict(norm='peri_ln'), dict(tie_embeddings=True), dict(context_length=2)])
def test_every_kind_of_model_is_scored(changes):
    torch.manual_seed(0)
    base = dict(vocab_size=61, n_layers=3, d_model=16, n_heads=2, context_length=10, init_std=.3)
    m = Transformer(ModelConfig(**{**base, **changes})).eval()
    T = m.config.context_length
    s = score_model(m, windows(6, 1, T), windows(60, 2, T), SETTINGS, progress=False)
    assert all(e['value'] is not None and e['low'] <= e['high'] for e in s['scalars'].values())
    assert s['settings']['n_sequences'] == 6 and s['settings']['T'] == T
