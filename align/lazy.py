"""Loading objects by name: our own, so that importing `align` costs nothing until something is used, and the user's."""

import ast
import importlib
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from align.errors import ConfigError

INSTALLED = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}


def load(path: str) -> Any:
    """The object at `"package.module:attribute"`."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def defined_again(before: Any, now: Any) -> bool:
    """Whether `now` is the user's `before`, a function or class, whose file was read, or whose cell was run, again."""
    module, name = (str(getattr(now, part, "<")) for part in ("__module__", "__qualname__"))
    same = module == getattr(before, "__module__", None) and name == getattr(before, "__qualname__", None)
    return same and "<" not in module + name and not module.startswith("align.")  # <lambda> may be any


def imported(path: str, what: str) -> Callable:
    """The user's function or class at "package.module:name" or "file.py:name". Modules are looked for in the current
    folder too, and what a file imports beside the file. what: what it is, for errors. Raises `ConfigError`."""
    module_name, name = _parts(path, what)
    here = f"{what} {path!r}"
    module = _load_file(Path(module_name), here) if module_name.endswith(".py") else _import(module_name, here)
    found = getattr(module, name, None)
    if not callable(found):
        kinds = {k: v for k, v in vars(module).items() if inspect.isfunction(v) or inspect.isclass(v)}
        raise _no_function(here, name, [k for k, v in kinds.items() if v.__module__ == module.__name__])
    return found


def check_place(path: str, what: str) -> None:
    """Raise the `ConfigError` of `imported`, as far as that can be told without running the user's code, which may
    import torch: of a text that is no place, a file or package that is not there, a name that a file has nowhere."""
    module_name, name = _parts(path, what)
    here = f"{what} {path!r}"
    if not module_name.endswith(".py"):
        package = module_name.partition(".")[0]
        with _on_path(Path.cwd()):
            if package not in sys.modules and importlib.util.find_spec(package) is None:
                raise ConfigError(f"{here}: no module {package!r} in {Path.cwd()} or on the path")
        return
    file = _existing(Path(module_name), here)
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{here}: {file.resolve()} cannot be read as Python: {error}") from error
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
    if name not in names and not names & {"*", "globals", "__getattr__"}:  # by which a name may come from elsewhere
        own = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
        raise _no_function(here, name, own)


def _parts(path: str, what: str) -> tuple[str, str]:
    module_name, _, name = path.rpartition(":")
    if not module_name or not name:
        raise ConfigError(f"{what} {path!r}: expected package.module:name or file.py:name")
    return module_name, name


def _no_function(here: str, name: str, defined: Iterable[str]) -> ConfigError:
    known = ", ".join(sorted(found for found in defined if not found.startswith("_"))) or "none"
    return ConfigError(f"{here}: no function {name!r} there; it has {known}")


def _import(module_name: str, here: str):
    folder = Path.cwd()
    try:
        with _on_path(folder):
            return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the user's module exists and lacks something of its own
        raise ConfigError(f"{here}: no module {error.name!r} in {folder} or on the path") from error


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Inside, modules are looked for in the folder first, as by a script that lies in it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def _own_siblings(folder: Path) -> Iterator[None]:
    """Inside, a module or package that is named as one in the folder is that one, also where one of another folder has
    been imported under the name; after it the name is the other's again. Installed packages keep theirs."""
    beside = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    beside -= {*sys.stdlib_module_names, "align", "__main__", "__init__"}
    taken = {name for name in beside & sys.modules.keys() if _is_of_another(sys.modules[name], folder / name)}
    others = _forgotten(taken)
    try:
        with _on_path(folder):
            yield
    finally:
        _forgotten(taken)
        sys.modules.update(others)


def _is_of_another(module: ModuleType, place: Path) -> bool:
    """Whether a module is the user's and from elsewhere than from this file or package, named without `.py`."""
    file = Path(getattr(module, "__file__", None) or place.with_suffix(".py")).resolve()
    own = file in (place.with_suffix(".py"), place / "__init__.py")
    return not own and not any(file.is_relative_to(installed) for installed in INSTALLED)


def _forgotten(names: Collection[str]) -> dict[str, ModuleType]:
    """These modules and what is inside them, which the next import no longer finds."""
    return {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] in names}


def _existing(file: Path, here: str) -> Path:
    if not file.is_file():
        raise ConfigError(f"{here}: no file {file.resolve()}")
    return file


def _load_file(file: Path, here: str):
    spec = importlib.util.spec_from_file_location(file.stem, _existing(file, here))
    if spec is None or spec.loader is None:
        raise ConfigError(f"{here}: {file.resolve()} is no Python file")
    module, name = importlib.util.module_from_spec(spec), file.stem
    with _own_siblings(file.resolve().parent):
        if name in sys.stdlib_module_names:  # it may import that one
            spec.loader.exec_module(module)
            return module
        # Dataclasses and pydantic look their module up while it is executed. It does not stay: another file may have
        # the same name.
        before = sys.modules.get(name)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules[name]
            if before is not None:
                sys.modules[name] = before
    return module
