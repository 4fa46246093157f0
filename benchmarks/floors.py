"""Add the floors to records that lack them: what tables of token pairs and triples lose on the run's
held-out text.

    python benchmarks/floors.py [--scale laptop] [--results results]

Nothing is trained: which windows a run has read follows from its configuration. The corpus must be the one
that the record names. """
import argparse
from pathlib import Path

from tqdm import tqdm

from sparsecod.data import prepare
from sparsecod.studies import ALWAYS, RunConfig, code_state, load_results, passed, shortened, write_record

ROOT = Path(__file__).resolve().parents[1]

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--scale', default='laptop', help='whose records (default: laptop)')
    parser.add_argument('--results', type=Path, default=ROOT / 'results',
                        help='folder of records (default: results)')
    options = parser.parse_args()
    for record in tqdm([r for r in load_results(options.results, options.scale) if r['status'] == 'finished'
                        and 'floors' not in r]):
        config = RunConfig.from_dict(record['config'])
        corpus = prepare(config.data, progress=False)
        if corpus.fingerprint != record['provenance']['corpus_fingerprint']:
            raise SystemExit(f"{record['name']} has read the corpus "
                             f"{record['provenance']['corpus_fingerprint']}; this machine makes "
                             f"{corpus.fingerprint}")
        added = dict(floors=shortened(ALWAYS['floors'](None, config, corpus)),
                     measured=record.get('measured', {}) | dict(floors=code_state()))
        write_record(options.results / options.scale / f"{record['name']}.json", record | added)
    records = load_results(options.results, options.scale)
    print(f'{sum(map(passed, records))} of {len(records)} runs are at least 0.1 nats below the table of '
          f'pairs')
