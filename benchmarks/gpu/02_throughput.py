"""Tokens a second and the share of the card's peak that they use, dense and mixture, against transformers'
Llama: throughput.json.

    python benchmarks/gpu/02_throughput.py [--scale tiny --device cpu] [--out DIR]

Steps of all kinds take turns and medians count, as in benchmarks/train_step.py. The bars: 35 % of the peak
at D = 512, 50 % at D = 1024; a mixture's step at most 1.3 times the dense one; never slower than Llama
compiled. The profile says what limits a step. """
import statistics
import time

from common import Results, begin

a = begin(__doc__)

import torch
from torch.profiler import ProfilerActivity, profile
from train_step import make_step

from sparsecod.compilation import use_compiler_cache
from sparsecod.core import ModelConfig, flops_per_token, param_counts
from sparsecod.resources import CARDS

SIZES = dict(gpu={'D=512': dict(n_layers=8, d_model=512, n_heads=8, context_length=1024),
                  'D=1024': dict(n_layers=8, d_model=1024, n_heads=16, context_length=1024)},
             tiny={'D=32': dict(n_layers=1, d_model=32, n_heads=2, context_length=32)})
BARS = {'D=512': .35, 'D=1024': .5}
TOKENS, ROUNDS, VOCAB = dict(gpu=2 ** 15, tiny=128), dict(gpu=12, tiny=2), dict(gpu=16384, tiny=512)
WAYS = {'dense compiled': ('ours', 'bf16', 'compiled'), 'mixture compiled': ('ours', 'bf16', 'compiled'),
        'llama compiled': ('llama', 'bf16', 'compiled'),
        'dense eager': ('ours', 'bf16', 'eager'), 'llama eager': ('llama', 'bf16', 'eager'),
        'dense fp32': ('ours', 'fp32', 'eager')}
# compiling takes minutes on a CPU
if a.scale == 'tiny':
    WAYS = {way: how for way, how in WAYS.items() if way in ('dense compiled', 'dense eager', 'llama eager')}


def peak() -> float | None:
    "Operations a second that the card's maker states for bf16."
    name = torch.cuda.get_device_name() if a.device == 'cuda' else ''
    return next((card.bf16 for short, card in CARDS.items() if short in name.replace(' ', '')), None)


def busiest(step, windows, n: int = 12) -> list:
    "Where the time of three steps goes: kernels with their share, the largest first."
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (a.device == 'cuda')
    with profile(activities=kinds) as found:
        for _ in range(3): step(windows)
    time_of = ((lambda e: e.self_device_time_total) if a.device == 'cuda'
               else (lambda e: e.self_cpu_time_total))
    events = sorted(found.key_averages(), key=time_of, reverse=True)
    total = sum(map(time_of, events)) or 1
    return [[e.key[:120], round(time_of(e) / total, 4), e.count] for e in events[:n]]


def compare(size: str) -> dict:
    "Every way to do a step at one size."
    dense = ModelConfig(vocab_size=VOCAB[a.scale], **SIZES[a.scale][size])
    mixture, T, tokens = (dense.replace(n_experts=8, experts_per_token=2), dense.context_length,
                          TOKENS[a.scale])
    windows = torch.randint(dense.vocab_size, (tokens // T, T + 1), device=a.device)
    steps, cold, memory, failed = {}, {}, {}, {}
    for way, how in WAYS.items():
        start = time.perf_counter()
        if a.device == 'cuda': torch.cuda.reset_peak_memory_stats()
        try:
            step = make_step(mixture if 'mixture' in way else dense, *how, a.device)
            for _ in range(3): step(windows)
        except Exception as error:                              # the others can still be measured
            failed[way] = f'{type(error).__name__}: {error}'[:1000]
            continue
        steps[way] = step
        cold[way], memory[way] = time.perf_counter() - start, torch.cuda.max_memory_allocated() if a.device == 'cuda' else None
    seconds = {way: [] for way in steps}
    for _ in range(ROUNDS[a.scale]):
        for way, step in steps.items():
            start = time.perf_counter()
            step(windows)                                       # reads its loss, and so waits for the card
            seconds[way].append(time.perf_counter() - start)
    found = {}
    for way, s in seconds.items():
        speed, config = tokens / statistics.median(s), mixture if 'mixture' in way else dense
        found[way] = dict(tokens_per_s=speed, step_seconds=statistics.median(s),
                          quartiles=statistics.quantiles(s, n=4), first_steps_seconds=cold[way],
                          peak_memory=memory[way],
                          parameters=param_counts(config)['total'],
                          utilisation=speed * flops_per_token(config) / peak() if peak() else None)
    best = found['dense compiled']
    return dict(model=dense.to_dict(), tokens=tokens, ways=found, failed=failed, bar=BARS.get(size),
                utilisation=best['utilisation'],
                mixture_times_dense=found['mixture compiled']['step_seconds'] / best['step_seconds']
                if 'mixture compiled' in found else None,
                times_llama=best['tokens_per_s'] / max(v['tokens_per_s'] for way, v in found.items()
                                                       if 'llama' in way),
                profile=busiest(steps['dense compiled'], windows),
                profile_mixture=busiest(steps['mixture compiled'], windows) if 'mixture compiled' in steps
                else None)


if __name__ == '__main__':
    use_compiler_cache()
    results = Results(a, 'throughput')
    for size in SIZES[a.scale]: results.part(size, lambda: compare(size), 60 if a.scale == 'gpu' else 1)
    raise SystemExit(results.end())
