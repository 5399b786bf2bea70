"""One module per model family, each with a `FAMILY`; a family's name is its module's."""

from importlib import import_module
from pkgutil import iter_modules

from minitron_nemo.arch.family import Family

FAMILIES: dict[str, Family] = {
    module.name: import_module(f"{__name__}.{module.name}").FAMILY for module in iter_modules(__path__)
}
