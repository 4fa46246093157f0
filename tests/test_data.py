"""Tests of sparsecod.data beyond the examples of its chapter: files of every kind, damage, and processes
that meet."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import sparsecod.data as data
from sparsecod.data import Corpus, DataConfig, Tokenizer, load_tokenizer, prepare, train_bpe

WORDS = "attention block causal depth expert layer linear mask norm query residual score sparse stream token variance".split()


def make_texts(n=60, length=40, seed=0):
    rng = random.Random(seed)
    return [f"document {i}: " + " ".join(rng.choices(WORDS, k=length)) + "\n" for i in range(n)]


def write_folder(folder, texts, suffix=".txt"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i}{suffix}").write_text(text, encoding="utf-8")
    return folder


def make(source, cache, **fields):
    return prepare(DataConfig(str(source), **{"vocab_size": 300, "val_share": 0.2, **fields}), cache,
                   progress=False)


def stored_texts(corpus, split):
    tokens = np.asarray(corpus.tokens(split))
    parts = np.split(tokens, np.flatnonzero(tokens == corpus.eos_id) + 1)
    assert len(parts[-1]) == 0  # the strip ends with EOS
    return [corpus.tokenizer.decode(part[:-1]) for part in parts[:-1]]


def all_texts(corpus):
    return sorted(stored_texts(corpus, "train") + stored_texts(corpus, "val"))


@pytest.fixture
def texts():
    return make_texts()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


# ---- sources: one test over all of them


def as_folder(path, texts):
    return write_folder(path / "texts" / "nested", texts).parent


def as_glob(path, texts):
    write_folder(path / "texts" / "nested", texts, ".log")
    return path / "texts" / "**" / "*.log"


def as_jsonl(path, texts):
    (path / "rows.jsonl").write_text("".join(json.dumps({"text": text, "id": i}) + "\n"
                                             for i, text in enumerate(texts)), encoding="utf-8")
    return path / "rows.jsonl"


def as_parquet(path, texts):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path / "rows.parquet",
                   row_group_size=7)
    return path / "rows.parquet"


def as_folder_of_rows(path, texts):
    (path / "rows").mkdir()
    as_jsonl(path / "rows", texts[: len(texts) // 2])
    as_parquet(path / "rows", texts[len(texts) // 2:])
    return path / "rows"


def as_hugging_face(path, texts):
    (path / "dataset").mkdir()
    as_jsonl(path / "dataset", texts)
    return f"hf:{path / 'dataset'}"


@pytest.mark.parametrize("write",
                         [as_folder, as_glob, as_jsonl, as_parquet, as_folder_of_rows, as_hugging_face])
def test_every_source_gives_all_documents_once(write, tmp_path, cache, texts):
    corpus = make(write(tmp_path, texts), cache)
    assert all_texts(corpus) == sorted(texts)
    assert not set(stored_texts(corpus, "train")) & set(stored_texts(corpus, "val"))
    assert corpus.stats["train_documents"] + corpus.stats["val_documents"] == len(texts)
    assert corpus.stats["train_tokens"] == len(corpus.train) and corpus.stats["val_tokens"] == len(corpus.val)
    assert (corpus.stats["train_bytes"]
            + corpus.stats["val_bytes"] == sum(len(text.encode()) for text in texts))


def test_sides_do_not_depend_on_the_source(tmp_path, cache, texts):
    sides = [{split: sorted(stored_texts(make(write(tmp_path, texts), cache), split))
              for split in ("train", "val")}
             for write in (as_folder, as_jsonl)]
    assert sides[0] == sides[1]
    more = make(write_folder(tmp_path / "more", texts + make_texts(20, seed=1)), cache)
    assert set(sides[0]["train"]) <= set(stored_texts(more, "train"))


def test_a_single_text_file_is_cut_into_documents(tmp_path, cache, texts):
    path = tmp_path / "book.txt"
    path.write_text("".join(texts) + "".join(make_texts(400, seed=2)), encoding="utf-8")
    corpus = make(path, cache)
    assert corpus.stats["train_documents"] + corpus.stats["val_documents"] > 5
    assert max(len(text.encode()) for text in all_texts(corpus)) <= 2**14
    finer = make(path, cache, max_document_bytes=1000)
    assert max(len(text.encode()) for text in all_texts(finer)) <= 1000
    assert sum(map(len, all_texts(finer))) == len(path.read_text(encoding="utf-8"))


def test_files_are_read_in_blocks_without_changing_the_pieces(tmp_path):
    raw = ("αβγδ" * 50 + "\n" + "short\n" * 30 + "x" * 700).encode()
    (tmp_path / "a.txt").write_bytes(raw)
    for limit in (4, 5, 64, 333, len(raw), 10**6):
        items = list(data._text_items(tmp_path / "a.txt", limit, "a.txt"))
        assert [item.text.encode() for item in items] == list(data.cut(raw, limit))
        assert ({item.problem for item in items} <= {"", "empty"}
                and sum(item.consumed for item in items) == len(raw))
    assert list(data.cut(b"\x80" * 100, 10))  # no character starts here: still ends


def test_stdlib_is_that_of_the_base_interpreter():
    paths = [path for _, path in data._list_files("stdlib")]
    assert (Path(os.__file__) in paths
            and not any(part in data._PACKAGE_FOLDERS for path in paths for part in path.parts))
    assert all(path.suffix == ".py" for path in paths)
    assert {*paths, Path(torch.__file__)} <= {path for _, path in data._list_files("site")}


def test_named_packages():
    files = dict(data._list_files("site:tqdm,filelock"))
    assert {name.split("/")[0] for name in files} == {"tqdm", "filelock"} and "tqdm/__init__.py" in files
    assert all(path.suffix == ".py" and path.parent.joinpath(path.name).exists() for path in files.values())
    one = dict(data._list_files("site:tqdm"))
    assert one == {name: path for name, path in files.items() if name.startswith("tqdm/")}
    for wrong in ("site:", "site:tqdm,nosuchpackage", "site:tqdm,"):
        with pytest.raises(ValueError, match=wrong): data._list_files(wrong)


def test_stdlib_inside_a_virtual_environment(tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = next(p for p in (venv / "bin" / "python", venv / "Scripts" / "python.exe") if p.exists())
    found = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('stdlib'))"],
                           capture_output=True, text=True, check=True, encoding="utf-8")
    assert [Path(found.stdout.strip())] == data._python_folders("stdlib")


def test_stdlib_is_built_and_found_again(cache):
    config = DataConfig(max_documents=80, vocab_size=300)
    corpus = prepare(config, cache, progress=False)
    assert corpus.stats["train_documents"] + corpus.stats["val_documents"] == 80
    assert prepare(config, cache, progress=False).fingerprint == corpus.fingerprint


# ---- Hugging Face datasets


def test_fineweb_edu_is_one_word(monkeypatch, cache, texts):
    import datasets

    asked = {}

    def load_dataset(*args, **options):
        asked.update(args=args, **options)
        return ({"text": text} for text in texts)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = prepare(DataConfig("fineweb-edu", vocab_size=300, val_share=0.2, max_tokens=2000), cache,
                     progress=False)
    assert asked["args"] == ("HuggingFaceFW/fineweb-edu", "sample-10BT")
    assert asked["split"] == "train" and asked["streaming"] is True
    assert 1500 < len(corpus.train) + len(corpus.val) <= 2000
    assert corpus.config.source == "hf:HuggingFaceFW/fineweb-edu"

    def unreachable(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    again = prepare(DataConfig("fineweb-edu", vocab_size=300, val_share=0.2, max_tokens=2000), cache,
                    progress=False)
    assert again.fingerprint == corpus.fingerprint  # found without a network
    with pytest.raises(ValueError, match="source='hf:a/b', subset=None, split='train' must be.*no network"):
        make("hf:a/b", cache)


def test_a_stream_is_read_no_further_than_the_bound(monkeypatch, cache, texts):
    import datasets

    read = []

    def endless():
        while True:
            read.append(1)
            yield {"text": f"{len(read)} {texts[len(read) % len(texts)]}"}

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: endless())
    corpus = make("hf:endless", cache, max_documents=100, sample_bytes=1000)
    assert len(read) == 100 and corpus.stats["train_documents"] + corpus.stats["val_documents"] == 100
    read.clear()
    corpus = make("hf:endless", cache, max_tokens=5000, sample_bytes=1000)
    assert len(corpus.train) + len(corpus.val) <= 5000


def test_revision_goes_to_datasets(monkeypatch):
    import datasets

    asked = {}
    monkeypatch.setattr(datasets, "load_dataset",
                        lambda *args, **options: asked.update(args=args, **options) or [])
    list(data._hf_rows("hf:owner/name@v1", "subset", "test"))
    assert asked == {"args": ("owner/name", "subset"), "split": "test", "streaming": True, "revision": "v1"}


# ---- what is left out, and errors


def test_unusable_documents_are_counted(tmp_path, cache, texts):
    folder = write_folder(tmp_path / "texts", texts)
    (folder / "copy.txt").write_text(texts[3], encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    (folder / "blank.md").write_text(" \n\n", encoding="utf-8")
    (folder / "picture.txt").write_bytes(b"\x89PNG\x00\x01\x02")
    (folder / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (folder / "rows.jsonl").write_text(
        '{"text": "a row of its own"}\n[1, 2]\n{"text": 5}\n{broken\n\n{"text": "\\ud800"}\n',
        encoding="utf-8")
    (folder / "ignored.bin").write_bytes(b"not of a text suffix")
    (folder / ".hidden.txt").write_text("hidden", encoding="utf-8")
    corpus = make(folder, cache)
    counted = {reason: corpus.stats[reason] for reason in ("duplicates", *data._PROBLEMS)}
    assert counted == {"duplicates": 1, "empty": 2, "binary": 1, "not_utf8": 2, "malformed": 3,
                       "unreadable": 0}
    assert all_texts(corpus) == sorted([*texts, "a row of its own"])
    assert "1 duplicates, 2 empty" in repr(corpus)


def test_unreadable_file_is_counted(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(data, "open", refuse, raising=False)
    assert [item.problem for item in data._read_file(tmp_path / "a.txt", "text", 100)] == ["unreadable"]


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert [item.text for item in data._text_items(tmp_path / "a.txt", 100, "a.txt")] == ["hello"]


def test_missing_source_names_what_is_allowed(tmp_path, cache):
    with pytest.raises(ValueError,
                       match="missing.*is not a file, a folder or a pattern.*'stdlib', "
                             "'site'.*'fineweb-edu'.*hf:"):
        make(tmp_path / "missing", cache)
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="is a folder without any file that ends in .txt .md"):
        make(tmp_path, cache)


@pytest.mark.parametrize("content", [b"", b"\x00\x01", "ä".encode("latin-1"), b"one line\n"])
def test_too_little_text(tmp_path, cache, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError,
                       match=r"source='.*a.txt': usable documents: [01], left out: .*; none fell on the .* "
                             r"side"):
        make(tmp_path / "a.txt", cache)
    assert not (cache / "corpora").exists() and not list((cache / "building").iterdir())


def test_wrong_text_field_lists_the_fields(tmp_path, cache, texts):
    for source in (as_jsonl(tmp_path, texts), as_parquet(tmp_path, texts), as_hugging_face(tmp_path, texts)):
        with pytest.raises(ValueError,
                           match="text_field='content' is no field of .*; its fields are (text, id|id, "
                                 "text)"):
            make(source, cache, text_field="content")


def test_windows_that_do_not_exist():
    corpus = Corpus.from_texts(make_texts())
    with pytest.raises(ValueError,
                       match=r"T=1000000 needs windows of 1000001 tokens, but the val split has \d+; allowed "
                             r"is T up to \d+"):
        corpus.n_windows("val", 10**6)
    with pytest.raises(ValueError, match="split='test' must be 'train' or 'val'"):
        corpus.n_windows("test", 8)
    n = corpus.n_windows("val", 8)
    for wrong in (-1, n):
        with pytest.raises(IndexError, match=f"must be between 0 and {n - 1}"):
            corpus.windows("val", [wrong], 8)
    with pytest.raises(ValueError, match=f"n={n + 1} must be between 1 and {n}"):
        corpus.sample_windows("val", n + 1, 8)
    for call in (lambda: corpus.n_windows("val", 0), lambda: corpus.batch(0, 2, 10**6)):
        with pytest.raises(ValueError, match="T="):
            call()


# ---- tokenizers


def test_text_never_becomes_a_special_token(texts):
    corpus = Corpus.from_texts([text + "<|endoftext|>" + text for text in texts], max_document_bytes=None)
    assert (corpus.train == corpus.eos_id).sum() == corpus.stats["train_documents"]
    assert all("<|endoftext|>" in text for text in all_texts(corpus))


def test_bpe_is_the_same_in_another_process(texts):
    code = f"import sys; sys.path[:0] = {sys.path!r}\n" + (
        "from sparsecod.data import *; import json; texts = json.load(sys.stdin)\n"
        "print(content_id(train_bpe(texts, 400).backend.to_str()).hex())")
    here = data.content_id(train_bpe(texts, 400).backend.to_str()).hex()
    for threads in ("1",):
        there = subprocess.run([sys.executable, "-c", code], input=json.dumps(texts), capture_output=True,
                               text=True, check=True,
                               env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
                               encoding="utf-8")
        assert there.stdout.strip() == here


def save_pretrained(folder, texts, rename_eos=None, settings=None):
    folder.mkdir(exist_ok=True)
    definition = train_bpe(texts, 350).backend.to_str()
    if rename_eos:
        definition = definition.replace("<|endoftext|>", rename_eos)
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_pretrained_tokenizer_from_a_folder(tmp_path, cache, texts):
    pretrained = save_pretrained(tmp_path / "pretrained", make_texts(seed=5))
    source = write_folder(tmp_path / "texts", texts)
    corpus = make(source, cache, tokenizer=str(pretrained), vocab_size=2048)
    assert corpus.vocab_size == load_tokenizer(str(pretrained)).vocab_size <= 350
    assert all_texts(corpus) == sorted(texts)
    by_file = make(source, cache, tokenizer=str(pretrained / "tokenizer.json"))
    assert by_file.fingerprint == corpus.fingerprint != make(source, cache).fingerprint


@pytest.mark.parametrize("settings",
                         [{"eos_token": "[STOP]"}, {"eos_token": {"content": "[STOP]", "special": True}}])
def test_declared_end_of_document(tmp_path, texts, settings):
    folder = save_pretrained(tmp_path / "pretrained", texts, "[STOP]", settings)
    assert load_tokenizer(str(folder)).eos_token == "[STOP]"


def test_a_changed_declaration_of_the_end_of_document_makes_another_corpus(tmp_path, cache, texts):
    folder = save_pretrained(tmp_path / "pretrained", texts, settings={})
    source = write_folder(tmp_path / "texts", texts)
    for name in (folder, folder / "tokenizer.json"):
        found = []
        for settings in ({}, {"eos_token": "!"}, {"eos_token": {"content": "A"}}):
            (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
            found.append(make(source, cache, tokenizer=str(name)))
        (folder / "tokenizer_config.json").unlink()
        found.append(make(source, cache, tokenizer=str(name)))
        assert [corpus.tokenizer.eos_token for corpus in found] == ["<|endoftext|>", "!", "A",
                                                                    "<|endoftext|>"]
        assert [corpus.fingerprint == found[0].fingerprint for corpus in found] == [True, False, False, True]


def test_tokenizer_without_end_of_document(tmp_path, texts):
    folder = save_pretrained(tmp_path / "pretrained", texts, "[STOP]")
    with pytest.raises(ValueError, match=r"eos_token=None, but tokenizer=.* set eos_token .*\[STOP\]"):
        load_tokenizer(str(folder))
    assert load_tokenizer(str(folder), "[STOP]").eos_id == 0
    with pytest.raises(ValueError, match=r"eos_token='\[END\]' must be a token"):
        load_tokenizer(str(folder), "[END]")


def test_tokenizer_that_cannot_be_loaded(tmp_path, monkeypatch):
    import tokenizers

    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer='.*' must be 'bpe', a folder with a tokenizer.json"):
        load_tokenizer(str(tmp_path))

    class Unreachable:
        @staticmethod
        def from_pretrained(name):
            raise OSError("no network")

    monkeypatch.setattr(tokenizers, "Tokenizer", Unreachable)
    with pytest.raises(ValueError,
                       match="tokenizer='owner/name' must be .*a name that can be fetched.*no network"):
        load_tokenizer("owner/name")


def test_special_tokens_padding_and_truncation_of_a_pretrained_tokenizer_are_off(tmp_path, texts):
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(train_bpe(texts, 300).backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<|endoftext|> $A",
                                                                      special_tokens=[("<|endoftext|>", 0)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
    assert tokenizer.encode_batch(texts[:2]) == [tokenizer.encode(text) for text in texts[:2]]


def test_large_vocabularies_are_stored_in_32_bits(tmp_path, cache, texts):
    import tokenizers

    source = write_folder(tmp_path / "texts", texts)
    small = make(source, cache)
    definition = json.loads(small.tokenizer.backend.to_str())
    vocab = definition["model"]["vocab"]
    for i in range(len(vocab), 70_000):
        vocab[f"unused {i}"] = i
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    backend.save(str(tmp_path / "tokenizer.json"))
    large = make(source, cache, tokenizer=str(tmp_path / "tokenizer.json"))
    assert small.train.dtype == np.uint16 and large.train.dtype == np.uint32 and large.vocab_size == 70_000
    assert isinstance(large.train, np.memmap) and not large.train.flags.writeable
    assert large.train.tolist() == small.train.tolist()
    assert data._token_dtype(65535) == np.uint16 and data._token_dtype(65536) == np.uint32
    assert large.batch(0, 2, 8).dtype == torch.int64


# ---- drawing windows


def test_batches_are_permutations_of_the_windows_and_need_no_history():
    corpus = Corpus.from_texts(make_texts(200))
    T, B = 40, 7
    n = corpus.n_windows("train", T)
    steps = -(-3 * n // B)
    number = {tuple(window): i for i, window in enumerate(corpus.windows("train", range(n), T).tolist())}
    drawn = [number[tuple(window)] for step in range(steps)
             for window in corpus.batch(step, B, T, seed=4).tolist()]
    epochs = [drawn[k * n:(k + 1) * n] for k in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(n))
    assert torch.equal(corpus.batch(steps - 1, B, T, seed=4), corpus.batch(steps - 1, B, T, seed=4))
    assert not torch.equal(corpus.batch(0, B, T, seed=4), corpus.batch(0, B, T, seed=5))
    joined = torch.cat([corpus.batch(2, B, T), corpus.batch(3, B, T)])
    assert torch.equal(joined, corpus.batch(1, 2 * B, T))  # the order does not depend on the batch size
    assert corpus.epochs(steps, B, T) == pytest.approx(steps * B / n)
    assert corpus.batch(3, B, T).shape == (B, T + 1)


def test_shuffled_is_a_permutation_with_large_numbers_too():
    n = 10**12
    places = np.random.default_rng(0).integers(0, n, 10_000)
    found = data.shuffled(places, n, data.order_key(0, 0))
    assert len(set(found.tolist())) == len(set(places.tolist())) and 0 <= found.min() and found.max() < n
    assert abs(found.mean() / n - 0.5) < 0.02
    assert data.shuffled(np.arange(0), 5, data.order_key(0, 0)).shape == (0,)


def test_neighbours_in_the_order_are_independent():
    n, seeds = 50, 4000
    orders = np.stack([data.shuffled(np.arange(2), n, data.order_key(seed, 0)) for seed in range(seeds)])
    distance = np.abs(orders[:, 0] - orders[:, 1])
    assert abs(distance.mean() - (n + 1) / 3) < 4 * distance.std() / seeds**0.5


def test_samples_are_distinct_and_nested():
    corpus = Corpus.from_texts(make_texts(200))
    n = corpus.n_windows("val", 40)
    everything = corpus.sample_windows("val", n, 40, seed=2)
    assert len({tuple(window) for window in everything.tolist()}) == n
    for k in (1, n // 2, n - 1):
        assert torch.equal(corpus.sample_windows("val", k, 40, seed=2), everything[:k])
    assert not torch.equal(corpus.sample_windows("val", n, 40, seed=3), everything)


def test_unigram_loss_against_a_direct_count():
    corpus = Corpus.from_texts(make_texts())
    train, val = corpus.train.tolist(), corpus.val.tolist()
    p = [(train.count(v) + 1) / (len(train) + corpus.vocab_size) for v in range(corpus.vocab_size)]
    assert corpus.unigram_loss() == pytest.approx(-sum(np.log(p[v]) for v in val) / len(val))
    assert data.count_tokens(corpus.train, corpus.vocab_size,
                             block=13).tolist() == [train.count(v) for v in range(corpus.vocab_size)]


# ---- the cache


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARSECOD_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert data.cache_folder() == Path.home() / ".cache" / "sparsecod"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.cache_folder() == tmp_path / "xdg" / "sparsecod"
    monkeypatch.setenv("SPARSECOD_CACHE", str(tmp_path / "own"))
    assert data.cache_folder() == tmp_path / "own"
    assert data.cache_folder(tmp_path / "argument") == tmp_path / "argument"


def test_fingerprint_follows_content_tokenizer_and_split(tmp_path, cache, texts):
    source = write_folder(tmp_path / "texts", texts)
    base = make(source, cache)
    assert make(source, tmp_path / "other cache").fingerprint == base.fingerprint
    assert make(write_folder(tmp_path / "copy", texts), cache).fingerprint == base.fingerprint
    others = [make(source, cache, **fields).fingerprint
              for fields in (dict(vocab_size=299), dict(val_share=0.4), dict(seed=1), dict(max_documents=50))]
    assert len({base.fingerprint, *others}) == 5
    (source / "0.txt").write_text("a new text\n", encoding="utf-8")
    assert make(source, cache).fingerprint != base.fingerprint
    config = json.loads(json.dumps(base.config.to_dict()))
    assert DataConfig(**config) == base.config


def test_found_without_reading(tmp_path, cache, texts, monkeypatch):
    source = write_folder(tmp_path / "texts", texts)
    base = make(source, cache)
    monkeypatch.setattr(data, "_read_file", lambda *args: pytest.fail("the source was read again"))
    assert make(source, cache).fingerprint == base.fingerprint


def other_corpus(folder):
    "A stored corpus in the same cache, of other texts."
    return make(write_folder(folder.parents[2] / "others", make_texts(seed=5)), folder.parents[1]).folder


def replace_byte(path, i=200):
    raw = bytearray(path.read_bytes())
    raw[i] ^= 1
    path.write_bytes(raw)


DAMAGE = {
    "meta.json is missing": lambda f: (f / "meta.json").unlink(),
    "meta.json is torn": lambda f: (f / "meta.json").write_text('{"fingerprint": ', encoding="utf-8"),
    "meta.json is empty": lambda f: (f / "meta.json").write_text("{}", encoding="utf-8"),
    "meta.json of another corpus": lambda f: (f / "meta.json").write_bytes(
        (other_corpus(f) / "meta.json").read_bytes()),
    "train.bin is short": lambda f: (f / "train.bin").write_bytes((f / "train.bin").read_bytes()[:-2]),
    "train.bin has another bit": lambda f: replace_byte(f / "train.bin"),
    "train.bin is zeros": lambda f: (f / "train.bin").write_bytes(bytes((f / "train.bin").stat().st_size)),
    "val.bin has ids beyond V": lambda f: (f / "val.bin").write_bytes(
        b"\xff" * (f / "val.bin").stat().st_size),
    "val.bin is missing": lambda f: (f / "val.bin").unlink(),
    "tokenizer.json is empty": lambda f: (f / "tokenizer.json").write_text("", encoding="utf-8"),
    "tokenizer.json has another token": lambda f: replace_byte(f / "tokenizer.json", -100),
    "manifest.json is missing": lambda f: (f / "manifest.json").unlink(),  # as older versions left it
}


def make_loudly(source, cache):
    "The corpus, and what was warned of."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return make(source, cache), " ".join(str(w.message) for w in caught)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_entries_are_named_kept_and_built_again(name, tmp_path, cache, texts):
    source = write_folder(tmp_path / "texts", texts)
    base = make(source, cache)
    expected = {side: base.tokens(side).tolist() for side in ("train", "val")}
    DAMAGE[name](base.folder)
    harmed = {path.name: path.read_bytes() for path in base.folder.iterdir()}
    with pytest.raises(data.Damaged, match=name.split()[0]):
        Corpus(base.folder)
    rebuilt, said = make_loudly(source, cache)
    assert str(base.folder / name.split()[0]) in said
    assert rebuilt.fingerprint == base.fingerprint
    assert {side: rebuilt.tokens(side).tolist() for side in ("train", "val")} == expected
    kept, = (cache / "corpora").glob("*.damaged")
    assert str(kept) in said and {path.name: path.read_bytes() for path in kept.iterdir()} == harmed
    assert make_loudly(source, cache)[1] == "" and not list((cache / "building").iterdir())


def test_a_corpus_under_the_name_of_another_is_not_taken(tmp_path, cache, texts):
    source = write_folder(tmp_path / "texts", texts)
    base = make(source, cache)
    other = other_corpus(base.folder)
    shutil.rmtree(base.folder)
    shutil.copytree(other, base.folder)
    rebuilt, said = make_loudly(source, cache)
    assert all_texts(rebuilt) == sorted(texts) and base.fingerprint in said and other.name in said


@pytest.mark.parametrize("harm", [
    lambda note, other: note.write_text("[]", encoding="utf-8"),
    lambda note, other: note.write_text("{", encoding="utf-8"),
    lambda note, other: note.write_bytes(other.read_bytes()),
    lambda note, other: note.write_text(json.dumps({"fingerprint": "../../elsewhere"}), encoding="utf-8"),
    lambda note, other: note.write_text(
        note.read_text(encoding="utf-8").replace('"val_documents"', '"val_document"'), encoding="utf-8")])
def test_a_damaged_note_of_a_request_is_not_believed(harm, tmp_path, cache, texts):
    source = write_folder(tmp_path / "texts", texts)
    base = make(source, cache)
    note, = (cache / "requests").iterdir()
    other_corpus(base.folder)
    other, = set((cache / "requests").iterdir()) - {note}
    harm(note, other)
    rebuilt, said = make_loudly(source, cache)
    assert rebuilt.fingerprint == base.fingerprint and str(note) in said
    assert make_loudly(source, cache)[1] == ""


def test_every_file_is_on_the_disk_before_a_corpus_appears(tmp_path, cache, texts, monkeypatch):
    flushed, flush, move = [], data.flush, data.os.replace
    monkeypatch.setattr(data, "flush", lambda path: (flushed.append(Path(path).name), flush(path)))
    monkeypatch.setattr(data.os, "replace",
                        lambda a, b: (flushed.append("moved" if Path(b).parent.name == "corpora" else ""),
                                      move(a, b)))
    corpus = make(write_folder(tmp_path / "texts", texts), cache)
    before = set(flushed[:flushed.index("moved")])
    assert ({path.name for path in corpus.folder.iterdir()} <= before
            and "corpora" in flushed[flushed.index("moved"):])


# ---- what is left out is told


def test_statistics_are_those_of_the_own_source(tmp_path, cache, texts):
    rows = [json.dumps({"text": text}) for text in texts]
    made = {}
    for name, extra in {"clean": [], "broken": ["{", "null"], "twice": rows[:7],
                        "empty": ['{"text": " "}']}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows + extra), encoding="utf-8")
        for _ in range(2):  # built, then found
            made[name] = make(tmp_path / f"{name}.jsonl", cache)
            counts = {reason: made[name].stats[reason] for reason in ("duplicates", *data._PROBLEMS)
                      if made[name].stats[reason]}
            assert counts == {"clean": {}, "broken": {"malformed": 2}, "twice": {"duplicates": 7},
                              "empty": {"empty": 1}}[name]
    assert (len({corpus.fingerprint for corpus in made.values()}) == 1
            and len(list((cache / "corpora").iterdir())) == 1)
    assert (made["broken"].left_out == {"malformed": f"{tmp_path / 'broken.jsonl'}, row 61"}
            and not made["clean"].left_out)


def damaged_parquet(path, texts):
    as_parquet(path, texts)
    raw = (path / "rows.parquet").read_bytes()
    (path / "rows.parquet").unlink()
    return raw


ODD = {  # file beside good ones: its content, from a scratch folder; the problem that it is counted as
    "latin.txt": (lambda scratch: "déjà vu".encode("latin-1"), "not_utf8"),
    "utf16.md": (lambda scratch: "text".encode("utf-16"), "binary"),
    "cp1251.rst": (lambda scratch: "слово".encode("cp1251"), "not_utf8"),
    "deep.jsonl": (lambda scratch: b"[" * 200_000, "malformed"),
    "deeper.jsonl": (lambda scratch: b'{"text":' * 100_000, "malformed"),
    "list.jsonl": (lambda scratch: b'["text"]\n', "malformed"),
    "number.jsonl": (lambda scratch: b"5\n", "malformed"),
    "latin.jsonl": (lambda scratch: '{"text": "é"}'.encode("latin-1"), "malformed"),
    "empty.parquet": (lambda scratch: b"", "unreadable"),
    "pointer.parquet": (lambda scratch: b"version https://example.org/spec\nsize 12345\n", "unreadable"),
    "torn.parquet": (lambda scratch: damaged_parquet(scratch, make_texts(seed=9))[:-50], "unreadable"),
    "page.parquet": (lambda scratch: (raw := damaged_parquet(scratch, make_texts(seed=9)))[:4] + bytes(300)
                     + raw[304:], "unreadable"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_left_out_and_named(name, tmp_path, cache, texts):
    content, problem = ODD[name]
    source = write_folder(tmp_path / "texts", texts)
    (source / name).write_bytes(content(tmp_path))
    for _ in range(2):  # built, then found: who asks is told
        corpus, said = make_loudly(source, cache)
        assert all_texts(corpus) == sorted(texts) and corpus.stats[problem] == 1
        assert f"1 {problem}" in said and str(source / name) in said
        assert str(source / name) in corpus.left_out[problem]
    (source / name).unlink()
    clean, said = make_loudly(source, cache)
    assert clean.fingerprint == corpus.fingerprint and said == ""


def test_only_unreadable_text_is_an_error_with_a_name(tmp_path, cache):
    folder = write_folder(tmp_path / "texts", [])
    for i in range(5):
        (folder / f"{i}.txt").write_bytes("é".encode("latin-1") * (i + 1))
    with pytest.raises(ValueError, match=f"5 not_utf8.*{folder}"):
        make(folder, cache)


def test_texts_in_memory_are_named_by_their_row(texts):
    with pytest.warns(UserWarning, match="2 not_utf8.*row 61.*1 malformed.*row 62|1 malformed.*row 62"):
        corpus = Corpus.from_texts([*texts, "\ud800", None, "\udfff"])
    assert all_texts(corpus) == sorted(all_texts(Corpus.from_texts(texts)))


def test_stdlib_does_not_warn_of_its_own_oddities():
    corpus = Corpus.from_texts(make_texts())
    corpus.stats = {**corpus.stats, "not_utf8": 4}
    for source, n in (("stdlib", 0), ("site", 0), ("mine", 1)):
        corpus.config = corpus.config.replace(source=source)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data._tell_left_out(corpus)
        assert len(caught) == n


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"\xff\xfe.txt", b"\x80.jsonl"])
def test_a_file_name_need_not_be_utf8(name, tmp_path, cache, texts):
    source = write_folder(tmp_path / "texts", texts)
    text = make_texts(1, seed=3)[0]
    (source / os.fsdecode(name)).write_text(text if name.endswith(b"txt") else json.dumps({"text": text}),
                                            encoding="utf-8")
    for pattern in (source, source / "*"):
        assert all_texts(make(pattern, cache)) == sorted([*texts, text])
    (source / os.fsdecode(b"bad-" + name[:-4] + b".txt")).write_bytes(b"\xff")
    _, said = make_loudly(source, cache)
    assert "1 not_utf8" in said and said.encode("utf-8")  # can be shown anywhere


# ---- patterns


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    for name in ("a.txt", "sub/b.txt", "sub/deep/c.txt", "sub/deep/d.md", ".hidden/e.txt", "[x]/f.txt",
                 "other/g.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name, encoding="utf-8")
    return root


@pytest.mark.parametrize("pattern", ["**/*.txt", "*/*.txt", "**", "sub/**/*", "**/deep/**/*.txt", "s*/**/c.*",
                                     "**/*/*.txt", "*.txt", "none/**/*"])
def test_patterns_mean_what_they_mean_in_a_shell(pattern, tree, monkeypatch):
    expected = {Path(p) for p in data.glob.glob(str(tree / pattern), recursive=True) if os.path.isfile(p)}
    assert data.matching_files(str(tree / pattern)) == expected
    monkeypatch.chdir(tree)
    assert {tree / path for path in data.matching_files(pattern)} == expected


@pytest.mark.parametrize("links", [{"l1": ".", "l2": "."}, {"sub/up": "..", "sub/deep/top": "../.."},
                                   {"x": "y", "y": "x"},
                                   {"sub/a": "../other", "other/b": "../sub"},
                                   {f"l{i}": "." for i in range(9)}])
def test_patterns_end_where_links_lead_in_circles(links, tree, cache):
    expected = {path.resolve() for path in data.matching_files(str(tree / "**/*.txt"))}
    for name, target in links.items():
        (tree / name).symlink_to(target)
    found = data.matching_files(str(tree / "**/*.txt"))
    assert {path.resolve() for path in found} == expected and len(found) == len(expected)
    assert not any(path.parts[len(tree.parts)] in links for path in found)  # real names, not those of links


def test_patterns_follow_links_to_text_elsewhere(tree, tmp_path, texts):
    elsewhere = write_folder(tmp_path / "elsewhere", texts[:3])
    (tree / "sub" / "link").symlink_to(elsewhere)
    assert {tree / "sub" / "link" / f"{i}.txt"
            for i in range(3)} <= data.matching_files(str(tree / "**/*.txt"))


# ---- long words


@pytest.mark.parametrize("alphabet", ["ab", "acgt", "0123456789", " ", "\n\t ", "-_#", "日本語", "é"])
def test_long_words_are_cut_and_nothing_else(alphabet):
    long = "".join(random.Random(0).choices(alphabet, k=5 * data._LONGEST_WORD + 3))
    pieces = list(data._cut_long_words([f"before {long} after", "short"]))
    assert "".join(pieces) == f"before {long} after" + "short" and pieces[-1] == "short"
    from tokenizers.pre_tokenizers import ByteLevel
    longest = max(len(word) for piece in pieces
                  for word, _ in ByteLevel(add_prefix_space=False,
                                           trim_offsets=False).pre_tokenize_str(piece))
    assert longest <= 3 * data._LONGEST_WORD + 1  # in bytes, with the blank before


def test_normal_text_is_not_cut(texts):
    code = ["x = {" + "'key': [1, 2.5, None], " * 500 + "}", "-" * 79 + "\n" + " " * 400, "a1b2" * 2000,
            "lang" * 200]
    assert list(data._cut_long_words([*texts, *code, ""])) == [*texts, *code, ""]


def test_a_word_of_half_a_megabyte_is_no_obstacle():
    word = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=500_000))
    code = ("import sys; from sparsecod.data import train_bpe; print(train_bpe([sys.stdin.read()], "
            "1000).vocab_size)")
    found = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; " + code],
                           input=word, capture_output=True,
                           text=True, timeout=100, encoding="utf-8", check=True)
    assert found.stdout.strip() == "1000"


def start(code, source, cache, **options):
    head = f"import sys; sys.path[:0] = {sys.path!r}\nimport time, sparsecod.data as data\n"
    tail = (f"\nconfig = data.DataConfig({str(source)!r}, vocab_size=300, "
            f"val_share=0.2)\nprint(data.prepare(config, {str(cache)!r}, progress=False).fingerprint)")
    return subprocess.Popen([sys.executable, "-u", "-c", head + code + tail], stdout=subprocess.PIPE,
                            text=True, encoding="utf-8", **options)


def test_two_processes_build_once(tmp_path, cache, texts):
    source = write_folder(tmp_path / "texts", texts)
    slow_build = """
build = data._build
def slow(*args):
    print("built", flush=True)
    time.sleep(1.5)
    return build(*args)
data._build = slow
"""
    processes = [start(slow_build, source, cache) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sorted(map(len, outputs)) == [1, 2] and sum("built" in output for output in outputs) == 1
    assert len({output[-1] for output in outputs}) == 1
    assert len(list((cache / "corpora").iterdir())) == 1 and not list((cache / "building").iterdir())
    assert all_texts(make(source, cache)) == sorted(texts)


def test_a_killed_build_leaves_nothing_readable(tmp_path, cache, texts):
    source = write_folder(tmp_path / "texts", texts)
    process = start("""
def stop_here(*args):
    print("half-way", flush=True)
    time.sleep(60)
data._check_sides = stop_here
""", source, cache)
    assert process.stdout.readline().strip() == "half-way"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert list((cache / "building").iterdir())
    assert not (cache / "corpora").exists() and not (cache / "requests").exists()
    corpus = make(source, cache)
    assert all_texts(corpus) == sorted(texts) and not list((cache / "building").iterdir())


def test_a_failed_build_leaves_nothing(tmp_path, cache, texts, monkeypatch):
    source = write_folder(tmp_path / "texts", texts)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "_check_sides", interrupt)
        make(source, cache)
    assert not list((cache / "building").iterdir()) and not (cache / "corpora").exists()
    assert all_texts(make(source, cache)) == sorted(texts)


# ---- caches that others share, that cannot be written, or that are not there


def test_no_home_names_the_variable_to_set(monkeypatch):
    for name in ("SPARSECOD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: os.fspath(path))  # as if nobody knew a home
    with pytest.raises(ValueError, match="SPARSECOD_CACHE"):
        prepare(progress=False)
    monkeypatch.setenv("SPARSECOD_CACHE", "~somebody/cache")
    with pytest.raises(ValueError, match="~somebody/cache.*SPARSECOD_CACHE"):
        data.cache_folder()


@pytest.mark.parametrize("place", ["file/cache", "file"])
def test_a_cache_that_cannot_be_written_is_named(place, tmp_path, texts):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    source = write_folder(tmp_path / "texts", texts)
    with pytest.raises(OSError, match=f"{tmp_path / place}.*SPARSECOD_CACHE") as caught:
        make(source, tmp_path / place)
    assert caught.value.errno


@pytest.mark.skipif(os.name == "nt", reason="limits of file size are for Unix")
@pytest.mark.parametrize("limit", [100, 5000])  # bytes a file may have: as if the disk were full
def test_a_full_disk_leaves_nothing_and_names_the_way_out(limit, tmp_path, cache, texts):
    source = write_folder(tmp_path / "texts", texts)
    import resource
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match="SPARSECOD_CACHE") as error: make(source, cache)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(cache) in str(error.value)
    assert not [path for folder in ("building", "corpora", "requests")
                for path in (cache / folder).rglob("*")]
    assert all_texts(make(source, cache)) == sorted(texts)


@pytest.mark.skipif(os.name == "nt", reason="permissions are those of Unix")
@pytest.mark.parametrize("mode", [0o2775, 0o770, 0o755, 0o777])
def test_those_who_may_write_to_a_cache_may_build_there(mode, tmp_path, cache, texts):
    cache.mkdir()
    cache.chmod(mode)
    old = os.umask(0o022)
    try: corpus = make(write_folder(tmp_path / "texts", texts), cache)
    finally: os.umask(old)
    for folder in ("locks", "building", "corpora", "requests"):
        assert (cache / folder).stat().st_mode & 0o7777 == mode
    assert all(lock.stat().st_mode & 0o777 == mode & 0o666 for lock in (cache / "locks").iterdir())
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in corpus.folder.iterdir())


def test_what_is_stored_needs_no_right_to_write(tmp_path, cache, texts, monkeypatch):
    source = write_folder(tmp_path / "texts", texts)
    base = make(source, cache)
    for name in ("_cache_lock", "_shared_folder", "write_text"):
        monkeypatch.setattr(data, name, lambda *args: pytest.fail("something was written"))
    assert make(source, cache).fingerprint == base.fingerprint


def test_a_stream_is_closed_when_enough_is_read(monkeypatch, cache, texts):
    import datasets

    closed = []

    def endless():
        try:
            for i in range(10**9):
                yield {"text": f"{i} {texts[i % len(texts)]}"}
        finally:
            closed.append(True)

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: endless())
    monkeypatch.setattr(data, "_publish",
                        lambda *args, publish=data._publish: (closed.append("published"), publish(*args)))
    make("hf:endless", cache, max_documents=100)
    assert closed == [True, "published"]


def test_a_stream_that_breaks_is_named(monkeypatch, cache, texts):
    import datasets

    def broken():
        yield {"text": texts[0]}
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: broken())
    with pytest.raises(ValueError, match="hf:far/away.*the line is dead"):
        make("hf:far/away", cache)
    assert not list((cache / "building").iterdir())


def test_importing_is_light():
    code = (f"import sys; sys.path[:0] = {sys.path!r}; import sparsecod.data; print([m for m in "
            f"('tokenizers', 'datasets', 'pyarrow', 'pandas') if m in sys.modules])")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           encoding="utf-8")
    assert found.stdout.strip() == "[]"


def test_progress_bar_ends_at_the_end(tmp_path, cache, texts, capsys):
    source = write_folder(tmp_path / "texts", texts)
    (source / "copy.txt").write_text(texts[0], encoding="utf-8")
    prepare(DataConfig(str(source), vocab_size=300, val_share=0.2), cache)
    assert "100%" in capsys.readouterr().err
    prepare(DataConfig(str(source), vocab_size=300, val_share=0.2), cache)
    assert capsys.readouterr().err == ""  # found: nothing to show
