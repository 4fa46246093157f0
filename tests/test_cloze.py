"Cloze questions: how they are made, how models answer them, and lm-eval on the same ones."
import builtins
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from sparsecod.cloze import (
    _CONTEXT, Question, accuracy, answer_scores, batches, _continuation_scores, _continue_text, _encode_pairs,
    evaluate_tasks, _find_gaps,
    _held_out_texts, _lm_eval_model, make_questions, measure_cloze, pieces, _read_off, reading, right_answers,
    _score_texts, _without_context, _write_task)
from sparsecod.core import ModelConfig, Transformer
from sparsecod.data import Corpus, prepare
from sparsecod.studies import SCALES


def story(seed: int) -> str:
    "A document of numbered lines, some of them indented, unlike any other."
    words = 'amber birch cedar delta ember fjord grove heath islet jetty knoll ledge marsh'.split()
    rng = np.random.default_rng(seed)
    line = lambda i: '    ' * (i % 3 == 2) + f'line {i} of story {seed} ' + ' '.join(rng.choice(words, 8))
    return '\n'.join(line(i) for i in range(40)) + '\n'


@pytest.fixture(scope='module')
def corpus():
    "A small corpus with several held-out documents."
    return Corpus.from_texts([story(i) for i in range(24)], val_share=.4, max_document_bytes=8192)


@pytest.fixture(scope='module')
def questions(corpus): return make_questions(corpus, 60)


def small_model(corpus, T: int = 96, **changes) -> Transformer:
    "An untrained model with large enough weights that its answers differ."
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=corpus.vocab_size, n_layers=2, d_model=16, n_heads=2,
                                   context_length=T, init_std=.3, **changes))


# ---- questions

def test_documents_are_the_whole_validation_split(corpus):
    texts, stories = _held_out_texts(corpus), {story(i) for i in range(24)}
    assert (len(texts) == corpus.stats['val_documents'] > 2 and set(texts) < stories
            and len(set(texts)) == len(texts))
    # a document that is cut is left out
    assert _held_out_texts(corpus, max_tokens=len(corpus.val) - 1) == texts[:-1]


def test_questions_are_cut_from_held_out_documents_only(corpus, questions):
    held_out = _held_out_texts(corpus)
    training = corpus.tokenizer.decode(corpus.train)
    assert len(questions) == 60
    for q in questions:
        right = q.choices[q.answer]
        home = [text for text in held_out if q.context + right in text]
        assert len(home) == 1 and q.context not in training
        for i, choice in enumerate(q.choices):
            assert any(choice in text for text in held_out)
            if i != q.answer: assert choice not in home[0]  # wrong ones come from elsewhere


def test_form_of_the_questions(questions):
    for q in questions:
        assert (len(set(q.choices)) == len(q.choices) == 4 and len(q.context) <= _CONTEXT
                and not q.context[-1].isspace())
        for choice in q.choices:
            newline, line = choice[0], choice[1:]
            assert newline == '\n' and 40 <= len(line.lstrip(' ')) <= 60 and not choice[-1].isspace()
        # the same indentation
        assert len({len(choice[1:]) - len(choice[1:].lstrip(' ')) for choice in q.choices}) == 1
    assert any(q.choices[0].startswith('\n    ') for q in questions)


def test_questions_depend_on_the_seed_and_on_nothing_else(corpus, questions):
    torch.manual_seed(5)
    assert make_questions(corpus, 60) == questions and make_questions(corpus, 60, seed=1) != questions
    assert (make_questions(corpus, 20) == questions[:20]
            and len(make_questions(corpus, 5, n_choices=2)[0].choices) == 2)


def test_the_right_choice_can_be_anywhere(corpus):
    many = make_questions(corpus, 10 ** 6)
    assert len(many) < 10 ** 6  # as many as there are places
    counts = np.bincount([q.answer for q in many], minlength=4)
    expected = len(many) / 4
    # chi-squared, 3 degrees of freedom, 1 in 1000
    assert len(many) > 150 and ((counts - expected) ** 2 / expected).sum() < 16.3
    longest = max(sum(q.context + q.choices[q.answer] in text for q in many[:len(_held_out_texts(corpus))])
                  for text in _held_out_texts(corpus))
    assert longest == 1                                                             # documents take turns


def test_too_little_text_is_an_error(corpus):
    flat = Corpus.from_texts([f'one line without end {i} ' * 20 for i in range(20)])
    with pytest.raises(ValueError, match='0 of them with lines to ask about; 2 are needed'):
        make_questions(flat)
    with pytest.raises(ValueError, match='n=0 must be at least 1'): make_questions(corpus, 0)
    with pytest.raises(ValueError, match='n_choices=1'): make_questions(corpus, n_choices=1)


def test_long_lines_give_contexts_that_start_with_a_word():
    paragraph = ' '.join(f'word{i}' for i in range(100))
    (gap,) = _find_gaps(f'{paragraph}\n{paragraph}\n')['']
    context = f'{paragraph}\n'[gap.start:gap.middle]
    assert (context.startswith('word') and _CONTEXT - 10 < len(context) <= _CONTEXT
            and gap.middle == len(paragraph))


def test_tiny_scale_has_questions():
    corpus = prepare(SCALES['tiny'].data, progress=False)
    assert len(make_questions(corpus, 100)) == 100


# ---- answers

def one_by_one(model, tokenizer, q: Question, choice: str) -> float:
    "The slow and obvious way: one forward pass, one softmax over everything."
    context, whole = tokenizer.encode(q.context) or [tokenizer.eos_id], tokenizer.encode(q.context + choice)
    n = len(whole) - len(tokenizer.encode(q.context))
    ids = torch.tensor([(context + whole[-n:])[-model.config.context_length - 1:]])
    with torch.no_grad(): logp = model(ids[:, :-1]).double().log_softmax(-1)[0]
    return sum(logp[t, ids[0, t + 1]].item() for t in range(ids.shape[1] - 1 - n, ids.shape[1] - 1))


@pytest.mark.parametrize('T', [256, 60])  # with room for everything, and with contexts cut
@pytest.mark.parametrize('changes', [{}, dict(n_experts=4)], ids=['dense', 'experts'])
def test_scores_equal_the_slow_way(corpus, questions, T, changes):
    model = small_model(corpus, T, **changes)
    lengths = [len(corpus.tokenizer.encode(q.context + choice)) for q in questions[:8]
               for choice in q.choices]
    assert 61 < max(lengths) < 256
    slow = [[one_by_one(model, corpus.tokenizer, q, choice) for choice in q.choices] for q in questions[:8]]
    assert np.allclose(answer_scores(model, corpus.tokenizer, questions[:8]), slow, rtol=1e-4, atol=1e-3)
    alone = _without_context(questions[:8])
    slow = [[one_by_one(model, corpus.tokenizer, q, choice) for choice in q.choices] for q in alone]
    assert np.allclose(answer_scores(model, corpus.tokenizer, alone), slow, rtol=1e-4, atol=1e-3)


def test_scores_do_not_depend_on_the_batch(corpus, questions):
    model = small_model(corpus)
    whole = answer_scores(model, corpus.tokenizer, questions[:10])
    for batch_tokens in (1, 500):
        assert torch.allclose(answer_scores(model, corpus.tokenizer, questions[:10], batch_tokens), whole,
                              rtol=1e-4, atol=1e-3)
    assert torch.allclose(answer_scores(model, corpus.tokenizer, questions[:10][::-1]).flip(0), whole,
                          rtol=1e-4, atol=1e-3)


def test_batches_hold_every_piece_once_and_no_more_than_asked():
    lengths = [3, 50, 8, 8, 1, 20, 7]
    found = list(batches(lengths, 24))
    assert sorted(i for batch in found for i in batch) == list(range(7)) and len(found) < 7
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 24 for batch in found)


def test_equal_logits_count_tokens(corpus, questions):
    "Log-probabilities of a model that thinks everything equally likely: minus ln V for each token."
    model = small_model(corpus)
    torch.nn.init.zeros_(model.head.weight)
    scores = answer_scores(model, corpus.tokenizer, questions[:10])
    counts = [[n for _, n in _encode_pairs(corpus.tokenizer, [(q.context, choice) for choice in q.choices])]
              for q in questions[:10]]
    assert (np.allclose(scores, -np.array(counts) * math.log(corpus.vocab_size), rtol=1e-5)
            and len(set(map(tuple, counts))) > 1)


def test_who_knows_the_text_is_always_right(corpus, questions):
    "A reader who remembers which token follows which 20 tokens in the held-out documents."
    known = {}
    for text in _held_out_texts(corpus):
        ids = corpus.tokenizer.encode(text)
        for i in range(20, len(ids)): known.setdefault(tuple(ids[i - 20:i]), set()).add(ids[i])
    def read(tokens, picked, targets):
        logits, seen = torch.zeros(len(targets), corpus.vocab_size), iter(range(len(targets)))
        for row, t in picked.nonzero().tolist():
            m = next(seen)
            for y in known.get(tuple(tokens[row, max(0, t - 19):t + 1].tolist()), ()): logits[m, y] = 30.
        return _read_off(logits, targets)
    found = _continuation_scores(read,
                                _encode_pairs(corpus.tokenizer, [(q.context, choice) for q in questions
                                                                for choice in q.choices]), T=512)
    scores = found[:, 0].view(-1, 4)
    assert accuracy(scores, questions)['value'] == accuracy(scores, questions, normalised=True)['value'] == 1
    greedy = (found[:, 1] == 0).view(-1, 4)
    right = torch.tensor([[i == q.answer for i in range(4)] for q in questions])
    # a short context holds fewer than 20 tokens
    assert greedy[right].float().mean() > .8 and not greedy[~right].any()


def test_pieces_score_every_token_once_as_lm_eval_does():
    utils = pytest.importorskip('lm_eval.utils')
    for length in (1, 4, 7, 8, 9, 23):
        ids = list(range(100, 100 + length))
        theirs = [utils.make_disjoint_window(w)
                  for w in utils.get_rolling_token_windows(ids, prefix_token=0, max_seq_len=4, context_len=1)]
        ours = [(piece[:-n], piece[-n:]) for piece, n in pieces([0, *ids], length, T=4)]
        assert [y for _, y in ours] == [y for _, y in theirs]
        assert [c for c, _ in ours] == [c for c, _ in theirs] and all(len(c) + len(y) <= 5 for c, y in ours)


def test_a_continuation_longer_than_the_context_is_scored_completely(corpus):
    model = small_model(corpus, T=5)
    torch.nn.init.zeros_(model.head.weight)
    texts = _encode_pairs(corpus.tokenizer, [('abc', 'defghijklmnopqrstuvwxyz' * 3)])
    assert texts[0][1] > 20 and math.isclose(_score_texts(model, texts)[0, 0],
                                             -texts[0][1] * math.log(corpus.vocab_size), rel_tol=1e-5)


def test_the_model_stays_as_it_was(corpus, questions):
    model = small_model(corpus).train()
    model.blocks[1].eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    measure_cloze(model, corpus, 5)
    assert (model.training and not model.blocks[1].training
            and all(p.grad is None and p.requires_grad for p in model.parameters()))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with pytest.raises(KeyError), reading(model): raise KeyError
    assert model.training


def test_half_precision_is_read_in_fp32(corpus, questions):
    half = small_model(corpus).bfloat16()
    rounded = small_model(corpus)
    rounded.load_state_dict({name: p.float() for name, p in half.state_dict().items()})
    found = answer_scores(half, corpus.tokenizer, questions[:5])
    assert (torch.equal(found, answer_scores(rounded, corpus.tokenizer, questions[:5]))
            and half.head.weight.dtype == torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(found, answer_scores(rounded, corpus.tokenizer, questions[:5]))


# ---- accuracy

def test_accuracy_of_hand_made_scores():
    qs = [Question('c', ('\naa', '\nb'), 0), Question('c', ('\naa', '\nb'), 1),
          Question('c', ('\na', '\nb'), 0), Question('c', ('\na', '\nb'), 1)]
    # per character: -.8 and -1. in the first two; then ties
    scores = torch.tensor([[-2.4, -2.], [-2.4, -2.], [-1., -1.], [-1., -1.]])
    assert right_answers(scores, qs).tolist() == [False, True, True, False]
    assert right_answers(scores, qs, normalised=True).tolist() == [True, False, True, False]
    assert (accuracy(scores, qs)['value'] == .5 and accuracy(scores, qs)['chance'] == .5
            and accuracy(scores, qs)['n'] == 4)


def test_random_scores_give_chance(questions):
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        found = accuracy(torch.rand(len(questions), 4, generator=generator), questions)
        inside += found['low'] <= found['chance'] <= found['high']
    assert found['chance'] == .25 and 180 <= inside                                 # 190 expected


def test_measurement_for_the_record(corpus):
    model = small_model(corpus)
    found = measure_cloze(model, corpus, 10 ** 5, seed=3)
    assert json.loads(json.dumps(found)) == found and found == measure_cloze(model, corpus, 10 ** 5, seed=3)
    questions = make_questions(corpus, 10 ** 5, seed=3)
    scores = answer_scores(model, corpus.tokenizer, questions)
    gain = scores - answer_scores(model, corpus.tokenizer, _without_context(questions))
    assert (found['n_questions'] == len(questions) < found['settings']['n_questions']
            and found['chance'] == .25 and found['settings']['seed'] == 3)
    for name, value in dict(accuracy=accuracy(scores, questions),
                            accuracy_normalised=accuracy(scores, questions, True),
                            accuracy_mutual_information=accuracy(gain, questions)).items():
        assert found[name] == {end: value[end] for end in ('value', 'low', 'high')}
        assert 0 <= found[name]['low'] <= found[name]['value'] <= found[name]['high'] <= 1


# ---- lm-eval

def test_lm_eval_agrees_question_by_question(corpus, questions):
    pytest.importorskip('lm_eval')
    model = small_model(corpus).train()
    found = evaluate_tasks(model, corpus.tokenizer, ['cloze'], questions, samples=True)
    theirs = sorted(found['samples']['cloze'], key=lambda sample: sample['doc_id'])
    scores = answer_scores(model, corpus.tokenizer, questions)
    gain = scores - answer_scores(model, corpus.tokenizer, _without_context(questions))
    ours = dict(acc=right_answers(scores, questions), acc_norm=right_answers(scores, questions, True),
                acc_mutual_info=right_answers(gain, questions))
    rows = {row['metric']: row for row in found['results']}
    assert set(rows) == set(ours) and model.training
    for metric, right in ours.items():
        assert [sample[metric] == 1 for sample in theirs] == right.tolist() and 0 < right.mean() < 1
        low, high = binomtest(int(right.sum()), len(questions)).proportion_ci(method='wilson')
        assert rows[metric] == dict(task='cloze', metric=metric, value=right.mean(),
                                    stderr=rows[metric]['stderr'], n=60, low=low, high=high, chance=.25)
        assert math.isclose(rows[metric]['stderr'], right.std(ddof=1) / 60 ** .5)
    lls = np.array([[ll for ((ll, _),) in sample['resps']] for sample in theirs], float)
    assert np.allclose(lls[:, :4], scores, rtol=1e-4, atol=1e-3)


PAIRS = [('line 1', ' of'), ('line 1 ', 'of'), ('line 1  \n', ' of the'), ('', 'line'), ('', ' line 2'),
         ('', '\n'), ('a\n', '\nb'),
         ('ünï', 'cödé ☃ 文字'), ('文', '字'), ('tab\t', '\tx'), ('lin', 'e 1'), ('x' * 90, ' of'),
         ('line 1', ' of ' * 12)]


def melted(tokenizer, words):
    "Pairs whose continuation makes no token beyond those of the context."
    pairs = [(word[:i], word[i:]) for word in words for i in range(1, len(word))]
    return [(a, b) for a, b in pairs if a.strip()
            and len(tokenizer.encode(a + b)) <= len(tokenizer.encode(a.rstrip()))]


def test_answers_equal_those_of_lm_evals_own_class(corpus, tmp_path):
    "The stock export of a model, read by lm-eval itself."
    pytest.importorskip('lm_eval')
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from sparsecod.exchange import to_hf, to_hf_tokenizer
    model = small_model(corpus, T=24)
    theirs = HFLM(pretrained=to_hf(model, corpus.tokenizer), tokenizer=to_hf_tokenizer(corpus.tokenizer, 24),
                  batch_size=3, max_length=24)
    ours = _lm_eval_model(model, corpus.tokenizer)
    asked = [Instance('loglikelihood', {}, pair, i) for i, pair in enumerate(PAIRS)]
    expected, found = theirs.loglikelihood(asked, disable_tqdm=True), ours.loglikelihood(asked)
    for pair, (a, greedy), (b, as_greedy) in zip(PAIRS, found, expected):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4) and greedy == as_greedy, pair
    rolled = [Instance('loglikelihood_rolling', {}, (text,), i)
              for i, text in enumerate((story(0)[:150], 'line', 'ünï ☃', ''))]
    assert ours.loglikelihood_rolling(rolled) == pytest.approx(
        theirs.loglikelihood_rolling(rolled, disable_tqdm=True), rel=1e-4, abs=1e-4)


def test_what_melts_into_its_context_is_scored(corpus):
    "The sum over the tokens from the first one in which both together differ from the context alone."
    instance = pytest.importorskip('lm_eval.api.instance')
    model, tokenizer = small_model(corpus), corpus.tokenizer
    pairs = melted(tokenizer, ['line', ' line', 'line 1 of', ' of', 'story'])
    assert len(pairs) >= 3
    found = _lm_eval_model(model, tokenizer).loglikelihood([instance.Instance('loglikelihood', {}, pair, i)
                                                            for i, pair in enumerate(pairs)])
    for (a, b), (score, _) in zip(pairs, found):
        head, whole = tokenizer.encode(a.rstrip()), tokenizer.encode(a + b)
        same = next(i for i in range(len(whole)) if head[i] != whole[i])
        ids = torch.tensor([([] if same else [corpus.eos_id]) + whole])
        with torch.no_grad(): logp = model(ids[:, :-1]).log_softmax(-1)[0]
        expected = sum(logp[t - 1, ids[0, t]].item()
                       for t in range(ids.shape[1] - (len(whole) - same), ids.shape[1]))
        assert score == pytest.approx(expected, rel=1e-4) and score < -1
    question = Question(pairs[0][0], (pairs[0][1], ' something else'), 0)
    assert answer_scores(model, tokenizer, [question])[0, 0].item() == pytest.approx(found[0][0], rel=1e-4)


@pytest.mark.parametrize('context', ['', 'line 1'])
def test_an_empty_continuation_has_no_score(corpus, context):
    instance = pytest.importorskip('lm_eval.api.instance')
    model = small_model(corpus)
    with pytest.raises(ValueError, match='continuation'):
        _lm_eval_model(model,
                       corpus.tokenizer).loglikelihood([instance.Instance('loglikelihood', {}, (context, ''),
                                                                          0)])
    with pytest.raises(ValueError, match='continuation'): _encode_pairs(corpus.tokenizer, [(context, '')])


def test_a_limit_and_a_missing_task(corpus, questions):
    pytest.importorskip('lm_eval')
    model = small_model(corpus)
    found = evaluate_tasks(model, corpus.tokenizer, ['cloze'], questions, limit=7)
    assert {row['n'] for row in found['results']} == {7} and found['limit'] == 7 and 'samples' not in found
    with pytest.raises(ValueError, match="task 'no_such_task' cannot be loaded"):
        evaluate_tasks(model, corpus.tokenizer, ['cloze', 'no_such_task'], questions)
    with pytest.raises(ValueError, match="'cloze' needs questions"):
        evaluate_tasks(model, corpus.tokenizer, ['cloze'])


def test_lm_eval_rolls_over_long_texts_and_continues_texts(corpus):
    instance = pytest.importorskip('lm_eval.api.instance')
    model = small_model(corpus, T=12)
    lm, text = _lm_eval_model(model, corpus.tokenizer), story(0)[:150]
    request = lambda kind, *arguments: instance.Instance(request_type=kind, doc={}, arguments=arguments,
                                                         idx=0)
    total, ids = 0., [corpus.eos_id, *corpus.tokenizer.encode(text)]
    for i in range(1, len(ids), 12):  # what lm-eval documents: full windows, the last with full context
        stop = min(i + 12, len(ids))
        window = torch.tensor([ids[max(0, stop - 13):stop]])
        logp = model(window[:, :-1]).log_softmax(-1)[0]
        total += sum(logp[t, window[0, t + 1]].item() for t in range(len(logp) - (stop - i), len(logp)))
    assert math.isclose(lm.loglikelihood_rolling([request('loglikelihood_rolling', text)])[0], total,
                        rel_tol=1e-4)
    prompt = corpus.tokenizer.encode('line 1 of')
    greedy = corpus.tokenizer.decode(model.generate(torch.tensor([prompt]), 6,
                                                    temperature=0)[0, len(prompt):])
    assert lm.generate_until([request('generate_until', 'line 1 of',
                                      dict(until=[], max_gen_toks=6))]) == [greedy]
    stop = greedy[3:5]
    assert _continue_text(model, corpus.tokenizer, 'line 1 of',
                          dict(until=stop, max_gen_toks=6)) == greedy[:greedy.find(stop)]
    assert _continue_text(model, corpus.tokenizer, '', dict(max_gen_toks=0)) == ''


def test_the_task_file_works_on_lm_evals_own_command_line(questions, tmp_path):
    pytest.importorskip('lm_eval')
    assert _write_task(questions, tmp_path / 'with space: #1') == tmp_path / 'with space: #1' / 'cloze.yaml'
    done = subprocess.run([sys.executable, '-m', 'lm_eval', '--model', 'dummy', '--tasks', 'cloze',
                           '--include_path', tmp_path / 'with space: #1'],
                          capture_output=True, text=True, cwd=tmp_path, encoding='utf-8')
    assert done.returncode == 0 and 'acc_mutual_info' in done.stdout and 'cloze' in done.stdout, done.stderr[-2000:]


def test_without_lm_eval_the_error_says_what_to_install(corpus, questions, monkeypatch):
    real = builtins.__import__
    def hidden(name, *rest):
        if name.split('.')[0] == 'lm_eval': raise ImportError(name)
        return real(name, *rest)
    monkeypatch.setattr(builtins, '__import__', hidden)
    with pytest.raises(ImportError, match=r"pip install 'sparsecod\[eval\]'"):
        evaluate_tasks(small_model(corpus), corpus.tokenizer, ['cloze'], questions)


def test_the_module_does_not_import_lm_eval():
    code = "import sys; sys.modules['lm_eval'] = None; import sparsecod.cloze"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
