"""C functions as Python functions, by declarations of CPython's that are checked first."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any


class Unlike(Exception):
    """Raised where this Python or PyTorch differs from those that the native code knows."""


class Method(ctypes.Structure):
    """CPython's PyMethodDef."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]


#: METH_FASTCALL
FASTCALL = 0x80

#: by name and address; the functions refer to them
_methods: dict[tuple[str, int], Method] = {}


def python_function(name: str, at: int, data: tuple, module: str) -> Callable:
    """Return a Python function that calls ``Object *at(Object *data, Object *const *args, int64_t
    count)``."""
    method = _methods.get((name, at))
    if method is None:
        made = Method(name.encode(), at, FASTCALL, None)
        method = _methods.setdefault((name, at), made)
    make = ctypes.pythonapi.PyCFunction_NewEx
    make.argtypes = (ctypes.POINTER(Method), ctypes.py_object, ctypes.py_object)
    make.restype = ctypes.py_object
    return make(method, data, module)


def address(function: Any) -> int:
    """Return the address of a function of a loaded library."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def word(x: Any, offset: int) -> int:
    """Read the word of an object at this place."""
    return ctypes.c_int64.from_address(id(x) + offset).value


def check_objects() -> None:
    """Check how objects begin, and how a tuple goes on. Raises Unlike."""
    sizes = (object.__basicsize__, tuple.__basicsize__, ctypes.sizeof(ctypes.c_void_p))
    if sys.implementation.name != "cpython" or sizes != (16, 24, 8):
        raise Unlike("objects of this Python are laid out in another way")
    x = (sys, "x")
    if [word(x, 8 * i) for i in range(1, 5)] != [id(tuple), 2, id(sys), id("x")]:
        raise Unlike("objects of this Python are laid out in another way")
