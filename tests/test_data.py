"Tests of sparsecod.data beyond the examples of its chapter: files of every kind, damage, and processes that meet."
import json
import os
import random
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
    return prepare(DataConfig(str(source), **{"vocab_size": 300, "val_share": 0.2, **fields}), cache, progress=False)


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
    (path / "rows.jsonl").write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)), encoding="utf-8")
    return path / "rows.jsonl"


def as_parquet(path, texts):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path / "rows.parquet", row_group_size=7)
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


@pytest.mark.parametrize("write", [as_folder, as_glob, as_jsonl, as_parquet, as_folder_of_rows, as_hugging_face])
def test_every_source_gives_all_documents_once(write, tmp_path, cache, texts):
    corpus = make(write(tmp_path, texts), cache)
    assert all_texts(corpus) == sorted(texts)
    assert not set(stored_texts(corpus, "train")) & set(stored_texts(corpus, "val"))
    assert corpus.stats["train_documents"] + corpus.stats["val_documents"] == len(texts)
    assert corpus.stats["train_tokens"] == len(corpus.train) and corpus.stats["val_tokens"] == len(corpus.val)
    assert corpus.stats["train_bytes"] + corpus.stats["val_bytes"] == sum(len(text.encode()) for text in texts)


def test_sides_do_not_depend_on_the_source(tmp_path, cache, texts):
    sides = [{split: sorted(stored_texts(make(write(tmp_path, texts), cache), split)) for split in ("train", "val")}
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
        items = list(data.read_text(tmp_path / "a.txt", limit, encoding="utf-8"))
        assert [item.text.encode() for item in items] == list(data.cut(raw, limit))
        assert {item.problem for item in items} <= {"", "empty"} and sum(item.consumed for item in items) == len(raw)
    assert list(data.cut(b"\x80" * 100, 10))  # no character starts here: still ends


def test_stdlib_is_that_of_the_base_interpreter():
    paths = [path for _, path in data.list_files("stdlib")]
    assert Path(os.__file__) in paths and not any(part in data.PACKAGE_FOLDERS for path in paths for part in path.parts)
    assert all(path.suffix == ".py" for path in paths)
    assert set(paths) < {path for _, path in data.list_files("site")}
    assert Path(torch.__file__) in {path for _, path in data.list_files("site")}


def test_stdlib_inside_a_virtual_environment(tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = next(p for p in (venv / "bin" / "python", venv / "Scripts" / "python.exe") if p.exists())
    found = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('stdlib'))"], capture_output=True, text=True, check=True, encoding="utf-8")
    assert [Path(found.stdout.strip())] == data.python_folders("stdlib")


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
    corpus = prepare(DataConfig("fineweb-edu", vocab_size=300, val_share=0.2, max_tokens=2000), cache, progress=False)
    assert asked["args"] == ("HuggingFaceFW/fineweb-edu", "sample-10BT")
    assert asked["split"] == "train" and asked["streaming"] is True
    assert 1500 < len(corpus.train) + len(corpus.val) <= 2000
    assert corpus.config.source == "hf:HuggingFaceFW/fineweb-edu"

    def unreachable(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    again = prepare(DataConfig("fineweb-edu", vocab_size=300, val_share=0.2, max_tokens=2000), cache, progress=False)
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
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.update(args=args, **options) or [])
    list(data.hf_rows("hf:owner/name@v1", "subset", "test"))
    assert asked == {"args": ("owner/name", "subset"), "split": "test", "streaming": True, "revision": "v1"}


# ---- what is left out, and errors


def test_unusable_documents_are_counted(tmp_path, cache, texts):
    folder = write_folder(tmp_path / "texts", texts)
    (folder / "copy.txt").write_text(texts[3], encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    (folder / "blank.md").write_text(" \n\n", encoding="utf-8")
    (folder / "picture.txt").write_bytes(b"\x89PNG\x00\x01\x02")
    (folder / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (folder / "rows.jsonl").write_text('{"text": "a row of its own"}\n[1, 2]\n{"text": 5}\n{broken\n\n{"text": "\\ud800"}\n', encoding="utf-8")
    (folder / "ignored.bin").write_bytes(b"not of a text suffix")
    (folder / ".hidden.txt").write_text("hidden", encoding="utf-8")
    corpus = make(folder, cache)
    counted = {reason: corpus.stats[reason] for reason in ("duplicates", *data.PROBLEMS)}
    assert counted == {"duplicates": 1, "empty": 2, "binary": 1, "not_utf8": 2, "malformed": 3, "unreadable": 0}
    assert all_texts(corpus) == sorted([*texts, "a row of its own"])
    assert "1 duplicates, 2 empty" in repr(corpus)


def test_unreadable_file_is_counted(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(data, "open", refuse, raising=False)
    assert [item.problem for item in data.read_file(tmp_path / "a.txt", "text", 100)] == ["unreadable"]


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert [item.text for item in data.read_text(tmp_path / "a.txt", 100, encoding="utf-8")] == ["hello"]


@pytest.mark.parametrize("fields, message", [
    (dict(vocab_size=256), "vocab_size=256 must be at least 257"),
    (dict(val_share=0.0), "val_share=0.0 must be greater than 0"),
    (dict(val_share=1), "val_share=1 must be .* less than 1"),
    (dict(max_documents=0), "max_documents=0 must be at least 1"),
    (dict(max_document_bytes=3), "max_document_bytes=3 must be at least 4"),
    (dict(sample_bytes=0), "sample_bytes=0 must be at least 1"),
    (dict(source=" "), "source=' ' must be a string that is not empty"),
])
def test_config_checks_itself(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


def test_missing_source_names_what_is_allowed(tmp_path, cache):
    with pytest.raises(ValueError, match="missing.*is not a file, a folder or a pattern.*'stdlib', 'site', 'fineweb-edu'.*hf:"):
        make(tmp_path / "missing", cache)
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="is a folder without any file that ends in .txt .md"):
        make(tmp_path, cache)


@pytest.mark.parametrize("content", [b"", b"\x00\x01", "ä".encode("latin-1"), b"one line\n"])
def test_too_little_text(tmp_path, cache, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"source='.*a.txt': usable documents: [01], left out: .*; none fell on the .* side"):
        make(tmp_path / "a.txt", cache)
    assert not (cache / "corpora").exists() and not list((cache / "building").iterdir())


def test_wrong_text_field_lists_the_fields(tmp_path, cache, texts):
    for source in (as_jsonl(tmp_path, texts), as_parquet(tmp_path, texts), as_hugging_face(tmp_path, texts)):
        with pytest.raises(ValueError, match="text_field='content' is no field of .*; its fields are (text, id|id, text)"):
            make(source, cache, text_field="content")


def test_windows_that_do_not_exist():
    corpus = Corpus.from_texts(make_texts())
    with pytest.raises(ValueError, match=r"T=1000000 needs windows of 1000001 tokens, but the val split has \d+; allowed is T up to \d+"):
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
        there = subprocess.run([sys.executable, "-c", code], input=json.dumps(texts), capture_output=True, text=True, check=True,
                               env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}, encoding="utf-8")
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


@pytest.mark.parametrize("settings", [{"eos_token": "[STOP]"}, {"eos_token": {"content": "[STOP]", "special": True}}])
def test_declared_end_of_document(tmp_path, texts, settings):
    folder = save_pretrained(tmp_path / "pretrained", texts, "[STOP]", settings)
    assert load_tokenizer(str(folder)).eos_token == "[STOP]"


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
    monkeypatch.setattr(data, "hub_file", lambda name, filename: None)

    class Unreachable:
        @staticmethod
        def from_pretrained(name):
            raise OSError("no network")

    monkeypatch.setattr(tokenizers, "Tokenizer", Unreachable)
    with pytest.raises(ValueError, match="tokenizer='owner/name' must be .*a name that can be fetched.*no network"):
        load_tokenizer("owner/name")


def test_special_tokens_padding_and_truncation_of_a_pretrained_tokenizer_are_off(tmp_path, texts):
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(train_bpe(texts, 300).backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
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
    assert data.token_dtype(65535) == np.uint16 and data.token_dtype(65536) == np.uint32
    assert large.batch(0, 2, 8).dtype == torch.int64


# ---- drawing windows


def test_batches_are_permutations_of_the_windows_and_need_no_history():
    corpus = Corpus.from_texts(make_texts(200))
    T, B = 40, 7
    n = corpus.n_windows("train", T)
    steps = -(-3 * n // B)
    number = {tuple(window): i for i, window in enumerate(corpus.windows("train", range(n), T).tolist())}
    drawn = [number[tuple(window)] for step in range(steps) for window in corpus.batch(step, B, T, seed=4).tolist()]
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
    assert data.count_tokens(corpus.train, corpus.vocab_size, block=13).tolist() == [train.count(v) for v in range(corpus.vocab_size)]


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
    others = [make(source, cache, **fields).fingerprint for fields in (dict(vocab_size=299), dict(val_share=0.4), dict(seed=1), dict(max_documents=50))]
    assert len({base.fingerprint, *others}) == 5
    (source / "0.txt").write_text("a new text\n", encoding="utf-8")
    assert make(source, cache).fingerprint != base.fingerprint
    config = json.loads(json.dumps(base.config.to_dict()))
    assert DataConfig(**config) == base.config


def test_found_without_reading(tmp_path, cache, texts, monkeypatch):
    source = write_folder(tmp_path / "texts", texts)
    base = make(source, cache)
    monkeypatch.setattr(data, "read_file", lambda *args: pytest.fail("the source was read again"))
    assert make(source, cache).fingerprint == base.fingerprint


def damage_missing_meta(folder):
    (folder / "meta.json").unlink()


def damage_broken_meta(folder):
    (folder / "meta.json").write_text('{"fingerprint": ', encoding="utf-8")


def damage_old_meta(folder):
    (folder / "meta.json").write_text("{}", encoding="utf-8")


def damage_short_tokens(folder):
    path = folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])


def damage_missing_tokens(folder):
    (folder / "val.bin").unlink()


def damage_tokenizer(folder):
    (folder / "tokenizer.json").write_text("", encoding="utf-8")


@pytest.mark.parametrize("damage", [damage_missing_meta, damage_broken_meta, damage_old_meta, damage_short_tokens, damage_missing_tokens, damage_tokenizer])
def test_damaged_entries_are_reported_and_rebuilt(damage, tmp_path, cache, texts):
    source = write_folder(tmp_path / "texts", texts)
    base = make(source, cache)
    expected = base.train.tolist()
    damage(base.folder)
    with pytest.raises(data.DamagedEntry, match="is damaged"):
        Corpus(base.folder)
    with pytest.warns(UserWarning, match="is damaged.*building it again"):
        rebuilt = make(source, cache)
    assert rebuilt.fingerprint == base.fingerprint and rebuilt.train.tolist() == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(source, cache)


def start(code, source, cache):
    head = f"import sys; sys.path[:0] = {sys.path!r}\nimport time, sparsecod.data as data\n"
    tail = f"\nconfig = data.DataConfig({str(source)!r}, vocab_size=300, val_share=0.2)\nprint(data.prepare(config, {str(cache)!r}, progress=False).fingerprint)"
    return subprocess.Popen([sys.executable, "-u", "-c", head + code + tail], stdout=subprocess.PIPE, text=True, encoding="utf-8")


def test_two_processes_build_once(tmp_path, cache, texts):
    source = write_folder(tmp_path / "texts", texts)
    slow_build = """
build = data.build
def slow(*args):
    print("built", flush=True)
    time.sleep(1.5)
    return build(*args)
data.build = slow
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
data.check_sides = stop_here
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
        patch.setattr(data, "check_sides", interrupt)
        make(source, cache)
    assert not list((cache / "building").iterdir()) and not (cache / "corpora").exists()
    assert all_texts(make(source, cache)) == sorted(texts)


def test_importing_is_light():
    code = f"import sys; sys.path[:0] = {sys.path!r}; import sparsecod.data; print([m for m in ('tokenizers', 'datasets', 'pyarrow', 'pandas') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8")
    assert found.stdout.strip() == "[]"


def test_progress_bar_ends_at_the_end(tmp_path, cache, texts, capsys):
    source = write_folder(tmp_path / "texts", texts)
    (source / "copy.txt").write_text(texts[0], encoding="utf-8")
    prepare(DataConfig(str(source), vocab_size=300, val_share=0.2), cache)
    assert "100%" in capsys.readouterr().err
    prepare(DataConfig(str(source), vocab_size=300, val_share=0.2), cache)
    assert capsys.readouterr().err == ""  # found: nothing to show
