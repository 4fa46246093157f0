"Pruning: known answers, models edited by hand for every family, and checkpoints that keep their promise."
import copy
import json
import math

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
from sparsecod.pruning import (CRITERIA, angular_distance, block_influence, choose_removal, cut_config, greedy_order, influence_scores,
                               loss_without, parse_spans, prune, rank_agreement, removals, span_losses, sublayer_losses)
from sparsecod.scores import trace
from test_adapters import FAMILIES, L, MORE, T, V, tiny

STRANGE = 'OPTPost',                                  # norms on the stream itself: no sublayer can be left out alone
WINDOWS = torch.randint(V, (5, T + 1), generator=torch.Generator().manual_seed(3))
OTHERS = torch.randint(V, (4, T + 1), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def own_loss(network, w=WINDOWS):
    "Loss of each sequence, by the network's own forward pass."
    logits = network(w[:, :-1], use_cache=False).logits                                                 # (N, T, V)
    return functional.cross_entropy(logits.flatten(0, 1).double(), w[:, 1:].flatten(), reduction='none').view(len(w), -1).mean(1)


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
        if 'norm' in name or name.startswith('ln_'): continue
        if ('attn' in name or 'attention' in name) == attention: p.data.zero_()
    return made


@pytest.fixture(params=FAMILIES | MORE)
def family(request): return request.param


def test_spans_and_sublayers_equal_a_model_edited_by_hand(family):
    network = tiny(family)
    model = adapt(network)
    t = trace(model, WINDOWS)
    for n, l in ((1, 1), (2, 2), (3, 1)):
        same = [kind for kind in (getattr(network.config, 'layer_types', None) or [0])]
        if len(set(same)) == 1: assert torch.allclose(span_losses(model, t, n)[l - 1], own_loss(by_hand(network, range(l, l + n))), rtol=1e-4)
        assert torch.allclose(span_losses(model, t, n)[l - 1], loss_without(model, WINDOWS, range(l, l + n), batch_size=2), rtol=1e-5)
    if family in STRANGE:
        with pytest.raises(ValueError, match='block 1'): sublayer_losses(model, t)
        return
    found = sublayer_losses(model, t)
    for l in (1, L):
        for name, attention in (('attention', True), ('feed_forward', False)):
            assert torch.allclose(found[name][l - 1], own_loss(silent(network, l, attention)), rtol=1e-4)
    assert (found['attention'] - found['feed_forward']).abs().max() > 1e-3


def test_the_checkpoint_keeps_its_promise(family, tmp_path):
    network, gone = tiny(family), [2, 3]
    promised = loss_without(adapt(network), WINDOWS, gone)
    record = prune(network, tmp_path / 'small', OTHERS, WINDOWS, spans='2-3', n_random=3)
    assert record['removed'] == gone and record['loss']['before']['value'] == pytest.approx(own_loss(network).mean().item(), rel=1e-5)
    assert record['loss']['after']['value'] == pytest.approx(promised.mean().item(), rel=1e-4)
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'small').eval()
    assert type(small) is type(network) and small.config.get_text_config().num_hidden_layers == L - 2
    assert torch.allclose(own_loss(small), promised, rtol=1e-4)
    assert small.generate(WINDOWS[:1, :3], max_new_tokens=2, do_sample=False).shape == (1, 5)
    assert check_stamp(json.loads((tmp_path / 'small' / 'pruning.json').read_text(encoding='utf-8')), 'pruning.json') == record | dict(
        checksum=json.loads((tmp_path / 'small' / 'pruning.json').read_text(encoding='utf-8'))['checksum'])
