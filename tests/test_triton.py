"""The Triton kernels against the definitions in float64: on a GPU where there is one, else in Triton's interpreter.

The interpreter takes milliseconds for a row, so there are few rows here, and small tiles, so that a row has several.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distillm import kernels
from distillm.divergences import DIVERGENCES, Bucketed
from distillm.errors import ConfigError
from distillm.kernels import chunked, linear_cross_entropy, linear_divergence
from distillm.types import IGNORE, Head
from kernel_cases import (
    HEADS,
    WEIGHT_OF,
    flops,
    jeffreys_half,
    make_head,
    parameters_of,
    peak_beside_gradients,
    results,
)

pytest.importorskip("triton", reason="triton is not installed; it comes with torch for CUDA, and with the extra dev")

from distillm.kernels import sweep, triton_kernels, triton_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = [name for name in DIVERGENCES if name != "adaptive_kl"]
BUDGET = 6_000  # two chunks and more at the sizes below
SIZES = (5, 257, 11)
Loss = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(triton_rows, "LARGEST_TILE", 128)


def cast(head: Head, dtype: torch.dtype = torch.float32) -> Head:
    """The same numbers, as leaves of another type, where the kernels run."""
    return head._replace(
        **{
            name: x.detach().to(DEVICE, dtype, copy=True).requires_grad_()
            for name, x in head._asdict().items()
            if isinstance(x, Tensor)
        }
    )


def here(*sizes: int, dtype: torch.dtype = torch.float32, **how: Any) -> Head:
    seed, *rest = sizes
    num_rows, num_tokens, width = rest
    return cast(make_head(seed, (num_rows, num_tokens, width), **how), dtype)


def assert_exact(loss: Callable[..., Loss], teacher: Head | None, student: Head, rtol: float = 2e-5) -> list[Tensor]:
    """``loss(teacher, student)``, against the definition in float64 on the same numbers; returns what it gave."""
    doubles = [head and cast(head, torch.float64) for head in (teacher, student)]
    expected = results(loss(*doubles, impl="eager"), doubles[1])
    actual = results(loss(teacher, student, impl="triton", byte_budget=BUDGET), student)
    for one, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), wanted, rtol=rtol, atol=rtol * max(finite_size(wanted), 0.05))
    return actual


def finite_size(x: Tensor) -> float:
    return x[x.isfinite()].abs().max().item() if x.isfinite().any() else 0.0


def divergence(name: Any, weights: Tensor, **parameters: Any) -> Callable[..., Any]:
    def loss(teacher: Head, student: Head, **how: Any) -> Any:
        return lambda: linear_divergence(name, teacher, student, weights, per_row=True, **parameters, **how)

    return loss


def cross_entropy(labels: Tensor, weights: Tensor) -> Callable[..., Any]:
    def loss(_: None, student: Head, **how: Any) -> Any:
        return lambda: linear_cross_entropy(student, labels, weights, per_row=True, **how)

    return loss


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_triton_is_eager(name: str, head: dict[str, Any]) -> None:
    teacher, student = here(1, 5, 257, 13, bias=True, softcap=9.0), here(2, *SIZES, **head)
    assert_exact(divergence(name, torch.rand(5, device=DEVICE)), teacher, student)
    assert all(x.grad is None for x in parameters_of(teacher))


@pytest.mark.parametrize("sizes", [(1, 7, 3), (3, 128, 4), (2, 129, 3), (4, 1, 2), (3, 384, 5)], ids=str)
@pytest.mark.parametrize("name", ["forward_kl", "skew_kl"])
def test_sizes(name: str, sizes: tuple[int, int, int]) -> None:
    teacher, student = here(1, *sizes), here(2, *sizes, bias=True)
    assert_exact(divergence(name, torch.rand(sizes[0], device=DEVICE)), teacher, student)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_cross_entropy_is_eager(head: dict[str, Any]) -> None:
    labels = torch.tensor([0, 256, IGNORE, 128, 127], device=DEVICE)
    assert_exact(cross_entropy(labels, torch.rand(5, device=DEVICE)), None, here(3, *SIZES, **head))


def test_a_label_outside_the_vocabulary_is_no_number() -> None:
    labels = torch.tensor([0, 7, -1, IGNORE], device=DEVICE)
    _, values = linear_cross_entropy(
        here(3, 4, 7, 3), labels, torch.ones(4, device=DEVICE), impl="triton", per_row=True
    )
    assert values.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("name", WEIGHT_OF)
def test_one_parameter_per_row(name: str) -> None:
    teacher, student = here(1, 6, 257, 4, bias=True), here(2, 6, 257, 6, bias=True)
    rows = torch.tensor([0.0, 0.01, 0.5, 0.9, 1.0, 0.0], device=DEVICE)
    with torch.no_grad():  # at weight 0 it matters that a model has mass where the other's underflows
        for token, head in enumerate((teacher, student)):
            assert head.bias is not None
            head.bias[token] = -150.0
    for weight in (rows, rows[1], 0.0, 1.0):
        assert_exact(divergence(name, torch.rand(6, device=DEVICE), **{WEIGHT_OF[name]: weight}), teacher, student)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.0, 0.4), (0.3, 0.0), (2.0, 1.5)])
def test_exponents_of_alpha_beta(alpha: float, beta: float) -> None:
    teacher, student = here(1, 4, 257, 4), here(2, 4, 257, 6, bias=True)
    loss = divergence("alpha_beta", torch.rand(4, device=DEVICE), alpha=alpha, beta=beta)
    assert_exact(loss, teacher, student)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits(name: str) -> None:
    inf = math.inf
    rows = torch.cartesian_prod(*[torch.tensor([0.0, 1.0, 1e4, -1e4, -inf, -200.0, -90.0])] * 3)
    rows = rows[rows.isfinite().any(-1)]
    p, q = (rows[torch.randint(len(rows), (100,))].to(DEVICE) for _ in range(2))
    q[::10] = p[::10]
    student, how = Head(q.requires_grad_(), None), {}
    if name in WEIGHT_OF:
        how = {WEIGHT_OF[name]: torch.tensor([0.0, 1e-3, 0.1, 0.5, 1.0], device=DEVICE).repeat(20)}
    loss = partial(linear_divergence, name, Head(p, None), student, torch.ones(100, device=DEVICE), per_row=True, **how)
    eager, fused = (results(partial(loss, impl=impl), student) for impl in ("eager", "triton"))
    assert fused[1].isinf().any() == (name not in ("jsd", "total_variation", "alpha_beta"))
    torch.testing.assert_close(fused[1], eager[1], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(fused[2], eager[2], rtol=1e-4, atol=1e-3)


def test_labels_without_mass() -> None:
    student = Head(torch.tensor([[0.0, -math.inf, 1e4], [1e4, -1e4, 0.0]], device=DEVICE, requires_grad=True), None)
    loss = partial(linear_cross_entropy, student, torch.tensor([1, 1], device=DEVICE), torch.ones(2, device=DEVICE))
    eager, fused = (results(partial(loss, impl=impl, per_row=True), student) for impl in ("eager", "triton"))
    for one, wanted in zip(fused, eager, strict=True):
        torch.testing.assert_close(one, wanted)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which the interpreter computes with
def test_a_row_without_a_label_is_worth_nothing_whatever_it_holds() -> None:
    student = Head(torch.full((1, 7), math.inf, device=DEVICE, requires_grad=True), None)
    label, weights = torch.tensor([IGNORE], device=DEVICE), torch.ones(1, device=DEVICE)
    for part in results(cross_entropy(label, weights)(None, student, impl="triton"), student):
        assert (part == 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which the interpreter computes with
@pytest.mark.parametrize("name", [*NAMES, "cross_entropy"])
def test_what_is_no_number_stays_none(name: str) -> None:
    good = torch.zeros(7)
    bad = [good.index_fill(0, torch.tensor([3]), value) for value in (math.nan, math.inf)]
    bad.append(torch.full((7,), -math.inf))
    p, q = torch.stack([good, *bad, good, good, good]).to(DEVICE), torch.stack([*[good] * 4, *bad]).to(DEVICE)
    weights, student = torch.ones(7, device=DEVICE), Head(q, None)
    if name == "cross_entropy":
        _, values = linear_cross_entropy(
            student, torch.zeros(7, dtype=torch.long, device=DEVICE), weights, impl="triton", per_row=True
        )
        assert values.isnan().tolist() == [False] * 4 + [True] * 3
    else:
        _, values = linear_divergence(name, Head(p, None), student, weights, impl="triton", per_row=True)
        assert values.isnan().tolist() == [False] + [True] * 6


def error_beside(exact: list[Tensor], actual: list[Tensor]) -> Tensor:
    """Relative errors of the scalar, the values and the gradients."""
    return torch.stack([(a.double() - e).norm() / e.norm() for a, e in zip(actual, exact, strict=True)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*NAMES, "cross_entropy"])
def test_low_precision_is_as_exact_as_eager(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "LARGEST_TILE", 256)
    weights, labels = torch.rand(17, device=DEVICE), torch.randint(203, (17,), device=DEVICE)
    loss = cross_entropy(labels, weights) if name == "cross_entropy" else divergence(name, weights)

    def errors(seed: int) -> list[Tensor]:
        teacher, student = here(seed, 17, 203, 16, dtype=dtype), here(seed + 99, 17, 203, 16, dtype=dtype, bias=True)
        doubles = [cast(head, torch.float64) for head in (teacher, student)]
        exact = results(loss(*doubles, impl="eager"), doubles[1])
        given = {impl: results(loss(teacher, student, impl=impl), student) for impl in ("eager", "triton")}
        assert all(a.dtype == b.dtype for a, b in zip(*given.values(), strict=True))
        return [error_beside(exact, given[impl]) for impl in ("eager", "triton")]

    naive, fused = torch.stack([torch.stack(errors(seed)) for seed in range(4)]).mean(0)
    assert (fused <= 1.25 * naive).all(), (fused, naive)


@pytest.mark.parametrize(
    ("of_teacher", "of_student"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
def test_the_two_models_may_differ_in_dtype(of_teacher: torch.dtype, of_student: torch.dtype) -> None:
    teacher, student = here(1, *SIZES, dtype=of_teacher), here(2, *SIZES, dtype=of_student)
    loss = divergence("jsd", torch.ones(5, device=DEVICE))
    expected, actual = (results(loss(teacher, student, impl=impl), student) for impl in ("eager", "triton"))
    for one, wanted in zip(actual, expected, strict=True):
        assert one.dtype == wanted.dtype
        torch.testing.assert_close(one, wanted, rtol=2e-2, atol=2e-3 * wanted.abs().max().item())


def test_autocast_makes_the_product_in_its_dtype() -> None:
    teacher, student = here(1, *SIZES), here(2, *SIZES, bias=True)
    loss, low = divergence("jsd", torch.ones(5, device=DEVICE)), []
    with torch.autocast(DEVICE, torch.bfloat16):
        low = results(loss(teacher, student, impl="triton"), student)
    rounded = [cast(head, torch.bfloat16) for head in (teacher, student)]
    assert torch.equal(low[1], loss(*rounded, impl="triton")()[1])
    assert not torch.equal(low[1], loss(teacher, student, impl="triton")()[1])
    assert all(g.dtype == torch.float32 for g in low[2:])


def test_logits_of_the_models_own_stay_as_they_are() -> None:
    # Views: a narrowed vocabulary, and columns that are not neighbours.
    p, q = torch.randn(5, 300, device=DEVICE)[:, :257], torch.randn(257, 5, device=DEVICE).T
    before = p.clone(), q.clone()
    teacher, student = Head(p, None), Head(q.requires_grad_(), None)
    assert_exact(divergence("skew_kl", torch.rand(5, device=DEVICE)), teacher, student)
    assert_exact(cross_entropy(torch.arange(5, device=DEVICE), torch.rand(5, device=DEVICE)), None, student)
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])


def test_narrowed_heads() -> None:
    teacher, student = here(1, 4, 300, 5, bias=True), here(2, 4, 280, 6, bias=True)
    loss = divergence("skew_reverse_kl", torch.rand(4, device=DEVICE))

    def narrowed(one: Head, other: Head, **how: Any) -> Any:
        return loss(one.narrow(257), other.narrow(257), **how)

    assert_exact(narrowed, teacher, student)


def test_a_head_narrowed_to_shared_tokens_is_padded_by_the_rows_behind_them() -> None:
    teacher, student = here(1, 5, 200, 11), here(2, 5, 200, 7)
    narrow = student.narrow(101)
    assert narrow.weight is not None
    padded = sweep.Projection(narrow, triton_rows.ALIGN).weight
    assert padded is not None
    assert (padded.data_ptr(), len(padded)) == (narrow.weight.data_ptr(), 128)
    weights = torch.rand(5, device=DEVICE)

    def loss(impl: Any) -> Tensor:
        return linear_divergence("skew_kl", teacher.narrow(101), student.narrow(101), weights, impl=impl)

    tensors = [student.hidden, student.weight]
    for one, other in zip(*(torch.autograd.grad(loss(impl), tensors) for impl in ("triton", "eager")), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-6)


def test_no_rows_are_worth_nothing() -> None:
    weights = torch.zeros(0, device=DEVICE)
    for student in (here(1, 0, 9, 4, bias=True), here(1, 0, 9, 4, raw=True)):
        labels = torch.zeros(0, dtype=torch.long, device=DEVICE)
        for loss in (divergence("skew_kl", weights), cross_entropy(labels, weights)):
            total, _, *gradients = results(loss(here(2, 0, 9, 3), student, impl="triton"), student)
            assert total == 0
            assert all((g == 0).all() for g in gradients)


def test_a_second_backward_says_why_it_cannot_be() -> None:
    student = here(2, 3, 7, 2)
    loss = linear_divergence("jsd", here(1, 3, 7, 2), student, torch.ones(3, device=DEVICE), impl="triton")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_flops_are_the_least_and_no_gradient_is_made_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = here(1, 7, 101, 12), here(2, 7, 101, 5)
    product, weights, targets = 2 * 7 * 128, torch.ones(7, device=DEVICE), []  # 101 columns, padded to whole pieces
    launch = triton_rows._launch
    monkeypatch.setattr(
        triton_rows, "_launch", lambda *given, **how: (targets.append(given[1].target), launch(*given, **how))
    )

    def count(student: Head) -> int:
        return flops(lambda: linear_divergence("skew_kl", teacher, student, weights, impl="triton", byte_budget=BUDGET))

    assert student.weight is not None
    assert count(student) == product * (3 * 5 + 12)
    assert count(student._replace(weight=student.weight.detach())) == product * (2 * 5 + 12)
    assert len(targets) > 2
    assert all(target is not None for target in targets)
    targets.clear()
    with torch.no_grad():
        assert count(student) == product * (5 + 12)
    assert all(target is None for target in targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_stays_within_the_budget(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "_launch", lambda kernel, block, *_, **__: block.values.zero_())
    num_tokens, budget = 2003, 2**20

    def peak(num_rows: int) -> int:
        teacher, student = (make_head(i, (num_rows, num_tokens, 4), dtype, softcap=20.0) for i in (1, 2))
        return peak_beside_gradients(
            lambda: triton_rows.divergence_rows(DIVERGENCES["jsd"], teacher, student, torch.ones(num_rows), {}, budget)[
                0
            ],
            student,
        )

    small, large = peak(40), peak(640)
    assert small > 40 * num_tokens * dtype.itemsize
    assert large > 0.8 * budget
    assert large <= budget + 640 * 64 + 2 * num_tokens * 4 * 4


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only")
@pytest.mark.parametrize("capability", [90])
def test_every_kernel_compiles_for_a_gpu_that_is_not_there(capability: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, script, str(capability)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == len(NAMES) + 7
    for kernel in kernels:
        assert kernel["binary"] > 0
        assert kernel["wide"] >= 2  # a row is read 16 bytes a thread,
        assert kernel["loads"] - kernel["wide"] <= 3  # and by itself only what a row has one of


def head_on(device: str, dtype: torch.dtype = torch.float32) -> Any:
    return SimpleNamespace(hidden=SimpleNamespace(device=torch.device(device), is_cuda=device == "cuda", dtype=dtype))


def chosen(impl: str, divergence: Any, *heads: Any, **parameters: Any) -> Any:
    return kernels._implementation(impl, divergence, parameters, *heads)


def test_auto_takes_triton_on_a_gpu_for_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    skew, cpu, gpu = DIVERGENCES["skew_kl"], head_on("cpu"), head_on("cuda")
    double = head_on("cuda", torch.float64)
    monkeypatch.setattr(triton_rows, "works", lambda device: True)
    assert chosen("auto", skew, cpu, cpu) is chunked
    assert chosen("auto", skew, gpu, gpu) is triton_rows
    assert chosen("auto", None, gpu) is triton_rows
    assert all(chosen("auto", function, gpu, gpu) is triton_rows for function in triton_rows.TERMS)
    for function in (DIVERGENCES["adaptive_kl"], Bucketed(skew, 3), jeffreys_half):
        assert chosen("auto", function, gpu, gpu) is chunked
    assert chosen("auto", skew, double, gpu) is chunked
    assert chosen("auto", None, double) is chunked
    assert chosen("auto", DIVERGENCES["alpha_beta"], gpu, gpu, alpha=torch.ones(1)) is chunked
    monkeypatch.setattr(triton_rows, "works", lambda device: False)
    assert chosen("auto", skew, gpu, gpu) is chunked


def test_asked_for_by_name_it_says_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, double, skew = head_on("cuda"), head_on("cuda", torch.float64), DIVERGENCES["skew_kl"]
    for function, heads, reason in (
        (DIVERGENCES["adaptive_kl"], (gpu, gpu), "has no kernel for adaptive_kl; take impl='chunked', or 'auto'"),
        (jeffreys_half, (gpu, gpu), "has no kernel for jeffreys_half"),
        (Bucketed(skew, 3), (gpu, gpu), "has no kernel for top_k"),
        (skew, (double, gpu), "computes in float32, and this is float64"),
        (None, (double,), "computes in float32, and this is float64"),
    ):
        with pytest.raises(ConfigError, match=reason):
            chosen("triton", function, *heads)
    monkeypatch.setattr(triton_rows, "_interpreted", lambda: False)
    with pytest.raises(ConfigError, match="impl='triton' needs a GPU; take"):
        chosen("triton", skew, head_on("cpu"), head_on("cpu"))


def test_without_triton_auto_goes_on_and_its_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(kernels, "triton_rows")
    monkeypatch.setitem(sys.modules, "distillm.kernels.triton_rows", None)
    assert chosen("auto", None, head_on("cuda")) is chunked
    with pytest.raises(ConfigError, match="impl='triton' needs the package triton"):
        chosen("triton", None, head_on("cuda"))


def test_parameters_are_checked_as_the_divergence_does() -> None:
    teacher, student, weights = here(1, 3, 7, 2), here(2, 3, 7, 4), torch.ones(3, device=DEVICE)
    loss = partial(linear_divergence, teacher=teacher, student=student, weights=weights, impl="triton")
    with pytest.raises(ValueError, match="alpha is 2; give a number from 0 to 1"):
        loss("skew_kl", alpha=2)
    with pytest.raises(ValueError, match=r"beta holds 0\.0 to 1\.5; give numbers from 0 to 1"):
        loss("jsd", beta=torch.tensor([0.0, 1.5, 1.0]))
    with pytest.raises(ValueError, match=r"alpha is -1 and beta 0\.7"):
        loss("alpha_beta", alpha=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'alpha'"):
        loss("jsd", alpha=0.5)


def test_a_triton_that_cannot_compile_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    assert triton_rows.works.__wrapped__(device)

    class Broken:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton_kernels, "probe_kernel", Broken())
    with pytest.warns(UserWarning, match="losses take impl='chunked': Failed to find C compiler"):
        assert not triton_rows.works.__wrapped__(device)
