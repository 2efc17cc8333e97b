"""Environment variables that point the real clients at a server, with no credentials.

Each function writes what it needs below a folder of its own, and returns only the variables
to add: `subprocess.run(..., env={**os.environ, **server.gsutil_environment(tmp_path)})`.
"""

from __future__ import annotations

from collections.abc import Mapping
from configparser import ConfigParser
from pathlib import Path

GSUTIL_OPTIONS = {
    # gsutil's own: 23 attempts, up to 32 s apart, which is more than a test can wait for.
    "Boto:num_retries": "6",
    "Boto:max_retry_delay": "1",
    "GSUtil:check_hashes": "always",
    "GSUtil:software_update_check_period": "0",
    # One process, as few threads as a parallel composite upload needs to be one.
    "GSUtil:parallel_process_count": "1",
    "GSUtil:parallel_thread_count": "4",
}


def gsutil_environment(
    directory: Path, port: int, certificate: Path, options: Mapping[str, str]
) -> dict[str, str]:
    """Write a boto configuration that trusts the certificate; `port` is that of TLS.

    `options` are more settings as "Section:option"; they win.
    """
    home = directory / "gsutil"
    home.mkdir(parents=True, exist_ok=True)
    address = {"host": "127.0.0.1", "port": str(port)}
    settings = {f"Credentials:gs_{key}": value for key, value in address.items()}
    settings |= {f"Credentials:gs_json_{key}": value for key, value in address.items()}
    settings |= {"Boto:ca_certificates_file": str(certificate)}
    settings |= {"GSUtil:state_dir": str(home / "state")}
    config = ConfigParser(interpolation=None)
    for key, value in {**settings, **GSUTIL_OPTIONS, **options}.items():
        section, _, option = key.partition(":")
        if not config.has_section(section):
            config.add_section(section)
        config.set(section, option, value)
    boto = home / "boto.cfg"
    with boto.open("w") as file:
        config.write(file)
    # The wrapper of the Cloud SDK puts its own setting before that of the configuration.
    trust = {"CLOUDSDK_CORE_CUSTOM_CA_CERTS_FILE": str(certificate)}
    return {"BOTO_CONFIG": str(boto), "BOTO_PATH": "", **trust, **_cloudsdk(home)}


def gcloud_environment(directory: Path, url: str) -> dict[str, str]:
    """Set up `gcloud storage`, whose configuration goes below `directory`."""
    home = directory / "gcloud"
    home.mkdir(parents=True, exist_ok=True)
    return {
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{url}/storage/v1/",
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "True",
        "CLOUDSDK_STORAGE_PROCESS_COUNT": "1",
        "CLOUDSDK_STORAGE_THREAD_COUNT": "4",
        **_cloudsdk(home),
    }


def client_environment(url: str) -> dict[str, str]:
    """Set up `google.cloud.storage.Client`.

    Without the second variable, version 3.17 asks for the bucket in a background thread at its
    first use, which takes faults meant for other requests, and outlives the client.
    """
    quiet = {"DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA": "true"}
    return {"STORAGE_EMULATOR_HOST": url, **quiet, **_no_proxy()}


def _cloudsdk(home: Path) -> dict[str, str]:
    config = home / "cloudsdk"
    config.mkdir(exist_ok=True)
    return {
        "CLOUDSDK_CONFIG": str(config),
        "CLOUDSDK_CORE_PROJECT": "fake-project",
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
        "CLOUDSDK_CORE_CHECK_GCE_METADATA": "0",
        "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
        **_no_proxy(),
    }


def _no_proxy() -> dict[str, str]:
    return {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
