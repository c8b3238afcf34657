"""MATLAB version 5 files: numeric arrays only, compressed or not, either byte order.

A file is a header of 128 bytes and a row of elements. An element is a tag (type and length, four bytes each; where the
length is at most 4, both share four bytes and the data fill the other four) and its data, padded to eight bytes except
in a compressed element. An array is an element of elements: flags, dimensions, name, numbers. The numbers may be stored
in a smaller type than the array's class. Source: MathWorks, "MAT-File Format" (version 5).
"""

import zlib
from collections.abc import Iterator
from math import prod

import numpy as np
from numpy.typing import NDArray

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_COMPLEX = 0x08


def load(data: bytes) -> dict[str, NDArray[np.generic]]:
    """The numeric arrays of a file by name, axes in MATLAB's order; other kinds of variable are passed over.

    Raises `ValueError` where the bytes are not such a file, or are cut short or damaged.
    """
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if len(data) < _HEADER or order is None:
        raise ValueError("no MATLAB 5 header")
    if int(np.frombuffer(data, order + "u2", 1, 124)[0]) != 0x0100:
        raise ValueError("not version 5 of the format")
    found = {}
    for kind, body in _elements(memoryview(data)[_HEADER:], order):
        inner = _elements(_inflate(body), order) if kind == _COMPRESSED else iter([(kind, body)])
        for inner_kind, matrix in inner:
            if inner_kind == _MATRIX:
                found.update(_matrix(matrix, order))
    return found


def _inflate(body: memoryview) -> memoryview:
    try:
        return memoryview(zlib.decompress(body))
    except zlib.error as error:
        raise ValueError(f"damaged compressed data: {error}") from error


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    at = 0
    while at < len(data):
        if len(data) - at < 8:
            raise ValueError("cut short within a tag")
        kind, size = (int(v) for v in np.frombuffer(data, order + "u4", 2, at))
        if kind >> 16:
            kind, size, start, room = kind & 0xFFFF, kind >> 16, at + 4, 4
            end = at + 8
        else:
            start, room = at + 8, len(data) - at - 8
            end = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if size > room:
            raise ValueError(f"cut short: an element of {size} bytes has {room} left")
        yield kind, data[start : start + size]
        at = end


def _matrix(data: memoryview, order: str) -> dict[str, NDArray[np.generic]]:
    parts = list(_elements(data, order))
    if len(parts) < 3 or len(parts[0][1]) < 8:
        raise ValueError("an array without flags, dimensions and name")
    flags = int(np.frombuffer(parts[0][1], order + "u4", 1)[0])
    wanted = _CLASSES.get(flags & 0xFF)
    if wanted is None or (flags >> 8) & _COMPLEX:
        return {}
    if len(parts) < 4 or parts[3][0] not in _STORED:
        raise ValueError("a numeric array without numbers")
    shape = tuple(int(n) for n in np.frombuffer(parts[1][1], order + "i4"))
    name = bytes(parts[2][1]).decode("ascii", "replace")
    kind, body = parts[3]
    values = np.frombuffer(body, order + _STORED[kind])
    if min(shape, default=0) < 0 or values.size != prod(shape):
        raise ValueError(f'"{name}": expected {prod(shape)} numbers for {shape}, got {values.size}')
    return {name: values.astype(wanted, copy=False).reshape(shape, order="F")}
