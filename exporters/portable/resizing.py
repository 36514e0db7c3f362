"""Pillow's resize of one axis in ONNX nodes, to the bit.

ONNX Runtime's Resize antialiases, but finds its weights in float32: some values round to another
level, and what was resized along one axis first may end 2 levels off after the other. OpenVINO's
does not antialias at all. These nodes do what Pillow's C does: weights in double, rounded to whole
units of 2^-22, and sums of integers.

A MatMul of float32 is exact for integers below 2^24. A weight is more, so it is two numbers, whole
units of 2^-15 and the rest in units of 2^-22, and each has its MatMul. A pixel of the result is
made of few of the picture's: twelve at a time, as many rows as fast kernels take, share a window.
"""

from __future__ import annotations

# `@far`, a pixel's distance in the filter's own unit, to `@weight`; operation by operation as in C,
# because a double that is rounded otherwise may be another unit.
_WEIGHTS = {
    "bilinear": """
    @below = Sub(one, @far)
    @weight = Max(@below, nought)
    """,
    "bicubic": """
    @near_0 = Mul(@far, one_half_more)
    @near_1 = Sub(@near_0, two_half_more)
    @near_2 = Mul(@near_1, @far)
    @near_3 = Mul(@near_2, @far)
    @near_4 = Add(@near_3, one)
    @out_0 = Sub(@far, five)
    @out_1 = Mul(@out_0, @far)
    @out_2 = Add(@out_1, eight)
    @out_3 = Mul(@out_2, @far)
    @out_4 = Sub(@out_3, four)
    @out_5 = Mul(@out_4, minus_half)
    @is_near = Less(@far, one)
    @is_out = Less(@far, reach)
    @beyond = Where(@is_out, @out_5, nought)
    @weight = Where(@is_near, @near_4, @beyond)
    """,
}
_NUMBERS = {
    "bilinear": "double[1] reach = {1}",
    "bicubic": """double[1] reach = {2}, double[1] one_half_more = {1.5}, double[1] four = {4},
    double[1] two_half_more = {2.5}, double[1] five = {5}, double[1] eight = {8},
    double[1] minus_half = {-0.5}""",
}

# A weight of 1 is `precision` units; of them 128 (1 / `coarse`) are a coarse unit, and `level_unit`
# coarse ones make a level. Half a coarse unit is added to a sum, because QuantizeLinear rounds
# halves to even numbers and Pillow rounds them up; float32 holds it in all sums up to white.
_SHARED_NUMBERS = """
    int64 none = {0}, int64 single = {1}, int64[3] block_shape = {-1, 12, 1},
    int64[1] one_less_than_block = {11}, int64[1] block = {12}, int64[1] last_axis = {-1},
    double[1] nought = {0}, double[1] one = {1}, double[1] half_a_pixel = {0.5},
    double[1] eleven = {11}, double[1] precision = {4194304}, double[1] coarse = {0.0078125},
    float half_a_unit = {0.5}, float level_unit = {32768}, uint8 no_level = {0}"""

_SCALE = """
    @there = Cast<to=11>(@from)
    @here = Cast<to=11>(@to)
    @scale = Div(@there, @here)
    @stretch = Max(@scale, one)
    @support = Mul(@stretch, reach)
"""

# A pixel more on both sides than the windows of the wanted rows reach.
_NEEDED = """
    @begin_wide = Cast<to=11>(@begin)
    @above = Mul(@begin_wide, @scale)
    @above_support = Sub(@above, @support)
    @above_one = Sub(@above_support, one)
    @above_int = Floor(@above_one)
    @needed_wide = Max(@above_int, nought)
    @needed = Cast<to=7>(@needed_wide)
    @end = Add(@begin, @many)
    @end_wide = Cast<to=11>(@end)
    @below_begin = Mul(@end_wide, @scale)
    @below_support = Add(@below_begin, @support)
    @below_one = Add(@below_support, one)
    @below_int = Ceil(@below_one)
    @needed_end_wide = Min(@below_int, @there)
    @needed_end = Cast<to=7>(@needed_end_wide)
"""

_PASS = """
    @closeness = Div(one, @stretch)

    @with_rest = Add(@many, one_less_than_block)
    @blocks = Div(@with_rest, block)
    @whole_blocks = Mul(@blocks, block)
    @count = Squeeze(@whole_blocks)
    @any = Range(none, @count, single)
    @final = Sub(@many, first)
    @some = Min(@any, @final)
    @places = Add(@some, @begin)
    @blockwise = Reshape(@places, block_shape)
    @index = Cast<to=11>(@blockwise)
    @middle = Add(@index, half_a_pixel)
    @centre = Mul(@middle, @scale)

    @centre_0 = Gather<axis=1>(@centre, zero)
    @left = Sub(@centre_0, @support)
    @left_up = Add(@left, half_a_pixel)
    @start = Floor(@left_up)
    @stride = Mul(@scale, eleven)
    @stride_on = Add(@stride, @support)
    @breadth = Add(@stride_on, @support)
    @breadth_up = Ceil(@breadth)
    @breadth_1 = Add(@breadth_up, one)
    @breadth_int = Cast<to=7>(@breadth_1)
    @window = Squeeze(@breadth_int)
    @steps_int = Range(none, @window, single)
    @steps = Cast<to=11>(@steps_int)
    @at = Add(@start, @steps)
    @last = Sub(@there, one)
    @at_0 = Max(@at, nought)
    @pixel = Min(@at_0, @last)
    @is_pixel = Equal(@at, @pixel)

    @off = Sub(@at, @centre)
    @off_middle = Add(@off, half_a_pixel)
    @signed = Mul(@off_middle, @closeness)
    @far = Abs(@signed)
    %(weights)s
    @weights = Where(@is_pixel, @weight, nought)
    @total = ReduceSum<keepdims=1>(@weights, last_axis)
    @share = Div(@weights, @total)

    @exact = Mul(@share, precision)
    @size = Abs(@exact)
    @size_up = Add(@size, half_a_pixel)
    @size_int = Floor(@size_up)
    @sign = Sign(@exact)
    @units = Mul(@size_int, @sign)
    @in_coarse = Mul(@units, coarse)
    @coarse_wide = Round(@in_coarse)
    @fine_wide = Sub(@in_coarse, @coarse_wide)
    @coarse_part = Cast<to=1>(@coarse_wide)
    @fine_part = Cast<to=1>(@fine_wide)

    @pixel_int = Cast<to=7>(@pixel)
    @pixel_after = Sub(@pixel_int, @cut)
    @pixel_cut = Max(@pixel_after, zero)
    @kept_last = Sub(@kept, first)
    @pixel_kept = Min(@pixel_cut, @kept_last)
    @pixels = Squeeze(@pixel_kept, first)
    @windows_8 = Gather<axis=0>(@matrix, @pixels)
    @windows = Cast<to=1>(@windows_8)
    @coarse_sum = MatMul(@coarse_part, @windows)
    @fine_sum = MatMul(@fine_part, @windows)
    @fine_int = Floor(@fine_sum)
    @fine_half = Add(@fine_int, half_a_unit)
    @sum = Add(@fine_half, @coarse_sum)
    @levels = QuantizeLinear(@sum, level_unit, no_level)
    @shape = Concat<axis=0>(@whole_blocks, last_axis)
    @joined = Reshape(@levels, @shape)
    @resized = Slice(@joined, zero, @many, zero)
"""


def scale_nodes(name: str) -> str:
    """Nodes that go before those of `resize_nodes`, of ``NAME_from`` and ``NAME_to``."""
    return _SCALE.replace("@", f"{name}_")


def needed_nodes(name: str) -> str:
    """Nodes that find which rows those of `resize_nodes` need; they go behind `scale_nodes`.

    They make ``NAME_needed`` and ``NAME_needed_end``, int64 [1].
    """
    return _NEEDED.replace("@", f"{name}_")


def resize_nodes(name: str, interpolation: str) -> str:
    """Nodes that resize the rows of a matrix, in the words of `onnx.parser`.

    They read ``NAME_from`` and ``NAME_to``, int64 [1], and ``NAME_begin`` and ``NAME_many``, which
    of the ``to`` rows are wanted; ``NAME_matrix``, levels [kept, m] in uint8 or float32, and
    ``NAME_cut`` and ``NAME_kept``, which of the ``from`` rows that has, at least those that are
    needed (what is beside them has no weight); and the numbers ``zero`` and ``first``, int64 [1] 0
    and 1, beside `resize_numbers`. They make ``NAME_resized``, uint8 [many, m]. Exact where a pixel
    of the result is made of up to a thousand (at more, fine_sum may reach 2^24).

    Args:
        name: NAME in what they read and make.
        interpolation: of `hhdeploy.preprocess.GRAPH_FILTERS`.
    """
    nodes = _PASS % {"weights": _WEIGHTS[interpolation]}
    return nodes.replace("@", f"{name}_")


def resize_numbers(interpolation: str) -> str:
    """The constants that those nodes share, as an initializer list of `onnx.parser`."""
    return f"{_SHARED_NUMBERS.strip()},\n    {_NUMBERS[interpolation]}"
