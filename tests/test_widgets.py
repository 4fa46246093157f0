"Widgets: the thread and the surgery without a browser, the panels by clicks from Python, and both in a real JupyterLab."
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

os.environ['ACCELERATE_USE_CPU'] = 'true'
from sparsecod import widgets as wd
from sparsecod.core import BlockOutput, ModelConfig, Transformer, flops_per_token
from sparsecod.data import Corpus
from sparsecod.scores import fit_blocks, linear_losses, skip_effects, swap_losses, trace
from sparsecod.studies import SCALES, vary
from sparsecod.train import train

TINY = vary(SCALES['tiny'], {'model.n_layers': 2, 'model.d_model': 16, 'model.context_length': 16, 'train.tokens_per_step': 64,
                             'train.steps': 10, 'train.log_every': 2})
ENDLESS = vary(TINY, {'train.steps': 10 ** 7})


@pytest.fixture(scope='module')
def corpus():
    texts = [path.read_text(encoding='utf-8') for path in sorted(Path(os.__file__).parent.glob('json/*.py'))]
    return Corpus.from_texts([t[i:i + 500] for t in texts for i in range(0, len(t), 500)], vocab_size=300)


@pytest.fixture(autouse=True)
def nothing_left():
    "No training outlives its test."
    yield
    if wd.Training.alone is not None and wd.Training.alone.is_alive(): wd.Training.alone.stop(wait=True)


def until(condition, seconds=30):
    "Wait for something that another thread does."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.005)


def alive():
    return [t for t in threading.enumerate() if isinstance(t, wd.Training)]


# --- Training

def test_the_same_as_train(corpus, tmp_path):
    "A thread that nobody disturbs does what `train` does, bit for bit."
    thread = wd.Training(TINY, tmp_path / 'thread', corpus)
    thread.start()
    thread.join()
    config = thread.config
    plain = train(config.model, config.train, corpus, tmp_path / 'plain', progress=False)
    assert thread.state == plain.status == 'finished' and thread.step == 10 and thread.error is None
    assert all(torch.equal(a, b) for a, b in zip(thread.result.model.parameters(), plain.model.parameters()))
    strip = lambda log: [{k: v for k, v in r.items() if k != 'tokens_per_s'} for r in log]
    assert strip(thread.log) == strip(plain.log)


def test_pause_resume_and_stop(corpus, tmp_path):
    states = []
    thread = wd.Training(ENDLESS, tmp_path / 'run', corpus, lambda t: states.append(t.state))
    thread.start()
    until(lambda: thread.step > 3)
    thread.pause()
    there = thread.step
    time.sleep(0.3)
    assert thread.is_alive() and thread.step <= there + 1, 'a paused training goes on'
    thread.pause()                                                  # again: nothing new
    thread.resume()
    until(lambda: thread.step > there + 5)
    thread.stop(wait=True)
    assert not thread.is_alive() and thread.state == 'interrupted' and thread.result.step == thread.step
    assert isinstance(thread.result.model, Transformer) and thread.log[-1]['step'] <= thread.step
    order = [s for i, s in enumerate(states) if i == 0 or s != states[i - 1]]
    assert order == ['preparing', 'running', 'paused', 'running', 'stopping', 'interrupted']
    thread.stop(), thread.pause(), thread.resume(), thread.change('stopping')
    assert thread.state == 'interrupted', 'an ended training changed its state'


def test_a_stop_ends_a_pause(corpus, tmp_path):
    thread = wd.Training(ENDLESS, tmp_path / 'run', corpus)
    thread.start()
    until(lambda: thread.step > 1)
    thread.pause()
    there = thread.step
    thread.stop(wait=True)
    assert thread.state == 'interrupted' and thread.step <= there + 2


def test_one_training_at_a_time(corpus, tmp_path):
    "Whoever starts, and from whichever thread: at the end one training lives, and it is the last one."
    trainings = [wd.Training(ENDLESS, tmp_path / str(i), corpus) for i in range(5)]
    for t in trainings[:3]:
        t.start()
        assert alive() == [t]
    callers = [threading.Thread(target=t.start) for t in trainings[3:]]
    for c in callers: c.start()
    for c in callers: c.join()
    assert alive() == [wd.Training.alone]
    wd.Training.alone.stop(wait=True)
    assert alive() == [] and all(t.state == 'interrupted' for t in trainings)


def test_tells_at_most_twice_a_second(corpus, tmp_path):
    told = []
    thread = wd.Training(ENDLESS, tmp_path / 'run', corpus, lambda t: told.append((t.state, t.step, time.monotonic())))
    thread.start()
    until(lambda: thread.step >= 1)
    time.sleep(1.6)
    thread.stop(wait=True)
    times = [at for state, step, at in told if state == 'running']
    assert len(times) >= 3 and thread.step > len(times)
    assert min(b - a for a, b in zip(times, times[1:])) > 0.4


def test_errors_are_kept(corpus, tmp_path):
    for change, name in (({'model.context_length': 48}, 'tokens_per_step'), ({'data.source': str(tmp_path / 'nowhere')}, 'nowhere')):
        own = None if 'data.source' in change else corpus
        thread = wd.Training(vary(TINY, change), tmp_path / name, own)
        thread.start()
        thread.join()
        assert thread.state == 'failed' and name in str(thread.error) and thread.result is None


def test_divergence_is_an_end(corpus, tmp_path):
    thread = wd.Training(vary(TINY, {'train.lr': 1e30, 'train.warmup_steps': 0, 'train.steps': 50}), tmp_path / 'run', corpus)
    thread.start()
    thread.join()
    assert thread.state == 'diverged' and thread.result.model is not None
    assert 'diverged' in wd.training_view(thread)


def test_python_ends_while_a_training_lives(tmp_path):
    "At the end of Python the training is stopped in good order, also out of a pause."
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_widgets import *\n"
            f"texts = ['a b c ' * n for n in range(1, 60)]\nt = wd.Training(ENDLESS, {str(tmp_path / 'run')!r}, Corpus.from_texts(texts, vocab_size=262))\n"
            "t.start(); until(lambda: t.step > 2)\nif sys.argv[1:]: t.pause()")
    for argument in ([], ['pause']):
        done = subprocess.run([sys.executable, '-c', code, *argument], capture_output=True, text=True, timeout=60, env=os.environ | dict(
            OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(Path(wd.__file__).parents[1]), os.environ.get('PYTHONPATH', '')])), encoding='utf-8')
        assert done.returncode == 0, done.stderr[-1000:]
        assert list((tmp_path / 'run' / 'checkpoints').glob('step-*')), 'no checkpoint of the stopped training'


def test_random_numbers_come_back(corpus, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    thread = wd.Training(TINY, tmp_path / 'run', corpus)
    thread.start()
    thread.join()
    wd.training_cost(TINY)
    assert torch.equal(torch.rand(3), expected)


# --- Costs

def test_cost_of_a_training(corpus, tmp_path):
    c = wd.training_cost(TINY)
    model = Transformer(TINY.model)
    assert c.parameters == sum(p.numel() for p in model.parameters()) and c.tokens == 640
    assert c.flops == 640 * flops_per_token(TINY.model) and 0 < c.seconds < 60 and 'measured' in c.basis
    assert wd.training_cost(vary(TINY, {'train.steps': 10 ** 6})).seconds > 1e3 * c.seconds
    thread = wd.Training(TINY, tmp_path / 'run', corpus)
    thread.start()
    thread.join()
    again = wd.training_cost(vary(TINY, {'train.steps': 20}), thread)
    assert again.basis == 'from the last training' and again.seconds == pytest.approx(2 * thread.result.seconds)
    assert wd.training_cost(vary(TINY, {'train.steps': 20, 'model.n_layers': 3}), thread).basis != again.basis


def test_a_huge_model_is_not_built():
    start = time.perf_counter()
    c = wd.training_cost(SCALES['paper'])
    assert time.perf_counter() - start < 5 and 'at least' in c.basis and c.seconds > 86400 and 'days' in str(c)


@pytest.mark.parametrize('seconds, text', [(0.01, 'about 0.1 s'), (5, 'about 5 s'), (119, 'about 119 s'), (180, 'about 3 minutes'), (864000, 'about 10 days')])
def test_spell(seconds, text): assert wd.spell(seconds) == text


# --- Surgery

class Affine(nn.Module):
    "A block whose update is an affine map of the stream."
    def __init__(self, D):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.A, self.b = (nn.Parameter(0.3 * torch.randn(*shape, generator=generator)) for shape in ((D, D), (D,)))

    def forward(self, h, rope):
        u = h @ self.A + self.b
        return BlockOutput(h + u, u, torch.zeros_like(u))


def random_model(L=4, **changes):
    "A model whose blocks do much, in training mode, to see that it is left so."
    torch.manual_seed(1)
    return Transformer(ModelConfig(vocab_size=50, n_layers=L, d_model=16, n_heads=2, context_length=12, init_std=0.2, **changes))


def sequences(n, seed): return torch.randint(50, (n, 13), generator=torch.Generator().manual_seed(seed))


WINDOWS, FIT = sequences(10, 0), sequences(20, 1)


def transformers_model(**changes):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(2)
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                                      num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, **changes)
    return transformers.LlamaForCausalLM(config)


MODELS = dict(dense=random_model, mixture=lambda: random_model(n_experts=4, experts_per_token=2), peri_ln=lambda: random_model(norm='peri_ln'),
              transformers=transformers_model)


@pytest.mark.parametrize('kind', MODELS)
def test_losses_are_those_of_the_scores(kind):
    model = MODELS[kind]()
    s = wd.Surgery(model, WINDOWS, FIT, batch_size=4)
    m = s.model.eval()
    with torch.no_grad(): t, maps = trace(m, WINDOWS), fit_blocks(m, FIT)
    skipped, linear, swapped = skip_effects(m, t)[1].mean(-1), linear_losses(m, t, maps).mean(-1), swap_losses(m, t).mean(-1)
    L = len(m.blocks)
    assert s.loss() == pytest.approx(t.loss.mean().item(), abs=1e-5)
    for i in range(1, L + 1):
        assert s.reset().skip(i).loss() == pytest.approx(skipped[i - 1].item(), abs=1e-5)
        assert s.reset().linearise(i).loss() == pytest.approx(linear[i - 1].item(), abs=1e-4)
        for j in range(i + 1, L + 1): assert s.reset().swap(i, j).loss() == pytest.approx(swapped[i - 1, j - 1].item(), abs=1e-5)
    assert skipped.max() - skipped.min() > 1e-3, 'the model is too dull for this test'


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
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and torch.equal(output(), own)
        assert [m.training for m in model.modules()] == modes and [p.requires_grad for p in model.parameters()] == wanted
        assert [(name, id(m), type(m)) for name, m in model.named_modules()] == parts and all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    s = wd.Surgery(model, WINDOWS, FIT)
    first, text = s.loss(), s.generate(WINDOWS[:1, :4], 6)
    same()
    s.skip(1).swap(2, 3).linearise(3)
    assert s.loss() != first
    s.generate(WINDOWS[:1, :4], 6)
    same()
    assert s.reset().loss() == first and torch.equal(s.generate(WINDOWS[:1, :4], 6), text)
    same()


def test_dropout_is_off_while_measuring():
    model = transformers_model(attention_dropout=0.9).train()
    results = [(s.loss(), s.generate(WINDOWS[:1], 30).tolist()) for s in (wd.Surgery(model, WINDOWS) for _ in range(2))]
    assert results[0] == results[1] and model.training
    assert results[0][0] == wd.Surgery(model.eval(), WINDOWS).loss()


def test_an_identity_block_is_skipped_for_nothing():
    model = random_model()
    for part in (model.blocks[2].attention.output, model.blocks[2].feed_forward.down): nn.init.zeros_(part.weight)
    s = wd.Surgery(model, WINDOWS)
    own = s.loss()
    assert s.skip(3).loss() == own and s.reset().skip(2).loss() != own


def test_an_affine_block_is_linearised_for_nothing():
    model = random_model()
    model.blocks[1] = Affine(16)
    s = wd.Surgery(model, WINDOWS, FIT)
    own = s.loss()
    assert s.linearise(2).loss() == pytest.approx(own, abs=1e-4)
    assert abs(s.reset().linearise(1).loss() - own) > 1e-3


def test_swaps_compose():
    s = wd.Surgery(random_model(), WINDOWS)
    own, once = s.loss(), s.swap(1, 4).loss()
    assert once != own and s.swap(1, 4).loss() == own and s.swap(2, 2).loss() == own
    s.swap(1, 2).swap(2, 3)                                        # blocks, wherever they are
    assert s.order == [3, 1, 2, 4]
    s.skip(1)
    assert s.plan == [(3, 'keep'), (1, 'skip'), (2, 'keep'), (4, 'keep')]


@pytest.mark.parametrize('memory', [2 ** 30, 4 * 16 * 120 * 3, 1])
def test_restarts_where_the_plan_changes(memory):
    "Kept streams save work and never change a result, however few are kept."
    model = random_model(L=6)
    s, generator = wd.Surgery(model, WINDOWS, FIT, batch_size=4, memory=memory), torch.Generator().manual_seed(0)
    assert (memory == 2 ** 30) == (s.stride == 1)
    for _ in range(25):
        l, k, what = (int(torch.randint(n, (1,), generator=generator)) for n in (6, 6, 4))
        s.swap(l + 1, k + 1) if what == 3 else s.set_mode(l + 1, wd.MODES[what])
        fresh = wd.Surgery(model, WINDOWS, FIT, batch_size=4)
        fresh.order, fresh.modes, fresh.maps = list(s.order), dict(s.modes), s.maps
        assert s.loss() == fresh.loss()
    s.reset().loss()
    assert s.loss() == s.reset().loss() and (s.ran == 0 or s.stride > 1)
    s.skip(5).loss()
    assert s.ran == (1 if s.stride == 1 else s.ran) and s.ran < 6 or memory == 1
    if s.stride == 1: assert set(s.kept) == set(range(7))
    else: assert len(s.kept) < 7


def test_work_of_a_tour():
    "Skipping each block in turn, with a reset after each, runs L blocks for the first loss and L^2 after it."
    s, ran = wd.Surgery(random_model(L=6), WINDOWS), []
    s.loss()
    assert s.ran == 6
    for l in range(1, 7):
        for edit in (lambda: s.skip(l), s.reset):
            edit().loss()
            ran.append(s.ran)
    assert ran == [n for l in range(1, 7) for n in (6 - l, 7 - l)] and sum(ran) == 36


def test_an_interrupted_measurement_leaves_no_lie(monkeypatch):
    model = random_model()
    s = wd.Surgery(model, WINDOWS, batch_size=4)
    def broken(*args): raise KeyboardInterrupt
    for edit in (lambda: s.reset(), lambda: s.skip(2), lambda: s.swap(1, 4)):
        edit()
        with monkeypatch.context() as patch:
            patch.setattr(model, 'token_losses', broken)
            with pytest.raises(KeyboardInterrupt): s.loss()
        fresh = wd.Surgery(model, WINDOWS, batch_size=4)
        fresh.order, fresh.modes = list(s.order), dict(s.modes)
        assert s.loss() == fresh.loss()


def test_generate_is_that_of_the_model():
    model = random_model()
    s, start = wd.Surgery(model, WINDOWS), WINDOWS[:2, :3]
    own = model.generate(start, 20, temperature=0.8, generator=torch.Generator().manual_seed(0))  # beyond the context too
    assert torch.equal(s.generate(start, 20), own) and not torch.equal(s.generate(start, 20, seed=1), own)
    model.blocks[1] = Affine(16)
    greedy = model.generate(start, 5, temperature=0)
    assert torch.equal(s.generate(start, 5, temperature=0), greedy) and not torch.equal(s.skip(2).generate(start, 20, temperature=0)[:, :8], greedy)


@pytest.mark.parametrize('attempt, says', [
    (lambda s: s.skip(5), 'l=5 must be the number of a block, 1 to 4'), (lambda s: s.skip(0), 'l=0'), (lambda s: s.swap(1, 'x'), "j='x'"),
    (lambda s: s.skip(True), 'l=True'), (lambda s: s.set_mode(1, 'cut'), "mode='cut'"), (lambda s: s.linearise(1), 'fit_windows is None'),
    (lambda s: s.generate(WINDOWS[:1] + 50), 'tokens holds'), (lambda s: s.generate(torch.zeros(1, 0, dtype=torch.long)), 'tokens is'),
    (lambda s: wd.Surgery(s.model, WINDOWS.float()), 'windows is'), (lambda s: wd.Surgery(s.model, [[1, 2]]), 'windows is'),
    (lambda s: wd.Surgery(s.model, WINDOWS - 5), 'windows holds tokens from -'), (lambda s: wd.Surgery(s.model, WINDOWS, WINDOWS), 'share a sequence'),
    (lambda s: wd.Surgery(nn.Linear(2, 2), WINDOWS), 'Linear cannot be adapted'), (lambda s: wd.surgery_widget(s.model), 'windows is None and tokenizer is None')])
def test_bad_input(attempt, says):
    s = wd.Surgery(random_model(), WINDOWS)
    with pytest.raises(ValueError, match=re.escape(says)): attempt(s)
    assert s.plan == [(l, 'keep') for l in (1, 2, 3, 4)], 'a refused edit changed the plan'


def test_cost_of_surgery():
    change, maps = wd.surgery_costs(wd.Surgery(random_model(), WINDOWS, FIT))
    assert change.tokens == 120 and maps.tokens == 240 and change.seconds > 0 and maps.flops > change.flops
    c = random_model().config
    assert abs(change.flops / (120 * flops_per_token(c, 12, training=False)) - 1) < 0.1   # ours counts the gains of norms too
    assert wd.surgery_costs(wd.Surgery(random_model(), WINDOWS))[1].tokens == 0


# --- Panels, by clicks from Python

def test_train_panel(corpus, tmp_path):
    panel = wd.train_widget(TINY, tmp_path, corpus)
    start, pause, stop = panel.buttons
    assert panel.model is None and panel.log == [] and 'FLOPs' in panel.cost.value and alive() == []
    for field, wrong, right, says in (('n_layers', 0, 3, 'n_layers=0'), ('n_kv_heads', 3, 1, 'n_kv_heads=3'), ('n_experts', 1, 4, 'n_experts=1'),
                                      ('context_length', 48, 8, 'tokens_per_step=64'), ('weight_decay', -1.0, 0.5, 'weight_decay=-1.0'),
                                      ('steps', 0, 10 ** 6, 'steps=0')):
        panel.fields[field].value = wrong
        assert says in panel.cost.value and 'role="alert"' in panel.cost.value
        start.click()
        assert panel.training is None, 'something started that cannot be'
        panel.fields[field].value = right
        assert 'role="alert"' not in panel.cost.value
    panel.fields['norm'].value = 'peri_ln'
    start.click()
    until(lambda: panel.log)
    pause.click()
    assert panel.training.state == 'paused' and pause.description == 'resume'
    pause.click()
    assert panel.training.state == 'running' and pause.description == 'pause'
    first = panel.training
    assert first.state in panel.picture.value
    panel.fields['steps'].value = 10
    start.click()
    assert not first.is_alive() and alive() in ([panel.training], [])
    panel.training.join()
    c = panel.model.config
    assert (c.n_layers, c.n_kv_heads, c.n_experts, c.context_length, c.norm) == (3, 1, 4, 8, 'peri_ln')
    assert panel.training.config.train.weight_decay == 0.5 and panel.log[-1]['step'] == 10
    assert 'finished' in panel.picture.value and panel.picture.value.count('<img') == 2
    assert {path.name for path in tmp_path.iterdir()} == {'run-1', 'run-2'}
    panel.draw(first)
    assert 'finished' in panel.picture.value, 'a training that was replaced drew over the new one'
    score, fit = panel.held_out()
    assert score.shape[1] == 9 and wd.surgery_widget(panel.model, panel.tokenizer, score, fit).loss > 0
    stop.click()
    assert panel.training.state == 'finished'


def test_surgery_panel():
    model = random_model()
    panel = wd.surgery_widget(model, None, WINDOWS, FIT)
    shown = lambda name: float(re.search(rf'class="{name}">([^<]*)<', panel.picture.value)[1])
    own = wd.Surgery(model, WINDOWS).loss()
    assert shown('loss') == shown('own') == round(own, 4) and len(panel.switches) == 4
    assert panel.surgery.maps is None, 'maps were fitted before they were needed'
    panel.switches[3].value = 'linear'
    assert panel.surgery.maps is not None and shown('loss') == round(wd.Surgery(model, WINDOWS, FIT).linearise(3).loss(), 4)
    panel.switches[2].value = 'skip'
    panel.pair[0].value, panel.pair[1].value = 2, 4
    panel.buttons[0].click()
    expected = wd.Surgery(model, WINDOWS, FIT).linearise(3).skip(2).swap(2, 4).loss()
    assert shown('loss') == round(expected, 4) and shown('change') == pytest.approx(expected - own, abs=1e-4)
    assert '<s title="skipped">2</s>' in panel.picture.value and '~3' in panel.picture.value
    panel.buttons[1].click()
    assert shown('loss') == round(own, 4) and all(s.value == 'keep' for s in panel.switches.values()) and panel.surgery.order == [1, 2, 3, 4]


def test_a_refused_switch_goes_back():
    model, panel = random_model(), None
    panel = wd.surgery_widget(model, None, WINDOWS, FIT)
    panel.surgery.fit_windows = None
    panel.switches[1].value = 'linear'
    assert panel.switches[1].value == 'keep' and 'fit_windows is None' in panel.picture.value
    panel.switches[1].value = 'skip'
    assert panel.surgery.modes[1] == 'skip' and 'role="alert"' not in panel.picture.value


def test_text_and_prompt(corpus):
    model = Transformer(vary(TINY, {'model.vocab_size': corpus.vocab_size}).model)
    panel = wd.surgery_widget(model, corpus.tokenizer)               # windows from the standard library
    assert panel.surgery.windows.shape == (16, 65) and panel.surgery.fit_windows.shape[1] == 65
    panel.prompt.value = 'import <os>'
    assert '<pre class="sample" style="white-space:pre-wrap">import &lt;os&gt;' in panel.picture.value
    panel.prompt.value = ''
    assert 'prompt=' in panel.picture.value and 'role="alert"' in panel.picture.value


def test_snapshot(corpus, tmp_path):
    panel = wd.surgery_widget(random_model(), None, WINDOWS, FIT)
    panel.switches[2].value = 'skip'
    still = wd.snapshot(panel)
    assert '<script' not in still and ' id=' not in still and 'http' not in still
    assert 'block 4' in still and f'{panel.loss:.4f}' in still and 'measure' in still
    assert len(re.findall('font-weight:700">(keep|skip|linear)<', still)) == 4


def test_a_panel_is_shown_live_and_as_a_snapshot():
    panel = wd.surgery_widget(random_model(), None, WINDOWS, FIT)
    shown = panel._repr_mimebundle_(include=None, exclude=None)
    assert shown['application/vnd.jupyter.widget-view+json']['model_id'] == panel.view.model_id
    assert shown['text/html'] == wd.snapshot(panel) and f'{panel.loss:.4f}' in shown['text/html']
    panel.switches[2].value = 'skip'
    assert f'{panel.loss:.4f}' in panel._repr_mimebundle_()['text/html'] != shown['text/html']


def test_the_chapter_stores_no_widgets(root):
    "A stored widget is dead, and makes the site load a runtime from another host; tests/store.py stores a chapter without."
    notebook = json.loads((root / 'nbs' / 'tools' / '12_widgets.ipynb').read_text(encoding='utf-8'))
    assert 'widgets' not in notebook['metadata']
    kinds = {kind for c in notebook['cells'] for o in c.get('outputs', []) for kind in o.get('data', {})}
    assert kinds <= {'text/plain', 'text/html'} and 'text/html' in kinds


def test_ipywidgets_is_only_needed_for_panels(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    assert wd.Surgery(random_model(), WINDOWS).loss() > 0
    with pytest.raises(ImportError, match=r'pip install'): wd.train_widget(TINY)


# --- In JupyterLab, in a browser

CELLS = ['''
import json, threading, torch
from sparsecod.core import ModelConfig, Transformer
from sparsecod.data import Corpus
from sparsecod.studies import SCALES, vary
from sparsecod.widgets import Surgery, Training, surgery_widget, train_widget
text = open(json.__file__).read()
corpus = Corpus.from_texts([text[i:i + 300] for i in range(0, len(text), 300)], vocab_size=300)
panel = train_widget(vary(SCALES['tiny'], {'model.n_layers': 2, 'train.steps': 10 ** 6}), corpus=corpus)
panel''', '''
lives = [t for t in threading.enumerate() if isinstance(t, Training)]
print('LIVES', len(lives), lives == [panel.training], panel.training.folder.name, panel.training.step, panel.training.state, 'END')''', '''
torch.manual_seed(1)
model = Transformer(ModelConfig(vocab_size=50, n_layers=4, d_model=16, n_heads=2, context_length=12, init_std=0.2))
sequences = lambda n, seed: torch.randint(50, (n, 13), generator=torch.Generator().manual_seed(seed))
before = {name: x.clone() for name, x in model.state_dict().items()}
knife = surgery_widget(model, None, sequences(10, 0), sequences(20, 1))
knife''', '''
print('SAME', all(torch.equal(x, before[name]) for name, x in model.state_dict().items()), knife.surgery.plan, 'END')''']


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
    env = os.environ | dict(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', JUPYTER_CONFIG_DIR=str(places['config']), JUPYTER_DATA_DIR=str(places['data']),
                            JUPYTER_RUNTIME_DIR=str(places['runtime']), IPYTHONDIR=str(places['ipython']), JUPYTER_PREFER_ENV_PATH='1',
                            PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '')]))
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1', '--ServerApp.port=0', '--IdentityProvider.token=secret',
               f'--ServerApp.root_dir={folder / "root"}', '--LabServerApp.notebook_starts_kernel=True', '--LabApp.extension_manager=readonly']
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
    end = time.monotonic() + 60
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
        self.page.get_by_text('| Idle').wait_for()
        for attempt in range(20):
            self.run(0)
            self.page.wait_for_timeout(2000)
            if re.search(r'[\d*]', self.cell(0).locator('.jp-InputPrompt').inner_text()): return

    def printed(self, n, word):
        "Run a cell and return what it prints, as often as it is run."
        self.page.keyboard.press('Escape')
        before = self.cell(n).locator('.jp-InputPrompt').inner_text()
        self.run(n)
        self.page.wait_for_function('([n, old]) => { const p = document.querySelectorAll(".jp-Notebook .jp-CodeCell")[n].querySelector(".jp-InputPrompt").innerText;'
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
        page.on('request', lambda r: None if r.url.startswith(('http://127.0.0.1:', 'http://localhost:', 'data:', 'blob:')) else outside.append(r.url))
        page.set_default_timeout(45_000)
        expect.set_options(timeout=45_000)
        try:
            page.goto(url)
            lab = Lab(page)
            lab.cell(0).wait_for()
            for one in drive: one(lab, expect)
            assert outside == [], 'the notebook asks other hosts'
            if place := os.environ.get('SPARSECOD_SCREENSHOTS'): page.screenshot(path=Path(place) / f'jupyterlab-{drive[0].__name__}.png')
        except Exception:
            page.screenshot(path=folder / 'failed.png')
            print((folder / 'server.log').read_text(encoding='utf-8')[-2000:])
            raise
        finally: browser.close()


def test_in_jupyterlab(tmp_path):
    "Both widgets in a real notebook: one training at a time, the kernel stays free, and surgery that leaves no trace."
    in_jupyterlab(tmp_path, notebook_of(CELLS), drive_training, drive_surgery)


SHOWN = """
import sparsecod
from sparsecod.explorers import stored_points, variance_explorer
variance_explorer(stored_points(sparsecod.__path__[0]))"""


def test_the_chapter_lives_in_jupyterlab(root, tmp_path):
    "Run All leaves both panels alive, and an explorer beside them."
    import nbformat
    notebook = nbformat.read(root / 'nbs' / 'tools' / '12_widgets.ipynb', as_version=4)
    notebook.cells += notebook_of([SHOWN]).cells
    in_jupyterlab(tmp_path, notebook, drive_chapter)


def drive_chapter(lab, expect):
    code = lab.page.locator('.jp-Notebook .jp-CodeCell')
    lab.first()
    lab.page.get_by_role('menuitem', name='Run', exact=True).click()
    lab.page.get_by_text('Run All Cells', exact=True).click()
    explorer, panels = lab.page.locator('#sce-variance'), code.filter(has=lab.page.locator('.jupyter-widgets'))
    explorer.wait_for(timeout=150_000)
    expect(panels).to_have_count(4)                                          # each of the two as it began, and after the clicks from Python
    says = explorer.locator('.says')
    before = says.inner_text()
    explorer.locator('[name=p]').press('ArrowLeft')
    expect(says).not_to_have_text(before)
    panel = panels.nth(0)
    panel.scroll_into_view_if_needed()
    expect(panel.locator('.says')).to_contain_text('finished')
    steps = panel.get_by_label('steps', exact=True)
    steps.fill('100000')
    steps.press('Tab')
    panel.get_by_role('button', name='start', exact=True).click()
    expect(panel.locator('.says')).to_contain_text('running, step')
    panel.get_by_role('button', name='stop', exact=True).click()
    expect(panel.locator('.says')).to_contain_text('interrupted')
    knife, loss = panels.nth(2), panels.nth(2).locator('.loss')
    knife.scroll_into_view_if_needed()
    own = loss.inner_text()
    knife.locator('.widget-toggle-buttons').nth(0).get_by_role('button', name='skip').click()
    expect(loss).not_to_have_text(own)


def drive_training(lab, expect):
    lab.first()
    lab.cell(0).get_by_text('FLOPs').wait_for()
    lab.click(0, 'start')
    loss = lab.cell(0).locator('.loss')
    loss.wait_for()
    assert 0 < float(loss.inner_text()) < 10
    lives, same, folder, step, state = lab.printed(1, 'LIVES').split()        # the kernel answers while it trains
    assert (lives, same, folder, state) == ('1', 'True', 'run-1', 'running')
    later = next((n for _ in range(20) if (n := int(lab.printed(1, 'LIVES').split()[3])) > int(step)), None)
    assert later, 'the training stands still'
    lab.click(0, 'pause')
    lab.cell(0).get_by_role('button', name='resume', exact=True).wait_for()
    steps = [int(lab.printed(1, 'LIVES').split()[3]) for _ in range(2)]
    assert later <= steps[0] and steps[1] - steps[0] <= 1
    lab.click(0, 'start')                                                     # again: the paused one must end
    expect(lab.cell(0).locator('.says').filter(has_text='running, step')).to_be_visible()
    loss.wait_for()
    assert lab.printed(1, 'LIVES').split()[:3] == ['1', 'True', 'run-2']
    lab.click(0, 'stop')
    expect(lab.cell(0).locator('.says').filter(has_text='interrupted, step')).to_be_visible()
    assert lab.printed(1, 'LIVES').split()[0] == '0'
    kv_heads = lab.cell(0).get_by_label('K/V heads (n_kv_heads)')
    kv_heads.fill('5')
    kv_heads.press('Tab')
    expect(lab.cell(0).get_by_text('n_kv_heads=5 must divide n_heads=2')).to_be_visible()


def drive_surgery(lab, expect):
    model = random_model()
    own, skipped = (f'{wd.Surgery(model, WINDOWS).set_mode(2, mode).loss():.4f}' for mode in ('keep', 'skip'))
    lab.run(2)
    loss = lab.cell(2).locator('.loss')
    expect(loss).to_have_text(own)
    assert own != skipped
    lab.cell(2).locator('.widget-toggle-buttons').nth(1).get_by_role('button', name='skip').click()
    expect(loss).to_have_text(skipped)
    assert lab.printed(3, 'SAME').startswith("True [(1, 'keep'), (2, 'skip')")
    lab.click(2, 'reset')
    expect(loss).to_have_text(own)
    assert 'skip' not in lab.printed(3, 'SAME')
