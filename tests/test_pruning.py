"Pruning: known answers, models edited by hand for every family, and checkpoints that keep their promise."
import copy
import json
import math
import os

import jsonschema
import numpy as np
import pytest
import torch
import transformers
from scipy import stats
from torch import nn
from torch.nn import functional

from sparsecod.adapters import adapt, load_network
from sparsecod.core import ModelConfig, Transformer
from sparsecod.integrity import check_stamp
from sparsecod.pruning import (CRITERIA, add_influence, angular_distance, block_influence, _choose_removal,
                               _cut_config, greedy_order, influence_scores,
                               loss_frame, loss_without, _parse_spans, prune, _rank_agreement, removals,
                               _span_loss, _sublayer_losses)
from sparsecod.scores import SCORES_SCHEMA, ScoreConfig, score_model, scores_frame, trace
from test_adapters import FAMILIES, L, MORE, T, V, tiny

MOE = dict(num_experts_per_tok=2, moe_intermediate_size=16)
ROUTED = MOE | dict(n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1)
FURTHER = dict(
    Starcoder2={}, Glm4={}, Nemotron={}, Gemma={},
    SmolLM3=dict(no_rope_layers=[1, 0, 1, 1], use_sliding_window=False), GPTNeo={},
    Cohere2=dict(sliding_window=5), Exaone4=dict(sliding_window=5), GPTJ=dict(rotary_dim=4),
    GptOss=dict(num_local_experts=4, sliding_window=5),
    Qwen2Moe=MOE | dict(num_experts=4, shared_expert_intermediate_size=16, mlp_only_layers=[1, 3]),
    Qwen3Next=MOE | dict(num_experts=4, shared_expert_intermediate_size=16, linear_num_value_heads=4,
                         linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8),
    Olmo={}, Olmo3=dict(sliding_window=5), StableLm={}, Persimmon={}, Helium={}, Arcee={}, SeedOss={},
    HunYuanDenseV1={}, Apertus={}, Ernie4_5={}, Jais2={}, NanoChat={},
    GPTBigCode={}, CodeGen=dict(rotary_dim=4), Ministral=dict(sliding_window=5), Glm={},
    FlexOlmo=dict(num_experts=4, num_experts_per_tok=2),
    GraniteMoe=dict(num_local_experts=4, num_experts_per_tok=2), Phimoe=dict(num_local_experts=4),
    Dots1=ROUTED | dict(first_k_dense_replace=1),
    Glm4Moe=ROUTED | dict(first_k_dense_replace=1),
    Lfm2=dict(layer_types=['conv', 'full_attention'] * 2, block_ff_dim=40), VaultGemma=dict(sliding_window=5),
    Doge={})
BARE = 'GPTNeo', 'GPTJ', 'GPTBigCode', 'CodeGen', 'Persimmon'        # no groups of heads
QUICK = ('Qwen2', 'Gemma2', 'GPT2', 'Mixtral', 'Falcon', 'OPTPost', 'GPTNeo', 'Qwen2Moe', 'Qwen3Next',
         'Dots1', 'Lfm2')
# all of them take minutes
PROVEN = [*FAMILIES, *MORE, *FURTHER] if os.environ.get('SPARSECOD_ALL_FAMILIES') else QUICK
STRANGE = 'OPTPost',  # norms on the stream itself: no sublayer can be left out alone
WINDOWS = torch.randint(V, (5, T + 1), generator=torch.Generator().manual_seed(3))
OTHERS = torch.randint(V, (4, T + 1), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def own_loss(network, w=WINDOWS):
    "Loss of each sequence, by the network's own forward pass."
    logits = network(w[:, :-1], use_cache=False).logits  # (N, T, V)
    return functional.cross_entropy(logits.flatten(0, 1).double(), w[:, 1:].flatten(),
                                    reduction='none').view(len(w), -1).mean(1)


def further(family):
    "As tiny, for families that no other test knows."
    sizes = dict(vocab_size=V, hidden_size=32, intermediate_size=40, num_hidden_layers=L,
                 num_attention_heads=4, max_position_embeddings=32,
                 initializer_range=.2, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    if family == 'GPTNeo':
        sizes |= dict(num_layers=sizes.pop('num_hidden_layers'), attention_types=[[['global', 'local'], 2]],
                      window_size=5)
    elif family not in BARE: sizes |= dict(num_key_value_heads=2, head_dim=8)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers,
                                                                 family + 'Config')(**sizes
                                                                                    | FURTHER[family])).eval()


def by_hand(network, gone):
    "A copy whose list of blocks is shorter."
    made = copy.deepcopy(network)
    blocks = adapt(network).blocks
    path = next(name for name, part in network.named_modules() if part is blocks)
    parent, _, name = path.rpartition('.')
    left = nn.ModuleList(block for l, block in enumerate(made.get_submodule(path), 1) if l not in gone)
    setattr(made.get_submodule(parent), name, left)
    made.config.get_text_config().num_hidden_layers = len(left)
    return made


def silent(network, l, attention):
    "A copy in which all weights of the attention of block l, or all others but norms, are zero."
    made = copy.deepcopy(network)
    for name, p in adapt(made).blocks[l - 1].named_parameters():
        if 'norm' in name or 'residual' in name or name.startswith('ln_'): continue
        if ('attn' in name or 'attention' in name or name.startswith('conv')) == attention: p.data.zero_()
    return made


@pytest.mark.parametrize('family', PROVEN)
def test_spans_sublayers_and_checkpoints_equal_a_model_edited_by_hand(family, tmp_path):
    network = further(family) if family in FURTHER else tiny(family)
    check_promise(network, [2, 3], tmp_path)
    model = adapt(network)
    t = trace(model, WINDOWS)
    for n, l in ((1, 1), (2, 2), (3, 1)):
        same = list(getattr(network.config, 'layer_types', None) or [0])
        if len(set(same)) == 1:
            assert torch.allclose(_span_loss(model, t, l, n), own_loss(by_hand(network, range(l, l + n))),
                                  rtol=1e-4)
        assert torch.allclose(_span_loss(model, t, l, n),
                              loss_without(model, WINDOWS, range(l, l + n), batch_size=2), rtol=1e-5)
    if family in STRANGE:
        with pytest.raises(ValueError, match='block 1'): _sublayer_losses(model, t, 1)
        return
    for l in (1, L):
        found = _sublayer_losses(model, t, l)
        for name, attention in (('attention', True), ('feed_forward', False)):
            assert torch.allclose(found[name], own_loss(silent(network, l, attention)), rtol=1e-4)
    assert (found['attention'] - found['feed_forward']).abs().max() > 1e-4


def check_promise(network, gone, tmp_path):
    promised = loss_without(adapt(network), WINDOWS, gone)
    record = prune(network, tmp_path / 'small', OTHERS, WINDOWS, spans=','.join(map(str, gone)), n_random=3)
    assert (record['removed'] == gone
            and record['loss']['before']['value'] == pytest.approx(own_loss(network).mean().item(), rel=1e-5))
    assert record['loss']['after']['value'] == pytest.approx(promised.mean().item(), rel=1e-4)
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'small').eval()
    assert type(small) is type(network) and small.config.get_text_config().num_hidden_layers == L - len(gone)
    assert torch.allclose(own_loss(small), promised, rtol=1e-4)
    assert small.generate(WINDOWS[:1, :3], max_new_tokens=2, do_sample=False).shape == (1, 5)
    written = json.loads((tmp_path / 'small' / 'pruning.json').read_text(encoding='utf-8'))
    assert {**check_stamp(written, 'pruning.json'), 'checksum': None} == record | dict(checksum=None)


@pytest.mark.parametrize('network, spans', [
    (lambda: tiny('GPT2', scale_attn_by_inverse_layer_idx=True), '2'),  # does otherwise in another place
    (lambda: tiny('Qwen3Moe', decoder_sparse_step=2), '2'),  # every second block has experts
    (lambda: further('Qwen2Moe').__class__(further(
        'Qwen2Moe').config.__class__(**further('Qwen2Moe').config.to_dict() | dict(
        mlp_only_layers=[], decoder_sparse_step=2))).eval(), '1')])
def test_families_that_count_their_blocks_are_refused(network, spans, tmp_path):
    network = network()
    adapt(network)
    for dtype in (None, torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match=type(network).__name__):
            prune(network, tmp_path / 'small', OTHERS, WINDOWS, spans=spans, dtype=dtype)
        assert not any(tmp_path.iterdir())


# --- known answers, and the published arithmetic

@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=V, n_layers=6, d_model=16, n_heads=2, context_length=T,
                                   init_std=.3)).eval()


def test_influence_and_angles_equal_the_published_arithmetic(model):
    "As in ShortGPT's block_influence and PruneMe's angular_distance, on the same states."
    t, h = trace(model, WINDOWS), [x.numpy() for x in trace(model, WINDOWS).streams]
    norm = lambda x: np.linalg.norm(x, axis=-1)
    for l in range(1, 7):
        a, b = h[l - 1].reshape(-1, 16), h[l].reshape(-1, 16)
        similar = np.nan_to_num(np.diag(a @ b.T / (norm(a)[:, None] * norm(b)[None])), nan=.5)
        assert block_influence(t)[l - 1].mean() == pytest.approx(1 - similar.mean(), rel=1e-4)
        for n in range(1, 8 - l):
            a, b = (torch.tensor(h[k][:, -1]) / torch.tensor(norm(h[k][:, -1]))[:, None]
                    for k in (l - 1, l - 1 + n))
            theirs = torch.acos((a * b).sum(1).clamp(-1, 1)) / torch.pi
            assert torch.allclose(angular_distance(t)[n - 1, l - 1].float(), theirs, atol=1e-4)
    assert angular_distance(t)[5, 1:].isnan().all() and not angular_distance(t)[5, 0].isnan().any()


def test_scores_with_intervals(model):
    found = influence_scores(model, WINDOWS, longest=2, batch_size=2)
    base, loss = own(model, ()), found['scalars']['loss']
    assert (loss['value'] == pytest.approx(base.mean().item(), rel=1e-6)
            and loss['low'] < loss['value'] < loss['high'])
    skip = [(own(model, [l]) - base).double() for l in range(1, 7)]
    for l, x in enumerate(skip):
        half = stats.t.ppf(.975, 4) * x.std() / 5 ** .5
        ends = found['intervals']['skip_loss_increase']
        assert (ends['low'][l], ends['high'][l]) == pytest.approx(((x.mean() - half).item(),
                                                                   (x.mean() + half).item()), rel=1e-3,
                                                                   abs=1e-6)
    assert found['arrays']['span_loss_increase'][1][:5] == pytest.approx(
        [(own(model, [l, l + 1]) - base).mean().item() for l in range(1, 6)], abs=1e-5)
    want = stats.spearmanr(found['arrays']['block_influence'], [x.mean() for x in skip]).statistic
    assert found['scalars']['influence_rank_agreement']['value'] == pytest.approx(want)
    assert _rank_agreement(torch.tensor([1., 2, 3]), torch.tensor([9., 4, 1])) == -1


def test_scores_with_influence(model, tmp_path):
    "What is added, in the schema and in the table; and a stop loses nothing that was measured."
    fit = torch.randint(V, (40, T + 1), generator=torch.Generator().manual_seed(5))
    before = score_model(model, WINDOWS, fit,
                         ScoreConfig(n_sequences=5, n_fit=40, n_jacobian=2, n_bootstrap=20), progress=False)
    want, calls = influence_scores(model, WINDOWS, longest=1), []
    with model.blocks[5].register_forward_hook(lambda *_: calls.append(1)):
        found = add_influence(before, model, WINDOWS, resume=tmp_path)
    once = len(calls)
    with model.blocks[5].register_forward_hook(lambda *_: calls.append(1)):
        assert add_influence(before, model, WINDOWS, resume=tmp_path) == found
    assert len(calls) - once < once / 2
    with pytest.raises(ValueError, match='windows'): add_influence(before, model, OTHERS, resume=tmp_path)
    jsonschema.validate(found, SCORES_SCHEMA)
    new = {'block_influence', 'angular_distance', 'attention_loss_increase', 'feed_forward_loss_increase'}
    assert (set(found['arrays']) - set(before['arrays']) == new
            and all(found[part][name] == want[part][name] for part in ('arrays', 'intervals')
                    for name in new))
    assert all(found['arrays'][name] == x for name, x in before['arrays'].items())
    agreement, got = stats.spearmanr(found['arrays']['block_influence'],
                                     found['arrays']['skip_loss_increase']).statistic, found['scalars']['influence_rank_agreement']
    assert got['value'] == pytest.approx(agreement) and got['low'] <= got['value'] <= got['high']
    frame = scores_frame(found)
    # first and last block
    spans = frame[frame.score == 'angular_distance'].set_index(['block', 'other']).value
    assert len(spans) == 21 and spans[2, 4] == found['arrays']['angular_distance'][2][1]


def test_losses_by_sequence_and_position(model):
    whole, cut = loss_frame(model, WINDOWS), loss_frame(model, WINDOWS, [2, 5])
    for frame, gone in ((whole, ()), (cut, (2, 5))):
        assert frame.groupby('sequence').loss.mean().tolist() == pytest.approx(own(model, gone).tolist(),
                                                                               rel=1e-5)
    row = whole[(whole.sequence == 3) & (whole.position == 4)].iloc[0]
    with torch.no_grad(): logits = model(WINDOWS[3:4, :5])[0, -1]  # of what stands at 5, from 0 to 4
    assert (row.token == WINDOWS[3, 5]
            and row.loss == pytest.approx(-logits.log_softmax(-1)[int(row.token)].item(), rel=1e-5))


def test_a_gguf_file_becomes_a_folder_that_opens(tmp_path):
    from test_real_model import llama, write_gguf
    from sparsecod.adapters import open_model
    source = write_gguf(tmp_path / 'whole.gguf', llama())
    model, tokenizer = open_model(source)
    windows = torch.randint(model.config.vocab_size, (8, 12), generator=torch.Generator().manual_seed(0))
    record = prune(model, tmp_path / 'small', windows[:4], windows[4:], blocks=1, source=source,
                   tokenizer=tokenizer, dtype=torch.bfloat16)
    small, words = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'small').eval(),
                    transformers.AutoTokenizer.from_pretrained(tmp_path / 'small'))
    assert (small.dtype == torch.bfloat16 and not hasattr(small.config, 'quantization_config')
            and small.config.num_hidden_layers == model.config.n_layers - 1)
    assert own_loss(small.float(), windows[4:]).mean() == pytest.approx(record['loss']['after']['value'],
                                                                        rel=1e-2)
    assert words('not to be')['input_ids'] == tokenizer.encode('not to be')


@torch.no_grad()
def own(model, gone, w=WINDOWS):
    "Loss of each sequence of a Transformer whose list of blocks is shorter."
    made = copy.deepcopy(model)
    made.blocks = nn.ModuleList(b for l, b in enumerate(made.blocks, 1) if l not in gone)
    return functional.cross_entropy(made(w[:, :-1]).flatten(0, 1), w[:, 1:].flatten(),
                                    reduction='none').view(len(w), -1).mean(1)


def test_the_greedy_order_equals_the_slow_one(model):
    found, order = greedy_order(model, WINDOWS, 4, batch_size=2), []
    base = own(model, ()).mean()
    for k in range(1, 5):
        order.append(min({*range(1, 7)} - {*order}, key=lambda l: own(model, [*order, l]).mean()))
        cost = own(model, order).mean()
        assert found['loss'][k]['value'] == pytest.approx(cost.item(), rel=1e-5)
        gap = cost - base - sum(own(model, [l]).mean() - base for l in order)
        assert found['gap'][k - 1]['value'] == pytest.approx(gap.item(), abs=1e-5)
    assert found['order'] == order
    with pytest.raises(ValueError, match='most=6'): greedy_order(model, WINDOWS, 6)


@torch.no_grad()
def test_criteria(model):
    sets = {by: list(removals(model, WINDOWS, by)) for by in CRITERIA}
    assert all([len(s) for s in found] == [1, 2, 3, 4, 5]
               and all(sorted({*s}) == s and 1 <= s[0] and s[-1] <= 6 for s in found)
               for found in sets.values())
    alone = torch.stack([own(model, [l]).mean() for l in range(1, 7)])
    assert (sets['skip'][2] == sorted((alone.argsort()[:3] + 1).tolist())
            and sets['greedy'][0] == sets['skip'][0])
    assert sets['influence'][3] == sorted((block_influence(trace(model, WINDOWS)).mean(1).argsort()[:4]
                                           + 1).tolist())
    angles = angular_distance(trace(model, WINDOWS)).mean(-1)
    assert all(s == list(range(s[0], s[0] + n)) and angles[n - 1, s[0] - 1] == angles[n - 1, :7 - n].min()
               for n, s in enumerate(sets['angle'], 1))
    assert (sets['random'] != list(removals(model, WINDOWS, 'random', seed=1))
            and sets['random'] == list(removals(model, WINDOWS, 'random')))


def test_the_benchmark_chooses_as_prune_does(model, monkeypatch, root):
    monkeypatch.syspath_prepend(str(root / 'benchmarks'))
    from prune_model import choices
    found = choices(influence_scores(model, WINDOWS, longest=1), 6, 4, 1, 0)
    for by in ('skip', 'influence', 'angle', 'random'):
        assert found['random 0' if by == 'random' else by] == list(removals(model, WINDOWS, by))[:4]
    assert found['last'] == [[5], [4, 5], [3, 4, 5], [2, 3, 4, 5]]


def test_a_budget_is_used_up_and_not_exceeded(model):
    with torch.no_grad(): sets = [[], *removals(model, WINDOWS, 'greedy')]
    ratios = [(own(model, s).mean() / own(model, ()).mean()).item() for s in sets]
    for budget in (ratios[1] + 1e-4, max(ratios[:4]) + 1e-4):
        held = 0
        while held + 1 < len(ratios) and ratios[held + 1] <= budget: held += 1
        assert _choose_removal(model, WINDOWS, budget=budget) == sets[held]
    with pytest.raises(ValueError, match='budget='): _choose_removal(model, WINDOWS, budget=ratios[1] - 1e-4)
    assert _choose_removal(model, WINDOWS, blocks=3,
                           by='skip') == next(s for s in removals(model, WINDOWS, 'skip') if len(s) == 3)


# --- what is written, and what is refused

@pytest.mark.parametrize('changes',
                         [{}, dict(norm='layernorm_scaling'), dict(norm='peri_ln'), dict(n_experts=4)])
def test_our_own_models_become_stock_ones(changes, tmp_path):
    "Under LayerNorm scaling a block keeps the factor of the place it had."
    torch.manual_seed(0)
    ours = Transformer(ModelConfig(vocab_size=V, n_layers=4, d_model=16, n_heads=2, context_length=T,
                                   init_std=.3, **changes)).eval()
    before = copy.deepcopy(ours.state_dict())
    record = prune(ours, tmp_path / 'small', OTHERS, WINDOWS, blocks=2)
    assert record['loss']['after']['value'] == pytest.approx(own(ours, record['removed']).mean().item(),
                                                             rel=1e-4)
    assert torch.allclose(own_loss(load_network(tmp_path / 'small')), own(ours, record['removed']).double(),
                          rtol=1e-4)
    assert all(torch.equal(w, before[name]) for name, w in ours.state_dict().items())


def test_files_beside_the_weights_are_kept(tmp_path):
    network = tiny('Qwen2', dtype='bfloat16').to(torch.bfloat16)
    network.generation_config.update(do_sample=True, temperature=.25)
    network.save_pretrained(tmp_path / 'whole')
    for name in ('tokenizer.json', 'tokenizer_config.json', 'merges.txt'):
        (tmp_path / 'whole' / name).write_text(f'{{"{name}": 1}}', encoding='utf-8')
    (tmp_path / 'whole' / 'chat_template.jinja').write_text('{{ messages }}', encoding='utf-8')
    source = tmp_path / 'whole'
    record = prune(load_network(source), tmp_path / 'small', OTHERS, WINDOWS, blocks=1, by='influence',
                   source=source)
    for name in ('generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'merges.txt',
                 'chat_template.jinja'):
        assert (tmp_path / 'small' / name).read_bytes() == (source / name).read_bytes()
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'small')
    kept = [l for l in range(1, L + 1) if l not in record['removed']]
    assert small.dtype == torch.bfloat16 and small.generation_config.temperature == .25
    assert small.config.layer_types == [network.config.layer_types[l - 1] for l in kept]
    prune(load_network(source), tmp_path / 'wide', OTHERS, WINDOWS, blocks=1, source=source,
          dtype=torch.float32)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'wide').dtype == torch.float32


def test_numbers_of_blocks_in_a_configuration_are_counted_anew():
    config = further('Qwen2Moe').config
    config.max_window_layers, config.eos_token_id = 3, [1, 2, 3, 4]
    cut = _cut_config(config, [1, 4], L)
    assert cut.mlp_only_layers == [1] and cut.max_window_layers == 1 and cut.eos_token_id == [1, 2, 3, 4]
    assert config.mlp_only_layers == [1, 3] and config.num_hidden_layers == L


@pytest.mark.parametrize('named, options', [
    ('blocks', dict(blocks=6)), ('blocks', dict(blocks=0)), ('spans', dict(spans='1-6')),
    ('spans', dict(spans='4-3')), ('spans', dict(spans='0-2')),
    ('spans', dict(spans='2,7')), ('spans', dict(spans='')), ('spans', dict(spans='two')),
    ('budget', dict(budget=0)), ('budget', dict(budget=-1.)),
    ('budget', dict(budget=math.inf)), ('budget', dict(budget=math.nan)), ('budget', dict(budget=.99)),
    ('budget', dict(budget=1., by='random', seed=1)), ('budget', {}), ('blocks', dict(blocks=1, spans='2')),
    ('by', dict(blocks=1, by='age'))])
def test_what_cannot_be_removed_is_refused(model, tmp_path, named, options):
    with pytest.raises(ValueError, match=f'{named}='):
        prune(model, tmp_path / 'small', OTHERS, WINDOWS, **options)
    assert not any(tmp_path.iterdir())


def test_nothing_is_written_over_and_no_text_used_twice(model, tmp_path):
    for name in ('folder', 'file'):
        (tmp_path / name).mkdir() if name == 'folder' else (tmp_path / name).write_text('mine',
                                                                                        encoding='utf-8')
    for name in ('folder', 'file'):
        with pytest.raises(FileExistsError, match=name):
            prune(model, tmp_path / name, OTHERS, WINDOWS, blocks=1)
    assert ((tmp_path / 'file').read_text(encoding='utf-8') == 'mine'
            and not any((tmp_path / 'folder').iterdir()))
    with pytest.raises(ValueError, match='held_out'):
        prune(model, tmp_path / 'new', WINDOWS[:2], WINDOWS, blocks=1)
    assert _parse_spans(' 2 - 3,5', 5) == [2, 3, 5]
