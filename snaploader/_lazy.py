"""Packages whose public names are imported when they are first asked for.

The names stand once, as imports in the stub `__init__.pyi` beside the package: type checkers read it, and so
does `attach`. Importing everything takes some 150 ms, which a program that needs one part should not pay.
"""

from __future__ import annotations

import os

# Nothing more is imported here: the command line heeds interrupts only after this.
TYPE_CHECKING = False  # type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def attach(
    package: str, namespace: dict[str, Any], extra: str = ""
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` (PEP 562) for a package with a stub.

    Args:
        namespace: The package's `globals()`; what was imported is kept there.
        extra: The optional dependency that the error names when a third-party module is missing.
    """

    found: dict[str, str] = {}

    def homes() -> dict[str, str]:
        if not found:
            import re  # `ast` takes 10 ms to import

            # Read by the loader, which finds it in an archive too.
            stub = os.path.join(os.path.dirname(namespace["__file__"]), "__init__.pyi")
            source = namespace["__loader__"].get_data(stub).decode()
            imports = re.findall(r"^from (\S+) import (?:\(([^)]*)\)|(.+))$", source, re.MULTILINE)
            found.update(
                {
                    name: module
                    for module, several, one in imports
                    for name in re.findall(r"(\w+)(?: as \w+)?", several or one)
                }
            )
        return found

    def get(name: str) -> Any:
        from importlib import import_module

        if name == "__all__":
            return sorted(homes())
        if name.startswith("__") and name != "__version__":
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if f"{package}.{name}" in homes().values():
            return import_module(f"{package}.{name}")  # so that `import snaploader` is enough for its parts
        if name not in homes():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(homes()[name]), name)
        except ModuleNotFoundError as error:
            if not extra or (error.name or "").partition(".")[0] in {"", package.partition(".")[0]}:
                raise
            raise ModuleNotFoundError(
                f"{package}.{name} needs {error.name}: install snaploader[{extra}]", name=error.name
            ) from error
        namespace[name] = value
        return value

    return get, lambda: sorted(homes())
