"""The prompt's token ids: BOS, a text, or the chat template up to the user's words."""

import pytest
from transformers import AutoConfig, AutoTokenizer

from bisup_lightning.data.prompt import Prompt
from bisup_lightning.errors import UserError
from tests.inputs import DEMO

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML
)
USER_WORDS = ["Hello", "0", "x", " leading space", "What is 2 + 2?", "0x", "<|im_end|>"]  # a newline would merge


@pytest.fixture
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def config():
    return AutoConfig.from_pretrained(DEMO)


def conversation(tokenizer, words, system=None):
    messages = [] if system is None else [{"role": "system", "content": system}]
    return tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": words}], add_generation_prompt=True, tokenize=True, return_dict=False
    )


def test_none_is_empty(tokenizer, config):
    assert Prompt("none").ids(tokenizer, config) == []


def test_bos_is_the_tokenizers(tokenizer, config):
    config.bos_token_id = 77
    assert Prompt().ids(tokenizer, config) == [tokenizer.bos_token_id] == [0]


def test_bos_is_the_configurations_where_the_tokenizer_has_none(tokenizer, config):
    """As in Qwen."""
    tokenizer.bos_token, config.bos_token_id = None, 77
    assert Prompt("bos").ids(tokenizer, config) == [77]
    config.bos_token_id = None
    with pytest.raises(UserError, match=r"prompt\.kind.*BOS"):
        Prompt("bos").ids(tokenizer, config)


def test_text_is_what_the_tokenizer_makes_of_it(tokenizer, config):
    ids = Prompt("text", "Once upon a time").ids(tokenizer, config)
    assert ids == tokenizer("Once upon a time")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Once upon a time"


@pytest.mark.parametrize("text", [None, ""])
def test_text_must_be_given(text):
    with pytest.raises(ValueError, match=r"prompt\.text"):
        Prompt("text", text)


@pytest.mark.parametrize("system", [None, "Be brief.", "Answer in verse,\nalways."])
@pytest.mark.parametrize("template", [CHATML, WITH_DEFAULT])
def test_system_is_all_that_stands_before_the_users_words(tokenizer, config, template, system):
    """It begins every conversation with this system message, and not one token more could."""
    tokenizer.chat_template = template
    ids = Prompt("system", system).ids(tokenizer, config)
    for words in USER_WORDS:
        assert conversation(tokenizer, words, system)[: len(ids)] == ids
    longer = {conversation(tokenizer, words, system)[len(ids)] for words in USER_WORDS}
    assert len(longer) > 1
    spoken = tokenizer.decode(ids)
    message = system or ("You are a helpful assistant." if template == WITH_DEFAULT else None)
    opening = "" if message is None else f"<|im_start|>system\n{message}<|im_end|>\n"
    assert spoken == opening + "<|im_start|>user\n"


def test_another_system_message_is_another_prompt(tokenizer, config):
    one, other = (Prompt("system", text).ids(tokenizer, config) for text in ("Be brief.", "Be long."))
    assert one != other


def test_a_template_that_adds_nothing_in_front_gives_no_prompt(tokenizer, config):
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert Prompt("system").ids(tokenizer, config) == []


def test_a_template_that_repeats_the_words_ends_at_the_first(tokenizer, config):
    tokenizer.chat_template = "<|im_start|>{{ messages[-1]['content'] }}<|im_end|>{{ messages[-1]['content'] }}"
    assert tokenizer.decode(Prompt("system").ids(tokenizer, config)) == "<|im_start|>"


def test_a_template_that_ignores_the_user_is_refused(tokenizer, config):
    tokenizer.chat_template = "<|im_start|>fixed<|im_end|>"
    with pytest.raises(UserError, match="prompt"):
        Prompt("system").ids(tokenizer, config)


def test_no_template_is_refused(tokenizer, config):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"prompt\.kind.*chat template"):
        Prompt("system").ids(tokenizer, config)
