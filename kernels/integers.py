"""Arithmetic for plans. Triton has functions of these names, which are wrapped for its kernels: 3 us a call here."""


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, for b above 0."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n; 1 for n up to 1."""
    return 1 << max(n - 1, 0).bit_length()
