"""How much time and memory does `score_model` save over the obvious procedure?

    python benchmarks/score_model.py [--layers 16] [--d-model 256] [--sequences 3] [--out results/benchmarks/score_model.json]

The obvious procedure edits the list of blocks and runs a full forward pass for every intervention, collects
streams with output hooks, fits affine maps by least squares on stored streams, makes D backward passes a
block one at a time, and computes all logits at once. Both score the same random model on the same
sequences, one process after the other; the numbers must agree. Ours runs twice: with exact Jacobians, and
with probes. Peak memory is the high-water mark of the process minus the one before scoring. """
import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import sparsecod.scores as scores
from sparsecod.core import BlockOutput, ModelConfig, Transformer
from sparsecod.integrity import stamp, write_text
from sparsecod.studies import hardware

SIZES = dict(layers=16, d_model=256, heads=4, vocab=1024, context=128, sequences=3, fit=32, jacobians=3,
             probes=32, memory_mb=80, threads=1)
TASKS = dict(obvious='obvious procedure', exact='score_model, exact Jacobians',
             probes='score_model, {probes} probes')
PARTS = dict(maps='affine fits', batch='interventions and variance', jacobian='Jacobians')


# --- the obvious procedure

class Update(nn.Module):
    "A block with another update."
    def __init__(self, update):
        super().__init__()
        self.update = update

    def forward(self, h, rope):
        u = self.update(h)
        return BlockOutput(h + u, u, torch.zeros_like(u))


class PartlySkipped(nn.Module):
    "A block that is skipped at positions before the middle."
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, h, rope):
        out = self.block(h, rope)
        u = out.update.clone()
        u[:, :h.shape[1] // 2] = 0
        return BlockOutput(h + u, u, torch.zeros_like(u))


@torch.no_grad()
def forward(model, windows, changes={}):
    "Streams, updates and loss of a full forward pass with some blocks (1-based) changed."
    blocks, streams, updates = list(model.blocks), [], []
    for l, block in changes.items(): model.blocks[l - 1] = block
    def keep(block, args, out):
        streams.append(out.stream)
        updates.append(out.update)
    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    hooks.append(model.embedding.register_forward_hook(lambda module, args, out: streams.append(out)))
    logits = model(windows[:, :-1])
    for hook in hooks: hook.remove()
    for l, block in enumerate(blocks): model.blocks[l] = block
    return streams, updates, functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


def replaced_losses(model, windows, fit):
    """Loss with each block in turn replaced by its affine map, from least squares on stored streams;
    seconds for the fits."""
    start = time.perf_counter()
    streams, updates, _ = forward(model, fit)
    maps = []
    for h, u in zip(streams, updates):
        x = functional.pad(h.flatten(0, 1), (0, 1), value=1).double()                  # a last column of ones
        maps.append(torch.linalg.lstsq(x, u.flatten(0, 1).double()).solution.float())
    seconds = time.perf_counter() - start
    return [forward(model, windows, {l: Update(lambda h, A=A: h @ A[:-1] + A[-1])})[2]
            for l, A in enumerate(maps, 1)], seconds


def interventions(model, windows, found):
    "Causal scores in both conventions, skip and swap losses."
    L, middle = len(model.blocks), (windows.shape[1] - 1) // 2
    _, updates, loss = forward(model, windows)
    size = [u.norm(dim=-1) for u in updates]
    for s in range(1, L + 1):
        _, skipped, without = forward(model, windows, {s: Update(torch.zeros_like)})
        found['skip_loss_increase'].append(without - loss)
        found['causal'].append([((v - u).norm(dim=-1).sum() / n.sum()).item() if l > s else None
                                for l, (u, v, n) in enumerate(zip(updates, skipped, size), 1)])
        _, partly, _ = forward(model, windows, {s: PartlySkipped(model.blocks[s - 1])})
        found['causal_max'].append([((v - u).norm(dim=-1) / n)[:, middle:].amax(1).mean().item() if l > s
                                    else None
                                    for l, (u, v, n) in enumerate(zip(updates, partly, size), 1)])
    found['permutation'] = [[None] * L for _ in range(L)]
    for i in range(1, L + 1):
        for j in range(i + 1, L + 1):
            swapped = forward(model, windows, {i: model.blocks[j - 1], j: model.blocks[i - 1]})[2]
            found['permutation'][i - 1][j - 1] = found['permutation'][j - 1][i - 1] = abs(
                swapped - loss) / loss


def jacobians(model, windows, found):
    "Deviation of Jacobians from the identity, one channel after the other."
    streams, D = forward(model, windows)[0], model.config.d_model
    for l in range(1, len(model.blocks) + 1):
        averages, per_token = [], []
        for h in streams[l - 1]:
            x = h[None].clone().requires_grad_()
            y = model.run(x, start=l - 1, stop=l)
            rows = [torch.autograd.grad(y[..., k].sum(), x, retain_graph=True)[0][0] for k in range(D)]
            J = torch.stack(rows, 1) - torch.eye(D, device=x.device)  # (T, D, D)
            averages.append(J.mean(0) / D)
            per_token.append(J.norm(dim=(1, 2)).mean() / D)
        found['jacobian_published'].append(torch.stack(averages).mean(0).norm().item())
        found['jacobian_per_sequence'].append(torch.stack([A.norm() for A in averages]).mean().item())
        found['jacobian_per_token'].append(torch.stack(per_token).mean().item())


def obvious(model, windows, fit, n_jacobian):
    "Arrays as in `score_model`, and seconds by part."
    found = {name: [] for name in ('causal', 'causal_max', 'skip_loss_increase', 'jacobian_published',
                                   'jacobian_per_sequence', 'jacobian_per_token')}
    start = time.perf_counter()
    streams, _, loss = forward(model, windows)
    variance = [h.double().var(-1) for h in streams]
    found['variance_mean'] = [v.mean().item() for v in variance]
    found['variance_median'] = [v.median().item() for v in variance]
    interventions(model, windows, found)
    losses, fitting = replaced_losses(model, windows, fit)
    found |= dict(usefulness_ratio=[x / loss for x in losses],
                  linear_loss_increase=[x - loss for x in losses])
    middle = time.perf_counter()
    jacobians(model, windows[:n_jacobian], found)
    return found, dict(maps=fitting, batch=middle - start - fitting, jacobian=time.perf_counter() - middle)


# --- one process

class TimedParts(scores.Parts):
    "Keeps nothing on disk, but the seconds that each part takes."
    seconds = dict.fromkeys(PARTS, 0.0)

    def get(self, name, make):
        start = time.perf_counter()
        found = super().get(name, make)
        self.seconds[name.split('-')[0]] += time.perf_counter() - start
        return found


def setup(a):
    "The model and the sequences, the same in every process."
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=a.vocab, n_layers=a.layers, d_model=a.d_model, n_heads=a.heads,
                         context_length=a.context, init_std=0.05)
    model = Transformer(config).eval().requires_grad_(False)
    windows = torch.randint(a.vocab, (a.sequences + a.fit, a.context + 1))
    model, windows = model.to(a.device), windows.to(a.device)
    return model, windows[:a.sequences], windows[a.sequences:]


def peak_memory(device):
    "High-water mark in bytes: of the process, or of what it has allocated on a graphics card."
    if device.startswith('cuda'): return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == 'Darwin' else 1024)


def run_task(a):
    "Score in this process; arrays, seconds and peak memory as JSON."
    model, windows, fit = setup(a)
    forward(model, windows[:1])                                                        # loads kernels
    base, start = peak_memory(a.device), time.perf_counter()
    if a.task == 'obvious': arrays, parts = obvious(model, windows, fit, a.jacobians)
    else:
        scores.Parts = TimedParts
        config = scores.ScoreConfig(n_sequences=a.sequences, n_fit=a.fit, n_jacobian=a.jacobians,
                                    jacobian_probes=a.probes if a.task == 'probes' else 0)
        arrays, parts = scores.score_model(model, windows, fit, config, progress=False,
                                           memory=a.memory_mb * 2 ** 20)['arrays'], TimedParts.seconds
    seconds, peak = time.perf_counter() - start, peak_memory(a.device)
    return dict(arrays=arrays, seconds=seconds, parts=parts, peak_bytes=peak - base, base_bytes=base)


# --- all processes

def numbers(x):
    "Nested lists as a tensor, None as NaN."
    return torch.tensor([[float('nan') if v is None else v for v in (row if isinstance(row, list) else [row])]
                         for row in x], dtype=torch.float64)


def compare(ours, theirs):
    "Raise an AssertionError unless the numbers agree; the largest differences by array."
    worst = {}
    for name, values in theirs['arrays'].items():
        x, y, error = numbers(ours['arrays'][name]), numbers(values), ours['arrays'].get(f'{name}_error')
        assert x.shape == y.shape and torch.equal(x.isnan(), y.isnan()), name
        small = 2e-5 if 'loss' in name or name == 'permutation' else 0.0  # differences of losses are rounded
        allowed = 5 * numbers(error) if error else 1e-3 * y.abs() + small
        difference = (x - y).abs()
        assert ((difference <= allowed) | x.isnan()).all(), f'{name}: {difference.nan_to_num().max()}'
        worst[name] = difference.nan_to_num().max().item()
    return worst


def in_process(a, task):
    "Run a task in a process of its own."
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / 'found.json'
        sizes = [x for name in SIZES for x in (f"--{name.replace('_', '-')}", str(getattr(a, name)))]
        subprocess.run([sys.executable, __file__, *sizes, '--device', a.device, '--task', task, '--out',
                        str(target)], check=True,
                       env=os.environ | {'OMP_NUM_THREADS': str(a.threads)})
        return json.loads(target.read_text(encoding='utf-8'))


def commit():
    "The commit that was run, with a mark if files differ from it."
    ask = lambda *args: subprocess.run(['git', *args], cwd=Path(__file__).parent, capture_output=True,
                                       text=True, encoding='utf-8').stdout.strip()
    return ((ask('rev-parse', 'HEAD') or 'unknown')
            + (' with changes' if ask('status', '--porcelain', '--', '..') else ''))


def processor():
    "The name of the processor, as in records of runs."
    return hardware(torch.device('cpu'))


def show(results, a):
    "Time and memory side by side."
    base = results['obvious']
    print(f"{'':32s} {'seconds':>8s} {'ratio':>6s} {'peak MiB':>9s} {'ratio':>6s}   seconds by part: "
          f"{', '.join(PARTS.values())}")
    for task, r in results.items():
        parts = '  '.join(f'{r["parts"][name]:7.1f}' for name in PARTS)
        print(f"{TASKS[task].format(probes=a.probes):32s} {r['seconds']:8.1f} "
              f"{base['seconds'] / r['seconds']:6.2f} "
              f"{r['peak_bytes'] / 2 ** 20:9.1f} {base['peak_bytes'] / r['peak_bytes']:6.2f}   {parts}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default,
                            help=f'default {default}')
    parser.add_argument('--device', default='cpu', help='default cpu')
    parser.add_argument('--no-exact', action='store_true', help='leave out score_model with exact Jacobians')
    parser.add_argument('--out', type=Path, help='where to write the results, as JSON')
    parser.add_argument('--task', choices=TASKS, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.task:
        a.out.write_text(json.dumps(run_task(a)), encoding='utf-8')
        return
    results = {task: in_process(a, task) for task in TASKS if not (task == 'exact' and a.no_exact)}
    differences = {task: compare(results[task], results['obvious']) for task in results if task != 'obvious'}
    show(results, a)
    base = results['obvious']
    for task, r in results.items():
        r |= dict(name=TASKS[task].format(probes=a.probes), times_faster=base['seconds'] / r['seconds'],
                  memory_share=r['peak_bytes'] / base['peak_bytes'])
        if task != 'obvious':
            r['bar'] = dict(five_times_faster=r['times_faster'] >= 5,
                            half_the_memory=r['memory_share'] <= 0.5)
            print(f"{r['name']}: at least 5 times faster: "
                  f"{'yes' if r['bar']['five_times_faster'] else 'no'}; "
                  f"at most half the memory: {'yes' if r['bar']['half_the_memory'] else 'no'}")
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        record = dict(sizes={name: getattr(a, name) for name in SIZES},
                      results={k: {n: v for n, v in r.items() if n != 'arrays'} for k, r in results.items()},
                      largest_differences=differences,
                      hardware=dict(processor=processor(), cores=os.cpu_count(),
                                                                      device=torch.cuda.get_device_name()
                                                                      if a.device.startswith('cuda')
                                                                      else a.device),
                      versions=dict(python=platform.python_version(), torch=torch.__version__),
                      commit=commit())
        write_text(a.out, json.dumps(stamp(record), indent=1) + '\n')


if __name__ == '__main__':
    main()
