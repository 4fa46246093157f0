"""Thirteen traps: each variant as published against an independent reference, ours against a known answer,
and the record of both."""
import importlib.util
import json
import re
import math
import statistics

import pytest
import torch
from torch.nn import functional

from sparsecod.core import ModelConfig, Transformer
from sparsecod.corrections import (_JUDGED_BY, _TRAPS, AffineBlock, affine_ratios, auxiliary_weights,
                                   _branch_variances, causal_from_states, choices, _chosen_scores,
                                   _closing_table, combine, _context_rows, corrections, corrections_table,
                                   _decay_rows, decaying, _full_block_runs, _gate_rows,
                                   _last_variances, mean_score, mean_with_sink, ordered, _padded_loss,
                                   _permutation_score, ratio, rounding, row,
                                   _seen_and_unseen, states, _with_block, _with_embeddings_scaled, _with_gates)
from sparsecod.data import Corpus
from sparsecod.scores import ScoreConfig, causal_ratio, score_model, skip_effects, trace, update_sizes
from sparsecod.studies import load_results
from sparsecod.train import TrainConfig

D, L, T, V = 16, 4, 24, 64


def make_model(seed=0, **changes):
    "A random model whose blocks matter."
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**{**dict(vocab_size=V, n_layers=L, d_model=D, n_heads=2, context_length=T,
                                             init_std=.25), **changes})).eval()


def written_by(model, n, seed):
    "Text that the model drew itself: no change of the model can lower its expected loss."
    return model.generate(make_windows(n, seed)[:, :1], n_new=T,
                          generator=torch.Generator().manual_seed(seed))


def make_windows(n, seed):
    return torch.randint(V, (n, T + 1), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def model(): return make_model()


@pytest.fixture(scope='module')
def windows(): return make_windows(16, 1)


@pytest.fixture(scope='module')
def fit_windows(): return make_windows(48, 2)


@pytest.fixture(scope='module')
def corpus(): return Corpus.from_texts([f'def f{i}(x): return x + {i * 37 % 101}\n' * 12 for i in range(40)])


# ---- rows

def test_every_trap_has_a_name_and_a_main_quantity():
    assert list(_TRAPS) == list(_JUDGED_BY) == list(range(1, 14)) and all(_TRAPS.values())


@pytest.mark.parametrize('published, ours, expected', [(2, 1, 2), (1, 2, .5), (-3, -1, 3), (0, 0, 1),
                                                       (5, 0, math.inf), (0, 5, math.nan), (-1, 1, math.nan)])
def test_ratio(published, ours, expected):
    assert ratio(published, ours) == pytest.approx(expected, nan_ok=True)


def test_row_names_a_wrong_trap():
    with pytest.raises(ValueError, match='trap=14 must be one of 1 to 13'): row(14, 'loss', 1, 1)


def test_row_can_be_stored():
    made = row(1, 'cost', torch.tensor(2.), 1, detail=dict(x=torch.tensor([1., math.nan])))
    assert json.loads(json.dumps(made)) == dict(trap=1, quantity='cost', as_published=2.0, ours=1.0, note='',
                                                detail=dict(x=[1.0, None]))


def test_combining_is_geometric_and_keeps_signs():
    found = combine([row(13, 'loss', 2, 4), row(13, 'loss', 8, 1), row(12, 'runs', 3, 2),
                     row(1, 'cost', -1, 1), row(1, 'cost', 2, 1), row(3, 'idle', 1, 0)])
    loss, runs, cost, idle = found
    assert (loss['ratio'][0] == pytest.approx(2) and loss['as_published'][0] == pytest.approx(4)
            and loss['n'] == 2)
    assert runs['ratio'] == (1.5, 1.5, 1.5)                       # one model: no interval
    assert math.isnan(cost['ratio'][0]) and cost['as_published'][0] == .5
    assert idle['ratio'][0] == math.inf


def test_intervals_are_over_models():
    logs = [.1, .4, .2]
    value, low, high = combine([row(5, 'causal score', math.exp(x), 1) for x in logs])[0]['ratio']
    # Student, 2 degrees of freedom
    mean, half = statistics.mean(logs), 4.302653 * statistics.stdev(logs) / 3 ** .5
    assert [math.log(x) for x in (value, low, high)] == pytest.approx([mean, mean - half, mean + half],
                                                                      abs=1e-5)


def test_the_largest_effect_comes_first_in_either_direction():
    rows = [row(13, 'loss', .99, 1), row(11, 'loss', .1, 1), row(5, 'causal score', 3, 1),
            row(1, _JUDGED_BY[1], -1, 1), row(3, 'another quantity', 99, 1)]
    assert [c['trap'] for c in ordered(rows)] == [11, 5, 13, 1]
    assert _closing_table(rows).count('\n') == 1 + 4


def test_tables_choose_traps():
    table = corrections_table([row(12, 'runs', 3, 2), row(13, 'loss', 1, 2)], 12)
    assert 'runs' in table and 'loss' not in table


# ---- 1 and 2

def test_an_affine_block_is_not_useful_unless_transposed(model):
    torch.manual_seed(1)
    A, b = torch.randn(D, D) / 4, torch.randn(D)
    affine, hidden = (_with_block(model, 3, AffineBlock(M, b)) for M in (A, (A + A.T) / 2))
    found = affine_ratios(affine, written_by(affine, 16, 1), written_by(affine, 48, 2))
    assert (found['ours'][2] == pytest.approx(1, abs=1e-3)
            and found['same tokens'][2] == pytest.approx(1, abs=1e-3))
    assert found['transposed'][2] > 1.01 and found['both'][2] > 1.01
    found = affine_ratios(hidden, written_by(hidden, 16, 1), written_by(hidden, 48, 2))
    assert found['transposed'][2] == pytest.approx(1, abs=1e-3)


def test_transposed_means_the_matrix_of_least_squares_transposed(model, windows, fit_windows):
    fitted, scored = trace(model, fit_windows), trace(model, windows)
    x, y = (h.flatten(0, 1).double() for h in fitted.streams[1:3])
    # the whole map h_1 -> h_2, (D + 1, D)
    solution = torch.linalg.lstsq(functional.pad(x, (0, 1), value=1), y).solution
    for name, M in dict(ours=solution[:-1], transposed=solution[:-1].T).items():
        h = (scored.streams[1].double() @ M + solution[-1]).float()
        loss = model.token_losses(model.run(h, start=2), scored.targets).mean() / scored.loss.mean()
        assert affine_ratios(model, windows, fit_windows)[name][1] == pytest.approx(loss.item(), rel=1e-4)


def test_scores_agree_with_score_model(model, windows, fit_windows):
    s = score_model(model, windows, fit_windows,
                    ScoreConfig(n_sequences=16, n_fit=48, n_jacobian=1, n_bootstrap=2), progress=False,
                    as_published=True)
    found = affine_ratios(model, windows, fit_windows)
    for name, array in dict(ours='usefulness_ratio', both='usefulness_ratio_as_published').items():
        assert found[name].tolist() == pytest.approx(s['arrays'][array], rel=1e-5)
    assert _permutation_score(model, windows) == pytest.approx(s['scalars']['permutation']['value'], rel=1e-5)
    assert mean_score(causal_from_states(model, windows)) == pytest.approx(s['scalars']['causal']['value'],
                                                                           rel=1e-4)
    assert _last_variances(model, windows)[0] == pytest.approx(s['scalars']['final_variance']['value'],
                                                              rel=1e-5)
    chosen = _chosen_scores(model, windows, fit_windows, torch.ones(1, 16).double())
    assert {k: v.item() for k, v in chosen.items()} == pytest.approx({k: s['scalars'][k]['value']
                                                                      for k in chosen}, rel=1e-5)


def test_replacing_a_block_leaves_the_model_alone(model):
    block = model.blocks[1]
    changed = _with_block(model, 2, AffineBlock(torch.zeros(D, D), torch.zeros(D)))
    assert (model.blocks[1] is block and changed.blocks[1] is not block
            and isinstance(changed.blocks[1], AffineBlock))


# ---- 3 and 4

def test_causal_scores_from_states_are_those_of_the_scores_module(model, windows):
    t = trace(model, windows)
    expected = causal_ratio(skip_effects(model, t)[0].sum(-1), update_sizes(t).double().sum((1, 2)))
    torch.testing.assert_close(causal_from_states(model, windows), expected, rtol=1e-4, atol=1e-6,
                               equal_nan=True)


def test_the_shift_compares_with_the_next_block(model, windows):
    t, s = trace(model, windows), 2
    h, later = t.streams[s - 1], {}
    for l in range(s + 1, L + 1):
        after = model.run(h, start=l - 1, stop=l)
        later[l], h = after - h, after
    shifted = causal_from_states(model, windows, shifted=True)
    for l in range(s + 1, L):
        expected = (later[l + 1] - t.updates[l - 1]).norm(dim=-1).sum() / t.updates[l - 1].norm(dim=-1).sum()
        assert shifted[s - 1, l - 1].item() == pytest.approx(expected.item(), rel=1e-4)
    assert shifted[:, -1].isnan().all() and len(states(model, windows, s, shifted=True)) == L


@pytest.mark.parametrize('seed', range(3))
def test_the_shift_and_the_norm_act_together_on_the_last_column(windows, seed):
    """From lists of states as the decorator of the library makes them: outputs of the blocks that are
    called, the last one normed."""
    model = make_model(seed)
    def recorded(skip=0):
        h = [model.embed(windows[:, :-1])]
        for l in range(1, L + 1): h += [model.run(h[-1], start=l - 1, stop=l)] if l != skip else []
        return [*h[:-1], model.final_norm(h[-1])]
    with torch.no_grad():
        before, got = recorded(), causal_from_states(model, windows, shifted=True, normed=True)
    for s in range(1, L):
        with torch.no_grad(): after = recorded(s)
        for l in range(s + 1, L):
            change = (after[l] - after[l - 1]) - (before[l] - before[l - 1])
            want = change.norm(dim=-1).sum() / (before[l] - before[l - 1]).norm(dim=-1).sum()
            assert got[s - 1, l - 1].item() == pytest.approx(want.item(), rel=1e-4)
    shifted = causal_from_states(model, windows, shifted=True)
    assert (torch.equal(got[:, :-2].nan_to_num(), shifted[:, :-2].nan_to_num())
            and not torch.allclose(got[:-2, -2], shifted[:-2, -2]))


def test_an_identity_block_has_no_effect_unless_shifted(windows):
    wide = make_model(3, d_model=64, n_heads=4, n_layers=6, init_std=.02)
    idle = _with_block(wide, 2, AffineBlock(torch.zeros(64, 64), torch.zeros(64)))
    assert causal_from_states(idle, windows)[1, 2:].tolist() == [0] * 4
    shifted = causal_from_states(idle, windows, shifted=True)[1, 2:-1]
    assert (shifted - 2 ** .5).abs().max() < .2


def test_the_norm_touches_the_last_column_only(model, windows):
    plain, normed = causal_from_states(model, windows), causal_from_states(model, windows, normed=True)
    torch.testing.assert_close(plain[:, :-1], normed[:, :-1], equal_nan=True)
    assert (plain[:-1, -1] - normed[:-1, -1]).abs().min() > 1e-3


@pytest.mark.parametrize('factor', [.5, 10.])
def test_the_norm_hides_the_size_of_the_stream(model, windows, factor):
    scaled = AffineBlock(torch.eye(D) * (factor - 1), torch.zeros(D))
    same = AffineBlock(torch.zeros(D, D), torch.zeros(D))
    (before, after), (big, hidden) = (_last_variances(_with_block(model, L, b), windows)
                                      for b in (same, scaled))
    assert (big / before == pytest.approx(factor ** 2, rel=1e-4)
            and hidden / after == pytest.approx(1, rel=1e-3))


# ---- 5

def test_bf16_drowns_small_updates(model, windows):
    quiet, loud = (rounding(_with_embeddings_scaled(model, c), windows) for c in (1, 4096))
    assert loud['size'] > 100 * quiet['size']
    assert quiet['bf16'] == pytest.approx(quiet['fp32'], rel=.05) and loud['bf16'] > 10 * loud['fp32']
    exact = mean_score(causal_from_states(_with_embeddings_scaled(model, 4096).double(), windows))
    assert loud['fp32'] == pytest.approx(exact, rel=.05)          # fp32 is still right there
    assert next(model.parameters()).dtype == torch.float32


# ---- 6 and 7

def test_all_means_all(model):
    ours, published = decaying(model), decaying(model, 'all')
    assert (set(ours) == {'matrices of blocks', 'head'}
            and set(published) == set(ours) | {'embedding', 'norm gains'})
    assert all(published[kind] == n for kind, n in ours.items())
    assert sum(published.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('blocks', [1, 2, 8])
def test_compounded_weights_are_what_a_weight_divided_in_a_loop_gives(blocks):
    weight, expected = 1.0, []
    for _ in range(blocks):
        weight = weight / blocks
        expected.append(weight)
    assert auxiliary_weights(blocks, compounded=True).tolist() == pytest.approx(expected)
    assert auxiliary_weights(blocks).sum().item() == pytest.approx(1)


# ---- 9 and 10

def test_a_sink_is_diluted():
    variance = torch.full((128,), 3.).double()
    variance[0] = 1000
    assert (mean_with_sink(3, 1000, 128) == pytest.approx(variance.mean().item())
            and mean_with_sink(3, 3, 7) == 3)


def test_gates_scale_the_branch(windows):
    mixture = make_model(4, n_experts=8, experts_per_token=2, init_std=.004)
    published, matched, renormalised = (_branch_variances(_with_gates(mixture, g), windows)[0]
                                        for g in ('published', 'scale_matched', 'renormalised'))
    assert ((matched / renormalised).item() == pytest.approx(4, rel=1e-4)
            and (renormalised / published).item() == pytest.approx(16, rel=.15))
    assert mixture.blocks[0].feed_forward.gates == 'published'


# ---- 11

def test_seen_and_unseen_text(corpus):
    train = TrainConfig(steps=3, tokens_per_step=32, seed=5)
    seen, unseen = _seen_and_unseen(corpus, train, 8, 10)
    trained = {tuple(w) for step in range(3) for w in corpus.batch(step, 4, 8, 5).tolist()}
    assert len(seen) == len(unseen) == 10 and {tuple(w) for w in seen.tolist()} <= trained
    later = torch.cat([corpus.batch(step, 4, 8, 5) for step in range(3, 6)])
    assert unseen.tolist() == later[:10].tolist()


@pytest.mark.parametrize('steps, n, message', [(3, 13, 'n=13 must be at most 12'),
                                               (10 ** 5, 8, 'leave fewer than n=8 sequences unseen')])
def test_text_that_is_not_there(corpus, steps, n, message):
    with pytest.raises(ValueError, match=message):
        _seen_and_unseen(corpus, TrainConfig(steps=steps, tokens_per_step=32), 8, n)


def test_choices_are_seeded_and_fair():
    W = choices(12, 5, 4000)
    assert (W.sum(1).unique().tolist() == [5] and torch.equal(W, choices(12, 5, 4000))
            and not torch.equal(W, choices(12, 5, 4000, seed=1)))
    assert (W.mean(0) - 5 / 12).abs().max() < .04


# ---- 12 and 13

@pytest.mark.parametrize('blocks', [1, 2, 5])
def test_block_evaluations_of_full_forward_passes(blocks, windows):
    """Count them with hooks: a trace; skips; partial skips, where the block still runs; affine maps, where
    it does not; swaps."""
    model, calls = make_model(n_layers=blocks), []
    for block in model.blocks: block.register_forward_hook(lambda *_: calls.append(1))
    states(model, windows[:1])
    for s in range(1, blocks + 1): states(model, windows[:1], s)                                   # skips
    for s in range(1, blocks + 1): states(model, windows[:1], s)  # as many blocks run around an affine map
    for _ in range(blocks - 1): states(model, windows[:1])  # partial skips
    for i in range(blocks * (blocks - 1) // 2): states(model, windows[:1])                         # swaps
    assert len(calls) == _full_block_runs(blocks)


def test_the_divisor(model, windows):
    "Inputs of T tokens have T - 1 targets among themselves."
    with torch.no_grad(): logits = model(windows[:, :-1])
    total = functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:-1].flatten(),
                                     reduction='sum').item()
    B = len(windows)
    assert _padded_loss(total / (B * (T - 1)), T) == pytest.approx(total / (B * T), rel=1e-6)


# ---- all together

def test_corrections_repeat_and_leave_the_model_alone(corpus):
    model = make_model(vocab_size=corpus.vocab_size, context_length=8)
    mixtures = {g: make_model(9, vocab_size=corpus.vocab_size, context_length=8, n_experts=4,
                              experts_per_token=2, gates=g) for g in ('published', 'renormalised')}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train = TrainConfig(steps=6, tokens_per_step=32, seed=5)
    first, second = (corrections(model, corpus, train, mixtures, n_sequences=8, n_fit=12, n_pool=8, n_loss=16)
                     for _ in range(2))
    assert json.dumps(first) == json.dumps(second) and {r['trap'] for r in first} == set(_TRAPS) - {6, 8}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len({(r['trap'], r['quantity']) for r in first}) == len(first)


@pytest.fixture(scope='module')
def record(root): return json.loads((root / 'results' / 'corrections.json').read_text(encoding='utf-8'))


def test_the_record_says_where_it_comes_from(record):
    assert record['seeds'] == [0, 1, 2] and len(record['runs']) == 4 * 3 and record['tokens'] > 0
    assert {'hardware', 'commit', 'dirty', 'versions', 'date', 'corpus_fingerprint',
            'python'} <= set(record['provenance'])
    assert set(record['config']) == {'model', 'train', 'sizes', 'seed_of_sequences'}
    text = json.dumps(record)
    assert not re.search(r'/(home|work|tmp|root)/|C:\\', text)


def test_the_record_keeps_the_known_answers(record):
    for seed in record['seeds']:
        rows = {(r['trap'], r['quantity']): r for r in record['rows'] if r['seed'] == seed}
        idle, affine = (next(r for (trap, q), r in rows.items() if trap == t and word in q)
                        for t, word in ((3, 'identity'), (1, 'exactly affine')))
        assert idle['ours'] == 0 and idle['as_published'] > .5
        assert affine['ours'] == pytest.approx(1, abs=1e-4) and affine['as_published'] > 1.005
        loss = rows[13, 'loss']
        assert loss['as_published'] / loss['ours'] == pytest.approx(
            1 - 1 / record['config']['model']['context_length'], rel=1e-4)


def test_every_trap_is_in_the_closing_table(record, root):
    records = load_results(root / 'results', 'laptop')
    rows = record['rows'] + _decay_rows(records) + _context_rows(records) + _gate_rows(records)
    assert sorted(c['trap'] for c in ordered(rows)) == list(_TRAPS)
    assert {c['n'] for c in ordered(rows)} == {3}


def test_the_benchmark_names_a_run_that_is_not_there(root, tmp_path):
    spec = importlib.util.spec_from_file_location('corrections_benchmark',
                                                  root / 'benchmarks' / 'corrections.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit, match='there is no finished run L8_'):
        module.trained(tmp_path, load_results(root / 'results', 'laptop', 'moe')[0])
