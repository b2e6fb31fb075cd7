"""Frozen value classes that cost nothing to import.

The standard ``dataclasses`` takes longer to import than Python takes to start (docs/decisions/0003), and the prolog
runs in front of every MPS job. Type checkers see ``dataclasses.dataclass(frozen=True)``; at run time there is the
little of it that this package uses.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without importing typing
if TYPE_CHECKING:
    from dataclasses import dataclass
    from typing import Any, TypeVar, dataclass_transform

    T = TypeVar("T")

    @dataclass_transform(frozen_default=True, kw_only_default=False)
    def record(cls: type[T]) -> type[T]: ...

    def replace(instance: T, **changes: Any) -> T: ...

    _ = dataclass
else:

    def record(cls):
        """Give `cls` a constructor, equality and a repr from its annotations; make its instances read-only."""
        fields = tuple(cls.__annotations__)
        defaults = {name: getattr(cls, name) for name in fields if hasattr(cls, name)}

        def __init__(self, *args, **kwargs):  # noqa: N807
            given = dict(zip(fields, args, strict=False))
            values = {**defaults, **given, **kwargs}
            if len(args) > len(fields) or given.keys() & kwargs.keys() or values.keys() != set(fields):
                raise TypeError(f"{cls.__name__} takes {', '.join(fields)}")
            self.__dict__.update(values)

        def __eq__(self, other):  # noqa: N807
            return type(other) is type(self) and other.__dict__ == self.__dict__

        def __hash__(self):  # noqa: N807
            return hash(tuple(self.__dict__[name] for name in fields))

        def __repr__(self):  # noqa: N807
            return f"{cls.__name__}({', '.join(f'{name}={self.__dict__[name]!r}' for name in fields)})"

        def __setattr__(self, name, _value=None):  # noqa: N807
            raise AttributeError(f"{cls.__name__}.{name} is read-only")

        cls.__delattr__ = __setattr__
        for method in (__init__, __eq__, __hash__, __repr__, __setattr__):
            setattr(cls, method.__name__, method)
        return cls

    def replace(instance, **changes):
        """Return a copy of a record with some fields changed."""
        return type(instance)(**{**instance.__dict__, **changes})
