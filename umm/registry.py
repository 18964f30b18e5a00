"""Name to class by file name: `find("latents", "dinov2")` is the one `LatentSpace` in `umm/latents/dinov2.py`.

No decorators and no list to keep: a file dropped into a folder is a choice. Files that start with an underscore
and `base.py` are not choices. A name with a dot is the user's own import path.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

from umm.errors import UnknownName, nearest

# folder -> name of the class in its base.py that every choice derives from
FOLDERS = {"data": "DataSource", "latents": "LatentSpace", "heads": "Head", "metrics": "Metric", "tasks": "Task"}


def names(folder: str) -> list[str]:
    """The choices of a folder, sorted; imports nothing."""
    if folder not in FOLDERS:
        raise UnknownName(f"nothing is called '{folder}'.{nearest(folder, FOLDERS)} There are: {', '.join(FOLDERS)}.")
    files = (Path(__file__).parent / folder).glob("[!_]*.py")
    return sorted(file.stem for file in files if file.stem != "base")


def find(folder: str, name: str) -> type:
    """The class called `name` in `umm/<folder>`, or the one a dotted import path leads to.

    Raises:
        UnknownName: nothing has that name; the message gives the nearest one and all of them.
    """
    base = getattr(importlib.import_module(f"umm.{folder}.base"), FOLDERS[folder])
    if "." in name:
        module_name = name
    elif name in names(folder):
        module_name = f"umm.{folder}.{name}"
    else:
        known = names(folder)
        raise UnknownName(
            f"nothing in umm/{folder} is called '{name}'.{nearest(name, known)} There are: {', '.join(known)}. "
            "Your own goes by its import path, e.g. my_package.my_module."
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise UnknownName(f"no module '{module_name}' can be imported: is it on PYTHONPATH?") from error
        raise
    return the_class(module, base)


def the_class(module, base: type) -> type:
    """The one class a module defines (not merely imports) that derives from `base`."""
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    public = [value for value in found if not value.__name__.startswith("_")]
    if len(public) != 1:
        raise UnknownName(f"{module.__name__} must define one class derived from {base.__name__}, has {len(public)}.")
    return public[0]
