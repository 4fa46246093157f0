"""What would tables of token pairs and triples lose on the held-out text of each recorded run, had they read what the run has read?

    python benchmarks/floors.py [--scale laptop] [--out results/floors.json]

Nothing is trained: which windows a run has read follows from its configuration. The corpus must be the one that the record names.
"""
import argparse
import json
from pathlib import Path

from score_model import commit
from tqdm import tqdm

from sparsecod.data import prepare
from sparsecod.integrity import stamp, write_text
from sparsecod.ngrams import floors, is_trained
from sparsecod.studies import RunConfig, held_out, load_results

ROOT = Path(__file__).resolve().parents[1]

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--scale', default='laptop', help='whose records (default: laptop)')
    parser.add_argument('--out', type=Path, default=ROOT / 'results' / 'floors.json', help='the file to write')
    options = parser.parse_args()
    records, known, runs = load_results(ROOT / 'results', options.scale), {}, {}
    for record in tqdm(records):
        config, train = RunConfig.from_dict(record['config']), record['config']['train']
        corpus, T = prepare(config.data, progress=False), config.model.context_length
        if corpus.fingerprint != record['provenance']['corpus_fingerprint']:
            raise SystemExit(f"{record['name']} has read the corpus {record['provenance']['corpus_fingerprint']}; this machine makes {corpus.fingerprint}")
        windows = held_out(config, corpus)[0]
        asked = corpus.fingerprint, record['step'], train['tokens_per_step'], T, config.seed, len(windows), config.score.seed
        if asked not in known: known[asked] = floors(corpus, record['step'], train['tokens_per_step'] // T, T, config.seed, windows)
        loss = record['final']['val_loss'] and record['final']['val_loss']['value']
        runs[record['name']] = known[asked] | dict(loss=loss, trained=loss is not None and is_trained(loss, known[asked]))
    write_text(options.out, json.dumps(stamp(dict(scale=options.scale, commit=commit(), runs=runs)), indent=1))
    print(f"{sum(r['trained'] for r in runs.values())} of {len(runs)} runs are at least 0.1 nats below the table of pairs")
