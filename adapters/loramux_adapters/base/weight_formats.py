"""How frozen weights are held and multiplied: which formats a device has, and which product serves how many rows.

Holds the measured bounds between products; the maps in `frozen` build the formats and choose by them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loramux_adapters.base.bitsandbytes_compat import functional as bnb_functional
from loramux_adapters.kernels.native_linear import find_native_linear

PACKED_ROWS_BESIDE_DENSE = 4
"""Up to here the packed layout beats a dense bf16 copy: it reads a quarter of the bytes, but its time grows with
every row (2 cores with AVX512-BF16 and AMX, 75M weights: 3, 5 and 17 ms at 1, 4 and 16 rows, against 8, 8 and 8)."""

PACKED_ROWS_ALONE = 16
"""Up to here the packed layout beats dequantizing into a scratch weight on each call (16 rows: 17.5 against 18 ms)."""

NATIVE_ROWS_ALONE = 512
NATIVE_ROWS_ALONE_WITH_TILES = 128
"""Up to here our own product from the codes beats dequantizing into a scratch weight on each call (two cores of Zen 4
without AMX, 4096 x 4096: 14, 27, 115 and 242 ms at 64, 128, 512 and 1024 rows, against 32, 44, 120 and 223; with AMX
the figures below put the crossing near 100 rows)."""

NATIVE_ROWS_BESIDE_DENSE = 192
NATIVE_ROWS_BESIDE_TILES = 8
"""Up to here our own product from the codes beats the library's on a dense bf16 copy, without AMX and with it (one core
of Zen 4, 75M weights: 6, 8, 19, 57, 106 and 423 ms at 1, 4, 16, 64, 128 and 512 rows, against 16, 17, 26, 60, 110 and
374; two cores of a Xeon with AMX: 8, 11, 17, 26, 98 ms at 1, 4, 8, 16 and 64 rows, against 15, 14, 16, 19 and 52)."""

NATIVE_ROWS_OF_DENSE_WEIGHT = 16
"""Up to here our own product with an unquantized bf16 weight is the faster one (32000 x 768: 3.9, 4.8, 8.0 and 19.7 ms
at 1, 4, 16 and 64 rows, against 5.3, 6.1, 8.5 and 19.1); with AMX the library serves."""


@dataclass(frozen=True)
class WeightFormats:
    """How frozen weights are held and multiplied.

    `native` reads the codes as they are (see `native_linear`), `packed` is bitsandbytes' layout for where there is no
    compiler; both need AVX512-BF16 and bf16 compute. `dense` costs out x in elements; `invariant` makes a row's product
    independent of the other rows, whatever the library, and goes before the others.
    """

    packed: bool = False
    dense: bool = False
    invariant: bool = False
    native: bool = False


def supports_packed() -> bool:
    """Whether bitsandbytes has its AVX512-BF16 kernel on this machine."""
    return bool(bnb_functional.has_avx512bf16())


def select_weight_formats(device: torch.device, dtype: torch.dtype, *, dense: bool, invariant: bool) -> WeightFormats:
    """The fastest there is; `dense` says whether there is memory for a dense copy."""
    four_bit = device.type == "cpu" and dtype == torch.bfloat16 and not invariant
    native = four_bit and find_native_linear() is not None
    packed = four_bit and not native and supports_packed()
    return WeightFormats(packed=packed, dense=dense, invariant=invariant, native=native)


Product = Callable[[torch.Tensor], torch.Tensor]
"""[T, in] contiguous, T >= 1 -> a new tensor [T, out], the bias added."""


class Products:
    """Products by the number of rows up to which each is the fastest; the last one takes any number."""

    def __init__(self, *products: tuple[float, Product]) -> None:
        self._products = products

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See Product."""
        rows = x.shape[0]
        for most, product in self._products:
            if rows <= most:
                return product(x)
        raise ValueError(f"no product takes {rows} rows")
