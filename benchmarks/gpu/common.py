"""What the commands of this folder share: options, the time they have, what was recorded before, and the
depth study.

A command imports this first: it sets where PyTorch computes, which must be known before PyTorch is imported.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]


def begin(doc: str, model: str | None = None) -> argparse.Namespace:
    "Options of a command, with the time at which it has to end; `model` is the help of an option --model."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--scale', choices=('gpu', 'tiny'), default='gpu',
                        help='tiny: the same commands in seconds, to try them (default: gpu)')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda',
                        help='where to compute (default: cuda)')
    parser.add_argument('--minutes', type=float, default=9,
                        help='after which it stops; the same command goes on (default: 9)')
    parser.add_argument('--out', type=Path, default=ROOT / 'runs' / 'gpu' / 'out',
                        help='where its JSON files go (default: runs/gpu/out)')
    parser.add_argument('--work', type=Path, default=ROOT / 'runs' / 'gpu',
                        help='where corpus, checkpoints and compiled code are kept (default: runs/gpu)')
    if model: parser.add_argument('--model', help=model)
    a = parser.parse_args()
    a.end = time.monotonic() + 60 * a.minutes
    a.out, a.work = a.out.absolute(), a.work.absolute()
    for folder in (a.out, a.work): folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault('SPARSECOD_CACHE', str(a.work / 'cache'))
    if a.device == 'cpu': os.environ |= dict(ACCELERATE_USE_CPU='true', CUDA_VISIBLE_DEVICES='')
    import torch
    if a.device == 'cuda' and not torch.cuda.is_available():
        parser.error(
            '--device cuda: there is no GPU here; --scale tiny --device cpu tries the command without one')
    return a


def left(a) -> float:
    "Seconds that a command still has."
    return a.end - time.monotonic()


def facts(a) -> dict:
    "Where and with what something was measured."
    import torch
    from sparsecod.studies import code_state, hardware, n_cores, versions
    query = ['nvidia-smi', '--query-gpu=driver_version,memory.total', '--format=csv,noheader']
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20,
                                encoding='utf-8').stdout.strip() or None
    except OSError: driver = None
    return dict(scale=a.scale, hardware=hardware(torch.device(a.device)), cores=n_cores(),
                driver_and_memory=driver, cuda=torch.version.cuda,
                python=sys.version.split()[0], versions=versions(), **code_state())


class Results:
    "A JSON file of named parts; parts that were made before, on this card at this scale, are not made again."
    def __init__(self, a, name: str):
        from sparsecod.integrity import Damaged, check_identity, check_stamp, read_json
        self.a, self.name, self.facts, self.parts, self.late = a, f'{name}.json', facts(a), {}, []
        for path in (a.out / self.name, a.work / self.name):
            try:
                found = check_stamp(read_json(path), path)
                check_identity(path, found['facts'], {key: self.facts[key] for key in ('scale', 'hardware')})
            except Damaged as error:
                if path.exists(): print(f'not used: {error}')
                continue
            self.parts = found['parts']
            break

    def part(self, name: str, make, seconds: float = 10):
        """A part by its name: the one that is there, or made now if there is time; a failure is noted and
        the next call tries again."""
        if name in self.parts and 'error' not in self.parts[name]: return self.parts[name]
        if left(self.a) < seconds: return self.late.append(name)
        start = time.perf_counter()
        try: found = make()
        except Exception as error:
            found = dict(error=f'{type(error).__name__}: {error}'[:2000],
                         where=traceback.format_exc()[-3000:])
        self.parts[name] = dict(found, took=round(time.perf_counter() - start, 1))
        shown = {key: value for key, value in self.parts[name].items() if not isinstance(value, (dict, list))}
        print(f'{self.name} {name}: {json.dumps(shown)[:300]}', flush=True)
        self.write()
        return self.parts[name] if 'error' not in found else None

    def write(self):
        from sparsecod.integrity import stamp, write_text
        from sparsecod.train import without_infinities
        text = json.dumps(stamp(dict(facts=self.facts, parts=without_infinities(self.parts))), indent=1)
        for folder in (self.a.out, self.a.work): write_text(folder / self.name, text)

    def end(self) -> int:
        "Say what is missing; the exit code."
        self.write()
        failed = [name for name, part in self.parts.items() if 'error' in part]
        if failed: print(f'{self.name}: failed: {", ".join(failed)}')
        if self.late:
            print(f'{self.name}: no time was left for {", ".join(self.late)}; the same command goes on')
        return 1 if failed else 0


class Deadline:
    """Within, the command is interrupted before its time is over, as by Ctrl-C: a training saves a
    checkpoint, and the next call goes on."""
    def __init__(self, a, reserve: float = 25):
        self.timer = threading.Timer(max(.1, left(a) - reserve), os.kill, (os.getpid(), signal.SIGINT))
    def __enter__(self): self.timer.start()
    def __exit__(self, *error): self.timer.cancel()


DEPTHS = dict(gpu=(4, 8, 16, 32), tiny=(1, 2))    # as in sparsecod.studies, which is not imported yet
FACTORS = (.5, 1, 2)  # of the scale's learning rate, in the sweep


def base_config(scale: str):
    "The scale's configuration, which `make reproduce SCALE=gpu` trains too; at `tiny`, less of everything."
    from sparsecod.studies import SCALES, vary
    few = {'score.n_sequences': 4, 'score.n_fit': 8, 'score.n_jacobian': 1, 'train.steps': 20, 'n_eval': 8,
           'measures': ('null',)}
    return vary(SCALES[scale], few if scale == 'tiny' else {})


def depth_study(scale: str, rates: dict):
    "The depth study, each depth at its own learning rate."
    from sparsecod.studies import STUDIES, Study
    variants = lambda base: {f'L={L}': {'model.n_layers': L, 'train.lr': rates[L]} for L in DEPTHS[scale]}
    return Study('depth', STUDIES['depth'].question, variants, STUDIES['depth'].setting)


def best_rates(a) -> dict[int, float]:
    "The rate with the lowest loss of the sweep for each depth; an error if the sweep is not complete."
    swept, rates = Results(a, 'rates').parts, {}
    for L in DEPTHS[a.scale]:
        tried = [part for part in swept.values() if part.get('L') == L]
        if len(tried) < len(FACTORS):
            raise SystemExit(f'L={L}: the sweep is not complete; run 03_rates.py first')
        ended = [part for part in tried if part['val_loss'] is not None]
        if not ended: raise SystemExit(f'L={L}: all rates of the sweep diverged; lower train.lr in common.py')
        rates[L] = min(ended, key=lambda part: part['val_loss'])['lr']
    return rates


def least_time(a, L: int) -> float:
    """Seconds that must be left for a run to begin: compiling cannot be interrupted, and takes longer for
    deep models."""
    return 40 + 4 * L if a.scale == 'gpu' else 1


def run_here(a, config) -> dict:
    "One run of a study in this process, where what is compiled serves the next run too; its record."
    from sparsecod import studies
    if not hasattr(studies.ALWAYS['floors'], 'kept'):
        studies.ALWAYS['floors'] = once_a_seed(studies.ALWAYS['floors'])
    with Deadline(a): return studies.run(config, a.work / 'records', a.work / 'trainings', progress=False)


def once_a_seed(floors):
    "The floors of a run depend on its seed and its tokens, and not on its model."
    def wanted(model, config, corpus):
        key = (corpus.fingerprint, config.train.steps, config.train.tokens_per_step, config.seed,
               config.text_seed)
        if key not in wanted.kept: wanted.kept[key] = floors(model, config, corpus)
        return wanted.kept[key]
    wanted.kept = {}
    return wanted
