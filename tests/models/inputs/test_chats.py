"""Chats become the tokens that transformers gives for them, or an error in one line."""

import json
from itertools import chain

import pyarrow
import pytest
from byte_tokenizer import BOS, bytes_tokenizer
from pyarrow import parquet

from orchestrator.errors import InputError
from orchestrator.models.inputs.documents import read_documents
from orchestrator.models.inputs.text import load_tokens

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'nobody' %}{{ raise_exception('no such role') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
)
HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
BYE = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Bye"}]


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer that adds a BOS, as does its template."""
    tokenizer = bytes_tokenizer(adds_bos=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(path, records):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def templated(tokenizer, *chats):
    """The token ids of each chat by transformers itself."""
    return [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in chats]


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.parquet"])
def test_chats_are_encoded_as_by_transformers(name, tokenizer, tmp_path):
    """Packed they follow each other, padded each is a row; BOS occurs once in each."""
    path = write(tmp_path / name, [{"messages": HELLO}, {"messages": BYE}])
    hello, bye = templated(tokenizer, HELLO, BYE)
    assert hello.count(BOS) == 1
    whole = len(hello + bye)
    packed = load_tokens(path, tokenizer=tokenizer, samples=1, sequence_length=whole)
    assert packed.ids[0].tolist() == hello + bye
    source = packed.report["sources"][0]
    assert (source["chats"], source["chats_by"]) == (2, "template")
    padded = load_tokens(
        path, tokenizer=tokenizer, samples=2, sequence_length=whole, layout="padded"
    )
    rows = [ids[mask].tolist() for ids, mask in zip(padded.ids, padded.mask, strict=True)]
    assert rows == [hello, bye]


def test_other_forms_of_a_chat_are_the_same_tokens(tokenizer, tmp_path):
    """ShareGPT's `conversations`, contents in parts, and further fields of messages."""
    shared = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "Hel"}], "name": "Ann"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    joined = [{"role": "user", "content": "Hel"}, {"role": "user", "content": "a\nb"}]
    path = write(tmp_path / "a.jsonl", [{"conversations": shared}, {"messages": parts}])
    wanted = [*chain(*templated(tokenizer, HELLO, joined))]
    found = load_tokens(path, tokenizer=tokenizer, samples=1, sequence_length=len(wanted))
    assert found.ids[0].tolist() == wanted


def test_texts_between_chats_are_joined_among_themselves(tokenizer, tmp_path):
    """Texts beside each other are one text with a BOS and blank lines, as without any chat."""
    records = [{"text": "one"}, {"text": "two"}, {"messages": HELLO}, {"text": "three"}]
    (hello,) = templated(tokenizer, HELLO)
    wanted = [BOS, *b"one\n\ntwo", *hello, BOS, *b"three"]
    path = write(tmp_path / "a.jsonl", records)
    found = load_tokens(path, tokenizer=tokenizer, samples=1, sequence_length=len(wanted))
    assert found.ids[0].tolist() == wanted
    assert found.report["documents"] == 4


@pytest.mark.parametrize("template", [None, "off"])
def test_without_a_template_contents_are_plain_text(template, tokenizer, tmp_path):
    """With a tokenizer that has none, or with `off`: one document, special tokens as for text."""
    path = write(tmp_path / "a.jsonl", [{"messages": HELLO}])
    plain = bytes_tokenizer(adds_bos=True) if template is None else tokenizer
    wanted = [BOS, *b"Hello\n\nGood day"]
    found = load_tokens(
        path,
        tokenizer=plain,
        samples=1,
        sequence_length=len(wanted),
        chat_template=template,
    )
    assert found.ids[0].tolist() == wanted
    by = "no template" if template is None else "text"
    assert found.report["sources"][0]["chats_by"] == by


def test_messages_come_before_the_text_if_the_template_is_asked_for(tokenizer, tmp_path):
    """A record with both is its text by default, and its chat with `on`, or by its field."""
    path = write(tmp_path / "a.jsonl", [{"text": "plain", "messages": HELLO}])
    (hello,) = templated(tokenizer, HELLO)

    def first(**given):
        return load_tokens(path, tokenizer=tokenizer, samples=1, sequence_length=5, **given).ids[0]

    assert first().tolist() == [BOS, *b"plai"]
    assert first(chat_template="on").tolist() == hello[:5]
    assert first(field="messages").tolist() == hello[:5]


def test_a_template_that_is_asked_for_must_be_there(tokenizer, tmp_path):
    """`on` is refused without a template, and without messages."""
    path = write(tmp_path / "a.jsonl", [{"messages": HELLO}])
    options = {"samples": 1, "sequence_length": 4, "chat_template": "on"}
    with pytest.raises(InputError, match="the tokenizer has no chat template; give off"):
        load_tokens(path, tokenizer=bytes_tokenizer(), **options)
    path = write(tmp_path / "b.jsonl", [{"text": "plain"}])
    with pytest.raises(InputError, match="no record has messages"):
        load_tokens(path, tokenizer=tokenizer, **options)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("Hello", "field 'messages' holds str"),
        ({"role": "user"}, "field 'messages' holds dict"),
        (["Hello"], "message 1: found str"),
        ([HELLO[0], {"content": "x"}], "message 2: found no role"),
        ([{"role": 3, "content": "x"}], "message 1: found a role of int"),
        ([{"role": "user"}], "message 1: found no content"),
        ([{"role": "user", "content": 3}], "message 1: found a content of int"),
        ([{"role": "user", "content": [{"type": "image"}]}], "found a part of type 'image'"),
        ([{"role": "user", "content": ["x"]}], "found a part that is str"),
        ([{"role": "nobody", "content": "x"}], "template refuses the messages: no such role"),
    ],
)
def test_a_malformed_chat_is_named_by_file_and_line(messages, says, tokenizer, tmp_path):
    """One line with the place; that of a message says what is allowed."""
    path = write(tmp_path / "a.jsonl", [{"messages": HELLO}, {"messages": messages}])
    options = {"samples": 1, "sequence_length": 1000, "chat_template": "on"}
    with pytest.raises(InputError) as caught:
        load_tokens(path, tokenizer=tokenizer, **options)
    line = str(caught.value)
    assert line.startswith(f"{path}, line 2")
    assert says in line
    assert "\n" not in line
    assert '{"role": "user"' in line or "--chat-template off" in line


def test_an_empty_chat_is_skipped_as_a_blank_text(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": []}, {"messages": HELLO}])
    (hello,) = templated(tokenizer, HELLO)
    for layout in ("packed", "padded"):
        found = load_tokens(
            path, tokenizer=tokenizer, samples=1, sequence_length=len(hello), layout=layout
        )
        assert found.ids[0].tolist() == hello


def test_a_chat_says_its_place(tmp_path):
    """Row of a parquet file, counted from 1."""
    path = write(tmp_path / "a.parquet", [{"messages": HELLO}, {"messages": BYE}])
    assert [chat.where for chat in read_documents(path, "text")] == [
        f"{path}, row 1",
        f"{path}, row 2",
    ]
