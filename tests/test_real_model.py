"""GGUF files against the network that was written into them, and the measurement of a real model against
the scores."""
import importlib.util
import json
import sys
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from tqdm import tqdm

from sparsecod.adapters import adapt, load_model, open_model
from sparsecod.cli import main
from sparsecod.data import load_tokenizer, train_bpe
from sparsecod.exchange import from_hf
from sparsecod.scores import token_variances, trace

L, D, F, H, K, V = 2, 64, 96, 4, 2, 300
TOKENS = torch.randint(V, (2, 12), generator=torch.Generator().manual_seed(0))
PARTS = {'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k', 'self_attn.v_proj': 'attn_v',
         'self_attn.o_proj': 'attn_output', 'mlp.gate_proj': 'ffn_gate',
         'mlp.up_proj': 'ffn_up', 'mlp.down_proj': 'ffn_down', 'input_layernorm': 'attn_norm',
         'post_attention_layernorm': 'ffn_norm'}


def llama():
    "A network with weights large enough that every part of it shows in the logits."
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H,
        num_key_value_heads=K, max_position_embeddings=64,
        initializer_range=.2, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=0)).eval()


def interleaved(w, heads):
    "Rows of a query or key matrix in the order of llama.cpp, which rotates neighbours instead of halves."
    return w.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(w.shape)


def write_gguf(path, network, kind=Kind.F32, without=()):
    "A network and a tokenizer as a GGUF file, its matrices stored as `kind`."
    file = gguf.GGUFWriter(path, 'llama')
    for name, value in dict(context_length=64, embedding_length=D, block_count=L, feed_forward_length=F,
                            head_count=H, head_count_kv=K, vocab_size=V,
                            layer_norm_rms_eps=1e-5, rope_freq_base=1e4, rope_dimension_count=D // H).items():
        getattr(file, f'add_{name}')(value)
    backend = json.loads(train_bpe(['to be or not to be'] * 9, V).backend.to_str())
    vocabulary = sorted(backend['model']['vocab'], key=backend['model']['vocab'].get)
    tokens = vocabulary + [f'<unused {i}>' for i in range(len(vocabulary), V)]
    file.add_tokenizer_model('gpt2')
    file.add_token_list(tokens)
    file.add_token_types([gguf.TokenType.CONTROL if t == '<|endoftext|>' else gguf.TokenType.NORMAL
                          for t in tokens])
    file.add_token_merges([' '.join(m) if isinstance(m, list) else m for m in backend['model']['merges']])
    file.add_eos_token_id(tokens.index('<|endoftext|>'))
    names = {'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'lm_head': 'output'}
    names |= {f'model.layers.{l}.{part}': f'blk.{l}.{short}' for l in range(L)
              for part, short in PARTS.items()}
    for name, w in network.state_dict().items():
        if name in without: continue
        if 'q_proj' in name or 'k_proj' in name: w = interleaved(w, H if 'q_proj' in name else K)
        stored = kind if w.dim() == 2 else Kind.F32
        file.add_tensor(names[name.removesuffix('.weight')] + '.weight',
                        gguf.quants.quantize(w.numpy(), stored), raw_dtype=stored)
    for write in (file.write_header_to_file, file.write_kv_data_to_file, file.write_tensors_to_file,
                  file.close):
        write()
    return path


@torch.no_grad()
def logits(model): return model.logits(model.run(model.embed(TOKENS)))


@pytest.mark.parametrize('kind', [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1])
def test_a_gguf_file_opens_as_the_network_in_it(tmp_path, kind):
    network = llama()
    model, tokenizer = open_model(write_gguf(tmp_path / 'a.b.gguf', network, kind))
    theirs, ours = logits(adapt(network)), logits(model)
    error = (ours - theirs).norm() / theirs.norm()
    # the fewer bits, the farther away
    bits = {Kind.F32: (0, 1e-5), Kind.F16: (1e-5, 2e-3), Kind.Q8_0: (2e-3, .05), Kind.Q4_1: (.02, .5)}[kind]
    assert bits[0] <= error < bits[1]
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert (tokenizer.decode(tokenizer.encode('to be or')) == 'to be or'
            and tokenizer.eos_token == '<|endoftext|>')
    assert load_tokenizer(str(tmp_path / 'a.b.gguf')).encode('not to be') == tokenizer.encode('not to be')
    said = model.config.quantised
    assert (said is None) == (kind in (Kind.F32, Kind.F16)) and (said is None or said.startswith(kind.name))


def test_a_network_that_was_not_quantised_says_nothing_of_it(): assert adapt(llama()).config.quantised is None


def test_the_command_says_that_weights_were_quantised(tmp_path, capsys):
    text = tmp_path / 'text.txt'
    text.write_text('\n'.join(f'{i} or not {i * i} to be' for i in range(800)), encoding='utf-8')
    for kind in (Kind.Q8_0, Kind.F32):
        source = write_gguf(tmp_path / f'{kind.name}.gguf', llama(), kind)
        assert main(['score', str(source), '--data', str(text), '--length', '16', '--sequences', '2', '--fit',
                     '8', '--quiet']) == 0
        folder, printed = tmp_path / kind.name, capsys.readouterr().out
        found, page = (json.loads((folder / 'scores.json').read_text(encoding='utf-8')),
                       (folder / 'scores.html').read_text(encoding='utf-8'))
        said = [kind.name in found.get('quantised', ''), 'rounded' in printed, 'rounded model' in page]
        assert said == [kind is Kind.Q8_0] * 3


def test_without_the_package_an_error_says_what_to_install(tmp_path, monkeypatch):
    source = write_gguf(tmp_path / 'model.gguf', llama())
    monkeypatch.setitem(sys.modules, 'gguf', None)
    with pytest.raises(ImportError, match=r'sparsecod\[gguf\]'): load_model(source)


@pytest.mark.parametrize('damage', ['cut', 'header', 'other', 'empty'])
def test_a_damaged_file_is_named(tmp_path, damage):
    source = write_gguf(tmp_path / 'model.gguf', llama())
    data = source.read_bytes()
    source.write_bytes(dict(cut=data[:len(data) // 2], header=data[:100], other=b'{}' * 50,
                            empty=b'')[damage])
    with pytest.raises(ValueError, match='model.gguf'): open_model(source)


@pytest.mark.parametrize('lost', ['model.layers.1.mlp.up_proj.weight', 'model.norm.weight'])
def test_lost_weights_are_not_made_up(tmp_path, lost):
    source = write_gguf(tmp_path / 'model.gguf', llama(), without=[lost])
    with pytest.raises(ValueError, match=lost): open_model(source)


def test_a_gguf_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match='model.gguf'): open_model(tmp_path / 'model.gguf')


def test_it_becomes_no_transformer_of_ours(tmp_path):
    with pytest.raises(ValueError, match='model.gguf'): from_hf(write_gguf(tmp_path / 'model.gguf', llama()))


@pytest.fixture(scope='module')
def real_model():
    "The measurement, as a module."
    path = Path(__file__).parents[1] / 'benchmarks' / 'real_model.py'
    spec = importlib.util.spec_from_file_location('real_model', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sweep_agrees_with_the_scores(real_model):
    model, long = adapt(llama()), torch.randint(V, (2, 1025), generator=torch.Generator().manual_seed(1))
    found = real_model.sweep(model, long, tqdm(disable=True))
    for T in (128, 1024):
        windows = torch.cat([row[i * T:(i + 1) * T + 1][None] for row in long for i in range(1024 // T)])
        v = token_variances(trace(model, windows))                                     # (L + 1, B, T)
        values = {name: torch.tensor(found[str(T)][name])[:, 0].double()
                  for name in ('mean', 'median', 'first', 'rest')}
        for name, right in dict(mean=v.mean((1, 2)), median=v.flatten(1).median(1).values,
                                first=v[..., 0].mean(1), rest=v[..., 1:].mean((1, 2))).items():
            assert torch.allclose(values[name], right, rtol=1e-4)


@pytest.mark.parametrize('spike', [1e6, 1.])
def test_powers_of_the_length(real_model, monkeypatch, spike):
    "A spike at position 0 makes the mean fall as 1/T; without it nothing depends on T."
    def variances(model, windows):
        v = torch.ones(1, *windows.shape).double()
        v[..., 0] = spike
        return v
    monkeypatch.setattr(real_model, 'variances', variances)
    powers = real_model.sweep(None, torch.zeros(3, 1025), tqdm(disable=True))['powers']
    assert abs(powers['mean'][0][0] - (-1 if spike > 1 else 0)) < .01 and powers['median'][0][0] == 0


def test_copies_of_the_first_token_are_all_alike(real_model):
    "A token that sees nothing but copies of itself computes what the first one computes."
    found = real_model.sink(adapt(llama()), TOKENS.flatten(), copies=3)
    last = torch.tensor(found['variance'])[-1]
    assert torch.allclose(last[:3], last[0], rtol=1e-4) and not torch.allclose(last[3], last[0], rtol=1e-2)
    assert all(1 / D < share <= 1 for share in found['share'])
