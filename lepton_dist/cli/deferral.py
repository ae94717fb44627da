"""Leaving out, of what a command imports, what it will hardly use: it runs when it is used after all."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# Shapes without numbers, for torch's compiler: a third of the time that importing torch takes.
_COMPILER_PARTS = {"torch._meta_registrations": "torch._dynamo"}


def leave_out_compiler() -> None:
    """Before torch is imported, for a run that computes without `torch.compile`, "meta" tensors and `torch.Generator`.

    Importing the compiler brings back what it needs.
    """
    sys.meta_path.insert(0, Deferral(_COMPILER_PARTS))


class Deferral(MetaPathFinder):
    """Finds modules that run when something in them is first asked for, or when another one is imported.

    Unlike `importlib.util.LazyLoader`, whose modules run as soon as a second import looks at them.

    Args:
        users: the names of modules, and for each that of the other one.
    """

    def __init__(self, users: Mapping[str, str]) -> None:
        self._users = users

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The specification of a module that is deferred, its own but for who loads it."""
        for name, user in self._users.items():
            module = sys.modules.get(name) if fullname == user else None
            if isinstance(module, _LaterModule):
                module.run()
        spec = PathFinder.find_spec(fullname, path, target) if fullname in self._users else None
        if spec is not None and spec.loader is not None:
            spec.loader = _LaterLoader(spec.loader)
        return spec


class _LaterLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _LaterModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert isinstance(module, _LaterModule)
        module.later = self._loader


class _LaterModule(ModuleType):
    later: Loader | None = None  # who will run it

    def run(self) -> None:
        """Run it if it has not begun."""
        loader, self.later = self.later, None
        if loader is not None:
            loader.exec_module(self)

    def __getattr__(self, name: str) -> object:
        # What the import system asks every module (__path__ and the like) is no use of it.
        if self.later is None or name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.run()
        return getattr(self, name)
