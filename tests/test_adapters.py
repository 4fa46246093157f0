"""Families of the transformers library, block by block, against their own forward pass and against models
edited by hand."""
import copy
import functools
import itertools
import json
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import sparsecod.adapters as adapters
from sparsecod.adapters import AdaptedModel, adapt, open_model
from sparsecod.core import ModelConfig, Transformer
from sparsecod.data import train_bpe
from sparsecod.exchange import from_hf
from sparsecod.integrity import Damaged
from sparsecod.scores import ScoreConfig, score_model

L, D, V, T, WINDOW = 4, 32, 61, 12, 5
ALTERNATE = ['sliding_attention', 'full_attention'] * 2
FAMILIES = dict(
    Llama={}, Mistral=dict(sliding_window=WINDOW),
    Qwen2=dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    Qwen3=dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    Gemma2=dict(sliding_window=WINDOW, layer_types=ALTERNATE, final_logit_softcapping=3.0,
                attn_logit_softcapping=2.0),
    Gemma3Text=dict(sliding_window=WINDOW, layer_types=ALTERNATE), Phi3=dict(sliding_window=WINDOW), Olmo2={},
    GPT2={}, GPTNeoX={},
    Mixtral=dict(num_local_experts=4, sliding_window=WINDOW),
    Olmoe=dict(num_experts=4, num_experts_per_tok=2),
    Qwen3Moe=dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24))
WINDOWED = ('Mistral', 'Qwen2', 'Qwen3', 'Gemma2', 'Gemma3Text', 'Phi3', 'Mixtral')
MORE = dict(
    Cohere=dict(logit_scale=0.3),
    Granite=dict(logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5), Phi={},
    OPT=dict(ffn_dim=40), Bloom={}, XGLM=dict(ffn_dim=40), BioGpt={}, Mpt={}, Falcon={},
    FalconRW=dict(alibi=True),
    Llama4Text=dict(attention_chunk_size=WINDOW, intermediate_size_mlp=40, num_local_experts=4),
    OPTProjected=dict(ffn_dim=40, word_embed_proj_dim=16),
    OPTPost=dict(ffn_dim=40, word_embed_proj_dim=16, do_layer_norm_before=False))
CLASS_OF = dict(OPTProjected='OPT', OPTPost='OPT', FalconRW='Falcon')  # where a family has more than one kind
TUPLES = 'Bloom', 'Mpt', 'Falcon', 'FalconRW'  # their blocks return tuples
NO_GROUPS = 'GPT2', 'GPTNeoX', 'OPT', 'Phi', 'Bloom', 'XGLM', 'BioGpt', 'Mpt', 'Falcon'
TOKENS = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(0))


def tiny(family, **changes):
    "A random network with weights large enough that every part of it shows in the logits."
    sizes = dict(vocab_size=V, hidden_size=D, intermediate_size=40, num_hidden_layers=L,
                 num_attention_heads=4, max_position_embeddings=32,
                 initializer_range=0.2, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    kind = CLASS_OF.get(family, family)
    if kind not in NO_GROUPS: sizes |= dict(num_key_value_heads=2, head_dim=8)
    torch.manual_seed(0)
    config = getattr(transformers, kind + 'Config')(**sizes | (FAMILIES | MORE).get(family, {}) | changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def is_close(ours, theirs):
    return torch.allclose(ours, theirs, atol=2e-6 * theirs.abs().max().item(), rtol=1e-5)


# learned positions; two kinds of attention; experts; a window and one matrix for three
SOME = 'GPT2', 'Gemma2', 'Mixtral', 'Phi3'
made = functools.cache(tiny)                           # for tests that leave it alone


@pytest.fixture(params=FAMILIES)
def network(request): return made(request.param)


@pytest.fixture(params=SOME)
def one_of_some(request): return tiny(request.param)


@torch.no_grad()
def own_logits(network, tokens=TOKENS): return network(tokens).logits


@torch.no_grad()
def all_logits(model, tokens=TOKENS): return model.logits(model.run(model.embed(tokens)))


# --- the same function ---

@pytest.mark.parametrize('family', FAMILIES)
def test_blockwise_logits_are_the_networks_own(family):
    network = tiny(family)
    for attention in ('default', 'eager'):
        if attention == 'eager': network.set_attn_implementation('eager')
        model = adapt(network)
        assert isinstance(model, AdaptedModel) and model.network is network
        # other batches and lengths, one after the other
        for tokens in (TOKENS, TOKENS[:1], TOKENS[:, :2], TOKENS[:, 3:11]):
            assert is_close(all_logits(model, tokens), own_logits(network, tokens))


@pytest.mark.parametrize('family', MORE)
def test_further_families_need_no_code_of_their_own(family):
    network = made(family)
    model = adapt(network)
    for tokens in (TOKENS, TOKENS[:1], TOKENS[:2, 3:11], TOKENS):  # the number of sequences changes too
        assert is_close(all_logits(model, tokens), own_logits(network, tokens))


@pytest.mark.parametrize('family', WINDOWED)
def test_the_window_matters_at_this_length(family):
    "Otherwise the tests of this file could not tell a sliding window from a full one."
    far = TOKENS.clone()
    far[:, 0] = (far[:, 0] + 1) % V
    network = tiny(family, **{'num_hidden_layers': 1}
                   | ({'layer_types': ALTERNATE[:1]} if family.startswith('Gemma') else {})
                   | ({'max_window_layers': 0} if family.startswith('Qwen') else {}))
    changed = (own_logits(network) - own_logits(network, far)).abs().amax((0, 2))       # (T,)
    assert (changed[:WINDOW] > 1e-2).all() and (changed[WINDOW:] < 1e-5).all()


def test_switching_the_attention_implementation_later_is_noticed():
    network = tiny('Gemma3Text')
    model = adapt(network)
    before = all_logits(model)
    network.set_attn_implementation('eager')
    assert is_close(all_logits(model), own_logits(network)) and is_close(all_logits(model), before)


def test_streams_and_updates_are_those_of_the_network(network):
    "The library's own list of hidden states; its last entry is after the final norm."
    theirs = network(TOKENS, output_hidden_states=True).hidden_states
    model, seen = adapt(network), []
    with torch.no_grad(): model.run(model.embed(TOKENS), watch=lambda l, out: seen.append((l, out)))
    assert [l for l, _ in seen] == list(range(1, L + 1)) and len(model.blocks) == L
    assert is_close(model.embed(TOKENS), theirs[0])
    again = []
    with torch.no_grad():
        model.run(seen[1][1].stream, start=2, stop=3, watch=lambda l, out: again.append((l, out)))
    assert [l for l, _ in again] == [3] and is_close(again[0][1].stream, seen[2][1].stream)
    for (l, out), before, after in zip(seen, theirs, theirs[1:-1]):
        assert is_close(out.stream, after) and is_close(out.update, after - before)
    assert is_close(model.final_norm(seen[-1][1].stream), theirs[-1])


def test_token_losses_are_the_cross_entropy_of_the_logits(network, monkeypatch):
    "In slices: the head never sees more tokens than fit."
    model, rows = adapt(network), []
    expected = functional.cross_entropy(own_logits(network)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(),
                                        reduction='none')
    with torch.no_grad():
        h = model.run(model.embed(TOKENS[:, :-1]))
        whole = model.token_losses(h, TOKENS[:, 1:])
        monkeypatch.setattr(adapters, 'LOGITS_AT_ONCE', 7 * V)
        with network.get_output_embeddings().register_forward_hook(
            lambda head, args, out: rows.append(out.numel() // V)):
            sliced = model.token_losses(h, TOKENS[:, 1:])
    assert whole.shape == (3, T - 1) and is_close(whole.flatten(), expected) and is_close(sliced, whole)
    assert sum(rows) == 3 * (T - 1) and max(rows) == 7


def test_sizes(network):
    c = adapt(network).config
    assert (c.vocab_size, c.n_layers, c.d_model, c.n_heads, c.context_length) == (V, L, D, 4, 32)
    assert c.n_kv_heads == (4 if c.architecture in ('GPT2LMHeadModel', 'GPTNeoXForCausalLM') else 2)
    json.dumps(c.to_dict())


def test_a_start_that_is_no_stream_is_refused():
    model = adapt(tiny('Llama'))
    h = model.embed(TOKENS)
    assert model.run(h, start=L) is h
    with pytest.raises(ValueError, match='start=5'): model.run(h, start=L + 1)


def test_hooks_of_the_user_act_once():
    network = tiny('GPT2')
    plain = own_logits(network)
    for block in network.transformer.h:
        block.register_forward_pre_hook(lambda block, args: (args[0] + 1 + args[0].abs(), *args[1:]))
    model = adapt(network)
    assert is_close(all_logits(model), own_logits(network)) and not is_close(own_logits(network), plain)


# --- interventions, against a network edited by hand ---

class Instead(nn.Module):
    "Stands in the place of a block."
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, h, *args, **kwargs): return self.function(h)


def lists_by_layer(network):
    "The list of blocks, and the list of attention types where there is one."
    blocks = next(part for part in network.modules() if isinstance(part, nn.ModuleList) and len(part) == L)
    return blocks, getattr(network.config, 'layer_types', None)


@contextmanager
def in_place(network, l, block):
    blocks, _ = lists_by_layer(network)
    original, blocks[l - 1] = blocks[l - 1], block
    try: yield
    finally: blocks[l - 1] = original


@contextmanager
def swapped(network, i, j):
    def swap():
        for items in lists_by_layer(network):
            if items is not None: items[i - 1], items[j - 1] = items[j - 1], items[i - 1]
    swap()
    try: yield
    finally: swap()


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES | MORE)
def test_skip_swap_and_replacement_equal_edited_networks(family):
    network = made(family)
    model, plain = adapt(network), own_logits(network)
    h = model.embed(TOKENS)
    A, b = torch.randn(D, D, generator=torch.Generator().manual_seed(1)) / 8, torch.linspace(-1, 1, D)
    affine = lambda h: h + h @ A + b
    for l in (1, 3):
        all_logits(model, TOKENS.flip(1))  # another batch leaves nothing behind
        before = model.run(h, stop=l - 1)
        for by_hand in (lambda h: h, affine):
            instead = Instead((lambda h: (by_hand(h),)) if family in TUPLES else by_hand)
            with in_place(network, l, instead): expected = own_logits(network)
            assert (is_close(model.logits(model.run(by_hand(before), start=l)), expected)
                    and not is_close(plain, expected))
    for i, j in ((1, 2), (1, 4)):
        with swapped(network, i, j): expected = own_logits(network)
        x = model.run(model.run(h, stop=i - 1), start=j - 1, stop=j)
        x = model.run(model.run(x, start=i, stop=j - 1), start=i - 1, stop=i)
        assert is_close(model.logits(model.run(x, start=j)), expected) and not is_close(plain, expected)


# --- scores, against full forward passes of a network edited by hand ---

SETTINGS = ScoreConfig(n_sequences=6, n_fit=40, n_jacobian=1, batch_size=4, n_bootstrap=20)
SCORED, FITTED = torch.randint(V, (46, T + 1), generator=torch.Generator().manual_seed(3)).split([6, 40])


@torch.no_grad()
def full_forward(network, windows):
    "Loss in nats a token, and what goes into and comes out of every block."
    seen = [None] * L
    with ExitStack() as hooks:
        for i, block in enumerate(lists_by_layer(network)[0]):
            def keep(block, args, out, i=i): seen[i] = args[0], out[0] if isinstance(out, tuple) else out
            hooks.enter_context(block.register_forward_hook(keep))
        logits = network(windows[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item(), seen


@pytest.fixture(params=SOME, scope='module')
def scored(request):
    "A network, and the arrays of its scores."
    return made(request.param), score_model(made(request.param), SCORED, FITTED, SETTINGS,
                                            progress=False)['arrays']


def test_causal_scores_equal_edited_networks(scored):
    network, found = scored
    size = lambda x: x.norm(dim=-1).mean()
    loss, base = full_forward(network, SCORED)
    for s in range(1, L + 1):
        with in_place(network, s, Instead(lambda h: h)): loss_without, without = full_forward(network, SCORED)
        assert found['skip_loss_increase'][s - 1] == pytest.approx(loss_without - loss, abs=2e-5)
        assert found['causal'][s - 1][:s] == [None] * s
        for l, ((x, y), (x2, y2)) in enumerate(zip(base, without), 1):
            if l > s:
                assert found['causal'][s - 1][l - 1] == pytest.approx(
                    (size((y2 - x2) - (y - x)) / size(y - x)).item(), rel=1e-4)


def test_permutation_scores_equal_edited_networks(scored):
    network, found = scored
    loss, _ = full_forward(network, SCORED)
    for i, j in itertools.combinations(range(1, L + 1), 2):
        with swapped(network, i, j): other, _ = full_forward(network, SCORED)
        assert found['permutation'][i - 1][j - 1] == found['permutation'][j - 1][i - 1] == pytest.approx(
            abs(other - loss) / loss, rel=1e-3, abs=1e-5)


def test_usefulness_equals_edited_networks(scored):
    """Least squares on the stored states of all blocks, then a full forward pass with each map in the place
    of its block."""
    network, found = scored
    (loss, _), (_, states) = full_forward(network, SCORED), full_forward(network, FITTED)
    for l, (x, y) in enumerate(states, 1):
        x, y = x.flatten(0, 1).double(), y.flatten(0, 1).double()  # (n, D)
        # (D + 1, D)
        solved = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y - x).solution.float()
        with in_place(network, l, Instead(lambda h: h + h @ solved[:-1] + solved[-1])):
            replaced, _ = full_forward(network, SCORED)
        assert found['usefulness_ratio'][l - 1] == pytest.approx(replaced / loss, rel=2e-4)


@pytest.mark.parametrize('family', SOME[:2])
def test_blocks_with_known_answers(family):
    "Nothing depends on an identity, and an affine block loses nothing when its affine map takes its place."
    draw, network = torch.Generator().manual_seed(4), made(family)
    A, b = torch.randn(D, D, generator=draw) / D ** .5, torch.randn(D, generator=draw)
    with in_place(network, 2, Instead(lambda h: h)), in_place(network, 3, Instead(lambda h: h + h @ A + b)):
        found = score_model(network, SCORED, FITTED, SETTINGS, progress=False)['arrays']
    assert (found['causal'][1][2:] == [0, 0] and found['causal'][0][1] == 0
            and abs(found['skip_loss_increase'][1]) < 1e-9)
    assert found['causal'][0][2] > 1e-3 and found['causal'][2][3] > 1e-3
    away = [abs(ratio - 1) for ratio in found['usefulness_ratio']]
    assert (away[1] < 1e-6 and away[2] < 2e-5 and min(away[0], away[3]) > 1e-4
            and found['jacobian_per_token'][1] == 0)


# --- gradients ---

def test_gradients_through_a_block_equal_autograd_through_the_network(one_of_some):
    network = one_of_some
    blocks, _ = lists_by_layer(network)
    kept, weights = {}, torch.randn(3, T, D, generator=torch.Generator().manual_seed(2))
    with blocks[1].register_forward_hook(lambda block, args, out: kept.update(x=args[0], y=out)):
        network(TOKENS)
    expected, = torch.autograd.grad(kept['y'], kept['x'], weights)
    model = adapt(network)
    with torch.no_grad():
        assert not model.run(model.embed(TOKENS)).requires_grad
        with torch.enable_grad():
            x = kept['x'].detach().requires_grad_()
            found, = torch.autograd.grad(model.run(x, start=1, stop=2), x, weights)
    assert is_close(found, expected) and expected.abs().max() > 0
    assert all(p.grad is None for p in network.parameters())


def test_what_was_noted_in_inference_mode_or_in_a_transform_serves_later():
    network = tiny('Gemma2')
    for first in (torch.inference_mode(), None):
        model = adapt(network)
        x = model.embed(TOKENS).detach()
        block = lambda h: model.run(h, start=0, stop=1)
        if first is None: _, pull = torch.func.vjp(block, x)
        else:
            with first: model.run(x)
        x = x.clone().requires_grad_()
        found, = torch.autograd.grad(block(x).sum(), x)
        if first is None: assert is_close(pull(torch.ones_like(x))[0], found)
        assert found.abs().max() > 0


# --- the network is left as it was ---

def everything(network):
    "All that could be changed by looking: a copy."
    hooks = [name for name in vars(nn.Module()) if 'hooks' in name]
    parts = {name: (id(part), part.training, set(vars(part)), [list(getattr(part, kind)) for kind in hooks])
             for name, part in network.named_modules()}
    weights = {name: (id(p), p.requires_grad, None if p.grad is None else p.grad.clone(), p.detach().clone())
               for name, p in network.named_parameters()}
    return dict(config=network.config.to_dict(), use_cache=network.config.use_cache,
                attention=network.config._attn_implementation, parts=parts,
                weights=weights, buffers={name: b.clone() for name, b in network.named_buffers()})


def same(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Interrupted(BaseException): "Like a keyboard interrupt: no ordinary exception."


def fail(*args, **kwargs): raise Interrupted


def use(model):
    h = model.embed(TOKENS)
    model.token_losses(model.run(h), TOKENS)
    x = h.detach().requires_grad_()
    torch.autograd.grad(model.run(x, start=2, stop=3).sum(), x)


def test_the_network_is_left_as_it_was(one_of_some):
    network = one_of_some
    blocks, _ = lists_by_layer(network)
    network.train()
    blocks[2].eval()
    weights = list(network.parameters())
    weights[0].requires_grad_(False)
    weights[-1].grad = torch.ones_like(weights[-1])
    blocks[0].register_forward_hook(lambda block, args, out: None)
    before, random = everything(network), torch.get_rng_state()
    model = adapt(network)
    assert same(everything(network), before) and torch.equal(torch.get_rng_state(), random)
    use(model)
    assert same(everything(network), before)
    for error, where in ((Interrupted, 'watch'), (Interrupted, 'embed'), (Interrupted, 'check'),
                         (ValueError, 'block')):
        model = adapt(network)
        model.noted = None, None
        with pytest.raises(error), pytest.MonkeyPatch.context() as patch:
            if where == 'watch': model.run(model.embed(TOKENS), watch=fail)
            if where == 'embed': patch.setattr(network.get_input_embeddings(), 'forward', fail)
            if where == 'check': patch.setattr(blocks[1], 'forward', fail)
            if where == 'block':
                patch.setattr(blocks[1], 'forward', lambda h, *args, **kwargs: h[:, :1, :1] @ h)
            model.embed(TOKENS) if where == 'embed' else adapt(network)
        assert same(everything(network), before), where
        # while the arguments are noted
        with pytest.raises(Interrupted), pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks[2], 'forward', fail)
            model.run(torch.zeros(1, T, D))
        assert same(everything(network), before), where
    use(model)


def test_no_cache_of_keys_and_values(network):
    assert network.config.use_cache
    model = adapt(network)
    for args, kwargs in model.arguments(model.embed(TOKENS)):
        assert (not any(isinstance(x, transformers.Cache) for x in (*args, *kwargs.values()))
                and not kwargs.get('use_cache'))


def test_mode_parameters_and_place_are_the_networks():
    network = tiny('Llama').to(torch.bfloat16)
    model = adapt(network)
    assert model.train() is model and network.training and model.training and not model.eval().training
    assert (list(map(id, model.parameters())) == list(map(id, network.parameters()))
            and list(model.modules()) == list(network.modules()))
    exact = copy.deepcopy(model).float()
    assert is_close(all_logits(exact), own_logits(copy.deepcopy(network).float()))
    assert next(network.parameters()).dtype == torch.bfloat16 and model.to('cpu') is model
    assert torch.allclose(all_logits(model).float(), own_logits(network).float(), atol=0.1)


# --- what is accepted and what is refused ---

def test_what_can_be_scored_already_passes_through():
    ours, theirs = Transformer(ModelConfig(n_layers=1)), adapt(tiny('Llama'))
    assert adapt(ours) is ours and adapt(theirs) is theirs


class Doubled(transformers.LlamaForCausalLM):
    "Does something to its logits that no configuration tells."
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


class Slightly(transformers.LlamaForCausalLM):
    "Off by what half precision would excuse."
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 1.01 * out.logits
        return out


def spoilt(value):
    network = tiny('Llama')
    network.model.layers[2].mlp.down_proj.weight.data[3] = value
    return network


def hidden_block():
    network = tiny('Llama')
    network.config.num_hidden_layers = L - 1
    return network


REFUSED = dict(
    encoder_decoder=(lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
                     'T5ForConditionalGeneration.*encoder-decoder; looked for a decoder alone'),
    no_head=(lambda: tiny('Llama').model, 'LlamaModel.*not a causal language model; looked for a head'),
    classifier=(lambda: transformers.LlamaForSequenceClassification(tiny('Llama').config),
                'LlamaForSequenceClassification.*not a causal language model'),
    no_attention=(lambda: tiny('Mamba', state_size=4),
                  'MambaForCausalLM.*layout is unknown; looked in MambaModel for .*.layers and .norm'),
    secret_logits=(lambda: Doubled(tiny('Llama').config), "Doubled .*do not give the network's own logits"),
    slightly_other_logits=(lambda: Slightly(tiny('Llama').config).double(),
                           "do not give the network's own logits"),
    no_number=(lambda: spoilt(float('nan')), 'not finite'),
    infinite=(lambda: spoilt(float('inf')), 'not finite'),
    hidden_block=(hidden_block, 'each of its 4 blocks once and in order, but made 3 calls'),
    plain_module=(lambda: nn.Linear(2, 2),
                  'Linear cannot be adapted: it must be a model of the transformers library, or offer embed, '
                  'run'),
    nothing=(lambda: None, 'NoneType cannot be adapted'))


@pytest.mark.parametrize('case', REFUSED)
def test_refusals_say_what_was_looked_for(case):
    make, message = REFUSED[case]
    wrong = make()
    with pytest.raises(ValueError, match=message): adapt(wrong)
    if wrong is not None:
        with pytest.raises(ValueError, match=message): open_model(wrong)


# --- blocks that read more than their stream ---

class Watched(nn.Module):
    "A part of a block that knows what other parts, or it itself, did before."
    def __init__(self, part, kind, box, l):
        super().__init__()
        self.part, self.kind, self.box, self.l = part, kind, box, l

    def forward(self, x):
        out, box = self.part(x), self.box
        if self.kind == 'last_input':
            last, box[self.l] = box.get(self.l, out), out
            return out + last
        if self.kind == 'counts':
            box['calls'] = box.get('calls', 0) + 1
            return out * (1 + box['calls'] % 7)
        source = dict(from_block_1=1, from_block_2=2, from_the_block_before=self.l, backwards=L)[self.kind]
        left = box.get('left', out)
        if self.l == source: box['left'] = out
        return ((out + left) / 2 if self.l > source or self.kind in ('backwards', 'from_the_block_before')
                else out)


def sharing(kind, names=('self_attn.v_proj',)):
    "A Llama whose blocks share what the named parts give."
    network, boxes = tiny('Llama'), {name: {} for name in names}
    for l, block in enumerate(network.model.layers, 1):
        for name, box in boxes.items():
            block.set_submodule(name, Watched(block.get_submodule(name), kind, box, l))
    return network


KEYS_AND_VALUES = 'self_attn.k_proj', 'self_attn.v_proj'
SHARING = dict(
    value_residual=lambda: sharing('from_block_1'), value_residual_of_block_2=lambda: sharing('from_block_2'),
    shared_keys_and_values=lambda: sharing('from_block_2', KEYS_AND_VALUES),
    a_chain=lambda: sharing('from_the_block_before'),
    mlp_output=lambda: sharing('from_block_1', ['mlp']),
    last_input=lambda: sharing('last_input', ['mlp.down_proj']),
    backwards=lambda: sharing('backwards', ['mlp.up_proj']), counts=lambda: sharing('counts', ['mlp']))


@pytest.mark.parametrize('case', SHARING)
def test_blocks_that_share_state_are_refused(case):
    with pytest.raises(ValueError, match='block'): adapt(SHARING[case]())
    with pytest.raises(ValueError, match='block'):
        score_model(SHARING[case](), SCORED, FITTED, SETTINGS, progress=False)


def test_what_they_share_is_the_reason():
    "The block that is named reads what another left; without that the same network passes."
    for kind, readers in (('from_block_1', (2, 3, 4)), ('from_block_2', (3, 4))):
        with pytest.raises(ValueError, match=r'block (\d)') as error: adapt(sharing(kind))
        assert int(re.search(r'block (\d)', str(error.value))[1]) in readers
    plain = tiny('Llama')
    for block in plain.model.layers: block.self_attn.v_proj = nn.Sequential(block.self_attn.v_proj)
    assert is_close(all_logits(adapt(plain)), own_logits(plain))


def test_a_block_that_changes_its_stream_in_place_is_refused():
    network = tiny('Llama')
    network.model.layers[1].register_forward_pre_hook(lambda block, args: (args[0].add_(1), *args[1:]))
    with pytest.raises(ValueError, match='block'): adapt(network)


@pytest.mark.parametrize('family', ['Gemma3nText', 'Gemma4Text'])
def test_families_whose_blocks_read_the_tokens_again_are_refused_in_words(family):
    further = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=V, num_kv_shared_layers=2,
                   layer_types=ALTERNATE)
    further |= dict(laurel_rank=4) if family == 'Gemma3nText' else dict(global_head_dim=8)
    with pytest.raises(ValueError, match='per_layer_input'): adapt(tiny(family, **further))


def test_the_check_costs_a_few_passes_over_eight_tokens():
    network, calls = tiny('Llama'), []
    for block in network.model.layers:
        block.register_forward_pre_hook(lambda block, args: calls.append(args[0].shape[:2].numel()))
    adapt(network)
    assert sum(calls) <= 6 * 8 * L


# --- wrappers, and models that have to be handed in otherwise ---

def parallel(network):
    "DistributedDataParallel in a group of one process."
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0,
                                             world_size=1)
    return nn.parallel.DistributedDataParallel(network)


def compiled(network, *parts):
    "The named parts compiled, each for itself."
    for name in parts:
        network.set_submodule(name, torch.compile(network.get_submodule(name), backend='eager'))
    return network


def prepared(network):
    "As a Trainer with bf16=True leaves it."
    accelerate = pytest.importorskip('accelerate')
    accelerate.state.AcceleratorState._reset_state(True)
    try: return accelerate.Accelerator(cpu=True, mixed_precision='bf16').prepare(network)
    finally: accelerate.state.AcceleratorState._reset_state(True)


WRAPPED = dict(
    compiled=lambda network: torch.compile(network, backend='eager'), data_parallel=nn.DataParallel,
    distributed=parallel,
    both=lambda network: nn.DataParallel(torch.compile(network, backend='eager')),
    twice=lambda network: torch.compile(nn.DataParallel(network), backend='eager'),
    blocks=lambda network: compiled(network, 'model.layers.0', 'model.layers.2'),
    decoder=lambda network: compiled(network, 'model'),
    prepared=prepared)


@pytest.mark.parametrize('case', WRAPPED)
def test_what_computes_the_same_is_looked_into(case):
    expected = own_logits(tiny('Llama'))
    model = adapt(WRAPPED[case](tiny('Llama')))
    assert is_close(all_logits(model), expected)
    with torch.no_grad():
        assert is_close(model.run(model.run(model.embed(TOKENS), stop=2), start=2),
                        model.run(model.embed(TOKENS)))


@pytest.mark.parametrize('case', ['compiled', 'data_parallel', 'both', 'twice'])
def test_our_own_model_is_found_in_the_same_wrappers(case):
    ours = Transformer(ModelConfig(n_layers=1))
    assert adapt(WRAPPED[case](ours)) is ours


class Holder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


class Pipeline:
    "No module at all."
    def __init__(self, inner): self.task, self.inner = 'text-generation', inner


class Adapters(nn.Module):
    "As PEFT shows itself: the model inside, and a way to be rid of the adapters."
    def __init__(self, network):
        super().__init__()
        self.base_model = network

    def merge_and_unload(self): return self.base_model


class Subclass(torch.Tensor): "As packed or sharded weights are."


def with_weight(make, name='model.layers.1.mlp.up_proj'):
    network = tiny('Llama')
    part = network.get_submodule(name)
    part.weight = nn.Parameter(make(part.weight.data), requires_grad=False)
    return network


def packed():
    "As a layer that keeps its integers in a buffer."
    network = tiny('Llama')
    part = network.get_submodule('model.layers.2.self_attn.q_proj')
    weight = part.weight.data
    del part.weight
    part.register_buffer('qweight', weight.to(torch.int32))
    return network


class PackedLinear(nn.Module):
    "As the dynamically quantised layers of PyTorch: the weight is a method."
    def __init__(self, linear):
        super().__init__()
        self.kept = [linear]

    def weight(self): return self.kept[0].weight
    def forward(self, x): return self.kept[0](x)


def dynamic():
    network = tiny('Llama')
    network.set_submodule('lm_head', PackedLinear(network.lm_head))
    return network


def on_meta():
    with torch.device('meta'): return transformers.AutoModelForCausalLM.from_config(tiny('Llama').config)


def offloaded(): return pytest.importorskip('accelerate').cpu_offload(tiny('Llama'))


def partly_on_disk():
    places = {'model.embed_tokens': 'cpu', 'model.norm': 'cpu', 'model.rotary_emb': 'cpu', 'lm_head': 'cpu',
              **{f'model.layers.{l}': 'cpu' if l < 2 else 'disk' for l in range(L)}}
    return pytest.importorskip('accelerate').dispatch_model(tiny('Llama'), places, main_device='cpu',
                                                            offload_dir=tempfile.mkdtemp())


HAND_IN = dict(
    adapters=(lambda: Adapters(tiny('Llama')), 'merge_and_unload'),
    holder=(lambda: Holder(tiny('Llama')), r'\.inner, a Llama'),
    holder_of_ours=(lambda: Holder(Transformer(ModelConfig(n_layers=1))), r'\.inner, a Transformer'),
    compiled_holder=(lambda: torch.compile(Holder(tiny('GPT2')), backend='eager'), r'\.inner, a GPT2'),
    pipeline=(lambda: Pipeline(tiny('Llama')), r'\.inner, a Llama'), meta=(on_meta, 'meta'),
    offloaded=(offloaded, 'offload'),
    disk=(partly_on_disk, 'offload'), dynamic=(dynamic, 'quantised'),
    packed=(packed, r'layers\.2\.self_attn\.q_proj\.qweight.*int32'),
    int8=(lambda: with_weight(lambda w: w.to(torch.int8)), r'layers\.1\.mlp\.up_proj.*int8'),
    uint8=(lambda: with_weight(lambda w: w.to(torch.uint8).flatten()[:, None]),
           r'layers\.1\.mlp\.up_proj.*uint8'),
    fp8=(lambda: with_weight(lambda w: w.to(torch.float8_e4m3fn)), r'layers\.1\.mlp\.up_proj.*float8'),
    subclass=(lambda: with_weight(lambda w: w.as_subclass(Subclass)), r'layers\.1\.mlp\.up_proj.*Subclass'))


@pytest.mark.parametrize('case', HAND_IN)
def test_what_to_hand_in_instead_is_said(case):
    make, name = HAND_IN[case]
    with pytest.raises(ValueError, match=name): adapt(make())


def test_adapting_where_gradients_are_off_leaves_them_possible_later():
    for off in (torch.inference_mode(), torch.no_grad(), torch.set_grad_enabled(False)):
        network = tiny('Gemma2')
        with off: model = adapt(network)
        x = torch.randn(2, 4, D, requires_grad=True)
        with torch.enable_grad(): slope, = torch.autograd.grad(model.run(x).sum(), x)
        assert slope.abs().max() > 0
    torch.set_grad_enabled(True)


# --- opening ---

@pytest.fixture
def saved(tmp_path):
    network = tiny('Llama')
    network.save_pretrained(tmp_path / 'llama')
    return network, tmp_path / 'llama'


class Trap:
    "Writes a file when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')


def test_a_saved_network_opens_as_itself(saved):
    network, folder = saved
    (folder / 'pytorch_model.bin').write_bytes(pickle.dumps(Trap(folder / 'sprung')))
    model, tokenizer = open_model(str(folder), device='cpu')
    assert torch.equal(all_logits(model), all_logits(adapt(network))) and tokenizer is None
    assert not model.training and not (folder / 'sprung').exists()
    assert open_model(network)[0].network is network and open_model(model) == (model, None)


def test_weights_in_half_precision_open_in_fp32(saved):
    network, folder = saved
    copy.deepcopy(network).to(torch.bfloat16).save_pretrained(folder)
    assert {p.dtype for p in open_model(folder)[0].parameters()} == {torch.float32}


@pytest.mark.parametrize('tie', [False, True])
def test_our_own_models_open_from_their_folder_and_from_their_training(tmp_path, tie, capsys):
    torch.manual_seed(0)
    ours = Transformer(ModelConfig(n_layers=2, vocab_size=300, tie_embeddings=tie)).eval()
    ours.save_pretrained(tmp_path / 'model')
    train_bpe(['to be or not to be'] * 9, 300).backend.save(str(tmp_path / 'tokenizer.json'))
    for place in (tmp_path, tmp_path / 'model'):
        model, tokenizer = open_model(place)
        assert type(model) is Transformer and torch.equal(model(TOKENS), ours(TOKENS))
        assert tokenizer.decode(tokenizer.encode('to be')) == 'to be'
    assert capsys.readouterr().out == ''


def test_a_folder_with_a_pickle_alone_is_refused(saved):
    _, folder = saved
    (folder / 'model.safetensors').unlink()
    with pytest.raises(ValueError,
                       match=r'llama holds no weights in safetensors files; looked for \*.safetensors$'):
        open_model(folder)
    (folder / 'pytorch_model.bin').write_bytes(pickle.dumps(Trap(folder / 'sprung')))
    with pytest.raises(ValueError,
                       match='llama holds no weights.*found pytorch_model.bin. A pickle can run any program'):
        open_model(folder)
    save_file({'other': torch.zeros(1)}, folder / 'other.safetensors')  # no weights of this network
    with pytest.raises(ValueError, match='llama cannot be opened'): open_model(folder)
    assert not (folder / 'sprung').exists()


def test_missing_weights_are_not_made_up(saved):
    _, folder = saved
    weights = load_file(folder / 'model.safetensors')
    del weights['model.layers.1.mlp.up_proj.weight']
    save_file(weights, folder / 'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ValueError,
                       match='llama lacks 1 weights of LlamaForCausalLM, the first of them '
                             'model.layers.1.mlp.up_proj.weight'):
        open_model(folder)
    Transformer(ModelConfig(n_layers=1)).save_pretrained(folder)
    save_file({'head.weight': torch.zeros(2048, 64)}, folder / 'model.safetensors')
    with pytest.raises(ValueError, match='llama holds no readable model'): open_model(folder)


EXTRA = dict(bias='model.layers.1.self_attn.q_proj.bias', block=f'model.layers.{L}.mlp.up_proj.weight',
             head='value_head.weight')


@pytest.mark.parametrize('case', EXTRA)
def test_weights_without_a_place_are_named(saved, case):
    "A bias that the configuration denies, a block beyond the last one, a second head."
    _, folder = saved
    weights = load_file(folder / 'model.safetensors')
    save_file(weights | {EXTRA[case]: torch.ones(D)}, folder / 'model.safetensors',
              metadata=dict(format='pt'))
    with pytest.raises(ValueError, match=re.escape(EXTRA[case])): open_model(folder)
    model, _ = open_model(transformers.AutoModelForCausalLM.from_pretrained(folder))    # the way out
    assert len(model.blocks) == L


def test_weights_of_another_size_are_named(saved):
    _, folder = saved
    settings = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    (folder / 'config.json').write_text(json.dumps(settings | dict(intermediate_size=48)), encoding='utf-8')
    with pytest.raises(ValueError, match=re.escape(str(folder))): open_model(folder)


def test_places_without_a_model_are_named(tmp_path):
    with pytest.raises(ValueError, match=f'{tmp_path} holds no model; looked for config.json'):
        open_model(tmp_path)
    with pytest.raises(ValueError, match='no/such-model is no folder here, and it cannot be fetched'):
        open_model('no/such-model')
    with pytest.raises(ValueError, match='no such folder/at all is no folder here'):
        open_model('./no such folder/at all')


@pytest.mark.parametrize('content', [b'[]', b'3', b'null', b'"model_type"', b'\xff\xfe', b'{"model_type": ',
                                     b'[' * 200_000])
def test_a_configuration_that_is_no_json_object_is_named(saved, tmp_path, content):
    shutil.copytree(saved[1], tmp_path / 'run' / 'model')
    for place, opened in ((saved[1], saved[1]), (tmp_path / 'run' / 'model', tmp_path / 'run')):
        (place / 'config.json').write_bytes(content)
        with pytest.raises(Damaged, match=re.escape(str(place / 'config.json'))): open_model(opened)
        with pytest.raises(Damaged, match=re.escape(str(place / 'config.json'))): from_hf(opened)


def test_an_encoder_decoder_checkpoint_is_refused(tmp_path):
    REFUSED['encoder_decoder'][0]().save_pretrained(tmp_path)
    (tmp_path / 'model.safetensors').unlink()            # the configuration alone decides
    with pytest.raises(ValueError,
                       match=f'{tmp_path} cannot be adapted: it is an encoder-decoder; looked for a decoder '
                             f'alone$'):
        open_model(tmp_path)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    transformers.ViTModel(transformers.ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                                 num_attention_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='cannot be opened as a causal language model.*ViTConfig') as error:
        open_model(tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('trust', [False, True])
def test_programs_in_a_checkpoint_run_only_when_trusted(saved, tmp_path, trust, monkeypatch):
    _, folder = saved
    monkeypatch.setattr('transformers.dynamic_module_utils.HF_MODULES_CACHE', str(tmp_path / 'modules'))
    monkeypatch.syspath_prepend(str(tmp_path / 'modules'))
    (folder / 'strange.py').write_text(
        f"open({str(folder / 'sprung')!r}, 'w').close()\nfrom transformers import LlamaConfig, "
        f"LlamaForCausalLM\n"
        "class StrangeConfig(LlamaConfig): model_type = 'strange'\nclass Strange(LlamaForCausalLM): "
        "config_class = StrangeConfig\n", encoding='utf-8')
    settings = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    settings |= dict(model_type='strange', auto_map=dict(AutoConfig='strange.StrangeConfig',
                                                         AutoModelForCausalLM='strange.Strange'))
    (folder / 'config.json').write_text(json.dumps(settings), encoding='utf-8')
    if trust: assert type(open_model(folder, trust_remote_code=True)[0].network).__name__ == 'Strange'
    else:
        with pytest.raises(ValueError,
                           match='programs of its own, which run only with trust_remote_code=True'):
            open_model(folder)
    assert (folder / 'sprung').exists() == trust


@pytest.mark.parametrize('trust', [False, True])
def test_from_the_hub_only_descriptions_and_safetensors_are_fetched(saved, trust, monkeypatch):
    network, folder = saved
    asked = {}
    def fetch(name, **patterns):
        asked.update(patterns, name=name)
        return str(folder)
    monkeypatch.setattr('huggingface_hub.snapshot_download', fetch)
    assert torch.equal(all_logits(open_model('someone/llama', trust_remote_code=trust)[0]),
                       all_logits(adapt(network)))
    assert ((asked['name'], asked['revision']) == ('someone/llama', None)
            and asked['allow_patterns'] == ['*.json', '*.safetensors', '*.jinja'] + ['*.py'] * trust)
    open_model('someone/llama@v2', trust_remote_code=trust)
    assert (asked['name'], asked['revision']) == ('someone/llama', 'v2')


def test_transformers_is_imported_only_when_needed(saved, monkeypatch):
    program = ("import sys, sparsecod.adapters as a; assert 'transformers' not in sys.modules; from "
               "sparsecod.core import *; a.adapt(Transformer(ModelConfig(n_layers=1))); assert "
               "'transformers' not in sys.modules")
    subprocess.run([sys.executable, '-c', program], check=True)
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(ImportError, match=r"pip install 'sparsecod\[hf\]'"): open_model(saved[1])
    with pytest.raises(ValueError, match='cannot be adapted'): adapt(saved[0])


@pytest.mark.parametrize('change', [dict(seed=1), dict(lr=1e-2)])
def test_the_model_of_another_training_is_named(tmp_path, change):
    "A training's folder says whose model is in it; that of another seed is not read for it."
    from sparsecod.core import ModelConfig
    from sparsecod.data import Corpus
    from sparsecod.integrity import Damaged
    from sparsecod.train import TrainConfig, train
    corpus = Corpus.from_texts([f'{i} and {i + 1}' for i in range(200)])
    config, plan = ModelConfig(vocab_size=corpus.vocab_size, n_layers=1, d_model=8, n_heads=1,
                               context_length=8), TrainConfig(steps=2, tokens_per_step=16)
    for name, p in dict(a=plan, b=plan.replace(**change)).items():
        train(config, p, corpus, tmp_path / name, progress=False)
    assert adapters.find_folder(tmp_path / 'a') == tmp_path / 'a' / 'model'
    (tmp_path / 'a' / 'model').rename(tmp_path / 'kept')
    (tmp_path / 'b' / 'model').rename(tmp_path / 'a' / 'model')
    with pytest.raises(Damaged, match=next(iter(change))): adapters.find_folder(tmp_path / 'a')


@pytest.mark.parametrize('source', ['/no/such/folder', './nothing', '../nothing', 'a/b/c', 'no such model',
                                    '~/nothing'])
def test_what_can_be_no_name_on_the_hub_is_not_looked_for_there(source):
    with pytest.raises(ValueError, match='OWNER/NAME'): adapters.find_folder(source)
