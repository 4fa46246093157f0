"""Which blocks of a real model can go, by which criterion, and what does it cost?

    python benchmarks/prune_model.py model.gguf [--texts english code] [--sequences 8] [--length 64] [--out results/real/prune_smollm2.json]

Any model that `sparsecod score` opens will do; `benchmarks/real_model.py` says where the recorded one comes from, and what the texts are. Some
sequences choose, and others, of the same text and never shared, say what the choice costs. Every part is kept in the work folder as soon as it is
measured, and a second call goes on where the first was stopped. Times are processor seconds, so that a busy machine does not change them.
"""
import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from real_model import TEXTS, Kept, package_versions, strips
from tqdm import tqdm

from sparsecod.adapters import find_folder, open_model
from sparsecod.figures import results_folder
from sparsecod.integrity import checksum
from sparsecod.pruning import greedy_order, influence_scores, loss_without, prune, removals
from sparsecod.scores import ScoreConfig, jackknife_estimate, leave_one_out, score_model, tensor_hash
from sparsecod.studies import code_state, hardware, n_cores, versions, write_record

KINDS = 'greedy', 'skip', 'influence', 'angle', 'last', 'random'
SPANS = 3     # longest span that is skipped everywhere


def last_but_one(L: int, most: int) -> list[list[int]]:
    "The deepest blocks before the last one, which stays: the simple rule of the paper on angles."
    return [list(range(L - n, L)) for n in range(1, most + 1)]


def estimated(x: torch.Tensor) -> dict:
    "Mean over sequences with its 95 % interval."
    W = leave_one_out(len(x))
    return jackknife_estimate(W @ x / W.sum(1))


@torch.no_grad()
def curves(model, choose_on, held_out, sets: dict, bar) -> dict:
    "Loss on other sequences without the first n blocks of every choice."
    seen = {}
    def loss(gone):
        if tuple(gone) not in seen: seen[tuple(gone)] = loss_without(model, held_out, gone, len(held_out))
        bar.update()
        return seen[tuple(gone)]
    base = loss([])
    def curve(choice): return [dict(removed=gone, loss=estimated(loss(gone)), increase=estimated(loss(gone) - base)) for gone in choice]
    return dict(base=estimated(base), curves={name: curve(choice) for name, choice in sets.items()})


def timed(make):
    "What it makes, with processor seconds and the largest memory of the process so far in bytes."
    def measured():
        start = time.process_time()
        found = make()
        return dict(found=found, cpu_seconds=time.process_time() - start, peak_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return measured


def one_pass(model, windows: torch.Tensor) -> dict:
    "A pass with its loss, the unit of all times."
    for _ in range(2): loss = loss_without(model, windows, (), len(windows))
    return dict(passes=2, tokens=windows[:, 1:].numel(), loss=estimated(loss))


def written(model, tokenizer, choose_on, held_out, gone: list[int]) -> dict:
    "A checkpoint without these blocks: what prune says of it, and its size on disk."
    with tempfile.TemporaryDirectory() as folder:
        record = prune(model, Path(folder) / 'small', choose_on, held_out, spans=','.join(map(str, gone)), n_random=0)
        return record | dict(bytes=sum(f.stat().st_size for f in (Path(folder) / 'small').glob('*.safetensors')))


def measure(options) -> dict:
    "The record."
    model, tokenizer = open_model(options.model)
    place, L, N = find_folder(options.model), len(model.blocks), options.sequences
    weights = {file.name: checksum(file) for file in ([place] if place.is_file() else sorted(place.glob('*.safetensors')))}
    fit = -(-4 * model.config.d_model // options.length)
    config = ScoreConfig(n_sequences=N, n_fit=fit, n_jacobian=min(4, N), batch_size=N, seed=options.seed)
    found, texts, made = {}, {}, {}
    for name in options.texts:
        words, data = TEXTS[name]
        chosen, held_out, fitted = strips(tokenizer, data, 2 * N + fit, options.length, options.seed).split([N, N, fit])
        about = dict(source=words, tokens=chosen[:, 1:].numel(), choose_on=tensor_hash([('choose', chosen)]), held_out=tensor_hash([('held out', held_out)]))
        kept = Kept(options.work / name, dict(weights=weights, length=options.length, most=options.most, draws=options.draws, **about))
        texts[name], found[name] = about, {}
        def part(what, make):
            print(f'{name}: {what}', flush=True)
            it = kept.get(what, timed(make))
            made[f'{name} {what}'] = [it['commit'], it['dirty'], it['seconds']]
            found[name][what] = it['value']
            return it['value']['found']
        def first(by, seed=0):
            with torch.no_grad(): return [gone for gone, _ in zip(removals(model, chosen, by, N, seed), range(options.most))]
        part('pass', lambda: one_pass(model, held_out))
        influence = part('influence', lambda: influence_scores(model, chosen, SPANS, batch_size=N))
        order = part('greedy', lambda: greedy_order(model, chosen, options.most, N, progress=True))['order']
        cheapest = sorted(range(1, L + 1), key=lambda l: influence['arrays']['skip_loss_increase'][l - 1])
        sets = dict(greedy=[sorted(order[:n]) for n in range(1, options.most + 1)], skip=[sorted(cheapest[:n]) for n in range(1, options.most + 1)],
                    influence=first('influence'), angle=first('angle'), last=last_but_one(L, options.most))
        sets |= {f'random {i}': first('random', options.seed + i) for i in range(options.draws)}
        with tqdm(total=1 + sum(map(len, sets.values())), desc=f'{name}, curves') as bar: part('curves', lambda: curves(model, chosen, held_out, sets, bar))
        part('checkpoint', lambda: written(model, tokenizer, chosen, held_out, sets['greedy'][options.most // 2 - 1]))
        if name in options.scores: part('scores', lambda: score_model(model, chosen, fitted, config, resume=options.work / name / 'parts'))
    return dict(schema=1, name=Path(options.model).stem, model=dict(model.config.to_dict(), weights=weights, source=options.source,
                parameters=sum(p.numel() for p in model.parameters())), texts=texts, seed=options.seed, sequences=N, length=options.length, most=options.most,
                draws=options.draws, kinds=KINDS, spans=SPANS, threads=torch.get_num_threads(), cores=n_cores(), hardware=hardware(torch.device('cpu')),
                versions=versions() | package_versions(), made=made, **found)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='a GGUF file, a folder, or a name on the Hub')
    parser.add_argument('--source', default='', help='where the weights come from, in words, for the record')
    parser.add_argument('--texts', nargs='+', choices=TEXTS, default=['english', 'code'], help='which texts (default: all)')
    parser.add_argument('--scores', nargs='*', choices=TEXTS, default=['english'], help='texts to take the full scores on (default: english)')
    parser.add_argument('--sequences', type=int, default=8, help='sequences to choose on, and as many others to state the loss on (default: 8)')
    parser.add_argument('--length', type=int, default=64, help='tokens of a sequence (default: 64)')
    parser.add_argument('--most', type=int, default=8, help='blocks to remove (default: 8)')
    parser.add_argument('--draws', type=int, default=5, help='random orders (default: 5)')
    parser.add_argument('--seed', type=int, default=0, help='of the choice of text and of chance (default: 0)')
    parser.add_argument('--work', type=Path, default=Path('runs/prune'), help='folder for what has been measured (default: runs/prune)')
    parser.add_argument('--out', type=Path, default=results_folder(Path(__file__).parent) / 'real' / 'prune_smollm2.json', help='the record to write')
    options = parser.parse_args()
    write_record(options.out, measure(options))
    print(f'written to {options.out}')
