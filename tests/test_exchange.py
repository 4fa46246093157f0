"""Models in and out: the same function in stock transformers classes, round trips, refusals, tokenizers,
cards and folders."""
import json
import random
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip('transformers', minversion='5.0')
from huggingface_hub import ModelCard

from sparsecod.adapters import open_model
from sparsecod.core import ModelConfig, Transformer
from sparsecod.data import Corpus, Tokenizer, load_tokenizer, train_bpe
from sparsecod.exchange import (export_folder, export_model, from_hf, _half_split, _interleave, model_card,
                                _need_transformers, _public_name,
                                push_folder, run_facts, _stock_family, to_hf, to_hf_tokenizer)
from sparsecod.integrity import Damaged
from sparsecod.moe import GATES
from sparsecod.train import TrainConfig, train

V, T = 61, 20
TOKENS = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1))  # (B, T)
DENSE = dict(mha={}, gqa=dict(n_kv_heads=2), mqa=dict(n_kv_heads=1), tied=dict(tie_embeddings=True),
             scaled=dict(norm='layernorm_scaling'),
             peri=dict(norm='peri_ln', n_kv_heads=2), peri_tied=dict(norm='peri_ln', tie_embeddings=True),
             theta=dict(rope_theta=50.0),
             eps=dict(norm_eps=0.3), narrow=dict(n_heads=8), one_block=dict(n_layers=1))
MIXTURES = ([(gates, shared, 3, 5, 'layernorm_scaling') for gates in GATES for shared in (0, 40)]
            + [('published', 0, 1, 4, 'pre_ln'), ('scale_matched', 40, 2, 2, 'pre_ln')])
EXPERTS = {f'{gates}_{shared}_{k}_of_{E}': dict(gates=gates, d_shared_expert=shared, experts_per_token=k,
                                                n_experts=E, d_expert=24, norm=norm)
           for gates, shared, k, E, norm in MIXTURES}
ALL = DENSE | EXPERTS


def random_model(seed=0, **changes) -> Transformer:
    "A small model whose every weight, gains included, matters."
    config = ModelConfig(**{**dict(vocab_size=V, n_layers=3, d_model=32, n_heads=4, d_ff=48,
                                   context_length=24, rope_theta=500.0), **changes})
    g, model = torch.Generator().manual_seed(seed), Transformer(config)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(.2 * torch.randn(p.shape, generator=g) + (p.dim() == 1))
    return model.eval()


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens) if isinstance(model, Transformer) else model(tokens).logits


def same(a, b, tokens=TOKENS, atol=1e-4):
    "Whether two models are one function, on logits that are not all alike."
    x, y = logits(a, tokens), logits(b, tokens)
    assert x.std() > .3 and x.std(1).min() > 1e-2  # logits differ between tokens and positions
    return bool((x - y).abs().max() < atol)


def stock_model(name, **changes):
    "A stock model with random weights, gains included."
    sizes = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=24, pad_token_id=None)
    config = getattr(transformers, f'{name}Config')(**{**sizes, **changes})
    model, g = getattr(transformers, f'{name}ForCausalLM')(config), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(.2 * torch.randn(p.shape, generator=g) + (p.dim() == 1))
    return model.eval()


def digest(model):
    return {name: p.clone() for name, p in model.state_dict().items()}


def unchanged(model, before):
    return all(p.equal(before[name]) for name, p in model.state_dict().items())


# Out

@pytest.mark.parametrize('kind', ALL)
def test_out_and_in_again_it_is_the_same_function(kind):
    model = random_model(**ALL[kind])
    before, state = digest(model), torch.get_rng_state()
    stock = to_hf(model)
    assert type(stock).__module__.startswith('transformers.models') and not stock.training
    assert same(model, stock)
    assert unchanged(model, before) and torch.get_rng_state().equal(state)
    back, tokenizer = from_hf(stock)
    assert same(model, back) and tokenizer is None
    a, b = model.config, back.config
    assert (a.n_layers, a.n_experts, a.d_shared_expert, a.n_kv_heads,
            a.tie_embeddings) == (b.n_layers, b.n_experts, b.d_shared_expert, b.n_kv_heads, b.tie_embeddings)
    assert (back.head.weight is back.embedding.weight) == a.tie_embeddings


def test_the_comparison_sees_each_step(monkeypatch):
    "Leaving out any folding or reordering is noticed by the test above."
    import sparsecod.exchange as exchange
    for name, wrong, kind in (('_fold', lambda w, factor: w, ALL['scaled']),
                              ('_interleave', lambda w, D_h: w, ALL['peri']),
                              ('_expert_factors', lambda c: (1, 1), ALL['published_40_3_of_5']),
                              ('_expert_factors', lambda c: (1, 1), ALL['scale_matched_0_3_of_5'])):
        with monkeypatch.context() as m:
            m.setattr(exchange, name, wrong)
            assert not same(random_model(**kind), to_hf(random_model(**kind)))


@pytest.mark.parametrize('kind, family', [('gqa', 'llama'), ('scaled', 'llama'), ('peri', 'glm4'),
                                          ('renormalised_0_3_of_5', 'mixtral'),
                                          ('scale_matched_0_3_of_5', 'mixtral'),
                                          ('published_0_3_of_5', 'qwen2_moe'),
                                          ('renormalised_40_3_of_5', 'qwen2_moe')])
def test_family(kind, family):
    config = random_model(**ALL[kind]).config
    assert _stock_family(config) == family == to_hf(Transformer(config)).config.model_type


def test_weights_are_copies_and_sizes_carry_over():
    model = random_model(n_kv_heads=2, tie_embeddings=True, norm_eps=1e-3)
    stock = to_hf(model)
    before = digest(model)
    with torch.no_grad():
        for p in stock.parameters(): p.zero_()
    assert unchanged(model, before)
    c = stock.config
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    assert (c.tie_word_embeddings, c.rms_norm_eps, c.rope_parameters['rope_theta'], c.max_position_embeddings,
            c.num_key_value_heads) == (True, 1e-3, 500., 24, 2)
    assert c.bos_token_id is c.eos_token_id is c.pad_token_id is None


def test_long_texts():
    model = random_model(norm='peri_ln', n_heads=2, context_length=512, rope_theta=1e4)
    tokens = torch.randint(V, (1, 512), generator=torch.Generator().manual_seed(0))
    assert same(model, to_hf(model), tokens)


def test_dtype_carries_over():
    stock = to_hf(random_model(norm='layernorm_scaling').to(torch.bfloat16))
    assert {p.dtype for p in stock.parameters()} == {torch.bfloat16}


def test_peri_ln_with_experts_is_refused():
    with pytest.raises(ValueError, match="norm='peri_ln' with n_experts=4.*allowed"):
        to_hf(Transformer(ModelConfig(norm='peri_ln', n_experts=4)))


def test_rotary_orders_are_inverse_permutations():
    w = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    assert _half_split(_interleave(w, 6), 6).equal(w) and not _interleave(w, 6).equal(w)
    assert _interleave(torch.arange(12)[:, None],
                      6).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize('found, message',
                         [(None, 'is needed'), (SimpleNamespace(__version__='4.57.0'), '4.57.0 is too old')])
def test_missing_or_old_transformers(found, message, bpe, tmp_path, monkeypatch):
    stock_model('Llama').save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, 'transformers', found)
    for call in (_need_transformers, lambda: to_hf(random_model()), lambda: from_hf(tmp_path),
                 lambda: to_hf_tokenizer(bpe)):
        with pytest.raises(ImportError, match=rf"{message}.*'sparsecod\[hf\]'"): call()
    random_model().save_pretrained(tmp_path / 'ours')
    export_folder(tmp_path / 'ours', tmp_path / 'copy', 'sparsecod')  # needs no transformers


# In

STOCK = dict(llama=('Llama', {}),
             llama_tied=('Llama', dict(tie_word_embeddings=True,
                                       rope_parameters=dict(rope_type='default', rope_theta=77.))),
             mistral=('Mistral', dict(sliding_window=None)),
             mistral_wide=('Mistral', dict(sliding_window=24)),
             phi3=('Phi3', dict(sliding_window=None)),
             phi3_all_heads=('Phi3',
                             dict(num_key_value_heads=4, tie_word_embeddings=True, sliding_window=24)),
             mixtral=('Mixtral', dict(num_local_experts=4)),
             glm4=('Glm4', dict(attention_bias=False, head_dim=8, partial_rotary_factor=1.)),
             qwen2_moe=('Qwen2Moe', dict(num_experts=5, num_experts_per_tok=3, moe_intermediate_size=24,
                                         shared_expert_intermediate_size=16, qkv_bias=False)))
STOCK['qwen2_moe_normalised'] = 'Qwen2Moe', STOCK['qwen2_moe'][1] | dict(norm_topk_prob=True)


def without_choice(stock):
    "Qwen2-MoE with a shared expert whose weight does not depend on the token."
    with torch.no_grad():
        for name, p in stock.named_parameters():
            if 'shared_expert_gate' in name: p.zero_()
    return stock


@pytest.mark.parametrize('kind', STOCK)
def test_in_and_out_again(kind):
    name, settings = STOCK[kind]
    stock = without_choice(stock_model(name, **settings))
    before, state = digest(stock), torch.get_rng_state()
    model, _ = from_hf(stock)
    assert torch.get_rng_state().equal(state) and not model.training
    assert same(model, stock) and same(to_hf(model), stock)
    with torch.no_grad():
        for p in model.parameters(): p.zero_()
    assert unchanged(stock, before)


def test_stacked_projections_are_cut_where_the_stock_class_cuts_them(tmp_path):
    "From a folder, with as many rows of keys as of values but not of queries, and back again as a Llama."
    stock = stock_model('Phi3', num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=40,
                        intermediate_size=20)
    stock.save_pretrained(tmp_path)
    model, _ = from_hf(tmp_path)
    tokens = torch.randint(V, (2, 40), generator=torch.Generator().manual_seed(2))
    assert same(model, stock, tokens) and to_hf(model).config.model_type == 'llama'
    swapped = digest(stock)
    for name, w in swapped.items():
        if 'qkv_proj' in name: w[32:48] = w[32:48].roll(8, 0)  # keys and values change places: noticed
    stock.load_state_dict(swapped)
    assert not same(model, stock, tokens)


REFUSED = dict(biases=('Llama', dict(attention_bias=True), 'attention_bias=True'),
               mlp_biases=('Llama', dict(mlp_bias=True), 'mlp_bias=True'),
               activation=('Llama', dict(hidden_act='gelu'), "hidden_act='gelu'"),
               head_dim=('Llama', dict(head_dim=16), 'head_dim=16.*8'),
               scaling=('Llama', dict(rope_parameters=dict(rope_type='linear', rope_theta=1e4, factor=2.)),
                        "rope_type='linear'.*'default'"),
               window=('Mistral', dict(sliding_window=8), 'sliding_window=8.*24 or more'),
               mixtral_window=('Mixtral', dict(sliding_window=8), 'sliding_window=8'),
               partial=('Glm4', dict(attention_bias=False, head_dim=8), 'partial_rotary_factor=0.5.*1.0'),
               qkv=('Qwen2Moe', dict(num_experts=4), 'qkv_bias=True'),
               sparse=('Qwen2Moe', dict(num_experts=4, qkv_bias=False, mlp_only_layers=[0]),
                       r'mlp_only_layers=\[0\]'),
               step=('Qwen2Moe', dict(num_experts=4, qkv_bias=False, decoder_sparse_step=2),
                     'decoder_sparse_step=2'),
               phi3_window=('Phi3', dict(sliding_window=8), 'sliding_window=8.*24 or more'),
               phi3_scaling=('Phi3', dict(sliding_window=None, original_max_position_embeddings=12,
                                          rope_parameters=dict(rope_type='longrope', rope_theta=1e4,
                                                               short_factor=[1.] * 4, long_factor=[2.] * 4)),
                                                               "rope_type='longrope'"),
               phi3_partial=('Phi3', dict(sliding_window=None,
                                          rope_parameters=dict(rope_type='default', rope_theta=1e4,
                                                               partial_rotary_factor=.5)),
                                                               'partial_rotary_factor=0.5.*1.0'),
               qwen2=('Qwen2', {}, "model_type='qwen2'.*biases"),
               qwen3=('Qwen3', dict(head_dim=8), "model_type='qwen3'.*normalises"),
               qwen3_moe=('Qwen3Moe', dict(head_dim=8, num_experts=4, moe_intermediate_size=16),
                          "model_type='qwen3_moe'.*normalises"),
               olmoe=('Olmoe', dict(num_experts=4, num_experts_per_tok=2), "model_type='olmoe'.*normalises"),
               gemma2=('Gemma2', dict(head_dim=8), "model_type='gemma2'"),
               olmo2=('Olmo2', {}, "model_type='olmo2'"))


@pytest.mark.parametrize('kind', REFUSED)
def test_another_function_is_refused(kind):
    name, settings, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message): from_hf(stock_model(name, **settings))


def test_shared_expert_that_depends_on_the_token_is_refused():
    name, settings = STOCK['qwen2_moe']
    with pytest.raises(ValueError, match='shared_expert_gate.weight is not 0'):
        from_hf(stock_model(name, **settings))


def test_weights_without_a_place_are_refused():
    stock = stock_model('Llama')
    stock.model.layers[1].self_attn.q_norm = torch.nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match='model.layers.1.self_attn.q_norm'): from_hf(stock)


def test_other_objects_are_refused():
    stock = stock_model('Llama')
    for wrong in (stock.model, random_model(), torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match='allowed'): from_hf(wrong)


# Folders

@pytest.fixture(scope='module')
def bpe() -> Tokenizer:
    return train_bpe(['the cat sat on the mat. the dog ran, and ran.\n' * 30, 'Größe 😀 x = [1, 2]\n' * 5],
                     300)


@pytest.mark.parametrize('kind', ['gqa', 'peri_tied', 'published_0_3_of_5', 'scale_matched_40_3_of_5'])
def test_saved_folder_opens_with_transformers(kind, tmp_path, bpe):
    model = random_model(vocab_size=bpe.vocab_size, **ALL[kind])
    place = export_model(model, tmp_path / 'deep' / 'out', bpe)
    assert list(place.glob('*.safetensors')) and not list(place.glob('*.bin'))
    stock, tokens = (transformers.AutoModelForCausalLM.from_pretrained(place),
                     torch.tensor([bpe.encode('the cat sat on the mat. the')]))
    assert same(model, stock, tokens)
    back, tokenizer = from_hf(place)
    assert (same(model, back, tokens) and tokenizer.encode('the dog') == bpe.encode('the dog')
            and tokenizer.eos_id == bpe.eos_id)
    n = model.config.context_length - tokens.shape[1]
    ours = model.generate(tokens, n, temperature=0)
    assert stock.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=n,
                          eos_token_id=None, pad_token_id=0).equal(ours)
    assert ours.shape[1] == model.config.context_length


def test_generation_stops_at_the_end_of_a_text(bpe):
    model = random_model(vocab_size=bpe.vocab_size)
    tokens = torch.tensor([bpe.encode('the cat')])
    ours = model.generate(tokens, 10, temperature=0)[0, tokens.shape[1]:].tolist()
    # the fourth new token ends the text
    with torch.no_grad(): model.head.weight[[bpe.eos_id, ours[3]]] = model.head.weight[[ours[3], bpe.eos_id]]
    stock = to_hf(model, bpe)
    assert stock.config.eos_token_id == stock.generation_config.eos_token_id == bpe.eos_id
    theirs = stock.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
                            max_new_tokens=10, pad_token_id=bpe.eos_id)[0, tokens.shape[1]:].tolist()
    first = model.generate(tokens, 10, temperature=0)[0, tokens.shape[1]:].tolist()
    assert theirs == first[:first.index(bpe.eos_id) + 1] and len(theirs) < 10


@pytest.mark.parametrize('reopened', [False, True])
def test_tokenizer_gives_the_same_ids(reopened, tmp_path, bpe):
    stock = to_hf_tokenizer(bpe, 24)
    if reopened:
        stock.save_pretrained(tmp_path)
        stock = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    texts = [''.join(rng.choice('the cat on  \n\té😀߷\x00<|endoftext|>AZ.,') for _ in range(rng.randrange(40)))
             for _ in range(200)]
    for text in [*texts, '', ' lead', 'tail ', 'a <|endoftext|> b', "don't", 'one .  Two']:
        ids = bpe.encode(text)
        assert (stock(text).input_ids == ids == stock.encode(text)
                and stock.decode(ids) == bpe.decode(ids) == text)
    assert (stock.eos_token, stock.eos_token_id, stock.model_max_length) == (bpe.eos_token, bpe.eos_id, 24)


def test_tokenizer_adds_no_special_tokens(bpe):
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing
    backend = Backend.from_str(bpe.backend.to_str())
    backend.post_processor = TemplateProcessing(single='<|endoftext|> $A',
                                                special_tokens=[('<|endoftext|>', bpe.eos_id)])
    with_start = Tokenizer(backend)
    assert to_hf_tokenizer(with_start)('the cat').input_ids == with_start.encode('the cat') == bpe.encode(
        'the cat')
    assert backend.encode('the cat').ids[0] == bpe.eos_id  # left as it was


def test_tokenizer_with_more_tokens_than_the_model(bpe, tmp_path):
    small = random_model(vocab_size=bpe.vocab_size - 1)
    for call in (lambda: to_hf(small, bpe), lambda: export_model(small, tmp_path / 'out', bpe),
                 lambda: export_model(small, tmp_path / 'out', bpe, format='sparsecod')):
        with pytest.raises(ValueError,
                           match=f'vocab_size={bpe.vocab_size} tokens; allowed are at most '
                                 f'{bpe.vocab_size - 1}'):
            call()
    assert not (tmp_path / 'out').exists()


def test_name_on_the_hub(tmp_path, bpe, monkeypatch):
    "A name is fetched, without any file that could hold a pickle or a program, and opened like a folder."
    import huggingface_hub
    model, asked = random_model(vocab_size=bpe.vocab_size), []
    place = export_model(model, tmp_path / 'snapshot', bpe)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download',
                        lambda name, **options: asked.append((name, options)) or str(place))
    back, tokenizer = from_hf('somebody/something')
    (name, options), = asked
    assert name == 'somebody/something' and not {'*.bin', '*.pt', '*.py'} & set(options['allow_patterns'])
    assert same(model, back) and tokenizer.encode('the cat') == bpe.encode('the cat')


def test_pickles_are_not_read(tmp_path):
    stock = stock_model('Llama')
    stock.config.save_pretrained(tmp_path)
    torch.save(stock.state_dict(), tmp_path / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='safetensors'): from_hf(tmp_path)


@pytest.mark.parametrize('change, what',
                         [(lambda state: state.pop('model.layers.0.mlp.up_proj.weight'), 'missing_keys'),
                                          (lambda state: state.update(
                                              {'model.layers.0.self_attn.q_proj.bias': torch.ones(32)}),
                                              'unexpected_keys')])
def test_incomplete_or_richer_checkpoints_are_refused(change, what, tmp_path):
    from safetensors.torch import load_file, save_file
    stock_model('Llama').save_pretrained(tmp_path)
    state = load_file(tmp_path / 'model.safetensors')
    change(state)
    save_file(state, tmp_path / 'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ValueError, match=what): from_hf(tmp_path)


def test_configuration_is_checked_before_weights(tmp_path):
    # and no weights at all
    transformers.Qwen2Config(hidden_size=32, num_attention_heads=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='qwen2'"): from_hf(tmp_path)


def test_our_own_folder_is_no_checkpoint(tmp_path):
    random_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='Transformer.from_pretrained'): from_hf(tmp_path)


# Cards

LOSS = dict(value=4.251, low=4.188, high=4.317)
RECORD = dict(schema=1, status='finished', step=400, tokens=1638400, final=dict(val_loss=LOSS),
              config=dict(model=ModelConfig(vocab_size=V).to_dict(),
                          train=TrainConfig(400, lr=0.00123).to_dict(),
                          data=dict(source='stdlib', tokenizer='bpe'), score=dict(n_sequences=32)),
              scores=dict(scalars=dict(causal=dict(value=.274, low=.269, high=.28),
                                       usefulness=dict(value=None, low=None, high=None))),
              provenance=dict(corpus_fingerprint='a7794e02e12ff3e4', corpus_stats=dict(train_tokens=9831133),
                              trained_commit='c' * 40))


def head_and_body(card, tmp_path):
    card.save(tmp_path / 'README.md')
    again = ModelCard.load(tmp_path / 'README.md')  # what the Hub would read
    return again.data, again.text


def test_card_carries_what_is_known(tmp_path):
    data, body = head_and_body(model_card(ModelConfig(vocab_size=V), run_facts(record=RECORD), 'transformers',
                                          'a name', 'apache-2.0'), tmp_path)
    for text in ('a7794e02e12ff3e4', '1,638,400', '9,831,133', 'train.lr | 0.00123', 'data.source | stdlib',
                 '4.251 | 4.188 to 4.317', 'causal score | 0.274 | 0.269 to 0.28',
                 'c' * 40, 'LlamaForCausalLM', 'n_layers | 8', 'on 32 sequences', '# a name'):
        assert text in body, text
    assert (data.library_name == 'transformers' and data.license == 'apache-2.0'
            and data.pipeline_tag == 'text-generation')
    result, = data.eval_results
    assert (result.metric_value == 4.251 and result.metric_type == 'loss'
            and 'a7794e02e12ff3e4' in result.dataset_name)


def test_card_is_honest_about_the_rest(tmp_path):
    _, body = head_and_body(model_card(ModelConfig(vocab_size=V), run_facts(record=RECORD)), tmp_path)
    scores, missing = body.split('## Not measured')
    for words in ('permutation score', 'usefulness', 'Jacobian deviation', 'variance of the last stream',
                  'public benchmarks', 'safety'):
        assert words in missing and words not in scores.split('## Scores')[1]
    for words in ('causal score', 'loss on held-out text'): assert words not in missing
    assert 'None is stated' in body
    data, bare = head_and_body(model_card(ModelConfig(vocab_size=V)), tmp_path)
    assert (data.eval_results is None and data.license is None and 'not recorded here' in bare
            and 'No scores' in bare and '- causal score' in bare)


def test_questions_are_on_the_card(tmp_path):
    cloze = dict(accuracy=dict(value=.291, low=.263, high=.319), n_questions=1000, chance=.25, settings={})
    _, body = head_and_body(model_card(ModelConfig(vocab_size=V),
                                       run_facts(record=RECORD | dict(cloze=cloze))), tmp_path)
    assert 'cloze | accuracy | 0.291 | 0.263 to 0.319 | 0.25 | 1000' in body
    assert '- accuracy on public benchmarks\n' in body and '- accuracy on cloze' not in body
    asked = [dict(task='piqa', metric='acc', value=.5, stderr=.01, n=100, low=None, high=None, chance=.5)]
    (tmp_path / 'eval.json').write_text(json.dumps(dict(results=asked)), encoding='utf-8')
    _, body = head_and_body(model_card(ModelConfig(vocab_size=V), run_facts(tmp_path)), tmp_path)
    assert ('piqa | acc | 0.5 | - | 0.5 | 100' in body and 'benchmarks other than those above' in body
            and '- accuracy on cloze' in body)


def test_uncommitted_code_is_told():
    record = RECORD | dict(provenance=RECORD['provenance'] | dict(trained_dirty=True))
    assert f"{'c' * 40}, with changes that were not committed" in model_card(ModelConfig(vocab_size=V),
                                                                             run_facts(record=record)).content
    assert 'not committed' not in model_card(ModelConfig(vocab_size=V), run_facts(record=RECORD)).content


def test_scores_alone_say_nothing_about_training(tmp_path):
    "The configuration in a file of scores says what was scored on."
    alone = dict(config=RECORD['config'], corpus='feedbeef', **RECORD['scores'])
    facts = run_facts(record=alone)
    assert facts['scored_on'] == 'feedbeef' and not {'train', 'data', 'corpus', 'tokens'} & set(facts)
    _, body = head_and_body(model_card(ModelConfig(vocab_size=V), facts), tmp_path)
    assert ('not recorded here' in body and 'causal score | 0.274' in body and 'feedbeef' in body
            and 'train.lr' not in body)


def test_local_paths_stay_out_of_the_card(tmp_path):
    names = [str(tmp_path), '~/texts', './texts', 'a/b/c', 'mine.txt', 'some*', 'hf:/data/x', 'C:\\texts']
    for name in names: assert _public_name(name) == 'a local file or folder'
    for name in ('stdlib', 'site', 'fineweb-edu', 'bpe', 'hf:HuggingFaceFW/fineweb-edu',
                 'EleutherAI/gpt-neox-20b'):
        assert _public_name(name) == name
    record = RECORD | dict(config=RECORD['config'] | dict(data=dict(source=str(tmp_path / 'secret.txt'),
                                                                    tokenizer=str(tmp_path / 'tok'))))
    assert str(tmp_path) not in model_card(ModelConfig(vocab_size=V), run_facts(record=record)).content


# Trainings

@pytest.fixture(scope='module')
def corpus() -> Corpus:
    return Corpus.from_texts([f'the cat number {i} sat on mat {i * i}. ' * 6 for i in range(60)])


@pytest.fixture(scope='module')
def run(corpus, tmp_path_factory):
    "A folder as `sparsecod train` leaves it: labelled, with tokenizer."
    from sparsecod.studies import RunConfig, label_folder
    folder = tmp_path_factory.mktemp('work') / 'run'
    model = ModelConfig(vocab_size=corpus.vocab_size, n_layers=2, d_model=16, n_heads=2, context_length=16,
                        norm='layernorm_scaling', init_std=0.3)
    config = TrainConfig(steps=3, tokens_per_step=64)
    train(model, config, corpus, folder, progress=False)
    label_folder(folder, RunConfig(model, corpus.config, config), corpus)
    return folder


def trained(run):
    return Transformer.from_pretrained(run / 'model', strict=True)


@pytest.mark.parametrize('given', ['', 'model'])
def test_export_folder_for_transformers(run, given, corpus, tmp_path):
    place = export_folder(run / given, tmp_path / 'out')
    tokens = corpus.sample_windows('val', 2, 15)
    stock, tokenizer = (transformers.AutoModelForCausalLM.from_pretrained(place),
                        transformers.AutoTokenizer.from_pretrained(place))
    assert place == tmp_path / 'out' and same(trained(run), stock, tokens)
    assert tokenizer('the cat number 7').input_ids == corpus.tokenizer.encode('the cat number 7')
    body = (place / 'README.md').read_text(encoding='utf-8')
    for text in (corpus.fingerprint, 'training tokens | 192', 'status | finished', 'LlamaForCausalLM',
                 "norm | layernorm_scaling"):
        assert text in body, text


def read_card(model, place):
    model.save_pretrained(place)
    return (place / 'README.md').read_text(encoding='utf-8')


def test_a_trained_model_knows_its_card(corpus, tmp_path, hub):
    """From `train`, from its folder and from the saved model; with the scores that lie there; pushed
    without any argument."""
    model = ModelConfig(vocab_size=corpus.vocab_size, n_layers=2, d_model=16, n_heads=2, context_length=16,
                        tie_embeddings=True)
    folder = tmp_path / 'run'
    fresh = train(model, TrainConfig(steps=3, tokens_per_step=64), corpus, folder, progress=False).model
    (folder / 'scores.json').write_text(json.dumps(dict(config=dict(model=model.to_dict()),
                                                        corpus=corpus.fingerprint, **RECORD['scores'])),
                                                        encoding='utf-8')
    from sparsecod.train import load_result
    for i, known in enumerate((fresh, load_result(folder).model,
                               Transformer.from_pretrained(folder / 'model'),
                               load_result(folder).model.to(torch.bfloat16))):
        body = read_card(known, tmp_path / str(i))
        for text in (corpus.fingerprint, 'training tokens | 192', 'train.steps | 3', 'causal score | 0.274',
                     'n_layers | 2'):
            assert text in body, text
    Transformer.from_pretrained(folder / 'model').push_to_hub('me/model')
    sent = hub.calls[-1][2]['README.md'].decode()
    assert corpus.fingerprint in sent and 'causal score | 0.274' in sent and 'train.steps | 3' in sent
    assert 'causal score | 0.274' in (export_model(fresh,
                                                   tmp_path / 'stock') / 'README.md').read_text(
                                                       encoding='utf-8')
    assert 'not recorded here' in (export_model(fresh, tmp_path / 'bare',
                                                facts={}) / 'README.md').read_text(encoding='utf-8')


def test_a_changed_model_claims_nothing(run, tmp_path):
    model = Transformer.from_pretrained(run / 'model')
    assert 'not recorded here' not in read_card(model, tmp_path / 'before')
    with torch.no_grad(): model.blocks[1].attention.query.weight[0, 0] += 1e-3
    assert 'not recorded here' in read_card(model, tmp_path / 'after')
    assert 'not recorded here' in read_card(random_model(), tmp_path / 'other')
    assert '4.251' in model.generate_model_card(facts=run_facts(record=RECORD)).content


def test_export_folder_for_sparsecod(run, corpus, tmp_path):
    place = export_folder(run, tmp_path / 'out', 'sparsecod')
    again = export_folder(place, tmp_path / 'again', 'sparsecod')  # a saved Transformer
    tokens = corpus.sample_windows('val', 2, 15)
    for folder in (place, again):
        assert same(trained(run), Transformer.from_pretrained(folder, strict=True), tokens, 1e-7)
        tokenizer = load_tokenizer(str(folder))
        assert (tokenizer.encode('the cat') == corpus.tokenizer.encode('the cat')
                and tokenizer.eos_id == corpus.eos_id)
    assert (corpus.fingerprint in (place / 'README.md').read_text(encoding='utf-8')
            and 'not recorded here' in (again / 'README.md').read_text(encoding='utf-8'))


def test_export_folder_of_a_checkpoint(tmp_path):
    stock = stock_model('Llama')
    stock.save_pretrained(tmp_path / 'llama')
    place = export_folder(tmp_path / 'llama', tmp_path / 'ours', 'sparsecod')
    assert same(Transformer.from_pretrained(place), stock)
    with pytest.raises(ValueError, match="llama.*already; allowed is format='sparsecod'"):
        export_folder(tmp_path / 'llama', tmp_path / 'other')


def test_records_are_found_and_checked(run, corpus, tmp_path):
    from sparsecod.train import read_label
    label = read_label(run)
    record = RECORD | dict(config=RECORD['config'] | dict(model=label['model'], train=label['train']),
                           provenance=RECORD['provenance'] | dict(corpus_fingerprint=corpus.fingerprint))
    body = (export_folder(run, tmp_path / 'given', record=record) / 'README.md').read_text(encoding='utf-8')
    assert '4.251' in body and 'training tokens | 192' in body  # what the folder says of its training wins
    (run / 'scores.json').write_text(json.dumps(dict(config=record['config'], corpus=corpus.fingerprint,
                                                     **RECORD['scores'])), encoding='utf-8')
    try:
        assert 'causal score | 0.274' in (export_folder(run,
                                                        tmp_path / 'found') / 'README.md').read_text(
                                                            encoding='utf-8')
    finally: (run / 'scores.json').unlink()
    for wrong, message in ((record | dict(provenance=dict(corpus_fingerprint='other')), "corpus='other'"),
                           (record | dict(config=record['config']
                                          | dict(model=label['model'] | dict(n_layers=9))),
                                          'model.n_layers=9'),
                           (record | dict(config=record['config']
                                          | dict(train=label['train'] | dict(seed=5))), 'train.seed=5')):
        with pytest.raises(ValueError, match=f'another run: {message}'):
            export_folder(run, tmp_path / 'refused', record=wrong)
    assert not (tmp_path / 'refused').exists()


def test_record_of_a_study_is_found(run, corpus, tmp_path):
    import shutil
    from sparsecod.train import read_label
    work = tmp_path / 'runs' / '.work' / 'some_run'
    shutil.copytree(run, work)
    label = read_label(work)
    record = RECORD | dict(config=RECORD['config'] | dict(model=label['model'], train=label['train']),
                           provenance=dict(corpus_fingerprint=corpus.fingerprint))
    for place in (tmp_path / 'runs' / 'own' / 'some_run.json',
                  tmp_path / 'results' / 'own' / 'some_run.json'):
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps(record), encoding='utf-8')
        assert '4.251' in (export_folder(work, tmp_path / 'out',
                                         overwrite=True) / 'README.md').read_text(encoding='utf-8')
        place.unlink()


def test_nothing_is_overwritten_unasked(run, tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    export_folder(run, out)  # empty: fine
    (out / 'mark').write_text('mine', encoding='utf-8')
    with pytest.raises(FileExistsError, match='out.*is not empty.*overwrite=True'): export_folder(run, out)
    assert (out / 'mark').read_text(encoding='utf-8') == 'mine'
    export_folder(run, out, overwrite=True)
    assert not (out / 'mark').exists()
    home = tmp_path / 'home'
    home.mkdir()
    (home / 'letter').write_text('mine', encoding='utf-8')
    with pytest.raises(FileExistsError, match='something else'): export_folder(run, home, overwrite=True)
    (tmp_path / 'file').write_text('mine', encoding='utf-8')
    with pytest.raises(FileExistsError, match='not a folder'):
        export_folder(run, tmp_path / 'file', overwrite=True)
    for wrong in (run, run / 'model', run / 'export', run.parent):
        with pytest.raises((ValueError, FileExistsError), match='out='):
            export_folder(run, wrong, overwrite=True)
    assert (run / 'model' / 'model.safetensors').exists() and (home / 'letter').exists()


def test_errors_name_what_is_allowed(run, tmp_path):
    with pytest.raises(ValueError, match="format='onnx' must be one of hf, sparsecod"):
        export_folder(run, tmp_path / 'out', 'onnx')
    with pytest.raises(FileNotFoundError, match='nowhere.*allowed'):
        export_folder(tmp_path / 'nowhere', tmp_path / 'out')
    (tmp_path / 'half').mkdir()
    (tmp_path / 'half' / 'config.json').write_text((run / 'config.json').read_text(encoding='utf-8'),
                                                   encoding='utf-8')
    with pytest.raises(ValueError, match='half.*has not ended'):
        export_folder(tmp_path / 'half', tmp_path / 'out')
    peri = Transformer(ModelConfig(vocab_size=V, n_layers=1, d_model=16, norm='peri_ln', n_experts=2))
    peri.save_pretrained(tmp_path / 'peri')
    with pytest.raises(ValueError, match='no stock counterpart'):
        export_folder(tmp_path / 'peri', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_diverged_training_is_refused(run, tmp_path):
    import shutil
    from sparsecod.integrity import stamp
    shutil.copytree(run, tmp_path / 'run')
    result = json.loads((tmp_path / 'run' / 'result.json').read_text(encoding='utf-8'))
    (tmp_path / 'run' / 'result.json').write_text(json.dumps(stamp(result | dict(status='diverged'))),
                                                  encoding='utf-8')
    with pytest.raises(ValueError, match="status='diverged'; allowed is finished"):
        export_folder(tmp_path / 'run', tmp_path / 'out')


# The Hub, without a network

class Hub:
    "Stands in for HfApi and notes what it is asked."
    calls = []
    def __init__(self, token=None): self.calls.append(('token', token))

    def create_repo(self, repo_id, **options):
        self.calls.append(('create', repo_id, options))
        return type('Repo', (), dict(repo_id=repo_id))

    def upload_folder(self, repo_id, folder_path, **options):
        from pathlib import Path
        self.calls.append(('upload', repo_id,
                           {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}))
        return 'https://hub/commit'


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(Hub, 'calls', [])
    monkeypatch.setattr(huggingface_hub, 'HfApi', Hub)
    monkeypatch.setattr(huggingface_hub.hub_mixin, 'HfApi', Hub)
    return Hub


@pytest.mark.parametrize('format', ['hf', 'sparsecod'])
def test_push_folder(run, format, tmp_path, hub):
    place = export_folder(run, tmp_path / 'out', format)
    assert push_folder(place, 'me/model', token='t') == 'https://hub/commit'
    (_, token), (_, repo, options), (_, target, files) = hub.calls
    assert (token, repo, target) == ('t', 'me/model', 'me/model') and options['private'] is True
    assert {'README.md', 'config.json', 'model.safetensors', 'tokenizer.json'} <= set(files)
    assert files['README.md'] == (place / 'README.md').read_bytes()


def test_push_of_something_else_is_refused(tmp_path, hub):
    (tmp_path / 'config.json').write_text('{}', encoding='utf-8')
    with pytest.raises(FileNotFoundError, match=r'lacks README.md, \*.safetensors'):
        push_folder(tmp_path, 'me/model')
    assert not hub.calls


def test_the_verbs_of_a_transformer_write_the_card(tmp_path, hub):
    model, facts = random_model(), run_facts(record=RECORD)
    model.save_pretrained(tmp_path, model_card_kwargs=dict(facts=facts))
    assert ('4.251' in (tmp_path / 'README.md').read_text(encoding='utf-8')
            and same(Transformer.from_pretrained(tmp_path), model))
    model.push_to_hub('me/model', model_card_kwargs=dict(facts=facts))
    assert b'a7794e02e12ff3e4' in hub.calls[-1][2]['README.md']


# What lies beside a model

CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} ☃\n{% endfor %}"
TOOLS = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
WHERE = dict(file=CHAT, inside=CHAT,
             several=[dict(name='default', template=CHAT), dict(name='../../tool_use', template=TOOLS)])


def checkpoint(folder, bpe, where='file'):
    "A stock Llama with a tokenizer, a chat template and settings for generation."
    stock = stock_model('Llama', vocab_size=bpe.vocab_size)
    stock.generation_config.update(temperature=0.7, top_k=11, do_sample=True)
    stock.save_pretrained(folder)
    to_hf_tokenizer(bpe, 24).save_pretrained(folder)
    if where == 'file': (folder / 'chat_template.jinja').write_text(CHAT, encoding='utf-8')
    else:
        path = folder / 'tokenizer_config.json'
        settings = json.loads(path.read_text(encoding='utf-8'))
        path.write_text(json.dumps(settings | dict(chat_template=WHERE[where])), encoding='utf-8')
    return stock


def said(folder, **options):
    talk = [dict(role='user', content='the cat'), dict(role='assistant', content='ran')]
    return transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(talk, tokenize=False,
                                                                                  **options)


@pytest.mark.parametrize('where', WHERE)
def test_chat_templates_and_generation_settings_survive(where, tmp_path, bpe):
    stock = checkpoint(tmp_path / 'stock', bpe, where)
    ours = export_folder(tmp_path / 'stock', tmp_path / 'ours', 'sparsecod')
    again = export_folder(ours, tmp_path / 'again', 'sparsecod')
    places = [export_folder(folder, tmp_path / f'out{i}') for i, folder in enumerate((ours, again))]
    model, tokenizer = from_hf(tmp_path / 'stock')
    places.append(export_model(model, tmp_path / 'live', tokenizer))
    for place in places:
        assert said(place) == said(tmp_path / 'stock') == '<user> the cat ☃\n<assistant> ran ☃\n'
        if where == 'several': assert said(place, chat_template='tool_use') == '[the cat][ran]'
        settings = transformers.GenerationConfig.from_pretrained(place)
        assert (settings.temperature, settings.top_k, settings.do_sample) == (0.7, 11, True)
        assert same(transformers.AutoModelForCausalLM.from_pretrained(place), stock)
    assert not list(tmp_path.parent.glob('tool_use*')) and not list(tmp_path.glob('tool_use*'))


def test_a_model_of_ours_has_no_template(tmp_path, bpe):
    place = export_model(random_model(vocab_size=bpe.vocab_size), tmp_path / 'out', bpe)
    assert transformers.AutoTokenizer.from_pretrained(place).chat_template is None


# Damage

def flip(path, at=-3):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize('name, format', [('model.safetensors', 'hf'), ('config.json', 'hf'),
                                          ('tokenizer.json', 'sparsecod')])
def test_a_damaged_export_is_neither_shared_nor_opened(name, format, tmp_path, bpe, hub):
    place = export_model(random_model(vocab_size=bpe.vocab_size), tmp_path / 'out', bpe, format=format)
    flip(place / name) if name != 'config.json' else (place / name).write_text(
        (place / name).read_text(encoding='utf-8').replace('24', '23'), encoding='utf-8')
    with pytest.raises(ValueError, match=name): push_folder(place, 'me/model')
    with pytest.raises(ValueError, match=name): open_model(place)
    with pytest.raises(ValueError, match=name): export_folder(place, tmp_path / 'further', 'sparsecod')
    assert not hub.calls and not (tmp_path / 'further').exists()


@pytest.mark.parametrize('name, old, new', [('tokenizer.json', '"version"', ' "version"'),
                                            ('tokenizer.json', '"id":0,', '"id":1,'),
                                            ('run.json', '"steps": 3', '"steps": 4'),
                                            ('run.json', '"tokenizer": "bpe"', '"tokenizer": "gpt2"')])
def test_a_changed_tokenizer_or_label_of_a_training_is_named_by_all_who_read_it(name, old, new, run, corpus,
                                                                                tmp_path):
    copy = shutil.copytree(run, tmp_path / 'run')
    for damaged in (False, True):
        if damaged:
            content = (copy / name).read_text(encoding='utf-8')
            assert old in content
            (copy / name).write_text(content.replace(old, new, 1), encoding='utf-8')
        for use in (lambda: open_model(copy), lambda: open_model(copy / 'model'),
                    lambda: export_folder(copy, tmp_path / 'out', overwrite=True)):
            if not damaged: use()
            else:
                with pytest.raises(Damaged, match=re.escape(str(copy / name))): use()


def test_a_training_keeps_the_token_that_ends_its_texts(run, tmp_path):
    from sparsecod.studies import label_folder, read_run
    texts = Corpus.from_texts([f'the cat number {i} sat. ' * 6 for i in range(60)])
    texts.tokenizer.backend.add_tokens(['[STOP]'])
    copy, config = shutil.copytree(run, tmp_path / 'run'), read_run(run)
    label_folder(copy, config.replace(data=config.data.replace(eos_token='[STOP]')), texts)
    assert open_model(copy)[1].eos_token == '[STOP]' != open_model(run)[1].eos_token


def test_weights_of_another_model_are_noticed(tmp_path, hub):
    places = [export_model(random_model(seed), tmp_path / str(seed)) for seed in (0, 1)]
    (places[0] / 'model.safetensors').write_bytes((places[1] / 'model.safetensors').read_bytes())
    with pytest.raises(ValueError, match='model.safetensors'): from_hf(places[0])
    with pytest.raises(ValueError, match='model.safetensors'): push_folder(places[0], 'me/model')
    (places[0] / 'model.safetensors').unlink()
    with pytest.raises((ValueError, FileNotFoundError), match='safetensors'):
        push_folder(places[0], 'me/model')
    assert not hub.calls


def test_the_card_and_the_template_may_be_edited(tmp_path, bpe, hub):
    checkpoint(tmp_path / 'stock', bpe)
    place = export_folder(tmp_path / 'stock', tmp_path / 'out', 'sparsecod')
    for name in ('README.md', 'chat_template.jinja'): (place / name).write_text('mine', encoding='utf-8')
    push_folder(place, 'me/model')
    assert hub.calls[-1][2]['README.md'] == b'mine'
    assert (export_folder(place, tmp_path / 'stock again') / 'chat_template.jinja').read_text(
        encoding='utf-8') == 'mine'


def test_a_folder_without_a_seal_is_not_pushed(tmp_path, hub):
    random_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='manifest.json'): push_folder(tmp_path, 'me/model')
    assert not hub.calls


def test_a_manifest_of_another_tool_is_left_alone(tmp_path):
    stock = stock_model('Llama')
    stock.save_pretrained(tmp_path)
    for content in ('{"files": 3}', '[1, 2]'):
        (tmp_path / 'manifest.json').write_text(content, encoding='utf-8')
        assert same(from_hf(tmp_path)[0], stock)


def test_a_place_that_cannot_be_written_is_refused_before_any_work(run, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('', encoding='utf-8')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full/notes.txt').write_text('', encoding='utf-8')
    monkeypatch.setattr('sparsecod.exchange._open_saved', lambda *args: pytest.fail('work was done'))
    monkeypatch.setattr('sparsecod.exchange.to_hf', lambda *args: pytest.fail('work was done'))
    for name in ('file', 'file/out', 'file/a/b', 'full'):
        with pytest.raises(OSError, match=name.split('/')[0]): export_folder(run, tmp_path / name)
        with pytest.raises(OSError, match=name.split('/')[0]): export_model(random_model(), tmp_path / name)
    monkeypatch.setattr('os.access', lambda path, mode: False)
    with pytest.raises(PermissionError, match='new'): export_folder(run, tmp_path / 'new/out')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'full']


def test_wrapped_models_come_in_and_quantised_ones_do_not():
    stock = stock_model('Llama')
    for wrapped in (torch.compile(stock, backend='eager'), torch.nn.DataParallel(stock)):
        assert same(from_hf(wrapped)[0], stock)
    with torch.device('meta'): empty = transformers.LlamaForCausalLM(stock.config)
    with pytest.raises(ValueError, match='meta'): from_hf(empty)
    part = stock.model.layers[1].mlp.up_proj
    part.weight = torch.nn.Parameter(part.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match='up_proj.*int8'): from_hf(stock)
