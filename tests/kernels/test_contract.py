"""What every op has, and what holds for all of them at small sizes.

Covers: the registry against the folders; public names exported and documented; README sections and examples; every
kernel in a compiled variant; source rules; the quick cases through the interpreter; the registered ops' schemas,
fakes and layouts of every argument; empty batches; of the ops with gradients gradcheck, one graph, layouts, poisoned
outputs and repeatability, torch.func's transforms, refused second derivatives; kernels that do not fit or compile; the
listing; tuning with an injected timer; a GPU on which Triton fails.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
from types import SimpleNamespace

import pytest
import torch
from extrema_fast.kernels import _launch, tune
from extrema_fast.kernels._spec import OPS, Case, Spec, grid, spec
from extrema_fast.kernels.color_views import color_params
from extrema_fast.kernels.sample_views import drop_path_factors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from extrema_fast import kernels
from tests.kernels._compare import assert_one_graph, assert_repeats, draw_keep, normal

EVERY = pytest.mark.parametrize("op", OPS)


@pytest.mark.plain
def test_the_registry_lists_every_folder_and_the_package_every_public_name(repository):
    folders = {p.parent.name for p in (repository / "kernels").glob("*/reference.py")}
    assert folders == set(OPS), "kernels/_spec.py: OPS"
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)


@pytest.mark.plain
@EVERY
def test_files_names_and_the_readmes_example(op, repository, plain):
    s, folder = spec(op), repository / "kernels" / op
    assert s.name == op and s.version >= 1 and s.summary
    for file in ("__init__.py", "reference.py", "kernel.py", "op.py", "spec.py", "README.md"):
        assert (folder / file).is_file(), file
    assert (repository / "tests/kernels" / f"test_{op}.py").is_file()
    package = importlib.import_module(f"extrema_fast.kernels.{op}")
    text = (folder / "README.md").read_text(encoding="utf-8")
    for name in s.public:
        assert name in package.__all__ and name in text, name
        assert getattr(package, name).__doc__, name
    for words in ("## When not to use it", "yte", "GPU"):
        assert words in text, words
    names: dict[str, object] = {}
    code = text.partition("```python\n")[2].partition("```")[0]
    exec(compile(code, f"kernels/{op}/README.md", "exec"), names)
    assert any(name in names for name in s.public)


@pytest.mark.plain
@EVERY
def test_source_rules(op, repository):
    source = (repository / "kernels" / op / "kernel.py").read_text(encoding="utf-8")
    for word in ("autotune", "make_block_ptr", "atomic_", "triton.heuristics"):
        assert word not in source, word
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    for node in calls:
        given = {k.arg for k in node.keywords}
        # a masked load without `other` is undefined on a GPU and zero in the interpreter
        if ast.unparse(node.func) == "tl.load":
            assert "mask" not in given or "other" in given, ast.unparse(node)
        if ast.unparse(node.func) == "tl.dot":
            assert "input_precision" in given, ast.unparse(node)
    # the first axis counts rows, whose offsets pass 2^31
    first = [n for n in calls if ast.unparse(n) == "tl.program_id(0)"]
    widened = [n for n in calls if ast.unparse(n) == "tl.program_id(0).to(tl.int64)"]
    assert len(first) == len(widened)


@EVERY
def test_every_kernel_is_compiled_ahead_of_time_and_quick_cases_agree_with_the_definition(op):
    s, module = spec(op), importlib.import_module(f"extrema_fast.kernels.{op}.kernel")
    launched = {launch.kernel.fn.__name__ for launch in s.variants().values()}
    assert launched == {k for k in vars(module) if k.endswith("_kernel")}
    for case in s.cases(True):
        args = case.make("cpu", torch.float32, torch.Generator().manual_seed(0))
        assert {"ours", "reference"} <= set(case.providers) and case.bytes_fwd > 0
        correct, worst = tune.is_correct(case, args, torch.float32)
        assert correct, f"{case.label}: {worst:.1f} times the limit"
    labels = [c.label for c in s.cases(False)]
    assert len(set(labels)) == len(labels) >= 1


# ---- registered ops -------------------------------------------------------------------------------


def calls(rows):
    """Calls of all registered ops with `rows` rows or images: name, arguments."""
    x, cls, u = torch.randn(5, rows, 32).transpose(0, 1), torch.randn(rows, 32), torch.randn(2, rows, 32)
    z, scores, lse, *stats = torch.ops.extrema_fast.attention_pool_fwd(x, cls, u, 1e-6)
    yield "attention_pool_fwd", (x, cls, u, 1e-6)
    yield "attention_pool_fwd_stats", (x, cls, u, *stats)
    yield "attention_pool_bwd", (x, cls, u, z, scores, lse, *stats)
    images, keep = torch.randn(rows, 3, 12, 8).transpose(2, 3), draw_keep(rows, 6, 2, 3)
    pixels = torch.randint(0, 256, (rows, 8, 12, 3), dtype=torch.uint8)
    for k, bias in ((keep, torch.randn(32)), (None, None)):
        m = (rows * 6) if k is None else k.numel()
        yield "add_positions", (torch.randn(32, m).t(), k, bias, torch.randn(6, 32))
    yield "patch_pack", (images, keep, 4, torch.float16)
    yield "patch_pack", (pixels, None, 4, torch.float32)
    tokens = torch.randn(6, rows, 16).transpose(0, 1)
    for pos in (torch.randn(6, 16), None):
        yield "token_gather_fwd", (tokens, keep, pos)
    yield "token_gather_bwd", (torch.randn(2 * rows, 3, 16), keep, 6, True)
    qkv = torch.randn(5, rows, 3, 2, 16).transpose(0, 1)
    yield "short_attention_fwd", (qkv,)
    yield "short_attention_bwd", (qkv, torch.randn(rows, 5, 2, 16))
    yield "short_attention_bwd_bias", (qkv, torch.randn(rows, 5, 2, 16))
    vector, per_row = torch.randn(16), torch.rand(rows)
    for branch, norm in ((tokens, vector), (None, vector), (tokens, None)):
        bias, scale = (None, None) if branch is None else (vector, per_row)
        yield "residual_norm_fwd", (tokens, branch, bias, scale, norm, norm, 1e-6, torch.float16)
        stats = (None,) * 4 if norm is None else (tokens, *(torch.rand(rows, 6) for _ in range(2)), norm)
        du, types = None if norm is None else tokens, (torch.float32, torch.float32)
        yield "residual_norm_bwd", (du, tokens, *stats, scale, bias is not None, *types)
    yield (
        "residual_norm_again",
        (tokens, *(torch.rand(rows, 6) for _ in range(2)), vector, None, torch.float32),
    )
    hidden = torch.randn(rows, 6, 32)
    for keep_h in (True, False):
        yield "linear_gelu", (tokens, torch.randn(32, 16), torch.randn(32) if keep_h else None, keep_h)
    yield "linear_dgelu", (tokens, torch.randn(16, 32), hidden)
    yield "quack_linear_gelu", (tokens, torch.randn(32, 16), torch.randn(32), True)
    yield "quack_linear_dgelu", (tokens, torch.randn(16, 32), hidden)
    yield "gelu_fwd", (hidden,)
    yield "gelu_bwd", (hidden, hidden)
    index = torch.arange(rows)
    yield "color_params", (index, [0.4] * 4, 0.8, 0.2, 0, 0, [2, 3])
    params = color_params(index, (0.4,) * 4, 0.8, 0.2, seed=0, epoch=0)
    for given in ((params, keep, 4), (None, None, 4), (params, None, 0)):
        p, k, patch = given
        yield "color_views", (pixels, p, k, [0.5] * 3, [0.2] * 3, 3, patch, torch.float32)
    # rows of eight pixels are read as words
    yield "color_views", (pixels.transpose(1, 2), params, None, [0.5] * 3, [0.2] * 3, 3, 0, torch.float32)
    crops = torch.tensor([[3.0, 36, 7, 11, 0.5, 0, 7, 10, i % 2] for i in range(rows)]).double().view(rows, 9)
    yield "crop_resize", (torch.randint(0, 256, (288,), dtype=torch.uint8), crops, 5, 40)
    for disjoint in (True, False):
        yield "sample_views", (index, 19, 5, 3, disjoint, 1, 2)
    yield "drop_path_factors", (index, torch.rand(2, 3), 2, 1, 2, 5)


@pytest.mark.parametrize("rows", [3, 0])
def test_schemas_and_fakes_of_registered_ops(rows, fake_quack):
    found = set()
    for name, args in calls(rows):
        op = getattr(torch.ops.extrema_fast, name).default
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
        found.add(name)
    assert found == {name for op in OPS for name in spec(op).torch_ops}


def strided(x):
    """x in every other place of memory whose other places hold x, too, in reverse: indices stay indices."""
    return torch.stack([x, x.flip(0)], -1)[..., 0] if isinstance(x, torch.Tensor) else x


def expanded(x):
    """The first number of a vector throughout, with stride 0; what is no vector of numbers as it is."""
    vector = isinstance(x, torch.Tensor) and x.dim() == 1 and x.dtype.is_floating_point
    return x[:1].expand(x.shape) if vector else x


def dense(x):
    return x.contiguous() if isinstance(x, torch.Tensor) else x


def test_registered_ops_take_every_argument_in_any_layout(fake_quack):
    for name, args in calls(2):
        op = getattr(torch.ops.extrema_fast, name).default
        for layout in (strided, expanded):
            given = [layout(x) for x in args]
            if name == "crop_resize":
                # whose public function asks for contiguous bytes
                given[0] = args[0]
            same = [dense(x) for x in given]
            if any(x is not y for x, y in zip(given, same, strict=True)):
                torch.testing.assert_close(op(*given), op(*same), msg=lambda m, n=name: f"{n}: {m}")


# ---- ops with gradients ---------------------------------------------------------------------------

GRADIENTS = pytest.mark.parametrize(
    "op",
    [
        "attention_pool",
        "patch_gather",
        "token_gather",
        "short_attention",
        "short_attention with a bias",
        "residual_norm",
        "mlp",
    ],
)


def example(op, dtype=torch.float64, rows=2, n=6):
    """(function, arguments): a small call; attention_pool twice, the second time with statistics."""

    def pools(tokens, cls, *w):
        w = kernels.PoolWeights(*w)
        out, _, stats = kernels.attention_pool(tokens, cls, w, 2)
        return kernels.attention_pool(tokens, cls + 0.1 * out, w, 2, stats=stats)[0]

    def draw(*shape, scale=1.0):
        return normal(*shape, dtype=dtype, scale=scale)

    keep = draw_keep(rows, n, 2, 3)
    if op == "attention_pool":
        weights = [draw(*s, scale=0.25) for s in [(16,), (16,)] + [(16, 16), (16,)] * 4]
        return pools, [draw(rows, n, 16), draw(rows, 16), *weights]
    if op == "short_attention":
        return kernels.short_attention, [draw(rows, n, 3, 2, 16)]
    if op == "short_attention with a bias":

        def projected(x, bias):
            return kernels.short_attention(x + bias.detach().view(3, 2, 16), bias)

        return projected, [draw(rows, n, 3, 2, 16), draw(96)]
    if op == "residual_norm":

        def both(x, branch, bias, gain, shift, scale):
            out, u = kernels.residual_norm(x, gain, shift, branch=branch, bias=bias, scale=scale)
            return kernels.residual_norm(u + out, branch=u, bias=bias)[0]

        vectors = [draw(16) for _ in range(3)]
        return both, [draw(rows, n, 16), draw(rows, n, 16), *vectors, torch.linspace(0, 1.5, rows)]
    if op == "mlp":
        weights = [draw(32, 16, scale=0.25), draw(32), draw(16, 32, scale=0.25), draw(16)]
        return kernels.mlp, [draw(rows, n, 16), *weights]
    if op == "token_gather":
        return kernels.token_gather, [draw(rows, n, 16), keep, draw(n, 16)]
    images = draw(rows, 3, 8, 2 * n).detach()
    return kernels.patch_gather, [images, keep, draw(16, 3, 4, 4, scale=0.1), draw(16), draw(n, 16).detach()]


def results(f, args, expanded=True):
    """Output, and the gradients of its sum; a sum sends a gradient of stride 0."""
    out, leaves = f(*args), [x for x in args if x.requires_grad]
    upstream = out.new_ones(()).expand(out.shape) if expanded else torch.ones_like(out)
    return out, *torch.autograd.grad(out, leaves, upstream)


@GRADIENTS
def test_gradcheck(op):
    f, args = example(op, rows=1, n=4)
    assert torch.autograd.gradcheck(f, args, fast_mode=True)


@GRADIENTS
def test_one_graph(op):
    f, args = example(op)
    assert_one_graph(lambda *args: f(*args).square().sum(), args)


def test_one_graph_for_batches_that_vary():
    compiled = torch.compile(kernels.short_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, heads in ((2, 2), (3, 3)):
        qkv, bias = normal(rows, 5, 3, heads, 16), normal(48 * heads)
        torch.testing.assert_close(compiled(qkv, bias), kernels.short_attention(qkv, bias))


@GRADIENTS
def test_transforms_of_torch_func_run_the_plain_definition(op):
    f, args = example(op)
    stack = torch.stack([args[0], 2 * args[0]]).detach()
    together = torch.func.vmap(lambda x: f(x, *args[1:]))(stack)
    torch.testing.assert_close(together, torch.stack([f(x, *args[1:]) for x in stack]))
    at = [i for i, a in enumerate(args) if a.requires_grad]
    scalar = lambda *leaves: f(*(leaves[at.index(i)] if i in at else a for i, a in enumerate(args))).sum()  # noqa: E731
    leaves = [args[i] for i in at]
    got = torch.func.jacrev(scalar, tuple(range(len(at))))(*(x.detach() for x in leaves))
    wanted = torch.autograd.grad(scalar(*leaves), leaves)
    torch.testing.assert_close(list(got), list(wanted))
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)) for x in leaves]
        tangent = torch.autograd.forward_ad.unpack_dual(scalar(*duals)).tangent
    torch.testing.assert_close(tangent, sum(g.sum() for g in wanted))
    # jacobian(vectorize=True): the backward pass alone is mapped
    out = f(*args)
    upstream = torch.stack([torch.ones_like(out), torch.linspace(0, 1, out.numel()).view_as(out)]).to(out)
    mapped = torch.autograd.grad(out, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(upstream):
        each = torch.autograd.grad(out, leaves, one, retain_graph=True)
        torch.testing.assert_close([g[i] for g in mapped], list(each))


def test_keep_indices_under_vmap():
    tokens, keep = normal(3, 6, 16), draw_keep(3, 6, 2, 4)
    each = torch.func.vmap(lambda t, k: kernels.token_gather(t[None], k[:, None]), in_dims=(0, 1))(
        tokens, keep
    )
    torch.testing.assert_close(each.transpose(0, 1).flatten(0, 1), kernels.token_gather(tokens, keep))


@GRADIENTS
def test_second_derivatives_are_refused_in_words(op):
    f, args = example(op)
    leaves = [x for x in args if x.requires_grad]
    for power in (1, 2):
        out = f(*args)
        if power == 1 and op in ("patch_gather", "token_gather"):
            # linear, as the sum: there is none
            continue
        first = torch.autograd.grad((out**power).sum(), leaves, create_graph=True)
        # as a gradient penalty adds them to a loss
        with pytest.raises(RuntimeError, match=rf"^{op.split()[0]}: .*_reference"):
            (leaves[0].sum() + sum(g.square().sum() for g in first)).backward()


@GRADIENTS
def test_layouts(op):
    f, (x, *rest) = example(op, torch.float32)
    layouts = {
        "sliced": torch.cat([x, x], 1)[:, : x.shape[1]],
        "every other column": torch.stack([x, x], -1).flatten(-2)[..., ::2],
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "transposed inside": x.transpose(1, 2).contiguous().transpose(1, 2),
        "offset base": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
        "wide rows": torch.cat([x, x], -1)[..., : x.shape[-1]],
    }
    wanted = results(f, [x, *rest], expanded=False)
    for name, same in layouts.items():
        same = same.detach().requires_grad_(x.requires_grad)
        out, *gradients = results(f, [same, *rest])
        assert torch.equal(out, wanted[0]), name
        torch.testing.assert_close(gradients, list(wanted[1:]), msg=lambda m, n=name: f"{n}: {m}")
    for layout in (strided, expanded):
        given = [layout(t.detach()) for t in rest]
        pair = (
            [t.requires_grad_(r.requires_grad) for t, r in zip(g, rest, strict=True)]
            for g in (given, map(dense, given))
        )
        found, wanted = (results(f, [x, *g]) for g in pair)
        torch.testing.assert_close(found, wanted, msg=lambda m, n=layout.__name__: f"{n}: {m}")
    one = x.detach()[:1]
    torch.testing.assert_close(f(one.expand(x.shape), *rest), f(one.repeat(2, *[1] * (x.dim() - 1)), *rest))


@GRADIENTS
def test_every_element_is_written_and_runs_repeat_bitwise(op, poisoned):
    f, args = example(op, torch.float32)
    assert_repeats(lambda: results(f, args))


@GRADIENTS
def test_an_empty_batch(op):
    out, *gradients = results(*example(op, rows=0))
    assert out.shape[0] == 0 and not any(g.any() for g in gradients)


def test_an_empty_batch_of_ops_without_gradients(path):
    index, pixels = torch.arange(0), torch.zeros(0, 16, 16, 3, dtype=torch.uint8)
    params = color_params(index, (0.4,) * 4, 0.8, 0.2, seed=0, epoch=0)
    assert params.shape == (0, 2, 10)
    for given in (params, None):
        for patch, shape in ((0, (0, 3, 16, 16)), (8, (0, 4, 192))):
            views = kernels.color_views(pixels, given, (0.5,) * 3, (0.2,) * 3, patch=patch)
            assert [v.shape for v in views] == [shape, shape]
    assert kernels.sample_views(index, 19, 5, 3).shape == (3, 0, 5)
    assert drop_path_factors(index, 5, 12, 0.1, seed=0, epoch=0).shape == (12, 2, 0)
    crops = torch.zeros(0, 9, dtype=torch.float64)
    assert kernels.crop_resize(pixels.flatten(), crops, (8, 8)).shape == (0, 8, 8, 3)


def test_deterministic_runs_take_the_default_settings(monkeypatch):
    monkeypatch.setattr(_launch, "tuned", lambda op, device: {"k": {"BLOCK": 64, "OF_OLD": 1}})
    gpu, default = torch.device("cuda", 0), {"BLOCK": 32}
    assert _launch.settings("mlp", "k", gpu, default) == {"BLOCK": 64}
    try:
        torch.use_deterministic_algorithms(True)
        assert _launch.settings("mlp", "k", gpu, default) == default
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_kernel_uses_atomics(repository):
    files = sorted((repository / "kernels").rglob("*.py"))
    names = {
        n.attr for f in files for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.Attribute)
    }
    # their sums would have any order
    assert "sum" in names and "store" in names and not {n for n in names if n.startswith("atomic")}


def test_a_kernel_that_does_not_fit_runs_with_leaner_settings_and_says_so(monkeypatch, caplog):
    from triton.runtime.errors import OutOfResources

    seen = []

    def launcher(fits):
        chosen = _launch.settings("some_op", "key", torch.device("cuda"), {"B": 1, "STAGES": 3})
        seen.append(chosen)
        if not fits(chosen):
            raise OutOfResources(300_000, 232_448, "shared memory")
        return chosen["B"]

    monkeypatch.setattr(_launch, "_leaner", {})
    monkeypatch.setattr(_launch, "_takes_tuned", set())
    monkeypatch.setattr(_launch, "tuned", lambda op, device: {"key": {"B": 9}})
    assert _launch.fitting("some_op", launcher, lambda c: c["B"] == 1) == 1
    assert [c["B"] for c in seen] == [9, 1] and "default settings" in caplog.text
    assert _launch.fitting("some_op", launcher, lambda c: c["STAGES"] == c.get("num_stages") == 1) == 1
    seen.clear()
    # it stays so, and whoever tries settings sees the error itself
    with pytest.raises(_launch.KernelError, match=r"some_op: the kernel does not fit .*300000.*=reference"):
        _launch.fitting("some_op", launcher, lambda c: False)
    assert len(seen) == 1
    with _launch.forced("some_op", {"B": 2}), pytest.raises(OutOfResources):
        _launch.fitting("some_op", launcher, lambda c: False)


def test_what_does_not_fit_is_found_while_tracing_for_a_gpu(monkeypatch, caplog):
    from triton.runtime.errors import OutOfResources

    compiled, traced = [], []

    def load(kernel, grid, args, options):
        compiled.append((kernel.fn.__name__, args[-1], options["num_stages"]))
        if options["num_stages"] > 1:
            raise OutOfResources(300_000, 232_448, "shared memory")

    class Wrapped(dict):
        def __missing__(self, grid):
            return lambda *args, **options: traced.append(options["num_stages"])

    kernel = importlib.import_module("extrema_fast.kernels.mlp.kernel")
    for where, name, value in (
        (kernel, "_properties", lambda device: SimpleNamespace(major=9)),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device", contextlib.nullcontext),
        (torch.library, "wrap_triton", lambda kernel: Wrapped()),
        (_launch, "INTERPRET", False),
        (_launch, "tuned", lambda op, device: {}),
        (_launch, "_leaner", {}),
        (_launch, "_takes_tuned", set()),
        (_launch, "_load", load),
    ):
        monkeypatch.setattr(where, name, value)
    with FakeTensorMode(), FunctionalTensorMode():
        x, weight = (
            FunctionalTensor.to_functional(torch.empty(*shape, device="cuda", dtype=torch.bfloat16))
            for shape in ((2, 5, 16), (32, 16))
        )
        g, h = torch.ops.extrema_fast.linear_gelu(x, weight, None, True)
    assert g.shape == h.shape == (2, 5, 32)
    assert compiled == [("linear_gelu_kernel", 10, stages) for stages in (3, 1)] and traced == [1]
    assert "one stage" in caplog.text


def test_compiled_code_holds_launches_on_a_gpu_at_sizes_that_do_not_vary():
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    sizes = mode.from_tensor(torch.empty(4, 5)).shape
    with mode:
        x = torch.empty(4, 5, device="cuda")
        assert _launch.holds_launches((x, 3, None)) and not _launch.holds_launches((torch.empty(4, 5), 3))
        assert not _launch.holds_launches((torch.empty(sizes, device="cuda"), x))
        assert not _launch.holds_launches((x, sizes[1]))


def test_errors_of_the_compiler_name_the_kernel_and_memory_is_no_such_error():
    def failing(error):
        def warmup(*args, grid, **options):
            raise error

        return SimpleNamespace(fn=SimpleNamespace(__name__="a_kernel"), warmup=warmup)

    with pytest.raises(
        _launch.KernelError, match=r"a_kernel cannot .*PassManager::run failed.*=reference"
    ) as e:
        _launch._load(failing(ValueError("PassManager::run\nfailed")), (1,), (), {})
    assert "\n" not in str(e.value) and "=reference" not in e.value.reason
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("x"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ):
        with pytest.raises(type(error)) as e:
            _launch._load(failing(error), (1,), (), {})
        assert e.value is error


# ---- commands -------------------------------------------------------------------------------------


@pytest.mark.plain
def test_listing(monkeypatch):
    assert [r["op"] for r in tune.describe("cpu")] == list(OPS)
    monkeypatch.setattr(_launch, "INTERPRET", False)
    assert not tune.describe("cpu")[0]["runs"] and "do not run on cpu" in tune.headline("cpu")


def fake_spec() -> Spec:
    """An op whose result is wrong under one setting, that spills under another, and whose time is its setting."""

    def ours(x):
        key = _launch.config_key("fwd", x.dtype, D=8)
        b = _launch.settings("fake", key, x.device, {"B": 1})["B"]
        # what a launch of a compiled kernel returns
        compiled = SimpleNamespace(n_spills=8 if b == 2 else 0)
        _launch.launch({(1,): lambda *args, **options: compiled}, (1,), x)
        return x * 2 if b != 3 else x * 2.5

    providers = {"ours": ours, "reference": lambda x: x * 2}
    case = Case("only", lambda d, t, g: (torch.ones(8, dtype=t),), providers, 1, backward=False)
    space = lambda direction, sizes: [{"B": b} for b in (3, 9, 4, 2, sizes["D"] - 1)]  # noqa: E731
    return Spec("fake", 1, "", (), (), dict, lambda quick: [case], space)


def test_tuning_takes_the_fastest_settings_that_are_correct_and_do_not_spill():
    timed, said = [], []

    def clock(call):
        timed.append(_launch.settings("fake", "fwd|fp32|D8", torch.device("cpu"), {"B": 100})["B"])
        return float(timed[-1])

    s = fake_spec()
    found = tune.tune(s, s.cases(True)[0], torch.float32, "cpu", clock, said.append)
    assert timed == [100, 9, 4, 7]
    assert found == {"fwd|fp32|D8": {"config": {"B": 4}, "us": 4.0, "default_us": 100.0}}
    assert len(said) == 2 and "wrong" in said[0] and "spills" in said[1]
    # a gain below 3 % is none
    found = tune.tune(s, s.cases(True)[0], torch.float32, "cpu", lambda call: 100.0, said.append)
    assert found == {}


def test_tuning_changes_one_setting_at_a_time():
    s = Spec("fake", 1, "", (), (), dict, list, lambda direction, sizes: grid(A=(1, 2, 3), B=(sizes["n"], 5)))
    near = tune.settings_to_try(s, "bwd|bf16|n39", {"A": 1, "B": 5, "C": 7})
    assert near == [{"A": 1, "B": 39}, {"A": 2, "B": 5}, {"A": 3, "B": 5}]
    # settings outside of the space begin at the nearest
    assert tune.settings_to_try(s, "bwd|bf16|n39", {"A": 8, "B": 8}) == s.space("bwd", {"n": 39})


@pytest.mark.plain
def test_a_gpu_on_which_triton_cannot_compile_is_said(monkeypatch):
    def run(device):
        raise RuntimeError("Failed to find C compiler.\nSet CC")

    monkeypatch.setattr(_launch, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.import_module("extrema_fast.kernels._probe"), "run", run)
    for f in (_launch._too_old, _launch.compiler_missing):
        f.cache_clear()
    try:
        runs, why = _launch.can_run("cuda")
        assert not runs and "Failed to find C compiler. Set CC" in why and "gcc" in why and "\n" not in why
    finally:
        for f in (_launch._too_old, _launch.compiler_missing):
            f.cache_clear()
