"""Tests of training: decay groups, schedule, accumulation, exact resumption, damage, divergence, several
processes."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

os.environ.setdefault('ACCELERATE_USE_CPU', 'true')  # on a CPU, repeated computations agree bit for bit

from sparsecod.adapters import open_model
from sparsecod.cli import main
from sparsecod.core import ModelConfig, Transformer, block_loss
from sparsecod.integrity import Damaged, check_seal, seal, stamp
from sparsecod.train import (StreamWatch, TrainConfig, accumulate_gradients, channel_variance, checkpoints,
                             _choose_strategy, decay_product, evaluate, find_world, learning_rate, load_result, _lock_folder,
                             _make_label, make_optimizer,
                             parameter_groups, _read_log, _run_id, sequences_per_step, summarize_watch, train)

V = 64
MODEL = ModelConfig(vocab_size=V, n_layers=2, d_model=16, n_heads=2, context_length=16)
MIXTURE = MODEL.replace(n_experts=4)
CONFIG = TrainConfig(steps=30, tokens_per_step=128, lr=1e-2, log_every=3, checkpoint_every=5)


class ToyCorpus:
    """Endless text from a Markov chain in which each token has four successors; can run a function at one
    step."""
    vocab_size, fingerprint = V, 'toy'

    def __init__(self, at=None, then=None):
        self.at, self.then = at, then
        self.successors = torch.randint(V, (V, 4), generator=torch.Generator().manual_seed(1))  # (V, 4)

    def batch(self, step, n_sequences, T, seed):
        if step == self.at: self.then()
        generator = torch.Generator().manual_seed(1000 * seed + step)
        tokens = [torch.randint(V, (n_sequences,), generator=generator)]
        for _ in range(T):
            tokens.append(self.successors[tokens[-1], torch.randint(4, (n_sequences,), generator=generator)])
        return torch.stack(tokens, 1)  # (N, T + 1)


def quiet(folder, corpus=None, model=MODEL, config=CONFIG, **options):
    "Train without a progress bar."
    return train(model, config, corpus or ToyCorpus(), folder, progress=False, **options)


def numbers(log):
    "A log without the measured speed."
    return [{k: v for k, v in record.items() if k != 'tokens_per_s'} for record in log]


def same_run(a, b):
    "Whether two results agree in every digit."
    weights = zip(a.model.parameters(), b.model.parameters())
    return numbers(a.log) == numbers(b.log) and all(torch.equal(p, q) for p, q in weights)


def script(folder, code, processes=0, **options):
    """Run this file's functions in a Python process of its own (or in several, as accelerate would launch
    them)."""
    path = folder / 'script.py'
    path.write_text(f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n'
                    f'import os, signal, torch; torch.set_num_threads({torch.get_num_threads()})\n'
                    f'from test_train import *\n{code}\n', encoding='utf-8')
    launch = (['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes
              else [])
    root = str(Path(__file__).parents[1])
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([root, os.environ.get('PYTHONPATH', '')]),
                            OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, *launch, str(path)], env=env, **options)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run that was never interrupted."
    return quiet(tmp_path_factory.mktemp('whole'))


@pytest.fixture(scope='module')
def stopped_run(tmp_path_factory):
    return interrupted(tmp_path_factory.mktemp('stopped'))


@pytest.fixture
def stopped(stopped_run, tmp_path):
    "The folder of a run that was stopped, with checkpoints after steps 10 and 13."
    return shutil.copytree(stopped_run, tmp_path / 'run')


def interrupted(folder, at=12, **options):
    "A run that was stopped, with checkpoints after step at + 1 and at the last one that is due before."
    quiet(folder, ToyCorpus(at, lambda: signal.raise_signal(signal.SIGTERM)), **options)
    return folder


# ---------------------------------------------------------------- configuration

@pytest.mark.parametrize('changes', [
    dict(steps=0), dict(steps=1.5), dict(tokens_per_step=-1), dict(micro_batch_tokens=0), dict(lr=0.0),
    dict(lr=math.nan),
    dict(min_lr_ratio=2.0), dict(warmup_steps=31), dict(weight_decay=-0.1), dict(decay_groups='biases'),
    dict(betas=(0.9, 1.0)),
    dict(betas=3), dict(betas=None), dict(betas=('a', 0.9)), dict(betas=(0.9,)),
    dict(eps=0.0), dict(clip=0.0), dict(precision='fp8'), dict(strategy='zero'),
    dict(activation_checkpointing=1), dict(seed=-1), dict(log_every=0), dict(checkpoint_every=0),
    dict(keep_checkpoints=0)])
def test_config_names_what_is_wrong(changes):
    with pytest.raises(ValueError) as error: CONFIG.replace(**changes)
    (field, value), = changes.items()
    assert f'{field}={value!r} must' in str(error.value)


def test_config_round_trip():
    config = CONFIG.replace(betas=(0.8, 0.9), micro_batch_tokens=64, warmup_steps=3)
    assert TrainConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match='learning_rate'):
        TrainConfig.from_dict(dict(steps=1, learning_rate=1.0))


def test_steps_must_divide():
    assert sequences_per_step(CONFIG, 16) == 8 == sequences_per_step(CONFIG, 16, processes=4)
    for T, processes in ((24, 1), (16, 3)):
        with pytest.raises(ValueError, match='tokens_per_step=128'): sequences_per_step(CONFIG, T, processes)
    with pytest.raises(ValueError, match='micro_batch_tokens=40'):
        sequences_per_step(CONFIG.replace(micro_batch_tokens=40), 16)


def test_vocabulary_must_fit(tmp_path):
    with pytest.raises(ValueError, match='vocab_size=32'): quiet(tmp_path, model=MODEL.replace(vocab_size=32))


# ---------------------------------------------------------------- optimiser and schedule

BLOCK_MATRICES = ['attention.query', 'attention.key', 'attention.value', 'attention.output',
                  'feed_forward.gate', 'feed_forward.up', 'feed_forward.down']

def test_decay_groups_match_a_list_by_hand():
    decaying, fixed = parameter_groups(Transformer(MODEL), 0.1)
    assert (set(decaying['names']) == {f'blocks.{i}.{m}.weight' for i in (0, 1) for m in BLOCK_MATRICES}
            | {'head.weight'})
    assert set(fixed['names']) == {'embedding.weight', 'final_norm.weight'} | {
        f'blocks.{i}.{part}_norm.weight' for i in (0, 1) for part in ('attention', 'feed_forward')}
    assert (decaying['weight_decay'], fixed['weight_decay']) == (0.1, 0.0)


@pytest.mark.parametrize('changes', [{}, dict(norm='peri_ln'), dict(tie_embeddings=True), dict(n_kv_heads=1)])
def test_every_parameter_is_in_one_group(changes):
    model = Transformer(MODEL.replace(**changes))
    for decay_groups in ('matrices', 'all_but_gains', 'all'):
        groups = parameter_groups(model, 0.1, decay_groups)
        assert sorted(id(p) for g in groups for p in g['params']) == sorted(id(p) for p in model.parameters())
        by_name = dict(model.named_parameters())
        assert all(by_name[n] is p for g in groups for n, p in zip(g['names'], g['params']))
    assert not groups[1]['params']  # all


def test_a_tied_head_is_an_embedding():
    decaying, fixed = parameter_groups(Transformer(MODEL.replace(tie_embeddings=True)), 0.1)
    assert ('embedding.weight' in fixed['names']
            and not any('head' in n for n in decaying['names'] + fixed['names']))


def test_schedule_has_known_values():
    config = TrainConfig(steps=110, lr=2.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(s, config) for s in range(110)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(1.0)  # a straight line
    assert rates[9] == max(rates) == pytest.approx(2.0)                       # the peak ends the warm-up
    assert rates[59] == pytest.approx(1.1)  # half way: mean of peak and floor
    assert rates[34] == pytest.approx(0.2 + 1.8 * (1 + math.sqrt(.5)) / 2)  # a quarter: cosine of 45 degrees
    assert rates[109] == min(rates[10:]) == pytest.approx(0.2)                # the floor at the last step
    flat = TrainConfig(steps=5, lr=1.0, warmup_steps=0, min_lr_ratio=1.0)
    assert {learning_rate(s, flat) for s in range(5)} == {1.0}
    climb = TrainConfig(steps=4, lr=1.0, warmup_steps=4)
    assert [learning_rate(s, climb) for s in range(4)] == [.25, .5, .75, 1.0]


@pytest.mark.parametrize('decay_groups', ['matrices', 'all', 'all_but_gains'])
def test_parameters_without_gradient_shrink_by_the_decay_product(decay_groups):
    config = TrainConfig(steps=50, weight_decay=0.5, decay_groups=decay_groups)
    model = Transformer(MODEL)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = make_optimizer(model, config)
    for s in range(config.steps):
        for p in model.parameters(): p.grad = torch.zeros_like(p)
        for group in optimizer.param_groups: group['lr'] = learning_rate(s, config)
        optimizer.step()
    factor = math.exp(-decay_product(config))
    assert factor < 0.97
    for name, p in model.named_parameters():
        decays = (decay_groups == 'all' or 'norm' not in name
                  and (decay_groups == 'all_but_gains' or 'embedding' not in name))
        assert torch.allclose(p, before[name] * (factor if decays else 1), rtol=1e-3), name


# ---------------------------------------------------------------- gradients and the watch

@pytest.mark.parametrize('config', [MODEL, MIXTURE, MIXTURE.replace(balance_weight=1.0, router_z_weight=1.0)],
                         ids=['dense', 'mixture', 'heavy auxiliary losses'])
@pytest.mark.parametrize('sequences', [4, 3, 1])
def test_accumulation_does_not_change_the_gradient(sequences, config):
    torch.manual_seed(0)
    model, windows, outs = Transformer(config), ToyCorpus().batch(0, 8, 16, 0), []
    def gradient(sequences):
        model.zero_grad()
        loss = accumulate_gradients(model, windows, sequences)
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])
    (loss, whole), (summed, parts) = gradient(8), gradient(sequences)
    logits = model(windows[:, :-1], watch=lambda l, out: outs.append(out))
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    by_hand += sum(block_loss(config, out, 8) for out in outs)
    # divided by the number of targets
    assert torch.allclose(loss, by_hand) and torch.allclose(summed, by_hand)
    assert (whole - parts).norm() < 1e-5 * whole.norm()


def test_watch_reports_the_variance_of_every_layer():
    torch.manual_seed(0)
    model, windows, watch = Transformer(MODEL), ToyCorpus().batch(0, 8, 16, 0), StreamWatch(MODEL)
    watch.see_embedding(model.embed(windows[:, :-1]))
    model(windows[:, :-1], targets=windows[:, 1:], watch=watch)
    summary = summarize_watch(watch)
    assert [len(v) for v in summary.values()] == [3, 3, 3, 2, 2]
    with torch.no_grad(): streams = [model.run(model.embed(windows[:, :-1]), stop=l) for l in range(3)]
    for l, h in enumerate(streams):
        v = h.var(-1)
        assert summary['variance_mean'][l] == pytest.approx(v.mean().item(), rel=1e-4)
        assert summary['variance_median'][l] == pytest.approx(v.median().item(), rel=1e-4)
        assert summary['variance_without_first'][l] == pytest.approx(v[:, 1:].mean().item(), rel=1e-4)


@pytest.mark.parametrize('compile', ['off', 'on'])
def test_a_term_of_any_blocks_is_trained_on_and_logged_apart(compile, monkeypatch, tmp_path):
    term = lambda config, out, sequences: out.update.abs().mean() / config.n_layers
    for module in ('core', 'train'): monkeypatch.setattr(f'sparsecod.{module}.block_loss', term)
    monkeypatch.setattr(torch, 'compile', lambda function, **options: function)
    first = quiet(tmp_path, config=CONFIG.replace(steps=3, log_every=1, compile=compile)).log[0]
    torch.manual_seed(CONFIG.seed)
    model, windows = Transformer(MODEL), ToyCorpus().batch(0, 8, 16, CONFIG.seed)
    assert (first['loss'] == pytest.approx(evaluate(model, windows).mean().item(), abs=1e-4)
            and first['auxiliary'] > 0)
    total = model(windows[:, :-1], targets=windows[:, 1:]).item()
    assert (first['loss'] + first['auxiliary'] == pytest.approx(total, abs=1e-4)
            and 'busiest_expert' not in first)


@pytest.mark.parametrize('changes', [{}, dict(micro_batch_tokens=48)])
def test_a_mixture_of_experts_logs_its_cross_entropy_apart(changes, tmp_path):
    model_config = MODEL.replace(n_experts=4, experts_per_token=2, balance_weight=1.0)
    result = quiet(tmp_path, model=model_config, config=CONFIG.replace(**changes))
    torch.manual_seed(CONFIG.seed)
    model, windows = Transformer(model_config), ToyCorpus().batch(0, 8, 16, CONFIG.seed)
    assert evaluate(model, windows).mean().item() == pytest.approx(result.log[0]['loss'], abs=1e-4)
    if not changes:
        total = model(windows[:, :-1], targets=windows[:, 1:]).item()
        assert result.log[0]['loss'] + result.log[0]['auxiliary'] == pytest.approx(total, abs=1e-4)
    assert result.log[0]['auxiliary'] > 0.9                      # a balanced block costs balance_weight / L
    assert all(len(r['busiest_expert']) == 2
               and 1 <= min(r['busiest_expert']) <= max(r['busiest_expert']) <= 2 for r in result.log)
    assert result.log[-1]['loss'] < result.log[0]['loss']


def test_channel_variance_is_fp32_and_unbiased():
    x = torch.randn(3, 5, 64)
    assert torch.allclose(channel_variance(x), x.var(-1))
    assert channel_variance(x.bfloat16()).dtype == torch.float32


# ---------------------------------------------------------------- a run

def test_it_learns_more_than_how_frequent_tokens_are(tmp_path):
    config = CONFIG.replace(steps=200, tokens_per_step=256, lr=2e-2)
    result = quiet(tmp_path, config=config)
    held_out = ToyCorpus().batch(10 ** 6, 64, 16, 7)
    frequency = torch.bincount(ToyCorpus().batch(0, 1000, 16, 3).flatten(), minlength=V) + 1.0
    unigram = -(frequency / frequency.sum()).log()[held_out[:, 1:]].mean()
    loss = evaluate(result.model, held_out)
    assert loss.shape == (64,) and loss.mean() < unigram - 1
    assert loss.mean() > math.log(4) - 0.1  # no model can know more than which four tokens may follow


def test_the_log_is_complete(whole):
    assert [r['step'] for r in whole.log] == [1, *range(3, 31, 3)]
    assert [r['tokens'] for r in whole.log] == [128 * r['step'] for r in whole.log]
    assert abs(whole.log[0]['loss'] - math.log(V)) < 0.05
    assert all(r['lr'] == learning_rate(r['step'] - 1, CONFIG) and r['tokens_per_s'] > 0 for r in whole.log)
    assert (whole.status, whole.step, whole.tokens) == ('finished', 30, 30 * 128) and whole.seconds > 0
    stored = [json.loads(line)
              for line in (whole.folder / 'log.jsonl').read_text(encoding='utf-8').splitlines()]
    assert all({**line, **record} == line for line, record in zip(stored, whole.log, strict=True))


def test_a_finished_run_is_read_back(whole):
    never = ToyCorpus(at=0, then=lambda: pytest.fail('trained again'))
    again = quiet(whole.folder, never)
    assert same_run(again, whole) and again.seconds == whole.seconds
    assert same_run(load_result(whole.folder), whole)


def test_micro_batches_and_bf16_train_alike(whole, tmp_path):
    small = quiet(tmp_path / 'small', config=CONFIG.replace(micro_batch_tokens=32))
    half = quiet(tmp_path / 'half', config=CONFIG.replace(precision='bf16'))
    for result, tolerance in ((small, 1e-3), (half, 5e-2)):
        assert [r['loss'] for r in result.log] == pytest.approx([r['loss'] for r in whole.log], rel=tolerance)
        assert all(p.dtype == torch.float32 for p in result.model.parameters())
    assert [r['loss'] for r in half.log] != [r['loss'] for r in whole.log]


def test_compiled_training_computes_the_same(whole, tmp_path, monkeypatch):
    real, compiled = torch.compile, []
    def traced(function,
               **options):  # traced as usual, but without the minutes and the C++ compiler that optimisation may take
        compiled.append(function.__name__)
        return real(function, backend='eager', **options)
    monkeypatch.setattr(torch, 'compile', traced)
    result = quiet(tmp_path, config=CONFIG.replace(compile='on', precision='fp32'))
    assert compiled == ['last_stream', 'chunk_losses'] and result.execution['compiled']
    assert [r['loss'] for r in result.log] == pytest.approx([r['loss'] for r in whole.log], rel=1e-4)
    assert result.log[-1]['variance_mean'] == pytest.approx(whole.log[-1]['variance_mean'], rel=1e-3)
    loaded = Transformer.from_pretrained(tmp_path / 'model')  # names of parameters are those of a plain model
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), result.model.parameters()))


def test_seeds_decide_everything_and_leave_the_caller_alone(whole, tmp_path):
    torch.manual_seed(123)
    expected = torch.randn(3)
    torch.manual_seed(123)
    other = quiet(tmp_path, config=CONFIG.replace(seed=1))
    assert torch.equal(torch.randn(3), expected)
    assert other.log[0]['loss'] != whole.log[0]['loss']


def test_evaluate_is_the_mean_loss_of_each_sequence():
    torch.manual_seed(0)
    model, windows = Transformer(MODEL), ToyCorpus().batch(0, 7, 16, 0)
    losses = evaluate(model, windows, batch_tokens=33)
    for window, loss in zip(windows, losses):
        by_hand = torch.nn.functional.cross_entropy(model(window[None, :-1])[0], window[1:])
        assert torch.allclose(loss, by_hand, atol=1e-5)
    with pytest.raises(ValueError, match='float32|fp32'): evaluate(model.bfloat16(), windows)


# ---------------------------------------------------------------- interruptions

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('at', [0, 13, 14, 29])
def test_a_signal_saves_and_the_run_continues_exactly(number, at, whole, tmp_path):
    before = signal.getsignal(number)
    stopped = quiet(tmp_path, ToyCorpus(at, lambda: signal.raise_signal(number)))
    assert signal.getsignal(number) is before
    if at == 29: assert stopped.status == 'finished'  # the step was the last one
    else:
        assert (stopped.status, stopped.step) == ('interrupted', at + 1)
        assert checkpoints(tmp_path)[-1].name == f'step-{at + 1:08d}'
    assert same_run(quiet(tmp_path), whole)


def test_a_second_signal_stops_at_once(whole, tmp_path):
    def again(number, wait):
        signal.raise_signal(number)
        time.sleep(wait)
        signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt): quiet(tmp_path, ToyCorpus(13, lambda: again(signal.SIGINT, 1.1)))
    for number, wait, at in ((signal.SIGINT, 0, 14), (signal.SIGTERM, 1.1, 16)):     # handed on by a launcher
        stopped = quiet(tmp_path, ToyCorpus(at, lambda: again(number, wait)))
        assert (stopped.status, stopped.step) == ('interrupted', at + 1)
    assert same_run(quiet(tmp_path), whole)


@pytest.fixture(scope='module')
def ended_by_others(tmp_path_factory):
    """Folders of runs in processes of their own that got a signal: killed before any checkpoint, killed
    later, asked to stop."""
    folder = tmp_path_factory.mktemp('ended')
    code = (f'for name, at, end in ("early", 2, signal.SIGKILL), ("late", 13, signal.SIGKILL), ("asked", 8, '
            f'signal.SIGTERM):\n'
            f'    if not (child := os.fork()):\n'
            f'        result = quiet({str(folder)!r} + "/" + name, ToyCorpus(at, lambda: '
            f'os.kill(os.getpid(), end)))\n'
            f'        os._exit(7 * (result.status == "interrupted"))\n'
            f'    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))')
    out = script(folder, code, stdout=subprocess.PIPE, text=True).communicate(timeout=120)[0]
    assert list(map(int, out.split())) == [-signal.SIGKILL, -signal.SIGKILL, 7]
    return folder


@pytest.mark.parametrize('name, left', [('early', []), ('late', ['step-00000005', 'step-00000010']),
                                        ('asked', ['step-00000005', 'step-00000009'])])
def test_a_process_that_was_ended_continues_from_the_last_checkpoint(name, left, ended_by_others, whole):
    run = ended_by_others / name
    assert [c.name for c in checkpoints(run)] == left and not (run / 'result.json').exists()
    assert same_run(quiet(run), whole)


def test_a_torn_log_line_is_dropped(whole, tmp_path):
    quiet(tmp_path, ToyCorpus(13, lambda: signal.raise_signal(signal.SIGTERM)))
    with open(tmp_path / 'log.jsonl', 'a', encoding="utf-8") as log: log.write('{"step": 15, "loss": 3.')
    assert _read_log(tmp_path)[-1]['step'] == 12
    assert same_run(quiet(tmp_path), whole)


# ---------------------------------------------------------------- damage

def truncate(path): path.write_bytes(path.read_bytes()[:-10])
def remove(path): path.unlink()
def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize('harm', [truncate, remove, flip])
@pytest.mark.parametrize('name',
                         ['model.safetensors', 'optimizer.safetensors', 'state.json', 'manifest.json'])
def test_a_damaged_checkpoint_is_named_and_passed_over(harm, name, whole, stopped):
    older, newest = checkpoints(stopped)
    harm(newest / name)
    with pytest.warns(UserWarning, match=f'checkpoint {newest.name} is damaged .*{name}'):
        result = quiet(stopped)
    assert same_run(result, whole)


def test_with_all_checkpoints_damaged_a_run_starts_again(whole, stopped):
    for checkpoint in checkpoints(stopped): truncate(checkpoint / 'model.safetensors')
    with pytest.warns(UserWarning, match='damaged'): result = quiet(stopped)
    assert same_run(result, whole)


@pytest.mark.parametrize('keep', [1, 2])
def test_damaged_checkpoints_do_not_crowd_out_new_ones(keep, whole, tmp_path):
    def interrupted(at):
        return quiet(tmp_path, ToyCorpus(at, lambda: signal.raise_signal(signal.SIGTERM)), config=config)
    config = CONFIG.replace(keep_checkpoints=keep)
    interrupted(22)
    names = [c.name for c in checkpoints(tmp_path)]
    assert len(names) == keep
    for checkpoint in checkpoints(tmp_path): truncate(checkpoint / 'model.safetensors')
    with pytest.warns(UserWarning, match='damaged'): assert interrupted(2).step == 3  # from the beginning
    assert [c.name for c in checkpoints(tmp_path)] == ['step-00000003']
    assert sorted(p.name for p in (tmp_path / 'checkpoints').glob('*.damaged')) == [f'{name}.damaged'
                                                                                    for name in names]
    assert interrupted(6).step == 7  # from step 3, without a warning
    assert [c.name for c in checkpoints(tmp_path)][-1] == 'step-00000007'
    assert same_run(quiet(tmp_path, config=config), whole)


def test_a_checkpoint_that_is_damaged_twice_is_set_aside_twice(whole, stopped):
    truncate(checkpoints(stopped)[-1] / 'model.safetensors')
    with pytest.warns(UserWarning, match='step-00000013 is damaged'): interrupted(stopped)
    truncate(checkpoints(stopped)[-1] / 'model.safetensors')
    with pytest.warns(UserWarning, match='step-00000013 is damaged'): result = quiet(stopped)
    assert same_run(result, whole) and len(list((stopped / 'checkpoints').glob('*.damaged*'))) == 2


@pytest.mark.parametrize('harm', [truncate, remove])
@pytest.mark.parametrize('name', ['model/model.safetensors', 'result.json'])
@pytest.mark.parametrize('with_checkpoints', [True, False])
def test_a_damaged_ending_is_named_and_computed_again(harm, name, with_checkpoints, whole, tmp_path):
    if (harm, name) == (remove, 'result.json'): harm = lambda path: path.write_text('[]', encoding='utf-8')
    run = shutil.copytree(whole.folder, tmp_path / 'run')
    harm(run / name)
    if not with_checkpoints: shutil.rmtree(run / 'checkpoints')
    with pytest.raises(ValueError, match=re.escape(str(run / name))): load_result(run)
    steps = []
    corpus = ToyCorpus()
    batch = corpus.batch
    corpus.batch = lambda step, *sizes: steps.append(step) or batch(step, *sizes)
    with pytest.warns(UserWarning, match=re.escape(str(run / name))): result = quiet(run, corpus)
    assert steps == list(range(25 if with_checkpoints else 0, 30))
    assert same_run(result, whole) and same_run(load_result(run), whole)


def test_old_checkpoints_go(tmp_path):
    quiet(tmp_path, config=CONFIG.replace(keep_checkpoints=3))
    assert [c.name for c in checkpoints(tmp_path)] == ['step-00000015', 'step-00000020', 'step-00000025']
    assert all(check_seal(c)['step'] == int(c.name[5:]) for c in checkpoints(tmp_path))
    assert not list(tmp_path.glob('**/*.draft'))


# ---------------------------------------------------------------- the folder

@pytest.mark.parametrize('changes, field', [(dict(config=CONFIG.replace(lr=0.02)), 'lr=0.01'),
                                            (dict(config=CONFIG.replace(betas=(.9, .99))), 'betas='),
                                            (dict(model=MODEL.replace(n_layers=3)), 'n_layers=2')])
def test_another_run_is_refused_by_field(changes, field, whole):
    with pytest.raises(ValueError, match=field): quiet(whole.folder, **changes)


def test_another_corpus_is_refused(whole):
    corpus = ToyCorpus()
    corpus.fingerprint = 'other'
    with pytest.raises(ValueError, match="fingerprint='toy'"): quiet(whole.folder, corpus)


def test_afresh_erases_the_old_run_and_nothing_else(tmp_path):
    quiet(tmp_path)
    (tmp_path / 'notes.txt').write_text('mine', encoding='utf-8')
    other = quiet(tmp_path, config=CONFIG.replace(seed=1), resume=False)
    assert other.status == 'finished' and [r['step'] for r in other.log] == [1, *range(3, 31, 3)]
    assert (tmp_path / 'notes.txt').read_text(encoding='utf-8') == 'mine'


def contents(folder):
    "Every file below a folder, with its bytes; the lock is left out."
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()
            and p.name != 'run.lock'}


def test_afresh_erases_no_folder_that_no_training_made(tmp_path):
    for name in ('model/weights.bin', 'checkpoints/mine', 'log.jsonl'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('mine', encoding='utf-8')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path)) + '.*choose another'):
        quiet(tmp_path, resume=False)
    (tmp_path / 'config.json').write_text('{"model_type": "llama"}', encoding='utf-8')
    with pytest.raises(ValueError, match='choose another folder'): quiet(tmp_path, resume=False)
    (tmp_path / 'config.json').unlink()
    assert contents(tmp_path) == before
    assert quiet(tmp_path / 'new', resume=False).status == 'finished'  # nothing there to erase


@pytest.mark.parametrize('text', ['', '{"model": ', '[1]', '{}', '{"model_type": "llama"}',
                                  '{"model": "a", "train": {}, "corpus": "b"}',
                                  '{"model": {}, "train": {}, "corpus": "b"}', b'\xff\xfe'])
def test_a_config_of_something_else_is_refused(text, tmp_path):
    (tmp_path / 'config.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    before = contents(tmp_path)
    with pytest.raises(ValueError) as error: quiet(tmp_path)
    assert str(tmp_path / 'config.json') in str(error.value) and 'choose another folder' in str(error.value)
    assert contents(tmp_path) == before


def test_only_drafts_of_the_training_are_removed(whole, stopped):
    own = ['config.json.draft', 'log.jsonl.77.draft', 'result.json.draft', 'model.4321.draft/x',
           'checkpoints/step-00000015.9.draft/x']
    foreign = ['novel.draft', 'chapters/one.draft', 'letters.draft/x', 'checkpoints/thoughts.draft',
               'checkpoints.draft', 'model.mine.draft']
    for name in own + foreign:
        (stopped / name).parent.mkdir(exist_ok=True)
        (stopped / name).write_text('text', encoding='utf-8')
    assert same_run(quiet(stopped), whole)
    assert (not any((stopped / name).exists() for name in own)
            and all((stopped / name).exists() for name in foreign))


def test_how_a_run_is_carried_out_may_change(whole, stopped):
    result = quiet(stopped, config=CONFIG.replace(micro_batch_tokens=32, checkpoint_every=7,
                                                  keep_checkpoints=1))
    assert [r['loss'] for r in result.log] == pytest.approx([r['loss'] for r in whole.log], rel=1e-3)


def test_a_folder_in_use_is_refused(tmp_path):
    with _lock_folder(tmp_path, find_world()), pytest.raises(RuntimeError, match='in use'): quiet(tmp_path)


# ---------------------------------------------------------------- divergence

def test_divergence_is_a_result(tmp_path, capfd):
    # lr x weight_decay = 3: weights double at every step
    config = CONFIG.replace(lr=30.0, warmup_steps=0, steps=200)
    result = train(MODEL, config, ToyCorpus(), tmp_path)         # with a bar
    assert result.status == 'diverged' and 1 < result.step < 200
    assert result.log[-1]['step'] == result.step
    assert None in (result.log[-1]['loss'], result.log[-1]['grad_norm'])
    assert [r['step'] for r in result.log[:-1]] == [1, *range(3, result.step, 3)]
    assert capfd.readouterr().err.endswith('\n')                 # the bar was closed
    again = quiet(tmp_path, config=config)
    assert (again.status, again.step, again.log) == (result.status, result.step, result.log)


def test_a_nan_in_the_weights_ends_the_run_before_an_update(tmp_path, monkeypatch):
    import sparsecod.train as module
    start = module.start_run
    def spoiled(*args):
        run = start(*args)
        with torch.no_grad(): run.model.head.weight[0, 0] = math.nan
        return run
    monkeypatch.setattr(module, 'start_run', spoiled)
    result = quiet(tmp_path)
    assert (result.status, result.step) == ('diverged', 1) and result.log[0]['loss'] is None
    assert result.model.head.weight.isnan().sum() == 1           # no update spread it


# ---------------------------------------------------------------- progress and processes

def test_the_bar_shows_what_matters(tmp_path, capfd):
    train(MODEL, CONFIG, ToyCorpus(), tmp_path / 'loud')
    shown = capfd.readouterr().err
    assert all(part in shown for part in ('30/30', 'loss', 'lr', 'tok/s', 'loud'))
    quiet(tmp_path / 'silent')
    assert load_result(tmp_path / 'silent').status == 'finished'
    assert capfd.readouterr() == ('', '')


@pytest.fixture(scope='module')
def by_two(tmp_path_factory):
    """What two processes print that find each other without a GPU and train some runs, and the folder of
    those."""
    folder = tmp_path_factory.mktemp('two')
    (folder / 'texts').mkdir()
    for i in range(60):
        (folder / 'texts' / f'{i}.txt').write_text(' '.join(f'word{i * k % 97}' for k in range(1, 400)),
                                                   encoding='utf-8')
    command = ('train typed --scale tiny --steps 2 --data texts --quiet --set data.vocab_size=300 --set '
               'data.val_share=0.4 '
               '--set score.n_sequences=4 --set score.n_fit=4 --set n_eval=4')
    code = (f'os.environ.pop("ACCELERATE_USE_CPU")\n'
            f'os.environ["CUDA_VISIBLE_DEVICES"] = ""\n'
            f'os.chdir({str(folder)!r})\n'
            f'config = CONFIG.replace(micro_batch_tokens=32)\n'
            f'result, _ = (quiet(name, model=model, config=config) for name, model in (("dense", MODEL), '
            f'("mixture", MIXTURE)))\n'
            f'stop = (lambda: signal.raise_signal(signal.SIGTERM)) if os.environ["RANK"] == "1" else '
            f'(lambda: None)\n'
            f'stopped = quiet("stopped", ToyCorpus(12, stop))\n'
            f'again = quiet("stopped")\n'
            f'assert main({command!r}.split()) == 0\n'
            f'world = find_world()\n'
            f'print(world.num_processes, result.status, stopped.status, again.status, world.is_main_process)')
    out = script(folder, code, processes=2, stdout=subprocess.PIPE, text=True).communicate(timeout=300)[0]
    return sorted(out.splitlines()), folder


def test_two_processes_stop_together_and_one_talks(by_two):
    lines, folder = by_two
    assert [line for line in lines if line.startswith('2 ')] == [f'2 finished interrupted finished {main}'
                                                                 for main in (False, True)]
    assert sum('finished at step 2 of 2' in line
               for line in lines) == sum('held-out loss' in line for line in lines) == 1
    assert load_result(folder / 'typed').step == 2 and open_model(folder / 'typed')[1].vocab_size == 300
    assert not list(folder.rglob('*.draft'))


@pytest.mark.parametrize('name, model', [('dense', MODEL), ('mixture', MIXTURE), ('stopped', MODEL)])
def test_two_processes_compute_what_one_does(name, model, by_two, whole, tmp_path):
    one, both = whole if model is MODEL else quiet(tmp_path, model=model), load_result(by_two[1] / name)
    assert (both.status, both.step) == ('finished', 30)
    assert [r['loss'] for r in both.log] == pytest.approx([r['loss'] for r in one.log], rel=1e-3)
    for p, q in zip(both.model.parameters(), one.model.parameters()): assert torch.allclose(p, q, atol=1e-2)


# ---------------------------------------------------------------- a model divided among processes

MODELS = dict(dense=MODEL.replace(tie_embeddings=True),
              mixture=MIXTURE.replace(n_experts=3, d_shared_expert=8))
SHORT = CONFIG.replace(steps=15, micro_batch_tokens=32, log_every=1, checkpoint_every=4)
HALF = CONFIG.replace(steps=12, log_every=1, checkpoint_every=4)
WAYS = dict(ddp=dict(strategy='ddp'), fsdp=dict(strategy='fsdp'),
            again=dict(strategy='fsdp', activation_checkpointing=True))


@pytest.fixture(scope='module')
def divided(tmp_path_factory):
    "Runs by two processes in several ways, one of them begun by one process, and one that two have begun."
    folder = tmp_path_factory.mktemp('divided')
    interrupted(folder / 'from one', at=6, config=HALF)
    code = (f'os.chdir({str(folder)!r})\n'
            f'for name, model in MODELS.items():\n'
            f'    for way, how in WAYS.items():\n'
            f'        result = quiet(f"{{way}} {{name}}", model=model, config=SHORT.replace(**how))\n'
            f'        evaluate(result.model, ToyCorpus().batch(0, 4, 16, 0))\n'
            f'fsdp = HALF.replace(strategy="fsdp")\n'
            f'quiet("from one", config=fsdp)\n'
            f'interrupted("from two", at=6, config=fsdp)\n'
            f'interrupted("two and two", at=6, config=fsdp)\n'
            f'quiet("two and two", config=fsdp)\n')
    assert script(folder, code, processes=2).wait(timeout=300) == 0
    return folder


@pytest.fixture(scope='module')
def by_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp('one')
    return {name: quiet(folder / name, model=model, config=SHORT) for name, model in MODELS.items()}


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', MODELS)
def test_every_strategy_computes_the_same(way, name, divided, by_one):
    one, both = by_one[name], load_result(divided / f'{way} {name}')
    assert len(both.log) == 15 and both.model.config == one.model.config
    for key in ('loss', 'grad_norm', *(['auxiliary'] if name == 'mixture' else [])):
        for a, b in zip(both.log, one.log): assert a[key] == pytest.approx(b[key], abs=1e-5), (key, a['step'])
    for a, b in zip(both.log, _read_log(divided / f'ddp {name}')):
        assert a['variance_mean'] == pytest.approx(b['variance_mean'], abs=1e-5)
    for p, q in zip(both.model.parameters(), one.model.parameters()): assert torch.allclose(p, q, atol=1e-4)


def test_a_divided_model_is_stored_in_shares_and_ends_as_one(divided):
    saved = divided / 'from two' / 'checkpoints' / 'step-00000007'
    assert len(list(saved.glob('shard-*'))) == 2 and not (saved / 'model.safetensors').exists()
    assert check_seal(saved)['step'] == 7
    assert not list(divided.rglob('*.draft'))
    Transformer.from_pretrained(divided / 'fsdp dense' / 'model')


def test_runs_go_on_with_another_number_of_processes(divided, tmp_path):
    whole = quiet(tmp_path / 'whole', config=HALF)
    go_on = shutil.copytree(divided / 'from two', tmp_path / 'from two')
    for folder in (divided / 'from one', divided / 'two and two'): assert (folder / 'result.json').exists()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        results = [load_result(divided / 'from one'), load_result(divided / 'two and two'),
                   quiet(go_on, config=HALF)]
    for result in results:
        assert [r['step'] for r in result.log] == list(range(1, 13))
        assert [r['loss'] for r in result.log] == pytest.approx([r['loss'] for r in whole.log], abs=1e-5)


@pytest.mark.parametrize('harm', ['cut', 'gone', 'exchanged'])
def test_a_damaged_share_is_named_and_the_checkpoint_before_it_used(harm, divided, tmp_path):
    folder = shutil.copytree(divided / 'from two', tmp_path / 'run')
    share, other = sorted((folder / 'checkpoints' / 'step-00000007').glob('shard-*'))
    if harm == 'cut': share.write_bytes(share.read_bytes()[:-4])
    elif harm == 'gone': share.unlink()
    else: shutil.copy(other, share)
    with pytest.warns(UserWarning, match=share.name): result = quiet(folder, config=HALF)
    assert result.status == 'finished' and (folder / 'checkpoints' / 'step-00000007.damaged').exists()


@pytest.mark.parametrize('strategy', ['ddp', 'fsdp'])
def test_a_lost_process_ends_all_and_the_same_command_goes_on(strategy, tmp_path):
    code = (f'kill = lambda: os.environ["RANK"] == "1" and not os.path.exists("again") and '
            f'os.kill(os.getpid(), signal.SIGKILL)\n'
            f'os.chdir({str(tmp_path)!r})\n'
            f'quiet("run", ToyCorpus(9, kill), config=HALF.replace(strategy={strategy!r}))\n')
    lost = script(tmp_path, code, processes=2, stderr=subprocess.PIPE, text=True)
    said = lost.communicate(timeout=200)[1]
    assert lost.returncode != 0 and 'continues from its last checkpoint' in said
    assert [step.name for step in checkpoints(tmp_path / 'run')] == ['step-00000004', 'step-00000008']
    (tmp_path / 'again').touch()
    assert script(tmp_path, code, processes=2).wait(timeout=200) == 0
    assert [r['step'] for r in load_result(tmp_path / 'run').log] == list(range(1, 13))


def test_blocks_computed_again_change_no_digit(whole, tmp_path):
    assert same_run(quiet(tmp_path / 'dense', config=CONFIG.replace(activation_checkpointing=True)), whole)
    plain, again = (quiet(tmp_path / str(again), model=MIXTURE,
                          config=SHORT.replace(activation_checkpointing=again)) for again in (False, True))
    assert same_run(plain, again)


def test_a_gpu_gets_the_first_way_that_fits(monkeypatch):
    room = {}
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (0, room['bytes']))
    monkeypatch.setattr('sparsecod.train.memory_bytes',
                        lambda config, n, bf16, again: {way: n // (2 if again else 1)
                                                        for way, n in needs.items()})
    needs = dict(single=100, ddp=80, fsdp=50)
    def chosen(n, gigabytes, **changes):
        room['bytes'] = gigabytes / .9 + 1e-6
        return _choose_strategy(MODEL, CONFIG.replace(**changes),
                               SimpleNamespace(num_processes=n, device=torch.device('cuda')))
    assert chosen(1, 100) == ('single', False) and chosen(1, 60) == ('single', True)
    assert [chosen(8, n) for n in (80, 79, 49, 39, 1)] == [('ddp', False), ('fsdp', False), ('ddp', True),
                                                           ('fsdp', True), ('fsdp', True)]
    assert (chosen(8, 80, strategy='fsdp') == ('fsdp', False)
            and chosen(8, 1, strategy='ddp', activation_checkpointing=False) == ('ddp', False))


def test_a_tracker_gets_the_numbers_of_the_log(tmp_path, monkeypatch):
    seen = []
    class Fake:
        def __init__(self, project, **options): seen.append(project)
        def log(self, values, step): seen.append((step, values))
        def finish(self): seen.append('finished')
    monkeypatch.setattr('sparsecod.train.find_spec', lambda name: True)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, 'wandb', Fake)
    result = quiet(tmp_path, tracker='wandb')
    assert seen[-1] == 'finished' and [step for step, _ in seen[1:-1]] == [r['step'] for r in result.log]
    assert (seen[1][1]['loss'] == result.log[0]['loss']
            and seen[1][1]['variance_mean/2'] == result.log[0]['variance_mean'][2])


@pytest.mark.parametrize('name, error',
                         [('wandb', ImportError), ('tensorboard', ImportError), ('paper', ValueError)])
def test_a_tracker_that_is_not_there_is_refused_first(name, error, tmp_path, monkeypatch):
    monkeypatch.setattr('sparsecod.train.find_spec', lambda name: None)
    with pytest.raises(error, match=name): quiet(tmp_path / 'run', tracker=name)
    assert not (tmp_path / 'run').exists()


def test_how_a_model_is_divided_names_no_other_run():
    labels = [_make_label(MODEL, CONFIG.replace(**how), 'x') for how in ({}, *WAYS.values())]
    assert len({_run_id(label) for label in labels}) == 1
    old = _make_label(MODEL, CONFIG, 'x')
    for name in ('strategy', 'activation_checkpointing'): del old['train'][name]
    assert _run_id(old) == _run_id(labels[0])


@pytest.mark.parametrize('resume', [True, False])
@pytest.mark.parametrize('name', ['model', 'log.jsonl', 'result.json', 'checkpoints'])
def test_files_that_no_training_made_are_left_alone(name, resume, tmp_path):
    "A folder of somebody else's, with names that a training uses too, is refused in both modes."
    mine = tmp_path / name / 'mine' if name in ('model', 'checkpoints') else tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text('precious', encoding='utf-8')
    with pytest.raises(ValueError, match='choose another folder'): quiet(tmp_path, resume=resume)
    assert mine.read_text(encoding='utf-8') == 'precious'


# ---------------------------------------------------------------- identity, and more kinds of damage

def said_by(call):
    "What a call returns, and the warnings that it gives."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        result = call()
    return result, ' '.join(str(w.message) for w in caught)


@pytest.mark.parametrize('other, field', [(dict(config=CONFIG.replace(seed=1)), 'seed=1'),
                                          (dict(config=CONFIG.replace(lr=2e-2)), 'lr=0.02'),
                                          (dict(model=MODEL.replace(norm='peri_ln')), "norm='peri_ln'")])
def test_a_checkpoint_of_another_run_is_named_and_passed_over(other, field, whole, stopped, tmp_path):
    run, stranger = stopped, interrupted(tmp_path / 'stranger', **other)
    newest = checkpoints(run)[-1]
    shutil.rmtree(newest)
    shutil.copytree(checkpoints(stranger)[-1], newest)
    result, said = said_by(lambda: quiet(run))
    assert newest.name in said and field in said and same_run(result, whole)
    assert newest.with_name(newest.name + '.damaged').is_dir()   # nothing is deleted


def reseal(checkpoint, **changes):
    "Change a checkpoint's state or identity, None: leave it out, with checksums that are right again."
    identity = check_seal(checkpoint)
    state = json.loads((checkpoint / 'state.json').read_text(encoding='utf-8'))
    for name, value in changes.items(): (state if name in state else identity)[name] = value
    state = {name: value for name, value in state.items() if value is not None}
    (checkpoint / 'state.json').write_text(json.dumps(state), encoding='utf-8')
    seal(checkpoint, identity)


def as_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize('harm', [
    lambda c: (c / 'manifest.json').write_text('[]', encoding='utf-8'),
    lambda c: (c / 'manifest.json').write_text('{"files": {}}', encoding='utf-8'),
    lambda c: as_folder(c / 'state.json'), lambda c: as_folder(c / 'manifest.json'),
    lambda c: (shutil.rmtree(c), c.write_text('a file', encoding='utf-8')),
    lambda c: reseal(c, step=999), lambda c: reseal(c, format=99), lambda c: reseal(c, train=[]),
    lambda c: reseal(c, corpus='b'), lambda c: reseal(c, seconds=None), lambda c: reseal(c, mark=None),
    lambda c: shutil.copytree(c, c.with_name('step-00000025'))])
def test_a_checkpoint_that_no_run_has_written_is_passed_over(harm, whole, stopped):
    harm(checkpoints(stopped)[-1])
    result, said = said_by(lambda: quiet(stopped))
    assert same_run(result, whole) and re.search('checkpoint step-000000(13|25)', said)


def test_zeroed_and_exchanged_final_models_are_noticed_by_all_who_read_them(tmp_path):
    quiet(tmp_path / 'run')
    quiet(tmp_path / 'other', config=CONFIG.replace(seed=1))
    weights = tmp_path / 'run' / 'model' / 'model.safetensors'
    sound = weights.read_bytes()
    def other_model(): shutil.copy(tmp_path / 'other' / 'model' / 'model.safetensors', weights)
    for harm in (lambda: flip(weights), lambda: weights.write_bytes(sound[:2000] + bytes(len(sound) - 2000)),
                 other_model):
        harm()
        with pytest.raises(Damaged, match=re.escape(str(weights))): load_result(tmp_path / 'run')
        with pytest.raises(Damaged, match=re.escape(str(weights))):
            Transformer.from_pretrained(tmp_path / 'run' / 'model')
        with pytest.raises(ValueError, match='model.safetensors'): open_model(tmp_path / 'run')
        weights.write_bytes(sound)
    assert load_result(tmp_path / 'run').status == 'finished'
    shutil.rmtree(tmp_path / 'run' / 'model')  # a whole folder is sound in itself, but of another run
    shutil.copytree(tmp_path / 'other' / 'model', tmp_path / 'run' / 'model')
    with pytest.raises(Damaged, match='seed=1 there, seed=0'): load_result(tmp_path / 'run')
    assert main(['score', str(tmp_path / 'run'), '--quiet']) != 0


def test_saved_models_without_a_manifest_can_be_loaded(whole, tmp_path):
    whole.model.save_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(Transformer.from_pretrained(tmp_path).parameters(),
                                                 whole.model.parameters()))
    copy = shutil.copytree(whole.folder / 'model', tmp_path / 'copy')
    Transformer(MODEL).save_pretrained(copy)  # other weights in a sealed folder: its seal is gone
    assert Transformer.from_pretrained(copy).config == MODEL


@pytest.mark.parametrize('change', [dict(status='banana'), dict(step=7), dict(seconds=-1), 'another run',
                                    'not stamped'])
def test_a_made_up_result_is_not_believed(change, whole, tmp_path):
    run = shutil.copytree(whole.folder, tmp_path / 'run')
    path = run / 'result.json'
    result = json.loads(path.read_text(encoding='utf-8'))
    if isinstance(change, dict): result = stamp(result | change)
    elif change == 'another run': result = stamp(result | dict(run='0' * 16))
    else: del result['checksum']
    path.write_text(json.dumps(result), encoding='utf-8')
    with pytest.raises(Damaged): load_result(run)
    again, said = said_by(lambda: quiet(run))
    assert same_run(again, whole) and 'computed again' in said and (run / 'result.json.damaged').exists()


# ---------------------------------------------------------------- the log

def cut_line(lines): lines[2] = lines[2][:30]
def alter_digit(lines): lines[2] = lines[2].replace('"lr": 0.', '"lr": 1.')
def drop_line(lines): del lines[2]
def foreign_line(lines): lines[2] = json.dumps(stamp(json.loads(lines[2]) | dict(run='0' * 16)))


@pytest.mark.parametrize('harm', [cut_line, alter_digit, drop_line, foreign_line])
def test_a_damaged_line_in_the_log_is_named_and_the_rest_is_kept(harm, whole, stopped):
    log = stopped / 'log.jsonl'                    # checkpoints at 10 and 13, records 1, 3, 6, 9, 12
    lines = log.read_text(encoding='utf-8').splitlines()
    harm(lines)
    log.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    result, said = said_by(lambda: quiet(stopped))
    assert 'steps 6 are lost' in said and result.status == 'finished'
    assert numbers(result.log) == [r for r in numbers(whole.log) if r['step'] != 6]
    assert (stopped / 'log.jsonl.damaged').read_text(encoding='utf-8').splitlines() == lines
    assert said_by(lambda: load_result(stopped))[1] == ''       # said once


def test_a_record_is_computed_again_where_an_older_checkpoint_allows_it(whole, stopped):
    log = stopped / 'log.jsonl'
    lines = log.read_text(encoding='utf-8').splitlines()
    # step 12 lies between both checkpoints
    log.write_text('\n'.join(lines[:-1] + ['garbage', '']), encoding='utf-8')
    result, said = said_by(lambda: quiet(stopped))
    assert same_run(result, whole) and 'goes on after step 10' in said


@pytest.mark.parametrize('harm', [remove, as_folder, lambda path: path.write_bytes(b'\xff\xfe\x00')])
def test_a_log_that_is_gone_is_said_and_the_run_goes_on(harm, whole, stopped):
    harm(stopped / 'log.jsonl')
    result, said = said_by(lambda: quiet(stopped))
    assert 'log.jsonl' in said and 'lost' in said
    assert numbers(result.log) == [r for r in numbers(whole.log) if r['step'] > 10]


def test_a_log_altered_after_the_end_is_noticed(whole, tmp_path):
    run = shutil.copytree(whole.folder, tmp_path / 'run')
    (run / 'log.jsonl').write_bytes((run / 'log.jsonl').read_bytes().split(b'\n', 1)[1])
    with pytest.raises(Damaged, match='log.jsonl'): load_result(run)


@pytest.mark.parametrize('harm, steps', [(lambda log: log.unlink(), '1, 3'),
                                         (lambda log: log.write_text('', encoding='utf-8'), '1, 3'),
                                         (lambda log: log.write_text(
                                             ''.join(log.read_text(encoding='utf-8').splitlines(True)[:-1]),
                                             encoding='utf-8'), '18')])
def test_records_that_vanish_while_a_run_goes_on_are_told_at_its_end(harm, steps, whole, tmp_path):
    result, said = said_by(lambda: quiet(tmp_path, ToyCorpus(19, lambda: harm(tmp_path / 'log.jsonl'))))
    assert (f"{tmp_path / 'log.jsonl'} lacks the records of steps {steps}" in said
            and result.status == 'finished')
    kept = {r['step'] for r in result.log}
    assert ({21, 24, 27, 30} <= kept
            and numbers(result.log) == [r for r in numbers(whole.log) if r['step'] in kept])


# ---------------------------------------------------------------- the folder, links and the disk

@pytest.mark.parametrize('name', ['checkpoints', 'model', 'log.jsonl', 'result.json', 'config.json'])
@pytest.mark.parametrize('resume', [True, False])
def test_a_link_is_refused_before_anything_is_erased(name, resume, whole, tmp_path):
    run = shutil.copytree(whole.folder, tmp_path / 'run')
    shutil.move(run / name, tmp_path / name)
    (run / name).symlink_to(tmp_path / name)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(run / name))): quiet(run, resume=resume)
    assert contents(tmp_path) == before


@pytest.mark.parametrize('name', ['checkpoints', 'model'])
def test_a_file_in_a_folders_place_is_set_aside(name, whole, stopped):
    run = stopped
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).write_text('mine', encoding='utf-8')
    result, said = said_by(lambda: quiet(run, config=CONFIG.replace(checkpoint_every=4)))
    assert str(run / name) in said and result.status == 'finished'
    assert (run / f'{name}.damaged').read_text(encoding='utf-8') == 'mine'


def test_a_full_disk_is_named_and_the_run_goes_on(whole, tmp_path):
    import resource
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))             # a checkpoint is larger
    try:
        with pytest.raises(OSError, match='step-00000005.* train again') as error: quiet(tmp_path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / 'checkpoints') in str(error.value) and not list(tmp_path.rglob('*.draft'))
    assert same_run(quiet(tmp_path), whole)


# ---------------------------------------------------------------- surroundings

@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try: yield
    finally: torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('surroundings', [
    lambda: torch.set_grad_enabled(False), torch.inference_mode,
    lambda: torch.autocast('cpu', torch.bfloat16),
    lambda: default_dtype(torch.float64), lambda: default_dtype(torch.bfloat16),
    lambda: torch.device('meta')])
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_the_callers_settings_do_not_matter(surroundings, precision, tmp_path):
    config = CONFIG.replace(steps=6, precision=precision)
    corpus = ToyCorpus()
    alone = quiet(tmp_path / 'alone', corpus, config=config)
    def settings():
        return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled('cpu'),
                torch.get_default_dtype(), torch.get_default_device())
    with surroundings():
        before = settings()
        result, loaded = quiet(tmp_path / 'there', corpus, config=config), load_result(tmp_path / 'there')
        assert settings() == before
    assert (same_run(result, alone) and same_run(loaded, alone)
            and all(p.requires_grad for p in result.model.parameters()))


@pytest.mark.parametrize('variables', [dict(ACCELERATE_GRADIENT_ACCUMULATION_STEPS='4'),
                                       dict(ACCELERATE_MIXED_PRECISION='bf16'),
                                       dict(ACCELERATE_DYNAMO_BACKEND='EAGER')])
def test_accelerates_variables_do_not_matter(variables, whole, tmp_path, monkeypatch):
    for name, value in variables.items(): monkeypatch.setenv(name, value)
    assert same_run(quiet(tmp_path), whole)


def test_accelerates_own_state_is_neither_used_nor_changed(whole, tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(mixed_precision='bf16', gradient_accumulation_steps=3)
        assert same_run(quiet(tmp_path), whole)
        assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == ('bf16', 3)
    finally:
        AcceleratorState._reset_state()
        GradientState._reset_state()


def test_training_computes_nothing_in_fp64(tmp_path):
    class NoDoubles(TorchDispatchMode):  # as on Apple's GPU, which has none
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.float64
                           for x in tree_leaves(out)), function
            return out
    with NoDoubles():
        result = quiet(tmp_path, model=MIXTURE, config=CONFIG.replace(steps=6))
        evaluate(result.model, ToyCorpus().batch(0, 4, 16, 0))


@pytest.mark.parametrize('name', ['ACCELERATE_USE_FSDP', 'ACCELERATE_USE_DEEPSPEED'])
def test_divided_models_are_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.setenv(name, 'true')
    with pytest.raises(ValueError, match=name): quiet(tmp_path)


@pytest.mark.parametrize('more', [{}, dict(RANK='1'), dict(RANK='0', LOCAL_RANK='0')])
def test_a_process_that_finds_no_others_says_so(more, tmp_path, monkeypatch):
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    for name, value in (dict(WORLD_SIZE='2') | more).items(): monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match='WORLD_SIZE=2.*torchrun'): quiet(tmp_path)
    assert not list(tmp_path.iterdir())


def test_processes_that_were_not_started_by_a_launcher_say_what_would_do(tmp_path, monkeypatch):
    "Something else, such as MPI, made a world of two, and WORLD_SIZE does not say so."
    import sparsecod.train as module
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    monkeypatch.setattr(module, 'PartialState', lambda **options: SimpleNamespace(num_processes=2))
    with pytest.raises(RuntimeError, match='WORLD_SIZE=1.*one of 2.*torchrun'): quiet(tmp_path)


def test_zero_is_the_same_number_as_a_fraction(tmp_path):
    quiet(tmp_path, config=CONFIG.replace(weight_decay=0))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = quiet(tmp_path, config=CONFIG.replace(weight_decay=0.0))
    assert again.status == 'finished' and again.log


def test_a_label_without_checksum_beside_a_sealed_model_is_damaged(whole, tmp_path):
    quiet(tmp_path)
    label = json.loads((tmp_path / 'config.json').read_text(encoding='utf-8'))
    del label['checksum']
    (tmp_path / 'config.json').write_text(json.dumps(label), encoding='utf-8')
    with pytest.raises(Damaged, match='config.json'): load_result(tmp_path)
