"""The kernels of `vlrank.engines.packed_kernels` against PyTorch: on a GPU, or with TRITON_INTERPRET=1 without one.

A process of its own: the setting has to be there before Triton is imported, for everything that uses Triton.
"""

import os

import torch

from vlrank.engines import packed_kernels, packed_layer
from vlrank.engines.packed_attention import join
from vlrank.engines.packed_layer import Layer, Matrix, Sizes

SHAPES = (
    Sizes(heads=4, key_heads=2, head_dim=32, epsilon=1e-6),
    Sizes(heads=9, key_heads=3, head_dim=64, epsilon=1e-5),  # SmolLM2: no powers of two
    Sizes(heads=2, key_heads=1, head_dim=80, epsilon=1e-6),
)
TOKENS, WIDTH, INNER = 7, 72, 100
CUDA = torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR).to("cuda" if CUDA else "cpu")


def layer(sizes: Sizes, *, normed: bool, biased: bool) -> Layer:
    out = (sizes.heads + 2 * sizes.key_heads) * sizes.head_dim
    q_norm, k_norm = (1 + drawn(sizes.head_dim) / 4 if normed else None for _ in range(2))
    return Layer(
        norm=1 + drawn(WIDTH) / 4,
        qkv=Matrix(drawn(out, WIDTH) / 8, drawn(out) if biased else None),
        q_norm=q_norm,
        k_norm=k_norm,
        o=Matrix(drawn(WIDTH, sizes.heads * sizes.head_dim) / 8),
        mlp_norm=1 + drawn(WIDTH) / 4,
        gate_up=Matrix(drawn(2 * INNER, WIDTH) / 4),
        down=Matrix(drawn(WIDTH, INNER) / 8),
    )


def check_layers() -> None:
    for sizes in SHAPES:
        for normed, biased in ((True, False), (False, True)):
            weights = layer(sizes, normed=normed, biased=biased)
            x, attended = 3 * drawn(TOKENS, WIDTH), drawn(TOKENS, sizes.heads, sizes.head_dim)
            angles = 9 * drawn(TOKENS, 1, sizes.head_dim)
            cos, sin = angles.cos(), angles.sin()
            given = packed_kernels.before_attention(x, weights, cos, sin, sizes)
            for a, b in zip(given, packed_layer.before_attention(x, weights, cos, sin, sizes), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            expected = packed_layer.after_attention(x, attended, weights, sizes)
            torch.testing.assert_close(
                packed_kernels.after_attention(x, attended, weights, sizes), expected, rtol=1e-5, atol=1e-5
            )


def check_rounding() -> None:
    """In 16 bits a norm is rounded once, and the sum that goes on is PyTorch's to the bit.

    In float16: the interpreter cuts bfloat16 off instead of rounding.
    """
    x, added, weight = drawn(TOKENS, WIDTH).half(), drawn(TOKENS, WIDTH).half(), drawn(WIDTH).half()
    total, normed = packed_kernels.norm(x, weight, 1e-6, added=added)
    torch.testing.assert_close(total, x + added, rtol=0, atol=0)
    exact = packed_layer.rms_norm((x + added).float(), weight.float(), 1e-6)
    torch.testing.assert_close(normed.values.float(), exact, rtol=2**-11, atol=2**-24)


def check_float8() -> None:
    x = drawn(TOKENS, 2 * INNER)
    x[0] = 0  # must not divide by nothing
    gate, up = x.chunk(2, -1)
    wanted = {
        "float8": (packed_kernels.float8(x), x),
        "silu": (packed_kernels.silu_product(x, float8=True), torch.nn.functional.silu(gate) * up),
        "norm": (
            packed_kernels.norm(x, torch.ones(2 * INNER, device=x.device), 1e-6, float8=True)[1],
            packed_layer.rms_norm(x, torch.ones(2 * INNER, device=x.device), 1e-6),
        ),
    }
    for name, (rounded, exact) in wanted.items():
        assert rounded.values.dtype == torch.float8_e4m3fn, name
        assert rounded.scale is not None, name
        largest = exact.abs().amax(1, keepdim=True).clamp(min=1e-12)
        torch.testing.assert_close(rounded.scale, largest / 448, rtol=1e-5, atol=0)
        # Three bits behind the leading one: half a step is 1/16 at most. Triton's interpreter cuts off instead of
        # rounding, and loses the carry of some numbers.
        close = torch.isclose(rounded.values.float() * rounded.scale, exact, rtol=0.07 if CUDA else 0.13, atol=1e-3)
        assert close.all() if CUDA else close.float().mean() > 0.95, name


def check_join() -> None:
    for heads, dim in ((4, 32), (9, 64), (3, 80)):
        near, far = ((drawn(TOKENS, heads, dim), 4 * drawn(heads, TOKENS)) for _ in range(2))
        torch.testing.assert_close(packed_kernels.join(near, far), join(near, far)[0], rtol=1e-5, atol=1e-5)
        turned = far[0], far[1].T.contiguous().T  # kernels differ in how they store it
        torch.testing.assert_close(packed_kernels.join(near, turned), join(near, far)[0], rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    GENERATOR = torch.Generator().manual_seed(0)
    check_layers()
    check_rounding()
    check_float8()
    check_join()
    print("all kernels agree")
