"""Modules that libraries import for what no server does: read when they are first used.

``import trio`` brings TLS, DTLS and international domain names, ``import construct`` a debugger and pickles, either of
them OpenSSL: together 6.7 MB of a server's memory, and a twentieth of its start. A module in `LATE` is made at its
import, and is the same object for all who import it, but its code is executed when it is first asked for a name.

``importlib.util.LazyLoader`` does the same at the first look at any attribute, ``__spec__`` among them, which each
further import of the module reads.
"""

import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from threading import RLock
from types import ModuleType

LATE = frozenset({"bz2", "hashlib", "hmac", "idna", "ipaddress", "lzma", "pdb", "pickle", "ssl"})


def install() -> None:
    """Load the modules in `LATE` late from here on, for a process that is ours from its start to its end."""
    sys.meta_path.insert(0, _Finder)


def load_all_of(importers: Iterable[ModuleType]) -> None:
    """Load what these modules have imported, before there is a sandbox, and while there are file descriptors.

    Raises what the import would have raised.
    """
    imported = {id(value) for importer in importers for value in list(vars(importer).values())}
    for name in LATE & sys.modules.keys():
        if id(sys.modules[name]) in imported:
            hasattr(sys.modules[name], "any name")


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in LATE else None
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return None
        spec.loader = _LateLoader(spec.loader.name, spec.loader.path)
        return spec


class _LateLoader(SourceFileLoader):
    """Loader of Python files whose modules have, at first, only a ``__getattr__`` (PEP 562) that executes them."""

    def exec_module(self, module: ModuleType) -> None:
        execute = super().exec_module
        lock = RLock()  # other threads wait until all names are there; this one may be back in the midst of it
        has_begun = False

        def load(name: str) -> object:
            nonlocal has_begun
            # All that is a package has it from the start. `from … import` asks for it, and the sandbox of each module.
            if name == "__path__":
                raise AttributeError(name)
            with lock:
                if not has_begun:
                    has_begun = True
                    try:
                        execute(module)
                    except BaseException:
                        has_begun = False
                        raise
                    del module.__getattr__
            if name in vars(module):
                return vars(module)[name]
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = load  # type: ignore[method-assign]
