"""The quickstart on a real chat model and real preference pairs: `align quickstart --real`."""
