"""`package.module:function` -> the object it names, found as `python -m` finds modules."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from octoc.errors import OctocError, UsageError, reason

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_reference(text: str) -> bool:
    """Whether a text has the form `package.module:function`."""
    return _REFERENCE.fullmatch(text) is not None


def resolve(text: str, failure: type[OctocError]) -> Any:
    """Imports what `package.module:function` names.

    The current directory stays first on the import path, as with `python -m`: a function may import later.

    Args:
        text: as the user typed it.
        failure: raised where the module's own code fails.

    Raises:
        UsageError: no such module, or the module has no such name.
    """
    module_name, _, attribute = text.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()  # the file may be younger than the cached listing of its folder
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and _within(error.name, module_name):
            raise UsageError(f"{text}: no module {error.name} in {folder} or among the installed packages") from error
        raise failure(f"{text}: importing {module_name} failed: {reason(error)}") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise UsageError(f"{text}: {module_name} has no {attribute}; it has {_names(found)}")
        found = getattr(found, name)
    return found


def call(text: str, failure: type[OctocError]) -> Any:
    """Calls, without arguments, what `package.module:function` names.

    Raises:
        UsageError: no such module or name.
        OctocError: `failure`, where it cannot be called or raises.
    """
    function = resolve(text, failure)
    if not callable(function):
        raise failure(f"{text} is {type(function).__name__}, not a function")
    try:
        return function()
    except OctocError:
        raise
    except (Exception, SystemExit) as error:
        raise failure(f"{text}() failed: {reason(error)}") from error


def _within(missing: str | None, wanted: str) -> bool:
    """Whether the missing module is the wanted one or a package around it, not one that it imports."""
    return missing is not None and f"{wanted}.".startswith(f"{missing}.")


def _names(module: Any) -> str:
    names = [name for name in sorted(vars(module)) if not name.startswith("_") and callable(getattr(module, name))]
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "no function"
