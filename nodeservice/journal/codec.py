"""Turns a task record into versioned JSON text and back.

The forms are derived once from the type hints of the frozen classes in `core.model`, so a new field with a default
needs no code here: a record written before it existed takes the default. A change that a default cannot carry (a renamed or
removed field, another meaning) raises `VERSION` and adds a step to `_UPGRADES`.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from functools import cache
from inspect import Parameter, signature
from json.encoder import encode_basestring_ascii
from operator import attrgetter
from typing import Any, Union, get_args, get_origin, get_type_hints

from nodeservice.core.model import AttemptId, Phase, TaskRecord
from nodeservice.errors import ConfigError, InvariantError, NodeFaultError

VERSION = 1

CORRUPT_HINT = (
    "stop the node, keep a copy of the journal, and move journal files out of the state directory: the node then starts "
    "with an empty journal"
)

_REMEMBERED_ATTEMPTS = 1024
_COMPACT = json.JSONEncoder(separators=(",", ":"))

_UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""From version n to n+1, on the parsed record."""


def encode_record(record: TaskRecord) -> str:
    """One line of ASCII JSON: `{"v": 1, "record": {…}}`. Raises InvariantError for what JSON cannot hold."""
    return _encode(record, _Memory({}))


class RecordWriter:
    """Writes the records of attempts one after the other: what is the same object as the last time is not encoded again."""

    def __init__(self) -> None:
        self._parts: OrderedDict[AttemptId, _Parts] = OrderedDict()

    def encode(self, record: TaskRecord) -> str:
        """As `encode_record`."""
        memory = _Memory(self._parts.pop(record.id, {}))
        text = _encode(record, memory)
        del memory.used[id(record)]  # it will not come again
        if record.phase is not Phase.FINISHED:
            self._parts[record.id] = memory.used
            if len(self._parts) > _REMEMBERED_ATTEMPTS:
                self._parts.popitem(last=False)
        return text


def _encode(record: TaskRecord, memory: _Memory) -> str:
    try:
        return f'{{"v":{VERSION},"record":{_form(TaskRecord).encode(record, memory)}}}'
    except (TypeError, ValueError) as error:
        raise InvariantError(f"record of {record.id} cannot be written as JSON: {error}") from error


def decode_record(text: str) -> TaskRecord:
    """Raises ConfigError for a newer version, NodeFaultError (JOURNAL_CORRUPT) for anything that is no record."""
    try:
        envelope = json.loads(text)
    except ValueError as error:
        raise _corrupt(f"is not JSON: {error}") from error
    if not isinstance(envelope, dict) or not isinstance(envelope.get("record"), dict):
        raise _corrupt("is not a JSON object with a member 'record'")
    version = envelope.get("v")
    if type(version) is not int or version < 1:
        raise _corrupt(f"has no valid version: {version!r}")
    if version > VERSION:
        raise ConfigError(
            f"journal record has format {version}, this nodeservice knows formats up to {VERSION}",
            field="state_dir",
            hint="the state directory was written by a newer nodeservice: install that version again",
        )
    value = envelope["record"]
    for step in range(version, VERSION):
        value = _UPGRADES[step](value)
    try:
        record = _form(TaskRecord).decode(value)
    except _MalformedError as error:
        raise _corrupt(f"is malformed at {'.'.join(reversed(error.path)) or 'its root'}: {error.problem}") from error
    assert isinstance(record, TaskRecord)
    return record


def _corrupt(what: str) -> NodeFaultError:
    return NodeFaultError(f"journal record {what}", reason="JOURNAL_CORRUPT", hint=CORRUPT_HINT)


class _MalformedError(Exception):
    """A value that does not fit its type; `path` grows from the inside out."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path: list[str] = []


_Parts = dict[int, tuple[Any, str]]
"""What an object was encoded as, by its id, beside the object itself: as long as it is held nothing else has that id."""


class _Memory:
    """The parts of the last record, and those of the one that is being written. Parts are never changed, only replaced."""

    __slots__ = ("known", "used")

    def __init__(self, known: _Parts) -> None:
        self.known = known
        self.used: _Parts = {}


@dataclasses.dataclass(frozen=True, slots=True)
class _Form:
    """How one type is written, as JSON, and read. `Any` is unavoidable: the types are known only through their hints."""

    encode: Callable[[Any, _Memory], str]
    decode: Callable[[Any], Any]
    is_optional: bool = False
    """None is written by whoever holds the value, not by `encode`."""


def _remembered(make: Callable[[Any, _Memory], str]) -> Callable[[Any, _Memory], str]:
    def encode(value: Any, memory: _Memory) -> str:
        key = id(value)
        part = memory.known.get(key) or (value, make(value, memory))
        memory.used[key] = part
        return part[1]

    return encode


@cache
def _form(hint: Any) -> _Form:
    if hint in _PLAIN:
        return _plain(hint)
    if hint is datetime:
        return _Form(_encode_instant, _decode_instant)
    if isinstance(hint, type):
        if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):  # the latter of a NamedTuple
            return _object_form(hint)
        if issubclass(hint, StrEnum | IntEnum):
            return _enum_form(hint)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        return _optional_form(args)
    if origin is tuple:
        return _tuple_form(args)
    if origin is Mapping and args == (str, object):
        return _Form(_remembered(_encode_mapping), _decode_mapping)
    raise InvariantError(f"the journal has no form for the type {hint!r}")


_PLAIN: frozenset[Any] = frozenset({str, int, float, bool})


def _plain(kind: type) -> _Form:
    accepted = (int, float) if kind is float else (kind,)

    def decode(value: Any) -> Any:
        if type(value) not in accepted:
            raise _MalformedError(f"expected {kind.__name__}, found {_describe(value)}")
        return kind(value)

    return _Form(_encode_plain, decode)


def _encode_plain(value: Any, _memory: _Memory) -> str:
    kind = type(value)
    if kind is str:
        return encode_basestring_ascii(value)
    if kind is bool:
        return "true" if value else "false"
    return str(value) if kind is int else _COMPACT.encode(value)


def _encode_instant(value: datetime, _memory: _Memory) -> str:
    if value.tzinfo is None:
        raise ValueError(f"instant {value!r} has no time zone")
    return f'"{value.astimezone(UTC).isoformat(timespec="microseconds")}"'


def _decode_instant(value: Any) -> datetime:
    try:
        instant = datetime.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise _MalformedError(f"expected an ISO 8601 instant, found {_describe(value)}") from error
    if instant.tzinfo is None:
        raise _MalformedError(f"instant {value} has no time zone")
    return instant


def _encode_mapping(value: Mapping[str, object], _memory: _Memory) -> str:
    return _COMPACT.encode(dict(value))


def _decode_mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _MalformedError(f"expected an object, found {_describe(value)}")
    return value


def _enum_form(kind: type[StrEnum] | type[IntEnum]) -> _Form:
    def decode(value: Any) -> Any:
        try:
            return kind(value)
        except ValueError as error:
            raise _MalformedError(f"{_describe(value)} is no {kind.__name__}") from error

    texts = {member: _COMPACT.encode(member.value) for member in kind}
    return _Form(lambda value, _memory: texts[value], decode)


def _optional_form(args: tuple[Any, ...]) -> _Form:
    others = [arg for arg in args if arg is not types.NoneType]
    if len(others) != 1 or len(args) != 2:
        raise InvariantError(f"the journal has no form for the union {args!r}")
    inner = _form(others[0])
    return _Form(inner.encode, lambda value: None if value is None else inner.decode(value), is_optional=True)


def _tuple_form(args: tuple[Any, ...]) -> _Form:
    endless = len(args) == 2 and args[1] is Ellipsis
    forms = [_form(args[0])] if endless else [_form(arg) for arg in args]
    if any(form.is_optional for form in forms):
        raise InvariantError(f"the journal has no form for a tuple of {args!r}")

    def encode(value: tuple[Any, ...], memory: _Memory) -> str:
        if endless:
            texts = [forms[0].encode(item, memory) for item in value]
        else:
            texts = [form.encode(item, memory) for form, item in zip(forms, value, strict=True)]
        return f"[{','.join(texts)}]"

    def decode(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not (endless or len(value) == len(forms)):
            raise _MalformedError(f"expected an array, found {_describe(value)}")
        return tuple(_at(str(index), forms[0 if endless else index].decode, item) for index, item in enumerate(value))

    return _Form(encode, decode)


def _object_form(kind: type[Any]) -> _Form:
    hints, parameters = get_type_hints(kind), signature(kind).parameters
    fields = {name: _form(hints[name]) for name in parameters}
    required = {name for name, parameter in parameters.items() if parameter.default is Parameter.empty}
    values_of = attrgetter(*fields)
    columns = [(f'"{name}":', form.encode, form.is_optional) for name, form in fields.items()]

    def write(value: Any, memory: _Memory) -> str:
        values = values_of(value) if len(columns) > 1 else (values_of(value),)
        texts = [
            f"{start}null" if item is None and is_optional else start + encode_item(item, memory)
            for (start, encode_item, is_optional), item in zip(columns, values, strict=True)
        ]
        return f"{{{','.join(texts)}}}"

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _MalformedError(f"expected an object, found {_describe(value)}")
        if unknown := value.keys() - fields.keys():
            # Dropping it could forget a promise that a newer node made.
            raise _MalformedError(f"unknown field {min(unknown)!r}")
        if missing := required - value.keys():
            raise _MalformedError(f"missing field {min(missing)!r}")
        return kind(**{name: _at(name, fields[name].decode, item) for name, item in value.items()})

    return _Form(_remembered(write), decode)


def _at(step: str, decode: Callable[[Any], Any], value: Any) -> Any:
    try:
        return decode(value)
    except _MalformedError as error:
        error.path.append(step)
        raise


def _describe(value: Any) -> str:
    """The type and, cut, the value: a record can hold environment values, so only scalars' types are shown."""
    return {dict: "an object", list: "an array", type(None): "null"}.get(type(value), type(value).__name__)
