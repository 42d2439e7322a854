"""Chats of .jsonl and .parquet records: a list of messages, each with a role and a content.

    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}

A content is a string, or a list of parts {"type": "text", "text": ...}, which are joined by line
breaks. In the form of ShareGPT a list `conversations` has `from` and `value` instead; human and gpt
are user and assistant. Other fields of a message are not read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import InputError

ROLES = {"human": "user", "gpt": "assistant"}
"""Roles by their names in ShareGPT."""
BETWEEN_MESSAGES = "\n\n"
_ALLOWED = (
    'a chat is a list of messages {"role": "user", "content": "..."}, whose content is text or '
    'parts {"type": "text", "text": "..."}'
)


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat and its place, for messages about it."""

    messages: tuple[Mapping[str, str], ...]
    where: str

    @property
    def contents(self) -> str:
        """The contents as plain text, separated by blank lines."""
        return BETWEEN_MESSAGES.join(message["content"] for message in self.messages)


def parse_chat(where: str, field: str, value: object) -> Chat:
    """Parse the messages of a record.

    Raises:
        InputError: A message has no role, or no text.
    """
    if not isinstance(value, list):
        raise InputError(f"{where}: field {field!r} holds {_kind(value)}; {_ALLOWED}")
    messages = tuple(
        _message(f"{where}, message {number}", each) for number, each in enumerate(value, start=1)
    )
    return Chat(messages, where)


def _message(where: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: found {_kind(value)}; {_ALLOWED}")
    role = value.get("role", value.get("from"))
    if not isinstance(role, str) or not role:
        found = "no role" if role is None else f"a role of {_kind(role)}"
        raise InputError(f"{where}: found {found}; {_ALLOWED}")
    content = _content(where, value.get("content", value.get("value")))
    return {"role": ROLES.get(role, role), "content": content}


def _content(where: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        found = "no content" if value is None else f"a content of {_kind(value)}"
        raise InputError(f"{where}: found {found}; {_ALLOWED}")
    for part in value:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else None
            found = f"of type {kind[:40]!r}" if isinstance(kind, str) else f"that is {_kind(part)}"
            raise InputError(f"{where}: found a part {found}; {_ALLOWED}")
    return "\n".join(part["text"] for part in value)


def _kind(value: object) -> str:
    return type(value).__name__
