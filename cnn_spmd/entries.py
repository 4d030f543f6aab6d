"""Define the dicts to which an experiment adds networks, data sets, optimizers and others."""

import collections
from collections.abc import Collection, Mapping
from typing import Any

from cnn_spmd.errors import UserError


class Entries(collections.UserDict):
    """A dict whose built-in entries cannot be replaced: a run is recorded by their names.

    name: of the dict, for errors. reserved: further names that no entry can have.
    Raises UserError where an entry would take one of those names. `data` is the dict itself.
    """

    def __init__(self, name: str, built_in: Mapping[str, Any], reserved: Collection[str] = ()):
        self.name, self.built_in = name, {}
        super().__init__(built_in)
        self.built_in = dict.fromkeys(reserved) | built_in

    def __setitem__(self, key: str, value: Any) -> None:
        """Add an entry, or replace one of the experiment's own."""
        if value is not self.built_in.get(key, value):
            raise UserError(f"{self.name}[{key!r}]: is a built-in name, expected another one")
        super().__setitem__(key, value)

    def __ior__(self, other: Mapping[str, Any]) -> "Entries":
        """Add the entries of `other`, one by one."""
        self.update(other)
        return self
