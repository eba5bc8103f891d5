"""The encoder inside other people's libraries, each of them real and skipped where it is not installed.

Covers: peft (adapters on every layer, merged and taken away), captum, pytorch-grad-cam, torchinfo, ptflops, fvcore,
torch-pruning, torchao, accelerate's offloading, Lightning, segmentation_models.pytorch; FSDP2, tensor parallelism and
DistributedDataParallel in two processes; timm's own tests from its source distribution (`--timm-tests FOLDER`).

`make test-tools` installs and runs all of it.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from extrema_fast.config import ModelConfig
from extrema_fast.errors import UsageError
from extrema_fast.models.encoder import Encoder
from tests.encoders import assert_same, close, encoded, randomized

pytestmark = [
    pytest.mark.slow,
    # what these libraries say about torch and each other
    pytest.mark.filterwarnings("ignore"),
]

CONFIG = ModelConfig(img_size=(8, 12), patch_size=4, width=32, depth=2, heads=4, mlp_ratio=2.0, pool_depth=1)
N = 6
KEEP = torch.tensor([[4, 0, 3], [1, 1, 5]])
LINEAR = [
    *(f"blocks.1.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    *(f"blocks_token.0.{name}" for name in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")),
]
NORMS = [f"{block}.0.norm{i}" for block in ("blocks", "blocks_token") for i in (1, 2)]
PARTS = [
    *("patch_embed", "patch_embed.proj", "norm", *LINEAR, *NORMS),
    *(f"{block}.0{part}" for block in ("blocks", "blocks_token") for part in ("", ".attn", ".mlp")),
]


def make(dtype: torch.dtype = torch.float64, **options) -> Encoder:
    torch.manual_seed(0)
    return randomized(Encoder(CONFIG, **options)).to(dtype)


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def away(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


# ---- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize(
    "places", [*([p] for p in (*LINEAR, "patch_embed.proj")), [*LINEAR, "patch_embed.proj"]]
)
def test_peft_lora(places, options):
    peft = pytest.importorskip("peft")
    encoder, x = make(), images()
    before = encoded(encoder, x, KEEP).detach()
    model = peft.get_peft_model(encoder, peft.LoraConfig(r=2, target_modules=places, **options)).double()
    for name, p in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(p, std=0.2)
    after = encoded(encoder, x, KEEP)
    assert not close(after, before, 1e-6)
    assert_same(encoder, None)
    assert_same(encoder, KEEP)
    model.merge_adapter()
    assert close(encoded(encoder, x, KEEP), after, 1e-8)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert close(encoded(encoder, x, KEEP), before, 1e-8)
    assert close(encoded(model.merge_and_unload(), x, KEEP), after, 1e-8)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("LoHaConfig", {}),
        ("LoKrConfig", {}),
        ("AdaLoraConfig", {"total_step": 10}),
        ("OFTConfig", {"r": 0, "oft_block_size": 4}),
        ("BOFTConfig", {"boft_block_size": 4}),
        ("HRAConfig", {}),
        ("FourierFTConfig", {"n_frequency": 10}),
        ("IA3Config", {"feedforward_modules": ["blocks.1.mlp.fc2"]}),
    ],
)
def test_peft_adapters(config, options):
    peft = pytest.importorskip("peft")
    encoder = make()
    before = encoded(encoder, images(), KEEP).detach()
    model = peft.get_peft_model(encoder, getattr(peft, config)(target_modules=LINEAR, **options)).double()
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.1)
    assert not close(encoded(encoder, images(), KEEP), before, 1e-6)
    assert_same(encoder, KEEP)


# ---- attribution ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["LayerIntegratedGradients", "LayerGradCam", "LayerActivation", "LayerConductance"]
)
def test_captum(method):
    attr = pytest.importorskip("captum.attr")
    encoder, x = make(num_classes=3), images()
    options = {} if method == "LayerActivation" else {"target": 1}
    options |= {"n_steps": 20} if method in ("LayerIntegratedGradients", "LayerConductance") else {}
    for place in PARTS:
        found = getattr(attr, method)(encoder, encoder.get_submodule(place)).attribute(x, **options)
        found = found[0] if isinstance(found, tuple) else found
        assert found.isfinite().all(), place
        # the first query is the class token, whatever the image is
        constant = place.endswith("attn.q") and method in ("LayerIntegratedGradients", "LayerConductance")
        assert constant or found.any(), place
    if method == "LayerIntegratedGradients":
        found = attr.LayerIntegratedGradients(encoder, encoder.patch_embed).attribute(
            x, n_steps=200, target=1
        )
        assert close(found.sum((1, 2)), (encoder(x) - encoder(x * 0))[:, 1], 1e-5)


@pytest.mark.parametrize("method", ["GradCAM", "GradCAMPlusPlus", "EigenCAM", "LayerCAM", "HiResCAM"])
def test_grad_cam(method):
    cam = pytest.importorskip("pytorch_grad_cam")
    encoder, x = make(torch.float32, num_classes=3), images(torch.float32)

    def to_map(t):
        return t if t.dim() == 4 else t.unflatten(1, (2, 3)).permute(0, 3, 1, 2)

    for place in ("blocks.1.norm1", "blocks.1", "blocks.0.attn.proj", "blocks.0.mlp.fc2", "patch_embed.proj"):
        model = copy.deepcopy(encoder)
        with getattr(cam, method)(model, [model.get_submodule(place)], reshape_transform=to_map) as run:
            found = torch.from_numpy(run(input_tensor=x, targets=None))
        assert found.shape == (2, 8, 12) and found.isfinite().all() and found.any(), place


# ---- counting -------------------------------------------------------------------------------------


def products() -> int:
    """Multiplications of all layers for one image."""
    w, h = 32, 64
    trunk = N * (3 * 16 * w + 2 * (4 * w * w + 2 * w * h))
    return trunk + 2 * w * w + 2 * (N + 1) * w * w + 2 * w * h + 3 * w


def test_torchinfo():
    torchinfo = pytest.importorskip("torchinfo")
    encoder = make(torch.float32, num_classes=3)
    found = torchinfo.summary(encoder, (1, 3, 8, 12), verbose=0)
    assert found.total_params == sum(p.numel() for p in encoder.parameters())
    layers = [layer for layer in found.summary_list if layer.is_leaf_layer and layer.num_params > 0]
    assert {layer.module for layer in layers} >= {encoder.get_submodule(place) for place in (*LINEAR, *NORMS)}
    assert all(layer.output_size for layer in layers)


@pytest.mark.parametrize("backend", ["pytorch", "aten"])
def test_ptflops(backend):
    ptflops = pytest.importorskip("ptflops")
    options = {"as_strings": False, "print_per_layer_stat": False, "backend": backend}
    encoder = make(torch.float32, num_classes=3)
    count, parameters = ptflops.get_model_complexity_info(encoder, (3, 8, 12), **options)
    assert parameters == sum(p.numel() for p in encoder.parameters())
    # attention, norms and biases on top; operations are counted as they run, and keys and values of the pooling do not
    absorbed = 2 * (N + 1) * 32 * 32 if backend == "aten" else 0
    assert products() - absorbed <= count <= products() * 1.2


def test_fvcore():
    fvcore = pytest.importorskip("fvcore.nn")
    encoder = make(torch.float32, num_classes=3)
    count = fvcore.FlopCountAnalysis(encoder, images(torch.float32)[:1])
    by = count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_module()
    assert by["blocks.1.attn.qkv"] == N * 32 * 96 and by["blocks_token.0.attn.k"] == (N + 1) * 32 * 32
    assert products() <= by[""] <= products() * 1.2


# ---- smaller models -------------------------------------------------------------------------------


def prune(encoder: Encoder, keep_width: bool, **options) -> None:
    pruning = pytest.importorskip("torch_pruning")
    blocks = [*encoder.blocks, *encoder.blocks_token]
    width = [encoder.patch_embed.proj, *(layer for b in blocks for layer in (b.attn.proj, b.mlp.fc2))]
    heads = {b.attn.qkv: b.attn.heads for b in encoder.blocks}
    heads |= {layer: b.attn.heads for b in encoder.blocks_token for layer in (b.attn.q, b.attn.k, b.attn.v)}
    pruner = pruning.pruner.BasePruner(
        encoder,
        images(torch.float32),
        importance=pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[encoder.head, *(width if keep_width else [])],
        num_heads=heads,
        **options,
    )
    pruner.step()
    for block in blocks:
        attn = block.attn
        attn.heads = pruner.num_heads.get(attn.qkv if hasattr(attn, "qkv") else attn.q, attn.heads)


@pytest.mark.parametrize(
    ("options", "keep_width", "how"),
    [
        ({}, True, {}),
        ({}, True, {"prune_num_heads": True, "head_pruning_ratio": 0.5}),
        ({"pos_embed": "learned"}, False, {}),
        ({"pos_embed": "learned", "global_pool": "avg"}, False, {}),
    ],
    ids=["inner", "heads", "all", "mean"],
)
def test_torch_pruning(options, keep_width, how):
    encoder = make(torch.float32, num_classes=3, **options)
    if options.get("global_pool"):
        encoder.blocks_token = nn.ModuleList()
    before = sum(p.numel() for p in encoder.parameters())
    prune(encoder, keep_width, **how)
    assert sum(p.numel() for p in encoder.parameters()) < 0.7 * before
    out = encoder(images(torch.float32))
    out.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    encoder.double()
    if encoder.num_prefix_tokens:
        assert_same(encoder, None)
        assert_same(encoder, KEEP)


def test_torch_pruning_leaves_fixed_positions():
    encoder = make(torch.float32, num_classes=3)
    prune(encoder, False)
    with pytest.raises(UsageError, match=r"^patch_embed\.proj: .*pos_embed='learned'"):
        encoder(images(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(config, dtype):
    quantization = pytest.importorskip("torchao.quantization")
    encoder, x = make(dtype, num_classes=3), images(dtype)
    small = copy.deepcopy(encoder)
    quantization.quantize_(small, getattr(quantization, config)())
    layers = [m for m in small.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 15 and not any(type(m.weight) is nn.Parameter for m in layers)
    with torch.no_grad():
        assert 0 < away(small(x), encoder(x)) < 0.1
        assert 0 < away(small.encode(x, KEEP).patches, encoder.encode(x, KEEP).patches) < 0.1
        compiled = torch.compile(small, backend="eager", fullgraph=True)
        assert close(compiled(x).float(), small(x).float(), 0.02)


# ---- loading, training ----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_accelerate_offloads(where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    wanted, x = make()(images()), images()
    if where == "disk":
        encoder = accelerate.disk_offload(make(), tmp_path, execution_device="cpu")
    else:
        encoder = accelerate.cpu_offload(make(), execution_device="cpu")
    assert encoder.blocks[0].attn.qkv.weight.device.type == "meta"
    with torch.no_grad():
        assert close(encoder(x), wanted)


def test_accelerate_dispatches(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    wanted = make().encode(images(), KEEP).patches
    encoder = make()
    places = {name: "disk" for name, _ in encoder.named_children()} | {"cls_token": "cpu", "pos_embed": "cpu"}
    encoder = accelerate.dispatch_model(
        encoder, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    with torch.no_grad():
        assert close(encoder.encode(images(), KEEP).patches, wanted)


def test_lightning():
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder = make(torch.float32, num_classes=3)

        def training_step(self, batch, _):
            return (
                self.encoder(batch[0]).square().mean()
                + self.encoder.encode(batch[0], KEEP).cls.square().mean()
            )

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    module = Module()
    before = copy.deepcopy(module.state_dict())
    data = torch.utils.data.TensorDataset(images(torch.float32))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=2, accelerator="cpu", precision="bf16-mixed", **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, _ in module.named_parameters()}


def test_segmentation_models():
    models = pytest.importorskip("segmentation_models_pytorch")
    pytest.importorskip("extrema_fast.timm")
    model = models.DPT("tu-extrema_vit_tiny_patch16_224", encoder_weights=None, classes=2).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 2, 224, 224)


# ---- two processes --------------------------------------------------------------------------------


def _sharded(encoder: Encoder, mesh, places) -> Encoder:
    from torch.distributed.fsdp import fully_shard

    for place in places:
        fully_shard(encoder.get_submodule(place), mesh=mesh)
    return encoder


def _parallel(encoder: Encoder, mesh, heads: int = 2, whole: bool = True) -> Encoder:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict = {}
    for block in ("blocks.0", "blocks.1", "blocks_token.0"):
        plan |= {f"{block}.mlp.fc1": ColwiseParallel(), f"{block}.mlp.fc2": RowwiseParallel()}
    for block in ("blocks.0", "blocks.1"):
        out = {"output_layouts": Replicate()} if whole else {}
        plan[f"{block}.attn.qkv"] = ColwiseParallel(**out)
        plan[f"{block}.attn.proj"] = RowwiseParallel(**({"input_layouts": Replicate()} if whole else {}))
    plan |= {f"blocks_token.0.attn.{name}": ColwiseParallel() for name in "qkv"}
    plan["blocks_token.0.attn.proj"] = RowwiseParallel()
    encoder.blocks_token[0].attn.heads = heads
    parallelize_module(encoder, mesh, plan)
    return encoder


def _worker(rank: int, meeting: str, failures) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{meeting}")
    mesh = init_device_mesh("cpu", (2,))
    plain, x = make(num_classes=3), images()
    wanted, kept = plain(x), plain.encode(x, KEEP).patches
    wanted.square().sum().backward()
    grads = {name: p.grad for name, p in plain.named_parameters()}

    def differs(name: str, encoder: nn.Module, masked: bool = True) -> None:
        out = encoder(x)
        out.square().sum().backward()
        wrong = not close(out, wanted, 1e-10)
        for key, p in encoder.named_parameters():
            found = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            wrong |= not close(found, grads[key.removeprefix("module.")], 1e-9)
        wrong |= masked and not close(encoder.encode(x, KEEP).patches, kept, 1e-10)
        if wrong:
            failures.put(name)

    # one of each kind
    for place in [place for place in PARTS if not re.search(r"\.(fc1|k|v|norm2)$|^blocks_token\.0$", place)]:
        differs(place, _sharded(make(num_classes=3), mesh, [place]))
    differs(
        "every layer", _sharded(make(num_classes=3), mesh, [*LINEAR, *NORMS, "patch_embed.proj", ""]), False
    )
    differs(
        "blocks", _sharded(make(num_classes=3), mesh, ["blocks.0", "blocks.1", "blocks_token.0", ""]), False
    )
    differs("tensor parallel", _parallel(make(num_classes=3), mesh))
    differs("DDP", nn.parallel.DistributedDataParallel(make(num_classes=3)), False)
    try:
        _parallel(make(num_classes=3), mesh, whole=False)(x)
        failures.put("a share of q, k, v without an error")
    except UsageError as error:
        if "blocks.0.attn.qkv" not in str(error):
            failures.put(str(error))
    dist.destroy_process_group()


def test_sharded_and_parallel_layers(tmp_path):
    import torch.multiprocessing as mp

    failures = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_worker, (str(tmp_path / "meeting"), failures), nprocs=2)
    found = set()
    while not failures.empty():
        found.add(failures.get())
    assert not found


# ---- timm's own tests -----------------------------------------------------------------------------

# torch.jit.script is refused
REFUSED = {"test_model_forward_torchscript", "test_model_forward_fx_torchscript"}
PLUGIN = """
from tests.torchvision_operators import define_torchvision_operators
define_torchvision_operators()
import extrema_fast.timm
"""


def timm_source(folder: Path, version: str) -> Path:
    """timm's source distribution in `folder`, downloaded where it is not there; skips without it."""
    archive = folder / f"timm-{version}.tar.gz"
    if not archive.is_file():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "timm"]
        done = subprocess.run([*command, "-d", folder, f"timm=={version}"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(
                f"timm {version} cannot be downloaded: {(done.stderr.strip() or '?').splitlines()[-1]}"
            )
    return archive


def test_timms_own_tests(request, tmp_path):
    timm = pytest.importorskip("timm")
    if not (folder := request.config.getoption("--timm-tests")):
        pytest.skip("opt-in, it may need the package index: --timm-tests FOLDER")
    with tarfile.open(timm_source(Path(folder), timm.__version__)) as archive:
        for name in ("test_models.py", "conftest.py"):
            member = archive.extractfile(f"timm-{timm.__version__}/tests/{name}")
            assert member is not None
            with (tmp_path / name).open("wb") as file:
                shutil.copyfileobj(member, file)
    # its lists of vision transformers, and of modules whose models give intermediate layers
    source = (tmp_path / "test_models.py").read_text()
    for name, entry in (("NON_STD_FILTERS", "extrema_*"), ("FEAT_INTER_FILTERS", "timm")):
        source, count = re.subn(rf"^{name} = \[", f"{name} = [{entry!r}, ", source, flags=re.MULTILINE)
        assert count == 1
    (tmp_path / "test_models.py").write_text(source)
    (tmp_path / "extrema_plugin.py").write_text(PLUGIN)
    paths = [str(Path(__file__).resolve().parents[2]), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "extrema_plugin", "-p", "no:cacheprovider"]
        + ["--no-header", "--tb=line", "-k", "extrema and (tiny or small)", "test_models.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    found = re.findall(r"^(PASSED|FAILED|ERROR) test_models\.py::(\w+)\[", done.stdout, re.MULTILINE)
    passed = [name for outcome, name in found if outcome == "PASSED"]
    assert {name for outcome, name in found if outcome != "PASSED"} == REFUSED, done.stdout[-3000:]
    # 8 of its tests take any model that is registered
    assert len(set(passed)) == 8 and len(passed) == 16
    print(f"{len(passed)} of {len(found)} of timm {timm.__version__}'s tests pass")
