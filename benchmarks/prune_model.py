"""Which blocks of a real model can go, by which criterion, and what does it cost?

    python benchmarks/prune_model.py model.gguf [--texts english code] [--choose 8] [--held-out 16] [--out results/real/prune_smollm2.json]

Any model that `sparsecod score` opens will do; `benchmarks/real_model.py` says where the recorded one comes
from, and what the texts are. Some sequences choose, and others, of the same text and never shared, say what
the choice costs. Every part is kept in the work folder as soon as it is measured, and a second call goes on
where the first was stopped. Times are processor seconds, so that a busy machine does not change them. """
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
from sparsecod.intervals import mean_estimate
from sparsecod.parts import tensor_hash
from sparsecod.pruning import greedy_order, influence_scores, loss_without, prune, run_without
from sparsecod.scores import Trace, sequence_loss, trace
from sparsecod.studies import hardware, n_cores, versions, write_record

SPANS = 2     # longest span that is skipped everywhere


def last_but_one(L: int, most: int) -> list[list[int]]:
    "The deepest blocks before the last one, which stays: the simple rule of the paper on angles."
    return [list(range(L - n, L)) for n in range(1, most + 1)]


def increases(model, t: Trace, choice: list[list[int]], bar) -> list[dict]:
    """Loss on other sequences without the first n blocks of a choice, from the stream before the first of
    them."""
    found = []
    for gone in choice:
        h = run_without(model, t.streams[min(gone) - 1], gone, min(gone) - 1)
        loss = sequence_loss(model, h, t.targets)
        found.append(dict(removed=gone, loss=mean_estimate(loss), increase=mean_estimate(loss - t.loss)))
        bar.update()
    return found


def choices(influence: dict, L: int, most: int, draws: int, seed: int) -> dict[str, list[list[int]]]:
    """What each criterion removes, by what was measured on the sequences to choose on: sets of 1, 2, ..
    blocks."""
    sizes, arrays = range(1, most + 1), influence['arrays']
    cheapest = lambda name: sorted(range(1, L + 1), key=lambda l: arrays[name][l - 1])
    order = dict(skip=cheapest('skip_loss_increase'), influence=cheapest('block_influence'))
    for i in range(draws):
        order[f'random {i}'] = (torch.randperm(L, generator=torch.Generator().manual_seed(seed + i))
                                + 1).tolist()
    sets = {name: [sorted(blocks[:n]) for n in sizes] for name, blocks in order.items()}
    start = lambda n: min(range(1, L - n + 2), key=lambda l: arrays['angular_distance'][n - 1][l - 1])
    return sets | dict(angle=[list(range(l := start(n), l + n)) for n in sizes], last=last_but_one(L, most))


def timed(make):
    "What it makes, with processor seconds and the largest memory of the process so far in bytes."
    def measured():
        start = time.process_time()
        found = make()
        return dict(found=found, cpu_seconds=time.process_time() - start,
                    peak_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return measured


def one_pass(model, windows: torch.Tensor) -> dict:
    "A pass with its loss, the unit of all times."
    for _ in range(2): loss = loss_without(model, windows, (), len(windows))
    return dict(passes=2, tokens=windows[:, 1:].numel(), loss=mean_estimate(loss))


def written(model, tokenizer, choose_on, held_out, gone: list[int]) -> dict:
    "A checkpoint without these blocks: what prune says of it, and its size on disk."
    with tempfile.TemporaryDirectory() as folder:
        record = prune(model, Path(folder) / 'small', choose_on, held_out, spans=','.join(map(str, gone)),
                       n_random=0)
        return (record
                | dict(bytes=sum(f.stat().st_size for f in (Path(folder) / 'small').glob('*.safetensors'))))


def measure(options) -> dict:
    "The record."
    model, tokenizer = open_model(options.model)
    place, L, N, M = find_folder(options.model), len(model.blocks), options.choose, options.held_out
    weights = {file.name: checksum(file)
               for file in ([place] if place.is_file() else sorted(place.glob('*.safetensors')))}
    found, texts, made = {}, {}, {}
    for name in options.texts:
        words, data = TEXTS[name]
        chosen, held_out = strips(tokenizer, data, N + M, options.length, options.seed).split([N, M])
        about = dict(source=words, tokens=[x[:, 1:].numel() for x in (chosen, held_out)],
                     choose_on=tensor_hash([('choose', chosen)]),
                     held_out=tensor_hash([('held out', held_out)]))
        texts[name], found[name] = about, {}
        def part(what, make, **of):
            print(f'{name}: {what}', flush=True)
            it = Kept(options.work / name,
                      dict(weights=weights, length=options.length, **about, **of)).get(what, timed(make))
            made[f'{name} {what}'] = [it['commit'], it['dirty'], it['seconds']]
            found[name][what] = it['value']
            return it['value']['found']
        part('pass', lambda: one_pass(model, held_out))
        influence = part('influence', lambda: influence_scores(model, chosen, SPANS, batch_size=N,
                                                               progress=True), spans=SPANS)
        sets = choices(influence, L, options.most, options.draws, options.seed)
        t = trace(model, held_out)
        with tqdm(total=options.most * (len(sets) + 1), desc=f'{name}, curves') as bar, torch.no_grad():
            curve = lambda kind, choice: part(f'curve {kind}', lambda: increases(model, t, choice, bar),
                                              choice=choice)
            for kind, choice in sets.items(): curve(kind, choice)
            few = chosen[:options.greedy]
            order = part('greedy', lambda: greedy_order(model, few, options.most, N, progress=True),
                         most=options.most, sequences=len(few))['order']
            curve('greedy', [sorted(order[:n]) for n in range(1, options.most + 1)])
        gone = sorted(order[:options.most // 2])
        part('checkpoint', lambda: written(model, tokenizer, chosen, held_out, gone), gone=gone)
    return dict(schema=1, name=Path(options.model).stem,
                model=dict(model.config.to_dict(), weights=weights, source=options.source,
                parameters=sum(p.numel() for p in model.parameters())), texts=texts, seed=options.seed,
                sequences=N, held_out=M, length=options.length, most=options.most,
                draws=options.draws, greedy_sequences=min(options.greedy, N), spans=SPANS,
                threads=torch.get_num_threads(), cores=n_cores(), hardware=hardware(torch.device('cpu')),
                versions=versions() | package_versions(), made=made, **found)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='a GGUF file, a folder, or a name on the Hub')
    parser.add_argument('--source', default='', help='where the weights come from, in words, for the record')
    parser.add_argument('--texts', nargs='+', choices=TEXTS, default=list(TEXTS),
                        help='which texts (default: all)')
    parser.add_argument('--choose', type=int, default=8, help='sequences to choose on (default: 8)')
    parser.add_argument('--held-out', type=int, default=16, help='others to state the loss on (default: 16)')
    parser.add_argument('--length', type=int, default=128, help='tokens of a sequence (default: 128)')
    parser.add_argument('--most', type=int, default=6, help='blocks to remove (default: 6)')
    parser.add_argument('--greedy', type=int, default=4,
                        help='of the sequences to choose on, those that the greedy order looks at (default: '
                             '4)')
    parser.add_argument('--draws', type=int, default=3, help='random orders (default: 3)')
    parser.add_argument('--seed', type=int, default=0,
                        help='of the choice of text and of chance (default: 0)')
    parser.add_argument('--work', type=Path, default=Path('runs/prune'),
                        help='folder for what has been measured (default: runs/prune)')
    parser.add_argument('--out', type=Path,
                        default=results_folder(Path(__file__).parent) / 'real' / 'prune_smollm2.json',
                        help='the record to write')
    options = parser.parse_args()
    write_record(options.out, measure(options))
    print(f'written to {options.out}')
