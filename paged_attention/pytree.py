"""What the classes of this package have in common: copies, lossless (de)serialisation, and life as a JAX pytree.

JAX is imported by nothing at the top of this package. `register()` makes pytrees of the classes once JAX is wanted.
"""

from __future__ import annotations

import base64
import functools
import json
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from itertools import repeat, starmap
from typing import Any, ClassVar, Self, TypeVar, cast

import ml_dtypes
import numpy as np

from paged_attention.arrays import is_jax_array

Item = TypeVar("Item")


class Fifo(deque[Item]):
    """A queue with the methods of `queue.SimpleQueue` that can also be read without change, and copied.

    Nothing blocks: taking from an empty one raises `queue.Empty` at once. True where there is an item.
    """

    def put(self, item: Item) -> None:
        """Add an item at the tail."""
        self.append(item)

    def put_nowait(self, item: Item) -> None:
        """Add an item at the tail."""
        self.append(item)

    def put_first(self, item: Item) -> None:
        """Add an item at the head."""
        self.appendleft(item)

    def get(self) -> Item:
        """Take the item at the head. queue.Empty: there is none."""
        return self.get_nowait()

    def get_nowait(self) -> Item:
        """Take the item at the head. queue.Empty: there is none."""
        if not self:
            raise queue.Empty
        return self.popleft()

    def take(self, count: int) -> list[Item]:
        """Take the first `count` items. queue.Empty: there are fewer, and nothing was taken."""
        if count > len(self):
            raise queue.Empty
        return list(starmap(self.popleft, repeat((), count)))

    def peek(self) -> Item:
        """The item at the head, which stays. queue.Empty: there is none."""
        if not self:
            raise queue.Empty
        return self[0]

    def remove(self, item: Item) -> None:
        """Take out that very item (by identity, else by equality). ValueError: it is not in the queue."""
        for index, candidate in enumerate(self):
            if candidate is item:
                del self[index]
                return
        super().remove(item)

    def empty(self) -> bool:
        """Whether there is no item."""
        return not self

    def qsize(self) -> int:
        """How many items there are."""
        return len(self)


class Tree:
    """A dataclass that knows which of its fields are arrays.

    `tree_leaves` are the array fields (or subtrees), `tree_static` the hashable ones that a compiled program is keyed
    on. All other fields are the host's: they take no part in the pytree and come out of one as None.
    """

    tree_leaves: ClassVar[tuple[str, ...]] = ()
    tree_static: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        if "jax" in sys.modules and "tree_leaves" in cls.__dict__:
            _register(cls)

    def replace(self, **kwargs: Any) -> Self:
        """A new instance with the named fields replaced. TypeError: there is no such field."""
        return replace(cast("Any", self), **kwargs)


class SerializableTree(Tree):
    """A `Tree` that becomes a dictionary of plain JSON values, and JSON, and comes back without loss."""

    def to_dict(self) -> dict[str, Any]:
        """Field names to JSON values. TypeError: a field holds something that cannot be written down."""
        return {f.name: _encode(getattr(self, f.name)) for f in fields(cast("Any", self))}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The instance that `to_dict` described; locks and queues are made afresh. ValueError: other fields."""
        names = {f.name for f in fields(cast("Any", cls))}
        if set(data) != names:
            raise ValueError(
                f"{cls.__name__}.from_dict: expected the fields {sorted(names)}, "
                f"missing {sorted(names - set(data))}, unknown {sorted(set(data) - names)}"
            )
        return cls(**{name: _decode(value) for name, value in data.items()})

    def to_json(self, **kwargs: Any) -> str:
        """`to_dict` as JSON text; keyword arguments go to `json.dumps`."""
        return json.dumps(self.to_dict(), **kwargs)

    @classmethod
    def from_json(cls, json_str: str) -> Self:
        """The instance that `to_json` described. ValueError: not JSON, or other fields."""
        return cls.from_dict(json.loads(json_str))


# Serialisation: plain values stand for themselves; everything else is {"$": kind, ...}.


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) or is_jax_array(value):
        return _encode_array(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, SerializableTree):
        return {"$": "tree", "class": type(value).__name__, "fields": value.to_dict()}
    if isinstance(value, list | tuple | Fifo):
        items = [_encode(item) for item in cast("Iterable[Any]", value)]
        kind = "Fifo" if isinstance(value, Fifo) else "tuple"
        return items if isinstance(value, list) else {"$": kind, "items": items}
    if isinstance(value, dict):
        pairs = cast("dict[Any, Any]", value).items()
        return {"$": "dict", "items": [[_encode(key), _encode(item)] for key, item in pairs]}
    if isinstance(value, type(threading.Lock())):
        return {"$": "Lock"}
    raise TypeError(f"cannot serialise a value of type {type(value).__name__}: {value!r}")


def _encode_array(value: Any) -> dict[str, Any]:
    array = np.asarray(value)
    kind = "jax" if is_jax_array(value) else "scalar" if isinstance(value, np.generic) else "numpy"
    raw = base64.b64encode(array.tobytes()).decode("ascii")
    return {"$": kind, "dtype": array.dtype.name, "shape": list(array.shape), "data": raw}


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    data = cast("dict[str, Any]", value)
    kind = data.get("$")
    if kind not in _DECODERS:
        raise ValueError(f"cannot deserialise a value of kind {kind!r}: expected one of {sorted(_DECODERS)}")
    return _DECODERS[kind](data)


def _decode_items(data: dict[str, Any]) -> Iterator[Any]:
    return (_decode(item) for item in data["items"])


def _decode_array(data: dict[str, Any]) -> Any:
    raw = base64.b64decode(data["data"])
    array = np.frombuffer(raw, np.dtype(getattr(ml_dtypes, data["dtype"], data["dtype"]))).reshape(data["shape"]).copy()
    if data["$"] == "scalar":
        return array[()]
    if data["$"] == "jax":
        import jax.numpy as jnp

        return jnp.asarray(array)
    return array


_DECODERS: dict[Any, Callable[[dict[str, Any]], Any]] = {
    "jax": _decode_array,
    "numpy": _decode_array,
    "scalar": _decode_array,
    "tree": lambda data: _class_named(data["class"]).from_dict(data["fields"]),
    "dict": lambda data: {_decode(key): _decode(item) for key, item in data["items"]},
    "tuple": lambda data: tuple(_decode_items(data)),
    "Fifo": lambda data: Fifo(_decode_items(data)),
    "Lock": lambda data: threading.Lock(),
}


def _subclasses(cls: type[Tree]) -> Iterator[type[Tree]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def _class_named(name: str) -> type[SerializableTree]:
    for cls in _subclasses(SerializableTree):
        if cls.__name__ == name:
            return cast("type[SerializableTree]", cls)
    raise ValueError(f"cannot deserialise an instance of {name!r}: no class of that name is imported")


# Pytrees.


def register() -> None:
    """Make JAX pytrees of all classes of this package that are imported; imports JAX, and may be called again."""
    for cls in _subclasses(Tree):
        if cls.tree_leaves or cls.tree_static:
            _register(cls)


@functools.cache
def _register(cls: type[Tree]) -> None:
    import jax

    leaves, static = cls.tree_leaves, cls.tree_static
    keys = [jax.tree_util.GetAttrKey(name) for name in leaves]

    def flatten(tree: Tree) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(tree, name) for name in leaves), tuple(_frozen(getattr(tree, name)) for name in static)

    def flatten_with_keys(tree: Tree) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        children, aux = flatten(tree)
        return list(zip(keys, children, strict=True)), aux

    def unflatten(aux: tuple[Any, ...], children: Iterable[Any]) -> Tree:
        known = dict(zip(leaves, children, strict=True)) | {n: _thawed(v) for n, v in zip(static, aux, strict=True)}
        host = {f.name: None for f in fields(cast("Any", cls)) if f.name not in known}
        return cls(**known, **host)

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, cast("Any", unflatten), flatten)


def _frozen(value: Any) -> Any:
    """A hashable stand-in: static fields are plain values or lists of them."""
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
