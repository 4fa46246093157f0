"""Put the records that came back from a GPU where the chapters look for them.

    python benchmarks/gpu/unpack.py DIR [--results results]
"""
import argparse
from pathlib import Path

from common import ROOT

from sparsecod.integrity import check_stamp, read_json
from sparsecod.studies import check_record, write_record

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='with the JSON files of the commands')
    parser.add_argument('--results', type=Path, default=ROOT / 'results',
                        help='where records go, into the folder of their scale')
    options = parser.parse_args()
    for path in sorted(options.folder.glob('*.json')):
        for part in check_stamp(read_json(path), path)['parts'].values():
            if (record := part.get('record')) is None: continue
            target = (options.results / record['scale'] / f"{record['name']}.json").absolute()
            write_record(target, record)
            check_record(read_json(target), target)
            print(f'written: {target}')
