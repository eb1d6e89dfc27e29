"""Values of options as frozen attributes."""

from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from typing import Any


class Values:
    """Named values: read-only attributes, equal by value, picklable. A section's options, or all sections."""

    def __init__(self, values: Mapping[str, Any]):
        vars(self).update(values)

    def __getattr__(self, name: str) -> Any:  # called for missing names only
        raise AttributeError(f"no option {name!r} here; there are {', '.join(vars(self))}", name=name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise FrozenInstanceError(f"cannot set {name!r}: a config is read-only, use cfg.replace(...)")

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete {name!r}: a config is read-only")

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(vars(self).items()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"
