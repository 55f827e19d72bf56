"""One tiny pipeline of each model family, random weights, with a uniform way to run it. One file a family, found by looking.

A family's file says how its pipeline is made and with what it is called. What the row in `methods/_core/families` says of the
model is proved on that pipeline by tests/test_families.py.
"""
import importlib
import pkgutil

from families.making import WIDTH, WORDS, Family, text

__all__ = ["FAMILIES", "FIRST", "WIDTH", "WORDS", "Family", "text"]

FIRST = ("unet", "sdxl", "dit", "pixart", "sd3", "flux", "latte", "cogvideox")          # for what is not tried on all

_found = {each.name: each for module in pkgutil.iter_modules(__path__)
          if (each := getattr(importlib.import_module(f"families.{module.name}"), "FAMILY", None))}
FAMILIES: dict[str, Family] = {name: _found[name] for name in (*FIRST, *sorted(_found.keys() - set(FIRST)))}
