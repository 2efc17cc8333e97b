"""The arrows of ARCHITECTURE.md: imports point one way, and some rooms never load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from configs.training_config import PROJECT_DIRECTORY

# From the bottom up. A file imports from lower layers only; files of one layer know nothing of
# each other. A module of this project that is in no layer fails the test.
LAYERS: list[set[str]] = [
    {"utils.base.archive_formats", "utils.base.errors"},
    {"configs.model_presets", "utils.base.text", "utils.base.files", "utils.base.uri"},
    {
        "configs.training_config",
        "configs.model_config",
        "utils.base.child_process",
        "utils.base.console",
        "utils.corpus.documents",
        "utils.base.startup",
        "utils.base.ranks",
    },
    {
        "utils.storage.bucket",
        "utils.start.checks",
        "utils.tools.diagnosis.diagnosis",
        "utils.tools.monitor.disk_trend",
        "utils.models.estimates",
        "utils.tracking.event_file",
        "utils.training.flat_partition",
        "utils.checkpoints.layout",
        "utils.models.cpu_products",
        "utils.tools.monitor.live_screen",
        "utils.models.mfu",
        "utils.base.progress",
        "utils.tools.diagnosis.sample_model",
        "utils.base.text_plots",
        "utils.models.text_stream",
    },
    {"utils.storage.directory", "utils.storage.gcs"},
    {"utils.storage.open"},
    {
        "utils.checkpoints.journal",
        "utils.models.losses",
        "utils.uploads.parallel_upload",
        "utils.uploads.watched_command",
    },
    {
        "utils.checkpoints.files",
        "utils.tools.diagnosis.driver_facts",
        "utils.costs.gpu_types",
        "utils.tools.diagnosis.host_facts",
        "utils.checkpoints.views",
        "utils.tracking.metrics_log",
        "utils.models.building",
        "utils.models.parts",
        "utils.data.shard_index",
        "utils.training.sharding",
        "utils.checkpoints.snapshot",
        "utils.training.step_guard",
        "utils.models.token_choice",
        "utils.tools.diagnosis.torch_facts",
        "utils.uploads.transports",
    },
    {"utils.training.deepspeed", "utils.models.tokenizer"},
    {"utils.corpus.tokenizer_conversion"},
    {
        "utils.uploads.archive",
        "utils.remote.archive_reading",
        "utils.tools.viewer.choice",
        "utils.checkpoints.writer",
        "utils.data.data_state",
        "utils.tools.diagnosis.device_timing",
        "utils.tools.diagnosis.driver_findings",
        "utils.tools.evaluation.log",
        "utils.models.generation",
        "utils.tools.export.gguf_model",
        "utils.tools.export.gguf_tokenizer",
        "utils.run.grace",
        "utils.base.machine",
        "utils.models.check",
        "utils.tools.monitor.notifier",
        "utils.tracking.plots",
        "utils.training.preemption",
        "utils.uploads.lease",
        "utils.costs.prices",
        "utils.tools.generation.prompts",
        "utils.remote.listing",
        "utils.checkpoints.retention",
        "utils.tools.diagnosis.configuration_fit",
        "utils.tools.monitor.state",
        "utils.tools.monitor.warnings",
        "utils.data.sample_order",
        "utils.tools.evaluation.scoring",
        "utils.costs.scaling",
        "utils.costs.scaling_run",
        "utils.data.shard_cache",
        "utils.corpus.shard_writer",
        "utils.costs.spending",
        "utils.checkpoints.state_files",
        "utils.training.stopping",
        "utils.tools.evaluation.task_data",
        "utils.corpus.text_sources",
        "utils.tools.evaluation.token_bytes",
        "utils.corpus.token_cache",
        "utils.training.throughput",
        "utils.corpus.token_files",
        "utils.tracking.tracker",
        "utils.corpus.tokenization",
        "utils.data.transfer",
        "utils.training_utils",
        "utils.uploads.rate",
        "utils.tools.viewer.weight_drift",
    },
    {"utils.costs.costs"},
    {
        "utils.run.bad_steps",
        "utils.checkpoint_metadata",
        "utils.tools.viewer.report",
        "utils.checkpoints.saver",
        "utils.checkpoints.store",
        "utils.corpus.output",
        "utils.corpus.reading",
        "utils.data.mixture",
        "utils.data_utils",
        "utils.tools.export.target",
        "utils.tools.export.gguf",
        "utils.tools.evaluation.text",
        "utils.tools.diagnosis.gpu_findings",
        "utils.start.machine_checks",
        "utils.tools.diagnosis.gpu_health",
        "utils.tools.diagnosis.gpu_text",
        "utils.tools.diagnosis.host_findings",
        "utils.tools.export.model_card",
        "utils.tools.monitor.log_findings",
        "utils.corpus.shard_inspection",
        "utils.tools.proofs.started_runs",
        "utils.run.sample_texts",
        "utils.costs.scaling_tables",
        "utils.start.step_probe",
        "utils.tools.evaluation.task_scores",
        "utils.tracking.tensorboard",
        "utils.data.token_stream",
        "utils.uploads.job",
        "utils.tracking.wandb",
    },
    {"utils.costs.cloud_tables", "utils.tools.export.hub_target", "utils.uploads.process"},
    {"utils.uploads.uploader"},
    {
        "utils.remote.download",
        "utils.start.machine_sharing",
        "utils.tools.evaluation.perplexity",
        "utils.remote.pruning",
        "utils.tracking.tracking",
        "utils.uploads.status",
        "utils.remote.verification",
        "utils.tools.proofs.run_comparison",
        "utils.run.saving",
    },
    {
        "utils.tools.viewer.shelf",
        "utils.tools.viewer.text",
        "utils.checkpoint_utils",
        "utils.corpus.prepare",
        "utils.run.evaluation",
        "utils.start.forecast",
        "utils.start.micro_batch",
        "utils.tools.generation.loading",
        "utils.start.resume",
        "utils.tools.monitor.status",
    },
    {
        "utils.checkpoints.consolidation",
        "utils.tools.export.export",
        "utils.tools.evaluation.harness",
        "utils.tools.generation.finding",
        "utils.tools.monitor.view",
        "utils.start.preflight",
        "utils.tools.monitor.events",
        "utils.start.restore",
        "utils.tools.generation.texts",
    },
    {"utils.tools.generation.arguments", "utils.run.run"},
    {"utils.tools.generation.arguments", "utils.tools.evaluation.evaluator", "utils.run.run"},
    {
        "train",
        "debug_gpu",
        "scripts.benchmark",
        "scripts.checkpoint_viewer",
        "scripts.consolidate_checkpoint",
        "scripts.export_model",
        "scripts.generate",
        "scripts.evaluate",
        "scripts.monitor_training",
        "scripts.plan_scaling",
        "scripts.prepare_data",
        "scripts.prove_resume",
        "scripts.upload_manager",
    },
]
LAYER_OF = {module: number for number, layer in enumerate(LAYERS) for module in layer}

WITHOUT_TORCH = [
    "utils.base.archive_formats",
    "utils.corpus.tokenizer_conversion",
    "debug_gpu",
    "utils.uploads.archive",
    "utils.remote.archive_reading",
    "utils.tools.viewer.choice",
    "utils.tools.viewer.report",
    "utils.tools.viewer.shelf",
    "utils.checkpoints.store",
    "utils.tools.viewer.text",
    "utils.checkpoints.writer",
    "utils.base.child_process",
    "utils.costs.cloud_tables",
    "utils.costs.costs",
    "utils.data.data_state",
    "utils.remote.download",
    "utils.start.checks",
    "utils.models.estimates",
    "utils.tools.export.target",
    "utils.tools.evaluation.log",
    "utils.tools.evaluation.text",
    "utils.tools.export.gguf",
    "utils.tools.export.gguf_model",
    "utils.tools.export.gguf_tokenizer",
    "utils.training.flat_partition",
    "utils.costs.gpu_types",
    "utils.run.grace",
    "utils.tools.evaluation.harness",
    "utils.base.startup",
    "utils.tools.export.hub_target",
    "utils.checkpoints.journal",
    "utils.checkpoints.layout",
    "utils.base.startup",
    "utils.checkpoints.views",
    "utils.models.mfu",
    "utils.data.mixture",
    "utils.tools.export.model_card",
    "utils.tools.generation.arguments",
    "utils.tools.generation.finding",
    "utils.tools.generation.loading",
    "utils.tools.monitor.view",
    "utils.training.preemption",
    "utils.uploads.parallel_upload",
    "utils.models.parts",
    "utils.uploads.lease",
    "utils.tracking.plots",
    "utils.costs.prices",
    "utils.tools.generation.prompts",
    "utils.remote.pruning",
    "utils.remote.listing",
    "utils.start.resume",
    "utils.checkpoints.retention",
    "utils.tools.monitor.events",
    "utils.tools.monitor.status",
    "utils.data.sample_order",
    "utils.costs.scaling",
    "utils.costs.scaling_run",
    "utils.costs.scaling_tables",
    "utils.data.shard_cache",
    "utils.data.shard_index",
    "utils.costs.spending",
    "utils.storage.open",
    "utils.tools.evaluation.task_data",
    "utils.base.text_plots",
    "utils.models.text_stream",
    "utils.training.throughput",
    "utils.tools.evaluation.token_bytes",
    "utils.data.token_stream",
    "utils.uploads.transports",
    "utils.uploads.rate",
    "utils.uploads.job",
    "utils.uploads.process",
    "utils.uploads.status",
    "utils.uploads.uploader",
    "utils.remote.verification",
    "utils.uploads.watched_command",
    "utils.tools.viewer.weight_drift",
    "utils.tools.diagnosis.diagnosis",
    "utils.tools.diagnosis.device_timing",
    "utils.tools.diagnosis.torch_facts",
    "scripts.checkpoint_viewer",
    "scripts.consolidate_checkpoint",
    "scripts.export_model",
    "scripts.generate",
    "scripts.evaluate",
    "scripts.monitor_training",
    "scripts.plan_scaling",
    "scripts.prepare_data",
    "scripts.prove_resume",
    "scripts.upload_manager",
    "train",
]


def module_files() -> dict[str, Path]:
    files = [PROJECT_DIRECTORY / "train.py", PROJECT_DIRECTORY / "debug_gpu.py"]
    for folder in ("configs", "utils", "scripts"):
        files += sorted((PROJECT_DIRECTORY / folder).rglob("*.py"))
    names = {".".join(f.relative_to(PROJECT_DIRECTORY).with_suffix("").parts): f for f in files}
    return {name: file for name, file in names.items() if not name.endswith("__init__")}


def imported_modules(file: Path) -> set[str]:
    """Return every module that a file imports, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_layer() -> None:
    assert set(module_files()) == set(LAYER_OF)


@pytest.mark.parametrize("module", sorted(LAYER_OF))
def test_imports_point_downwards(module: str) -> None:
    file = module_files()[module]
    upward = {
        other
        for other in imported_modules(file) & set(LAYER_OF)
        if LAYER_OF[other] >= LAYER_OF[module]
    }
    assert not upward, f"{module} imports {sorted(upward)}"


def test_one_module_knows_google_cloud() -> None:
    users = {
        module
        for module, file in module_files().items()
        if any(name.startswith(("google.cloud", "google.auth")) for name in imported_modules(file))
    }
    assert users == {"utils.storage.gcs"}


def test_rooms_without_torch_do_not_load_it() -> None:
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'accelerate', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} loads {heavy}'\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *WITHOUT_TORCH],
        cwd=PROJECT_DIRECTORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
