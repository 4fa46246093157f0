"""The model: what the chapter does not already show."""
import pytest
import torch

import sparsecod.moe as moe
from sparsecod.configuration import Config, _is_kind
from sparsecod.core import (NORMS, PRESETS, ModelConfig, Placement, Stack, Transformer, flops_per_token,
                            next_tokens, param_counts, preset)
from sparsecod.data import DataConfig
from sparsecod.exchange import _stock_family
from sparsecod.layers import rope_angles
from sparsecod.scores import ScoreConfig, score_model
from sparsecod.studies import SCALES, RunConfig, vary
from sparsecod.theory import expected_jacobian_deviation, stream_variance
from sparsecod.train import TrainConfig, evaluate
from sparsecod.twins import rescale
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SMALL = ModelConfig(vocab_size=61, n_layers=3, d_model=16, n_heads=4, context_length=12)
TOKENS = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('changes', [{}, dict(tie_embeddings=True), dict(n_experts=4, d_shared_expert=8),
                                     dict(norm='layernorm_scaling'), dict(n_kv_heads=1)])
def test_saved_and_loaded_is_the_same_model(changes, tmp_path):
    torch.manual_seed(0)
    model = Transformer(SMALL.replace(**changes)).eval()
    model.save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    assert loaded.config == model.config and torch.equal(loaded(TOKENS), model(TOKENS))
    assert (loaded.head.weight is loaded.embedding.weight) == model.config.tie_embeddings


def test_a_placement_of_norms_is_one_entry_of_the_table(monkeypatch):
    "Norms behind the sublayers only; what is right for the known placements alone refuses it."
    monkeypatch.setitem(NORMS, 'branch_ln', Placement('Branch-LN', before=False, after=True))
    torch.manual_seed(0)
    model, h = Transformer(SMALL.replace(norm='branch_ln')), torch.randn(2, 12, 16)
    block, rope, norm = model.blocks[1], rope_angles(12, 4), torch.nn.RMSNorm(16, eps=1e-6)
    a = norm(block.attention(h, rope))
    torch.testing.assert_close(block(h, rope).stream, h + a + norm(block.feed_forward(h + a)))
    assert sum(p.numel() for p in model.parameters()) == param_counts(model.config)['total']
    for use in (stream_variance, expected_jacobian_deviation, _stock_family,
                lambda config: rescale(model, 2.)):
        with pytest.raises(ValueError, match="norm='branch_ln'.*pre_ln"): use(model.config)


@pytest.mark.parametrize('changes', [{}, dict(n_experts=4),
                                     dict(n_experts=4, experts_per_token=3, d_expert=12, d_shared_expert=8)])
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


NAN, INF = float('nan'), float('inf')
NOT_WHOLE, NOT_NUMBERS = ((True, 2.5, 3.0, NAN, INF, '8', None, [4]),
                          (False, NAN, INF, -INF, '0.1', None, [1.0], 10 ** 400))
NOT_WORDS, NOT_BOOLEANS = (None, 5, True, ['a'], b'fp32'), ('false', 'true', 0, 1, None)
WRONG = {  # field by field: its class, and values that it must not take
    ModelConfig: {'n_layers d_model vocab_size n_heads context_length experts_per_token': (*NOT_WHOLE, 0, -1),
                  'n_experts d_shared_expert': (*NOT_WHOLE, -1), 'norm gates': (*NOT_WORDS, 'none', ''),
                  'd_ff d_expert n_kv_heads': (True, 2.5, 64.0, '64', 0, -4, INF),
                  'tie_embeddings': NOT_BOOLEANS,
                  'norm_eps rope_theta init_std': (*NOT_NUMBERS, 0, -1.0),
                  'balance_weight router_z_weight': (*NOT_NUMBERS, -1)},
    TrainConfig: {'steps tokens_per_step log_every checkpoint_every keep_checkpoints': (*NOT_WHOLE, 0),
                  'micro_batch_tokens': (True, 2.5, '8', 0), 'lr eps clip': (*NOT_NUMBERS, 0),
                  'weight_decay': (*NOT_NUMBERS, -.1),
                  'min_lr_ratio': (*NOT_NUMBERS, -.1, 1.1), 'warmup_steps': (True, 1.0, '1', -1, 10 ** 6),
                  'betas': (None, .9, 'ab', (.9,), (.9, .9, .9), (.9, 1), (.9, True), (.9, NAN), ['a', 'b']),
                  'decay_groups precision strategy': (*NOT_WORDS, 'fp8'),
                  'activation_checkpointing': ('false', 0, 1), 'compile': NOT_BOOLEANS,
                  'seed': (*NOT_WHOLE, -1, 2 ** 63, 1e26)},
    DataConfig: {'source split text_field tokenizer': (*NOT_WORDS, '', ' '),
                 'subset eos_token': (5, True, ['a'], ''),
                 'vocab_size': (*NOT_WHOLE, 256, -1), 'sample_bytes': (*NOT_WHOLE, 0),
                 'val_share': (*NOT_NUMBERS, 0, 1, -1),
                 'seed': (*NOT_WHOLE, -1, 2 ** 63), 'max_documents max_tokens': (2.5, True, '9', 0, INF),
                 'max_document_bytes': (3, 8.0, False)},
    ScoreConfig: {'n_sequences n_fit n_jacobian batch_size n_bootstrap': (*NOT_WHOLE, 0),
                  'threshold': (*NOT_NUMBERS, 0),
                  'seed': (*NOT_WHOLE, -1, 2 ** 63), 'jacobian_probes': (True, 1, 2.0, -1, '4')},
    RunConfig: {'model data train score': (None, 5, 'x', []), 'seed': (*NOT_WHOLE, -1, 2 ** 63, 1e26),
                'n_eval n_questions': (*NOT_WHOLE, 0),
                'scale': (*NOT_WORDS, '', '..', 'a/b'), 'measures': (None, 'cloze', [5], ['none']),
                'lengths': (None, 8, ['8'], [8.0], [True], [0]), 'new_text': NOT_BOOLEANS}}
GOOD = {ModelConfig: ModelConfig(n_experts=4), TrainConfig: TrainConfig(steps=100), DataConfig: DataConfig(),
        ScoreConfig: ScoreConfig(), RunConfig: SCALES['tiny']}


@pytest.mark.parametrize('kind, field', [(kind, field) for kind, fields in WRONG.items() for names in fields
                                         for field in names.split()])
def test_a_wrong_value_is_named_however_it_comes(kind, field):
    values = next(values for names, values in WRONG[kind].items() if field in names.split())
    part = next((name for name in ('model', 'train', 'data', 'score')
                 if type(getattr(SCALES['tiny'], name)) is kind), None)
    for value in values:
        ways = [lambda: GOOD[kind].replace(**{field: value}),
                lambda: kind.from_dict({**GOOD[kind].to_dict(), field: value})]
        if field != 'seed' and part and type(value) is not float:
            ways.append(lambda: vary(SCALES['tiny'].replace(model=GOOD[ModelConfig]),
                                     {f'{part}.{field}': value}))
        for way in ways:
            with pytest.raises(ValueError, match=field) as caught: way()
            assert (type(caught.value) is ValueError and kind.__name__ in str(caught.value)
                    or f'{part}.{field}' in str(caught.value))
            assert repr(value)[:40].strip('[]()') in str(caught.value)


def test_every_field_of_every_configuration_is_tried():
    for kind, fields in WRONG.items():
        assert {field for names in fields for field in names.split()} == set(kind.__dataclass_fields__)


@pytest.mark.parametrize('config', GOOD.values(), ids=lambda c: type(c).__name__)
def test_json_brings_a_configuration_back(config):
    assert type(config).from_json(config.to_json()) == config == config.replace()
    for wrong in ([], None, 5, {'no such field': 1}):
        with pytest.raises(ValueError, match=type(config).__name__):
            type(config).from_dict(wrong)


def test_what_is_allowed_stays_allowed():
    assert TrainConfig(steps=5, lr=1, weight_decay=0, warmup_steps=0, betas=[0, .5],
                       seed=2 ** 63 - 1).betas == (0, .5)
    assert ScoreConfig(jacobian_probes=0).jacobian_probes == 0 and ModelConfig(d_ff=None).d_ff == 256
    assert DataConfig(tokenizer='some/name', vocab_size=1).vocab_size == 1  # a pretrained one brings its own
    with pytest.raises(ValueError, match='steps'): TrainConfig.from_dict({'lr': 1e-3})
    with pytest.raises(ValueError, match='experts_per_token=5'): ModelConfig(n_experts=4, experts_per_token=5)
    with pytest.raises(ValueError, match='d_expert=0'):
        ModelConfig(n_experts=64, experts_per_token=60, d_ff=8)
    with pytest.raises(ValueError, match='warmup_steps=9'): TrainConfig(steps=8, warmup_steps=9)


@pytest.mark.parametrize('kind, right, wrong', [(int | None, (1, None), (1.0, '1', True)),
                                                (tuple[int, ...], ((), (1, 2)), ([1], (1, 2.0), 1)),
                                                (tuple[float, float], ((1, 2.0),),
                                                 ((1,), (1, 2, 3), (1, None))),
                                                 (Config, (ModelConfig(),), ({}, Config))])
def test_annotations_are_taken_strictly(kind, right, wrong):
    assert [_is_kind(value, kind) for value in (*right, *wrong)] == [True] * len(right) + [False] * len(wrong)


@pytest.mark.parametrize('field, value', [('n_heads', 3), ('n_kv_heads', 3), ('n_heads', 64)])
def test_fields_must_fit_each_other(field, value):
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


@pytest.mark.parametrize('allow', [lambda: torch.set_float32_matmul_precision('medium'),
                                   lambda: setattr(torch.backends.cuda.matmul, 'fp32_precision', 'tf32')])
def test_scores_are_taken_in_full_precision(allow):
    "Whatever the caller allows for products of fp32 numbers, and he finds it as it was."
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [place.fp32_precision for place in places]
    try:
        allow()
        allowed, seen = [place.fp32_precision for place in places], []
        model = Transformer(ModelConfig(vocab_size=32, n_layers=1, d_model=8, n_heads=2, context_length=8))
        model.blocks[0].register_forward_hook(
            lambda *_: seen.append([place.fp32_precision for place in places]))
        windows = torch.randint(32, (6, 9), generator=torch.Generator().manual_seed(0))
        score_model(model, windows[:2], windows[2:],
                    ScoreConfig(n_sequences=2, n_fit=4, n_jacobian=1, n_bootstrap=2), progress=False)
        evaluate(model, windows)
        assert seen and all(s == ['ieee', 'ieee'] for s in seen)
        assert [place.fp32_precision for place in places] == allowed
    finally:
        torch.set_float32_matmul_precision('highest')
        for place, value in zip(places, before): place.fp32_precision = value
