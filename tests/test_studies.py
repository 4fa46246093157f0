"Runs, studies, results on disk, intervals and verdicts."
import functools
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import sparsecod.studies as module
from sparsecod.configuration import Config
from sparsecod.core import ModelConfig, param_counts
from sparsecod.integrity import Damaged, stamp
from sparsecod.claims import (CLAIMS, _REGISTERED, _CHECKS, _complete_seeds, _correct, correlations, _needed,
                              judge, ledger, ledger_markdown, ledger_table, _rank_correlation,
                              _statistic_text, verdict_counts)
from sparsecod.integrity import check_stamp, read_json
from sparsecod.studies import (_DEPTHS, _MEASURES, PUBLISHED_DECAY, SCALES, STUDIES, _Progress, RunConfig,
                               RunsFailed, Study, by_variant, _changed_fields,
                               identity, load_results, _locate, over_seeds, _equivalent_decay, read_metric,
                               run, run_name, run_study, _source_setting,
                               scale_config, summarise, t_interval, variant_key, vary, _work_folder,
                               write_record)
from sparsecod.train import decay_product
from synthetic import ends_early, record as made_up_record

ROOT = Path(__file__).resolve().parents[1]
QUICK = vary(SCALES['tiny'], {'model.n_layers': 2, 'train.steps': 6, 'train.checkpoint_every': 2,
                              'train.log_every': 2, 'score.n_sequences': 4,
                              'score.n_fit': 4, 'score.n_bootstrap': 20, 'n_eval': 8})
LONG = vary(QUICK, {'train.steps': 4000, 'train.compile': 'off'})  # will not finish while a test waits


def made_up(L: int, seed: int = 0, **values) -> dict:
    "A made-up record that belongs to the depth study at laptop, with some scalar scores set by hand."
    record = made_up_record(L, seed)
    record.update(config=vary(SCALES['laptop'], {'model.n_layers': L, 'seed': seed}).to_dict(),
                  name=f'L{L}_seed{seed}')
    for name, value in values.items():
        if name == 'val_loss':
            record['final'][name] = dict(value=value, low=value, high=value)
            record['floors'] = dict(frequencies=value + 3, pairs=value + 2, triples=value + 1)
        else: record['scores']['scalars'][name] = dict(value=value, low=value, high=value)
    return record


def without_times(record: dict) -> dict:
    "What two runs of the same configuration have in common."
    return {k: v for k, v in record.items() if k not in ('seconds', 'provenance')}


# ---- configurations and identity

def test_configs_go_through_json():
    for config in (*SCALES.values(), QUICK):
        again = RunConfig.from_json(config.to_json())
        assert again == config and isinstance(again.model, ModelConfig) and again.train.seed == again.seed


@pytest.mark.parametrize('changes, message', [
    ({'model.depth': 3}, 'there is no field model.depth=3'), ({'n_kv_heads': 1}, 'model.n_kv_heads'),
    ({'model.lr': 1}, 'train.lr'), ({'source': 'x'}, 'data.source'),
    ({'model': {}}, 'there is no field model='), ({'x.y.z': 3}, 'there is no field'),
    ({'train.lr': 'fast'}, "train.lr='fast' must be a number"), ({'train.compile': 1}, 'compile=1 must be'),
    ({'model.n_layers': True}, 'must be a number'), ({'train.seed': 1}, 'set seed'),
    ({'model.n_layers': 2.5}, 'whole number'),
    ({'data.max_tokens': 'many'}, 'many'), ({'n_eval': 0}, 'n_eval=0')])
def test_wrong_changes_are_named(changes, message):
    with pytest.raises(ValueError, match=message): vary(QUICK, changes)


def test_changes_keep_what_follows():
    assert vary(QUICK, {'model.d_model': 64}).model.d_ff == 256
    assert vary(QUICK, {'model.d_model': 64, 'model.d_ff': 100}).model.d_ff == 100
    assert vary(vary(QUICK, {'model.d_ff': 100}), {'model.d_model': 64}).model.d_ff == 100
    assert vary(QUICK, {'model.n_heads': 4}).model.n_kv_heads == 4
    assert vary(vary(QUICK, {'model.n_kv_heads': 1}), {'model.n_heads': 4}).model.n_kv_heads == 1
    assert vary(QUICK, {'train.steps': 1e3}).train.steps == 1000


def test_new_fields_with_a_default_keep_identities():
    @dataclass(frozen=True)
    class Old(Config):
        a: int
        b: int = 1
    @dataclass(frozen=True)
    class New(Old):
        c: int = 2
    assert _changed_fields(Old(5)) == _changed_fields(New(5)) == {'a': 5}
    assert _changed_fields(New(5, c=3)) == {'a': 5, 'c': 3}


def test_identity_is_what_decides_the_outcome():
    base = identity(QUICK, 'f')
    same = ({'train.micro_batch_tokens': 32}, {'train.checkpoint_every': 3}, {'scale': 'own'},
            {'data.source': 'elsewhere'})
    other = ({'seed': 1}, {'model.norm': 'peri_ln'}, {'train.weight_decay': .2}, {'score.threshold': 1.2},
             {'n_eval': 9}, {'train.steps': 7})
    assert {identity(vary(QUICK, c), 'f') for c in same} == {base}
    assert (len({base, identity(QUICK, 'g'), *(identity(vary(QUICK, c), 'f') for c in other)}) == len(other)
            + 2)
    assert run_name(QUICK, 'f') == f'L2_D32_T32_seed0-{base}'
    assert variant_key(vary(QUICK, {'seed': 1, 'model.vocab_size': 400})) == variant_key(QUICK)


def test_scales_and_studies():
    assert {'tiny', 'laptop', 'gpu', 'paper'} <= set(SCALES) == set(_DEPTHS)
    paper = SCALES['paper']
    assert (paper.train.steps, paper.train.tokens_per_step,
            paper.train.decay_groups) == (19073, 256 * 1024, 'all')
    assert (abs(paper.train.steps * paper.train.tokens_per_step - 5e9) < 1e6
            and paper.model.vocab_size == 50280)
    for study in STUDIES.values():
        for scale in SCALES:
            runs = study.runs(scale, [0, 5])
            keys = [(variant_key(c), c.seed) for _, c in runs]
            assert (len(set(keys)) == len(keys) and {c.scale for _, c in runs} == {scale}
                    and {c.seed for _, c in runs} == {0, 5})
    for wrong in (0, [], [-1]):
        with pytest.raises(ValueError, match='seeds='): STUDIES['depth'].runs('tiny', wrong)
    with pytest.raises(ValueError, match="scale='huge' must be one of"): STUDIES['depth'].runs('huge')


def test_work_never_goes_into_results(tmp_path):
    assert _work_folder('runs') == Path('runs/.work')
    assert _work_folder(tmp_path / 'results') == tmp_path / 'runs' / '.work'
    assert _work_folder('results', 'here') == Path('here')


# ---- runs and records

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "A finished run: its folder, its record and the record's file."
    out = tmp_path_factory.mktemp('runs')
    record = run(QUICK, out, progress=False)
    return out, record, out / 'tiny' / f"{record['name']}.json"


def test_a_record_holds_everything(done):
    out, record, path = done
    assert (module.read_record(path) == record
            and set(json.loads(path.read_text(encoding='utf-8'))) == {*record, 'checksum'})
    assert set(record) == {'schema', 'name', 'id', 'scale', 'config', 'seed', 'status', 'step', 'tokens',
                           'seconds', 'final', 'scores', 'sparsity', 'curve', 'provenance', 'floors',
                           'measured'}
    assert (record['schema'] == 1 and record['status'] == 'finished' and record['step'] == 6
            and record['tokens'] == 6 * 512)
    assert (record['name'].endswith(record['id'])
            and set(record['config']) >= {'model', 'train', 'data', 'score'})
    assert set(record['final']) == {'val_loss', 'perplexity', 'unigram_loss'}
    loss = record['final']['val_loss']
    assert (loss['low'] <= loss['value'] <= loss['high']
            and math.isclose(record['final']['perplexity'], math.exp(loss['value'])))
    assert {'hardware', 'cores', 'threads', 'device', 'python', 'torch', 'sparsecod', 'versions', 'commit',
            'dirty', 'date', 'corpus_fingerprint',
            'corpus_stats'} <= set(record['provenance'])
    curve = record['curve']
    assert curve['step'] == [1, 2, 4, 6] and {len(v) for v in curve.values()} == {4}
    assert all(len(row) == 3 for name in ('variance_mean', 'variance_median', 'variance_without_first')
               for row in curve[name])
    assert all(len(row) == 2 for name in ('attention_update', 'feed_forward_update') for row in curve[name])


def test_files_of_a_run(done):
    out, record, path = done
    work = out / '.work' / record['name']
    assert [p.name for p in path.parent.iterdir()] == [path.name]               # no drafts
    assert ({'model', 'run.json', 'tokenizer.json', 'log.jsonl'} <= {p.name for p in work.iterdir()}
            and not (work / 'checkpoints').exists())
    assert module.read_run(work) == RunConfig.from_dict(record['config'])


def test_a_finished_run_is_read_back_and_force_runs_it_again(done, monkeypatch):
    out, record, path = done
    with monkeypatch.context() as m:
        m.setattr(module, 'train', lambda *a, **k: pytest.fail('trained again'))
        assert run(QUICK, out, progress=False) == record
    forced = run(QUICK, out, force=True, progress=False)
    assert without_times(forced) == without_times(record)
    write_record(path, record)


def test_an_interrupted_run_continues(done, tmp_path, monkeypatch):
    train, asked = module.train, []
    def interrupted(model, config, corpus, folder, progress):
        class Interrupting:
            vocab_size, fingerprint = corpus.vocab_size, corpus.fingerprint
            def batch(self, step, *sizes):
                if step == 3: signal.raise_signal(signal.SIGTERM)
                return corpus.batch(step, *sizes)
        asked.append(folder)
        return train(model, config, Interrupting(), folder, progress=progress)
    monkeypatch.setattr(module, 'train', interrupted)
    with pytest.raises(KeyboardInterrupt): run(QUICK, tmp_path, progress=False)
    assert not list(tmp_path.glob('tiny/*')) and list(asked[0].glob('checkpoints/*'))
    monkeypatch.setattr(module, 'train', train)
    assert without_times(run(QUICK, tmp_path, progress=False)) == without_times(done[1])


def test_divergence_is_recorded(tmp_path):
    record = run(vary(QUICK, {'train.lr': 300.0, 'train.steps': 100, 'train.warmup_steps': 0}), tmp_path,
                 progress=False)
    assert (record['status'] == 'diverged' and 'scores' not in record and record['final']['val_loss'] is None
            and record['final']['unigram_loss'] > 0)
    assert (record['curve']['step'][-1] == record['step'] < 100
            and record['curve']['variance_mean'][0] is not None)
    assert module.read_record(next(tmp_path.glob('tiny/*.json'))) == record


def of_run(record: dict, changes: dict = {}, fingerprint: str | None = None) -> dict:
    "A record as another run would have left it, with the same numbers."
    config = vary(RunConfig.from_dict(record['config']), changes)
    provenance = record['provenance'] | ({'corpus_fingerprint': fingerprint} if fingerprint else {})
    name = run_name(config, provenance['corpus_fingerprint'])
    changed = dict(config=config.to_dict(), seed=config.seed, scale=config.scale, name=name, id=name[-8:],
                   provenance=provenance)
    return json.loads(json.dumps(record | changed))


def restamped(change):
    "A damage that leaves a right checksum: fields of the record are replaced, those given as ... removed."
    def damage(path):
        record = json.loads(path.read_text(encoding='utf-8'))
        new = record | (change(record) if callable(change) else change)
        path.write_text(json.dumps(stamp({k: v for k, v in new.items() if v is not ... and k != 'checksum'})),
                        encoding='utf-8')
    return damage


def rewritten(change):
    "A damage to the bytes of a file."
    return lambda path: path.write_bytes(change(path.read_bytes()))


DAMAGES = {
    'cut off': (rewritten(lambda b: b[:200]), 'JSON'), 'empty': (rewritten(lambda b: b''), 'JSON'),
    'a list': (rewritten(lambda b: b'[]'), 'list'),
    'not text': (rewritten(lambda b: b'\xff\xfe\0'), 'JSON'),
    'nested': (rewritten(lambda b: b'[' * 200_000), 'JSON'),
    'a digit changed': (rewritten(lambda b: b.replace(b'"step": 6', b'"step": 7')), 'checksum'),
    'no checksum': (lambda path: path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text(encoding='utf-8')).items()
                    if k != 'checksum'}), encoding='utf-8'), 'checksum'),
    'a folder': (lambda path: (path.unlink(), path.mkdir()), 'JSON'),
    'from the future': (restamped(dict(schema=99)), 'schema=99'),
    'no number of a schema': (restamped(dict(schema='one')), "schema='one'"),
    'a field of the configuration that is unknown': (
        restamped(lambda r: dict(config=r['config'] | dict(rooms=3))), 'rooms'),
    'another configuration': (restamped(lambda r: dict(config=r['config'] | dict(n_eval=9))), 'id'),
    'another seed': (restamped(dict(seed=3)), 'seed=3'), 'another id': (restamped(dict(id='00000000')), 'id'),
    'another name': (restamped(dict(name='x')), 'name'),
    'another corpus': (restamped(lambda r: dict(provenance=r['provenance']
                                                | dict(corpus_fingerprint='0' * 16))), 'id'),
    'another scale': (restamped(dict(scale='laptop')), 'scale'),
    'a copy': (lambda path: path.rename(path.with_name('L1 (copy).json')), 'name'),
    'scores are null': (restamped(dict(scores=None)), 'scores'),
    'no scores': (restamped(dict(scores=...)), 'scores'),
    'scalars are a list': (restamped(lambda r: dict(scores=r['scores'] | dict(scalars=[]))), 'scores'),
    'a score is text': (restamped(lambda r: dict(scores=r['scores'] | dict(scalars=dict(causal='x')))),
                        'scores'),
    'no date': (restamped(dict(provenance={})), 'provenance'),
    'a loss without an interval': (restamped(lambda r: dict(final=r['final'] | dict(val_loss=3.))), 'final'),
    'curves of unequal length': (restamped(lambda r: dict(curve=r['curve'] | dict(loss=[1.]))), 'curve'),
    'a curve less': (restamped(dict(curve={})), 'curve'),
    'times are text': (restamped(dict(seconds=dict(train='long'))), 'seconds'),
    'an unknown status': (restamped(dict(status='banana')), 'status'),
    'steps are true': (restamped(dict(step=True)), 'step'),
    'sparsity is a number': (restamped(dict(sparsity=3)), 'sparsity'),
    'lengths are a list': (restamped(dict(lengths=[1])), 'lengths'),
    **{f'no {key}': (restamped({key: ...}), key) for key in module._NEEDED}}


@pytest.mark.parametrize('name', DAMAGES)
def test_a_damaged_record_is_named_with_the_reason_and_left_out(done, name, tmp_path):
    _, record, path = done
    damage, reason = DAMAGES[name]
    other = of_run(record, {'seed': 1})
    for r in (record, other): write_record(tmp_path / 'tiny' / f"{r['name']}.json", r)
    assert len(load_results(tmp_path, 'tiny')) == 2
    damage(tmp_path / 'tiny' / path.name)
    named, = {p.name for p in tmp_path.glob('tiny/*.json')} - {f"{other['name']}.json"}
    with pytest.warns(UserWarning) as said: assert load_results(tmp_path, 'tiny') == [other]
    text = str(said[0].message)
    assert len(said) == 1 and named in text and reason in text.replace(named, ''), text


def test_a_record_in_the_folder_of_another_scale_is_left_out(done, tmp_path):
    write_record(tmp_path / 'small' / done[2].name, done[1])
    with pytest.warns(UserWarning, match='tiny'): assert load_results(tmp_path, 'small') == []


def test_a_run_counts_once(done):
    study = Study('two', 'Which?', two_depths)
    other = of_run(done[1], {'seed': 1})
    assert by_variant(study, [done[1], other, dict(done[1])], QUICK)['L=2'] == [done[1], other]
    assert summarise(study, [done[1], dict(done[1]), done[1]], ['val_loss'],
                     QUICK)['L=2']['val_loss']['n'] == 1


def test_a_damaged_record_is_kept_aside_and_the_run_done_again(done, tmp_path):
    _, record, path = done
    broken = tmp_path / 'tiny' / path.name
    write_record(broken, record)
    DAMAGES['a digit changed'][0](broken)
    text = broken.read_bytes()
    with pytest.warns(UserWarning, match='checksum'): again = run(QUICK, tmp_path, progress=False)
    assert without_times(again) == without_times(record) and module.read_record(broken) == again
    assert [p.read_bytes() for p in broken.parent.glob('*') if p != broken] == [text]


def test_the_label_of_a_run_is_checked(done, tmp_path):
    work = done[0] / '.work' / done[1]['name']
    config = RunConfig.from_dict(done[1]['config'])
    for name, damage, says in (('run.json', rewritten(lambda b: b.replace(b'"n_eval": 8', b'"n_eval": 9')),
                                'run.json'),
                               ('run.json', rewritten(lambda b: b'{}'), 'run.json'),
                               ('run.json', lambda p: p.unlink(), 'run.json'),
                               ('tokenizer.json', rewritten(lambda b: b + b' '), 'tokenizer.json')):
        for file in ('run.json', 'tokenizer.json'): (tmp_path / file).write_bytes((work / file).read_bytes())
        assert module.read_run(tmp_path, config.model) == config
        damage(tmp_path / name)
        with pytest.raises(Damaged, match=says): module.read_run(tmp_path)
    with pytest.raises(Damaged, match='n_layers'):
        module.read_run(work, vary(config, {'model.n_layers': 3}).model)


@pytest.mark.parametrize('damage', [rewritten(lambda b: b[:9]),
                                    rewritten(lambda b: b.replace(b'"run": "L', b'"run": "M')),
                                    restamped(dict(run='another'))])
def test_a_damaged_note_of_a_training_is_kept_aside(done, tmp_path, damage):
    place = _locate(QUICK, tmp_path, progress=False)
    place.work.mkdir(parents=True)
    note, path = module._training_note(place), place.work / 'training.json'
    assert module._training_note(place) == note
    assert (set(note) == {'trained_commit', 'trained_dirty', 'trained_date'}
            and len(list(place.work.iterdir())) == 1)
    damage(path)
    with pytest.warns(UserWarning, match='training.json'): module._training_note(place)
    assert set(module._training_note(place)) == set(note) and len(list(place.work.iterdir())) == 2


def test_runs_on_several_corpora_are_not_mixed(done, tmp_path):
    record = done[1]
    old = of_run(record, fingerprint='f' * 16)
    old['provenance']['date'] = '2001-01-01'
    for r in (old, record): write_record(tmp_path / 'tiny' / f"{r['name']}.json", r)
    with pytest.warns(UserWarning, match='1 of 2 records are on another corpus'):
        assert load_results(tmp_path, 'tiny') == [record]


# ---- what can be refused before a training is

@pytest.mark.parametrize('changes, named', [
    ({'score.n_fit': 10 ** 6}, 'score.n_fit=1000000'),
    ({'score.n_sequences': 10 ** 5, 'score.n_fit': 10 ** 5}, 'score.n_sequences=100000'),
    ({'model.context_length': 2 ** 20, 'train.tokens_per_step': 2 ** 20}, 'model.context_length=1048576'),
    ({'score.n_fit': 1}, 'score.n_fit=1'),
    ({'measures': ('lengths',), 'lengths': (32, 10 ** 6)}, 'lengths='),
    ({'train.tokens_per_step': 100}, 'tokens_per_step=100')])
def test_what_cannot_be_scored_is_refused_before_the_training(done, tmp_path, monkeypatch, changes, named):
    monkeypatch.setattr(module, 'train', lambda *a, **k: pytest.fail('trained'))
    config = vary(QUICK, changes)
    with pytest.raises(ValueError, match=re.escape(named)): run(config, tmp_path, progress=False)
    monkeypatch.setattr(module, '_start_worker', lambda *a: pytest.fail('started'))
    study = Study('mixed', '?', lambda base: {'fine': {}, 'too much': changes})
    with pytest.raises(ValueError, match='too much.*' + re.escape(named)):
        run_study(study, QUICK, 1, tmp_path, progress=False)
    assert not list(tmp_path.glob('**/checkpoints'))


def test_just_enough_text_is_enough(done):
    place = _locate(QUICK, done[0], progress=False)
    have = place.corpus.n_windows('val', 32)
    module.check_text(vary(place.config, {'score.n_fit': have - 4}), place.corpus)
    module.score_windows(place.corpus, 32, vary(place.config, {'score.n_fit': have - 4}).score)
    with pytest.raises(ValueError, match=f'score.n_fit={have - 3}'):
        module.check_text(vary(place.config, {'score.n_fit': have - 3}), place.corpus)


def test_places_that_cannot_be_written_to_are_named_before_the_corpus_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'prepare', lambda *a, **k: pytest.fail('built a corpus'))
    (tmp_path / 'file').write_text('', encoding='utf-8')
    for options in (dict(out=tmp_path / 'file'), dict(out=tmp_path / 'file' / 'below'),
                    dict(out=tmp_path, work=tmp_path / 'file')):
        with pytest.raises(OSError, match='file is a file'): run(QUICK, progress=False, **options)
        with pytest.raises(OSError, match='file is a file'):
            run_study('depth', QUICK, progress=False, **options)
    def refuse(self, data): raise PermissionError(13, 'Permission denied', str(self))
    monkeypatch.setattr(Path, 'write_bytes', refuse)
    with pytest.raises(PermissionError, match=re.escape(str(tmp_path))):
        run(QUICK, tmp_path / 'new' / 'out', progress=False)
    assert not (tmp_path / 'new').exists()


def test_a_full_disk_is_noticed_before_the_training(done, tmp_path, monkeypatch):
    place = _locate(QUICK, done[0], progress=False)
    need = module.training_bytes(place.config)
    free = [need]
    monkeypatch.setattr(module.shutil, 'disk_usage',
                        lambda path: module.shutil._ntuple_diskusage(2 ** 40, 2 ** 40 - free[0], free[0]))
    module.check_folder(tmp_path, need)
    free[0] -= 1
    monkeypatch.setattr(module, 'train', lambda *a, **k: pytest.fail('trained'))
    with pytest.raises(OSError, match='GB free'): module.check_folder(tmp_path, need)
    with pytest.raises(OSError, match=re.escape(str(tmp_path))): run(QUICK, tmp_path, progress=False)
    with pytest.raises(OSError, match='GB free'):
        run_study(Study('one', '?', lambda base: {'only': {}}), QUICK, 1, tmp_path, progress=False)
    assert run(QUICK, done[0], progress=False) == done[1]       # nothing is to be done


def test_the_room_for_a_training_is_what_it_takes(tmp_path):
    config, seen = vary(QUICK, {'train.steps': 12, 'train.log_every': 1, 'model.d_model': 64}), []
    place = _locate(config, tmp_path, progress=False)
    class Looking:
        vocab_size, fingerprint = place.corpus.vocab_size, place.corpus.fingerprint
        def batch(self, step, *sizes):
            seen.append(sum(p.stat().st_size for p in place.work.rglob('*.safetensors')))
            return place.corpus.batch(step, *sizes)
    module.train(place.config.model, place.config.train, Looking(), place.work, progress=False)
    one = 4 * param_counts(place.config.model)['total']
    assert 6 * one <= max(seen) <= module.training_bytes(place.config)


def test_names_are_legal_everywhere():
    names = {f'{c.scale}/{run_name(c, "f")}' for study in STUDIES.values() for scale in SCALES
             for _, c in study.runs(scale, 2)}
    assert all(re.fullmatch(r'\w+/\w[\w.-]*\w', name, re.ASCII) and len(name) < 100 for name in names)
    assert len({name.lower() for name in names}) == len(names)


def test_under_a_launcher_a_study_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'prepare', lambda *a, **k: pytest.fail('built a corpus'))
    monkeypatch.setenv('WORLD_SIZE', '2')
    for start in (lambda: run(QUICK, tmp_path), lambda: run_study('depth', QUICK, out=tmp_path)):
        with pytest.raises(ValueError, match='WORLD_SIZE=2'): start()


# ---- several processes that want the same

def one_of_several(folder, queue):
    "Do a run in a process of its own."
    try: queue.put(run(QUICK, folder, progress=False))
    except BaseException as error: queue.put(f'{type(error).__name__}: {error}')


@pytest.mark.filterwarnings('ignore')
def test_four_processes_do_a_run_once(tmp_path):
    context = multiprocessing.get_context('spawn')
    queue = context.Queue()
    processes = [context.Process(target=one_of_several, args=(tmp_path, queue)) for _ in range(4)]
    for p in processes: p.start()
    found = [queue.get(timeout=300) for _ in processes]
    for p in processes: p.join()
    assert all(r == found[0] for r in found) and found[0]['status'] == 'finished'    # date and seconds too
    assert len(list(tmp_path.glob('tiny/*'))) == 1 and not list(tmp_path.glob('**/*.draft'))


def test_a_run_at_work_is_not_erased(done):
    place = _locate(QUICK, done[0], progress=False)
    with module._hold(place), pytest.raises(ValueError, match='in use'):
        run(QUICK, done[0], force=True, progress=False)
    assert module.read_record(done[2]) == done[1]


def test_held_out_windows_are_apart(done):
    place = _locate(QUICK, done[0], progress=False)
    windows, to_score, to_fit = module.held_out(place.config, place.corpus)
    assert len(windows) == 8 and len(to_score) == 4 and len(to_fit) <= 4
    assert not {tuple(w) for w in to_score.tolist()} & {tuple(w) for w in to_fit.tolist()}
    again = module.held_out(vary(place.config, {'seed': 3}), place.corpus)
    assert all((a == b).all() for a, b in zip((windows, to_score, to_fit), again))  # the same for all seeds


# ---- studies in several processes

def two_depths(base): return {f'L={L}': {'model.n_layers': L} for L in (1, 2)}


def test_a_study_runs_what_is_missing(done, tmp_path, capfd):
    study = Study('two', 'Which?', two_depths)
    write_record(tmp_path / 'tiny' / done[2].name, done[1])
    records = run_study(study, QUICK, 1, tmp_path, jobs=2)
    assert [r['config']['model']['n_layers'] for r in records] == [1, 2] and records[1] == done[1]
    assert records[0]['provenance']['threads'] >= 1 and capfd.readouterr().err.count('held-out loss') == 1
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob('tiny/*')}
    assert run_study(study, QUICK, 1, tmp_path) == records and capfd.readouterr() == ('', '')
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob('tiny/*')} == before
    assert [r['name'] for r in by_variant(study, load_results(tmp_path, 'tiny'),
                                          QUICK)['L=2']] == [done[1]['name']]


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path, capfd):
    study = Study('bad', 'What fails?', lambda base: {'good': {}, 'bad': {'model.n_layers': 1}})
    foreign = _locate(vary(QUICK, {'model.n_layers': 1}), tmp_path, progress=False).work / 'config.json'
    foreign.parent.mkdir(parents=True)
    foreign.write_text('{"of": "something else"}', encoding='utf-8')
    with pytest.raises(RunsFailed, match='config.json') as error: run_study(study, QUICK, 1, tmp_path, jobs=2)
    assert len(error.value.failed) == 1 and len(list(tmp_path.glob('tiny/*.json'))) == 1
    assert ('failed: ' in capfd.readouterr().err
            and foreign.read_text(encoding='utf-8') == '{"of": "something else"}')


def test_a_killed_run_is_named(tmp_path, monkeypatch):
    start = module._start_worker
    def doomed(*args, **environment):
        process = start(*args, **environment)
        process.kill()
        return process
    monkeypatch.setattr(module, '_start_worker', doomed)
    with pytest.raises(RunsFailed, match='SIGKILL'):
        run_study(Study('one', '?', lambda base: {'only': {}}), QUICK, 1, tmp_path, progress=False)


def hears_ctrl_c():
    "A shell may have told its background jobs to ignore SIGINT, and children inherit that."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_long_study(tmp_path) -> subprocess.Popen:
    "A process with a study of two long runs that are both at work."
    code = (f'import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]\n'
            f'from test_studies import LONG, Study, run_study, two_depths\n'
            f'run_study(Study("long", "?", two_depths), LONG, 1, {str(tmp_path)!r}, jobs=2)')
    process = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True,
                               start_new_session=True,
                               preexec_fn=hears_ctrl_c, encoding='utf-8')
    wait_for(lambda: len({p.parents[1] for p in tmp_path.glob('.work/*/checkpoints/step-*')}) == 2
             and len(workers(tmp_path)) == 2, process)
    return process


def wait_for(ready, process=None, seconds=120):
    "Wait until something is the case."
    end = time.time() + seconds
    while not ready():
        assert time.time() < end and (process is None or process.poll() is None), 'waited in vain'
        time.sleep(.1)


def workers(tmp_path) -> list[int]:
    "Processes whose complaints go to this folder."
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try: target = os.readlink(f'/proc/{pid}/fd/2')
        except OSError: continue
        if target.startswith(str(tmp_path / '.work')): found.append(int(pid))
    return found


needs_proc = pytest.mark.skipif(not Path('/proc/self/fd').exists(),
                                reason='processes are found through /proc')


@needs_proc
def test_ctrl_c_stops_all_and_keeps_checkpoints(tmp_path):
    process = start_long_study(tmp_path)
    steps = {p.parent.parent.name: p.name for p in sorted(tmp_path.glob('.work/*/checkpoints/step-*'))}
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and 'stopping' in errors and not workers(tmp_path)
    after = {p.parent.parent.name: p.name for p in sorted(tmp_path.glob('.work/*/checkpoints/step-*'))}
    assert (len(after) == 2 and all(after[name] >= steps.get(name, '') for name in after)
            and not list(tmp_path.glob('tiny/*')))


@needs_proc
def test_workers_stop_when_the_supervisor_is_killed(tmp_path):
    process = start_long_study(tmp_path)
    process.kill()
    process.communicate()
    wait_for(lambda: not workers(tmp_path))
    assert len(list(tmp_path.glob('.work/*/checkpoints/step-*'))) >= 2


def test_stopping_needs_no_signal_from_outside(tmp_path, monkeypatch):
    # Windows ends the process at once
    monkeypatch.setattr(module.os, 'kill', lambda *a: pytest.fail('a signal was sent'))
    monkeypatch.setattr(subprocess.Popen, 'terminate', lambda self: pytest.fail('a signal was sent'))
    place = _locate(LONG, tmp_path, progress=False)
    orders, processes, sleep = place.orders(tmp_path, tmp_path / '.work', 1), [], time.sleep
    def start(job, slot):
        processes.append(module._start_worker(orders, job.work))
        return processes[0]
    def interrupted(seconds):
        if list(place.work.glob('checkpoints/step-*')): raise KeyboardInterrupt
        sleep(seconds)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(module.time, 'sleep', interrupted)
        module._supervise([place], [place], 1, start, 'title', False, 'stopping')
    assert processes[0].returncode == 130 and list(place.work.glob('checkpoints/step-*')), (
        place.work / 'stderr.txt').read_text(encoding='utf-8')


def test_every_end_of_a_process_is_put_into_words():
    for code in (-9, -34, -63, 1, 0xC0000005): assert str(abs(code)) in module._complaint('', code)


def test_plain_lines_now_and_then(capfd):
    lines = _Progress('title', 10., 0., every=0.0)
    lines.update(5., 'L2 step 3/6 loss 4.00', 'depth at tiny, 1 of 2 runs done')
    assert '50%] depth at tiny, 1 of 2 runs done; L2 step 3/6 loss 4.00' in capfd.readouterr().err
    quiet = _Progress('title', 10., 0., show=False, every=0.0)
    quiet.update(5., '', '')
    quiet.say('a line')
    assert capfd.readouterr().err == ''


def test_bars_follow_the_runs(capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    bars = _Progress('depth', 10., 2.)
    bars.update(4., 'first step 1/6; second starting', 'depth, 0 of 3')
    bars.update(8., 'third step 2/6 loss 4.00', 'depth, 2 of 3')
    assert bars.study.n == 8
    bars.say('a line')
    bars.close()
    shown = capfd.readouterr().err
    assert all(text in shown for text in ('depth, 2 of 3', 'second', 'third', 'a line'))


# ---- GPUs and clusters

@pytest.mark.parametrize('named, gpus', [(None, ['0', '1', '2']), ('5,7', ['5', '7']), ('', ['0', '1', '2'])])
def test_each_gpu_gets_runs_of_its_own(named, gpus, tmp_path, monkeypatch):
    monkeypatch.delenv('ACCELERATE_USE_CPU', raising=False)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if named is not None: monkeypatch.setenv('CUDA_VISIBLE_DEVICES', named)
    monkeypatch.setattr(module.torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(module.torch.cuda, 'device_count', lambda: 3)
    started, slots = [], []
    monkeypatch.setattr(module, '_start_worker',
                        lambda orders, folder, **environment: started.append(
                            environment['CUDA_VISIBLE_DEVICES']))
    def begin(every, waiting, at_once, start, *rest):
        slots.append(at_once)
        for slot in range(at_once): start(waiting[slot], slot)
        return {}
    monkeypatch.setattr(module, '_supervise', begin)
    study = Study('four', '?', lambda base: {f'L={L}': {'model.n_layers': L} for L in (1, 2, 3, 4)})
    # there are no records
    with pytest.warns(UserWarning): run_study(study, QUICK, 1, tmp_path, progress=False)
    assert slots == [len(gpus)] and started == gpus
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    assert module._own_gpus() == []


def test_a_cluster_makes_what_is_missing_once(done, tmp_path, capfd):
    pytest.importorskip('submitit')
    study = Study('two', 'Which?', two_depths)
    write_record(tmp_path / 'tiny' / done[2].name, done[1])
    records = run_study(study, QUICK, 1, tmp_path, on='local')
    assert [r['config']['model']['n_layers'] for r in records] == [1, 2] and records[1] == done[1]
    jobs = list((tmp_path / '.work' / 'jobs').rglob('*_submitted.pkl'))
    assert len(jobs) == 1 and run_study(study, QUICK, 1, tmp_path, on='local') == records
    assert list((tmp_path / '.work' / 'jobs').rglob('*_submitted.pkl')) == jobs


def test_a_run_that_waits_in_the_queue_is_not_handed_over_again(tmp_path, monkeypatch):
    submitit = pytest.importorskip('submitit')
    job, handed = _locate(QUICK, tmp_path, progress=False), []
    class Waiting(submitit.LocalJob):
        def done(self, force_check=False): return self.job_id == 'there'
    def map_array(self, function, *lists):
        handed.append(lists)
        return [Waiting(self.folder, 'here') for _ in lists[0]]
    monkeypatch.setattr(submitit.AutoExecutor, 'map_array', map_array)
    monkeypatch.setattr(submitit.LocalExecutor, 'job_class', Waiting)
    def give():
        return module._hand_over([job], tmp_path, tmp_path / '.work', 'local', None)[job.name].job.job_id
    assert give() == give() == 'here' and len(handed) == 1
    for text in (json.dumps(stamp(dict(cluster='local', job='there'))),
                 json.dumps(stamp(dict(cluster='slurm', job='here'))), '{'):
        (job.work / 'job.json').write_text(text, encoding='utf-8')     # done, of another cluster, damaged
        handed.clear()
        assert give() == 'here' and len(handed) == 1


def test_a_job_that_has_to_leave_saves_and_would_go_on(tmp_path):
    pytest.importorskip('submitit')
    place = _locate(LONG, tmp_path, progress=False)
    orders, task = place.orders(tmp_path, tmp_path / '.work', 1), module._ClusterRun()
    task.process = module._start_worker(orders, place.work)
    wait_for(lambda: list(place.work.glob('checkpoints/step-*')), task.process)
    again = task.checkpoint(orders, str(place.work))
    assert task.process.returncode == 130 and again.args == (orders, str(place.work))
    assert isinstance(again.function, module._ClusterRun) and not vars(again.function)


@pytest.mark.parametrize('on', ['nowhere', 'local nonsense=3', 'slurm'])
def test_a_cluster_that_cannot_be_used_is_refused(on, tmp_path, monkeypatch):
    pytest.importorskip('submitit')
    monkeypatch.setenv('PATH', '/nowhere')
    job = _locate(QUICK, tmp_path, progress=False)
    with pytest.raises(ValueError, match=on.split()[0]):
        module._hand_over([job], tmp_path, tmp_path, on, None)


# ---- intervals and statistics

@pytest.mark.parametrize('n', [2, 3, 7])
def test_t_interval_is_the_one_of_scipy(n):
    x = np.random.default_rng(n).normal(3, 2, n)
    mean, low, high = t_interval(x)
    assert ((low, high) == pytest.approx(stats.t.interval(.95, n - 1, loc=x.mean(), scale=stats.sem(x)))
            and mean == pytest.approx(x.mean()))


def test_too_few_seeds_have_no_interval():
    assert (t_interval([2.])[0] == 2 and all(map(math.isnan, t_interval([2.])[1:]))
            and all(map(math.isnan, t_interval([]))))
    assert over_seeds([dict(value=1., low=0., high=2.)]) == dict(value=1., low=0., high=2., n=1,
                                                                 over='sequences')
    assert over_seeds([dict(value=1., low=0., high=9.), dict(value=3., low=0., high=9.)])['over'] == 'seeds'

def test_variances_are_averaged_by_ratio():
    seeds = [dict(value=v, low=v, high=v) for v in (1., 10., 100.)]
    plain, ratio = over_seeds(seeds), over_seeds(seeds, log=True)
    assert plain['low'] < 0 < ratio['low'] and math.isclose(ratio['value'], 10)
    assert math.isclose(ratio['low'] * ratio['high'], 100)  # symmetric on a logarithmic axis
    # a zero has no logarithm
    assert over_seeds([dict(value=0., low=0., high=0.), *seeds], log=True)['value'] == 27.75


def test_statistics_are_those_of_scipy_and_numpy():
    rng = np.random.default_rng(0)
    for y in (rng.normal(size=9), rng.integers(0, 3, 9).astype(float)):
        assert _rank_correlation(y.tolist()) == pytest.approx(stats.spearmanr(np.arange(9), y).statistic)
    assert (_rank_correlation([1., 1., 1.]) is None and _rank_correlation([1.]) is None
            and _rank_correlation([1., math.nan]) is None)


@pytest.mark.parametrize('values, side, bound, verdict', [
    ([1., 1.1, .9], 1, 0, 'confirmed'), ([1., 1.1, .9], -1, 0, 'contradicted'),
    ([-1., -1.1, -.9], -1, 0, 'confirmed'),
    ([-1., -1.1, -.9], 1, 0, 'contradicted'), ([1., -1., .2], 1, 0, 'open'), ([1.], 1, 0, 'open'),
    ([], 1, 0, 'open'),
    ([1., 1.1, .9], 1, 2, 'contradicted'), ([1., 1.1, .9], -1, 2, 'confirmed'), ([0., 0.], 1, 0, 'open'),
    ([1., 1.], 1, 0, 'open'), ([-1., -1., -1.], -1, 0, 'open')])
def test_verdicts(values, side, bound, verdict):
    assert judge(values, side, bound)['verdict'] == verdict


# ---- the ledger

def curse(L: int, seed: int, sign: float) -> dict:
    "A made-up run in which every score moves with depth as claimed (sign 1), or against it (sign -1)."
    x = math.log2(L)
    noise = 1 + .01 * (seed - 1) * (1 + x)
    falling = dict.fromkeys(('causal', 'causal_max', 'causal_without_block_1', 'permutation',
                             'permutation_without_block_1', 'usefulness', 'linear_loss_increase',
                             'skip_loss_increase', 'jacobian_deviation', 'jacobian_per_sequence'),
                             noise * (2 - sign * 0.3 * x))
    rising = dict.fromkeys(('final_variance', 'final_variance_median', 'final_variance_without_first'),
                           noise * 2 ** (sign * x))
    run = made_up(L, seed, val_loss=5 - sign * (.5 * x - .05 * x * x) * noise, **falling, **rising)
    first, grown = noise * 2 ** (sign * x), noise ** 2 * 4 ** (sign * x)
    run['scores']['arrays'] |= {name: [.1, *[first] * (L - 1), grown]
                                for name in ('variance_mean', 'variance_median', 'variance_without_first')}
    return run


def test_the_ledger_follows_the_runs():
    trends = {c.id for c in CLAIMS if c.study == 'depth' and c.rule.startswith(('change', 'doublings of'))
              or c.id == 'depth-loss-gain'}
    assert len(trends) >= 12
    for sign, verdict in ((1, 'confirmed'), (-1, 'contradicted')):
        rows = {r['id']: r for r in ledger([curse(L, seed, sign) for L in (2, 4, 8, 16) for seed in range(3)],
                                           'depth')}
        assert {rows[i]['direction'] for i in trends} == {verdict}
        assert {i for i in trends if rows[i]['verdict'] == 'units'} == {i for i in trends
                                                                        if 'final-variance' in i
                                                                        or 'first-variance' in i}
        assert rows['depth-growth']['verdict'] == rows['depth-causal']['verdict'] == verdict
        assert all(r['statistic']['n'] == 3 and 'confirmed if' in r['rule'] for r in rows.values()
                   if r['study'])


@pytest.mark.parametrize('pairs, judged', [(None, False), (5.05, False), (5.2, True), (9., True)])
def test_runs_above_their_floor_judge_nothing(pairs, judged):
    records = [curse(L, seed, 1) for L in (2, 4, 8, 16) for seed in range(3)]
    worst = next(r for r in records if r['config']['model']['n_layers'] == 4 and r['seed'] == 1)
    worst['final']['val_loss'] = dict(value=5., low=5., high=5.)
    worst['floors'] = pairs and dict(frequencies=9., pairs=pairs, triples=4.)
    rows = {r['id']: r for r in ledger(records, 'depth')}
    assert ((rows['depth-causal']['verdict'] == 'confirmed') is judged
            and rows['depth-causal']['direction'] == 'confirmed')
    if not judged:
        assert ({r['verdict'] for r in rows.values()} == {'untrained'}
                and rows['depth-causal']['floor'] == dict(passed=11, of=12))


def test_a_primary_endpoint_must_pass_the_correction(monkeypatch):
    """Benjamini and Hochberg by hand: the k-th smallest of m needs p <= k / m * 0.05, or a larger one that
    passes."""
    row = lambda name, p, primary=True, n=3: dict(id=name, verdict='confirmed', registered='0' * 40 if primary
                                                  else None, statistic=dict(p=p, n=n))
    verdicts = lambda ps: [r['verdict'] for r in _correct([row(str(i), p) for i, p in enumerate(ps)])]
    assert verdicts([.03]) == ['confirmed'] and verdicts([.03, .6]) == ['open', 'open']
    assert (verdicts([.01, .04, .045]) == ['confirmed'] * 3
            and verdicts([.001, .04, .2]) == ['confirmed', 'open', 'open'])
    # exploratory rows are not in it
    assert [r['verdict'] for r in _correct([row('a', .04, False), row('b', .6)])] == ['confirmed', 'open']
    assert _correct([]) == [] and _correct([row('a', .001, n=2)])[0]['verdict'] == 'open'  # too few seeds


def test_registered_endpoints_stay_as_they_were(root):
    path = root / 'results' / 'registered.json'
    kept = check_stamp(read_json(path), path)
    facts = lambda c: dict(id=c.id, study=c.study, metric=c.metric, statement=c.statement, rule=c.rule,
                           side=c.side, bound=c.bound,
                           needs=list(c.needs) if c.needs else None)
    assert (_REGISTERED == {kept['scale']: kept['commit']}
            and [facts(c) for c in CLAIMS if c.primary] == kept['endpoints'])
    assert len({c['study'] for c in kept['endpoints']}) == len(kept['endpoints'])  # one a study


@pytest.mark.parametrize('c', [.01, 1, 300])
def test_growth_is_no_matter_of_units(c):
    r = curse(8, 0, 1)
    scaled = r | dict(scores=r['scores']
                      | dict(arrays={name: [c * c * v for v in a] for name, a in r['scores']['arrays'].items()
                                     if name.startswith('variance')}))
    for name in ('growth', 'growth_mean', 'growth_without_first'):
        assert read_metric(scaled, name)['value'] == pytest.approx(read_metric(r, name)['value'])
    assert read_metric(scaled,
                       'first_variance')['value'] == pytest.approx(
                           c * c * read_metric(r, 'first_variance')['value'])


def test_a_source_of_sparsity_is_judged_by_contrasts_within_seeds():
    "Seeds differ a lot, variants by a little: only the contrast within a seed shows it."
    base = scale_config('laptop')
    def record(changes, seed, value):
        config = vary(base, changes | {'seed': seed})
        return (made_up(base.model.n_layers, seed, val_loss=value, final_variance=2 ** value)
                | {'config': config.to_dict()})
    variants = list(STUDIES['moe'].changes(base).values())
    records = [record(v, seed, 4 + seed + shift + .001 * seed * i) for seed in range(3)
               for i, (v, shift) in enumerate(zip(variants, (0, -.1, .1)))]
    rows = {r['id']: r for r in ledger(records, 'moe')}
    assert rows['moe-val-loss']['verdict'] == rows['moe-final-variance']['direction'] == 'confirmed'
    assert rows['moe-val-loss-renormalised']['verdict'] == rows['moe-final-variance-renormalised']['direction'] == 'contradicted'
    assert rows['moe-usefulness']['verdict'] == 'open'  # made-up runs are all alike in it
    assert rows['moe-val-loss-renormalised']['control'] and not rows['moe-val-loss']['control']


@pytest.mark.parametrize('H', [2, 4, 8])
def test_gqa_claims_speak_of_all_heads_sharing(H):
    base = scale_config('laptop')
    base = vary(base, {'model.n_heads': H})
    changes = list(STUDIES['gqa'].changes(base).values())
    assert vary(base, changes[-2]).model.n_kv_heads == vary(base, changes[-1]).model.n_kv_heads == 1
    assert vary(base, changes[-1]).model.d_ff > vary(base, changes[-2]).model.d_ff == base.model.d_ff


def test_a_run_refuses_to_be_launched_several_times_over(tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='WORLD_SIZE=2 must be 1'):
        run(QUICK, tmp_path)
    assert not list(tmp_path.iterdir())


def test_seeds_that_are_not_complete_do_not_count():
    records = [curse(L, seed, 1) for L in (2, 4, 8, 16) for seed in range(3)]
    assert set(_complete_seeds('depth', records)) == {0, 1, 2}
    assert set(_complete_seeds('depth', records[:-1])) == {0, 1}
    assert set(_complete_seeds('depth', [*records[:-1], ends_early(records[-1])])) == {0, 1}
    one_seed = ledger([r for r in records if r['seed'] == 0])
    assert ({r['direction'] for r in one_seed if r['study']} == {'open'}
            and {r['verdict'] for r in one_seed if r['study']} == {'open', 'units'})
    other = [r | dict(config=vary(RunConfig.from_dict(r['config']), {'train.weight_decay': .5}).to_dict())
             for r in records]
    assert ledger(records + other) == ledger(records) and set(by_variant('depth', other)) == set()


def test_sums_of_the_published_page():
    verdicts = {r['id']: r['verdict'] for r in ledger([]) if not r['study']}
    assert len(verdicts) == len(_CHECKS)
    assert verdicts['page-size-ratio'] == verdicts['page-moe-gain'] == verdicts['page-percent'] == 'contradicted'
    assert verdicts['page-usefulness-counts'] == verdicts['page-wasted-layers'] == 'confirmed'
    assert verdicts['theory-proportional'] == verdicts['theory-growth'] == 'confirmed'
    assert verdicts['theory-proportional-blocks'] == verdicts['theory-relative-growth'] == verdicts['page-recipe-size'] == 'contradicted'
    assert not any(r['study'] is None for r in ledger([], 'depth'))


def test_the_weight_decay_of_the_paper_falls_on_all_parameters():
    claims = {c.id: c for c in CLAIMS if c.study == 'decay'}
    for name, claim in claims.items():
        if name.endswith('-all'): assert (claim.source != 'control') == bool(claim.published)
        else: assert claim.source == 'control' and not claim.published and f'{name}-all' in claims
    assert {c.id for c in claims.values() if c.published} >= {f'decay-val-loss{step}-all'
                                                              for step in ('', '-little', '-optimum',
                                                                           '-overshoot', '-much',
                                                                           '-collapse')}


def test_a_metric_that_is_the_same_everywhere_is_said_to_be_so():
    runs = [made_up(8, seed, val_loss=4.)
            | {'config': vary(scale_config('laptop'), changes | {'seed': seed}).to_dict()}
            for seed in range(3) for changes in STUDIES['sources'].changes(scale_config('laptop')).values()]
    rows = {r['id']: r for r in ledger(runs, 'sources')}
    assert 'the same in all runs' in _statistic_text(rows['sources-final-variance-usefulness'])
    assert 'no complete seed' in _statistic_text(ledger([], 'sources')[0])


def test_the_ledger_as_text():
    for records in ([], [curse(L, seed, 1) for L in (2, 4, 8, 16) for seed in range(2)], [curse(2, 0, 1)]):
        rows = ledger(records)
        table, markdown = ledger_table(rows, width=110), ledger_markdown(rows).splitlines()
        assert (max(map(len, table.splitlines())) <= 110
                and sum(map(int, re.findall(r'(\d+) (?:confirmed|contradicted|open|untrained|units)',
                                            verdict_counts(rows)))) == len(rows))
        assert (len(markdown) == len(rows) + 2
                and {line.replace(r'\|', '').count('|') for line in markdown} == {7})
    with pytest.raises(ValueError, match='several scales'): ledger([dict(scale='tiny'), dict(scale='laptop')])


def test_summaries():
    records = [curse(L, seed, 1) for L in (2, 4) for seed in range(3)]
    summary = summarise('depth', records)
    assert list(summary) == ['L=2', 'L=4'] and summary['L=4']['final_variance']['n'] == 3
    values = [r['scores']['scalars']['final_variance']['value'] for r in records
              if r['config']['model']['n_layers'] == 4]
    # by ratio
    assert summary['L=4']['final_variance']['value'] == pytest.approx(np.exp(np.mean(np.log(values))))


def test_equivalent_decay_has_the_published_product():
    train = SCALES['laptop'].train
    for published in (.01, .1, 3):
        mine = train.replace(weight_decay=_equivalent_decay(train, published))
        assert decay_product(mine) == pytest.approx(published * decay_product(PUBLISHED_DECAY), rel=1e-3)
    assert _equivalent_decay(PUBLISHED_DECAY, .1) == pytest.approx(.1) and _equivalent_decay(train, 0) == 0


@pytest.mark.parametrize('scale', SCALES)
def test_studies_of_the_sources_vary_one_thing_and_share_their_baseline(scale):
    base = scale_config(scale)
    fixed = vary(base, _source_setting(base))
    baselines = {variant_key(c) for name in ('gqa', 'moe', 'remedies', 'context')
                 for c in [STUDIES[name].runs(base)[0][1]]}
    assert baselines == {variant_key(fixed)}
    for label, c in STUDIES['context'].runs(base):
        assert c.train.steps * c.train.tokens_per_step == pytest.approx(
            fixed.train.steps * fixed.train.tokens_per_step, rel=.02)
        assert c.score.n_sequences * c.model.context_length == fixed.score.n_sequences * fixed.model.context_length
        same_tokens, same_sequences = c.train.tokens_per_step == fixed.train.tokens_per_step, (
            c.train.tokens_per_step // c.model.context_length
            == fixed.train.tokens_per_step // fixed.model.context_length)
        assert same_sequences if 'sequences fixed' in label else same_tokens
    gqa = {label: param_counts(c.model)['total'] for label, c in STUDIES['gqa'].runs(base)}
    assert all(abs(n / gqa['G=1'] - 1) < .01 for label, n in gqa.items() if 'matched' in label)
    ladder = list(STUDIES['ladder'].changes(base).values())
    # a rung keeps what the one before had
    assert all(set(ladder[i]) <= set(ladder[j]) for i, j in ((1, 2), (2, 4), (4, 7), (7, 8)))
    every = {variant_key(c) for name in ('decay', 'context', 'gqa', 'moe') for _, c in STUDIES[name].runs(base)}
    assert ({variant_key(c) for _, c in STUDIES['sources'].runs(base)} == every
            and len(STUDIES['sources'].runs(base)) == len(every))


def test_claims_compare_the_variants_that_they_speak_of():
    labels = {name: list(study.changes(scale_config('laptop'))) for name, study in STUDIES.items()}
    pairs = {c.id: _needed(labels[c.study], c.needs) for c in CLAIMS if c.needs}
    assert (pairs['decay-final-variance'] == ['λ=0', 'λ=0.1']
            and pairs['decay-final-variance-all'] == ['λ=0', 'λ=0.1, all'])
    assert (pairs['decay-val-loss-overshoot'] == ['λ=0.1', 'λ=1']
            and pairs['decay-val-loss-collapse-all'] == ['λ=1, all', 'λ=3, all'])
    assert pairs['context-final-variance'] == ['T=32, sequences fixed', 'T=512, sequences fixed']
    assert pairs['context-final-variance-tokens-fixed'] == ['T=32', 'T=512']
    assert (pairs['gqa-usefulness'] == ['G=1', 'G=4']
            and pairs['gqa-usefulness-matched'] == ['G=1', 'G=4, matched'])
    assert pairs['moe-causal-scale-matched'] == ['dense', 'gates scale-matched']
    assert pairs['remedies-causal-sparse-peri-ln'] == ['Peri-LN', 'Peri-LN, sparse']
    assert (pairs['ladder-accuracy-depth'] == ['L=4', 'L=8']
            and pairs['ladder-accuracy-recipe'] == ['L=8', '+ MoE'])
    assert (pairs['decay-val-loss-much-all'] == ['λ=0', 'λ=1, all']
            and pairs['gqa-causal-pairs'] == ['G=1', 'G=2']
            and pairs['training-causal-equal'] == ['L=2', 'L=8, 4× tokens'])
    assert (pairs['ladder-accuracy-decay-overshoot'] == ['+ λ=0.3', '(+ λ=0.6)']
            and pairs['ladder-accuracy-gqa'] == ['+ λ=0.3', '+ G=2'])
    paper = list(STUDIES['context'].changes(scale_config('paper')))
    needs = {c.id: c.needs for c in CLAIMS}
    assert _needed(paper, needs['context-growth']) == ['T=256, sequences fixed', 'T=8192, sequences fixed']
    assert _needed(paper, needs['context-growth-tokens-fixed']) == ['T=256', 'T=8192']
    desk = list(STUDIES['context'].changes(scale_config('desk')))
    assert (_needed(desk, needs['context-growth']) is None
            and _needed(desk, needs['context-growth-tokens-fixed']) == ['T=64', 'T=512'])


def test_a_diverged_variant_takes_its_seed_only_from_claims_that_need_it():
    base = scale_config('laptop')
    def record(changes, seed, value):
        return made_up(8, seed, val_loss=value) | {'config': vary(base, changes | {'seed': seed}).to_dict()}
    changes = STUDIES['decay'].changes(base)
    records = [record(c, seed, 4 - .1 * i + .01 * seed * i) for seed in range(3)
               for i, c in enumerate(changes.values())]
    gone = next(i for i, r in enumerate(records) if r['seed'] == 1
                and r['config']['train']['weight_decay'] > 30)
    records[gone] = ends_early(records[gone])
    rows = {r['id']: r for r in ledger(records, 'decay')}
    assert rows['decay-val-loss']['statistic']['n'] == 3 and not rows['decay-val-loss']['left_out']
    assert rows['decay-val-loss-collapse']['statistic']['n'] == 2
    assert rows['decay-val-loss-collapse']['left_out'] == ['λ=3, seed 1 (diverged)']
    assert 'without λ=3, seed 1 (diverged)' in _statistic_text(rows['decay-val-loss-collapse'])


def test_correlations_across_variants():
    base = scale_config('laptop')
    records = []
    for seed in range(3):
        for i, changes in enumerate(STUDIES['decay'].changes(base).values()):
            r = (made_up(8, seed, final_variance=2. ** i, causal=1 - .1 * i)
                 | {'config': vary(base, changes | {'seed': seed}).to_dict()})
            r['sparsity'] = dict(scalars=dict(density_attention=.1 * i,
                                              density_feed_forward=.1 * i + (i % 2) * .01 * seed), arrays={})
            records.append(r)
    rows = {(r['x'], r['y']): r for r in correlations('decay', records,
                                                      [('final_variance', 'causal'),
                                                       ('density', 'final_variance'),
                                                       ('val_loss', 'causal')])}
    assert (rows['final_variance', 'causal']['value'] == pytest.approx(-.999)
            and rows['density', 'final_variance']['value'] > .95)
    # all alike
    assert math.isnan(rows['val_loss', 'causal']['value']) and rows['val_loss', 'causal']['n'] == 0
    assert rows['density', 'final_variance']['variants'] == 9 and rows['density', 'final_variance']['n'] == 3


def test_metrics_by_name():
    r = made_up(4, 0,
                val_loss=4.) | {'sparsity': dict(scalars=dict(density_attention=.2, density_feed_forward=.6)),
                                      'cloze': {name: dict(value=v, low=.1, high=.9)
                                                for name, v in (('accuracy', .3),
                                                                ('accuracy_mutual_information', .4))},
                                      'lengths': {str(T): dict(val_loss=dict(value=T / 100, low=0, high=9))
                                                  for T in (32, 128, 512)}}
    value = lambda name: read_metric(r, name)['value']
    assert (value('density') == pytest.approx(.4) and value('density_attention') == .2
            and value('accuracy') == .4 and value('accuracy_plain') == .3)
    assert (value('perplexity') == pytest.approx(math.exp(4)) and value('val_loss@32') == .32
            and value('val_loss@common') == 1.28)
    assert (read_metric(r, 'val_loss@64') is None and read_metric(r, 'final_variance@32') is None
            and read_metric(made_up(4, 0), 'accuracy') is None)


SHORT = vary(SCALES['tiny'], {'train.steps': 4, 'score.n_bootstrap': 20, 'score.n_jacobian': 1,
                              'score.n_sequences': 8, 'score.n_fit': 8,
                              'score.batch_size': 8, 'n_eval': 16, 'n_questions': 8})
prepare_once = functools.cache(module.prepare)   # looks at all files of a source once, and not for every run


@pytest.mark.parametrize('name', STUDIES)
def test_every_study_runs_at_tiny_size(name, tmp_path_factory, monkeypatch):
    "Each variant trains for a few steps, is scored and measured, and lands in the ledger."
    monkeypatch.setattr(module, 'prepare', prepare_once)
    out = tmp_path_factory.getbasetemp() / 'every-study'            # studies share runs
    records = [run(config, out, progress=False) for _, config in STUDIES[name].runs(SHORT)]
    assert all(r['status'] == 'finished' and r['scores']['scalars'] and r['sparsity']['scalars']
               for r in records)
    if name not in ('depth', 'training'):
        assert all(set(r['config']['measures']) == set(_MEASURES) <= set(r) and len(r['lengths']) == 3
                   for r in records)
        assert all(r['cloze']['accuracy']['low'] <= r['cloze']['accuracy']['value'] for r in records)
    assert list(by_variant(name, records, SHORT)) == list(STUDIES[name].changes(SHORT))
    rows = ledger(records, name, SHORT)
    assert ({r['statistic']['n'] for r in rows if r['study']} <= {0, 1}
            and {r['direction'] for r in rows if r['study']} == ({'open'} if name in {c.study for c in CLAIMS}
                                                                 else set()))
    # after four steps
    assert all((r['verdict'] == 'untrained') == (r['floor']['of'] > 0) for r in rows if r['study'])
    assert all(r['ours'] for r in rows if r['study'])


def test_measures_are_added_to_a_finished_run_and_change_nothing_else(tmp_path):
    plain = run(SHORT, tmp_path, progress=False)
    more = run(vary(SHORT, {'measures': ('lengths', 'sample'), 'lengths': (16, 32)}), tmp_path,
               progress=False)
    kept = {k: v for k, v in more.items() if k not in ('lengths', 'sample', 'measured', 'config')}
    assert (kept == {k: v for k, v in plain.items() if k not in ('config', 'measured')}
            and set(more['lengths']) == {'16', '32'})
    assert (more['measured'].keys() == {'floors', 'lengths', 'sample'}
            and len(list((tmp_path / 'tiny').glob('*.json'))) == 1)
    own = more['lengths']['32']['val_loss']
    assert own['low'] <= own['value'] <= own['high'] and len(more['sample']['tokens']) == 24
    assert run(SHORT, tmp_path, progress=False) == more  # asking for less takes nothing away
    assert run_study(Study('one', '?', lambda base: {'only': {'measures': ('theory',)}}), SHORT, 1, tmp_path,
                     progress=False)[0]['theory']


@pytest.mark.parametrize('had, asked, missing', [
    ((32,), (32,), []), ((16, 32), (32,), []), ((32,), (16, 32), ['lengths']), ((16,), (32,), ['lengths']),
    ((), (32,), ['lengths'])])
def test_measurements_of_other_lengths_are_made_again(had, asked, missing):
    record = dict(status='finished', floors={}, config=dict(lengths=had), lengths={str(T): {} for T in had})
    config = vary(SHORT, {'measures': ('lengths',), 'lengths': asked})
    assert module._missing_measures(record, config) == missing
    assert module._missing_measures(record | dict(status='diverged'), config) == []


@pytest.mark.parametrize('had, missing', [({}, []), ({'n_questions': SHORT.n_questions}, []),
                                          ({'n_questions': SHORT.n_questions + 1}, ['cloze'])])
def test_another_number_of_questions_is_asked_again(had, missing):
    assert module._missing_measures(dict(status='finished', floors={}, config=had, cloze={}),
                                    vary(SHORT, {'measures': ('cloze',)})) == missing


def test_a_record_says_how_its_model_was_trained_and_not_how_it_is_asked_for(tmp_path):
    first = run(vary(SHORT, {'train.micro_batch_tokens': 64}), tmp_path, progress=False)
    (tmp_path / 'tiny' / f"{first['name']}.json").unlink()
    again = run(vary(SHORT, {'train.micro_batch_tokens': 128}), tmp_path, progress=False)
    assert again['config']['train']['micro_batch_tokens'] == 64 and again['scores'] == first['scores']
    assert again['provenance']['trained_date'] == first['provenance']['trained_date']


@pytest.mark.parametrize('change', [{'measures': ('nonsense',)}, {'lengths': (0,)}, {'n_questions': 0}])
def test_bad_measures_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))): vary(SHORT, change)


def test_costs_without_block_1_are_means_of_the_others():
    record = dict(scores=dict(arrays=dict(linear_loss_increase=[90., 1, 2, 6], skip_loss_increase=[7., -1])))
    cost = lambda name, r=record: read_metric(r, f'{name}_loss_increase_without_block_1')
    assert cost('linear') == dict(value=3., low=3., high=3.) and cost('skip')['value'] == -1
    assert cost('linear', dict(scores=dict(arrays={}))) is None and cost('skip', {}) is None
    for r in load_results(ROOT / 'results', 'desk', 'gqa'):   # the mean of all blocks is what the record has
        costs = r['scores']['arrays']['skip_loss_increase']
        whole = (costs[0] + (len(costs) - 1) * cost('skip', r)['value']) / len(costs)
        assert whole == pytest.approx(read_metric(r, 'skip_loss_increase')['value'], rel=1e-4)


def test_a_commit_is_kept_where_git_cannot_say_whether_the_tree_is_clean(monkeypatch):
    import subprocess
    asked = subprocess.run
    def slow(command, **options):
        if 'status' in command: raise subprocess.TimeoutExpired(command, 20)
        return asked(command, **options)
    known = module.code_state()
    monkeypatch.setattr(subprocess, 'run', slow)
    assert module.code_state() == known | dict(dirty=None)
