"The theory of masked stacks: known answers, and agreement with simulated blocks."
import copy
import math

import pytest
import torch

from sparsecod.core import NORMS, ModelConfig, Transformer, initial_update_variance
from sparsecod.layers import Attention, rope_angles
from sparsecod.theory import (
    CLOSED_FORMS, _SUBLAYER_KINDS, apply_masks, attention_averaging, by_layer, _coherence,
    expected_jacobian_deviation, gate_gain, gate_moments, gaussian_dependence, magnitude_mask,
    mask_weight_dependence, masked_power, masked_std, masked_updates, mean_interval, measure_averaging,
    own_update_variance, predict_variance, random_stack, relative_update, simulate_jacobian,
    simulate_stream, stream_variance, update_variance, variance_budget, weighted_variance)

CONFIG = ModelConfig(vocab_size=64, n_layers=6, d_model=64, init_std=0.11)


def config(norm='pre_ln', **changes):
    return CONFIG.replace(norm=norm, **changes)


def harmonic(l):
    return sum(1 / i for i in range(1, l + 1))


# ---------------------------------------------------------------- known answers

@pytest.mark.parametrize('norm', CLOSED_FORMS)
@pytest.mark.parametrize('sublayers', _SUBLAYER_KINDS)
def test_nothing_grows_without_connections(norm, sublayers):
    v = stream_variance(config(norm), p=0.0, v0=0.3, sublayers=sublayers)
    assert v == [0.3] * 7
    assert expected_jacobian_deviation(config(norm), p=0.0, sublayers=sublayers) == [0.0] * 6
    assert relative_update(v) == [0.0] * 6


@pytest.mark.parametrize('norm', CLOSED_FORMS)
def test_full_density_is_the_closed_form_of_core(norm):
    c = config(norm)
    updates = [initial_update_variance(c, l) for l in range(1, 7)]
    assert [update_variance(c, l) for l in range(1, 7)] == updates
    v = stream_variance(c)
    assert v[0] == c.init_std ** 2
    assert [b - a for a, b in zip(v, v[1:])] == pytest.approx([sum(u) for u in updates])


def test_a_mask_is_a_smaller_weight():
    for norm in CLOSED_FORMS:
        smaller = config(norm, init_std=CONFIG.init_std * 0.3 ** 0.5)
        for f in (stream_variance, expected_jacobian_deviation):
            assert f(config(norm), p=0.3, v0=1.0) == pytest.approx(f(smaller, v0=1.0))


def test_powers_of_the_density():
    dense = update_variance(CONFIG)
    line = update_variance(CONFIG, sublayers='linear')[0]
    assert line == pytest.approx(CONFIG.d_model * CONFIG.init_std ** 2)
    for p in (0.9, 0.5, 0.1, 0.01):
        attention, feed_forward = update_variance(CONFIG, p=p)
        assert update_variance(CONFIG, p=p, sublayers='linear') == (pytest.approx(p * line), 0.0)
        assert attention == pytest.approx(p ** 2 * dense[0])
        assert p ** 3 / 2 < feed_forward / dense[1] < p ** 3


@pytest.mark.parametrize('s2', [1e-5, 1e-2, 0.8, 30.0, 1e3])
def test_the_gate_is_bounded(s2):
    m = gate_moments(s2)
    assert 1 / 4 < m.mean_square / s2 < 1 / 2 and 0 < m.mean and 1 / 4 < m.slope_square < 0.7
    z = torch.linspace(-9, 9, 40001, dtype=torch.float64)                # an independent, finer integral
    weight = torch.exp(-z ** 2 / 2) / math.sqrt(2 * math.pi)
    silu = torch.nn.functional.silu(s2 ** 0.5 * z)
    assert m.mean == pytest.approx(torch.trapezoid(weight * silu, z).item(), rel=2e-3)
    assert m.mean_square == pytest.approx(torch.trapezoid(weight * silu ** 2, z).item(), rel=2e-3)


def test_growth_with_depth():
    deep = dict(n_layers=300)
    u = update_variance(CONFIG, p=0.4, sublayers='linear')[0]
    v = {norm: stream_variance(config(norm, **deep), p=0.4, v0=0.5, sublayers='linear')
         for norm in CLOSED_FORMS}
    for l in (1, 2, 10, 300):
        assert v['pre_ln'][l] == pytest.approx(0.5 + l * u)
        assert v['layernorm_scaling'][l] == pytest.approx(0.5 + harmonic(l) * u)
        assert v['peri_ln'][l] == pytest.approx(0.5 + l)
    assert stream_variance(config('peri_ln'), 0.1, v0=0.5) == [0.5 + 2 * l for l in range(7)]


@pytest.mark.parametrize('p', [1.0, 0.4])
def test_swiglu_is_bounded_under_layernorm_scaling(p):
    c = config('layernorm_scaling')
    attention, feed_forward = (sum(u) for u in zip(*(update_variance(c, l, p) for l in range(1, 2001))))
    s2 = p * c.d_model * c.init_std ** 2
    assert feed_forward < math.pi ** 2 / 12 * p * c.d_ff * c.init_std ** 2 * s2 ** 2
    assert attention == pytest.approx(s2 ** 2 * harmonic(2000))


def test_equal_density_cancels():
    deep = config(n_layers=400)
    for f, limit in ((expected_jacobian_deviation, 0.01),
                     (lambda *a, **k: relative_update(stream_variance(*a, **k)), 0.01)):
        dense, sparse = f(deep, 1.0, sublayers='linear'), f(deep, 0.2, sublayers='linear')
        assert all(s < d for s, d in zip(sparse, dense))
        assert sparse[-1] == pytest.approx(dense[-1], rel=limit)
    u, v0 = update_variance(deep, p=0.2, sublayers='linear')[0], deep.init_std ** 2
    relative = relative_update(stream_variance(deep, 0.2, sublayers='linear'))
    assert relative == pytest.approx([(l - 1 + v0 / u) ** -0.5 for l in range(1, 401)])
    D = deep.d_model
    assert expected_jacobian_deviation(deep, 0.2,
                              sublayers='linear') == pytest.approx([r * (D - 1) ** 0.5 / D for r in relative])


def test_rescaled_masks_change_the_conclusion():
    assert stream_variance(CONFIG, 0.3, rescale=0.5) == pytest.approx(stream_variance(CONFIG))
    finals = [stream_variance(CONFIG, p, rescale=1.0)[-1] for p in (1.0, 0.5, 0.2)]
    assert finals == sorted(finals) and finals[0] < finals[-1]
    assert stream_variance(CONFIG, 0.5, v0=0.0, rescale=1.0, sublayers='linear')[1] == pytest.approx(
        2 * stream_variance(CONFIG, 1.0, v0=0.0, sublayers='linear')[1])


def test_forms_of_the_density():
    assert by_layer(0.5, 2) == [(0.5, 0.5)] * 2 and by_layer([0.1, 1], 2) == [(0.1, 0.1), (1.0, 1.0)]
    pairs = dict(attention=[0.5] * 6, feed_forward=[0.25] * 6)
    v = stream_variance(CONFIG, pairs)
    assert v[1] - v[0] == pytest.approx(update_variance(CONFIG,
                                                        p=0.5)[0] + update_variance(CONFIG, p=0.25)[1])
    assert stream_variance(CONFIG, [0.5] * 6) == stream_variance(CONFIG, 0.5)
    rising, falling = ([x / 6 for x in order] for order in (range(1, 7), range(6, 0, -1)))
    last = [relative_update(stream_variance(CONFIG, p))[-1] for p in (rising, 1.0, falling)]
    assert last[0] > last[1] > last[2]


@pytest.mark.parametrize('call, words', [
    (lambda: stream_variance(CONFIG, [0.5, 0.5]), '2 blocks'),
    (lambda: stream_variance(CONFIG, 1.5), 'p=1.5'),
    (lambda: stream_variance(CONFIG, sublayers='mlp'), "sublayers='mlp'"),
    (lambda: apply_masks(random_stack(CONFIG), 0.5, how='best'), "how='best'"),
    (lambda: predict_variance(random_stack(CONFIG), masks='rows'), "masks='rows'"),
    (lambda: update_variance(CONFIG.replace(n_experts=4)), 'n_experts=4'),
    (lambda: mask_weight_dependence(torch.ones(2, 2), torch.zeros(2, 2)), 'keeps nothing'),
])
def test_errors_name_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words.replace("'", ".")): call()


# ---------------------------------------------------------------- simulation

@pytest.mark.parametrize('norm', CLOSED_FORMS)
@pytest.mark.parametrize('p, sublayers, slack',
                         [(1.0, 'linear', 0), (0.2, 'linear', 0), (1.0, 'block', 0), (0.3, 'block', 0.02)])
def test_stream_agrees_with_real_blocks(norm, p, sublayers, slack):
    mean, half = mean_interval(simulate_stream(config(norm), p, n_models=16, sublayers=sublayers),
                               level=0.9999)
    expected = torch.tensor(stream_variance(config(norm), p, sublayers=sublayers))
    assert (half < 0.12 * expected).all()                               # the interval must say something
    assert ((mean - expected).abs() < half + slack * expected).all()


@pytest.mark.parametrize('rescale', [0.5, 1.0])
def test_stream_agrees_with_rescaled_masks(rescale):
    mean, half = mean_interval(simulate_stream(CONFIG, 0.4, n_models=16, rescale=rescale), level=0.9999)
    expected = torch.tensor(stream_variance(CONFIG, 0.4, rescale=rescale))
    assert ((mean - expected).abs() < half + 0.03 * expected).all()


@pytest.mark.parametrize('norm', CLOSED_FORMS)
@pytest.mark.parametrize('p, sublayers', [(1.0, 'linear'), (0.3, 'linear'), (1.0, 'block'), (0.5, 'block')])
def test_jacobians_agree_with_real_blocks(norm, p, sublayers):
    c = config(norm, n_layers=3)
    averaged, per_token = simulate_jacobian(c, p, n_models=8, n_tokens=6, sublayers=sublayers)
    for simulated, tokens in ((averaged, 6), (per_token, 1)):
        mean, half = mean_interval(simulated)
        expected = torch.tensor(expected_jacobian_deviation(c, p, sublayers=sublayers, tokens=tokens))
        assert ((mean - expected).abs() < half + 0.06 * expected).all()


def test_averaging_hides_the_gate():
    assert gate_gain(0.8) > 1.9 and gate_gain(0.8, tokens=1000) < 0.15
    per_token, averaged = (expected_jacobian_deviation(CONFIG, tokens=n) for n in (1, 100))
    assert all(a < 0.9 * b for a, b in zip(averaged, per_token))
    one, many = (expected_jacobian_deviation(CONFIG, tokens=n, sublayers='linear') for n in (1, 100))
    assert many == pytest.approx(one, rel=0.02)


@pytest.mark.parametrize('K', [4, 2, 1])
@pytest.mark.parametrize('sharpness', [1, 8])
def test_attention_update_of_a_sequence(K, sharpness):
    torch.manual_seed(K)
    x, rope, ratios = torch.randn(4, 24, 64) + 0.5, rope_angles(24, 16), []   # inputs with a common part
    with torch.no_grad():
        for _ in range(30):
            layer = Attention(64, 4, K)
            for w in layer.parameters(): torch.nn.init.normal_(w, std=0.11)
            layer.query.weight *= sharpness
            expected = (64 * 0.11 ** 2) ** 2 * x.square().mean(-1) * attention_averaging(layer, x, rope)
            ratios.append((layer(x, rope).square().mean(-1) / expected).mean())
    mean, half = mean_interval(torch.stack(ratios), level=0.999)
    assert abs(mean - 1) < half + 0.02 and half < 0.2  # norms of the tokens differ by some per cent


def test_weighted_sums():
    even = torch.full((5,), 1 / 5)
    assert weighted_variance(even).item() == pytest.approx(1 / 5)
    assert weighted_variance(even, correlation=1.0).item() == pytest.approx(1)
    assert weighted_variance(torch.tensor([0., 1, 0])).item() == 1


# ---------------------------------------------------------------- masks, and models that are not random

def test_masks():
    w = torch.tensor([[3., -1.], [0.5, -2.]])
    assert magnitude_mask(w, 0.5).tolist() == [[True, False], [False, True]]
    assert not magnitude_mask(w, 0.0).any() and magnitude_mask(w, 1.0).all()
    for how in ('random', 'magnitude'):
        model = apply_masks(random_stack(CONFIG), dict(attention=[1.0] * 6, feed_forward=[0.2] * 6), how=how)
        block = model.blocks[2]
        assert (block.attention.query.weight != 0).all()
        assert (block.feed_forward.up.weight != 0).float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert masked_std(2.0, 0.25) == 1.0 and masked_std(2.0, 0.25, rescale=1.0) == 4.0


def test_random_stack_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two = random_stack(CONFIG, 0.5, seed=1), random_stack(CONFIG, 0.5, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_dependence_of_mask_and_weights():
    torch.manual_seed(0)
    W = torch.randn(600, 600)
    for p in (0.8, 0.5, 0.2):
        assert mask_weight_dependence(W, magnitude_mask(W, p))['ratio'] == pytest.approx(
            gaussian_dependence(p), rel=0.01)
        assert mask_weight_dependence(W, torch.rand_like(W) < p)['ratio'] == pytest.approx(1, rel=0.03)
    exact = mask_weight_dependence(torch.tensor([3., 1., 1., 1.]), torch.tensor([1, 0, 0, 0]))
    assert exact == dict(density=0.25, energy=pytest.approx(0.75), ratio=pytest.approx(3.0))
    assert gaussian_dependence(1.0) == 1


def test_power_behind_a_random_mask():
    torch.manual_seed(0)
    W, x = torch.randn(48, 48) + 0.5, torch.randn(20, 48) + 0.5
    powers = torch.stack([(x @ (W * (torch.rand_like(W) < 0.3)).T).square().sum()
                          for _ in range(1000)]) / (x @ W.T).square().sum()
    mean, half = mean_interval(powers, level=0.9999)
    assert abs(masked_power(W, x, 0.3) - mean) < half < 0.02
    assert _coherence(torch.ones(3, 48), torch.ones(2, 48)) == pytest.approx(48)   # all terms agree
    assert masked_power(torch.ones(3, 48), torch.ones(2, 48), 0.5) == pytest.approx(0.25 + 0.25 / 48)


@pytest.mark.parametrize('norm', CLOSED_FORMS)
def test_prediction_from_weights_is_the_closed_form_for_random_models(norm):
    c = config(norm, d_model=128)
    model = random_stack(c)
    assert predict_variance(model, 0.5) == pytest.approx(stream_variance(c, 0.5), rel=0.05)
    v0 = predict_variance(model)[0]
    whole, once = predict_variance(model), predict_variance(model, 0.5, masks='sublayers')
    assert [v - v0 for v in once] == pytest.approx([0.5 * (v - v0) for v in whole])
    doubled = copy.deepcopy(model)
    for block in doubled.blocks: block.attention.output.weight.data *= 2
    factor = 1 if NORMS[norm].after else 4
    assert own_update_variance(doubled.blocks[0])[0] == pytest.approx(
        factor * own_update_variance(model.blocks[0])[0])


def test_gains_are_part_of_the_prediction():
    block = random_stack(CONFIG).blocks[0]
    a, f = own_update_variance(block)
    block.attention_norm.weight.data *= 3
    assert own_update_variance(block) == (pytest.approx(9 * a), pytest.approx(f))
    with pytest.raises(TypeError, match='SwiGLU'):
        own_update_variance(random_stack(CONFIG.replace(n_experts=4)).blocks[0])


@pytest.mark.parametrize('norm', CLOSED_FORMS)
def test_budget_adds_up_and_the_random_model_is_predicted(norm):
    torch.manual_seed(1)
    model = Transformer(config(norm, vocab_size=512, d_model=128, init_std=0.08))
    tokens = torch.randint(512, (8, 24))
    b = variance_budget(model, tokens)
    assert {x.shape for x in b.values()} == {(6, 8)}
    assert torch.allclose(b['before'] + b['attention'] + b['feed_forward'] + b['covariance'], b['after'])
    assert torch.allclose(b['before'][1:], b['after'][:-1])
    h = model.run(model.embed(tokens), stop=3)
    assert torch.allclose(b['after'][2].float(), h.var(-1)[:, 1:].mean(1), rtol=1e-4)
    own = torch.tensor([own_update_variance(x, a)
                        for x, a in zip(model.blocks, measure_averaging(model, tokens))])
    measured = torch.stack([b['attention'].mean(1), b['feed_forward'].mean(1)], 1).float()
    assert (measured / own - 1).abs().max() < 0.2


def test_masked_updates():
    torch.manual_seed(2)
    model, tokens = Transformer(config(vocab_size=512)), torch.randint(512, (8, 24))
    before = copy.deepcopy(model.state_dict())
    assert torch.allclose(masked_updates(model, tokens, 1.0), torch.ones(2, 6, 8, dtype=torch.float64))
    random, by_size = (masked_updates(model, tokens, 0.5, how).mean((1, 2))
                       for how in ('random', 'magnitude'))
    dense = update_variance(CONFIG)
    for i in (0, 1):
        theory = update_variance(CONFIG, p=0.5)[i] / dense[i]
        assert random[i].item() == pytest.approx(theory, rel=0.15)
        assert by_size[i].item() == pytest.approx((0.5 * gaussian_dependence(0.5)) ** (2 + i), rel=0.15)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
