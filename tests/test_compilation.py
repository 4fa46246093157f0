"The compiled step computes what the plain one does, and what is chosen is the fastest that may be."
import os
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

import sparsecod.compilation as compilation
import sparsecod.train
from sparsecod.compilation import CompiledLoss, LinearCrossEntropy, choose_execution, chunk_losses
from sparsecod.core import ModelConfig, Transformer
from sparsecod.data import Corpus
from sparsecod.layers import _AttentionInBlocks
from sparsecod.train import StreamWatch, TrainConfig, accumulate_gradients, train

SMALL = dict(vocab_size=97, n_layers=2, d_model=16, n_heads=2, context_length=12)
KINDS = dict(dense={}, shared_heads=dict(n_kv_heads=1), mixture=dict(n_experts=4),
             shared_expert=dict(n_experts=3, d_shared_expert=8),
             peri_ln=dict(norm='peri_ln'), scaled=dict(norm='layernorm_scaling'),
             tied=dict(tie_embeddings=True))


@pytest.fixture
def traced(monkeypatch):
    "torch.compile as usual, but without the minutes and the C++ compiler that optimisation takes."
    real = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, 'compile', lambda f, **options: real(f, backend='eager', **options))


def gradients(model, loss) -> list:
    loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize('kind', KINDS)
def test_compiled_loss_is_that_of_the_model(kind, traced):
    config = ModelConfig(**SMALL | KINDS[kind])
    torch.manual_seed(0)
    model, windows = Transformer(config), torch.randint(97, (3, 13))
    x, y = windows[:, :-1], windows[:, 1:]
    plain, fast = StreamWatch(config), StreamWatch(config)
    for watch in (plain, fast): watch.see_embedding(model.embed(x))
    wanted, found = model(x, targets=y, watch=plain), CompiledLoss(model)(x, targets=y, watch=fast)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(gradients(model, found), gradients(model, wanted)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert len(fast.stream) == 3 and fast.sequences == 3
    for name in ('stream', 'attention', 'feed_forward', 'load'):
        for a, b in zip(getattr(fast, name), getattr(plain, name), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize('kind', ['dense', 'mixture'])
def test_nothing_is_left_out_of_the_graph(kind):
    config = ModelConfig(**SMALL | KINDS[kind])
    model, graphs = Transformer(config), []
    torch._dynamo.reset()
    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    loss = CompiledLoss(model)
    # an error if the graph breaks
    loss.stream = torch.compile(loss.last_stream, backend=count, fullgraph=True)
    loss.losses_of = chunk_losses
    for seed in range(3):  # other routing, same graph
        windows = torch.randint(97, (3, 13), generator=torch.Generator().manual_seed(seed))
        loss(windows[:, :-1], targets=windows[:, 1:], watch=StreamWatch(config))
    assert len(graphs) == 1


@pytest.mark.parametrize('N', [1, 5, 64, 65, 200])
@pytest.mark.parametrize('bf16', [False, True])
def test_loss_in_pieces(N, bf16, monkeypatch):
    monkeypatch.setattr(compilation, '_LOGITS_IN_CACHE', 64 * 50)
    torch.manual_seed(N)
    h, weight, targets = (torch.randn(N, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True),
                          torch.randint(50, (N,)))
    wanted = functional.cross_entropy(h @ weight.t(), targets)
    found = LinearCrossEntropy.apply(h, weight, targets, bf16, chunk_losses)
    tolerance = dict(atol=3e-2, rtol=3e-2) if bf16 else dict(atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found, wanted, **tolerance)
    for a, b in zip(torch.autograd.grad(found, (h, weight)), torch.autograd.grad(wanted, (h, weight))):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize('T', [1, 2, 63, 129, 256, 515])
def test_attention_in_blocks_is_attention(T):
    torch.manual_seed(T)
    heads = [torch.randn(2, 3, T, 8, requires_grad=True) for _ in range(3)]
    wanted, found = (functional.scaled_dot_product_attention(*heads, is_causal=True),
                     _AttentionInBlocks.apply(*heads))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    slope = torch.randn_like(wanted)
    for a, b in zip(torch.autograd.grad(found, heads, slope), torch.autograd.grad(wanted, heads, slope)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_path_with_blanks_is_said_before_the_compiler_breaks_on_it(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, '__file__', '/home/ada lovelace/torch/__init__.py')
    assert 'ada lovelace' in compilation.missing_compiler(torch.device('cpu'))
    corpus = Corpus.from_texts([f'word {i} of a few' for i in range(200)])
    config = ModelConfig(vocab_size=corpus.vocab_size, n_layers=1, d_model=16, n_heads=1, context_length=16)
    with pytest.raises(ValueError, match="compile='on' needs .*ada lovelace.*compile='off'"):
        train(config, TrainConfig(steps=2, tokens_per_step=64, compile='on'), corpus, tmp_path / 'run')
    assert train(config, TrainConfig(steps=2, tokens_per_step=64), corpus, tmp_path / 'auto').status == 'finished'


def test_optimised_bf16_training_has_the_loss_of_plain_fp32(tmp_path, monkeypatch):
    "The real compiler, once: repeatable and resumable bit for bit, and as good as fp32 within 0.02 nats."
    if missing := compilation.missing_compiler(torch.device('cpu')): pytest.fail(f'this machine lacks {missing}')
    corpus = Corpus.from_texts([f'{i} is followed by {i + 1}, and {i + 1} by {i + 2}.' for i in range(300)])
    config = ModelConfig(vocab_size=corpus.vocab_size, n_layers=1, d_model=32, n_heads=2, context_length=32)
    plan = TrainConfig(steps=300, tokens_per_step=512, log_every=25, checkpoint_every=120, precision='bf16',
                       compile='on')
    first, again = (train(config, plan, corpus, tmp_path / name, progress=False) for name in 'ab')
    plain = train(config, plan.replace(precision='fp32', compile='off'), corpus, tmp_path / 'c',
                  progress=False)
    assert first.execution['compiled'] and first.execution['precision'] == 'bf16'
    assert [r['loss'] for r in first.log] == [r['loss'] for r in again.log]
    for name in ('result.json', 'model/model.safetensors'): (tmp_path / 'b' / name).unlink()
    resumed = train(config, plan, corpus, tmp_path / 'b', progress=False)  # from the checkpoint of step 240
    for other in (again, resumed):
        assert all(torch.equal(p, q) for p, q in zip(first.model.parameters(), other.model.parameters()))
    tail = [sum(r['loss'] for r in run.log[-4:]) / 4 for run in (first, plain)]
    assert abs(tail[0] - tail[1]) < 0.02 and plain.log[-1]['loss'] < plain.log[0]['loss'] - 2


def times(monkeypatch, seconds: dict):
    "Let steps take given times instead of measuring them."
    asked = []
    def pass_seconds(loss, model, windows, bf16, watch):
        asked.append((isinstance(loss, CompiledLoss), bf16))
        return seconds[asked[-1]]
    monkeypatch.setattr(compilation, '_pass_seconds', pass_seconds)
    return asked


@pytest.fixture
def trial(tmp_path, monkeypatch):
    monkeypatch.setenv('SPARSECOD_CACHE', str(tmp_path))
    monkeypatch.setattr(compilation, 'missing_compiler', lambda device: None)
    return Transformer(ModelConfig(**SMALL)), torch.randint(97, (3, 13))


SECONDS = {(False, False): 1.0, (False, True): 2.0, (True, False): .5, (True, True): .25}

def test_the_fastest_is_taken_and_remembered(trial, monkeypatch):
    asked = times(monkeypatch, SECONDS)
    found = choose_execution(*trial, 1000, 'auto', 'auto')
    assert (found.precision, found.compiled) == ('bf16', True)
    before = len(asked)
    assert choose_execution(*trial, 1000, 'auto', 'auto') == found and len(asked) == before
    slower = times(monkeypatch, SECONDS | {(True, True): 3.0})
    assert choose_execution(*trial, 1000, 'fp32', 'auto').precision == 'fp32' and slower


@pytest.mark.parametrize('precision, compile, expected', [
    ('fp32', 'auto', ('fp32', True)), ('auto', 'off', ('fp32', False)), ('bf16', 'off', ('bf16', False)),
    ('fp32', 'on', ('fp32', True))])
def test_what_is_set_is_kept(trial, monkeypatch, precision, compile, expected):
    times(monkeypatch, SECONDS)
    assert choose_execution(*trial, 1000, precision, compile)[:2] == expected


def test_short_runs_are_not_compiled(trial, monkeypatch):
    asked = times(monkeypatch, SECONDS)
    assert choose_execution(*trial, 100, 'auto', 'auto')[:2] == ('fp32', False)
    assert not any(compiled for compiled, _ in asked)
    assert choose_execution(*trial, 1000, 'auto', 'auto')[:2] == ('bf16', True)
    assert choose_execution(*trial, 100, 'auto',
                            'auto')[:2] == ('fp32', False), 'a short run follows the trial of a long one'


def test_without_a_compiler(trial, monkeypatch):
    monkeypatch.setattr(compilation, 'missing_compiler', lambda device: 'a C++ compiler')
    times(monkeypatch, SECONDS)
    found = choose_execution(*trial, 1000, 'auto', 'auto')
    assert found[:2] == ('fp32', False) and 'a C++ compiler' in found.why
    with pytest.raises(ValueError, match='compile'): choose_execution(*trial, 1000, 'auto', 'on')


def test_a_compiler_that_fails_costs_its_speed_only(trial, monkeypatch):
    def pass_seconds(loss, model, windows, bf16, watch):
        if isinstance(loss, CompiledLoss): raise RuntimeError('internal compiler error')
        return SECONDS[False, bf16]
    monkeypatch.setattr(compilation, '_pass_seconds', pass_seconds)
    found = choose_execution(*trial, 1000, 'auto', 'auto')
    assert found[:2] == ('fp32', False) and 'internal compiler error' in found.why


def test_a_damaged_trial_is_made_again(trial, monkeypatch, tmp_path):
    times(monkeypatch, SECONDS)
    found = choose_execution(*trial, 1000, 'auto', 'auto')
    file, = (tmp_path / 'trials').iterdir()
    file.write_text(file.read_text(encoding='utf-8').replace('bf16', 'fp64'), encoding='utf-8')
    assert choose_execution(*trial, 1000, 'auto', 'auto') == found


def test_a_run_goes_on_as_it_began(tmp_path, monkeypatch, traced):
    monkeypatch.setenv('SPARSECOD_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(compilation, '_WORTH_A_TRIAL', 0)
    monkeypatch.setattr(compilation, 'missing_compiler', lambda device: None)
    corpus = Corpus.from_texts([f'{i} and {i + 1}' for i in range(300)])
    config, plan = (ModelConfig(**SMALL | dict(vocab_size=corpus.vocab_size)),
                    TrainConfig(steps=8, tokens_per_step=48, checkpoint_every=3))
    times(monkeypatch, SECONDS)
    train(config, plan, corpus, tmp_path / 'run', progress=False)
    for name in ('result.json', 'model/model.safetensors'): (tmp_path / 'run' / name).unlink()
    times(monkeypatch, {way: 1 / s for way, s in SECONDS.items()})  # by now another way would be faster
    for file in (tmp_path / 'cache' / 'trials').iterdir(): file.unlink()
    resumed = train(config, plan, corpus, tmp_path / 'run', progress=False)
    assert (resumed.execution['precision'], resumed.execution['compiled']) == ('bf16', True)


def test_micro_batches_share_graphs():
    config, graphs = ModelConfig(**SMALL | KINDS['mixture']), []
    model = Transformer(config)
    torch._dynamo.reset()
    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    loss = CompiledLoss(model)
    loss.stream, loss.losses_of = torch.compile(loss.last_stream, backend=count, dynamic=False), chunk_losses
    windows = torch.randint(97, (24, 13))
    for step in range(2):
        watch = StreamWatch(config)
        accumulate_gradients(loss, windows, 2, watch=watch)   # 12 micro-batches
        assert watch.sequences == 24
    # the first micro-batch of a step is measured, the others only add their auxiliary losses
    assert len(graphs) <= 3


def test_a_trial_of_another_model_is_not_taken(trial, monkeypatch, tmp_path):
    times(monkeypatch, SECONDS)
    assert choose_execution(*trial, 1000, 'auto', 'auto').precision == 'bf16'
    first, = (tmp_path / 'trials').iterdir()
    choose_execution(*trial, 1000, 'fp32', 'auto')
    second, = set((tmp_path / 'trials').iterdir()) - {first}
    second.write_bytes(first.read_bytes())
    assert choose_execution(*trial, 1000, 'fp32', 'auto').precision == 'fp32'


@pytest.mark.parametrize('before, ours', [(None, True), ('', True), ('/tmp/torchinductor_someone', True),
                                          ('/data/someone/kernels', False)])
def test_what_is_compiled_is_kept_in_the_cache_of_the_project(before, ours, tmp_path, monkeypatch):
    monkeypatch.setenv('SPARSECOD_CACHE', str(tmp_path))
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', before or '')
    if before is None: monkeypatch.delenv('TORCHINDUCTOR_CACHE_DIR')
    compilation.use_compiler_cache()
    assert os.environ['TORCHINDUCTOR_CACHE_DIR'] == (str(tmp_path / 'inductor') if ours else before)


def test_a_compiled_run_needs_its_compiler_to_go_on(tmp_path, monkeypatch, traced):
    corpus = Corpus.from_texts([f'{i} and {i + 1}' for i in range(300)])
    config, plan = ModelConfig(**SMALL | dict(vocab_size=corpus.vocab_size)), TrainConfig(
        steps=8, tokens_per_step=48, checkpoint_every=3, precision='fp32', compile='on')
    train(config, plan, corpus, tmp_path, progress=False)
    for name in ('result.json', 'model/model.safetensors'): (tmp_path / name).unlink()
    monkeypatch.setattr('sparsecod.train.missing_compiler', lambda device: 'a C++ compiler')
    with pytest.raises(ValueError, match='C\\+\\+ compiler'):
        train(config, plan, corpus, tmp_path, progress=False)
    assert list((tmp_path / 'checkpoints').iterdir())


def test_every_model_of_a_process_is_compiled(monkeypatch):
    "PyTorch gives up on a function after 8 graphs, which is four of our models."
    real, graphs = torch.compile, []
    torch._dynamo.reset()
    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, 'compile', lambda f, **options: real(f, backend=count, **options))
    for L in range(1, 7):
        config, before = ModelConfig(**SMALL | dict(n_layers=L)), len(graphs)
        loss, windows, watch = (CompiledLoss(Transformer(config)), torch.randint(97, (2, 13)),
                                StreamWatch(config))
        # a first micro-batch, and another
        for _ in range(2): loss(windows[:, :-1], targets=windows[:, 1:], watch=watch)
        assert len(graphs) - before >= 2


@pytest.mark.parametrize('device, V, pieces', [('cpu', 3000, 3), ('meta', 3000, 1), ('meta', 2 ** 17, 3)])
def test_pieces_of_the_loss_are_large_on_a_gpu(device, V, pieces):
    sizes = []
    def losses_of(h, weight, targets):
        sizes.append(len(h))
        return h.new_zeros(len(h)), h.new_zeros(len(h), len(weight))
    h, weight = torch.zeros(700, 4, device=device), torch.zeros(V, 4, device=device)
    LinearCrossEntropy.apply(h, weight, torch.zeros(700, dtype=torch.int64, device=device), False, losses_of)
    assert len(sizes) == pieces and sum(sizes) == 700


@pytest.mark.parametrize('precision', ['auto', 'bf16'])
def test_a_compiler_that_fails_is_named(precision, monkeypatch):
    class Broken:
        def __init__(self, model): raise RuntimeError('no compiler for this card')
    monkeypatch.setattr(compilation, 'CompiledLoss', Broken)
    monkeypatch.setattr(compilation, '_WORTH_A_TRIAL', 0)
    model, windows = Transformer(ModelConfig(**SMALL)), torch.randint(97, (2, 13))
    with pytest.raises(ValueError, match='compile=.*no compiler for this card'):
        compilation._run_trial(model, windows, compilation._allowed_ways(precision, 'on', None),
                               compilation.cache_folder() / 'none', lambda: None, print, None)


def test_the_speed_that_a_trial_found_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv('SPARSECOD_CACHE', str(tmp_path))
    monkeypatch.setattr(compilation, '_WORTH_A_TRIAL', 0)
    config, model, cpu = (TrainConfig(steps=1, tokens_per_step=24, compile='off'), ModelConfig(**SMALL),
                          torch.device('cpu'))
    assert compilation.kept_speed(model, config, cpu) is None
    choose_execution(Transformer(model), torch.randint(97, (2, 13)), 10, 'auto', 'off')
    assert compilation.kept_speed(model, config, cpu) > 0
    assert compilation.kept_speed(model.replace(n_layers=3), config, cpu) is None


def test_a_compiler_that_fails_is_named_in_short_with_its_cache(monkeypatch, tmp_path):
    "As where what was compiled before is damaged: PyTorch's own message may have thousands of lines."
    from torch._dynamo.exc import BackendCompilerFailed
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
    def fail():
        raise BackendCompilerFailed(lambda: None, RuntimeError('error: nothing is declared\n' * 9999), None)
    with pytest.raises(RuntimeError) as found, compilation.compiler_errors_in_short(): fail()
    assert (len(str(found.value)) < 900 and str(tmp_path / 'cache') in str(found.value)
            and 'compile=' in str(found.value))
    for other in (ValueError('ours'), KeyboardInterrupt()):  # all else goes through as it is
        with pytest.raises(type(other)) as found, compilation.compiler_errors_in_short(): raise other
        assert found.value is other


def test_a_trial_with_a_failure_is_made_again(trial, monkeypatch):
    asked = []
    def seconds(loss, *rest):
        asked.append(loss)
        if isinstance(loss, compilation.CompiledLoss): raise RuntimeError('no such compiler')
        return 1.
    monkeypatch.setattr(compilation, '_pass_seconds', seconds)
    found = [choose_execution(*trial, 1000, 'fp32', 'auto') for _ in range(2)]
    assert not any(f.compiled for f in found) and sum(isinstance(loss, compilation.CompiledLoss)
                                                      for loss in asked) == 2, found


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='another C library')
def test_kept_memory_is_not_asked_for_again_and_given_back_at_the_end():
    import resource   # Unix alone has it
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            # 16 MiB each: together more than glibc keeps by itself
            parts = [torch.ones(2 ** 22) for _ in range(12)]
            del parts
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    def resident(): return int(Path('/proc/self/statm').read_text(encoding='utf-8').split()[1])
    usual = faults()
    with compilation.kept_memory():
        faults()  # the first time, memory must come from the system
        kept, held = faults(), resident()
    assert kept < usual / 4, (kept, usual)
    assert resident() < held - 2 ** 14                          # pages of 4 KiB: 64 MiB or more went back


@pytest.mark.parametrize('compile, lines', [('on', 1), ('auto', 0), ('off', 0)])
def test_several_processes_say_that_they_are_not_compiled(compile, lines):
    world = SimpleNamespace(num_processes=2, device=torch.device('cpu'))
    run = SimpleNamespace(config=TrainConfig(steps=1, tokens_per_step=24, compile=compile, precision='bf16'),
                          model=Transformer(ModelConfig(**SMALL)), world=world,
                          execution=sparsecod.train._UNDECIDED)
    said = []
    sparsecod.train._decide_execution(run, said.append)
    assert len(said) == lines and 'processes' in run.execution.why
    assert run.execution.bf16 and not run.execution.compiled
