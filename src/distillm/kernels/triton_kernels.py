"""The rows of a chunk scored by Triton, one program a row: values, and the gradient written over the student's logits.

A row is read in tiles, up to three times: for the statistics of both softmaxes, for the value and ``sum G``, for the
gradient ``dz = G - q sum G``. Sums are kept lane by lane and reduced once at the end of a pass, so that no tile waits
for the one before. The formulas are those of ``closed_form``, in float32 and with logarithms to base 2, which is
what the hardware has: ``log 0`` is finite, and an infinite entry reports itself in the value and has no slope.
"""

# The values of a kernel have no types before it is compiled, and calls between kernels are typed as never returning.
# pyright: basic, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e30)
UNCOVERED = tl.constexpr(5e29)
INF = tl.constexpr(float("inf"))
TINY = tl.constexpr(2.0**-126)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NO_LABEL = tl.constexpr(-100)
HAS_PTX = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)  # pyright: ignore[reportAttributeAccessIssue]


@triton.jit
def probe_kernel(out, TERMS: tl.constexpr):
    """Whether anything can be compiled and run, with a function among its arguments, as Triton 3.3 can."""
    x = tl.load(out)
    _, g = TERMS(x, x, x, x, x, x)
    tl.store(out, g)


@triton.jit
def _log2(x):
    """The hardware's own where it can be named, to 2^-22; what every backend has takes twenty instructions."""
    if HAS_PTX:
        return tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def _columns(TILE: tl.constexpr):
    """The places in a tile, a lane's eight in a row: what a thread loads at once, and sums by itself."""
    return tl.arange(0, TILE // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _logits(row, columns, num_tokens, width, stride, scale, softcap):
    """``x``, ``c`` and the slope of the logits in the product that was stored: the logits are ``c x`` to base 2.

    The row may be read up to ``width``, which is a round number wherever it can be: a load is as wide as its mask.
    Beyond the vocabulary it holds ``-inf``.
    """
    x = tl.load(row + columns.to(tl.int64) * stride, mask=columns < width, other=-INF).to(tl.float32)
    c, slope = scale * LOG2E, scale
    if softcap is not None:
        # tanh by an exponential that cannot overflow; there is none that every backend has.
        e = tl.exp2(tl.abs(x * (scale / softcap)) * (-2 * LOG2E))
        t = softcap * (1 - e) / (1 + e)
        x = tl.where(columns < num_tokens, tl.where(x * scale < 0, -t, t), -INF)
        c, slope = LOG2E, scale * 4 * e / ((1 + e) * (1 + e))
    return x, c, slope


@triton.jit
def _observe(x, c, top, mass):
    """Each lane's largest logit so far, never below ``FLOOR``, and its sum, with the factor of what was summed before.

    Returned with them: the terms of the tile.
    """
    most = tl.maximum(top, tl.max(x * c, 1))
    kept = tl.exp2(top - most)
    e = tl.exp2(tl.fma(x, c, -most[:, None]))
    return most, mass * kept + tl.sum(e, 1), kept, e


@triton.jit
def _normaliser(top, mass):
    """The row's largest logit and the logarithm of the sum of what the others are beside it, NaN without any mass.

    They stay apart: their sum would cost large logits their digits.
    """
    most = tl.max(top, 0)
    total = tl.sum(mass * tl.exp2(top - most), 0)
    return most, tl.where(total > 0, tl.log2(total), float("nan"))


@triton.jit
def _log_softmax(x, c, top, log_mass):
    """``log q``, about ``FLOOR`` where it is ``-inf``, and ``q``. A NaN is in ``log_mass``: the maximum may drop it."""
    log_q = tl.maximum(tl.fma(x, c, -top), FLOOR) - log_mass
    return log_q, tl.exp2(log_q)


@triton.jit
def _gap(log_a, log_b):
    """``log(a / b)`` to base e."""
    return (log_a - log_b) * LN2


@triton.jit
def _log_mixture(p, q, weight):
    """The logarithm of ``weight p + (1 - weight) q``, which is at least the smallest normal number."""
    return _log2(tl.maximum(weight * p + (1 - weight) * q, TINY, propagate_nan=tl.PropagateNan.ALL))


# The terms of a divergence: (log p, log q, p, q, its two numbers) -> what a token adds to the value, and its G.


@triton.jit
def forward_kl(log_p, log_q, p, q, a, b):
    """``G = -p``."""
    gap = _gap(log_p, log_q)
    uncovered = gap > UNCOVERED
    return tl.where(uncovered, INF, p * gap), tl.where(uncovered, 0.0, -p)


@triton.jit
def reverse_kl(log_p, log_q, p, q, a, b):
    """``G = q (log(q / p) + 1)``."""
    gap = _gap(log_q, log_p)
    uncovered = gap > UNCOVERED
    return tl.where(uncovered, INF, q * gap), tl.where(uncovered, 0.0, q * (gap + 1))


@triton.jit
def skew_kl(log_p, log_q, p, q, a, b):
    """``G = -(1 - a) p q / m``, ``m = a p + (1 - a) q``, for ``a > 0``."""
    log_m = _log_mixture(p, q, a)
    return p * _gap(log_p, log_m), (a - 1) * p * tl.exp2(log_q - log_m)


@triton.jit
def skew_reverse_kl(log_p, log_q, p, q, a, b):
    """``G = q (log(q / m) - a q / m)``, ``m = (1 - a) p + a q``, for ``a > 0``."""
    log_m = _log_mixture(q, p, a)
    gap = _gap(log_q, log_m)
    return q * gap, q * (gap - a * tl.exp2(log_q - log_m))


@triton.jit
def skew_kl_by_row(log_p, log_q, p, q, a, b):
    """``skew_kl``, for ``a = 0`` too, where ``m = q`` may underflow."""
    value, g = skew_kl(log_p, log_q, p, q, a, b)
    plain, plain_g = forward_kl(log_p, log_q, p, q, a, b)
    return tl.where(a == 0, plain, value), tl.where(a == 0, plain_g, g)


@triton.jit
def skew_reverse_kl_by_row(log_p, log_q, p, q, a, b):
    """``skew_reverse_kl``, for ``a = 0`` too, where ``m = p`` may underflow."""
    value, g = skew_reverse_kl(log_p, log_q, p, q, a, b)
    plain, plain_g = reverse_kl(log_p, log_q, p, q, a, b)
    return tl.where(a == 0, plain, value), tl.where(a == 0, plain_g, g)


@triton.jit
def jsd(log_p, log_q, p, q, a, b):
    """``G = (1 - a) q log(q / m)``, ``m = a p + (1 - a) q``."""
    log_m = _log_mixture(p, q, a)
    g = (1 - a) * q * _gap(log_q, log_m)
    return a * p * _gap(log_p, log_m) + g, g


@triton.jit
def total_variation(log_p, log_q, p, q, a, b):
    """``G = q sign(q - p) / 2``."""
    return 0.5 * tl.abs(q - p), tl.where(q > p, 0.5 * q, tl.where(q < p, -0.5 * q, 0.0))


@triton.jit
def symmetric_kl(log_p, log_q, p, q, a, b):
    """``G = (1 - a) G_forward + a G_reverse``; a part of weight 0 is never infinite."""
    gap = _gap(log_p, log_q)
    above, below = gap > UNCOVERED, gap < -UNCOVERED
    forward = tl.where(above, 0.0, -p)
    reverse = tl.where(below, 0.0, q * (1 - gap))
    value = tl.where(above | below, 0.0, ((1 - a) * p - a * q) * gap)
    infinite_part = tl.where(above, 1 - a, tl.where(below, a, 0.0))
    return tl.where(infinite_part > 0, INF, value), (1 - a) * forward + a * reverse


@triton.jit
def alpha_beta(log_p, log_q, p, q, a, b):
    """``G = (q^(a + b) - p^a q^b) / a``."""
    both = tl.exp2(a * log_p + b * log_q)
    own, other = tl.exp2((a + b) * log_p), tl.exp2((a + b) * log_q)
    return ((a * own + b * other) / (a + b) - both) / (a * b), (other - both) / a


@triton.jit
def alpha_only(log_p, log_q, p, q, a, b):
    """The limit ``b = 0`` of ``alpha_beta``: ``G = (q^a - p^a) / a``."""
    gap = _gap(log_p, log_q)
    uncovered = gap > UNCOVERED
    own, other = tl.exp2(a * log_p), tl.exp2(a * log_q)
    value = (gap * own * a + other - own) / (a * a)
    return tl.where(uncovered, INF, value), tl.where(uncovered, 0.0, (other - own) / a)


@triton.jit
def beta_only(log_p, log_q, p, q, a, b):
    """The limit ``a = 0`` of ``alpha_beta``: ``G = q^b log(q / p)``."""
    gap = _gap(log_q, log_p)
    uncovered = gap > UNCOVERED
    own, other = tl.exp2(b * log_p), tl.exp2(b * log_q)
    g = gap * other
    return tl.where(uncovered, INF, (b * g + own - other) / (b * b)), tl.where(uncovered, 0.0, g)


@triton.jit
def divergence_kernel(
    teacher, teacher_row, teacher_step, teacher_width, teacher_scale, teacher_cap,
    student, student_row, student_step, student_width, student_scale, student_cap,
    target, target_row, target_step, weights, values, per_row, a, b, num_tokens,
    TERMS: tl.constexpr, KNOWN_SUM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``values[row]``, and ``target[row]``, its gradient times ``weights[row]``, where there is a ``target``.

    ``per_row``, where given, holds ``a`` for each row. With ``KNOWN_SUM``, which is for ``forward_kl``, ``sum G`` is
    taken from the first pass, and the other two are one.
    """
    row = tl.program_id(0).to(tl.int64)
    teacher += row * teacher_row
    student += row * student_row
    weight = tl.load(weights + row)
    if per_row is not None:
        a = tl.load(per_row + row)
    places = _columns(TILE)
    p_top = tl.full([TILE // 8], FLOOR, tl.float32)
    p_mass = tl.zeros([TILE // 8], tl.float32)
    q_top, q_mass, covered = p_top, p_mass, p_mass
    for start in range(0, num_tokens, TILE):
        columns = start + places
        xp, cp, _p = _logits(teacher, columns, num_tokens, teacher_width, teacher_step, teacher_scale, teacher_cap)
        xq, cq, _q = _logits(student, columns, num_tokens, student_width, student_step, student_scale, student_cap)
        p_top, p_mass, kept, p = _observe(xp, cp, p_top, p_mass)
        if KNOWN_SUM:
            covered = covered * kept + tl.sum(tl.where(xq == -INF, 0.0, p), 1)
        q_top, q_mass, _kept, _terms = _observe(xq, cq, q_top, q_mass)
    g_sum = 0.0
    if KNOWN_SUM:
        scale = tl.exp2(p_top - tl.max(p_top, 0))
        g_sum = -tl.sum(covered * scale, 0) / tl.sum(p_mass * scale, 0)
    p_top, p_log_mass = _normaliser(p_top, p_mass)
    q_top, q_log_mass = _normaliser(q_top, q_mass)

    num_passes: tl.constexpr = 1 if target is None or KNOWN_SUM else 2
    for step in tl.static_range(num_passes):
        value, g_lanes = tl.zeros([TILE // 8], tl.float32), tl.zeros([TILE // 8], tl.float32)
        for start in range(0, student_width, TILE):  # beyond the vocabulary zeros are written
            columns = start + places
            xp, cp, _p = _logits(teacher, columns, num_tokens, teacher_width, teacher_step, teacher_scale, teacher_cap)
            xq, cq, slope = _logits(
                student, columns, num_tokens, student_width, student_step, student_scale, student_cap
            )
            log_p, p = _log_softmax(xp, cp, p_top, p_log_mass)
            log_q, q = _log_softmax(xq, cq, q_top, q_log_mass)
            term, g = TERMS(log_p, log_q, p, q, a, b)
            if step == 0:
                value += tl.sum(term, 1)
                g_lanes += tl.sum(g, 1)
            if target is not None and step == num_passes - 1:
                dz = (g - q * g_sum) * (slope * weight)
                place = target + row * target_row + columns.to(tl.int64) * target_step
                tl.store(place, tl.where(columns < num_tokens, dz, 0.0), mask=columns < student_width)
        if step == 0:
            tl.store(values + row, tl.sum(value, 0))
            if num_passes == 2:
                g_sum = tl.sum(g_lanes, 0)


@triton.jit
def cross_entropy_kernel(
    student, student_row, student_step, student_width, scale, softcap, target, target_row, target_step,
    labels, weights, values, num_tokens, TILE: tl.constexpr,
):  # fmt: skip
    """``values[row] = -log q[label]``, and its gradient times ``weights[row]``; both 0 where there is no label.

    A label outside the vocabulary has the value NaN: it cannot stop the program, and must not be taken for one.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * student_row
    label = tl.load(labels + row)
    known = (label >= 0) & (label < num_tokens)
    # Read before the sums: behind them a faster warp may have written its gradient over it.
    chosen, c, _slope = _logits(
        student, tl.where(known, label, 0), num_tokens, student_width, student_step, scale, softcap
    )
    places = _columns(TILE)
    top = tl.full([TILE // 8], FLOOR, tl.float32)
    mass = tl.zeros([TILE // 8], tl.float32)
    for start in range(0, num_tokens, TILE):
        x, _, _ = _logits(student, start + places, num_tokens, student_width, student_step, scale, softcap)
        top, mass, _kept, _terms = _observe(x, c, top, mass)
    top, log_mass = _normaliser(top, mass)
    value = tl.where(known, (log_mass - tl.fma(chosen, c, -top)) * LN2, float("nan"))
    tl.store(values + row, tl.where(label == NO_LABEL, 0.0, value))
    if target is not None:
        weight = tl.load(weights + row)
        for start in range(0, student_width, TILE):
            columns = start + places
            x, _, slope = _logits(student, columns, num_tokens, student_width, student_step, scale, softcap)
            q = tl.exp2(tl.fma(x, c, -top) - log_mass)
            dz = tl.where(columns == label, q - 1, q) * (slope * weight)
            dz = tl.where((columns < num_tokens) & (label != NO_LABEL), dz, 0.0)
            place = target + row * target_row + columns.to(tl.int64) * target_step
            tl.store(place, dz, mask=columns < student_width)
