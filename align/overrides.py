"""Which class of an object's says what, for what a subclass may have overridden without the rest."""

from collections.abc import Sequence


def says(thing: object, name: str, of: Sequence[str]) -> bool:
    """Whether `name` of an object, or of a class, is from the class that the methods `of` are from, or from a subclass
    of it: then it is about these methods, and not about those that they override."""
    cls = thing if isinstance(thing, type) else type(thing)
    layers = [*([] if cls is thing else [vars(thing)]), *map(vars, cls.__mro__)]

    def place(name: str) -> int:
        return next(number for number, layer in enumerate(layers) if name in layer)

    return place(name) <= min(map(place, of))
