"""Our kernels for CPUs in every variant that this processor or an emulated one can run, against the formula."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import kernel_cases
import kernel_emulated
import numpy as np
import pytest
from kernel_cases import HEADS, NEON_ROWS, NEON_VARIANTS, ROWS, VARIANTS, Case, Kernel, from_bf16, inputs, to_bf16
from kernel_emulated import EmulatedKernel

from ettin.runtimes import engines
from ettin.runtimes.engines.openvino_kernels import compiled

SOURCES = Path(engines.__file__).parent / "kernels"
IS_ARM = platform.machine() == "aarch64"


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def kernel(variant: str, request: pytest.FixtureRequest) -> Kernel:
    return what_runs(variant, NEON_VARIANTS, Kernel.can_run, request)


def what_runs(
    name: str, emulated: tuple[str, ...], can_run: Callable[[Kernel, str], bool], request: pytest.FixtureRequest
) -> Kernel:
    """The library, or a program for an emulated processor."""
    if name in emulated and not IS_ARM:
        program: EmulatedKernel = request.getfixturevalue("emulated")
        return program
    library = compiled()
    if library is None:
        pytest.skip("the kernels were not compiled")
    kernel = Kernel(library)
    if not can_run(kernel, name):
        pytest.skip(f"this processor can't run {name}")
    return kernel


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel for an emulated processor."""
    if kernel_emulated.missing():
        pytest.skip(f"no processor can be emulated, not installed: {kernel_emulated.missing()}")
    return kernel_emulated.build(SOURCES, tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def emulated(program: Path) -> Iterator[EmulatedKernel]:
    with EmulatedKernel(program) as kernel:
        yield kernel


def arrays(variant: str, *values: np.ndarray) -> list[np.ndarray]:
    return [to_bf16(x) if variant.startswith("bf16") else np.ascontiguousarray(x, np.float32) for x in values]


def test_equals_the_formula(kernel: Kernel, variant: str) -> None:
    assert kernel_cases.check(kernel, variant) >= 16


def test_rows_of_tables(kernel: Kernel, variant: str) -> None:
    kernel_cases.check_tables(kernel, variant)


def test_scales_of_rows(kernel: Kernel, variant: str) -> None:
    kernel_cases.check_scales(kernel, variant)


def test_long_sequences(kernel: Kernel, variant: str) -> None:
    """The rounding of positions shows, and a row's largest score may come after thousands of keys."""
    case = Case(64, -1, lengths=(1000 if variant in NEON_VARIANTS else 3000,))  # emulation is slow
    mean, _ = kernel_cases.errors(kernel, variant, case, 0.5)
    assert mean <= 2 * kernel_cases.TOLERANCES[variant.partition("_")[0]][0]


def test_equal_keys_give_the_mean(kernel: Kernel, variant: str) -> None:
    """All scores of the unrotated part are equal where keys are 0."""
    case = Case(64, -1, lengths=(77,))
    q, k, v = inputs(case, 1.0)
    found = kernel.attend(variant, case, *arrays(variant, q, np.zeros_like(k), v))
    np.testing.assert_allclose(found, np.broadcast_to(v.mean(0), found.shape), atol=2e-2)


def test_huge_scores_choose_one_value(kernel: Kernel, variant: str) -> None:
    case = Case(64, 0, lengths=(40,))
    q, k, v = inputs(case, 1e4)
    np.testing.assert_allclose(kernel.attend(variant, case, *arrays(variant, q, k, v)), v, atol=3e-2)


def test_nothing_to_tell_apart(kernel: Kernel, variant: str) -> None:
    """Queries, keys and values of 0: no scale is 0, and no hidden key counts."""
    case = Case(64, 5, lengths=(33, 1))
    nothing = np.zeros((34, HEADS * 64), np.float32)
    assert not kernel.attend(variant, case, *arrays(variant, nothing, nothing, nothing)).any()
    found = kernel.attend(variant, case, *arrays(variant, nothing, nothing, nothing + 3))
    np.testing.assert_allclose(found, 3, atol=1e-2)


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_not_hidden(kernel: Kernel, variant: str, which: str, value: float) -> None:
    case = Case(64, -1, lengths=(4, 70, 5))
    values = dict(zip("qkv", inputs(case, 0.5), strict=True))
    values[which][40, 3] = value
    found = kernel.attend(variant, case, *arrays(variant, *values.values()))
    assert not np.isfinite(found[40, :64]).all()
    assert np.isfinite(found[:4]).all() and np.isfinite(found[74:]).all()


def test_a_score_of_minus_infinity_has_no_weight(kernel: Kernel, variant: str) -> None:
    if not variant.startswith("f32"):
        pytest.skip("other products round an infinite key")
    case = Case(64, -1, lengths=(70,))
    q, k, v = inputs(case, 0.5)
    k[40, 3] = np.inf
    with np.errstate(all="ignore"):
        wanted = kernel_cases.expected(case, "f32", q, k, v)[:, :64]
    is_finite = np.isfinite(wanted).all(-1)
    assert 5 < is_finite.sum() < 65
    found = kernel.attend(variant, case, q, k, v)[:, :64]
    np.testing.assert_allclose(found[is_finite], wanted[is_finite], atol=1e-3)


def test_results_are_rounded_to_int8(kernel: Kernel, variant: str) -> None:
    if variant == "bf16_amx":
        pytest.skip("it does not round its results")
    case, step = Case(64, 64, lengths=(40, 7)), 0.01  # so small that some results do not fit
    values = arrays(variant, *inputs(case, 0.5))
    floats = kernel.attend(variant, case, *values)
    wanted = np.clip(np.round(floats / step), -128, 127)
    assert (wanted == 127).any() and (wanted == -128).any()
    found = kernel.attend(variant, case, *values, step=step)
    # Floats in bf16 are rounded once more.
    assert np.abs(found - wanted).max() <= (1 + np.abs(floats).max() / 256 / step if variant.startswith("bf16") else 1)
    assert (found == wanted).mean() > (0.6 if variant.startswith("bf16") else 0.99)


@pytest.fixture(params=ROWS)
def rows(request: pytest.FixtureRequest) -> tuple[Kernel, str]:
    """What can run the kernels on rows, and their name."""
    return what_runs(request.param, NEON_ROWS, Kernel.can_run_rows, request), request.param


def test_rows_equal_the_formula(rows: tuple[Kernel, str]) -> None:
    assert kernel_cases.check_rows(*rows) == 40
    kernel_cases.check_extremes(*rows)


def test_first_tokens_equal_the_formula(rows: tuple[Kernel, str]) -> None:
    assert kernel_cases.check_first(*rows) == 36


def test_extremes_of_first_tokens(rows: tuple[Kernel, str]) -> None:
    """Huge scores choose one row, equal ones give the mean, and NaN is not hidden."""
    kernel, name = rows
    case = Case(64, -1, True, (5, 70))
    q, k, _ = inputs(case, 1.0)
    x = np.random.default_rng(0).integers(-128, 128, (75, 64)).astype(np.int8)

    def found(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        result = kernel.attend_first(name, case, *arrays(name, queries[case.bounds[:-1]], keys), x)
        assert result is not None
        return kernel_cases.as_floats(result)

    assert all((abs(x[5:] - row) < 0.5).all(-1).any() for row in found(q * 1e4, k)[1])
    np.testing.assert_allclose(found(q, np.zeros_like(k))[1], np.broadcast_to(x[5:].mean(0), (2, 64)), atol=0.1)
    k[2, 3] = np.nan
    result = found(q, k)
    assert np.isnan(result[0, 0]).all() and np.isfinite(result[0, 1]).all() and np.isfinite(result[1]).all()


def test_rows_of_odd_size_are_refused(rows: tuple[Kernel, str]) -> None:
    kernel, name = rows
    for size in (40, 16, 1, 0):
        x = np.ones((1, size), np.uint16 if name.startswith("bf16") else np.float32)
        assert kernel.normalise(name, x, x, 1e-5) is None
        assert kernel.attend_first(name, Case(32, 0, True, (1,)), x, x, x) is None
        assert kernel.gate(name, np.repeat(x, 2, axis=1)) is None


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_stay_in_rows(rows: tuple[Kernel, str], value: float, rounds: bool) -> None:
    """Rounded to int8, they are in the scale of their row."""
    kernel, name = rows
    x = np.ones((3, 64), np.float32)
    x[1, 5] = value
    stored, nothing = arrays(name, x, np.zeros_like(x))
    results, gated = kernel.normalise(name, stored, nothing, 1e-5, rounds), kernel.gate(name, stored, rounds)
    assert results and gated
    for each in (*results, gated):
        floats = each.floats if each.scales is None else kernel_cases.as_floats(each.scales)[:, None]
        assert np.isfinite(floats[[0, 2]]).all() and not np.isfinite(floats[1]).all()


def test_empty_sequences_are_skipped(kernel: Kernel, variant: str) -> None:
    with_empty, without = Case(64, -1, lengths=(5, 0, 9)), Case(64, -1, lengths=(5, 9))
    values = arrays(variant, *inputs(without, 1.0))
    assert np.array_equal(kernel.attend(variant, with_empty, *values), kernel.attend(variant, without, *values))


def test_what_it_does_not_take_is_refused(kernel: Kernel, variant: str) -> None:
    case = Case(16, -1, lengths=(5,))
    with pytest.raises(AssertionError, match="does not take"):
        kernel.attend(variant, case, *arrays(variant, *inputs(case, 1.0)))


def test_bf16_is_rounded_to_nearest() -> None:
    assert from_bf16(to_bf16(np.array([1.00390625, 1.01171875, np.pi], np.float32))).tolist() == [
        1.0,
        1.015625,
        3.140625,
    ]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "riscv64"])
def test_a_processor_gets_its_own_files(machine: str) -> None:
    """The installation compiles what is for all processors and for this kind."""
    checkout = Path(__file__).parents[2]
    code = f"""if True:
        import platform, runpy, setuptools
        platform.machine = lambda: {machine!r}
        setuptools.setup = lambda ext_modules, options: print(*(ext_modules[0].sources if ext_modules else []))
        runpy.run_path("setup.py")
    """
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=checkout)
    names = {Path(path).stem for path in printed.split()}
    everywhere = {"openvino_extension", "ragged_attention", "rows"}
    neon = {"f32_neon", "int8_neon", "rows_f32_neon"}
    x86 = {path.stem for path in SOURCES.glob("*.cpp")} - everywhere - neon
    assert len(x86) == 9
    assert names == {"x86_64": everywhere | x86, "aarch64": everywhere | neon}.get(machine, set())


def test_under_sanitizers(tmp_path: Path) -> None:
    """Compiled so that a wrong address or an undefined operation ends the process."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("g++ is not there")
    flags = ["-std=c++17", "-O0", "-w", "-fPIC", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    not_here = ("openvino_extension.cpp", *(() if IS_ARM else ("f32_neon.cpp", "int8_neon.cpp", "rows_f32_neon.cpp")))
    sources = [path for path in sorted(SOURCES.glob("*.cpp")) if path.name not in not_here]
    running = [  # about 10 s
        subprocess.Popen([compiler, *flags, "-DETTIN_EVEX", "-c", source, "-o", tmp_path / f"{source.stem}.o"])
        for source in sources
    ]
    assert [process.wait() for process in running] == [0] * len(sources)
    library = tmp_path / "kernels.so"
    subprocess.run([compiler, *flags, "-shared", *tmp_path.glob("*.o"), "-o", library], check=True)
    runtime = subprocess.check_output([compiler, "-print-file-name=libasan.so"], text=True).strip()
    environment = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PATH": ""}
    done = subprocess.run(
        [sys.executable, kernel_cases.__file__, library], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("\n") == len(VARIANTS) + len(ROWS)


def test_an_emulated_processor_without_dot_products(program: Path) -> None:
    """What the system says about the processor decides, when it runs."""
    with EmulatedKernel(program, "cortex-a53") as kernel:
        assert [kernel.can_run(name) for name in NEON_VARIANTS] == [True, False]
        assert kernel_cases.check(kernel, "f32_neon", kernel_cases.FEW_LENGTHS) >= 16


def test_emulated_under_sanitizers(program: Path, tmp_path: Path) -> None:
    with EmulatedKernel(kernel_emulated.build(SOURCES, tmp_path, kernel_emulated.SANITIZED)) as kernel:
        for variant in NEON_VARIANTS:
            assert kernel_cases.check(kernel, variant, kernel_cases.FEW_LENGTHS) >= 16
        assert kernel_cases.check_rows(kernel, *NEON_ROWS) == 40
        assert kernel_cases.check_first(kernel, *NEON_ROWS) == 36
