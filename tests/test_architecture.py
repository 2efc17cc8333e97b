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
    {"utils.errors"},
    {"configs.model_presets", "utils.text", "utils.files", "utils.uri"},
    {
        "configs.training_config",
        "configs.model_config",
        "utils.child_process",
        "utils.console",
        "utils.documents",
        "utils.startup",
        "utils.ranks",
    },
    {
        "utils.bucket",
        "utils.checks",
        "utils.diagnosis",
        "utils.disk_trend",
        "utils.estimates",
        "utils.event_file",
        "utils.findings",
        "utils.flat_partition",
        "utils.layout",
        "utils.cpu_products",
        "utils.live_screen",
        "utils.mfu",
        "utils.progress",
        "utils.sample_model",
        "utils.text_plots",
        "utils.text_stream",
    },
    {"utils.directory_bucket", "utils.gcs_bucket"},
    {"utils.storage"},
    {"utils.journal", "utils.losses", "utils.parallel_upload", "utils.watched_command"},
    {
        "utils.checkpoint_files",
        "utils.driver_facts",
        "utils.gpu_types",
        "utils.host_facts",
        "utils.metadata",
        "utils.metrics_log",
        "utils.model_building",
        "utils.parts",
        "utils.shard_index",
        "utils.sharding",
        "utils.snapshot",
        "utils.step_guard",
        "utils.token_choice",
        "utils.torch_facts",
        "utils.transports",
    },
    {"utils.deepspeed_engine", "utils.tokenizer_loading"},
    {"utils.tokenizer_conversion"},
    {
        "utils.archive",
        "utils.archive_reading",
        "utils.checkpoint_choice",
        "utils.checkpoint_writer",
        "utils.data_state",
        "utils.device_timing",
        "utils.driver_findings",
        "utils.evaluation_log",
        "utils.generation",
        "utils.gguf_model",
        "utils.gguf_tokenizer",
        "utils.grace",
        "utils.machine",
        "utils.model_check",
        "utils.notifier",
        "utils.plots",
        "utils.preemption",
        "utils.prefix_lease",
        "utils.prices",
        "utils.prompts",
        "utils.remote_checkpoints",
        "utils.retention",
        "utils.configuration_fit",
        "utils.run_state",
        "utils.run_warnings",
        "utils.sample_order",
        "utils.scoring",
        "utils.scaling",
        "utils.scaling_run",
        "utils.shard_cache",
        "utils.shard_writer",
        "utils.spending",
        "utils.state_files",
        "utils.stopping",
        "utils.task_data",
        "utils.text_sources",
        "utils.token_bytes",
        "utils.token_cache",
        "utils.throughput",
        "utils.token_files",
        "utils.run_tracker",
        "utils.tokenization",
        "utils.transfer",
        "utils.training_utils",
        "utils.upload_rate",
        "utils.weight_drift",
    },
    {"utils.costs"},
    {
        "utils.bad_steps",
        "utils.checkpoint_metadata",
        "utils.checkpoint_report",
        "utils.checkpoint_saver",
        "utils.checkpoint_store",
        "utils.corpus_output",
        "utils.corpus_reading",
        "utils.mixture",
        "utils.data_utils",
        "utils.export_target",
        "utils.gguf_file",
        "utils.evaluation_text",
        "utils.gpu_findings",
        "utils.machine_checks",
        "utils.gpu_health",
        "utils.gpu_text",
        "utils.host_findings",
        "utils.model_card",
        "utils.run_findings",
        "utils.shard_inspection",
        "utils.started_runs",
        "utils.sampling",
        "utils.scaling_tables",
        "utils.step_probe",
        "utils.task_scores",
        "utils.tensorboard_tracker",
        "utils.token_stream",
        "utils.upload_job",
        "utils.wandb_tracker",
    },
    {"utils.cloud_tables", "utils.hub_target", "utils.upload_process"},
    {"utils.uploader"},
    {
        "utils.download",
        "utils.machine_sharing",
        "utils.perplexity",
        "utils.pruning",
        "utils.stand_in_trainer",
        "utils.tracking",
        "utils.upload_status",
        "utils.upload_witness",
        "utils.verification",
        "utils.run_comparison",
        "utils.run_saving",
    },
    {
        "utils.checkpoint_shelf",
        "utils.checkpoint_text",
        "utils.checkpoint_utils",
        "utils.corpus",
        "utils.evaluation",
        "utils.forecast",
        "utils.micro_batch",
        "utils.model_loading",
        "utils.resume",
        "utils.run_status",
    },
    {
        "utils.consolidation",
        "utils.model_export",
        "utils.harness",
        "utils.model_finding",
        "utils.monitor_view",
        "utils.preflight",
        "utils.run_events",
        "utils.run_start",
        "utils.text_generation",
    },
    {"utils.model_arguments", "utils.training_run"},
    {"utils.model_arguments", "utils.model_evaluation", "utils.training_run"},
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
        "scripts.soak",
        "scripts.soak_uploads",
        "scripts.upload_manager",
    },
]
LAYER_OF = {module: number for number, layer in enumerate(LAYERS) for module in layer}

WITHOUT_TORCH = [
    "utils.tokenizer_conversion",
    "debug_gpu",
    "utils.archive",
    "utils.archive_reading",
    "utils.checkpoint_choice",
    "utils.checkpoint_report",
    "utils.checkpoint_shelf",
    "utils.checkpoint_store",
    "utils.checkpoint_text",
    "utils.checkpoint_writer",
    "utils.child_process",
    "utils.cloud_tables",
    "utils.costs",
    "utils.data_state",
    "utils.download",
    "utils.checks",
    "utils.estimates",
    "utils.export_target",
    "utils.evaluation_log",
    "utils.evaluation_text",
    "utils.findings",
    "utils.gguf_file",
    "utils.gguf_model",
    "utils.gguf_tokenizer",
    "utils.flat_partition",
    "utils.gpu_types",
    "utils.grace",
    "utils.harness",
    "utils.startup",
    "utils.hub_target",
    "utils.journal",
    "utils.layout",
    "utils.startup",
    "utils.metadata",
    "utils.mfu",
    "utils.mixture",
    "utils.model_card",
    "utils.model_arguments",
    "utils.model_finding",
    "utils.model_loading",
    "utils.monitor_view",
    "utils.preemption",
    "utils.parallel_upload",
    "utils.parts",
    "utils.prefix_lease",
    "utils.plots",
    "utils.prices",
    "utils.prompts",
    "utils.pruning",
    "utils.remote_checkpoints",
    "utils.resume",
    "utils.retention",
    "utils.run_events",
    "utils.run_status",
    "utils.sample_order",
    "utils.scaling",
    "utils.scaling_run",
    "utils.scaling_tables",
    "utils.shard_cache",
    "utils.shard_index",
    "utils.spending",
    "utils.stand_in_trainer",
    "utils.storage",
    "utils.task_data",
    "utils.text_plots",
    "utils.text_stream",
    "utils.throughput",
    "utils.token_bytes",
    "utils.token_stream",
    "utils.transports",
    "utils.upload_rate",
    "utils.upload_job",
    "utils.upload_process",
    "utils.upload_status",
    "utils.upload_witness",
    "utils.uploader",
    "utils.verification",
    "utils.watched_command",
    "utils.weight_drift",
    "utils.diagnosis",
    "utils.device_timing",
    "utils.torch_facts",
    "scripts.checkpoint_viewer",
    "scripts.consolidate_checkpoint",
    "scripts.export_model",
    "scripts.generate",
    "scripts.evaluate",
    "scripts.monitor_training",
    "scripts.plan_scaling",
    "scripts.prepare_data",
    "scripts.prove_resume",
    "scripts.soak",
    "scripts.soak_uploads",
    "scripts.upload_manager",
    "train",
]


def module_files() -> dict[str, Path]:
    files = [PROJECT_DIRECTORY / "train.py", PROJECT_DIRECTORY / "debug_gpu.py"]
    for folder in ("configs", "utils", "scripts"):
        files += sorted((PROJECT_DIRECTORY / folder).glob("*.py"))
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
    assert users == {"utils.gcs_bucket"}


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
