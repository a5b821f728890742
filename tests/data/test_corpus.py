"""Text becomes tokens by the field's protocols; what is drawn is seeded and drawn from the text itself."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bisup_lightning.data.corpus import (
    HELD_OUT,
    CalibrationData,
    calibration_tokens,
    documents,
    evaluation_tokens,
    self_generated,
    tokenize,
)
from bisup_lightning.errors import UserError
from tests.inputs import DEMO

CPU = torch.device("cpu")
SEPARATORS = "one\u2028two\u2029three\x85four\x0bfive\x1csix\r"  # lines end here for Python, not for JSON
ROWS = ["", " = A title =\n", "", " First paragraph of words .\n", " Second paragraph , with “quotes” .\n", ""] * 40


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def write(folder, suffix, rows):
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": row, "url": "x"}) + "\n" for row in rows), encoding="utf-8")
    elif suffix == ".parquet":
        import datasets

        datasets.Dataset.from_dict({"text": rows}).to_parquet(path)
    else:
        path.write_text("\n\n".join(rows), encoding="utf-8")
    return path


@pytest.fixture
def named(monkeypatch):
    """Stands in for the hub: `named(rows)` makes every set hold these rows and returns the requests."""
    requests = []

    def install(rows):
        def load_dataset(*arguments, **settings):
            requests.append((arguments, settings))
            return {"text": rows}

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        return requests

    return install


def starts(ids, slices_NT):
    """Every place where each slice occurs in the text."""
    windows = ids.unfold(0, slices_NT.shape[1], 1)
    return [(windows == row).all(1).nonzero().flatten().tolist() for row in slices_NT]


# --- calibration ------------------------------------------------------------------------------------------------------


def test_slices_are_seeded_and_lie_inside_the_text(tokenizer, text_file):
    ids = tokenize(text_file.read_text(encoding="utf-8"), tokenizer)
    data = CalibrationData(str(text_file), num_samples=20, seq_len=48)
    first, again, other = (calibration_tokens(data, tokenizer, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    places = starts(ids, first)
    assert all(places)
    assert len({place[0] for place in places}) > 15  # all over the text, not one after the other
    assert max(place[0] for place in places) > len(ids) / 2


def test_the_global_random_state_has_no_say(tokenizer, text_file):
    data = CalibrationData(str(text_file), num_samples=4, seq_len=16)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = calibration_tokens(data, tokenizer, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(calibration_tokens(data, tokenizer, 0), first)


def test_every_place_of_the_text_can_be_drawn(tokenizer, tmp_path):
    """The last T tokens and the first are slices like any other; two sequences of text are enough."""
    path = tmp_path / "short.txt"
    path.write_text(" ".join(f"{n} is a number" for n in range(9)))
    ids = tokenize(path.read_text(), tokenizer)
    length = len(ids) // 2
    places = starts(ids, calibration_tokens(CalibrationData(str(path), 600, length), tokenizer, 0))
    assert {place[0] for place in places} == set(range(len(ids) - length + 1))
    with pytest.raises(UserError, match=rf"fewer than 2 × data.seq_len = {2 * (length + 1)}"):
        calibration_tokens(CalibrationData(str(path), 1, length + 1), tokenizer, 0)


@pytest.mark.parametrize("suffix", [".txt", ".raw", ".jsonl", ".parquet"])
def test_files_of_every_kind_give_the_same_tokens(tokenizer, tmp_path, suffix):
    """Documents joined by a blank line, one tokenizer call: also the rows of WikiText, many of them empty."""
    path = write(tmp_path, suffix, ROWS)
    assert "\n\n".join(documents("data.calibration", str(path), "test")) == "\n\n".join(ROWS)
    ids = torch.tensor(tokenizer("\n\n".join(ROWS))["input_ids"])
    drawn = calibration_tokens(CalibrationData(str(path), 6, 40), tokenizer, 0)
    assert all(starts(ids, drawn))


def test_words_may_hold_any_separator_of_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [SEPARATORS, "more"]
    text = "\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows)
    for end in ("", "\n", "\r\n"):
        path.write_bytes((text.replace("\n", "\r\n" if "\r" in end else "\n") + end).encode())
        assert documents("data.calibration", str(path), "train") == rows


@pytest.mark.parametrize(("rows", "first"), [(["words", None], 1), ([1, 2], 0), ([["words"], ["more"]], 0)])
def test_rows_without_words_are_named(tmp_path, rows, first):
    path = write(tmp_path, ".parquet", rows)
    with pytest.raises(UserError, match=f"rows.parquet: row {first} has no words"):
        documents("data.calibration", str(path), "train")


def test_wikitext_is_calibrated_on_its_training_split(tokenizer, named):
    requests = named(ROWS)
    drawn = calibration_tokens(CalibrationData("wikitext2", 6, 40), tokenizer, 0)
    assert requests == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"})]
    assert all(starts(torch.tensor(tokenizer("\n\n".join(ROWS))["input_ids"]), drawn))


def test_c4_is_calibrated_on_its_training_split(tokenizer, named):
    requests = named([f"Document {n} speaks of {n * 7919}." for n in range(400)])
    calibration_tokens(CalibrationData("c4", 2, 40), tokenizer, 0)
    assert "train" in json.dumps(requests[0])
    assert "validation" not in json.dumps(requests[0])


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_chunks_follow_each_other_and_the_tail_is_dropped(tokenizer, tmp_path, suffix):
    path = write(tmp_path, suffix, ROWS)
    ids = tokenizer("\n\n".join(ROWS))["input_ids"]
    length = 64
    count = len(ids) // length
    assert len(ids) % length  # there is a tail
    chunks = evaluation_tokens(str(path), tokenizer, length, None)
    assert chunks.tolist() == [ids[n * length : (n + 1) * length] for n in range(count)]
    for most in (1, count - 1, count, count + 5):
        assert torch.equal(evaluation_tokens(str(path), tokenizer, length, most), chunks[:most])
    assert torch.equal(evaluation_tokens(str(path), tokenizer, len(ids), None), torch.tensor([ids]))
    with pytest.raises(UserError, match=f"{len(ids)} tokens, fewer than evaluation.seq_len"):
        evaluation_tokens(str(path), tokenizer, len(ids) + 1, None)


def test_wikitext_is_measured_on_its_test_split(tokenizer, named):
    requests = named(ROWS)
    chunks = evaluation_tokens("wikitext2", tokenizer, 64, 3)
    assert requests == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]
    assert chunks.flatten().tolist() == tokenizer("\n\n".join(ROWS))["input_ids"][: 3 * 64]


def long_documents(count, words, seed=0):
    generator = random.Random(seed)
    vocabulary = ["river", "stone", "cloud", "letter", "window", "garden", "number", "answer", "market", "winter"]
    return [f"{n}: " + " ".join(generator.choices(vocabulary, k=words)) for n in range(count)]


def test_c4_takes_256_random_slices_of_documents_that_are_long_enough(tokenizer, named):
    """Documents too short for a slice are passed over; slices never cross from one document into the next."""
    length = 32
    texts = [text for pair in zip(long_documents(300, 60), long_documents(300, 4, 1), strict=True) for text in pair]
    requests = named(texts)
    slices = evaluation_tokens("c4", tokenizer, length, None)
    assert slices.shape == (256, length)
    assert "validation" in json.dumps(requests[0])
    assert torch.equal(slices, evaluation_tokens("c4", tokenizer, length, None))
    assert torch.equal(slices[:7], evaluation_tokens("c4", tokenizer, length, 7))
    homes, firsts = [], []
    all_ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    for row in slices:
        places = [
            (n, place) for n, ids in enumerate(all_ids) if len(ids) >= length for place in starts(ids, row[None])[0]
        ]
        assert len(places) == 1
        homes.append(places[0][0])
        firsts.append(places[0][1])
    assert len(set(homes)) > 100
    assert homes != sorted(homes)
    assert len(set(firsts)) > 10


def test_c4_takes_a_document_of_exactly_one_slice(tokenizer, named):
    text = "river stone cloud letter"
    ids = torch.tensor(tokenizer(text)["input_ids"])
    named([text, "winter"])
    assert torch.equal(evaluation_tokens("c4", tokenizer, len(ids), None), ids[None])


def test_c4_slices_do_not_depend_on_anything_global(tokenizer, named):
    named(long_documents(40, 60))
    random.seed(1)
    torch.manual_seed(1)
    first = evaluation_tokens("c4", tokenizer, 16, 8)
    random.seed(2)
    torch.manual_seed(2)
    assert torch.equal(evaluation_tokens("c4", tokenizer, 16, 8), first)


def test_c4_without_a_long_document_says_so(tokenizer, named):
    named(long_documents(20, 5))
    with pytest.raises(UserError, match=r"evaluation\.seq_len = 500"):
        evaluation_tokens("c4", tokenizer, 500, None)


def test_c4_new_joins_the_first_1100_documents_by_a_space(tokenizer, named):
    texts = long_documents(1300, 12)
    named(texts)
    length = 48
    ids = tokenizer(" ".join(texts[:1100]))["input_ids"]
    assert len(ids) > 257 * length  # more than 256 chunks, so that the limit shows
    chunks = evaluation_tokens("c4_new", tokenizer, length, None)
    assert chunks.tolist() == [ids[n * length : (n + 1) * length] for n in range(256)]
    longer = len(ids) // 3
    whole = evaluation_tokens("c4_new", tokenizer, longer, None)
    assert whole.flatten().tolist() == ids[: 3 * longer]  # nothing of document 1101 and later


# --- self-generated text ----------------------------------------------------------------------------------------------


def test_self_generated_text_is_seeded_and_leaves_the_random_state_alone():
    torch.manual_seed(11)
    random.seed(11)
    before, before_python = torch.random.get_rng_state(), random.getstate()
    first = self_generated(DEMO, 3, 12, 5, CPU)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert random.getstate() == before_python
    torch.manual_seed(12)
    assert torch.equal(self_generated(DEMO, 3, 12, 5, CPU), first)
    assert not torch.equal(self_generated(DEMO, 3, 12, 6, CPU), first)
    assert not torch.equal(self_generated(DEMO, 3, 12, 5 + HELD_OUT, CPU), first)
    assert len({tuple(row) for row in first.tolist()}) == 3


def test_a_random_state_survives_a_failure(monkeypatch):
    """Whoever catches the error goes on with the state that was there."""
    torch.manual_seed(11)
    before = torch.random.get_rng_state()

    def fail(*arguments, **settings):
        torch.rand(3)
        raise RuntimeError("no memory")

    monkeypatch.setattr("transformers.GenerationMixin.generate", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        self_generated(DEMO, 1, 4, 5, CPU)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_sequence_has_its_full_length_and_no_end_within(make_checkpoint):
    """A model that would stop at once goes on: an end token would leave padding behind it."""
    folder = make_checkpoint(vocab_size=32, eos_token_id=7)
    ids = self_generated(folder, 5, 20, 0, CPU, batch_size=2)  # two batches and a part
    assert ids.shape == (5, 20)
    assert (ids != 7).all()


def test_text_is_sampled_at_temperature_one_without_truncation():
    """Then the mean of −log p over the samples is the mean entropy; a sharper or cut distribution has less of it."""
    ids_NT = self_generated(DEMO, 24, 40, 0, CPU)
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    with torch.no_grad():
        inputs = torch.cat([torch.zeros(24, 1, dtype=torch.int64), ids_NT], 1)  # behind BOS, where sampling began
        log_p = model(inputs).logits[:, :-1].float()
        log_p[..., 1] = -torch.inf  # the end is not drawn
        log_p = log_p.log_softmax(-1)
    nll_NT = -log_p.gather(-1, ids_NT[..., None])[..., 0]
    entropy_NT = -(log_p.exp() * log_p.nan_to_num(neginf=0)).sum(-1)
    difference = nll_NT - entropy_NT
    assert difference.mean().abs() < 4 * difference.std() / difference.numel() ** 0.5
    assert difference.std() > 0.5


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.1, "do_sample": False}, {"top_k": 2, "top_p": 0.5}, {"repetition_penalty": 5.0}, {"min_p": 0.5}],
)
def test_generation_settings_of_the_checkpoint_do_not_matter(make_checkpoint, settings):
    """Instruct models ship top-k, top-p and a repetition penalty; calibration text is the model's own distribution."""
    folder = make_checkpoint(vocab_size=32)  # few tokens, so that they repeat
    plain = self_generated(folder, 4, 24, 0, CPU)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert torch.equal(self_generated(folder, 4, 24, 0, CPU), plain)


def test_a_model_without_a_first_token_is_refused(make_checkpoint):
    with pytest.raises(UserError, match="bos_token_id"):
        self_generated(make_checkpoint(bos_token_id=None), 1, 4, 0, CPU)
