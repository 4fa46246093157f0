"The command line: help, mistakes, and every command at the smallest scale."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pandas
import pytest
import torch

import sparsecod
from sparsecod import cli
from sparsecod.cli import _MINUTES, _SCALE_NAMES, _SHORT, _SPARSITY, main, parser, _setting
from sparsecod.core import ModelConfig, Transformer
from sparsecod.integrity import stamp, write_text
from sparsecod.studies import MAIN, _PILOTS, SCALES, STUDIES, RunConfig, by_variant, load_results, read_run

ROOT = Path(__file__).resolve().parents[1]
QUICK = '--quiet --set train.steps=6 --set score.n_bootstrap=20 --set n_eval=8 --set score.n_fit=4'
COMMANDS = ('train', 'score', 'compare', 'prune', 'eval', 'export', 'study', 'plan', 'reproduce', 'report',
            'lab')


@pytest.fixture
def type_in(capsys):
    "Type a command; get its exit code, output and error output."
    def typed(line):
        capsys.readouterr()
        try: code = main(line.split())
        except SystemExit as stop: code = stop.code
        return code, *capsys.readouterr()
    return typed


def process(line: str) -> subprocess.Popen:
    "A command in a process of its own."
    code = f'import sys; sys.path.insert(0, {str(ROOT)!r}); from sparsecod.cli import main; sys.exit(main())'
    # a shell tells its background jobs to ignore it
    hears_ctrl_c = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, '-c', code, *line.split()], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True,
                            preexec_fn=hears_ctrl_c, encoding='utf-8')


# ---- help and mistakes

def test_every_option_says_what_it_is_for():
    for command, sub in parser()._subparsers._group_actions[0].choices.items():
        assert command in COMMANDS and sub.description
        for action in sub._actions:
            assert action.help, (command, action.dest)
            assert not action.option_strings or '-h' in action.option_strings or '(default: ' in action.help, (command, action.dest)
            assert 'None' not in action.help, (command, action.dest)


def test_help_names_what_there_is(type_in):
    assert set(re.findall(r'\w+', _SCALE_NAMES)) - {'or'} == set(SCALES)
    code, text, _ = type_in('--help')
    assert code == 0 and all(command in text for command in COMMANDS)
    config = SCALES['laptop'].to_dict()
    for path, _, _ in (_SHORT | _SPARSITY).values():
        part, _, name = path.rpartition('.')
        assert name in (config[part] if part else config)


def test_help_says_what_studies_ask_and_how_long_they_take(type_in):
    studies, records = STUDIES | dict(main=MAIN, pilots=_PILOTS), load_results(ROOT / 'results', 'laptop')
    assert set(_MINUTES) <= set(studies)
    whole = {name for name, study in studies.items()
             if len(by_variant(study, records)) == len(study.changes(SCALES['laptop']))}
    assert whole == set(_MINUTES)  # said of what is recorded, and of nothing else
    for name, minutes in _MINUTES.items():
        groups = by_variant(studies[name], records).values()
        assert .6 < sum(sum(sum(r['seconds'].values()) for r in g) / len(g)
                        for g in groups) / 60 / minutes < 1.6, name
    for command in ('study', 'reproduce', 'plan'):
        said = re.findall(r'^  (\w+) +([\d-]+)  (.+)$', type_in(f'{command} --help')[1], re.MULTILINE)
        assert {name: (minutes, question) for name, minutes, question in said} == {
            name: (str(_MINUTES.get(name, '-')), study.question) for name, study in studies.items()}


def test_every_source_of_sparsity_has_options(type_in, tmp_path):
    options = ('--weight-decay 0.5 --decays all --context 64 --kv-heads 2 --experts 8 --experts-per-token 2 '
               '--gates renormalised')
    config = RunConfig.from_json(type_in(f'train {tmp_path} --scale laptop {options} --show')[1])
    m, t = config.model, config.train
    assert (t.weight_decay, t.decay_groups, m.context_length, m.n_kv_heads, m.n_experts, m.experts_per_token,
            m.gates) == (.5, 'all', 64, 2, 8, 2, 'renormalised')
    assert len(_SPARSITY) == len(options.split()) / 2
    for option, value in (('--experts-per-token', '9'), ('--gates', 'open'), ('--kv-heads', '3'),
                          ('--decays', 'some')):
        code, text, errors = type_in(f'train {tmp_path} --scale laptop --experts 8 {option} {value} --show')
        assert code == 2 and text == '' and f'{option}: ' in errors, errors


def test_lab(type_in, monkeypatch, tmp_path):
    begun = []
    monkeypatch.setattr(os, 'execv', lambda program, arguments: begun.append(arguments))
    monkeypatch.chdir(ROOT / 'nbs')
    type_in('lab -- --no-browser --port 9000')
    type_in('lab --page nbs/reproduce/02_weight_decay.ipynb')
    assert ([a[1:3] for a in begun] == [['-m', 'jupyterlab']] * 2
            and begun[0][-3:] == ['--no-browser', '--port', '9000'])
    assert (all(f'--ServerApp.root_dir={ROOT}' in a for a in begun)
            and begun[1][-1].endswith('/lab/tree/nbs/reproduce/02_weight_decay.ipynb'))
    assert all((ROOT / a[4].split('/lab/tree/')[1]).is_file() for a in begun)
    code, _, errors = type_in('lab --page nowhere.ipynb')
    assert code == 2 and '--page nowhere.ipynb' in errors and errors.count('\n') == 1
    monkeypatch.chdir(tmp_path)
    code, _, errors = type_in('lab')
    assert code == 2 and 'clone' in errors and errors.count('\n') == 1
    monkeypatch.setattr(cli, 'find_spec', lambda name: None)
    code, _, errors = type_in('lab')
    assert code == 2 and 'pip install' in errors and errors.count('\n') == 1 and len(begun) == 2


def test_nothing_heavy_is_imported_for_help():
    code = ("import sys; from sparsecod.cli import main\ntry: main(['reproduce', '--help'])\nexcept "
            "SystemExit: pass\n"
            "print(*sys.modules)")
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True,
                          encoding='utf-8')
    assert not {'torch', 'numpy', 'scipy', 'matplotlib', 'tqdm'} & set(done.stdout.split())


def test_version(type_in): assert type_in('--version')[:2] == (0, f'sparsecod {sparsecod.__version__}\n')


@pytest.mark.parametrize('line, says', [
    ('', 'required: COMMAND'), ('fly', "invalid choice: 'fly'"), ('study', 'required: study'),
    ('study width', "study='width' must be one of depth"),
    ('study depth --scale huge', "scale='huge' must be one of"),
    ('study depth --seeds 0', "'0' must be a positive whole number"),
    ('study depth --jobs x', "'x' must be a positive whole number"),
    ('reproduce --study width', "study='width'"), ('report --scale huge', "scale='huge'"),
    ('train DIR --set train.lr', 'must have the form FIELD=VALUE'),
    ('train DIR --set train.rate=1', 'there is no field train.rate=1'),
    ('train DIR --layers 0', 'n_layers=0 must be positive'),
    ('train DIR --lr fast', "invalid float value: 'fast'"),
    ('train DIR --heads 5', 'n_heads=5 must divide d_model=64'),
    ('train DIR --data /no/such/file', "source='/no/such/file' is not a file"),
    ('train DIR --set n_kv_heads=1', 'did you mean model.n_kv_heads'),
    ('train DIR --set model.layers=3', 'model.n_layers'), ('train DIR --set data.vocab=9', 'data.vocab_size'),
    ('train DIR --set train.weightdecay=1', 'train.weight_decay'),
    ('train DIR --set nlayers=1', 'model.n_layers'), ('train DIR --set train.whatever=1', 'train.lr'),
    ('train DIR --set lr=1', 'did you mean train.lr'),
    ('train DIR --heads 5', '--heads: '), ('train DIR --layers 0', '--layers: '),
    ('train DIR --width 65 --heads 4', '--heads: '),
    ('train DIR --set model.n_layers=many', '--set model.n_layers: '),
    ('train DIR --set data.val_share=2', '--set data.val_share: '),
    ('train DIR --set train.lr=null', '--set train.lr: '), ('train DIR --set seed=[1]', '--set seed: '),
    ('train /dev/null/x', '/dev/null'), ('score DIR --json /', '--json: '),
    ('score DIR --json DIR/x.html', 'must end in .json'),
    ('score DIR --seed -1', "'-1' must be a whole number"), ('score DIR --seed ²', 'must be a whole number'),
    ('score DIR --seed 1' + '0' * 30, 'must be a whole number'),
    ('study depth --scale tiny --out /dev/null', '/dev/null'),
    ('reproduce --scale tiny --work /dev/null', '/dev/null'),
    ('score DIR', 'is no folder here'), ('eval DIR', 'is no folder here'), ('export DIR', 'required: out'),
    ('score DIR --memory none', 'must be a positive number of gigabytes'),
    ('score DIR --jacobian-probes -1', "'-1' must be a whole number, 0 or more"),
    ('score DIR --jacobian-probes x', "'x' must be a whole number, 0 or more"),
    ('eval DIR --limit 0', "'0' must be a positive whole number"),
    ('eval DIR --tasks cloze,,piqa', "'cloze,,piqa' must be names of tasks"),
    ('report --results DIR', 'there are no records in')])
def test_mistakes_get_one_line(type_in, line, says, tmp_path):
    code, text, errors = type_in(line.replace('DIR', str(tmp_path / 'new')))
    assert (code == 2 and text == '' and says in errors and errors.startswith('sparsecod')
            and errors.count('\n') == 1)


def test_debug_shows_where(type_in, tmp_path):
    with pytest.raises(ValueError): main(['score', str(tmp_path), '--debug'])


def test_errors_of_ours_get_one_line_too(type_in, monkeypatch):
    import sparsecod.studies
    def broken(*args): raise KeyError('oops')
    monkeypatch.setattr(sparsecod.studies, 'read_records', broken)
    assert type_in('report') == (1, '', "sparsecod: KeyError: 'oops' (--debug shows where)\n")


def test_settings():
    assert [_setting(f'a.b={v}')[1] for v in ('3', '1e-3', 'true', 'null', 'None', 'text', '"3"',
                                             'a=b')] == [3, 1e-3, True, None, None, 'text', '3', 'a=b']


def test_a_terminal_that_lacks_letters_kills_no_command(tmp_path):
    code = ('from sparsecod.cli import main; import sparsecod.cli as cli\n'
            'def show(args): print("λ = 0.1, η/3, …"); raise ValueError("é")\n'
            'cli._COMMANDS["report"] = (show, *cli._COMMANDS["report"][1:])\nraise SystemExit(main(["report"]))')
    for encoding in ('ascii', 'cp1252', 'cp437', 'utf-8'):
        done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True,
                              env=os.environ | dict(PYTHONIOENCODING=encoding))
        shown = done.stdout.decode(encoding)
        assert done.returncode == 2 and '= 0.1' in shown and ('λ' in shown) == (
            encoding == 'utf-8') and b'Traceback' not in done.stderr, done.stderr


@pytest.mark.parametrize('line', ['study depth', 'plan depth', 'reproduce', 'report', 'score x', 'prune x y',
                                  'eval x', 'export x y'])
def test_a_launcher_starts_no_command_but_train(line, type_in, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    code, text, errors = type_in(line)
    assert code == 2 and text == '' and 'WORLD_SIZE=2' in errors and errors.count('\n') == 1


@pytest.mark.parametrize('error, says', [
    (PermissionError(13, 'Permission denied', '/a/b'), '/a/b: Permission denied'),
    (OSError(28, 'No space left on device'), 'No space left on device'),
    (FileNotFoundError('what was said'), 'what was said'),
    (ValueError('field=1 is wrong'), 'field=1 is wrong')])
def test_errors_of_the_system_name_the_file(error, says):
    from sparsecod.cli import _failure
    assert _failure(error) == (2, says)


# ---- commands

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "The folder of a training."
    folder = tmp_path_factory.mktemp('trained')
    assert main(f'train {folder} --scale tiny --layers 2 --lr 0.02 --seed 3 --set model.n_kv_heads=1 '
                f'{QUICK}'.split()) == 0
    return folder


def test_train(trained, type_in):
    config = read_run(trained)
    assert (config.model.n_layers, config.model.n_kv_heads, config.train.lr, config.train.steps,
            config.seed) == (2, 1, .02, 6, 3)
    model = Transformer.from_pretrained(trained / 'model')
    assert model.config == config.model
    again = type_in(
        f'train {trained} --scale tiny --layers 2 --lr 0.02 --seed 3 --set model.n_kv_heads=1 {QUICK}')
    assert again[0] == 0 and 'finished at step 6 of 6' in again[1] and 'held-out loss' in again[1]
    other = type_in(f'train {trained} --scale tiny --layers 3 {QUICK}')
    assert other[0] == 2 and 'holds another run' in other[2] and '--restart' in other[2]


def test_show_trains_nothing(type_in, tmp_path):
    code, text, _ = type_in(f'train {tmp_path}/new --scale paper --steps 5 --set train.warmup_steps=1 --show')
    config = RunConfig.from_json(text)
    assert (code == 0 and config.train.steps == 5 and config.model == SCALES['paper'].model
            and not (tmp_path / 'new').exists())


def test_too_little_text_is_said_before_the_training(type_in, tmp_path):
    for option, field in (('score.n_fit=100000', 'score.n_fit=100000'),
                          ('score.n_sequences=50000', 'score.n_sequences=50000'),
                          ('score.n_fit=1', 'score.n_fit=1')):
        code, text, errors = type_in(f'train {tmp_path}/new --scale tiny --set {option} --quiet')
        assert code == 2 and field in errors and errors.count('\n') == 1 and not (
            tmp_path / 'new').exists(), errors


def test_a_full_disk_is_said_before_the_training(type_in, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage',
                        lambda path: shutil._ntuple_diskusage(2 ** 40, 2 ** 40 - 2 ** 12, 2 ** 12))
    code, text, errors = type_in(f'train {tmp_path}/new --scale tiny --quiet')
    assert (code == 2 and str(tmp_path / 'new') in errors and 'GB free' in errors
            and not (tmp_path / 'new').exists())


def test_a_training_that_diverges_says_so(type_in, tmp_path):
    code, text, _ = type_in(
        f'train {tmp_path} --scale tiny --layers 2 --lr 300 --set train.warmup_steps=0 --quiet')
    assert code == 1 and text.startswith('diverged at step')


def test_score(trained, type_in, tmp_path):
    code, text, errors = type_in(f'score {trained} --sequences 4 --quiet')
    assert code == 0 and errors == '' and 'permutation' in text
    scores = json.loads((trained / 'scores.json').read_text(encoding='utf-8'))
    assert set(scores['scalars']) >= {'causal', 'usefulness'} and len(scores['arrays']['causal']) == 2
    assert scores['config']['score']['n_sequences'] == 4 and scores['config']['model']['n_layers'] == 2
    text_file = tmp_path / 'own.txt'
    text_file.write_text('\n'.join(f'def number_{i}(): return {i * i}' for i in range(20000)),
                         encoding='utf-8')
    code, _, errors = type_in(
        f'score {trained} --sequences 4 --data {text_file} --json {tmp_path}/own.json --quiet')
    assert code == 0, errors
    own = json.loads((tmp_path / 'own.json').read_text(encoding='utf-8'))
    assert (own['corpus'] != scores['corpus']
            and own['config']['data']['tokenizer'] == str(trained / 'tokenizer.json'))


def test_score_a_model_without_a_training(type_in, tmp_path):
    Transformer(ModelConfig(vocab_size=300, n_layers=2, d_model=16, n_heads=2,
                            context_length=16)).save_pretrained(tmp_path / 'bare')
    (tmp_path / 'texts').mkdir()
    for i in range(40):
        (tmp_path / 'texts' / f'{i}.txt').write_text(' '.join(f'word{(i * k) % 97}' for k in range(1, 400)),
                                                     encoding='utf-8')
    code, text, errors = type_in(
        f"score {tmp_path / 'bare'} --data {tmp_path / 'texts'} --sequences 4 --fit 8 --quiet")
    assert code == 0 and 'usefulness' in text, errors
    Transformer(ModelConfig(vocab_size=290, n_layers=2, d_model=16, n_heads=2,
                            context_length=16)).save_pretrained(tmp_path / 'bare')
    config = json.loads((tmp_path / 'bare' / 'scores.json').read_text(encoding='utf-8'))['config']
    write_text(tmp_path / 'bare' / 'run.json', json.dumps(stamp(config)))
    code, _, errors = type_in(f"score {tmp_path / 'bare'} --quiet")
    assert code == 2 and 'run.json' in errors and 'vocab_size' in errors  # the label of another model
    write_text(tmp_path / 'bare' / 'run.json',
               json.dumps(stamp(config | dict(model=config['model'] | dict(vocab_size=290)))))
    code, _, errors = type_in(f"score {tmp_path / 'bare'} --quiet")
    assert code == 2 and 'the model knows 290' in errors


def test_a_model_is_scored_with_the_tokenizer_beside_it(trained, type_in, tmp_path):
    assert type_in(f'export {trained} {tmp_path}/export --format sparsecod --quiet')[0] == 0
    unlabelled = shutil.copytree(trained, tmp_path / 'run')
    (unlabelled / 'run.json').unlink()
    text, losses = tmp_path / 'text.txt', []
    text.write_text(' '.join(f'word{i * i % 997}' for i in range(5000)), encoding='utf-8')
    for folder in (trained, tmp_path / 'export', unlabelled, unlabelled / 'model'):
        code, _, errors = type_in(
            f'score {folder} --data {text} --sequences 4 --fit 8 --json {tmp_path}/x.json --quiet')
        assert code == 0 and errors == '', errors
        found = json.loads((tmp_path / 'x.json').read_text(encoding='utf-8'))
        assert Path(found['config']['data']['tokenizer']).samefile((unlabelled if folder.name == 'model'
                                                                    else folder) / 'tokenizer.json')
        losses.append(found['scalars']['loss']['value'])
    assert losses[1:] == losses[:1] * 3


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    "A stock checkpoint with its tokenizer."
    from sparsecod.data import DataConfig, prepare
    from sparsecod.exchange import export_model
    tokenizer = prepare(DataConfig(vocab_size=512, max_documents=80), progress=False).tokenizer
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, n_layers=3, d_model=16, n_heads=2,
                                    context_length=32))
    return export_model(model, tmp_path_factory.mktemp('stock') / 'model', tokenizer)


def test_score_a_stock_checkpoint(checkpoint, type_in, tmp_path):
    texts = tmp_path / 'texts'
    texts.mkdir()
    for i in range(60):
        (texts / f'{i}.txt').write_text(' '.join(f'word{(i * k) % 97}' for k in range(1, 300)),
                                        encoding='utf-8')
    line = f'score {checkpoint} --data {texts} --sequences 4 --fit 8 --json {tmp_path}/out/own.json --quiet'
    code, text, errors = type_in(line)
    assert code == 0 and errors == '' and 'permutation' in text, errors
    found = json.loads((tmp_path / 'out' / 'own.json').read_text(encoding='utf-8'))
    assert (found['architecture'] == 'LlamaForCausalLM' and found['settings']['T'] == 32
            and len(found['arrays']['causal']) == 3)
    assert ((tmp_path / 'out' / 'own.html').read_text(encoding='utf-8').startswith('<!')
            and not (tmp_path / 'out' / 'own.parts').exists())
    assert type_in(line + ' --memory 1')[0] == 0
    again = json.loads((tmp_path / 'out' / 'own.json').read_text(encoding='utf-8'))
    assert again['scalars']['causal'] == pytest.approx(found['scalars']['causal'], rel=1e-5)


@pytest.mark.parametrize('option, says', [('--length 33', 'context length of the model, 32'),
                                          ('--data NOWHERE', 'NOWHERE'), ('--memory 1e-6', 'memory')])
def test_what_a_stock_checkpoint_cannot_do_is_said(checkpoint, option, says, type_in, tmp_path):
    code, _, errors = type_in(
        f'score {checkpoint} {option} --sequences 4 --fit 8 --json {tmp_path}/x.json --quiet')
    assert (code == 2 and says in errors and len(errors.strip().splitlines()) == 1
            and not (tmp_path / 'x.json').exists())


def test_what_a_stopped_scoring_left_is_used(checkpoint, type_in, tmp_path, monkeypatch):
    line = f'score {checkpoint} --sequences 4 --fit 8 --json {tmp_path}/x.json --quiet'
    import sparsecod.scores as scores
    whole = scores._measured_jacobians
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(scores, '_measured_jacobians', stop)
    code, _, errors = type_in(line)
    assert (code == 130 and list((tmp_path / 'x.parts').glob('*.safetensors'))
            and not (tmp_path / 'x.json').exists())
    monkeypatch.setattr(scores, '_measured_jacobians', whole)
    code, _, errors = type_in(line.replace('--fit 8', '--fit 9'))
    assert code == 2 and 'another measurement' in errors and '--force discards them' in errors
    assert type_in(line.replace('--fit 8', '--fit 9') + ' --force')[0] == 0
    (tmp_path / 'x.json').unlink()
    assert type_in(line)[0] == 0 and (tmp_path / 'x.json').exists() and not (tmp_path / 'x.parts').exists()


SCORE_FAST = '--sequences 4 --fit 30 --length 16'


def test_rounded_weights_some_pairs_and_a_table(checkpoint, type_in, tmp_path):
    for name, line in dict(plain='', rounded='--dtype bfloat16 --csv --losses', all='--pairs 3').items():
        code, text, errors = type_in(f'score {checkpoint} {SCORE_FAST} {line} --json {tmp_path}/{name}.json')
        assert code == 0 and 'time for all' in errors, errors
    plain, rounded, every = (json.loads((tmp_path / f'{name}.json').read_text(encoding='utf-8'))
                             for name in ('plain', 'rounded', 'all'))
    assert every['scalars'] == plain['scalars'] and every['settings']['pairs'] == 3
    assert rounded['config']['dtype'] == 'bfloat16' and rounded['scalars']['loss'] != plain['scalars']['loss']
    assert rounded['scalars']['loss']['value'] == pytest.approx(plain['scalars']['loss']['value'], rel=1e-2)
    rows = (tmp_path / 'rounded.csv').read_text(encoding='utf-8').splitlines()
    assert (rows[0].startswith('score,block')
            and f"loss,,,{rounded['scalars']['loss']['value']}" in '\n'.join(rows)
            and not (tmp_path / 'plain.csv').exists())
    losses = pandas.read_csv(tmp_path / 'rounded.losses.csv')
    assert (len(losses) == 4 * 16
            and losses.loss.mean() == pytest.approx(rounded['scalars']['loss']['value'], rel=1e-5))
    assert (len(plain['arrays']['block_influence']) == 3 and 'influence_rank_agreement' in plain['scalars']
            and not (tmp_path / 'plain.losses.csv').exists())
    code, _, errors = type_in(f'score {checkpoint} {SCORE_FAST} --pairs 1 --quiet --json {tmp_path}/x.json')
    assert code == 2 and 'pairs=1' in errors and not (tmp_path / 'x.json').exists()


def test_prune(checkpoint, trained, type_in, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    for name, model in dict(stock=checkpoint, ours=trained).items():
        code, text, errors = type_in(
            f'prune {model} {tmp_path}/{name} --sequences 4 --choose 4 --length 16 --blocks 1 --quiet')
        assert code == 0 and errors == '', errors
        record = json.loads((tmp_path / name / 'pruning.json').read_text(encoding='utf-8'))
        small = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert (len(record['removed']) == 1 and small.config.num_hidden_layers == record['n_layers'] - 1
                and len(record['random']['losses']) == 10)
        assert (f"{record['loss']['after']['value']:.4f}" in text
                and AutoTokenizer.from_pretrained(tmp_path / name)('word')['input_ids'])
        assert type_in(f'score {tmp_path}/{name} {SCORE_FAST} --json {tmp_path}/x.json --quiet')[0] == 0


def test_prune_refuses_before_work_and_needs_no_interval(checkpoint, type_in, tmp_path):
    (tmp_path / 'file').write_text('text', encoding='utf-8')
    for line, word in ((f'{tmp_path}/small', '--blocks'), (f'{tmp_path}/file/small --blocks 1', 'file'),
                       ('/proc/small --blocks 1', '/proc')):
        code, text, errors = type_in(f'prune {checkpoint} {line} --sequences 4 --choose 4 --length 16')
        assert code == 2 and text == '' and word in errors and 'draft' not in errors, errors
    code, text, errors = type_in(
        f'prune {checkpoint} {tmp_path}/one --sequences 1 --choose 2 --length 16 --blocks 1 --quiet')
    assert code == 0 and (tmp_path / 'one' / 'pruning.json').is_file(), errors


def test_compare(checkpoint, trained, type_in, tmp_path):
    "Two checkpoints of one training, and two models of different text, in one call each."
    for name, model in dict(one=f'{trained} --sequences 4', two=f'{trained} --sequences 4 --dtype bfloat16',
                            other=f'{checkpoint} {SCORE_FAST}').items():
        assert type_in(f'score {model} --json {tmp_path}/{name}.json --jacobian-probes 2 --quiet')[0] == 0
    code, text, errors = type_in(
        f'compare {tmp_path}/one.json {tmp_path}/two.json --out {tmp_path}/c.html --csv')
    loss = [json.loads((tmp_path / f'{name}.json').read_text(encoding='utf-8'))['scalars']['loss']['value']
            for name in ('one', 'two')]
    table = pandas.read_csv(tmp_path / 'c.csv')
    assert (code == 0 and errors == '' and 'different text' not in text
            and (tmp_path / 'c.html').stat().st_size > 800_000)
    assert table[table.score == 'loss'].difference.item() == pytest.approx(loss[1] - loss[0], abs=1e-9)
    assert 'different text' in type_in(
        f'compare {tmp_path}/one.json {tmp_path}/other.json --out {tmp_path}/c.html')[1]
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / 'page.json').write_text('<html>', encoding='utf-8')
    for line, says in (('one.json page.json', 'page.json'), ('nothing.json one.json', 'nothing.json'),
                       ('one.json two.json --out DIR/two.json', '--out'),
                       ('one.json two.json --out DIR/one.json/c.html', '--out'), ('one.json', 'B.json')):
        line = ' '.join(part if part == '--out' else f'{tmp_path}/{part}'
                        for part in line.replace('DIR/', '').split())
        code, text, errors = type_in(f'compare {line}')
        assert code == 2 and text == '' and says in errors and errors.count('\n') == 1
    assert before.items() <= {file.name: file.read_bytes() for file in tmp_path.iterdir()}.items()


@pytest.mark.parametrize('options, says', [
    ('--blocks 3', '--blocks: blocks=3'), ('--spans 2-9', '--spans: spans='), ('--spans 1-3', 'all 3 blocks'),
    ('--budget 0', 'budget='), ('--budget 0.01', 'budget='), ('', '--blocks N'),
    ('--blocks 1 --by age', "--by: by='age'"), ('--blocks 1 --length 99', '--length 99'),
    ('--blocks 0', 'positive whole number'), ('--blocks 1 OUT', 'exists')])
def test_what_cannot_be_pruned_is_said(checkpoint, type_in, tmp_path, options, says):
    out = tmp_path / 'small'
    if 'OUT' in options: out.mkdir()
    code, text, errors = type_in(
        f"prune {checkpoint} {out} --sequences 4 --choose 4 --quiet {options.replace('OUT', '')}")
    assert (code == 2 and text == '' and says in errors and errors.count('\n') == 1
            and sorted(tmp_path.iterdir()) == [out] * ('OUT' in options))


def test_a_file_of_scores_satisfies_its_schema(checkpoint, trained, type_in, tmp_path):
    schema = json.loads((Path(sparsecod.__file__).parent / 'scores.schema.json').read_text(encoding='utf-8'))
    check = jsonschema.Draft202012Validator(schema)
    check.check_schema(schema)
    for name, line in dict(stock=f'{checkpoint} {SCORE_FAST} --as-published',
                           ours=f'{trained} --sequences 4 --jacobian-probes 4').items():
        assert type_in(f'score {line} --json {tmp_path}/{name}.json --quiet')[0] == 0
        found = json.loads((tmp_path / f'{name}.json').read_text(encoding='utf-8'))
        check.validate(found)
        assert found['$schema'] == schema['$id'] and found['format'] == 2
        assert (set(found) <= set(schema['properties'])
                and all(entry.get('description') or entry.get('properties')
                        for entry in schema['properties'].values()))
        assert found['intervals']['permutation']['low'][0][1] <= found['arrays']['permutation'][0][1] <= found['intervals']['permutation']['high'][0][1]
        assert not check.is_valid(found | dict(format=1)) and not check.is_valid(found | dict(sparsity=1))
        assert ('usefulness_as_published' in found['scalars'],
                found['settings']['jacobian_probes']) == ((True, 0) if name == 'stock' else (False, 4))


def test_a_bound_is_kept_and_said(checkpoint, type_in, tmp_path):
    line = f'score {checkpoint} {SCORE_FAST} --json {tmp_path}/x.json'
    code, text, errors = type_in(line)
    found = json.loads((tmp_path / 'x.json').read_text(encoding='utf-8'))
    assert code == 0 and 'working memory beside the model: at most 4 GB (one sequence at a time takes' in errors and found['memory'] == 4 * 2**30, errors
    code, text, errors = type_in(line + ' --memory 0.01 --quiet')
    held = json.loads((tmp_path / 'x.json').read_text(encoding='utf-8'))
    assert (code == 0 and held['memory'] == int(.01 * 2**30) and errors == ''
            and held['sparsity']['scalars'] == pytest.approx(found['sparsity']['scalars']))


def test_sparsity_is_left_out_if_it_does_not_fit(checkpoint, type_in, tmp_path, monkeypatch):
    import sparsecod.sparsity
    monkeypatch.setattr(sparsecod.sparsity, 'sparsity_bytes', lambda model, T: 2**40)
    code, text, errors = type_in(f'score {checkpoint} {SCORE_FAST} --json {tmp_path}/x.json --quiet')
    assert (code == 0 and 'sparsity was not measured: it takes 1e+03 GB' in text
            and json.loads((tmp_path / 'x.json').read_text(encoding='utf-8'))['sparsity'] is None)


@pytest.mark.parametrize('error, code', [(KeyboardInterrupt(), 130), (RuntimeError('out of memory'), 1),
                                         (ValueError('no maps'), 0)])
def test_scores_are_written_before_sparsity_is_measured(checkpoint, type_in, tmp_path, monkeypatch, error,
                                                        code):
    import sparsecod.sparsity
    def stop(*_): raise error
    line = f'score {checkpoint} {SCORE_FAST} --json {tmp_path}/x.json --quiet'
    with monkeypatch.context() as patched:
        patched.setattr(sparsecod.sparsity, 'measure_sparsity', stop)
        assert type_in(line)[0] == code
    found = json.loads((tmp_path / 'x.json').read_text(encoding='utf-8'))
    assert (found['sparsity'] is None and found['scalars']['causal']['value'] > 0
            and (tmp_path / 'x.html').exists())
    assert (tmp_path / 'x.parts').exists() == bool(code)
    assert (type_in(line)[0] == 0 and json.loads((tmp_path / 'x.json').read_text(encoding='utf-8'))
            | dict(sparsity=None) == found)
    assert not list(tmp_path.glob('*.parts')) and not list(tmp_path.glob('*.new'))


def test_one_short_text_is_enough_or_it_is_said_how_much_is(checkpoint, trained, type_in, tmp_path):
    "A single file below 16 KB is one document: it is not split into a side to train on and one to hold out."
    path = tmp_path / 'short.txt'
    path.write_text(' '.join(f'word{(i * i) % 97}' for i in range(600)), encoding='utf-8')
    for model in (checkpoint, trained):
        line = (f'score {model} --data {path} --sequences 4 --fit 20 --length 16 --json {tmp_path}/x.json '
                f'--quiet')
        code, text, errors = type_in(line)
        assert code == 0 and errors == '', errors
        found = json.loads((tmp_path / 'x.json').read_text(encoding='utf-8'))
        assert (found['held_out'] == 'all of the text' and found['settings']['n_sequences'] == 4
                and found['settings']['T'] == 16)
    path.write_text('too short by far', encoding='utf-8')
    code, text, errors = type_in(line)
    assert (code == 2
            and re.search(r'the text has \d+ tokens; to score 4 sequences of 16 tokens and to fit affine '
                          r'maps on 20 others takes 385 tokens, about \d+ kB', errors))


def test_the_choice_of_sequences_follows_the_seed(trained, checkpoint, type_in, tmp_path):
    def corpus_of(line):
        code, _, errors = type_in(f'score {line} --json {tmp_path}/x.json --quiet')
        assert code == 0, errors
        found = json.loads((tmp_path / 'x.json').read_text(encoding='utf-8'))
        return found['scalars']['loss']['value'], found['config']['score']['seed']
    text = tmp_path / 'text.txt'
    text.write_text(' '.join(f'word{(i * i) % 997}' for i in range(5000)), encoding='utf-8')
    for line in (f'{trained} --sequences 4', f'{checkpoint} {SCORE_FAST} --data {text}'):
        (loss, seed), (same, _), (other,
                                  chosen) = corpus_of(line), corpus_of(line + ' --seed 0'), corpus_of(
                                      line + ' --seed 5')
        assert (seed, chosen) == (0, 5) and loss == same != other


def test_rows_of_text_are_read_by_the_name_of_their_field(checkpoint, trained, type_in, tmp_path):
    rows = tmp_path / 'rows.jsonl'
    rows.write_text('\n'.join(json.dumps(dict(id=i, body=' '.join(f'word{(i * k) % 97}' for k in range(300))))
                              for i in range(40)), encoding='utf-8')
    for model in (checkpoint, trained):
        line = f'score {model} --data {rows} --sequences 4 --fit 20 --json {tmp_path}/x.json --quiet'
        code, _, errors = type_in(line)
        assert code == 2 and "text_field='text'" in errors and 'body' in errors
        assert type_in(f'{line} --text-field body')[0] == 0


def test_a_field_is_refused_where_text_has_no_rows(checkpoint, trained, type_in, tmp_path):
    plain, folder = tmp_path / 'plain.txt', tmp_path / 'folder'
    plain.write_text(' '.join(f'word{(i * i) % 97}' for i in range(3000)), encoding='utf-8')
    folder.mkdir()
    (folder / 'a.md').write_text(plain.read_text(encoding='utf-8'), encoding='utf-8')
    for model in (checkpoint, trained):
        for text in (f'--data {plain}', f'--data {folder}', f'--data {tmp_path}/*.txt', '--data stdlib', ''):
            code, _, errors = type_in(
                f'score {model} {text} --text-field body --json {tmp_path}/x.json --quiet')
            assert code == 2 and '--text-field body' in errors and not (tmp_path / 'x.json').exists(), (
                text, errors)
    (folder / 'b.jsonl').write_text(
        '\n'.join(json.dumps(dict(body=f'{i} ' + plain.read_text(encoding='utf-8'))) for i in range(4)),
        encoding='utf-8')
    for model in (checkpoint, trained):         # one file of rows among others is enough
        code, _, errors = type_in(f'score {model} --data {folder} --text-field body --sequences 4 --fit 20 '
                                  f'--json {tmp_path}/x.json --quiet')
        assert code == 0, errors


@pytest.mark.parametrize('encoding', ['latin-1', 'cp1252', 'utf-16'])
def test_text_that_is_not_utf_8_is_named(checkpoint, type_in, tmp_path, encoding):
    (tmp_path / 'bad.txt').write_text(' '.join(f'wörd{(i * i) % 97}' for i in range(3000)), encoding=encoding)
    line = f'score {checkpoint} {SCORE_FAST} --json {tmp_path}/x.json --quiet'
    code, _, errors = type_in(f'{line} --data {tmp_path}/bad.txt')
    assert code == 2 and ('not_utf8' in errors or 'binary' in errors) and 'bad.txt' in errors, errors
    (tmp_path / 'good.txt').write_text(' '.join(f'wörd{(i * i) % 97}' for i in range(3000)), encoding='utf-8')
    code, _, errors = type_in(f'{line} --data {tmp_path}')
    assert code == 0 and 'left out' in errors and '1 ' in errors, errors


@pytest.mark.parametrize('suffix, told', [('csv', True), ('tsv', True), ('pdf', True), ('txt', False),
                                          ('md', False), ('py', False)])
def test_a_file_that_is_read_as_plain_text_is_named(checkpoint, type_in, tmp_path, suffix, told):
    path = tmp_path / f'table.{suffix}'
    path.write_text('\n'.join(f'{i},word{i % 97},{i * i}' for i in range(3000)), encoding='utf-8')
    code, _, errors = type_in(
        f'score {checkpoint} {SCORE_FAST} --data {path} --json {tmp_path}/x.json --quiet')
    assert code == 0 and ('plain text' in errors and str(path) in errors) == told, errors


def test_a_label_that_was_changed_is_named(trained, type_in, tmp_path):
    shutil.copytree(trained, tmp_path / 'copy')
    for name, old, new in (('run.json', '"n_eval": 8', '"n_eval": 9'),
                           ('tokenizer.json', '"version"', ' "version"')):
        path = tmp_path / 'copy' / name
        text = path.read_text(encoding='utf-8')
        assert old in text
        path.write_text(text.replace(old, new), encoding='utf-8')
        code, _, errors = type_in(f'score {tmp_path}/copy --sequences 4 --quiet')
        assert code == 2 and str(path) in errors and errors.count('\n') == 1, errors
        path.write_text(text, encoding='utf-8')


def test_wide_models_get_more_sequences_for_short_ones(checkpoint, type_in, tmp_path):
    from sparsecod.cli import _Subject, _score_settings
    from sparsecod.core import ModelConfig
    class Args: sequences = fit = jacobian_probes = seed = None; length = 128
    class Wide: config = ModelConfig(d_model=4096, n_heads=32, context_length=512)
    assert _score_settings(_Subject(Wide, None, None, False, None, 256, None, {}), Args)[0].n_fit == 128


def test_export_and_back(trained, type_in, tmp_path):
    code, text, errors = type_in(f'export {trained} {tmp_path}/stock --quiet')
    assert code == 0 and errors.count('Error') == 0 and str(tmp_path / 'stock') in text, errors
    code, _, errors = type_in(f'export {trained} {tmp_path}/stock --quiet')
    assert code == 2 and str(tmp_path / 'stock') in errors
    code, _, errors = type_in(f'export {tmp_path}/stock {tmp_path}/back --format sparsecod --quiet')
    assert code == 0, errors
    from transformers import AutoModelForCausalLM
    tokens = torch.arange(24).view(2, 12)
    theirs, back = (AutoModelForCausalLM.from_pretrained(tmp_path / 'stock')(tokens).logits,
                    Transformer.from_pretrained(tmp_path / 'back')(tokens))
    assert torch.allclose(theirs, back, atol=1e-4)


def test_a_record_that_is_not_one_makes_no_model_card(trained, type_in, tmp_path):
    (tmp_path / 'record.json').write_text('{"schema": 1}', encoding='utf-8')
    code, _, errors = type_in(f'export {trained} {tmp_path}/stock --record {tmp_path}/record.json')
    assert (code == 2 and '--record' in errors and 'record.json' in errors
            and not (tmp_path / 'stock').exists())


def test_eval_a_stock_checkpoint(checkpoint, type_in, tmp_path):
    code, text, errors = type_in(f'eval {checkpoint} --questions 20 --out {tmp_path}/eval.json --quiet')
    assert code == 0 and json.loads(
        (tmp_path / 'eval.json').read_text(encoding='utf-8'))['questions'] == 20, errors


def test_eval(trained, type_in, tmp_path):
    code, text, errors = type_in(f'eval {trained} --questions 40 --quiet')
    assert code == 0 and errors == '' and 'acc_mutual_info' in text and str(trained / 'eval.json') in text
    found = json.loads((trained / 'eval.json').read_text(encoding='utf-8'))
    assert (found['questions'] == 40 and found['tasks'] == ['cloze']
            and found['config']['model']['n_layers'] == 2)
    assert {row['metric']: row['n'] for row in found['results']} == dict(acc=40, acc_norm=40,
                                                                         acc_mutual_info=40)
    for row in found['results']:
        (line,) = (line.split() for line in text.splitlines() if line.split()[:2] == ['cloze', row['metric']])
        assert float(line[2]) == pytest.approx(row['value'], rel=1e-3) and line[-2:] == ['0.25', '40']
        assert (float(line[3].strip('[,')) <= row['value'] <= float(line[4].strip(']'))
                and 0 < row['low'] < row['high'] < 1)
    again = type_in(f"eval {trained / 'model'} --questions 40 --limit 10 --out {tmp_path}/few.json --quiet")
    few = json.loads((tmp_path / 'few.json').read_text(encoding='utf-8'))
    assert (again[0] == 0 and {row['n'] for row in few['results']} == {10}
            and few['corpus'] == found['corpus'] and few['limit'] == 10)


def test_eval_builds_a_corpus_only_for_cloze(checkpoint, trained, type_in, tmp_path, monkeypatch):
    import sparsecod.cloze, sparsecod.data
    asked = []
    def evaluate(model, tokenizer, tasks, questions, *rest, **more):
        asked.append((tokenizer.vocab_size, tasks, questions))
        return dict(results=[], lm_eval='0', limit=None)
    def never(*_, **more): raise AssertionError('a corpus was built')
    monkeypatch.setattr(sparsecod.cloze, 'evaluate_tasks', evaluate)
    monkeypatch.setattr(sparsecod.data, 'prepare', never)
    for model in (checkpoint, trained):
        code, _, errors = type_in(f'eval {model} --tasks hellaswag --out {tmp_path}/eval.json --quiet')
        assert code == 0 and asked[-1][1:] == (['hellaswag'],
                                               None) and json.loads((tmp_path / 'eval.json').read_text(
                                                   encoding='utf-8'))['corpus'] is None, errors
    assert asked[0][0] == 512
    with pytest.raises(AssertionError, match='a corpus was built'): main(['eval', str(checkpoint), '--debug'])


def test_eval_says_what_is_missing(trained, type_in, monkeypatch):
    import datasets
    def no_network(path, *rest, **options):
        if path == 'json': return real(path, *rest, **options)
        raise ConnectionError(f'no network\nfor {path}')
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, 'load_dataset', no_network)
    code, text, errors = type_in(f'eval {trained} --tasks cloze,hellaswag --questions 10 --quiet')
    assert code == 2 and text == '' and errors.count('\n') == 1
    assert "task 'hellaswag' cannot be loaded" in errors and 'no network for Rowan/hellaswag' in errors
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    code, text, errors = type_in(f'eval {trained} --quiet')
    assert code == 2 and errors == "sparsecod: lm-eval is needed for this: pip install 'sparsecod[eval]'\n"


def test_the_main_job_sets_its_runs_beside_the_record(tmp_path, capsys):
    from sparsecod.claims import _QUANTITIES
    from sparsecod.cli import _show_main
    from sparsecod.studies import by_variant, load_results
    found = by_variant('main', load_results(ROOT / 'results', 'laptop'))
    assert len(found) == 2 and all(len(runs) >= 3 for runs in found.values())
    (tmp_path / 'laptop').mkdir()
    for runs in found.values():
        shutil.copy(ROOT / 'results' / 'laptop' / f"{runs[0]['name']}.json", tmp_path / 'laptop')
    _show_main(str(tmp_path), 'laptop')
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    # a line a number; a seed of the record agrees with it
    assert sum(line.startswith(tuple(found)) for line in lines) == 2 * len(_QUANTITIES)
    assert sum(line.startswith(tuple(found)) and line.endswith('agrees')
               for line in lines) >= 2 * len(_QUANTITIES) - 1
    assert (tmp_path / 'laptop' / 'report.html').read_text(encoding='utf-8').count('agrees') >= 2 * len(
        _QUANTITIES) - 1


def test_all_studies_by_one_command_that_goes_on_where_it_stopped_and_their_report(type_in, tmp_path,
                                                                                   monkeypatch):
    import sparsecod.claims as claims
    import sparsecod.report as reports
    import sparsecod.studies as studies
    # two that share runs
    monkeypatch.setattr(studies, 'STUDIES', {name: studies.STUDIES[name] for name in ('depth', 'training')})
    monkeypatch.setattr(claims, 'CLAIMS', [c for c in claims.CLAIMS if c.study in studies.STUDIES])
    configs = {studies.identity(c, '') for name in studies.STUDIES
               for _, c in studies.STUDIES[name].runs('tiny')}
    written, write_report = [], reports.write_report  # reports: of how many records, and where
    def note(records, path, *rest):
        written.append((len(records), Path(path)))
        return write_report(records, path, *rest) if len(written) == 1 else path
    monkeypatch.setattr(reports, 'write_report', note)
    reproduce = f'reproduce --study all --scale tiny --out {tmp_path} --jobs 2'
    code, text, errors = type_in(reproduce)
    report, sound = (tmp_path / 'tiny' / 'report.html',
                     {p: p.read_text(encoding='utf-8') for p in sorted(tmp_path.glob('tiny/*.json'))})
    judged = sum(map(int, re.findall(r'(\d+)\s+(?:confirmed|contradicted|open|untrained|units)\b', text)))
    assert code == 0 and judged == len(claims.CLAIMS) + len(claims._CHECKS) and str(report) in text, errors
    assert (errors.count('held-out loss') == len(configs) == len(sound)
            and [path.name for _, path in written] == ['report.html', 'report-training.html'])
    page = report.read_text(encoding='utf-8')
    assert '<html' in page and 'contradicted' in page and not re.findall(r'(?:src|href)="https?:', page)

    depth = {r['name'] for r in studies.load_results(tmp_path, 'tiny', 'depth')}
    first = next(path for path in sound if path.stem in depth)
    first.unlink()                                                     # as after a stop
    code, text, errors = type_in(reproduce)
    assert (code == 0 and errors.count('held-out loss') == 1
            and set(tmp_path.glob('tiny/*.json')) == set(sound))
    # all others were read back
    assert sum(p.read_text(encoding='utf-8') == text for p, text in sound.items()) >= len(sound) - 1
    sound[first] = first.read_text(encoding='utf-8')
    copy, future = first.with_name('copy of it.json'), first.with_name('future.json')
    for path, content in ((copy, sound[first]), (future, json.dumps(dict(schema=99))),
                          (first, sound[first].replace('"seed": 0', '"seed": 1'))):
        path.write_text(content, encoding='utf-8')
        code, text, errors = type_in(f'report --results {tmp_path} --scale tiny --study depth')
        assert code == 1 and path.name in errors and 'Traceback' not in errors, errors
        assert written.pop() == (len(depth) - (path == first), report)
        path.unlink()
        if path in sound: path.write_text(sound[path], encoding='utf-8')
    code, text, errors = type_in(f'report --results {tmp_path} --scale tiny --out {tmp_path}')
    assert code == 2 and '--out' in errors and str(tmp_path) in errors
    code, text, errors = type_in(
        f'report --results {tmp_path} --scale tiny --markdown --out {tmp_path}/mine.html')
    assert (code == 0 and text.startswith('| verdict |')
            and tmp_path / 'mine.html' in {path for _, path in written})
    for name in ('main', 'pilots'):
        code, text, errors = type_in(f'report --results {tmp_path} --scale tiny --study {name}')
        assert code == 0, errors
    code, text, errors = type_in(f'study depth --scale tiny --out {tmp_path}')
    assert code == 0 and errors == '' and 'L=3' in text and 'one seed' in text


def test_failed_runs_end_in_exit_code_1(type_in, tmp_path, monkeypatch):
    import sparsecod.studies
    def failing(*args): raise sparsecod.studies.RunsFailed({'L2': 'no luck'})
    monkeypatch.setattr(sparsecod.studies, 'run_study', failing)
    code, text, errors = type_in(f'study depth --scale tiny --out {tmp_path}')
    assert code == 1 and '1 run(s) failed: L2: no luck' in errors


@pytest.mark.parametrize('line',
                         ['train DIR/model --scale tiny --layers 2 --steps 4000 --set '
                          'train.checkpoint_every=2 --set train.compile=off --quiet',
                                  'study depth --scale tiny --out DIR'])
def test_ctrl_c_says_how_to_go_on(line, tmp_path):
    running = process(line.replace('DIR', str(tmp_path)))
    end = time.time() + 120
    while not list(tmp_path.glob('**/log.jsonl')) and time.time() < end: time.sleep(.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=120)
    assert (running.returncode == 130 and 'the same command' in errors.strip().splitlines()[-1]
            and 'Traceback' not in errors)


def test_scoring_the_model_folder_is_scoring_the_training(trained, tmp_path, type_in):
    for folder, name in ((trained, 'a'), (Path(trained) / 'model', 'b')):
        assert type_in(f'score {folder} --sequences 4 --json {tmp_path}/{name}.json --quiet')[0] == 0
    a, b = (json.loads((tmp_path / f'{name}.json').read_text(encoding='utf-8')) for name in 'ab')
    assert a['corpus'] == b['corpus'] and a['scalars'] == b['scalars']


def test_a_training_that_diverged_has_no_scores(tmp_path, type_in):
    code, _, _ = type_in(f'train {tmp_path}/x --scale tiny --set train.lr=1e6 {QUICK}')
    assert code == 1
    code, _, errors = type_in(f'score {tmp_path}/x --quiet')
    assert code == 2 and 'diverged' in errors and not (tmp_path / 'x' / 'scores.json').exists()


@pytest.mark.parametrize('device', ['nope', 'cuda:99'])
def test_a_device_that_is_not_there_is_named(trained, device, type_in):
    code, _, errors = type_in(f'score {trained} --device {device} --quiet')
    assert code == 2 and f"device='{device}'" in errors and len(errors.strip().splitlines()) == 1


def test_a_damaged_model_is_named(trained, tmp_path, type_in):
    shutil.copytree(trained, tmp_path / 'copy')
    path = tmp_path / 'copy' / 'model' / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:100])
    code, _, errors = type_in(f'score {tmp_path}/copy --quiet')
    assert code == 2 and str(path) in errors and errors.count('\n') == 1


def test_a_damaged_checkpoint_is_named(checkpoint, tmp_path, type_in):
    shutil.copytree(checkpoint, tmp_path / 'copy')
    path = tmp_path / 'copy' / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-10])                             # as after a broken download
    code, _, errors = type_in(f'score {tmp_path}/copy --quiet')
    assert (code == 2 and f'{path} is damaged or was not copied completely' in errors
            and errors.count('\n') == 1)


def launched(line: str, folder: Path) -> float:
    """The held-out loss of a training that a command of the docs starts, with two processes and at the
    smallest scale."""
    line = line.replace('FOLDER', str(folder)).replace('--scale paper',
                                                       f'--scale tiny --experts 4 {QUICK} --set '
                                                       f'train.tokens_per_step=512 --set train.strategy=fsdp')
    command = re.sub(r'(num_processes|nproc_per_node) 8', r'\1 2', line).split()
    environment = dict(os.environ, PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
                       PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding='utf-8',
                          timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(re.search(r'held-out loss ([\d.]+)', done.stdout)[1])


def test_the_launchers_of_the_docs_train_one_model_together(type_in, tmp_path):
    page = json.loads((ROOT / 'nbs' / 'beyond' / '05_scale.ipynb').read_text(encoding='utf-8'))
    text = ''.join(''.join(cell['source']) + '\n' for cell in page['cells'])
    lines = re.findall(r'^(?:torchrun|accelerate launch) .*--scale paper$', text, re.M)
    assert {line.split()[0] for line in lines} == {'torchrun', 'accelerate'}
    code, out, errors = type_in(
        f'train {tmp_path}/alone --scale tiny --experts 4 {QUICK} --set train.tokens_per_step=512')
    assert code == 0, errors
    alone = float(re.search(r'held-out loss ([\d.]+)', out)[1])
    for n, line in enumerate(lines):
        assert launched(line, tmp_path / str(n)) == pytest.approx(alone, abs=2e-3), line
