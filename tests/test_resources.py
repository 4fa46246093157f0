"What a study needs: counted against what is there, and against what was recorded."
import json
from pathlib import Path

import pandas as pd
import pytest

from sparsecod.cli import main
from sparsecod.core import ModelConfig, Transformer, flops_per_token
from sparsecod.resources import (CARDS, Machine, _Speed, _recorded_speeds, scoring_flops, _shape,
                                 _speed_of, study_needs, training_flops)
from sparsecod.studies import SCALES, STUDIES, by_variant, read_records, vary
from sparsecod.train import _activation_bytes, memory_bytes, _saved_bytes

TINY = SCALES['tiny']
RESULTS = Path(__file__).resolve().parents[1] / 'results' / 'laptop'


@pytest.mark.parametrize('changes, bf16',
                         [({}, False), ({}, True), (dict(n_kv_heads=1, norm='peri_ln'), True),
                          (dict(n_experts=4), True)])
def test_saved_bytes_are_those_of_a_real_pass(changes, bf16):
    config = ModelConfig(vocab_size=97, n_layers=2, d_model=16, n_heads=2, context_length=12, **changes)
    assert _saved_bytes(config, 3, bf16) == _saved_bytes(config, 3, bf16, fake=False) > 0


def test_memory_follows_the_sizes():
    deep, wide = vary(TINY, {'model.n_layers': 12}), vary(TINY, {'train.tokens_per_step': 2048})
    assert (_activation_bytes(wide) > 3 * _activation_bytes(TINY)
            and _activation_bytes(wide, gpus=4) == _activation_bytes(TINY))
    big = SCALES['paper']
    one, eight = memory_bytes(big, 1), memory_bytes(big, 8)
    total = sum(p.numel() for p in Transformer(TINY.model).parameters())
    assert memory_bytes(TINY)['single'] - _activation_bytes(TINY) == 16 * total
    assert eight['fsdp'] < eight['single'] < eight['ddp'] and eight['single'] == one['single']
    assert memory_bytes(deep)['single'] > memory_bytes(TINY)['single']


def test_speed_of_a_card_and_of_a_stated_number():
    half = _speed_of(TINY, TINY, Machine('A100', 4, .5), {})
    assert half[:2] == (2 * CARDS['A100'].bf16, 2 * CARDS['A100'].fp32)
    stated = _speed_of(vary(TINY, {'model.n_layers': 3}), TINY, Machine(tokens_per_second=1000), {})
    assert stated.training == 1000 * flops_per_token(TINY.model)
    known = {_shape(TINY): _Speed(1, 2, 'x')}
    assert _speed_of(TINY, TINY, Machine(), known) == (1, 2, 'x')


def test_hours_of_recorded_studies():
    "From the speeds of the runs with seed 0, the hours of all runs of a study: within a quarter."
    records = [r for r in read_records(RESULTS)[0] if r['status'] == 'finished']
    for name in ('depth', 'decay', 'moe', 'ladder'):
        runs = [r for rs in by_variant(STUDIES[name], records).values() for r in rs]
        configs = {r['name']: type(TINY).from_dict(r['config']) for r in runs}
        first = _recorded_speeds([r for r in runs if r['seed'] == 0])
        told = sum(training_flops(c) / first[_shape(c)].training + scoring_flops(c) / first[_shape(c)].scoring
                   for c in configs.values())
        true = sum(r['seconds']['train'] + r['seconds']['score'] for r in runs)
        assert .75 < told / true < 1.25, name


def test_a_table_of_a_study(tmp_path, capsys):
    files = tmp_path / 'needs.json', tmp_path / 'needs.csv'
    code = main(f'plan depth --scale tiny --seeds 2 --tokens-per-second 1000 --out {tmp_path} --json '
                f'{files[0]} --csv {files[1]}'.split())
    said, rows = capsys.readouterr().out, json.loads(files[0].read_text(encoding='utf-8'))
    assert (code == 0 and '6 runs' in said
            and [r['variant'] for r in rows] == list(STUDIES['depth'].changes(TINY)))
    pd.testing.assert_frame_equal(pd.read_csv(files[1]), pd.DataFrame(rows), check_dtype=False)
    for row, (_, config) in zip(rows, STUDIES['depth'].runs('tiny')):
        assert row['runs'] == 2 and row['tokens'] == 40 * 512
        assert row['parameters'] == sum(p.numel() for p in Transformer(config.model).parameters())
        assert row['training_flops'] == row['tokens'] * flops_per_token(config.model)
    assert rows[0]['hours'] < rows[1]['hours'] < rows[2]['hours']


def test_this_machine_is_measured(tmp_path):
    needs = study_needs('depth', 'tiny', 1, Machine(), tmp_path)
    assert (needs.hours > 0).all() and needs.hours.sum() < 1


def test_what_is_too_large_gets_advice(capsys):
    assert main('plan depth --scale paper --card RTX4090'.split()) == 0
    said = capsys.readouterr().out
    assert 'L=32: too large for one RTX4090; more or larger cards' in said
    assert main('plan depth --scale paper --card H100'.split()) == 0
    assert 'L=32: too large for one H100; train.micro_batch_tokens=' in capsys.readouterr().out


@pytest.mark.parametrize('options, names', [
    ('--gpus 4', '--gpus: '), ('--card H1000', "card='H1000'"),
    ('--card H100 --utilisation 1.5', '--utilisation: '), ('--card H100 --gpus 0', 'gpus=0'),
    ('--tokens-per-second -3', 'tokens_per_second=-3'),
    ('--tokens-per-second 5 --card H100', 'tokens_per_second=5'), ('--json .', '--json')])
def test_mistakes_are_named(options, names, capsys):
    assert main(f'plan depth --scale tiny {options}'.split()) == 2
    assert names in capsys.readouterr().err


@pytest.mark.parametrize('line, names',
                         [('plan nothing', "study='nothing'"), ('plan depth --scale huge', "scale='huge'")])
def test_unknown_names_are_named(line, names, capsys):
    assert main(line.split()) == 2 and names in capsys.readouterr().err
