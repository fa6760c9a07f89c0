"""An engine that draws beside the process, as a server does, with what it is told to wait for."""

import threading
from collections.abc import Callable

from align.errors import RolloutError
from align.rollout.transformers_engine import TransformersEngine

PLACE = "tests.trainers.on_policy.elsewhere:Elsewhere"


class Elsewhere(TransformersEngine):
    """before: called in the thread that asks for the completions of a rollout, with the number of the call."""

    name = "engine elsewhere"
    draws_elsewhere = tells = True
    before: Callable[[int], None] = staticmethod(lambda call: None)

    def __init__(self, *args, **options):
        self.number, self.given_up, self.drawing = 0, threading.Event(), threading.Event()
        super().__init__(*args, **options)

    def generate(self, prompts, params, **options):
        self.number += 1
        self.drawing.set()
        try:
            type(self).before(self.number)
            if self.given_up.is_set():
                raise RolloutError("given up")
            return super().generate(prompts, params, **options)
        finally:
            self.drawing.clear()

    def push(self, model, version):
        assert not self.drawing.is_set(), "weights were pushed while completions were drawn"
        return super().push(model, version)

    def interrupt(self):
        self.given_up.set()
        return True
