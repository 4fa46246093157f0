"""Does everything compute on a GPU what it computes on a CPU? Numbers for each thing that a CPU cannot
show: device_tests.json.

    python benchmarks/gpu/01_device_tests.py [--scale tiny --device cpu] [--out DIR]

Each check is a function below; its part of the file holds what it found, and `ok` where there is a bar.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, Results, base_config, begin, left

a = begin(__doc__)

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsecod.compilation import CompiledLoss, plain_execution, use_compiler_cache
from sparsecod.core import ModelConfig, Transformer
from sparsecod.data import Corpus, prepare
from sparsecod.moe import experts_compiled, experts_loop, route, run_experts
from sparsecod.scores import ScoreConfig, needed_bytes, score_model
from sparsecod.train import (StreamWatch, TrainConfig, find_world, make_optimizer,
                             start_run, _step_windows, train, training_step)

DEVICE, GPU = torch.device(a.device), a.device == 'cuda'
KINDS = dict(dense={}, shared_heads=dict(n_kv_heads=2), mixture=dict(n_experts=4),
             shared_expert=dict(n_experts=4, d_shared_expert=64), peri_ln=dict(norm='peri_ln'),
             scaled=dict(norm='layernorm_scaling'), tied=dict(tie_embeddings=True))
SMALL = ModelConfig(vocab_size=512, n_layers=4, d_model=64, n_heads=4, context_length=64)


def largest(found, wanted) -> float:
    "The largest difference, relative to the largest wanted number."
    found, wanted = (x.detach().cpu().double() for x in (found, wanted))
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)).item()


def models(**changes):
    "The same seeded model on the CPU and on the device, with the same windows."
    torch.manual_seed(0)
    config = SMALL.replace(init_std=.1, **changes)
    here, windows = Transformer(config), torch.randint(512, (8, 65))
    there = Transformer(config)
    there.load_state_dict(here.state_dict())
    return here, there.to(DEVICE), windows


def losses_and_gradients() -> dict:
    "Loss and gradients in fp32, of every kind of model."
    found = {}
    for kind, changes in KINDS.items():
        here, there, windows = models(**changes)
        pair = [m(w[:, :-1], targets=w[:, 1:]) for m, w in ((here, windows), (there, windows.to(DEVICE)))]
        for loss in pair: loss.backward()
        found[kind] = dict(loss=largest(pair[1], pair[0]),
                           gradients=max(largest(q.grad, p.grad)
                                         for p, q in zip(here.parameters(), there.parameters())))
    return dict(kinds=found, ok=max(max(x.values()) for x in found.values()) < 1e-4)


def attention_kernels() -> dict:
    """Which kernels of attention take fp32 and bf16, shared heads and odd widths, and how far they are from
    the plain formula."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for D_h, K in ((64, 4), (64, 2), (20, 4)):
            q, k, v = (torch.randn(2, H, 96, D_h, device=DEVICE, dtype=dtype, requires_grad=True)
                       for H in (4, K, K))
            wanted = functional.scaled_dot_product_attention(*(x.detach().cpu().double() for x in (q, k, v)),
                                                             is_causal=True, enable_gqa=K < 4)
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                            SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
                name = f'{backend.name} {dtype} D_h={D_h} K={K}'
                try:
                    with sdpa_kernel(backend):
                        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                                      enable_gqa=K < 4)
                    # as the Jacobians ask
                    first, second = (torch.autograd.grad(out.sum(), q, retain_graph=True)[0]
                                     for _ in range(2))
                    found[name] = dict(error=largest(out, wanted), repeatable=torch.equal(first, second))
                except Exception as error: found[name] = dict(refused=str(error).splitlines()[0][:120])
    return dict(kernels=found)


def experts() -> dict:
    "The experts of a mixture, plain and compiled, in fp32 and bf16, one of them without a token."
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        x, logits = torch.randn(200, 64, device=DEVICE, dtype=dtype), torch.randn(200, 8, device=DEVICE)
        logits[:, 3] = -30.
        ws = [(.1 * torch.randn(*s, device=DEVICE)).requires_grad_()
              for s in ((8, 64, 48), (8, 64, 48), (8, 48, 64))]
        ways = dict(loop=experts_loop, plain=run_experts,
                    compiled=torch.compile(experts_compiled, fullgraph=True, dynamic=False,
                                           backend='inductor' if GPU else 'eager'))
        outs = {}
        for way, run in ways.items():
            out = run(x, route(logits, 2), *ws)
            outs[way] = [out, *torch.autograd.grad(out.float().square().sum(), ws)]
        found[str(dtype)] = {way: max(largest(y, z) for y, z in zip(outs[way], outs['loop']))
                             for way in ('plain', 'compiled')}
    return dict(differences=found, ok=max(found['torch.float32'].values()) < 1e-4
                and max(found['torch.bfloat16'].values()) < .05)


def compiled_step() -> dict:
    """Compiled loss and gradients against plain ones, fp32; and how many graphs two equal micro-batches and
    a shorter one take."""
    found = {}
    for kind in ('dense', 'mixture') if GPU else ('dense',):
        _, model, windows = models(**KINDS[kind])
        loss, w = CompiledLoss(model), windows.to(DEVICE)
        if not GPU:
            loss.stream, loss.losses_of = (torch.compile(f, backend='eager', dynamic=False)
                                           for f in (loss.last_stream,
                                                     loss.losses_of._torchdynamo_orig_callable))
        gradients = []
        for f in (model, loss):
            f(w[:, :-1], targets=w[:, 1:], watch=StreamWatch(model.config, DEVICE)).backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
            model.zero_grad()
        before = torch._dynamo.utils.counters['stats']['unique_graphs']
        for part in (w, w, w[:5]):
            loss(part[:, :-1], targets=part[:, 1:], watch=StreamWatch(model.config, DEVICE))
        found[kind] = dict(gradients=max(map(largest, gradients[1], gradients[0])),
                           new_graphs=torch._dynamo.utils.counters['stats']['unique_graphs'] - before)
    return dict(kinds=found, ok=all(x['gradients'] < 1e-4 for x in found.values()))


def scores_on_both() -> dict:
    "Scores of device and CPU; those of the device also with TF32 allowed, which must change nothing."
    config, found, times = ScoreConfig(n_sequences=4, n_fit=8, n_jacobian=2, n_bootstrap=50), {}, {}
    for kind in ('dense', 'mixture'):
        here, there, windows = models(**KINDS[kind])
        extra, scores = torch.randint(512, (8, 65)), []
        for model in (here, there, there):
            start = time.perf_counter()
            if len(scores) == 2: torch.set_float32_matmul_precision('high')
            try: scores.append(score_model(model, windows[:4], extra, config, progress=False))
            finally: torch.set_float32_matmul_precision('highest')
            times[f'{kind} {len(scores)}'] = round(time.perf_counter() - start, 2)
        def apart(x, y):
            if isinstance(x, list): return max(map(apart, x, y), default=0.)
            return 0. if x is None or y is None else abs(x - y) / max(1., abs(x))
        found[kind] = {name: max(apart(one['arrays'][k], two['arrays'][k]) for k in one['arrays'])
                       for name, one, two in
                       (('device', scores[0], scores[1]), ('tf32 allowed', scores[1], scores[2]))}
    return dict(kinds=found, scoring_seconds=times,
                ok=all(x['device'] < 1e-4 and x['tf32 allowed'] < 1e-5 for x in found.values()))


class Stopping:
    "A corpus that interrupts the training at one step."
    def __init__(self, corpus, step):
        self.corpus, self.at, self.fingerprint, self.vocab_size = (corpus, step, corpus.fingerprint,
                                                                   corpus.vocab_size)
    def batch(self, step, *rest):
        if step == self.at: os.kill(os.getpid(), signal.SIGINT)
        return self.corpus.batch(step, *rest)


def resumed() -> dict:
    """Three trainings: undisturbed, the same again, and one that is interrupted and goes on. On a GPU they
    may differ; by how much?"""
    corpus, found = Corpus.from_texts([f'{i} is followed by {i + 1}, and {i + 1} by {i + 2}.'
                                       for i in range(400)]), {}
    for name, how in dict(fp32=dict(precision='fp32', compile='off'),
                          bf16=dict(precision='bf16', compile='off'),
                          compiled=dict(precision='bf16', compile='on')).items():
        if name == 'compiled' and not GPU: continue
        config = TrainConfig(steps=20, tokens_per_step=1024, lr=1e-2, log_every=5, **how)
        model, results = SMALL.replace(vocab_size=corpus.vocab_size, n_layers=2), []
        with tempfile.TemporaryDirectory() as folder:
            for i in range(2):
                results.append(train(model, config, corpus, f'{folder}/{i}', progress=False).model)
            train(model, config, Stopping(corpus, 9), f'{folder}/2', progress=False)
            results.append(train(model, config, corpus, f'{folder}/2', progress=False).model)
        first, again, resumed = (torch.cat([p.detach().flatten().cpu() for p in m.parameters()])
                                 for m in results)
        found[name] = dict(again=largest(again, first), resumed=largest(resumed, first))
    return dict(kinds=found, ok=all(x['resumed'] <= max(1e-3, 3 * x['again']) for x in found.values()))


def fused_update() -> dict:
    "Three fused AdamW updates on the device against those of the CPU."
    here, there, windows = models()
    for model, w in ((here, windows), (there, windows.to(DEVICE))):
        optimizer = make_optimizer(model, TrainConfig(steps=3))
        for _ in range(3):
            model(w[:, :-1], targets=w[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
    apart = max(largest(q, p) for p, q in zip(here.parameters(), there.parameters()))
    return dict(fused=[g['fused'] for g in optimizer.param_groups], difference=apart, ok=apart < 1e-2)


def corpus_of_the_studies() -> dict:
    "Prepare the corpus of the next commands."
    corpus = prepare(base_config(a.scale).data, progress=False)
    return dict(tokens=len(corpus.tokens('train')), vocab=corpus.vocab_size, fingerprint=corpus.fingerprint)


def waiting_for_batches() -> dict:
    "The share of a step that goes by until its windows are on the device."
    base = base_config(a.scale)
    corpus = prepare(base.data, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        run = start_run(base.model.replace(vocab_size=corpus.vocab_size, n_layers=4),
                        base.train.replace(compile='off'), corpus, Path(folder), find_world())
        run.execution = plain_execution(run.config.precision, run.world.device)
        wait = torch.cuda.synchronize if GPU else lambda: None
        took = dict(batch=[], step=[])
        for run.step in range(6):
            start = time.perf_counter()
            _step_windows(run), wait()
            middle = time.perf_counter()
            training_step(run), wait()
            took['batch'].append(middle - start), took['step'].append(time.perf_counter() - middle)
    batch, step = (sorted(times)[2] for times in took.values())
    return dict(batch_seconds=batch, step_seconds=step, share=batch / step)


def memory_of_scoring() -> dict:
    "What scoring takes on the card, against the bound that it plans with."
    if not GPU: return dict(skipped='no card')
    model = Transformer(base_config(a.scale).model.replace(n_layers=8)).to(DEVICE)
    T, N = model.config.context_length, 16
    windows, config = torch.randint(512, (N + 8, T + 1)), ScoreConfig(n_sequences=N, n_fit=8, n_jacobian=1)
    base, bound = torch.cuda.memory_allocated(), needed_bytes(model, config.batch_size, N, T, n_jacobian=1)
    torch.cuda.reset_peak_memory_stats()
    score_model(model, windows[:N], windows[N:], config, progress=False)
    used = torch.cuda.max_memory_allocated() - base
    return dict(used=used, bound=bound, ok=used <= bound)


def readme_example() -> dict:
    "The example of README.md, in a process of its own."
    example = re.findall(r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(encoding='utf-8'),
                         flags=re.M | re.S)[0]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, '-c', example], cwd=folder, capture_output=True, text=True,
                              timeout=max(30, left(a)), encoding='utf-8',
                              env=os.environ | dict(PYTHONPATH=str(ROOT)))
    return dict(ok=done.returncode == 0, output=done.stdout[-500:], errors=done.stderr[-1500:])


def widget_training() -> dict:
    "One training through the logic of the widget, in its thread."
    from sparsecod.bench import Training, run_cost, variants
    config = base_config('tiny')
    training, cost = Training(variants(config, 'one run')), run_cost(config)
    training.start()
    training.join()
    if training.error: raise training.error
    run = training.runs[0]
    return dict(ok=training.state == 'finished', on=str(next(run.model.parameters()).device), told=str(cost),
                training_seconds=run.seconds)


def tests_of_the_suite() -> dict:
    "The tests of model, experts and training, with this device allowed."
    tests = (['tests/test_moe.py', 'tests/test_core.py', 'tests/test_train.py'] if a.scale == 'gpu'
             else ['tests/test_moe.py::test_rows_of_each_expert_end_where_the_counts_say'])
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *tests], cwd=ROOT,
                          capture_output=True, text=True, timeout=max(30, left(a) - 20),
                          encoding='utf-8',
                          env=os.environ | dict(ACCELERATE_USE_CPU='true' if a.device == 'cpu' else 'false',
                                                PYTHONPATH=str(ROOT)))
    return dict(ok=done.returncode == 0, output=done.stdout[-6000:])


if __name__ == '__main__':
    use_compiler_cache()
    results = Results(a, 'device_tests')
    results.facts |= dict(c_compiler=shutil.which('gcc') or shutil.which('cc'),
                          bf16=GPU and torch.cuda.is_bf16_supported(including_emulation=False))
    for check in (losses_and_gradients, attention_kernels, experts, compiled_step, scores_on_both, resumed,
                  fused_update, corpus_of_the_studies,
                  waiting_for_batches, memory_of_scoring, readme_example, widget_training,
                  tests_of_the_suite):
        results.part(check.__name__, check)
    print('not ok:', [name for name, part in results.parts.items() if part.get('ok') is False] or 'nothing')
    raise SystemExit(results.end())
