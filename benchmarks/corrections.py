"""How much does each of thirteen traps of the official procedure change on trained models?

    python benchmarks/corrections.py --runs FOLDER [--seeds 3] [--out results/corrections.json]

FOLDER holds a folder for each run of the studies, with the trained model (a study's work folder,
`runs/.work` by default). The runs are found by the records in `results/laptop`: the dense baseline and the
mixtures of experts. The result is what the chapter on corrections reads. """
import argparse
import time
from pathlib import Path

import torch

from sparsecod.corrections import corrections
from sparsecod.data import prepare
from sparsecod.figures import results_folder
from sparsecod.studies import RunConfig, by_variant, load_results, provenance, shortened, write_record
from sparsecod.train import load_result

GATES = dict(published='gates as published', renormalised='gates renormalised',
             scale_matched='gates scale-matched')
SIZES = dict(n_sequences=32, n_fit=64, n_pool=96, n_loss=512)


def trained(runs: Path, record: dict):
    "The model of a record, from the folder of its run, and how that run was computed."
    result = load_result(runs / record['name'])
    if result is None:
        raise SystemExit(f"there is no finished run {record['name']} in the folder given as --runs")
    return result.model.eval(), result.execution


def measure(runs: Path, seeds: int, sizes: dict = SIZES) -> dict:
    "The record: rows of every seed, and where they come from."
    start, groups = time.perf_counter(), by_variant('moe', load_results(results_folder(), 'laptop'))
    dense = {r['seed']: r for r in groups['dense']}
    chosen = sorted(dense)[:seeds]
    corpus = prepare(RunConfig.from_dict(dense[chosen[0]]['config']).data, progress=False)
    rows, names, executions = [], [], {}
    for seed in chosen:
        found = {gates: next(r for r in groups[label] if r['seed'] == seed) for gates, label in GATES.items()}
        for r in (dense[seed], *found.values()):
            names.append(r['name'])
            if r['provenance']['corpus_fingerprint'] != corpus.fingerprint:
                raise SystemExit(f"{r['name']} was trained on another corpus than {corpus.fingerprint}")
        models = {gates: trained(runs, r) for gates, r in dict(dense=dense[seed], **found).items()}
        executions |= {r['name']: execution
                       for r, (_, execution) in zip((dense[seed], *found.values()), models.values())}
        mixtures = {gates: models[gates][0] for gates in found}
        made = corrections(models['dense'][0], corpus, RunConfig.from_dict(dense[seed]['config']).train,
                           mixtures, **sizes)
        rows += [dict(seed=seed, **r) for r in made]
        print(f'seed {seed}: {len(made)} rows, {time.perf_counter() - start:.0f} s', flush=True)
    config = dict(model=dense[chosen[0]]['config']['model'], train=dense[chosen[0]]['config']['train'],
                  sizes=sizes, seed_of_sequences=0)
    return dict(schema=1, name='corrections', config=config, seeds=chosen, runs=names, executions=executions,
                tokens=dense[chosen[0]]['tokens'],
                seconds=round(time.perf_counter() - start, 1), rows=shortened(rows),
                provenance=provenance(corpus, torch.device('cpu')))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=Path, required=True, help='folder with the folders of trained runs')
    parser.add_argument('--seeds', type=int, default=3, help='how many seeds (default: 3)')
    parser.add_argument('--out', type=Path,
                        default=results_folder(Path(__file__).parent) / 'corrections.json',
                        help='the record to write')
    options = parser.parse_args()
    record = measure(options.runs, options.seeds)
    write_record(options.out, record)
    print(f'{options.out.name}: {len(record["rows"])} rows in {record["seconds"]} s')
