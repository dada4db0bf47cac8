"""Token ids against the original CLIP tokenizer's, from golden files."""

import csv
import html
import json
import subprocess
import sys
from pathlib import Path

import ftfy
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdxl.tokenizer import END_ID, START_ID, Tokenizer, clean, count_tokens, encode

TESTS = Path(__file__).parents[1]
GOLDEN = np.load(TESTS / "golden" / "numerics_tokens.npz")
NASTY = json.loads((TESTS / "golden" / "numerics_nasty.json").read_text("ascii"))
PLAIN = st.text(st.characters(min_codepoint=32, max_codepoint=126))
# Pieces at which splitting, cleaning and special tokens meet.
SEAMS = st.lists(
    st.sampled_from(
        [
            *"aA'sſtl0 \n&;<>|.é中🙂\u0301\u200d\u0345\xa0",
            "<|endoftext|>",
            "&amp;",
            "'ll",
        ]
    )
).map("".join)


def read_prompts() -> list[str]:
    with (TESTS / "data" / "parti_prompts.tsv").open(encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [row["Prompt"] for row in rows]


def test_every_parti_prompt_has_the_original_ids():
    prompts = read_prompts()
    expected = np.split(GOLDEN["ids"], np.cumsum(GOLDEN["lengths"])[:-1])

    assert len(prompts) == len(expected) == 1632
    for prompt, ours, theirs in zip(prompts, encode(prompts), expected, strict=True):
        assert ours == theirs.tolist(), prompt


@pytest.mark.parametrize("case", NASTY, ids=lambda case: ascii(case["text"])[:40])
def test_a_nasty_string_has_the_original_ids(case):
    assert next(encode([case["text"]])) == case["ids"]


def test_a_string_of_100_000_letters_is_cut_with_its_end_token_kept():
    # Four letters x are one token, and only the last one ends the word.
    ids, counts = Tokenizer(pad_id=0)(["x" * 100_000])

    assert counts.tolist() == [25_002]
    assert ids[0, 0] == START_ID
    assert (ids[0, 1:-1] == 32_035).all()
    assert ids[0, -1] == END_ID


@pytest.mark.parametrize("pad_id", [0, END_ID])
def test_a_row_is_start_ids_end_and_padding(pad_id):
    ids, counts = Tokenizer(pad_id)(["a cat", ""])

    assert ids.shape == (2, 77)
    assert ids.dtype == counts.dtype == np.int32
    assert ids[0, :5].tolist() == [START_ID, 320, 2368, END_ID, pad_id]
    assert ids[1, :3].tolist() == [START_ID, END_ID, pad_id]
    assert (ids[:, 5:] == pad_id).all()
    assert counts.tolist() == [4, 2]


@pytest.mark.parametrize("words, kept", [(75, 75), (76, 75)])
def test_only_more_than_75_tokens_are_cut(words, kept):
    ids, counts = Tokenizer(pad_id=0)(["cat " * words])

    assert counts.tolist() == [words + 2]
    assert ids[0].tolist() == [START_ID, *[2368] * kept, END_ID]


def test_no_texts_give_no_rows():
    ids, counts = Tokenizer(pad_id=0)([])

    assert ids.shape == (0, 77)
    assert counts.shape == count_tokens([]).shape == (0,)


@pytest.mark.parametrize(
    "function", [Tokenizer(0), count_tokens, lambda t: [*encode(t)]]
)
def test_a_single_string_is_refused(function):
    with pytest.raises(TypeError, match="one string"):
        function("a cat")


@given(PLAIN)
def test_the_short_path_of_cleaning_gives_what_the_long_one_gives(text):
    if "&" not in text:
        long = html.unescape(html.unescape(ftfy.fix_text(text)))
        assert clean(text) == " ".join(long.split()).lower()


@settings(max_examples=300)
@given(st.one_of(PLAIN, SEAMS, st.text()))
@example("<|endoftext|> a<|startoftext|>")
@example("\ud800")
def test_counting_agrees_with_encoding(text):
    _, counts = Tokenizer(pad_id=0)([text])

    assert count_tokens([text, text]).tolist() == [counts[0], counts[0]]


@given(st.lists(SEAMS, max_size=5))
def test_texts_encoded_together_equal_texts_encoded_alone(texts):
    assert list(encode(texts)) == [next(encode([text])) for text in texts]


def test_importing_loads_nothing_heavy():
    code = (
        "import sys; import sdxl.tokenizer, sdxl.noise, sdxl.schedule, sdxl.samplers, "
        "sdxl.thresholding, sdxl.sizes; "
        "print({'mindspore', 'tokenizers', 'ftfy', 'torch'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert run.stdout.strip() == "set()", run.stderr


def test_hugging_face_differs_only_where_it_does_not_clean():
    # Its CLIP tokenizer normalizes to NFC and neither repairs nor unescapes.
    transformers = pytest.importorskip("transformers")
    from sdxl import tokenizer

    merges = tokenizer.read_merges()
    theirs = transformers.CLIPTokenizer(tokenizer.vocabulary_of(merges), merges)
    prompts = read_prompts()
    differing = [
        prompt
        for prompt, ids in zip(prompts, encode(prompts), strict=True)
        if theirs(prompt)["input_ids"] != [START_ID, *ids, END_ID]
    ]

    assert len(differing) == 12
    assert all("’" in prompt for prompt in differing)
