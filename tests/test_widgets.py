"""The bench and the operating table: their logic without a browser, the panels by clicks from Python, and
both in a real JupyterLab."""
import copy
import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

os.environ['ACCELERATE_USE_CPU'] = 'true'
from sparsecod import bench, resources, surgery
from sparsecod import widgets as wd
from sparsecod.adapters import open_model
from sparsecod.bench import BENCH, STORIES, Training, read_config, _read_number, run_cost, variants
from sparsecod.core import BlockOutput, ModelConfig, Transformer, flops_per_token
from sparsecod.data import Corpus
from sparsecod.ngrams import MARGIN
from sparsecod.scores import fit_blocks, linear_losses, skip_effects, swap_losses, trace
from sparsecod.studies import read_record, vary
from sparsecod.surgery import MODES, Plan, Surgery, _skip_costs, write
from sparsecod.train import train

TINY = vary(BENCH, {'model.n_layers': 2, 'model.d_model': 16, 'model.n_heads': 2, 'model.context_length': 16,
                    'train.tokens_per_step': 64,
                    'train.steps': 10, 'train.log_every': 2, 'n_eval': 16, 'score.n_sequences': 8,
                    'score.n_bootstrap': 50})
ENDLESS = vary(TINY, {'train.steps': 10 ** 7})


@pytest.fixture(scope='module')
def corpus():
    texts = [path.read_text(encoding='utf-8') for path in sorted(Path(os.__file__).parent.glob('json/*.py'))]
    return Corpus.from_texts([t[i:i + 500] for t in texts for i in range(0, len(t), 500)], vocab_size=300)


@pytest.fixture(autouse=True)
def nothing_left():
    "No training outlives its test."
    yield
    if Training.alone is not None and Training.alone.is_alive():
        Training.alone.stop()
        Training.alone.join()


def until(condition, seconds=60):
    "Wait for something that another thread does."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.005)


def training(config, corpus, story='one run', **options):
    "A training that has begun."
    thread = Training(variants(config, story), corpus, **options)
    thread.start()
    return thread


def done(thread):
    "The same, ended."
    thread.join()
    return thread


# --- What people type

@pytest.mark.parametrize('text, number', [('0.1', .1), ('0,1', .1), ('1,5', 1.5), ('1e-3', .001),
                                          ('1E3', 1000), ('1,000', 1000), ('1,000,000', 10 ** 6),
                                          ('1,234.5', 1234.5),
                                          ('0,100', .1), ('12 000', 12000), ('10_000', 10000), (' 7 ', 7),
                                          ('\u22122', -2), ('1,25', 1.25), ('-0,5', -.5)])
def test_numbers_as_people_type_them(text, number): assert _read_number(text) == number


@pytest.mark.parametrize('text', ['', '  ', 'many', 'inf', '-inf', 'nan', '1e999', '1,2,3', '1.2.3', '1,00,0',
                                  '--1', '5%'])
def test_what_is_no_number(text):
    with pytest.raises(ValueError, match='finite number'): _read_number(text)


def test_a_field_is_named():
    assert read_config(BENCH, {'model.n_layers': '1e1', 'train.lr': '0,001',
                               'model.norm': 'peri_ln'}) == vary(BENCH, {
        'model.n_layers': 10, 'train.lr': .001, 'model.norm': 'peri_ln'})
    for path, text, name in (('model.n_layers', '1.5', 'n_layers'), ('train.steps', '', 'steps'),
                             ('train.lr', 'inf', 'lr'), ('seed', '-1', 'seed'),
                             ('model.n_kv_heads', '3', 'n_kv_heads'), ('model.n_layers', '0', 'n_layers'),
                             ('train.weight_decay', '-1', 'weight_decay')):
        with pytest.raises(ValueError, match=name): read_config(BENCH, {path: text})


# --- Stories

@pytest.mark.parametrize('story', STORIES)
def test_a_story_changes_what_it_names_and_nothing_else(story):
    found = variants(BENCH, story)
    assert len(found) == len({v.label for v in found}) == len(STORIES[story])
    for v, changes in zip(found, STORIES[story]):
        assert (v.config == vary(BENCH, {path: x for path, x in changes.items() if path != 'stream'})
                and v.stream == changes.get('stream', 1))
        assert v.config.data == BENCH.data and v.config.seed == BENCH.seed


def test_twins_are_the_same_run_at_64_times_the_variance(corpus):
    plain, twin = done(training(TINY, corpus, 'twins: the same run at 64 times the variance')).runs
    assert ([r['loss'] for r in plain.log] == [r['loss'] for r in twin.log]
            and [r['val_loss'] for r in plain.log] == [r['val_loss'] for r in twin.log])
    for a, b in zip(plain.log, twin.log):
        assert b['variance_median'] == pytest.approx([64 * v for v in a['variance_median']], rel=1e-5)
    skip = lambda run: run.record['scores']['arrays']['skip_loss_increase']
    assert skip(twin) == pytest.approx(skip(plain), abs=1e-5)
    with pytest.raises(ValueError, match='norm'):
        variants(vary(TINY, {'model.norm': 'peri_ln'}), 'twins: the same run at 64 times the variance')


# --- Costs

def test_a_price_is_near_what_is_paid(corpus):
    config = vary(BENCH, {'model.vocab_size': corpus.vocab_size, 'train.steps': 40, 'model.n_layers': 6,
                          'n_eval': 16})
    resources._step_speed.cache_clear()
    cost, found = run_cost(config), []
    for _ in range(3):                                # a busy machine gets a few tries
        start, run = time.perf_counter(), done(training(config, corpus)).runs[0]
        found.append((time.perf_counter() - start) / cost.seconds)
        if .5 < found[-1] < 2: break
        resources._step_speed.cache_clear()
        cost = run_cost(config)
    assert .4 < found[-1] < 2.5, found
    assert cost.parameters == sum(p.numel() for p in run.model.parameters()) and cost.tokens == 40 * 512
    assert cost.flops > cost.tokens * flops_per_token(config.model)
    kept = run_cost(config, {bench.run_kind(config): 2e9})
    assert kept.seconds == pytest.approx(cost.flops / 2e9) and kept.basis != cost.basis


def test_memory_is_no_less_than_the_weights():
    for changes in ({}, {'model.n_experts': 8}, {'model.d_model': 256}, {'train.tokens_per_step': 2 ** 16}):
        config = vary(BENCH, changes)
        assert run_cost(config).memory > 16 * run_cost(config).parameters


@pytest.mark.parametrize('path, value', [('model.n_experts', 10 ** 6), ('model.n_layers', 10 ** 7),
                                         ('model.d_model', 10 ** 6)])
def test_what_does_not_fit_is_refused_unbuilt(path, value, monkeypatch):
    monkeypatch.setattr(resources, '_step_speed',
                        lambda *sizes: pytest.fail('a model of that size was built'))
    with pytest.raises(ValueError, match=f'{path}={value:,}'): run_cost(vary(BENCH, {path: value}))


def test_a_thousand_blocks_have_a_price(monkeypatch):
    built = []
    monkeypatch.setattr(resources, 'Transformer',
                        lambda config: built.append(config.n_layers) or Transformer(config))
    resources._step_speed.cache_clear()
    assert run_cost(vary(BENCH, {'model.n_layers': 1000})).seconds > wd._ASK and max(built, default=0) <= 2


@pytest.mark.parametrize('seconds, text', [(0.01, 'about 0.1 s'), (5, 'about 5 s'), (119, 'about 119 s'),
                                           (180, 'about 3 minutes'), (864000, 'about 10 days')])
def test_spell(seconds, text): assert bench.spell(seconds) == text


# --- Training

def test_the_same_as_train(corpus, tmp_path):
    "A thread that nobody disturbs trains what `train` trains."
    run = done(training(TINY, corpus)).runs[0]
    plain = train(run.config.model, run.config.train, corpus, tmp_path, progress=False)
    assert run.status == plain.status == 'finished' and run.step == 10
    for a, b in zip(run.model.parameters(), plain.model.parameters()): assert torch.allclose(a, b, atol=1e-6)
    assert ([r['step'] for r in run.log] == [1, 2, 4, 6, 8, 10]
            and run.log[-1]['val_loss'] < run.log[0]['val_loss'])


def test_pause_and_stop(corpus):
    states = []
    thread = training(ENDLESS, corpus, tell=lambda t: states.append(t.state))
    until(lambda: thread.runs and thread.runs[0].step > 3)
    thread.pause()
    there = thread.runs[0].step
    time.sleep(.3)
    assert thread.state == 'paused' and thread.runs[0].step <= there + 1, 'a paused training goes on'
    thread.pause()
    until(lambda: thread.runs[0].step > there + 3)
    thread.pause()
    thread.stop()                                                # also out of a pause
    thread.join()
    assert (thread.state == 'stopped' and 'you' in thread.why and thread.runs[0].status == 'interrupted'
            and thread.runs[0].model is not None)
    assert [s for i, s in enumerate(states) if i == 0
            or s != states[i - 1]] == ['preparing', 'training', 'paused', 'training', 'paused', 'stopped']
    thread.stop('again'), thread.pause()
    assert thread.state == 'stopped' and 'you' in thread.why


def test_one_training_at_a_time(corpus):
    threads = [training(ENDLESS, corpus) for _ in range(3)]
    until(lambda: threads[-1].runs)
    assert [t.is_alive() for t in threads] == [False, False, True]
    assert all(t.state == 'stopped' and 'another' in t.why for t in threads[:2])


@pytest.mark.parametrize('changes, name', [({'model.context_length': 48}, 'tokens_per_step'),
                                           ({'score.n_sequences': 10 ** 6}, 'n_sequences')])
def test_errors_are_kept(corpus, changes, name):
    thread = done(training(vary(TINY, changes), corpus))
    assert thread.state == 'failed' and name in str(thread.error)
    assert name in wd._state_text(thread)


def test_divergence_is_an_end(corpus):
    run = done(training(vary(TINY, {'train.lr': 1e30, 'train.warmup_steps': 0, 'train.steps': 50}),
                        corpus)).runs[0]
    assert run.status == 'diverged' and run.record is None and 'diverged' in bench.conclusion(run)


def test_an_interrupted_kernel_stops_the_training(corpus):
    import asyncio
    before = signal.getsignal(signal.SIGINT)
    async def kernel():
        thread = training(ENDLESS, corpus)
        bench.stop_when_interrupted()
        await asyncio.sleep(.3)
        os.kill(os.getpid(), signal.SIGINT)
        return thread
    try: thread = done(asyncio.run(kernel()))
    finally: signal.signal(signal.SIGINT, before)
    assert thread.state == 'stopped' and 'interrupted' in thread.why


def test_python_ends_while_a_training_lives():
    "At the end of Python the training is stopped in good order, also out of a pause."
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_widgets import *\n"
            "texts = [f'{n} a b c ' * 9 for n in range(400)]\nt = training(ENDLESS, Corpus.from_texts(texts, "
            "vocab_size=262))\n"
            "until(lambda: t.runs and t.runs[0].step > 2)\nif sys.argv[1:]: t.pause()\n"
            "import atexit; atexit.register(lambda: print(t.state, "
            "t.why))\natexit.unregister(bench._stop_at_exit); atexit.register(bench._stop_at_exit)")
    for argument in ([], ['pause']):
        ended = subprocess.run([sys.executable, '-c', code, *argument], capture_output=True, text=True,
                               timeout=120, env=os.environ | dict(
            OMP_NUM_THREADS='1',
            PYTHONPATH=os.pathsep.join([str(Path(wd.__file__).parents[1]),
                                        os.environ.get('PYTHONPATH', '')])), encoding='utf-8')
        assert ended.stdout.strip() == 'stopped Python ended', ended.stderr[-1000:]


def test_random_numbers_are_left_alone(corpus):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    done(training(TINY, corpus))
    resources._step_speed.cache_clear()
    run_cost(TINY)
    assert torch.equal(torch.rand(3), expected)


def test_what_runs_have_shown(corpus, tmp_path):
    runs = done(training(TINY, corpus, 'no decay against decay')).runs
    table = bench.compare(runs)
    assert list(table.columns)[:2] == ['λ',
                                       'held-out loss'] and list(
                                           table['λ']) == [0, 1], 'a field is shown in which runs do not differ'
    assert list(bench.compare(runs[:1]).columns)[0] == 'L'
    for run in runs:
        skip = run.record['scores']['arrays']['skip_loss_increase']
        assert (f'block {skip.index(min(skip)) + 1}' in bench.conclusion(run)
                and f'{MARGIN}' in bench.conclusion(run))
    path = bench.export_run(runs[1], tmp_path)
    assert read_record(path)['scores']['arrays'] == runs[1].record['scores']['arrays']
    model, tokenizer = open_model(tmp_path / 'models' / path.stem)
    assert (all(torch.equal(a, b) for a, b in zip(model.parameters(), runs[1].model.parameters()))
            and tokenizer.encode('for') == corpus.tokenizer.encode('for'))
    assert wd.models_at_hand(tmp_path) == [str(tmp_path / 'models' / path.stem)]
    runs[0].variant = runs[0].variant._replace(stream=8.)
    with pytest.raises(ValueError, match='stream=8'): bench.export_run(runs[0], tmp_path)


# --- Surgery

class Affine(nn.Module):
    "A block whose update is an affine map of the stream."
    def __init__(self, D):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.A, self.b = (nn.Parameter(0.3 * torch.randn(*shape, generator=generator))
                          for shape in ((D, D), (D,)))

    def forward(self, h, rope):
        u = h @ self.A + self.b
        return BlockOutput(h + u, u, torch.zeros_like(u))


def random_model(L=4, **changes):
    "A model whose blocks do much, in training mode, to see that it is left so."
    torch.manual_seed(1)
    return Transformer(ModelConfig(vocab_size=50, n_layers=L, d_model=16, n_heads=2, context_length=12,
                                   init_std=0.2, **changes))


def sequences(n, seed): return torch.randint(50, (n, 13), generator=torch.Generator().manual_seed(seed))


WINDOWS, FIT = sequences(10, 0), sequences(20, 1)


def transformers_model(**changes):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(2)
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
                                      num_hidden_layers=3, num_attention_heads=2,
                                      num_key_value_heads=1, max_position_embeddings=64,
                                      initializer_range=0.2, **changes)
    return transformers.LlamaForCausalLM(config)


MODELS = dict(dense=random_model, mixture=lambda: random_model(n_experts=4, experts_per_token=2),
              peri_ln=lambda: random_model(norm='peri_ln'),
              transformers=transformers_model)


@pytest.mark.parametrize('kind', MODELS)
def test_losses_are_those_of_the_scores(kind):
    s = Surgery(MODELS[kind](), WINDOWS, FIT, batch_size=4)
    m, plan = s.model.eval(), s.plan
    with torch.no_grad(): t, maps = trace(m, WINDOWS), fit_blocks(m, FIT)
    skipped, linear, swapped = (skip_effects(m, t)[1].mean(-1), linear_losses(m, t, maps).mean(-1),
                                swap_losses(m, t).mean(-1))
    L, costs = len(m.blocks), list(_skip_costs(s))
    assert s.loss() == pytest.approx(t.loss.mean().item(), abs=1e-5)
    for i in range(1, L + 1):
        assert s.loss(plan.skip(i)) == pytest.approx(skipped[i - 1].item(), abs=1e-5)
        assert (costs[i - 1]['value'] == pytest.approx(skipped[i - 1].item() - s.loss(), abs=1e-5)
                and costs[i - 1]['low'] < costs[i - 1]['high'])
        assert s.loss(plan.set(i, 'linear')) == pytest.approx(linear[i - 1].item(), abs=1e-4)
        for j in range(i + 1, L + 1):
            assert s.loss(plan.swap(i, j)) == pytest.approx(swapped[i - 1, j - 1].item(), abs=1e-5)
    assert list(_skip_costs(s, L)) == costs[-1:]
    assert skipped.max() - skipped.min() > 1e-3, 'the model is too dull for this test'


def by_hand(model, l, part):
    """A copy whose block l writes nothing with its attention or its feed-forward layer, by zeros among its
    weights."""
    model = copy.deepcopy(model)
    block = model.model.layers[l - 1] if hasattr(model, 'model') else model.blocks[l - 1]
    writer = {'no attention': lambda: block.self_attn.o_proj if hasattr(block, 'self_attn')
              else block.attention.output,
              'no feed-forward': lambda: block.mlp.down_proj if hasattr(block, 'mlp')
              else block.feed_forward.down}[part]()
    nn.init.zeros_(writer.weight if isinstance(writer, nn.Module) else writer)
    return model


@pytest.mark.parametrize('part', MODES[3:])
@pytest.mark.parametrize('kind', MODELS)
def test_a_block_without_a_part(kind, part):
    model = MODELS[kind]()
    s = Surgery(model, WINDOWS)
    for l in (1, 3):
        found = s.loss(s.plan.set(l, part))
        assert (found == pytest.approx(Surgery(by_hand(model, l, part), WINDOWS).loss(), abs=1e-5)
                and abs(found - s.loss()) > 1e-4)


@pytest.mark.parametrize('kind', MODELS)
def test_the_model_is_never_changed(kind):
    model = MODELS[kind]()
    model.blocks[0].eval() if kind == 'dense' else None             # a mixed state must stay mixed
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes, wanted = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    parts = [(name, id(m), type(m)) for name, m in model.named_modules()]
    def output():
        with torch.no_grad():
            out = model(WINDOWS[:, :-1])
            return out if isinstance(out, torch.Tensor) else out.logits
    own = output()
    def same():
        assert (all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
                and torch.equal(output(), own))
        assert ([m.training for m in model.modules()] == modes
                and [p.requires_grad for p in model.parameters()] == wanted)
        assert ([(name, id(m), type(m)) for name, m in model.named_modules()] == parts
                and all(p.grad is None for p in model.parameters()))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    s, start = Surgery(model, WINDOWS, FIT), WINDOWS[0, :4].tolist()
    first, text = s.loss(), list(write(s, s.plan, start, 6))
    same()
    plan = s.plan.skip(1).swap(2, 3).set(3, 'linear').set(2, 'no attention')
    assert s.loss(plan) != first
    list(write(s, plan, start, 6))
    same()
    half = write(s, plan, start, 6)
    next(half), half.close()                                        # abandoned
    same()
    assert s.loss() == first and list(write(s, s.plan, start, 6)) == text
    same()


def test_dropout_is_off_while_measuring():
    model = transformers_model(attention_dropout=0.9).train()
    results = [(s.loss(), list(write(s, s.plan, WINDOWS[0].tolist(), 30)))
               for s in (Surgery(model, WINDOWS) for _ in range(2))]
    assert results[0] == results[1] and model.training
    assert results[0][0] == Surgery(model.eval(), WINDOWS).loss()


def test_an_affine_block_is_linearised_for_nothing():
    model = random_model()
    model.blocks[1] = Affine(16)
    s = Surgery(model, WINDOWS, FIT)
    assert s.loss(s.plan.set(2, 'linear')) == pytest.approx(s.loss(), abs=1e-4)
    assert abs(s.loss(s.plan.set(1, 'linear')) - s.loss()) > 1e-3


def test_plans():
    plan = Plan.untouched(4)
    assert plan.swap(1, 4).swap(1, 4) == plan == plan.swap(2, 2) == plan.skip(3).set(3, 'keep')
    assert plan.swap(1, 2).swap(2, 3).skip(1).places == ((3, 'keep'), (1, 'skip'), (2, 'keep'),
                                                         (4, 'keep')), 'blocks, wherever they are'
    assert plan == Plan.untouched(4), 'an operation changed the plan it was made from'


@pytest.mark.parametrize('memory', [2 ** 30, 4 * 16 * 120 * 3, 1])
def test_restarts_where_the_plan_changes(memory):
    "Kept streams save work and never change a result, however few are kept."
    model = random_model(L=6)
    s, generator = Surgery(model, WINDOWS, FIT, batch_size=4, memory=memory), torch.Generator().manual_seed(0)
    assert (memory == 2 ** 30) == (s.stride == 1)
    plan = s.plan
    for _ in range(25):
        l, k, what = (int(torch.randint(n, (1,), generator=generator)) for n in (6, 6, 6))
        plan = plan.swap(l + 1, k + 1) if what == 5 else plan.set(l + 1, MODES[what])
        fresh = Surgery(model, WINDOWS, FIT, batch_size=4)
        assert s.loss(plan) == fresh.loss(plan)
    assert s.loss() == s.loss() and s.ran == 0
    s.loss(s.plan.skip(5))  # whatever is kept is of the last plan that was run
    s.loss(s.plan.skip(6))
    assert s.ran == (1 if s.stride == 1 else s.ran) and s.ran < 6 or memory == 1


def test_work_of_a_tour():
    """Skipping each block in turn, with undo after each, runs no block twice at its place, and what is
    known not at all."""
    s, ran = Surgery(random_model(L=6), WINDOWS), []
    s.loss()
    assert s.ran == 6
    for l in range(6, 0, -1):
        for plan in (s.plan.skip(l), s.plan):
            s.loss(plan)
            ran.append(s.ran)
    assert ran == [n for l in range(6, 0, -1) for n in (6 - l, 0)]


def test_affine_maps_are_those_of_one_pass_however_often_it_was_abandoned():
    for kind in MODELS:
        model, calls = MODELS[kind](), []
        s = Surgery(model, WINDOWS, FIT, batch_size=8)
        expected = fit_blocks(s.model.eval(), FIT, 8)
        def check():
            calls.append(1)
            if len(calls) % 4 == 0: raise surgery._Abandoned
        s.check = check
        for _ in range(20):
            try: s.fit(len(expected))
            except surgery._Abandoned: pass
        assert len(s.maps) == len(expected) and len(calls) < 40, 'a block was fitted again'
        for found, own in zip(s.maps, expected):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[:2], own[:2]))
        s.check = lambda: None
        s.fit(1)


def test_abandoned_work_leaves_no_lie():
    model, calls = random_model(), []
    s = Surgery(model, WINDOWS, FIT, batch_size=4)
    def check():
        calls.append(1)
        if len(calls) % 5 == 0: raise surgery._Abandoned
    for plan in (s.plan, s.plan.skip(2), s.plan.swap(1, 4)):
        s.check = check
        with pytest.raises(surgery._Abandoned):
            while True: s.losses(plan), s.kept.clear(), s.known.clear()
        s.check = lambda: None
        assert s.loss(plan) == Surgery(model, WINDOWS, FIT, batch_size=4).loss(plan)


def test_writing_is_that_of_the_model():
    model = random_model()
    s, start = Surgery(model, WINDOWS), WINDOWS[:1, :3]
    # beyond the context too
    own = model.generate(start, 20, temperature=0.8,
                         generator=torch.Generator().manual_seed(0))[0, 3:].tolist()
    assert list(write(s, s.plan, start[0].tolist(),
                      20)) == own != list(write(s, s.plan, start[0].tolist(), 20, seed=1))


@pytest.mark.parametrize('edit', [lambda p: p, lambda p: p.skip(1), lambda p: p.skip(3),
                                  lambda p: p.swap(1, 3), lambda p: p.set(2, 'linear'),
                                  lambda p: p.set(1, 'no attention'),
                                  lambda p: p.set(3, 'no feed-forward'),
                                  lambda p: p.swap(1, 2).skip(1).set(3, 'linear')])
def test_the_cache_changes_no_text(edit):
    "A network of the transformers library writes the same with its cache as block by block without it."
    s, tokens = Surgery(transformers_model(), WINDOWS, FIT), WINDOWS[0, :5].tolist()
    plan, text = edit(s.plan), WINDOWS[0, :5].tolist()
    with torch.no_grad():
        s.model.eval()
        for _ in range(12):
            h = s.model.embed(torch.tensor([text]))
            for l, mode in plan.places: h = s.block(h, l, mode)
            text.append(s.model.logits(h[:, -1]).argmax(-1).item())
    assert list(write(s, plan, tokens, 12, temperature=0)) == text[5:]


@pytest.mark.parametrize('attempt, says', [
    (lambda s: s.plan.skip(5), 'l=5 must be the number of a block, 1 to 4'),
    (lambda s: s.plan.skip(0), 'l=0'), (lambda s: s.plan.swap(1, 'x'), "l='x'"),
    (lambda s: s.plan.skip(True), 'l=True'), (lambda s: s.plan.set(1, 'cut'), "mode='cut'"),
    (lambda s: s.loss(s.plan.set(1, 'linear')), 'fit_windows is None'),
    (lambda s: list(write(s, s.plan, [50])), 'tokens holds'),
    (lambda s: list(write(s, s.plan, [])), 'tokens has shape (1, 0)'),
    (lambda s: Surgery(s.model, WINDOWS.float()), 'windows has dtype=torch.float32'),
    (lambda s: Surgery(s.model, [[1, 2]]), 'windows=[[1, 2]]'),
    (lambda s: Surgery(s.model, WINDOWS - 5), 'windows holds tokens from -'),
    (lambda s: Surgery(s.model, WINDOWS, WINDOWS), 'share a sequence'),
    (lambda s: Surgery(nn.Linear(2, 2), WINDOWS), 'Linear cannot be adapted'),
    (lambda s: wd.surgery_widget(s.model), 'without a tokenizer'),
    (lambda s: wd.surgery_widget('no such folder'), 'no such folder')])
def test_bad_input(attempt, says):
    s = Surgery(random_model(), WINDOWS)
    with pytest.raises(ValueError, match=re.escape(says)): attempt(s)


# --- Panels, by clicks from Python

def buttons(control):
    "All buttons of a panel by their text."
    if isinstance(control, wd._Panel): control = control.view
    if type(control).__name__ == 'Button': return {control.description: control}
    return {text: b for child in getattr(control, 'children', ()) for text, b in buttons(child).items()}


def test_train_panel(corpus, tmp_path, monkeypatch):
    panel = wd.train_widget(TINY, tmp_path, corpus)
    press = lambda text: buttons(panel)[text].click()
    assert not panel.runs and 'parameters' in panel.cost.value
    for path, wrong, right in (('model.n_layers', '0', '3'), ('model.n_kv_heads', '3', '1'),
                               ('model.n_experts', '1,000,000', '4'), ('model.context_length', '48', '8'),
                               ('train.weight_decay', 'inf', '0,5'), ('train.steps', '', '1e7')):
        panel.fields[path].value = wrong
        assert ('role="alert"' in panel.cost.value
                and (path.split('.')[1] in panel.cost.value or path == 'model.context_length'))
        press('start')
        assert panel.training is None, 'something started that cannot be'
        panel.fields[path].value = right
        assert 'role="alert"' not in panel.cost.value
    monkeypatch.setattr(wd, '_ASK', 0.)
    press('start')
    assert panel.training is None and 'again' in panel.cost.value, 'hours are not asked about'
    press('start')
    until(lambda: panel.runs and panel.runs[0].log)
    press('pause')
    assert panel.training.state == 'paused' and 'paused' in panel.says.value
    press('go on')
    monkeypatch.setattr(wd, '_ASK', 600.)
    other = wd.train_widget(TINY, tmp_path, corpus)
    buttons(other)['start'].click()
    other.training.join()
    assert panel.training.state == 'stopped' and 'another training' in panel.says.value, 'nobody says who stopped it'
    panel.fields['train.steps'].value = '10'
    panel.story.value = 'no decay against decay'
    press('start')
    panel.training.join()
    c = panel.runs[-1].config
    assert (c.model.n_layers, c.model.n_kv_heads, c.model.n_experts, c.model.context_length,
            c.train.weight_decay) == (3, 1, 4, 8, 1.)
    assert ([r.number for r in panel.runs] == [1, 2, 3]
            and panel.findings.value.count('Load of the experts</') == 2
            and panel.curves.value.count('<img') == 2)
    assert (panel.curves.value.count(' writes</') == 3
            and all(run.text and html.escape(run.text) in panel.curves.value for run in panel.runs))
    assert all(bench.conclusion(r).split(':')[1] in panel.findings.value for r in panel.runs[1:])
    panel.chosen.value = panel.runs[1].name
    press('export')
    assert len(list((tmp_path / 'bench').glob('*.json'))) == 1
    press('drop')
    assert [r.number for r in panel.runs] == [1, 3] and '2: ' not in panel.table.value
    press('operate on this one')
    panel.surgery.wait()
    assert (panel.surgery.table.surgery.model is panel.runs[-1].model
            and 'class="loss"' in panel.surgery.says.value)


@pytest.mark.parametrize('seconds, shape', [(.01, (16, 65)), (.25, (8, 65)), (1., (4, 33)), (9., (4, 17))])
def test_windows_are_fewer_and_shorter_where_the_model_is_slow(corpus, seconds, shape, monkeypatch):
    "By what a pass over two windows of 64 tokens takes."
    monkeypatch.setattr(surgery, 'timed', lambda work, device: seconds)
    model = Transformer(vary(BENCH,
                             {'model.vocab_size': corpus.vocab_size, 'model.context_length': 64}).model)
    windows, fit_windows = surgery.library_windows(model, corpus.tokenizer)
    assert (windows.shape == shape and fit_windows.shape == (16, 65)
            and Surgery(model, windows, fit_windows).loss() > 0)


def test_a_table_click_by_click():
    told, s = [], Surgery(random_model(), WINDOWS, FIT)
    table = surgery.Table(s, tell=lambda: told.append((table.plan, len(table.costs))))
    table.go()
    table.wait()
    assert table.losses is s.losses() and len(table.costs) == len(s.maps) == 4 and told[-1] == (s.plan, 4)
    for l, tool in ((3, 'linear'), (2, 'skip'), (2, 'swap'), (4, 'swap')): table.click(l, tool)
    plan = s.plan.set(3, 'linear').skip(2).swap(2, 4)
    table.wait()
    assert (table.plan == plan and table.losses.mean() == Surgery(random_model(), WINDOWS, FIT).loss(plan)
            and table.first is None)
    text = table.texts[plan, table.prompt]
    assert (text.split()[:8] == table.prompt.split() and len(text.split()) == 48
            and text != table.texts[s.plan, table.prompt])
    table.click(2, 'skip')                                       # once more: it is kept again
    assert table.plan == s.plan.set(3, 'linear').swap(2, 4)
    for _ in range(4): table.undo()
    table.wait()
    assert table.plan == s.plan and table.losses is s.losses(), 'undo does not lead back'
    table.undo()                                                 # there is nothing before
    table.click(1, 'no attention'), table.click(2, 'swap')
    assert table.first == 2
    table.reset()
    table.wait()
    assert table.losses is s.losses() and table.first is None
    table.prompt = 'x y'
    table.go()
    table.wait()
    assert "'x'" in table.error


def test_surgery_panel():
    panel, s = wd.surgery_widget(random_model(), None, WINDOWS, FIT), Surgery(random_model(), WINDOWS, FIT)
    panel.wait()
    shown = lambda name: float(re.search(rf'class="{name}">([^<]*)<', panel.says.value)[1])
    assert (shown('loss') == shown('own') == round(s.loss(), 4)
            and len(panel.strip) == len(panel.table.costs) == 4)
    def click(tool, *blocks):
        panel.tool.value = tool
        for l in blocks: panel.strip[l - 1].click()
        panel.wait()
    click('linear', 3), click('skip', 2), click('swap', 2, 4)
    expected = s.loss(s.plan.set(3, 'linear').skip(2).swap(2, 4))
    assert (shown('loss') == round(expected, 4)
            and shown('change') == pytest.approx(expected - s.loss(), abs=1e-4))
    assert [b.description for b in panel.blocks.children] == ['1', '4', '3 ~', '2 ✕']
    panel.strip[0].click()
    assert panel.strip[0].description == '1 ⇄', 'the first of two blocks to swap is not marked'
    buttons(panel)['undo'].click()
    buttons(panel)['reset'].click()
    panel.wait()
    assert (shown('loss') == shown('own') and 'change' not in panel.says.value
            and [b.description for b in panel.blocks.children] == list('1234'))


def test_a_refused_operation_goes_back():
    panel = wd.surgery_widget(random_model(), None, WINDOWS)
    panel.tool.value = 'linear'
    panel.click(1)
    panel.wait()
    assert (panel.table.plan == panel.table.surgery.plan and 'fit_windows is None' in panel.says.value
            and panel.strip[0].description == '1')


def test_the_next_click_abandons_the_work_for_the_last():
    table, s = surgery.Table(Surgery(random_model(L=12), WINDOWS, FIT)), Surgery(random_model(L=12), WINDOWS)
    for l in (2, 5, 7, 9): table.click(l, 'skip')
    table.wait()
    assert table.losses.mean() == s.loss(s.plan.skip(2).skip(5).skip(7).skip(9)) and len(table.costs) == 12


def test_text_prompt_and_another_model(corpus, tmp_path):
    config = vary(TINY, {'model.vocab_size': corpus.vocab_size}).model
    panel = wd.surgery_widget(Transformer(config), corpus.tokenizer)  # windows from the standard library
    assert panel.table.surgery.windows.shape[1] == 17 and 4 <= len(panel.table.surgery.windows) <= 16
    panel.prompt.value = 'import <os>'
    panel.wait()
    assert panel.texts.value.count('import &lt;os&gt;') == 2
    panel.prompt.value = ''
    panel.wait()
    assert 'prompt=' in panel.says.value and 'role="alert"' in panel.says.value
    before = panel.table
    panel.source.value = str(tmp_path / 'nowhere')
    buttons(panel)['open'].click()
    assert 'nowhere' in panel.says.value and panel.table is before
    Transformer(config.replace(n_layers=5)).save_pretrained(tmp_path / 'deep' / 'model')
    (tmp_path / 'deep' / 'tokenizer.json').write_text(corpus.tokenizer.backend.to_str(), encoding='utf-8')
    panel.source.value = str(tmp_path / 'deep')
    buttons(panel)['open'].click()
    panel.wait()
    assert len(panel.strip) == len(panel.blocks.children) == 5


def test_a_panel_is_shown_live_and_as_a_snapshot():
    panel = wd.surgery_widget(random_model(), None, WINDOWS, FIT)
    panel.wait()
    shown = panel._repr_mimebundle_(include=None, exclude=None)
    assert shown['application/vnd.jupyter.widget-view+json']['model_id'] == panel.view.model_id
    still = shown['text/html']
    assert (still == wd._snapshot(panel) and f'{panel.table.losses.mean():.4f}' in still
            and '<script' not in still and ' id=' not in still and 'http' not in still)
    panel.click(2)
    panel.wait()
    assert f'{panel.table.losses.mean():.4f}' in panel._repr_mimebundle_()['text/html'] != still


def test_the_chapter_stores_no_widgets(root):
    """A stored widget is dead, and makes the site load a runtime from another host; tests/store.py stores a
    chapter without."""
    notebook = json.loads((root / 'nbs' / 'tools' / '12_widgets.ipynb').read_text(encoding='utf-8'))
    assert 'widgets' not in notebook['metadata']
    kinds = {kind for c in notebook['cells'] for o in c.get('outputs', []) for kind in o.get('data', {})}
    assert kinds <= {'text/plain', 'text/html'} and 'text/html' in kinds


def test_ipywidgets_is_only_needed_for_panels(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    assert Surgery(random_model(), WINDOWS).loss() > 0
    with pytest.raises(ImportError, match=r'pip install'): wd.train_widget(TINY)


# --- In JupyterLab, in a browser

CELLS = ['''
import json, threading, torch
from sparsecod.bench import BENCH, Training
from sparsecod.core import ModelConfig, Transformer
from sparsecod.data import Corpus
from sparsecod.studies import vary
from sparsecod.widgets import surgery_widget, train_widget
text = open(json.__file__).read()
corpus = Corpus.from_texts([text[i:i + 300] for i in range(0, len(text), 300)], vocab_size=300)
tiny = {'model.n_layers': 2, 'model.d_model': 16, 'model.context_length': 16, 'train.tokens_per_step': 64, 'train.steps': 10 ** 7, 'n_eval': 8,
        'score.n_sequences': 4, 'score.n_fit': 8}
panel = train_widget(vary(BENCH, tiny), corpus=corpus)
panel''', '''
lives = [t for t in threading.enumerate() if isinstance(t, Training)]
print('LIVES', len(lives), lives == [panel.training], panel.runs[-1].number, panel.runs[-1].step, panel.training.state, 'END')''', '''
torch.manual_seed(1)
model = Transformer(ModelConfig(vocab_size=50, n_layers=4, d_model=16, n_heads=2, context_length=12, init_std=0.2))
sequences = lambda n, seed: torch.randint(50, (n, 13), generator=torch.Generator().manual_seed(seed))
before = {name: x.clone() for name, x in model.state_dict().items()}
knife = surgery_widget(model, None, sequences(10, 0), sequences(20, 1))
knife''', '''
print('SAME', all(torch.equal(x, before[name]) for name, x in model.state_dict().items()), knife.table.plan.places, 'END')''']


def notebook_of(cells: list[str]):
    "A notebook with these cells of code."
    import nbformat
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.strip()) for c in cells])


@contextmanager
def jupyterlab(folder: Path, notebook):
    "A JupyterLab server of our own on a free port, with a notebook; gives the notebook's address."
    import nbformat
    notebook.metadata.kernelspec = dict(name='python3', display_name='python3', language='python')
    (folder / 'root').mkdir()
    nbformat.write(notebook, folder / 'root' / 'work.ipynb')
    places = {name: folder / name for name in ('config', 'data', 'runtime', 'ipython')}
    (places['config'] / 'labconfig').mkdir(parents=True)
    no_news = {'disabledExtensions': {'@jupyterlab/apputils-extension:announcements': True}}
    (places['config'] / 'labconfig' / 'page_config.json').write_text(json.dumps(no_news), encoding='utf-8')
    env = os.environ | dict(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true',
                            JUPYTER_CONFIG_DIR=str(places['config']), JUPYTER_DATA_DIR=str(places['data']),
                            JUPYTER_RUNTIME_DIR=str(places['runtime']), IPYTHONDIR=str(places['ipython']),
                            JUPYTER_PREFER_ENV_PATH='1',
                            PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]),
                                                        os.environ.get('PYTHONPATH', '')]))
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1',
               '--ServerApp.port=0', '--IdentityProvider.token=secret',
               f'--ServerApp.root_dir={folder / "root"}', '--LabServerApp.notebook_starts_kernel=True',
               '--LabApp.extension_manager=readonly']
    with open(folder / 'server.log', 'w', encoding="utf-8") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        yield f'{address(server, folder)}doc/tree/work.ipynb?token=secret'
    finally:
        server.terminate()                       # the server ends its kernels, then itself
        try: server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def address(server, folder: Path) -> str:
    "Where a server listens, once it does."
    end = time.monotonic() + 150
    while time.monotonic() < end:
        assert server.poll() is None, (folder / 'server.log').read_text(encoding='utf-8')[-3000:]
        for path in (folder / 'runtime').glob('jpserver-*.json'):
            try: return json.loads(path.read_text(encoding='utf-8'))['url']
            except ValueError: pass
        time.sleep(0.1)
    raise AssertionError((folder / 'server.log').read_text(encoding='utf-8')[-3000:])


class Lab:
    "A notebook in a browser."
    def __init__(self, page): self.page = page

    def cell(self, n): return self.page.locator('.jp-Notebook .jp-CodeCell').nth(n)

    def run(self, n):
        "Click into a cell and run it."
        self.cell(n).locator('.cm-content').click()
        self.page.keyboard.press('Control+Enter')

    def first(self):
        "Run the first cell, as often as it takes: what is sent before the kernel listens is lost."
        idle = self.page.get_by_text('| Idle')
        idle.wait_for()
        for attempt in range(60):
            if attempt == 0 or idle.count(): self.run(0)
            self.page.wait_for_timeout(4000)
            if re.search(r'\d', self.cell(0).locator('.jp-InputPrompt').inner_text()): return

    def printed(self, n, word):
        "Run a cell and return what it prints, as often as it is run."
        self.page.keyboard.press('Escape')
        before = self.cell(n).locator('.jp-InputPrompt').inner_text()
        self.run(n)
        self.page.wait_for_function('([n, old]) => { const p = document.querySelectorAll(".jp-Notebook '
                                    '.jp-CodeCell")[n].querySelector(".jp-InputPrompt").innerText;'
                                    'return p !== old && /\\d/.test(p) }', arg=[n, before])
        text = self.cell(n).locator('.jp-OutputArea-output').filter(has_text='END').inner_text()
        return re.search(rf'{word} (.*) END', text)[1]

    def click(self, n, name): self.cell(n).get_by_role('button', name=name, exact=True).click()


def in_jupyterlab(folder: Path, notebook, *drive):
    "Open a notebook in JupyterLab, in a browser, and drive it."
    from browser import ARGUMENTS, INSTALL, chromium
    try: from playwright.sync_api import expect, sync_playwright
    except ImportError: pytest.fail(INSTALL, pytrace=False)
    binary = chromium()
    with jupyterlab(folder, notebook) as url, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=binary, args=ARGUMENTS)
        page, outside = browser.new_page(viewport=dict(width=1100, height=2400)), []
        page.on('request', lambda r: None if r.url.startswith(('http://127.0.0.1:', 'http://localhost:',
                                                               'data:', 'blob:')) else outside.append(r.url))
        page.set_default_timeout(150_000)
        expect.set_options(timeout=150_000)
        try:
            page.goto(url)
            lab = Lab(page)
            lab.cell(0).wait_for()
            for one in drive: one(lab, expect)
            assert outside == [], 'the notebook asks other hosts'
            if place := os.environ.get('SPARSECOD_SCREENSHOTS'):
                page.screenshot(path=Path(place) / f'jupyterlab-{drive[0].__name__}.png')
        except Exception:
            page.screenshot(path=folder / 'failed.png')
            print((folder / 'server.log').read_text(encoding='utf-8')[-2000:])
            raise
        finally: browser.close()


def test_in_jupyterlab(tmp_path):
    """Both widgets in a real notebook: one training at a time, the kernel stays free, and surgery that
    leaves no trace."""
    in_jupyterlab(tmp_path, notebook_of(CELLS), drive_training, drive_surgery)


SHOWN = ["""
import sparsecod
from sparsecod.explorers import *
from sparsecod.explorers import stored_points, stored_twins
from sparsecod.figures import results_folder
from sparsecod.studies import load_results
home = sparsecod.__path__[0]
records = load_results(results_folder(home), 'desk', 'depth')
variance_explorer(stored_points(home))""", 'results_explorer(records)', 'surgery_explorer(records)',
'twins_explorer(stored_twins(home))']


def test_the_chapter_lives_in_jupyterlab(root, tmp_path):
    "Run All leaves both panels alive, and one explorer of every kind beside them."
    import nbformat
    notebook = nbformat.read(root / 'nbs' / 'tools' / '12_widgets.ipynb', as_version=4)
    notebook.cells += notebook_of(SHOWN).cells
    in_jupyterlab(tmp_path, notebook, drive_chapter)


def drive_chapter(lab, expect):
    code = lab.page.locator('.jp-Notebook .jp-CodeCell')
    lab.first()
    lab.page.get_by_role('menuitem', name='Run', exact=True).click()
    lab.page.get_by_text('Run All Cells', exact=True).click()
    explorer, panels = (lab.page.locator('#sce-variance'),
                        code.filter(has=lab.page.locator('.jupyter-widgets')))
    explorer.wait_for(timeout=300_000)
    expect(panels).to_have_count(2)
    says = explorer.locator('.says')
    before = says.inner_text()
    explorer.locator('[name=p]').press('ArrowLeft')
    expect(says).not_to_have_text(before)
    for name in ('results', 'surgery', 'twins'):  # each answers to the first of its sliders
        other = lab.page.locator(f'#sce-{name}')
        other.scroll_into_view_if_needed()
        slider, said = other.locator('input[type=range]').first, other.locator('.says').inner_text()
        for key in ('ArrowRight', 'ArrowLeft', 'ArrowLeft'):
            slider.press(key)
            if other.locator('.says').inner_text() != said: break
        expect(other.locator('.says')).not_to_have_text(said)
    panel, knife = panels.nth(0), panels.nth(1)
    panel.scroll_into_view_if_needed()
    expect(panel.get_by_text('a table of token pairs').first).to_be_visible()
    start_long(panel, expect, '1e7')
    panel.get_by_role('button', name='stop', exact=True).click()
    expect(panel.get_by_text('you stopped it')).to_be_visible()
    knife.scroll_into_view_if_needed()
    # what its buttons do is driven in a test of its own
    assert 0 < float(knife.locator('.loss').first.inner_text()) < 10


def start_long(panel, expect, steps=None):
    "Start what takes hours, which is asked about."
    if steps:
        panel.get_by_label('steps', exact=True).fill(steps)
        panel.get_by_label('steps', exact=True).press('Tab')
        expect(panel.get_by_text(re.compile(r'\d (hours|days)')).first).to_be_visible()
    panel.get_by_role('button', name='start', exact=True).click()
    expect(panel.get_by_text('Press start again')).to_be_visible()
    panel.get_by_role('button', name='start', exact=True).click()
    expect(panel.get_by_text(re.compile('training .*step')).first).to_be_visible()


def drive_training(lab, expect):
    lab.first()
    lab.cell(0).get_by_text('parameters').wait_for()
    start_long(lab.cell(0), expect)
    loss = lab.cell(0).locator('.loss')
    loss.wait_for()
    assert 0 < float(loss.inner_text()) < 10
    lives, same, number, step, state = lab.printed(1, 'LIVES').split()  # the kernel answers while it trains
    assert (lives, same, number, state) == ('1', 'True', '1', 'training')
    later = next((n for _ in range(20) if (n := int(lab.printed(1, 'LIVES').split()[3])) > int(step)), None)
    assert later, 'the training stands still'
    lab.click(0, 'pause')
    lab.cell(0).get_by_role('button', name='go on', exact=True).wait_for()
    steps = [int(lab.printed(1, 'LIVES').split()[3]) for _ in range(2)]
    assert later <= steps[0] and steps[1] - steps[0] <= 1
    start_long(lab.cell(0), expect)                                           # again: the paused one must end
    expect(lab.cell(0).get_by_text('training 2: ')).to_be_visible()
    assert lab.printed(1, 'LIVES').split()[:3] == ['1', 'True', '2']
    lab.page.wait_for_timeout(500)
    lab.page.get_by_role('button', name='Interrupt the kernel').click()
    expect(lab.cell(0).get_by_text('the kernel was interrupted')).to_be_visible()
    assert any(lab.printed(1, 'LIVES').split()[0] == '0' for _ in range(20)), 'the training goes on'
    kv_heads = lab.cell(0).get_by_label('K/V heads', exact=True)
    kv_heads.fill('5')
    kv_heads.press('Tab')
    expect(lab.cell(0).get_by_text('n_kv_heads=5 must divide n_heads=4')).to_be_visible()


def drive_surgery(lab, expect):
    s = Surgery(random_model(), WINDOWS)
    own, skipped = (f'{s.loss(plan):.4f}' for plan in (s.plan, s.plan.skip(2)))
    lab.run(2)
    loss = lab.cell(2).locator('.loss')
    expect(loss).to_have_text(own)
    assert own != skipped
    lab.click(2, '2')
    expect(loss).to_have_text(skipped)
    assert lab.printed(3, 'SAME').startswith("True ((1, 'keep'), (2, 'skip')")
    lab.click(2, 'undo')
    expect(loss).to_have_text(own)
    assert 'skip' not in lab.printed(3, 'SAME')


def test_a_story_sets_its_own_fields(corpus):
    "They are grey while it is chosen, and what they hold, even nonsense, does not matter."
    panel = wd._TrainPanel(TINY, corpus=corpus)
    for story, changes in STORIES.items():
        panel.fields['model.n_layers'].value = '3'
        panel.story.value = story
        assert {path for path, control in panel.fields.items()
                if control.disabled} == {path for one in changes for path in one} & set(panel.fields)
    panel.story.value = 'shallow against deep'
    panel.fields['model.n_layers'].value = 'nonsense'
    assert panel.price() and [v.config.model.n_layers for v in panel.wanted] == [2, 12]
    panel.story.value = 'one run'
    assert panel.price() is None                                  # now it matters, and is named
