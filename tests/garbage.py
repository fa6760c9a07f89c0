"""Collections of garbage that do not look through what was imported.

A trainer collects when it starts to train, and an engine of vLLM six times. In what was imported there is no garbage,
and looking through it takes half a second each time: more than most of the trainings here.
"""

import gc

_freeze, _unfreeze = gc.freeze, gc.unfreeze


def freeze() -> None:
    """Leave what there is now out of all collections to come.

    vLLM freezes when an engine starts and unfreezes everything when it ends, which would take this back for all tests
    that follow: its calls do nothing from here on.
    """
    gc.freeze = gc.unfreeze = lambda: None
    gc.collect()
    _freeze()


def unfreeze() -> None:
    _unfreeze()
